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
from kernels.reduce import reduce
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
    task_stride, chunk_stride, stride_w, stride_r,
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
    part = task.to(tl.int64) * task_stride + tl.program_id(1) * chunk_stride
    inside = outer[:, None] < W
    # Stored in two halves: a store goes through shared memory, where a whole tile may not fit.
    half: tl.constexpr = NP * RANK // 2
    left, right = tl.split(tl.permute(tl.reshape(total, (BW, 2, half)), (0, 2, 1)))
    rank = tl.arange(0, half)[None, :]
    place = product + part + outer[:, None] * stride_w + rank * stride_r
    tl.store(place, left, inside & (rank < N * RANK))
    tl.store(place + half * stride_r, right, inside & (half + rank < N * RANK))
    if ROUTERS:
        place = router_product + part + column * W + outer[:, None]
        tl.store(place, router_total * scale, inside & (column < C))


PROGRAMS = 132  # one per multiprocessor of an H100: a program fills its registers
Parts = tuple[Tensor, Tensor, Tensor]


def partial_sums(dy: Tensor, x: Tensor, dh: Tensor, segments: TaskSegments, pool: Pool) -> Parts:
    """Room for the fp32 partial sums of dB, dA and dW, (tasks, chunks, D, R), (.., R, d) and (.., C, d).

    They are views of one buffer, in which the numbers of a chunk lie side by side. About PROGRAMS programs compute the
    wider of the two products; each has at least four steps.
    """
    sizes = tile("weight_grad_b", dh, pool), tile("weight_grad_a", dh, pool)
    tiles = max(ceil_div(wide.shape[1], size["BW"]) for wide, size in zip((dy, x), sizes, strict=True))
    tasks, longest, step = len(segments.counts), max(1, *segments.counts), max(size["BT"] for size in sizes)
    chunks = max(1, min(PROGRAMS // (tiles * tasks), longest // (4 * step)))
    shapes = (dy.shape[1], dh.shape[1]), (dh.shape[1], x.shape[1]), (pool.columns, x.shape[1])
    numbers = [rows * columns for rows, columns in shapes]
    parts = dh.new_empty(tasks, chunks, sum(numbers), dtype=torch.float32).split(numbers, -1)
    db, da, drouters = (part.unflatten(-1, shape) for part, shape in zip(parts, shapes, strict=True))
    return db, da, drouters


def weight_grad_b(dy: Tensor, gated: Tensor, db: Tensor, segments: TaskSegments, pool: Pool) -> None:
    """Fill ``db``, of :func:`partial_sums`, from dy (T, D), with any row stride, and H' = ``gated`` (T, R)."""
    sizes = tile("weight_grad_b", gated, pool)
    tasks, chunks, width, ranks = db.shape
    weight_grad_kernel[(ceil_div(width, sizes["BW"]), chunks, tasks)](
        dy, gated, gated, gated, segments.offsets, db, db, dy.stride(0), gated.stride(0),
        width, ceil_div(max(segments.counts), chunks), *db.stride(),
        **pool.constants(), ROUTERS=False, **sizes,
    )  # fmt: skip


def weight_grad_a(
    x: Tensor,
    dh: Tensor,
    logits: tuple[Tensor, Tensor | None],
    parts: tuple[Tensor, Tensor],
    segments: TaskSegments,
    pool: Pool,
) -> None:
    """Fill the parts (dA, dW) of :func:`partial_sums`.

    x (T, d) and dh (T, R) have any row strides; ``logits`` is (dz, peak) of :mod:`kernels.gate_backward`.
    """
    sizes = tile("weight_grad_a", dh, pool)
    (dz, peak), (da, drouters) = logits, parts
    tasks, chunks, _, width = da.shape
    weight_grad_kernel[(ceil_div(width, sizes["BW"]), chunks, tasks)](
        x, dh, dz, dz if peak is None else peak, segments.offsets, da, drouters, x.stride(0), dh.stride(0),
        width, ceil_div(max(segments.counts), chunks), *da.stride()[:2], 1, width,
        **pool.constants(), ROUTERS=True, **sizes,
    )  # fmt: skip


def weight_grads(
    wide: tuple[Tensor, Tensor],
    narrow: tuple[Tensor, Tensor],
    logits: tuple[Tensor, Tensor | None],
    segments: TaskSegments,
    pool: Pool,
) -> Parts:
    """(dA (R, d), dB (D, R), dW (tasks, C, d)) fp32 from (dY, x), (H', dH) and (dz, peak)."""
    (dy, x), (gated, dh) = wide, narrow
    parts = partial_sums(dy, x, dh, segments, pool)
    weight_grad_b(dy, gated, parts[0], segments, pool)
    weight_grad_a(x, dh, logits, parts[1:], segments, pool)
    return reduce(*parts)
