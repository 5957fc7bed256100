"""Progress bars: drawn on stderr where it is a terminal, nowhere in a run that is to be quiet."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_quiet = False


def progress(items: Iterable[T], title: str, total: int | None = None, unit: str = "it") -> Iterable[T]:
    """``items``, counted by a bar that is gone at the end. Without ``total`` their length is, if they have one."""
    return tqdm(items, title, total, unit=unit, leave=False, disable=True if _quiet else None)


def counter(title: str, total: int, initial: int, unit: str) -> tqdm:
    """A bar that stays, to be updated and given a postfix; ``disable`` says that it is not drawn."""
    disable = True if _quiet else None
    return tqdm(total=total, initial=initial, desc=title, unit=unit, dynamic_ncols=True, disable=disable)


@contextmanager
def quiet(on: bool = True) -> Iterator[None]:
    """A block that draws no bar and prints nothing on stdout; errors still go to stderr."""
    global _quiet
    if not on:
        yield
        return
    before, _quiet = _quiet, True
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield
    finally:
        _quiet = before
