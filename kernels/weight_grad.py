"""weight_grad: the gradients of the adapters, products over the tokens of a wide matrix and a narrow one.

    dB      = dY^T H'        (D, R)
    dA      = dH^T x         (R, d)
    dW_task = dz^T x         (C, d)      over the tokens of the task

Grid (columns, chunk). A program keeps BW rows of the result in registers and sums over a chunk of one task's tokens.
The wide matrix is read once and the narrow one once per column tile, so tiles are as wide as registers allow. Chunks
depend on shapes only, and ``reduce`` adds their fp32 sums in a fixed order: no atomics, the same bits in every run.
Bytes: T (D es + tiles R es) read for dB, T (d es + tiles (R es + 4C)) for dA; every partial sum written and read.
FLOPs: 2 T D R; 2 T d (R + 2C).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gating import Pool
from kernels.jit_helpers import block_of_task, dot_exact
from kernels.segments import TaskSegments
from kernels.tiles import TALLER, multiprocessors, tile

BP, BN = 8, 256  # partial sums and numbers that a program of reduce adds at a time


def weight_grad_b_reference(dy: Tensor, gated: Tensor) -> Tensor:
    """dB."""
    return dy.T @ gated


def weight_grad_a_reference(x: Tensor, dh: Tensor, dz: Tensor, segments: TaskSegments) -> tuple[Tensor, Tensor]:
    """(dA, dW)."""
    assert segments.counts is not None
    pairs = zip(dz.split(segments.counts), x.to(dz.dtype).split(segments.counts), strict=True)
    return dh.T @ x, torch.stack([logits.T @ tokens for logits, tokens in pairs])


@triton.jit
def weight_grad_kernel(
    wide, narrow, dz, offsets, product, router_product, length, wide_stride, narrow_stride, W, chunk,
    part_stride, stride_w, stride_r,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, TASKS: tl.constexpr, ROUTERS: tl.constexpr,
    BW: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """product = wide^T narrow over this program's chunk; with ROUTERS also router_product = dz^T wide.

    dz is [high | low] in bf16, else fp32.
    """
    offs_e, offs_r = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    outer = tl.program_id(0) * BW + tl.arange(0, BW)
    _, first, end, _ = block_of_task(offsets, length, tl.program_id(1), TASKS, chunk)
    end = tl.minimum(first + chunk, end)
    total = tl.zeros((BW, NP * RANK), tl.float32)
    router_total = tl.zeros((BW, NP), tl.float32)
    scale = 2.0**-100 if wide.dtype.element_ty == tl.float16 else 1.0
    for start in range(first, end, BT):
        row = start + tl.arange(0, BT)[:, None]
        inside = row < end
        rows = row.to(tl.int64)
        across = tl.load(wide + rows * wide_stride + outer[None, :], inside & (outer[None, :] < W), 0.0)
        ranks = tl.load(narrow + rows * narrow_stride + offs_r, inside & (offs_r < N * RANK), 0.0)
        if ROUTERS:
            if dz.dtype.element_ty == tl.bfloat16:
                high = tl.load(dz + rows * (2 * C) + offs_e, inside & (offs_e < C), 0.0)
                low = tl.load(dz + rows * (2 * C) + C + offs_e, inside & (offs_e < C), 0.0)
                router_total = tl.dot(tl.trans(across), high, router_total)
                router_total = tl.dot(tl.trans(across), low, router_total)
            else:
                exact = tl.load(dz + rows * C + offs_e, inside & (offs_e < C), 0.0)
                router_total, scale = dot_exact(tl.trans(across), exact, router_total, scale)
        total = tl.dot(tl.trans(across), ranks, total, input_precision="ieee")
    part = tl.program_id(1).to(tl.int64) * part_stride
    inside = outer[:, None] < W
    # Stored in two halves: a store goes through shared memory, where a whole tile may not fit.
    half: tl.constexpr = NP * RANK // 2
    left, right = tl.split(tl.permute(tl.reshape(total, (BW, 2, half)), (0, 2, 1)))
    rank = tl.arange(0, half)[None, :]
    place = product + part + outer[:, None] * stride_w + rank * stride_r
    tl.store(place, left, inside & (rank < N * RANK))
    tl.store(place + half * stride_r, right, inside & (half + rank < N * RANK))
    if ROUTERS:
        place = router_product + part + offs_e * W + outer[:, None]
        tl.store(place, router_total * scale, inside & (offs_e < C))


@triton.jit
def reduce_kernel(
    parts, offsets, db, da, routers, length, chunk, chunks, b_size, a_size, router_size,
    TASKS: tl.constexpr, ROUNDS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dB and dA: the sums of [dB | dA | dW] over all chunks; dW: over the chunks of its task. Every program does the
    same work; BP running sums keep as many loads under way."""
    number = tl.program_id(0) * BN + tl.arange(0, BN)
    shared, size = b_size + a_size, b_size + a_size + router_size
    task = (number - shared) // router_size
    offset = tl.where(number < shared, number, shared + (number - shared) % router_size)
    running = tl.zeros((BP, BN), tl.float32)
    for first in tl.static_range(0, ROUNDS * BP, BP):
        part = (first + tl.arange(0, BP))[:, None]
        owner, begin = tl.full((BP, 1), -1, tl.int32), 0
        for t in tl.static_range(TASKS):
            owner += (part >= begin).to(tl.int32)
            begin += tl.cdiv((tl.load(offsets + t + 1) - tl.load(offsets + t)) * length, chunk)
        keep = (number < shared)[None, :] | (owner == task[None, :])
        place = parts + part.to(tl.int64) * size + offset[None, :]
        running += tl.load(place, keep & (part < chunks) & (number < shared + TASKS * router_size)[None, :], 0.0)
    total = tl.sum(running, 0)
    tl.store(db + number, total, number < b_size)
    tl.store(da + number - b_size, total, (number >= b_size) & (number < shared))
    tl.store(routers + number - shared, total, (number >= shared) & (number < shared + TASKS * router_size))


