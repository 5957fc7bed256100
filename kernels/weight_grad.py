"""weight_grad: the gradients of the adapters, products over the tokens of a wide matrix and a narrow one.

    dB      = dY^T H'        (D, R)
    dA      = dH^T x         (R, d)
    dW_task = dz^T x         (C, d)      over the tokens of the task

Grid (columns, chunk, task). A program keeps BW rows of the result in registers and sums over a chunk of one task's
tokens. The wide matrix is read once and the narrow one once per column tile, so tiles are as wide as registers allow.
Chunks depend on shapes only, and :mod:`kernels.reduce` adds their fp32 sums in a fixed order: no atomics, the same bits
in every run.
Bytes: T (D es + tiles R es) read for dB, T (d es + tiles (R es + 4C)) for dA. FLOPs: 2 T D R; 2 T d (R + 2C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jit_helpers import dot_exact, power_of_two
from kernels.pool import Pool
from kernels.segments import TaskSegments, ceil_div
from kernels.tiles import tile


def weight_grad_b_reference(dy: Tensor, gated: Tensor) -> Tensor:
    """dB."""
    return dy.T @ gated


def weight_grad_a_reference(x: Tensor, dh: Tensor, dz: Tensor, segments: TaskSegments) -> tuple[Tensor, Tensor]:
    """(dA, dW)."""
    pairs = zip(dz.split(segments.counts), x.to(dz.dtype).split(segments.counts), strict=True)
    return dh.T @ x, torch.stack([logits.T @ tokens for logits, tokens in pairs])


@triton.jit
def weight_grad_kernel(
    wide, narrow, dz, peak, offsets, product, router_product, wide_stride, narrow_stride, W, chunk,
    stride_w, stride_r,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, ROUTERS: tl.constexpr,
    BW: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """product = wide^T narrow over this program's chunk; with ROUTERS also router_product = dz^T wide.

    dz is [high | low] in bf16, else fp32. Beside fp16 it is divided by a power of two near its largest magnitude,
    ``peak``, so that values of 1e-8 are kept.
    """
    column, expert = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    outer = tl.program_id(0) * BW + tl.arange(0, BW)
    task = tl.program_id(2)
    first = tl.load(offsets + task) + tl.program_id(1) * chunk
    end = tl.minimum(first + chunk, tl.load(offsets + task + 1))
    scale = 1.0
    if ROUTERS and wide.dtype.element_ty == tl.float16:
        scale = power_of_two(tl.load(peak))
    total = tl.zeros((BW, NP * RANK), tl.float32)
    router_total = tl.zeros((BW, NP), tl.float32)
    for start in range(first, end, BT):
        row = start + tl.arange(0, BT)[:, None]
        inside = row < end
        rows = row.to(tl.int64)
        across = tl.load(wide + rows * wide_stride + outer[None, :], inside & (outer[None, :] < W), 0.0)
        ranks = tl.load(narrow + rows * narrow_stride + expert, inside & (expert < N * RANK), 0.0)
        if ROUTERS:
            if dz.dtype.element_ty == tl.bfloat16:
                high = tl.load(dz + rows * (2 * C) + column, inside & (column < C), 0.0)
                low = tl.load(dz + rows * (2 * C) + C + column, inside & (column < C), 0.0)
                router_total = tl.dot(tl.trans(across), high, router_total)
                router_total = tl.dot(tl.trans(across), low, router_total)
            else:
                exact = tl.load(dz + rows * C + column, inside & (column < C), 0.0) * (1.0 / scale)
                router_total = dot_exact(tl.trans(across), exact, router_total)
        total = tl.dot(tl.trans(across), ranks, total, input_precision="ieee")
    part = (task * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    inside = outer[:, None] < W
    # Stored in two halves: a store goes through shared memory, where a whole tile may not fit.
    half: tl.constexpr = NP * RANK // 2
    left, right = tl.split(tl.permute(tl.reshape(total, (BW, 2, half)), (0, 2, 1)))
    rank = tl.arange(0, half)[None, :]
    place = product + part * (W * N * RANK) + outer[:, None] * stride_w + rank * stride_r
    tl.store(place, left, inside & (rank < N * RANK))
    tl.store(place + half * stride_r, right, inside & (half + rank < N * RANK))
    if ROUTERS:
        place = router_product + part * (W * C) + column * W + outer[:, None]
        tl.store(place, router_total * scale, inside & (column < C))


def _chunks(segments: TaskSegments, tiles: int, step: int) -> tuple[int, int]:
    """(chunks per task, tokens per chunk): about PROGRAMS programs in total, each of at least four steps."""
    longest = max(1, *segments.counts)
    chunks = max(1, min(PROGRAMS // (tiles * len(segments.counts)), longest // (4 * step)))
    chunk = ceil_div(ceil_div(longest, chunks), step) * step
    return ceil_div(longest, chunk), chunk


PROGRAMS = 132  # one per multiprocessor of an H100: a program fills its registers


def weight_grad_b(dy: Tensor, gated: Tensor, segments: TaskSegments, pool: Pool) -> Tensor:
    """Partial sums (chunks, D, R) fp32 of dB, from dy (T, D), with any row stride, and H' = ``gated`` (T, R)."""
    sizes = tile("weight_grad_b", gated, pool)
    width, ranks = dy.shape[1], gated.shape[1]
    tiles = ceil_div(width, sizes["BW"])
    chunks, chunk = _chunks(segments, tiles, sizes["BT"])
    product = gated.new_empty(len(segments.counts) * chunks, width, ranks, dtype=torch.float32)
    weight_grad_kernel[(tiles, chunks, len(segments.counts))](
        dy, gated, gated, gated, segments.offsets, product, product, dy.stride(0), gated.stride(0),
        width, chunk, ranks, 1,
        **pool.constants(), ROUTERS=False, **sizes,
    )  # fmt: skip
    return product


def weight_grad_a(
    x: Tensor, dh: Tensor, dz: Tensor, peak: Tensor | None, segments: TaskSegments, pool: Pool
) -> tuple[Tensor, Tensor]:
    """Partial sums (chunks, R, d) of dA and (tasks, chunks per task, C, d) of dW, fp32.

    x (T, d) and dh (T, R) have any row strides; dz and ``peak`` are those of :mod:`kernels.gate_backward`.
    """
    sizes = tile("weight_grad_a", dh, pool)
    width, ranks = x.shape[1], dh.shape[1]
    tiles, tasks = ceil_div(width, sizes["BW"]), len(segments.counts)
    chunks, chunk = _chunks(segments, tiles, sizes["BT"])
    product = dh.new_empty(tasks * chunks, ranks, width, dtype=torch.float32)
    routers = dh.new_empty(tasks, chunks, pool.columns, width, dtype=torch.float32)
    weight_grad_kernel[(tiles, chunks, tasks)](
        x, dh, dz, dz if peak is None else peak, segments.offsets, product, routers, x.stride(0), dh.stride(0),
        width, chunk, 1, width,
        **pool.constants(), ROUTERS=True, **sizes,
    )  # fmt: skip
    return product, routers
