"""Named ranges in a profiler's timeline (NVTX); without effect until :func:`enable` is called."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

Item = TypeVar("Item")

_NOTHING = nullcontext()
_on = False


def enable() -> None:
    """Turn the ranges of this process on; ImportError if the package nvtx is missing."""
    global _on
    import nvtx  # noqa: F401

    _on = True


def span(name: str) -> AbstractContextManager:
    """``with span("route"): ...``"""
    if not _on:
        return _NOTHING
    import nvtx

    return nvtx.annotate(name, domain="fastmoe_lora")


def spanned(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yields the items; the wait for each item is a range."""
    iterator = iter(items)
    while True:
        with span(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
