"""The one place from which decoders take :func:`expert_mixture`."""

from typing import Any

from kernels import UserError, resolve_kernel
from kernels.experts import reference


def expert_mixture(x: Any, base: Any, experts: Any, z: Any, segments: Any, gating: Any, kernel: str = "auto") -> Any:
    """See :func:`kernels.experts.reference.expert_mixture`."""
    if kernel == "triton" and resolve_kernel(kernel, x.device) == "triton":
        raise UserError("--kernel triton: experts of a decoder have no Triton kernels yet, use --kernel reference")
    return reference.expert_mixture(x, base, experts, z, segments, gating)
