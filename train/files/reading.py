"""Turns errors on broken files into one line each."""

import errno
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from kernels.errors import UserError

T = TypeVar("T")


@contextmanager
def reading(path: Path, ignored: tuple[type[Warning], ...] = ()) -> Iterator[None]:
    """Turns any exception that a decoder raises on a broken file into a UserError of one line with the path.

    A decoder's warning counts as an error, since its result is then partly a guess, unless it is of one of the
    ``ignored`` kinds.
    """
    try:
        with warnings.catch_warnings():
            for category in (UserWarning, RuntimeWarning):  # scipy's and Pillow's
                warnings.simplefilter("ignore" if category in ignored else "error", category)
            yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # others are of decoders
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} cannot be read ({reason}): restore it") from error


def sha256_of(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def require_file(path: Path) -> None:
    """UserError where ``path`` does not exist, or is a folder or a pipe, of which reading would block."""
    with reading(path):
        if not path.is_file():
            raise UserError(f"{path} is not a file" if os.path.lexists(path) else f"no such file: {path}")


def read_json(path: Path, schema: dict[str, Any]) -> dict[str, Any]:
    """The object in a JSON file; UserError where it does not have ``schema``, see :func:`require_schema`."""
    with reading(path):
        value = json.loads(path.read_text(encoding="utf-8"))
    require_schema(path, value, schema)
    return value


def require_schema(path: Path, value: Any, schema: Any, name: str = "the content") -> None:
    """UserError where a ``value`` of a JSON file is not of ``schema``: a type, a tuple of types, or an object with a
    schema for each key. The key "*" stands for all keys, and one that ends in "?" may be absent or null."""
    if not isinstance(schema, dict):
        if not isinstance(value, schema) or isinstance(value, bool):
            raise UserError(f"{path} has {value!r} as {name}: restore it, or write it again")
        return
    if not isinstance(value, dict):
        raise UserError(f"{path} has {value!r} as {name}, which is no object: restore it, or write it again")
    for pattern, inner in schema.items():
        for key in value if pattern == "*" else (pattern.removesuffix("?"),):
            if value.get(key) is None and pattern.endswith("?"):
                continue
            if key not in value:
                raise UserError(f"{path} has no {key!r} in {name}: restore it, or write it again")
            require_schema(path, value[key], inner, f"{name} {key}".removeprefix("the content "))


def parse_lines(path: Path, lines: Iterable[str], parse: Callable[[str], T]) -> list[T]:
    """``parse`` of each of the ``lines`` of ``path``. Damaged ones, for which it raises ValueError,
    are left out and named on stderr."""
    parsed, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            parsed.append(parse(line))
        except ValueError:
            damaged.append(str(number))
    if damaged:
        print(f"note: {path} is damaged in line {', '.join(damaged)}, left out here", file=sys.stderr)
    return parsed