class Parts(NamedTuple):
    """fp32 partial sums of dB, dA and dW: (chunks, D, R), (chunks, R, d) and (chunks, C, d), views of one buffer in
    which the numbers of a chunk lie side by side. A chunk is up to ``chunk`` tokens of one task."""

    db: Tensor
    da: Tensor
    drouters: Tensor
    chunk: int


def empty_parts(dy: Tensor, x: Tensor, dh: Tensor, segments: TaskSegments, pool: Pool) -> Parts:
    """About one program for each multiprocessor computes the wider product; it has at least four steps."""
    sizes = [tile(name, dh.device, dh.dtype, pool) for name in ("weight_grad_b", "weight_grad_a")]
    tiles = max(math.ceil(wide.shape[1] / size["BW"]) for wide, size in zip((dy, x), sizes, strict=True))
    rows, step = len(x), max(size["BT"] for size in sizes)
    wanted = max(1, min(multiprocessors(x.device) // tiles - segments.tasks + 1, rows // (4 * step)))
    chunk = max(1, math.ceil(rows / wanted))
    shapes = (dy.shape[1], dh.shape[1]), (dh.shape[1], x.shape[1]), (pool.columns, x.shape[1])
    numbers = [height * width for height, width in shapes]
    parts = dh.new_empty(max(1, segments.blocks(rows, chunk)), sum(numbers), dtype=torch.float32)
    db, da, drouters = (part.unflatten(-1, shape) for part, shape in zip(parts.split(numbers, -1), shapes, strict=True))
    return Parts(db, da, drouters, chunk)


def weight_grad(
    wide: Tensor, narrow: Tensor, dz: Tensor | None, parts: Parts, segments: TaskSegments, pool: Pool
) -> None:
    """Fill dB of ``parts`` from dy (T, D) and H' (T, R), or, with dz, dA and dW from x (T, d) and dH (T, R).

    ``wide`` and ``narrow`` have any row strides; dz is that of :func:`kernels.gate_backward.gate_backward`.
    """
    name, product = ("weight_grad_b", parts.db) if dz is None else ("weight_grad_a", parts.da.mT)
    sizes, (chunks, width, _) = tile(name, narrow.device, narrow.dtype, pool), product.shape
    weight_grad_kernel[(math.ceil(width / sizes["BW"]), chunks)](
        wide, narrow, narrow if dz is None else dz, segments.offsets, product, parts.drouters,
        segments.length, wide.stride(0), narrow.stride(0), width, parts.chunk, *product.stride(),
        **pool.constants, TASKS=segments.tasks, ROUTERS=dz is not None, **sizes,
    )  # fmt: skip


def reduce_reference(parts: Parts, segments: TaskSegments) -> tuple[Tensor, Tensor, Tensor]:
    """(dA, dB, dW)."""
    assert segments.counts is not None
    chunks = [math.ceil(count / parts.chunk) for count in segments.counts]
    used = sum(chunks)
    drouters = torch.stack([part.sum(0) for part in parts.drouters[:used].split(chunks)])
    return parts.da[:used].sum(0), parts.db[:used].sum(0), drouters


def reduce(parts: Parts, segments: TaskSegments) -> tuple[Tensor, Tensor, Tensor]:
    """(dA (R, d), dB (D, R), dW (tasks, C, d)) fp32: the sums of the parts."""
    db, da, drouters = parts.db, parts.da, parts.drouters
    tasks, chunks = segments.tasks, len(db)
    sums = da.new_empty(da.shape[1:]), db.new_empty(db.shape[1:]), da.new_empty(tasks, *drouters.shape[1:])
    sizes = sums[1].numel(), sums[0].numel(), sums[2].numel() // tasks
    bn = BN * TALLER
    reduce_kernel[(math.ceil((sizes[0] + sizes[1] + tasks * sizes[2]) / bn),)](
        db, segments.offsets, sums[1], sums[0], sums[2], segments.length, parts.chunk, chunks, *sizes,
        TASKS=tasks, ROUNDS=math.ceil(chunks / BP), BP=BP, BN=bn, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return sums
