"""expand: from rank space back to the width of the tokens, in one pass over the output.

    forward     y = base + (H * per_rank(g)) B^T        (T, D)
    backward    dx = dH A + dz W_task                   (T, d)

Grid (block, task): a program keeps BM rows of rank space in registers and walks over the columns, so each is read
once; the weights are small and come from the L2. The sum with ``base`` costs no pass of its own.
Bytes: T (D es + R es + 4N) read, T D es written; backward T (R es + 4C) read, T d es written.
FLOPs: 2 T D R; backward 2 T d (R + 2C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import dot_exact, per_rank, task_rows
from kernels.pool import Pool
from kernels.rows import TaskRows
from kernels.tiles import tile


def expand_reference(base: Tensor, h: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """y."""
    return base + (h * g.repeat_interleave(h.shape[1] // g.shape[1], dim=1)).to(h.dtype) @ b.T


def expand_backward_reference(dh: Tensor, dz: Tensor, a: Tensor, routers: Tensor, rows: TaskRows) -> Tensor:
    """dx."""
    through_routers = [run @ router for run, router in zip(dz.split(rows.counts), routers, strict=True)]
    return dh @ a + torch.cat(through_routers).to(dh.dtype)


@triton.jit
def expand_kernel(
    base, h, g, b, y, offsets, base_stride, D,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    rows, inside = task_rows(offsets, BM)
    column, expert = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    gate = tl.load(g + rows * N + column, inside & (column < N), 0.0)
    hidden = tl.load(h + rows * (N * RANK) + expert, inside & (expert < N * RANK), 0.0)
    gated = (hidden.to(tl.float32) * per_rank(gate, RANK)).to(hidden.dtype)
    rank = tl.arange(0, NP * RANK)[:, None]
    for start in range(0, D, BN):
        outer = start + tl.arange(0, BN)[None, :]
        here = inside & (outer < D)
        up = tl.load(b + outer * (N * RANK) + rank, (rank < N * RANK) & (outer < D), 0.0)
        total = tl.load(base + rows * base_stride + outer, here, 0.0).to(tl.float32)
        total = tl.dot(gated, up, total, input_precision="ieee")
        tl.store(y + rows * D + outer, total.to(y.dtype.element_ty), here)


@triton.jit
def expand_backward_kernel(
    dh, dz, a, routers, dx, offsets, d,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):
    rows, inside = task_rows(offsets, BM)
    column, expert = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    hidden = tl.load(dh + rows * (N * RANK) + expert, inside & (expert < N * RANK), 0.0)
    logits = tl.load(dz + rows * C + column, inside & (column < C), 0.0).to(hidden.dtype)
    row, rank = tl.arange(0, NP)[:, None], tl.arange(0, NP * RANK)[:, None]
    router = routers + tl.program_id(1) * C * d + row * d
    for start in range(0, d, BN):
        outer = start + tl.arange(0, BN)[None, :]
        down = tl.load(a + rank * d + outer, (rank < N * RANK) & (outer < d), 0.0)
        total = tl.dot(hidden, down, input_precision="ieee")
        total = dot_exact(logits, tl.load(router + outer, (row < C) & (outer < d), 0.0), total)
        tl.store(dx + rows * d + outer, total.to(dx.dtype.element_ty), inside & (outer < d))


def expand(base: Tensor, h: Tensor, g: Tensor, b: Tensor, rows: TaskRows, pool: Pool) -> Tensor:
    """y (T, D); base (T, D) with any row stride, h (T, R) and b (D, R) in base's type, g (T, N) fp32."""
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    sizes = tile("expand", base.dtype, pool)
    expand_kernel[rows.grid(sizes["BM"])](
        base, h, g, b, y, rows.offsets, base.stride(0), len(b), **pool.constants(), **sizes
    )
    return y


def expand_backward(dh: Tensor, dz: Tensor, a: Tensor, routers: Tensor, rows: TaskRows, pool: Pool) -> Tensor:
    """dx (T, d); dh (T, R) and a (R, d) in one type, dz (T, C) and routers (tasks, C, d) fp32."""
    dx = dh.new_empty(len(dh), a.shape[1])
    sizes = tile("expand", dh.dtype, pool)
    expand_backward_kernel[rows.grid(sizes["BM"])](
        dh, dz, a, routers, dx, rows.offsets, a.shape[1], **pool.constants(), **sizes
    )
    return dx
