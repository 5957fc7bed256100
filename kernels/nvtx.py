"""Named ranges in a profiler's timeline (NVTX): ``with nvtx.span("route"):``; without effect until :func:`enable`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

span: Callable[[str], AbstractContextManager] = nullcontext


def enable() -> None:
    """Turn the ranges of this process on; ImportError if the package nvtx is missing."""
    global span
    import nvtx

    span = partial(nvtx.annotate, domain="fastmoe_lora")
