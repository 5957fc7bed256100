"""Named ranges in a profiler's timeline (NVTX): nothing at all until :func:`enable` was called."""

from contextlib import AbstractContextManager, nullcontext

_NOTHING = nullcontext()
_on = False


def enable() -> None:
    """Let the ranges of this process appear; ImportError where the package nvtx is missing."""
    global _on
    import nvtx  # noqa: F401

    _on = True


def span(name: str) -> AbstractContextManager:
    """``with span("route"): ...``"""
    if not _on:
        return _NOTHING
    import nvtx

    return nvtx.annotate(name, domain="fastmoe_lora")
