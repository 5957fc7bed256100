"""Finding layers by name: which modules of a model the patterns of ``where`` mean."""

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fastmoe_lora.layers import LoRALinear, LoRAMoE
from kernels import UserError

Patterns = str | Sequence[str]


def find_sites(model: nn.Module, where: Patterns, argument: str = "where") -> dict[str, nn.Module]:
    """The modules of ``model`` whose names match a pattern, by name; a module inside another match is left out.

    Patterns are those of :mod:`fnmatch`: ``*`` also matches dots. UserError, which names ``argument``, if none matches,
    if a match has no linear layer, or if it has two names, of which the layer would be replaced under one only.
    """
    patterns = [where] if isinstance(where, str) else list(where)
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():  # a module comes before those inside it
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and any(fnmatchcase(name, pattern) for pattern in patterns):
            if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or not _linears(module):
                kind = type(module).__name__
                raise UserError(f"{argument}={where!r} matches {name}, a {kind}: match linear layers or FFNs alone")
            twin = next((other for other in found if found[other] is module), None)
            if twin:
                raise UserError(
                    f"{argument}={where!r}: {name} is {twin}, one module by two names, and cannot be replaced"
                )
            found[name] = module
    if not found:
        names = ", ".join(_closest(modules, patterns)) or "none, the model has no linear layer"
        raise UserError(f"{argument}={where!r} matches no module; the closest names are {names}")
    return found


def find_linears(model: nn.Module, where: Patterns, argument: str) -> dict[str, nn.Linear]:
    """As :func:`find_sites`, for patterns that may match plain ``nn.Linear`` only."""
    linears: dict[str, nn.Linear] = {}
    for name, module in find_sites(model, where, argument).items():
        if type(module) is not nn.Linear:
            raise UserError(f"{argument}={where!r} matches {name}, a {type(module).__name__}: LoRA needs nn.Linear")
        linears[name] = module
    return linears


def site_shape(site: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer or an FFN: the input of its first and the output of its last linear layer."""
    linears = _linears(site)
    return linears[0].in_features, linears[-1].out_features


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear | LoRAMoE]:
    """The layers that :func:`fastmoe_lora.adapt` added to ``model``, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (LoRALinear, LoRAMoE))}


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _closest(modules: dict[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    """Up to five names of modules with linear layers, ``*`` for their numbers, in the order of likeness."""
    named = {re.sub(r"\b\d+\b", "*", name): None for name, module in modules.items() if _linears(module)}
    likeness = {
        name: max((difflib.SequenceMatcher(None, pattern, name).ratio() for pattern in patterns), default=0.0)
        for name in named
    }
    return sorted(named, key=lambda name: -likeness[name])[:5]
