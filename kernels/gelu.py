"""gelu: the exact (erf) GELU of the frozen FFN and its gradient, written into columns of a wider buffer.

    forward     a = u Phi(u)                                    (T, F)
    backward    du = da (Phi(u) + u phi(u)), overwrites da      (T, F)

Phi and phi are the normal distribution and its density; the arithmetic is fp32. PyTorch's GELU cannot write into the
columns next to H', nor overwrite da: it would need a copy and another buffer.

For fp32 Phi comes from erf. For half precision it comes from one exponential, with t = min(|u|, 14.5):

    Phi(-t) = 2^Q(t)                                Q a polynomial of degree 10
    gelu    = (u < 0 ? -0 : u) - t 2^Q(t)
    gelu'   = u < 0 ? s : 1 - s                     s = 2^Q(t) - t phi(t)

Beyond |u| = 14.5 both exponentials are 0, so gelu(-inf) = -0 and gelu(inf) = inf with derivatives 0 and 1, where
PyTorch returns NaN. NaN stays NaN and -0 stays -0. For every finite fp16 and bf16 input the fp32 values are within 2e-6
(gelu) and 5e-6 (gelu') of the exact ones, and gelu within a factor 1 + 2e-5 up to |u| = 5.
Bytes: T F es read and written; backward T 2F es read, T F es written.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.tiles import TALLER

BM, BN = 8, 512


def gelu_reference(u: Tensor) -> Tensor:
    """a."""
    return F.gelu(u)


def gelu_backward_reference(u: Tensor, da: Tensor) -> Tensor:
    """du."""
    return torch.ops.aten.gelu_backward(da, u)


@triton.jit
def log2_tail(t):
    """Q(t), log2 Phi(-t) for t in [0, 14.5]: a minimax fit, to 2e-6 up to t = 4.5 and ever looser beyond."""
    q = t * -1.7463330383123191e-9 + 8.515371145035459e-8
    q = (q * t - 1.6168411458375417e-6) * t + 1.4178953965831885e-5
    q = (q * t - 3.015775972167377e-5) * t - 6.15889631083389e-4
    q = (q * t + 7.868619120492817e-3) * t - 5.323087217155075e-2
    q = (q * t - 0.458878275735445) * t - 1.1511616802355336
    return q * t - 0.9999984152986627


@triton.jit
def gelu_value(u, EXACT: tl.constexpr):
    """gelu(u) of fp32 values; EXACT by erf, else by one exponential."""
    if EXACT:
        return u * (0.5 + 0.5 * tl.erf(u * 0.7071067811865476))
    t = tl.minimum(tl.abs(u), 14.5, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(u < 0, -0.0, u) - t * tl.exp2(log2_tail(t))


@triton.jit
def gelu_derivative(u, EXACT: tl.constexpr):
    """Phi(u) + u phi(u) of fp32 values."""
    if EXACT:
        density = tl.exp(-0.5 * u * u) * 0.3989422804014327
        return 0.5 + 0.5 * tl.erf(u * 0.7071067811865476) + u * density
    t = tl.minimum(tl.abs(u), 14.5, propagate_nan=tl.PropagateNan.ALL)
    density = tl.exp2(t * t * -0.7213475204444817 - 1.3257480647361595)
    s = tl.exp2(log2_tail(t)) - t * density
    return tl.where(u < 0, s, 1.0 - s)


@triton.jit
def gelu_kernel(u, a, a_stride, T, F, BACKWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    # Columns are the fastest in the grid, so that concurrent programs read and write whole rows.
    tiles = tl.cdiv(F, BN)
    rows = (tl.program_id(0) // tiles * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    columns = tl.program_id(0) % tiles * BN + tl.arange(0, BN)[None, :]
    inside = (rows < T) & (columns < F)
    value = tl.load(u + rows * F + columns, inside, 0.0).to(tl.float32)
    target = a + rows * a_stride + columns
    exact: tl.constexpr = u.dtype.element_ty == tl.float32
    if BACKWARD:
        result = gelu_derivative(value, exact) * tl.load(target, inside, 0.0).to(tl.float32)
    else:
        result = gelu_value(value, exact)
    tl.store(target, result.to(a.dtype.element_ty), inside)


def gelu(u: Tensor, a: Tensor, backward: bool = False) -> None:
    """Write gelu(u) into ``a`` (T, F), or overwrite da in it by du. It has any row stride, u (T, F) is contiguous."""
    tokens, width = u.shape
    bm = BM * TALLER
    gelu_kernel[(math.ceil(tokens / bm) * math.ceil(width / BN),)](
        u, a, a.stride(0), tokens, width, BACKWARD=backward, BM=bm, BN=BN, num_warps=4, enable_fp_fusion=True
    )
