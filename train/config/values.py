"""The values of settings, as recipes, --set and flags give them: texts, numbers, and yaml's lists and mappings."""

from collections.abc import Callable
from typing import Any

import yaml

from kernels import UserError

LONGEST = 20_000  # characters of yaml; a few lines of aliases can stand for billions
# Texts of the form a,b and a=1,b=2, for which yaml's [a, b] and {a: 1, b: 2} stand too.
LISTS = ("tasks", "lora_targets")
MAPPINGS = ("loss_weights",)


def convert(name: str, value: Any, kind: type, source: str) -> Any:
    """``value`` as the ``kind`` of the setting ``name``; UserError, which names its ``source``, for another one."""
    given = load_yaml(value, f"{source}: {name}") if _is_yaml(name, value) else value
    try:
        given = _flat(name, given)
        if given is None or isinstance(given, (list, dict)) or isinstance(given, bool) and kind is not bool:
            raise TypeError
        return READ[kind](given)
    except (KeyError, TypeError, ValueError, OverflowError):
        example = ", such as [a, b]" if name in LISTS else ", or a mapping {a: 1, b: 2}" if name in MAPPINGS else ""
        raise UserError(f"{source}: {name} is {value!r}, which is not {EXPECTED[kind]}{example}") from None


def load_yaml(text: str, source: str) -> Any:
    """The content of a short yaml without aliases; UserError, which names its ``source``, for another one."""
    try:
        if len(text) > LONGEST or any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)):
            raise UserError(f"{source} is longer than {LONGEST} characters, or holds a yaml alias")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{source} is not valid yaml: {' '.join(str(error).split())}") from None


def _is_yaml(name: str, value: Any) -> bool:
    """Whether a text, as --set gives it, is a list or a mapping of yaml."""
    return name in (*LISTS, *MAPPINGS) and isinstance(value, str) and value.lstrip()[:1] in ("[", "{")


def _flat(name: str, value: Any) -> Any:
    """The text that a list of names or a mapping to numbers stands for; any other value as it is."""
    if name in LISTS and isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if name in MAPPINGS and isinstance(value, dict) and not any(isinstance(x, (list, dict)) for x in value.values()):
        return ",".join(f"{key}={number}" for key, number in value.items())
    return value


def _truth(value: Any) -> bool:
    return {"true": True, "false": False}[str(value).lower()]


def _whole(value: Any) -> int:
    """``int(value)`` of a text or of a whole number."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError
    return int(value)


READ: dict[type, Callable[[Any], Any]] = {bool: _truth, int: _whole, float: float, str: str}
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
