"""gate_backward: the gradient through the gates, from dH' to dH and dz, in one pass over the rank space.

    dH = dH' * per_rank(g)                   (T, R)             H' = H * per_rank(g)
    dg = sum over an expert's rows of H * dH'
    dz = g dg - g sum(g dg)                  ase, topk-renorm                (T, C) fp32
         g dg - p sum(g dg)                  topk, naive-shared: over the routers' columns, p their softmax
       + p (c - sum p c), c = dP / tokens of the task                        from the mutual-information loss

Grid (block), BM tokens of one task each. dH' = dY B comes from a GEMM, in columns of a buffer, and is overwritten by
dH. The buffer's next columns get dz once more: C columns for each task, zero but for the token's own, so that
dz W_task joins the GEMM of dx. The gates are recomputed from z, which carries the selection (jit_helpers.mark). H' is
written for weight_grad. A gate's gradient is an inner product of H and dH', so no expert's output is stored.
Bytes: T (2R es + 4C) read, T (2R es + tasks C es + 4C) written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.gating import Gating, Pool
from kernels.jit_helpers import block_of_task, gates, gates_backward, marks, per_rank, rows_of_block
from kernels.segments import TaskSegments
from kernels.tiles import tile


def gate_backward_reference(
    dy: Tensor, b: Tensor, h: Tensor, z: Tensor, dp: Tensor, segments: TaskSegments, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dz (T, C), H')."""
    g, p = reference.gates(z, gating), z.softmax(-1)
    rank = h.shape[1] // g.shape[1]
    dgated = dy @ b
    dh = (dgated * g.repeat_interleave(rank, dim=1)).to(h.dtype)
    dg = (h * dgated).to(z.dtype).unflatten(1, (-1, rank)).sum(-1)[:, : z.shape[1]]
    m, over = (1, g) if gating.name in ("ase", "topk-renorm") else (reference.top_k_mask(z, gating.k), p)
    assert segments.counts is not None
    c = torch.cat([row.expand(n, -1) / n for n, row in zip(segments.counts, dp, strict=True)])
    dz = over * (dg * m - (over * dg * m).sum(-1, keepdim=True)) + p * (c - (p * c).sum(-1, keepdim=True))
    return dh, dz, (h * g.repeat_interleave(rank, dim=1)).to(h.dtype)


@triton.jit
def gate_backward_kernel(
    h, z, dp, offsets, buffer, dz, gated, length, buffer_stride, padded_ranks, width,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, SHARED: tl.constexpr, GATING: tl.constexpr,
    TASKS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    task, first, end, tokens_of_task = block_of_task(offsets, length, tl.program_id(0), TASKS, BM)
    rows, inside = rows_of_block(first, end, BM)
    offs_e, offs_r = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    here = inside & (offs_r < N * RANK)
    row_of_buffer = buffer + rows * buffer_stride
    dgated = tl.load(row_of_buffer + offs_r, here, 0.0).to(tl.float32)
    logits = tl.load(z + rows * C + offs_e, inside & (offs_e < C), 0.0)
    gate, _ = gates(logits, marks(logits), N, SHARED, GATING)
    dh = (dgated * per_rank(gate, RANK)).to(buffer.dtype.element_ty)
    tl.store(row_of_buffer + offs_r, dh, inside & (offs_r < padded_ranks))
    hidden = tl.load(h + rows * (N * RANK) + offs_r, here, 0.0)
    dgate = tl.sum(tl.reshape(hidden.to(tl.float32) * dgated, (BM, NP, RANK)), 2)
    gated_tile = (hidden.to(tl.float32) * per_rank(gate, RANK)).to(hidden.dtype)
    tl.store(gated + rows * (N * RANK) + offs_r, gated_tile, here)

    c = tl.load(dp + task * C + offs_e, offs_e < C, 0.0) / tokens_of_task
    # Computes the softmax of z once more: kept from above, it would take registers from dH'.
    dlogits = gates_backward(logits, gate, dgate, c, C, GATING)
    if dz.dtype.element_ty == tl.bfloat16:
        high = dlogits.to(tl.bfloat16)
        tl.store(dz + rows * (2 * C) + offs_e, high, inside & (offs_e < C))
        low = (dlogits - high.to(tl.float32)).to(tl.bfloat16)
        tl.store(dz + rows * (2 * C) + C + offs_e, low, inside & (offs_e < C))
    else:
        tl.store(dz + rows * C + offs_e, dlogits, inside & (offs_e < C))
    columns, own = row_of_buffer + padded_ranks, task * C
    for start in range(0, width, NP):
        other = start + offs_e
        elsewhere = (other < width) & ((other < own) | (other >= own + C))
        tl.store(columns + other, tl.zeros((BM, NP), buffer.dtype.element_ty), inside & elsewhere)
    tl.store(columns + own + offs_e, dlogits.to(buffer.dtype.element_ty), inside & (offs_e < C))


def gate_backward(
    buffer: Tensor, padded_ranks: int, saved: tuple[Tensor, Tensor], dp: Tensor, segments: TaskSegments, pool: Pool
) -> tuple[Tensor, Tensor]:
    """(dz, H' (T, R)) from ``saved``, H (T, R) and z (T, C), dP (tasks, C) fp32, and dH' in ``buffer``.

    ``buffer`` (T, padded_ranks + tasks C or more), in H's type with any row stride, has dH' in its first R columns and
    becomes [dH | 0 | dz of task 0 | dz of task 1 | .. | 0]. The dz returned is fp32 (T, C); for bf16 it is
    [high | low] (T, 2 C), whose sum is dz to 2^-17.
    """
    h, z = saved
    dz = h.new_empty(len(z), 2 * z.shape[1]) if h.dtype == torch.bfloat16 else torch.empty_like(z)
    gated, sizes = torch.empty_like(h), tile("gate_backward", h.device, h.dtype, pool)
    gate_backward_kernel[(segments.blocks(len(h), sizes["BM"]),)](
        h, z, dp, segments.offsets, buffer, dz, gated,
        segments.length, buffer.stride(0), padded_ranks, buffer.shape[1] - padded_ranks,
        **pool.constants, **pool.gate_constants, TASKS=segments.tasks, **sizes,
    )  # fmt: skip
    return dz, gated
