"""gram: the weights' gradients, products over the tokens of a wide matrix with rank space.

    dB = dY^T H'        (D, R), H' = H * per_rank(g)
    dA = dH^T x         (R, d)                            dW_task = dz^T x over the task's tokens      (C, d)

Grid (columns, chunk, task): a program keeps BW columns of the result in registers and walks over a chunk of one
task's tokens, so the wide matrix is read once and rank space once per column tile; the tile is as wide as registers
allow. Chunks depend on shapes alone; their fp32 sums are added by torch in a fixed order, without atomics.
Bytes: T (D es + tiles R es) read for dB, T (d es + tiles (R es + 4C)) for dA. FLOPs: 2 T D R; 2 T d (R + 2C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import dot_exact, power_of_two
from kernels.pool import Pool
from kernels.rows import TaskRows
from kernels.tiles import tile


def gram_b_reference(dy: Tensor, gated: Tensor) -> Tensor:
    """dB."""
    return dy.T @ gated


def gram_a_reference(x: Tensor, dh: Tensor, dz: Tensor, rows: TaskRows) -> tuple[Tensor, Tensor]:
    """(dA, dW)."""
    pairs = zip(dz.split(rows.counts), x.to(dz.dtype).split(rows.counts), strict=True)
    return dh.T @ x, torch.stack([logits.T @ tokens for logits, tokens in pairs])


@triton.jit
def gram_kernel(
    wide, narrow, logits, peak, offsets, product, router_product, wide_stride, narrow_stride, W, chunk,
    stride_w, stride_r,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, ROUTERS: tl.constexpr,
    BW: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """product = wide^T narrow; with ROUTERS also router_product = logits^T wide, of this program's chunk. The logits
    are scaled by their largest, ``peak``, to about 1: beside fp16 tokens, values of 1e-8 would be lost."""
    column, expert = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    outer = tl.program_id(0) * BW + tl.arange(0, BW)
    task = tl.program_id(2)
    first = tl.load(offsets + task) + tl.program_id(1) * chunk
    end = tl.minimum(first + chunk, tl.load(offsets + task + 1))
    scale = power_of_two(tl.load(peak)) if ROUTERS else 1.0
    total = tl.zeros((BW, NP * RANK), tl.float32)
    router_total = tl.zeros((BW, NP), tl.float32)
    for start in range(first, end, BT):
        row = start + tl.arange(0, BT)[:, None]
        inside = row < end
        rows = row.to(tl.int64)
        across = tl.load(wide + rows * wide_stride + outer[None, :], inside & (outer[None, :] < W), 0.0)
        ranks = tl.load(narrow + rows * narrow_stride + expert, inside & (expert < N * RANK), 0.0)
        if ROUTERS:
            dz = tl.load(logits + rows * C + column, inside & (column < C), 0.0) * (1.0 / scale)
            router_total = dot_exact(tl.trans(across), dz, router_total)
        total = tl.dot(tl.trans(across), ranks, total, input_precision="ieee")
    part = (task * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    inside = outer[:, None] < W
    # Stored in two halves: on its way to memory a tile passes through shared memory, and the whole may not fit.
    half: tl.constexpr = NP * RANK // 2
    left, right = tl.split(tl.permute(tl.reshape(total, (BW, 2, half)), (0, 2, 1)))
    rank = tl.arange(0, half)[None, :]
    place = product + part * (W * N * RANK) + outer[:, None] * stride_w + rank * stride_r
    tl.store(place, left, inside & (rank < N * RANK))
    tl.store(place + half * stride_r, right, inside & (half + rank < N * RANK))
    if ROUTERS:
        place = router_product + part * (W * C) + column * W + outer[:, None]
        tl.store(place, router_total * scale, inside & (column < C))


def _chunks(rows: TaskRows, tiles: int, step: int) -> tuple[int, int]:
    """(chunks per task, tokens per chunk): about PROGRAMS programs in all, each at least four steps long."""
    longest = max(1, *rows.counts)
    chunks = max(1, min(PROGRAMS // (tiles * len(rows.counts)), longest // (4 * step)))
    chunk = triton.cdiv(triton.cdiv(longest, chunks), step) * step
    return triton.cdiv(longest, chunk), chunk


PROGRAMS = 132  # one for each multiprocessor of an H100, of which a program fills the registers


def gram_b(dy: Tensor, gated: Tensor, rows: TaskRows, pool: Pool) -> Tensor:
    """dB (D, R) fp32; dy (T, D) with any row stride, gated (T, R), the H' of the head of this file."""
    sizes = tile("gram_b", gated, pool)
    width, ranks = dy.shape[1], gated.shape[1]
    tiles = triton.cdiv(width, sizes["BW"])
    chunks, chunk = _chunks(rows, tiles, sizes["BT"])
    product = gated.new_empty(len(rows.counts) * chunks, width, ranks, dtype=torch.float32)
    gram_kernel[(tiles, chunks, len(rows.counts))](
        dy, gated, gated, gated, rows.offsets, product, product, dy.stride(0), gated.stride(0),
        width, chunk, ranks, 1,
        **pool.constants(), ROUTERS=False, **sizes,
    )  # fmt: skip
    return product.sum(0)


def gram_a(x: Tensor, dh: Tensor, dz: Tensor, peak: Tensor, rows: TaskRows, pool: Pool) -> tuple[Tensor, Tensor]:
    """(dA (R, d), dW (tasks, C, d)) fp32; x (T, d) and dh (T, R) with any row strides, dz (T, C) fp32 and the largest
    magnitude in it, peak ()."""
    sizes = tile("gram_a", dh, pool)
    width, ranks = x.shape[1], dh.shape[1]
    tiles, tasks = triton.cdiv(width, sizes["BW"]), len(rows.counts)
    chunks, chunk = _chunks(rows, tiles, sizes["BT"])
    product = dh.new_empty(tasks * chunks, ranks, width, dtype=torch.float32)
    routers = dh.new_empty(tasks, chunks, pool.columns, width, dtype=torch.float32)
    gram_kernel[(tiles, chunks, tasks)](
        x, dh, dz, peak, rows.offsets, product, routers, x.stride(0), dh.stride(0),
        width, chunk, 1, width,
        **pool.constants(), ROUTERS=True, **sizes,
    )  # fmt: skip
    return product.sum(0), routers.sum(1)
