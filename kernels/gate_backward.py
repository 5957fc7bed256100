"""gate_backward: the gradient through the gates, from dY to dH and dz, in one pass over dY.

    dH' = dY B                               dH = dH' * per_rank(g)          (T, R)          H' = H * per_rank(g)
    dg  = sum over an expert's rows of H * dH'
    dz  = g dg - g sum(g dg)                 ase, topk-renorm                (T, C) fp32
          g dg - p sum(g dg)                 topk, naive-shared: over the routers' columns, p their softmax
        + p (c - sum p c), c = dP / tokens of the task                      from the mutual-information loss

Grid (block, task), BM tokens each. The gates are recomputed from z, which carries the selection (jit_helpers.mark). H'
is written for weight_grad. A gate's gradient is an inner product of H and dH', so no expert's output is stored.
GIVEN: dH' comes from a wider GEMM and is overwritten by dH. SPREAD: dz is also stored beside dH, so that dz W_task
joins the next GEMM: in a block of C columns for each task, ``apart`` columns from one to the next and zero elsewhere,
or with ``apart`` 0 in the same C columns for every task.
Bytes: T (D es + R es + 4C) read, T (2R es + 4C) written. FLOPs: 2 T D R.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.gating import Gating
from kernels.jit_helpers import gates, gates_backward, marks, per_rank, sum_ranks, task_length, task_rows
from kernels.pool import Pool
from kernels.segments import TaskSegments
from kernels.tiles import tile

Outputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def gate_backward_reference(
    dy: Tensor, b: Tensor, h: Tensor, z: Tensor, dp: Tensor, segments: TaskSegments, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dz (T, C), H')."""
    g, p = reference.gates(z, gating), z.softmax(-1)
    rank = h.shape[1] // g.shape[1]
    dgated = dy @ b
    dh = (dgated * g.repeat_interleave(rank, dim=1)).to(h.dtype)
    dg = (h * dgated).to(z.dtype).unflatten(1, (-1, rank)).sum(-1)[:, : z.shape[1]]
    if gating.name in ("ase", "topk-renorm"):
        dz = _softmax_backward(g, dg)
    else:
        dz = _softmax_backward(p, dg * reference.top_k_mask(z, gating.k))
    c = torch.cat([row.expand(n, -1) / n for n, row in zip(segments.counts, dp, strict=True)])
    dz = dz + _softmax_backward(p, c)
    return dh, dz, (h * g.repeat_interleave(rank, dim=1)).to(h.dtype)


def _softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    return p * (dp - (p * dp).sum(-1, keepdim=True))


