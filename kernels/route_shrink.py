"""route_shrink: the down-projection of every expert, the router and the gates, in one pass over the tokens.

    H = x A^T        (T, R)              z = x W_task^T   (T, C) fp32
    g = gates(z)     (T, N) fp32         P = mean over the task's tokens of softmax(z)   (tasks, C) fp32
    H' = H * per_rank(g)     (T, R)

Grid (block), BM tokens of one task each. Beside half-precision tokens the fp32 routers are two matrices of that type,
high and low parts with an accumulator each (:mod:`kernels.pack`). P is summed within a block by the kernel, then over
the blocks by torch, in a fixed order. H' may be columns of a wider buffer, which the next GEMM reads. z carries the
selection in the lowest bits of its sort keys (jit_helpers.mark), for the backward pass.
Bytes: T d es read, T (2R es + 4C + 4N) written. FLOPs: 2 T d (R + 2C).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.gating import Gating, Pool
from kernels.jit_helpers import block_of_task, gates, mark, per_rank, rows_of_block, select
from kernels.segments import TaskSegments
from kernels.tiles import tile


def route_shrink_reference(
    x: Tensor, a: Tensor, routers: Tensor, segments: TaskSegments, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(H, z, g, P, H')."""
    z = reference.router_logits(x, routers, segments)
    h, g = x @ a.T, reference.gates(z, gating)
    gated = (h * g.repeat_interleave(h.shape[1] // g.shape[1], dim=1)).to(h.dtype)
    return h, z, g, reference.mean_probs(z, segments), gated


def marked_reference(z: Tensor, gating: Gating) -> Tensor:
    """z (T, C) fp32 with the selection in the lowest bit of its sort keys, 1 at the k selected experts.

    A sort key is the number's bits, all but the sign inverted if it is negative. Infinities stay as they are.
    """
    columns = z.shape[1] if gating.name == "naive-shared" else z.shape[1] - gating.shared
    selected = torch.zeros_like(z, dtype=torch.int32)
    selected[:, :columns] = reference.top_k_mask(z[:, :columns], gating.k)
    bits = z.masked_fill(z == 0, 0).view(torch.int32).masked_fill(z.isnan(), 0x7FFFFFFF)
    keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) & -2 | selected
    marked = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys).view(torch.float32)
    return torch.where(z.isinf(), z, marked)


@triton.jit
def route_shrink_kernel(
    x, a, routers, scales, offsets, h, z, g, means, gated, length, x_stride, gated_stride, width, d, k,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, RANK: tl.constexpr, SHARED: tl.constexpr, GATING: tl.constexpr,
    TASKS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    task, first, end, tokens_of_task = block_of_task(offsets, length, tl.program_id(0), TASKS, BM)
    rows, inside = rows_of_block(first, end, BM)
    offs_e, offs_r = tl.arange(0, NP)[None, :], tl.arange(0, NP * RANK)[None, :]
    split: tl.constexpr = x.dtype.element_ty != tl.float32
    router = routers + task * C * d + offs_e * d
    hidden = tl.zeros((BM, NP * RANK), tl.float32)
    logits = tl.zeros((BM, NP), tl.float32)
    low_logits = tl.zeros((BM, NP), tl.float32)
    for start in range(0, tl.where(first < end, d, 0), BK):  # blocks past the last multiply nothing
        inner = start + tl.arange(0, BK)
        across, down = inner[None, :], inner[:, None]
        tokens = tl.load(x + rows * x_stride + across, inside & (across < d), 0.0)
        weights = tl.load(a + offs_r * d + down, (offs_r < N * RANK) & (down < d), 0.0)
        hidden = tl.dot(tokens, weights, hidden, input_precision="ieee")
        high = tl.load(router + down, (offs_e < C) & (down < d), 0.0)
        logits = tl.dot(tokens, high, logits, input_precision="ieee")
        if split:
            low = tl.load(router + TASKS * C * d + down, (offs_e < C) & (down < d), 0.0)
            low_logits = tl.dot(tokens, low, low_logits)
    # Stored before the selection, which then has the registers that fp32 would take.
    hidden = hidden.to(h.dtype.element_ty)
    tl.store(h + rows * (N * RANK) + offs_r, hidden, inside & (offs_r < N * RANK))
    logits += low_logits
    if x.dtype.element_ty == tl.float16:
        logits *= tl.load(scales + task)
    selected = select(logits, N - SHARED, k)
    logits = mark(logits, selected)
    gate, p = gates(logits, selected, N, SHARED, GATING)
    gated_tile = (hidden.to(tl.float32) * per_rank(gate, RANK)).to(hidden.dtype)
    tl.store(gated + rows * gated_stride + offs_r, gated_tile, inside & (offs_r < width))
    tl.store(z + rows * C + offs_e, logits, inside & (offs_e < C))
    tl.store(g + rows * N + offs_e, gate, inside & (offs_e < N))
    share = tl.sum(tl.where(inside, p, 0.0), 0)[None, :] / tokens_of_task
    for t in tl.static_range(TASKS):
        place = means + (t * tl.num_programs(0) + tl.program_id(0)) * C + offs_e
        tl.store(place, tl.where(task == t, share, 0.0), offs_e < C)


def route_shrink(
    x: Tensor, a: Tensor, routers: tuple[Tensor, Tensor | None], gated: Tensor, segments: TaskSegments, pool: Pool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(H (T, R) in x's type, z (T, C), g (T, N), P (tasks, C)); H' is written into ``gated``.

    x (T, d) and ``gated`` (T, at least R) have any row stride; columns of ``gated`` beyond R become 0. ``a`` (R, d) and
    ``routers``, with their scales, are those of :func:`kernels.pack.pack_forward`.
    """
    (tokens, d), (parts, scales) = x.shape, routers
    h = x.new_empty(tokens, pool.ranks)
    z = x.new_empty(tokens, pool.columns, dtype=torch.float32)
    g = x.new_empty(tokens, pool.experts, dtype=torch.float32)
    sizes = tile("route_shrink", x.device, x.dtype, pool)
    blocks = segments.blocks(tokens, sizes["BM"])
    means = (x.new_empty if blocks else x.new_zeros)(segments.tasks, max(blocks, 1), pool.columns, dtype=torch.float32)
    route_shrink_kernel[(blocks,)](
        x, a, parts, parts if scales is None else scales, segments.offsets, h, z, g, means, gated,
        segments.length, x.stride(0), gated.stride(0), gated.shape[1], d, pool.gating.k,
        **pool.constants, **pool.gate_constants, TASKS=segments.tasks, **sizes,
    )  # fmt: skip
    return h, z, g, means.sum(1)
