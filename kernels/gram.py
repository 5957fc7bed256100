"""gram: the weights' gradients, products over the tokens of a wide matrix with rank space.

    dB = dY^T (H * per_rank(g))      (D, R)
    dA = dH^T x                      (R, d)          dW_task = dz^T x over the task's tokens      (C, d)

Grid (columns, chunk, task): a program keeps BW columns of the result in registers and walks over a chunk of one
task's tokens, so the wide matrix is read once and rank space once per column tile; the tile is as wide as registers
allow. Chunks depend on shapes alone; their fp32 sums are added by torch in a fixed order, without atomics.
Bytes: T (W es + tiles (R es + 4N)) read. FLOPs: 2 T D R, and 2 T d (R + 2C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.device import dot_exact, per_rank
from kernels.pool import Pool
from kernels.rows import TaskRows
from kernels.tiles import tile


def gram_b_reference(dy: Tensor, h: Tensor, g: Tensor) -> Tensor:
    """dB."""
    return dy.T @ (h * g.repeat_interleave(h.shape[1] // g.shape[1], dim=1)).to(h.dtype)


def gram_a_reference(x: Tensor, dh: Tensor, dz: Tensor, rows: TaskRows) -> tuple[Tensor, Tensor]:
    """(dA, dW)."""
    pairs = zip(dz.split(rows.counts), x.to(dz.dtype).split(rows.counts), strict=True)
    return dh.T @ x, torch.stack([logits.T @ tokens for logits, tokens in pairs])


@triton.jit
def gram_kernel(
    wide, narrow, gate, offsets, product, router_product, wide_stride, W, chunk, stride_w, stride_r,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, ROUTERS: tl.constexpr,
    BW: tl.constexpr, BT: tl.constexpr,
):
    """ROUTERS: ``narrow`` is dH and ``gate`` dz; else H and g, whose product is taken on the way."""
    column, expert = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    outer = tl.program_id(0) * BW + tl.arange(0, BW)
    task = tl.program_id(2)
    first = tl.load(offsets + task) + tl.program_id(1) * chunk
    end = tl.minimum(first + chunk, tl.load(offsets + task + 1))
    columns: tl.constexpr = C if ROUTERS else N
    total = tl.zeros((BW, NP * RANK), tl.float32)
    router_total = tl.zeros((BW, NP), tl.float32)
    for start in range(first, end, BT):
        row = start + tl.arange(0, BT)[:, None]
        inside = row < end
        rows = row.to(tl.int64)
        across = tl.load(wide + rows * wide_stride + outer[None, :], inside & (outer[None, :] < W), 0.0)
        ranks = tl.load(narrow + rows * (N * RANK) + expert, inside & (expert < N * RANK), 0.0)
        gates = tl.load(gate + rows * columns + column, inside & (column < columns), 0.0)
        if ROUTERS:
            router_total = dot_exact(tl.trans(across), gates, router_total)
        else:
            ranks = (ranks.to(tl.float32) * per_rank(gates, RANK)).to(ranks.dtype)
        total = tl.dot(tl.trans(across), ranks, total, input_precision="ieee")
    part = (task * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    inside = outer[:, None] < W
    place = product + part * (W * N * RANK) + outer[:, None] * stride_w + expert * stride_r
    tl.store(place, total, inside & (expert < N * RANK))
    if ROUTERS:
        tl.store(router_product + part * (W * C) + column * W + outer[:, None], router_total, inside & (column < C))


def _chunks(rows: TaskRows, tiles: int, step: int) -> tuple[int, int]:
    """(chunks per task, tokens per chunk): about PROGRAMS programs in all, each at least four steps long."""
    longest = max(rows.counts)
    chunks = max(1, min(PROGRAMS // (tiles * len(rows.counts)), longest // (4 * step)))
    chunk = triton.cdiv(triton.cdiv(longest, chunks), step) * step
    return triton.cdiv(longest, chunk), chunk


PROGRAMS = 264  # two for each multiprocessor of an H100


def gram_b(dy: Tensor, h: Tensor, g: Tensor, rows: TaskRows, pool: Pool) -> Tensor:
    """dB (D, R) fp32; dy (T, D) with any row stride, h (T, R), g (T, N) fp32."""
    sizes = tile("gram", h.dtype, pool)
    width, ranks = dy.shape[1], h.shape[1]
    tiles = triton.cdiv(width, sizes["BW"])
    chunks, chunk = _chunks(rows, tiles, sizes["BT"])
    product = h.new_empty(len(rows.counts) * chunks, width, ranks, dtype=torch.float32)
    gram_kernel[(tiles, chunks, len(rows.counts))](
        dy, h, g, rows.offsets, product, product, dy.stride(0), width, chunk, ranks, 1,
        **pool.constants(), ROUTERS=False, **sizes,
    )
    return product.sum(0)


def gram_a(x: Tensor, dh: Tensor, dz: Tensor, rows: TaskRows, pool: Pool) -> tuple[Tensor, Tensor]:
    """(dA (R, d), dW (tasks, C, d)) fp32; x (T, d) with any row stride, dh (T, R), dz (T, C) fp32."""
    sizes = tile("gram", dh.dtype, pool)
    width, ranks = x.shape[1], dh.shape[1]
    tiles, tasks = triton.cdiv(width, sizes["BW"]), len(rows.counts)
    chunks, chunk = _chunks(rows, tiles, sizes["BT"])
    product = dh.new_empty(tasks * chunks, ranks, width, dtype=torch.float32)
    routers = dh.new_empty(tasks, chunks, pool.columns, width, dtype=torch.float32)
    gram_kernel[(tiles, chunks, tasks)](
        x, dh, dz, rows.offsets, product, routers, x.stride(0), width, chunk, 1, width,
        **pool.constants(), ROUTERS=True, **sizes,
    )
    return product.sum(0), routers.sum(1)
