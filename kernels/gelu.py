"""gelu: the exact (erf) GELU of the frozen FFN and its gradient, written into columns of a wider buffer.

    forward     a = u Phi(u)                                    (T, F)
    backward    du = da (Phi(u) + u phi(u)), overwrites da      (T, F)

Phi and phi are the normal distribution and its density; the arithmetic is fp32. PyTorch's GELU cannot write into the
columns next to H', nor overwrite da: it would need a copy and another buffer.
Bytes: T F es read and written; backward T 2F es read, T F es written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

BM, BN = 8, 512


def gelu_reference(u: Tensor) -> Tensor:
    """a."""
    return F.gelu(u)


def gelu_backward_reference(u: Tensor, da: Tensor) -> Tensor:
    """du."""
    return torch.ops.aten.gelu_backward(da, u)


@triton.jit
def gelu_kernel(u, a, a_stride, T, F, BACKWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    inside = (rows < T) & (columns < F)
    value = tl.load(u + rows * F + columns, inside, 0.0).to(tl.float32)
    place = a + rows * a_stride + columns
    result = 0.5 + 0.5 * tl.erf(value * 0.7071067811865476)
    if BACKWARD:
        result += value * tl.exp(-0.5 * value * value) * 0.3989422804014327
        result *= tl.load(place, inside, 0.0).to(tl.float32)
    else:
        result *= value
    tl.store(place, result.to(a.dtype.element_ty), inside)


def gelu(u: Tensor, a: Tensor) -> None:
    """Write gelu(u) into ``a`` (T, F), with any row stride; u (T, F) is contiguous."""
    _launch(u, a, backward=False)


def gelu_backward(u: Tensor, da: Tensor) -> None:
    """Overwrite ``da`` (T, F), with any row stride, by du; u (T, F) is contiguous."""
    _launch(u, da, backward=True)


def _launch(u: Tensor, a: Tensor, backward: bool) -> None:
    tokens, width = u.shape
    grid = triton.cdiv(tokens, BM), triton.cdiv(width, BN)
    gelu_kernel[grid](
        u, a, a.stride(0), tokens, width, BACKWARD=backward, BM=BM, BN=BN, num_warps=4, enable_fp_fusion=True
    )  # fmt: skip
