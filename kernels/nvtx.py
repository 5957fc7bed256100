"""Named ranges in a profiler's timeline (NVTX); without effect until :func:`enable` is called."""

from contextlib import AbstractContextManager, nullcontext

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
