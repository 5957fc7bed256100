"""expand: the up-projection H' B^T added to the base's output, in one pass over the output.

    forward     y = base + H' B^T                       (T, D)
    backward    dx = base + dH A + dz W_task            (T, d), base is optional

Grid (block, task). A program keeps BM rows of H' (or of dH and dz) in registers and iterates over the output columns,
so they are read once. The weights are small and stay in the L2.
Bytes: T (D es + R es) read, T D es written; backward T (R es + 4C), with a base also T d es, read, T d es written.
FLOPs: 2 T D R; backward 2 T d (R + 2C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jit_helpers import dot_exact, task_rows
from kernels.pool import Pool
from kernels.segments import TaskSegments
from kernels.tiles import tile


def expand_reference(base: Tensor, gated: Tensor, b: Tensor) -> Tensor:
    """y."""
    return torch.addmm(base, gated, b.T)


def expand_backward_reference(
    base: Tensor | None, dh: Tensor, dz: Tensor, a: Tensor, routers: Tensor, segments: TaskSegments
) -> Tensor:
    """dx."""
    through_routers = [run @ router for run, router in zip(dz.split(segments.counts), routers, strict=True)]
    dx = dh @ a + torch.cat(through_routers).to(dh.dtype)
    return dx if base is None else base + dx


@triton.jit
def expand_kernel(
    base, gated, b, y, offsets, base_stride, gated_stride, b_stride, D,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows, inside = task_rows(offsets, tl.program_id(0), BM)
    expert, rank = tl.arange(0, NP * RANK)[None, :], tl.arange(0, NP * RANK)[:, None]
    hidden = tl.load(gated + rows * gated_stride + expert, inside & (expert < N * RANK), 0.0)
    for start in range(0, D, BN):
        outer = start + tl.arange(0, BN)[None, :]
        here = inside & (outer < D)
        up = tl.load(b + outer * b_stride + rank, (rank < N * RANK) & (outer < D), 0.0)
        total = tl.load(base + rows * base_stride + outer, here, 0.0).to(tl.float32)
        total = tl.dot(hidden, up, total, input_precision="ieee")
        tl.store(y + rows * D + outer, total.to(y.dtype.element_ty), here)


@triton.jit
def expand_backward_kernel(
    base, dh, dz, a, routers, dx, offsets, base_stride, dh_stride, dz_stride, d,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, BASE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    rows, inside = task_rows(offsets, tl.program_id(0), BM)
    column, expert = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    hidden = tl.load(dh + rows * dh_stride + expert, inside & (expert < N * RANK), 0.0)
    logits = tl.load(dz + rows * dz_stride + column, inside & (column < C), 0.0).to(hidden.dtype)
    row, rank = tl.arange(0, NP)[:, None], tl.arange(0, NP * RANK)[:, None]
    router = routers + tl.program_id(1) * C * d + row * d
    for start in range(0, d, BN):
        outer = start + tl.arange(0, BN)[None, :]
        here = inside & (outer < d)
        down = tl.load(a + rank * d + outer, (rank < N * RANK) & (outer < d), 0.0)
        if BASE:
            total = tl.load(base + rows * base_stride + outer, here, 0.0).to(tl.float32)
        else:
            total = tl.zeros((BM, BN), tl.float32)
        total = tl.dot(hidden, down, total, input_precision="ieee")
        total = dot_exact(logits, tl.load(router + outer, (row < C) & (outer < d), 0.0), total)
        tl.store(dx + rows * d + outer, total.to(dx.dtype.element_ty), here)


def expand(base: Tensor, gated: Tensor, b: Tensor, segments: TaskSegments, pool: Pool) -> Tensor:
    """y (T, D) from base (T, D), H' = ``gated`` (T, R) and b (D, R), all of one type, with any row strides."""
    y = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    sizes = tile("expand", base, pool)
    expand_kernel[segments.grid(sizes["BM"])](
        base, gated, b, y, segments.offsets, base.stride(0), gated.stride(0), b.stride(0), len(b),
        **pool.constants(), **sizes,
    )  # fmt: skip
    return y


def expand_backward(
    base: Tensor | None, dh: Tensor, dz: Tensor, a: Tensor, routers: Tensor, segments: TaskSegments, pool: Pool
) -> Tensor:
    """dx (T, d).

    base (T, d), dh (T, R) and a (R, d) have one type, the first two any row strides; dz as gate_backward returns it and
    routers (tasks, C, d) are fp32.
    """
    given = base is not None
    base = dh if base is None else base
    dx = dh.new_empty(len(dh), a.shape[1])
    sizes = tile("expand", dh, pool)
    expand_backward_kernel[segments.grid(sizes["BM"])](
        base, dh, dz, a, routers, dx, segments.offsets, base.stride(0), dh.stride(0), dz.stride(0), a.shape[1],
        **pool.constants(), BASE=given, **sizes,
    )  # fmt: skip
    return dx
