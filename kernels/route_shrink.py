"""route_shrink: the down-projection of every expert, the router and the gates, in one pass over the tokens.

    H = x A^T        (T, R)              z = x W_task^T   (T, C) fp32
    g = gates(z)     (T, N) fp32         P = mean over the task's tokens of softmax(z)   (tasks, C) fp32
    H' = H * per_rank(g)     (T, R)

Grid (block, task), BM tokens each. Routers are fp32 even if the tokens have half precision. P is summed within a block
by the kernel, then over the blocks by torch, in a fixed order. H' may be columns of a wider buffer, which the next GEMM
reads.
Bytes: T d es read, T (2R es + 4C + 4N) written. FLOPs: 2 T d (R + 2C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.gating import Gating
from kernels.jit_helpers import dot_exact, gates, per_rank, task_length, task_rows
from kernels.pool import Pool
from kernels.segments import TaskSegments
from kernels.tiles import tile

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def route_shrink_reference(
    x: Tensor, a: Tensor, routers: Tensor, segments: TaskSegments, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(H, z, g, P, H')."""
    z = reference.router_logits(x, routers, segments)
    h, g = x @ a.T, reference.gates(z, gating)
    gated = (h * g.repeat_interleave(h.shape[1] // g.shape[1], dim=1)).to(h.dtype)
    return h, z, g, reference.mean_probs(z, segments), gated


@triton.jit
def route_shrink_kernel(
    x, a, routers, offsets, h, z, g, means, gated, x_stride, gated_stride, width, d, k,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, SHARED: tl.constexpr, GATING: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows, inside = task_rows(offsets, tl.program_id(0), BM)
    column, expert = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    router = routers + tl.program_id(1) * C * d + column * d
    hidden = tl.zeros((BM, NP * RANK), tl.float32)
    logits = tl.zeros((BM, NP), tl.float32)
    for start in range(0, d, BK):
        inner = start + tl.arange(0, BK)
        across, down = inner[None, :], inner[:, None]
        tokens = tl.load(x + rows * x_stride + across, inside & (across < d), 0.0)
        weights = tl.load(a + expert * d + down, (expert < N * RANK) & (down < d), 0.0)
        hidden = tl.dot(tokens, weights, hidden, input_precision="ieee")
        logits = dot_exact(tokens, tl.load(router + down, (column < C) & (down < d), 0.0), logits, True)
    gate, p = gates(logits, k, N, SHARED, GATING)
    hidden = hidden.to(h.dtype.element_ty)
    tl.store(h + rows * (N * RANK) + expert, hidden, inside & (expert < N * RANK))
    gated_tile = (hidden.to(tl.float32) * per_rank(gate, RANK)).to(hidden.dtype)
    tl.store(gated + rows * gated_stride + expert, gated_tile, inside & (expert < width))
    tl.store(z + rows * C + column, logits, inside & (column < C))
    tl.store(g + rows * N + column, gate, inside & (column < N))
    block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    total = tl.sum(tl.where(inside, p, 0.0), 0)[None, :]
    tl.store(means + block * C + column, total / task_length(offsets), column < C)


def route_shrink(x: Tensor, a: Tensor, routers: Tensor, gated: Tensor, segments: TaskSegments, pool: Pool) -> Outputs:
    """(H (T, R) in x's type, z (T, C), g (T, N), P (tasks, C)); H' is written into ``gated``.

    x (T, d) and ``gated`` (T, at least R) have any row stride; columns of ``gated`` beyond R become 0. ``a`` (R, d) is
    in x's type, routers (tasks, C, d) are fp32.
    """
    tokens, d = x.shape
    h = x.new_empty(tokens, pool.ranks)
    z = x.new_empty(tokens, pool.columns, dtype=torch.float32)
    g = x.new_empty(tokens, pool.experts, dtype=torch.float32)
    sizes = tile("route_shrink", x, pool)
    grid = segments.grid(sizes["BM"])
    means = x.new_empty(len(segments.counts), grid[0], pool.columns, dtype=torch.float32)
    route_shrink_kernel[grid](
        x, a, routers, segments.offsets, h, z, g, means, gated, x.stride(0), gated.stride(0), gated.shape[1], d,
        pool.gating.k,
        **pool.constants(), **pool.gate_constants(), **sizes,
    )  # fmt: skip
    return h, z, g, means.sum(1)