@triton.jit
def gate_backward_kernel(
    dy, b, h, z, dp, offsets, dh, dz, gated, peaks, dy_stride, b_stride, dh_stride, padded_ranks, width, apart, D,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, SHARED: tl.constexpr, GATING: tl.constexpr,
    GIVEN: tl.constexpr, SPREAD: tl.constexpr, PEAK: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr = 16,
):  # fmt: skip
    rows, inside = task_rows(offsets, tl.program_id(0), BM)
    column, expert = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    if GIVEN:
        dgated = tl.load(dh + rows * dh_stride + expert, inside & (expert < N * RANK), 0.0).to(tl.float32)
    else:
        dgated = tl.zeros((BM, NP * RANK), tl.float32)
        for start in range(0, D, BK):
            inner = start + tl.arange(0, BK)
            across, down = inner[None, :], inner[:, None]
            grad = tl.load(dy + rows * dy_stride + across, inside & (across < D), 0.0)
            up = tl.load(b + down * b_stride + expert, (expert < N * RANK) & (down < D), 0.0)
            dgated = tl.dot(grad, up, dgated, input_precision="ieee")

    logits = tl.load(z + rows * C + column, inside & (column < C), 0.0)
    gate, _ = gates(logits, marks(logits), N, SHARED, GATING)
    place, here = rows * (N * RANK) + expert, inside & (expert < N * RANK)
    passed_on = (dgated * per_rank(gate, RANK)).to(dh.dtype.element_ty)
    tl.store(dh + rows * dh_stride + expert, passed_on, inside & (expert < padded_ranks))
    hidden = tl.load(h + place, here, 0.0)
    dgate = sum_ranks(hidden.to(tl.float32) * dgated, NP, RANK)
    tl.store(gated + place, (hidden.to(tl.float32) * per_rank(gate, RANK)).to(hidden.dtype), here)

    c = tl.load(dp + tl.program_id(1) * C + column, column < C, 0.0) / task_length(offsets)
    # The softmax of z is computed again there: keeping it from above would take registers from dH'.
    dlogits = gates_backward(logits, gate, dgate, c, C, GATING)
    if dz.dtype.element_ty == tl.bfloat16:
        high = dlogits.to(tl.bfloat16)
        tl.store(dz + rows * (2 * C) + column, high, inside & (column < C))
        low = (dlogits - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(dz + rows * (2 * C) + C + column, low, inside & (column < C))
    else:
        tl.store(dz + rows * C + column, dlogits, inside & (column < C))
    if SPREAD:
        spread, first = dh + rows * dh_stride + padded_ranks, tl.program_id(1) * apart
        for start in range(0, width, NP):
            other = start + column
            elsewhere = (other < width) & ((other < first) | (other >= first + C))
            tl.store(spread + other, tl.zeros((BM, NP), dh.dtype.element_ty), inside & elsewhere)
        tl.store(spread + first + column, dlogits.to(dh.dtype.element_ty), inside & (column < C))
    if PEAK:
        block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(peaks + block, tl.max(tl.where(inside, tl.abs(dlogits), 0.0)))


def gate_backward(
    dy: Tensor, b: Tensor, h: Tensor, z: Tensor, dp: Tensor, segments: TaskSegments, pool: Pool
) -> Outputs:
    """(dH (T, R), dz, H' (T, R), peak).

    dz is fp32 (T, C); in bf16 it is [high | low] (T, 2 C), whose sum is dz to 2^-17. peak () is the largest magnitude
    in dz for fp16, else None.

    dy (T, D) and b (D, R) are in h's type with any row strides; z (T, C) and dp (tasks, C) are fp32.
    """
    dh = torch.empty_like(h)
    return dh, *_launch((dy, b), (h, z, dp), (dh, h.shape[1]), segments, pool)


def gate_backward_inplace(
    rank_buffer: Tensor, padded_ranks: int, h: Tensor, z: Tensor, dp: Tensor, segments: TaskSegments, pool: Pool
) -> Outputs:
    """As :func:`gate_backward`, (dH, dz, H', peak), but dH' is read from the first R columns of ``rank_buffer``.

    ``rank_buffer`` (T, at least padded_ranks), with any row stride, becomes [dH | 0], ``padded_ranks`` columns wide,
    followed by [dz of task 0 | dz of task 1 | ..] if it has room for all of them, or by dz in the same C columns for
    every task if it has room for these.
    """
    return rank_buffer[:, : h.shape[1]], *_launch(None, (h, z, dp), (rank_buffer, padded_ranks), segments, pool)


def _launch(
    product: tuple[Tensor, Tensor] | None,
    known: tuple[Tensor, Tensor, Tensor],
    target: tuple[Tensor, int],
    segments: TaskSegments,
    pool: Pool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dz, H', peak). ``product`` is (dY, B), or None if ``target``, (buffer of dH, its padded ranks), holds dH'."""
    (h, z, dp), (dh, padded_ranks) = known, target
    dy, b = product or (dh, dh)
    # In bf16 dz is two such numbers, high and low; fp16 cannot express small ones, so the largest is found for a scale.
    split, find_peak = h.dtype == torch.bfloat16, h.dtype == torch.float16
    dz = h.new_empty(len(z), 2 * z.shape[1]) if split else torch.empty_like(z)
    gated = torch.empty_like(h)
    sizes = tile("gate_backward" if product else "gate_backward_inplace", h, pool)
    blocks, tasks = segments.grid(sizes["BM"])
    width = dh.shape[1] - padded_ranks
    apart = pool.columns if width >= tasks * pool.columns else 0
    peaks = (z.new_empty if blocks else z.new_zeros)(tasks, max(blocks, 1)) if find_peak else z
    gate_backward_kernel[blocks, tasks](
        dy, b, h, z, dp, segments.offsets, dh, dz, gated, peaks, dy.stride(0), b.stride(0), dh.stride(0),
        padded_ranks, width, apart, len(b),
        **pool.constants(), **pool.gate_constants(),
        GIVEN=product is None, SPREAD=width > 0, PEAK=find_peak, **sizes,
    )  # fmt: skip
    return dz, gated, peaks.amax() if find_peak else None
