"""route: the selection, the gates and the mean probabilities, from the logits; and the gradient of the logits.

    g  = gates(z)                                       (G, T, N) fp32
    P  = mean over a task's tokens of softmax(z)        (G, tasks, C) fp32
    dz = g dg - g sum(g dg)                             ase, topk-renorm           (G, T, C) fp32
         g dg - p sum(g dg)                             topk, naive-shared: over the routers' columns, p their softmax
       + p (c - sum p c), c = dP / tokens of the task

Grid (block, task, gate of G), BM tokens each. P is summed within a block by the kernel, then over the blocks by torch,
in a fixed order. Bytes: forward G T 4C read, G T 4N written; backward G T (4C + 8N) read, G T 4C written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.gating import Gating, Pool
from kernels.jit_helpers import gates, gates_backward, select, task_length, task_rows
from kernels.segments import TaskSegments

TILE, MOST_ROWS = 2048, 64  # logits that a program keeps in registers; tokens at most


def route_reference(z: Tensor, segments: TaskSegments, gating: Gating) -> tuple[Tensor, Tensor]:
    """(g, P)."""
    each = [(reference.gates(logits, gating), reference.mean_probs(logits, segments)) for logits in z]
    g, p = (torch.stack(parts) for parts in zip(*each, strict=True))
    return g, p


def route_backward_reference(
    z: Tensor, g: Tensor, dg: Tensor, dp: Tensor, segments: TaskSegments, gating: Gating
) -> Tensor:
    """dz."""
    p, g, dg = z.softmax(-1), g[..., : z.shape[-1]], dg[..., : z.shape[-1]]
    over = g if gating.name in ("ase", "topk-renorm") else p
    counts = torch.tensor(segments.counts, device=z.device)
    c = (dp / counts.clamp(min=1)[:, None]).repeat_interleave(counts, dim=1)
    return g * dg - over * (g * dg).sum(-1, keepdim=True) + p * (c - (p * c).sum(-1, keepdim=True))


@triton.jit
def route_kernel(
    z, offsets, g, means, T, k,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, SHARED: tl.constexpr, GATING: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    rows, inside = task_rows(offsets, tl.program_id(0), BM)
    rows += tl.program_id(2).to(tl.int64) * T
    column = tl.arange(0, NP)[None, :]
    logits = tl.load(z + rows * C + column, inside & (column < C), 0.0)
    gate, p = gates(logits, select(logits, N - SHARED, k), N, SHARED, GATING)
    tl.store(g + rows * N + column, gate, inside & (column < N))
    block = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    total = tl.sum(tl.where(inside, p, 0.0), 0)[None, :]
    tl.store(means + block * C + column, total / task_length(offsets), column < C)


@triton.jit
def route_backward_kernel(
    z, g, dg, dp, offsets, dz, T,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, GATING: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    rows, inside = task_rows(offsets, tl.program_id(0), BM)
    rows += tl.program_id(2).to(tl.int64) * T
    column = tl.arange(0, NP)[None, :]
    logits = tl.load(z + rows * C + column, inside & (column < C), 0.0)
    gate = tl.load(g + rows * N + column, inside & (column < N), 0.0)
    dgate = tl.load(dg + rows * N + column, inside & (column < N), 0.0)
    task = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    c = tl.load(dp + task * C + column, column < C, 0.0) / task_length(offsets)
    tl.store(dz + rows * C + column, gates_backward(logits, gate, dgate, c, C, GATING), inside & (column < C))


def launch_options(pool: Pool) -> dict[str, int]:
    rows = max(1, min(MOST_ROWS, TILE // pool.padded))
    return {"BM": rows, "num_warps": 4, "enable_fp_fusion": True}


def route(z: Tensor, segments: TaskSegments, pool: Pool) -> tuple[Tensor, Tensor]:
    """(g (G, T, N), P (G, tasks, C)) of z (G, T, C), all fp32 and contiguous."""
    readers, tokens, columns = z.shape
    options = launch_options(pool)
    grid = *segments.grid(options["BM"]), readers
    g = z.new_empty(readers, tokens, pool.experts)
    means = z.new_empty(readers, grid[1], grid[0], columns)
    route_kernel[grid](
        z, segments.offsets, g, means, tokens, pool.gating.k,
        N=pool.experts, C=columns, NP=pool.padded, **pool.gate_constants(), **options,
    )  # fmt: skip
    return g, means.sum(2)


def route_backward(z: Tensor, g: Tensor, dg: Tensor, dp: Tensor, segments: TaskSegments, pool: Pool) -> Tensor:
    """dz (G, T, C) from z, g (G, T, N) of :func:`route`, dg and dP (G, tasks, C), all fp32 and contiguous."""
    readers, tokens, columns = z.shape
    options, dz = launch_options(pool), torch.empty_like(z)
    grid = *segments.grid(options["BM"]), readers
    route_backward_kernel[grid](
        z, g, dg, dp, segments.offsets, dz, tokens,
        N=pool.experts, C=columns, NP=pool.padded, GATING=pool.gating.name, **options,
    )  # fmt: skip
    return dz
