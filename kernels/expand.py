"""expand: the up-projection H' B^T added to the base's output, in one pass over the output.

    y = base + H' B^T                       (T, D)

Grid (block). A program keeps BM rows of H' in registers and iterates over the output columns, so they are read once. B
is small and stays in the L2.
Bytes: T (D es + R es) read, T D es written. FLOPs: 2 T D R.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gating import Pool
from kernels.jit_helpers import rows_of_block
from kernels.tiles import tile


def expand_reference(base: Tensor, gated: Tensor, b: Tensor) -> Tensor:
    """y."""
    return torch.addmm(base, gated, b.T)


@triton.jit
def expand_kernel(
    base, gated, b, y, T, base_stride, gated_stride, b_stride, D,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows, inside = rows_of_block(tl.program_id(0) * BM, T, BM)
    offs_r, rank = tl.arange(0, NP * RANK)[None, :], tl.arange(0, NP * RANK)[:, None]
    hidden = tl.load(gated + rows * gated_stride + offs_r, inside & (offs_r < N * RANK), 0.0)
    for start in range(0, D, BN):
        outer = start + tl.arange(0, BN)[None, :]
        here = inside & (outer < D)
        up = tl.load(b + outer * b_stride + rank, (rank < N * RANK) & (outer < D), 0.0)
        total = tl.load(base + rows * base_stride + outer, here, 0.0).to(tl.float32)
        total = tl.dot(hidden, up, total, input_precision="ieee")
        tl.store(y + rows * D + outer, total.to(y.dtype.element_ty), here)


def expand(base: Tensor, gated: Tensor, b: Tensor, pool: Pool) -> Tensor:
    """y (T, D) from base (T, D), H' = ``gated`` (T, R) and b (D, R), all of one type, with any row strides."""
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    sizes = tile("expand", base.device, base.dtype, pool)
    expand_kernel[(math.ceil(len(base) / sizes["BM"]),)](
        base, gated, b, y, len(base), base.stride(0), gated.stride(0), b.stride(0), len(b), **pool.constants, **sizes
    )
    return y
