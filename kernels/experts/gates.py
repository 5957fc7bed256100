"""Two elementwise passes of the experts. Their references are differentiable: backward is judged by autograd.

    route   g   = gates(z)                                          (G, T, N) fp32
            P   = mean over a task's tokens of softmax(z)           (G, tasks, C) fp32
            dz as in :mod:`kernels.gate_backward`                   (G, T, C) fp32
    gate    H'  = act(U) * per_rank(g)                              (G, T, R)       U (T, R)
            dU  = act'(U) * sum over G of per_rank(g) dH'           (T, R)
            dg  = sum over an expert's columns of act(U) dH'        (G, T, N) fp32

route: grid (block, gate of G), BM tokens of one task each. P is summed within a block by the kernel, then over the
blocks by torch, in a fixed order. Bytes: G T (4C + 4N), backward G T (8C + 8N).

gate, between the two products of the dense algorithm: grid (block of BM tokens, BE experts). A program takes BR columns
of each of its experts at a time; a row of U is read once for all G gates. With output biases H' is [H' | g], so that
one product with [B | c]^T adds them. Backward writes H' again, for dB. Rows are read and written 16 bytes at a time if
their length is a multiple of 16. Bytes: (G + 1) T R es + G T 4N; backward 2 (G + 1) T R es + G T 8N.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts.reference import activate
from kernels.gating import Pool, next_power_of_two
from kernels.gelu import gelu_derivative, gelu_value
from kernels.jit_helpers import block_of_task, gates, gates_backward, rows_of_block, select
from kernels.segments import TaskSegments

TILE, MOST_ROWS = 2048, 64  # logits that a program of route keeps in registers; tokens at most
BM, COLUMNS = 8, 256  # tokens and columns of a tile of gate
NARROWEST = 32  # columns of an expert that are read at once where a tile need not have padding


@triton.jit
def route_kernel(
    z, offsets, g, means, length, T, k,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, SHARED: tl.constexpr, GATING: tl.constexpr,
    TASKS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    task, first, end, tokens_of_task = block_of_task(offsets, length, tl.program_id(0), TASKS, BM)
    rows, inside = rows_of_block(first, end, BM)
    rows += tl.program_id(1).to(tl.int64) * T
    offs_e = tl.arange(0, NP)[None, :]
    logits = tl.load(z + rows * C + offs_e, inside & (offs_e < C), 0.0)
    gate, p = gates(logits, select(logits, N - SHARED, k), N, SHARED, GATING)
    tl.store(g + rows * N + offs_e, gate, inside & (offs_e < N))
    share = tl.sum(tl.where(inside, p, 0.0), 0)[None, :] / tokens_of_task
    for t in tl.static_range(TASKS):
        block = (tl.program_id(1) * TASKS + t) * tl.num_programs(0) + tl.program_id(0)
        tl.store(means + block * C + offs_e, tl.where(task == t, share, 0.0), offs_e < C)


@triton.jit
def route_backward_kernel(
    z, g, dg, dp, offsets, dz, length, T,
    N: tl.constexpr, C: tl.constexpr, NP: tl.constexpr, GATING: tl.constexpr, TASKS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    task, first, end, tokens_of_task = block_of_task(offsets, length, tl.program_id(0), TASKS, BM)
    rows, inside = rows_of_block(first, end, BM)
    rows += tl.program_id(1).to(tl.int64) * T
    offs_e = tl.arange(0, NP)[None, :]
    logits = tl.load(z + rows * C + offs_e, inside & (offs_e < C), 0.0)
    gate = tl.load(g + rows * N + offs_e, inside & (offs_e < N), 0.0)
    dgate = tl.load(dg + rows * N + offs_e, inside & (offs_e < N), 0.0)
    c = tl.load(dp + (tl.program_id(1) * TASKS + task) * C + offs_e, offs_e < C, 0.0) / tokens_of_task
    tl.store(dz + rows * C + offs_e, gates_backward(logits, gate, dgate, c, C, GATING), inside & (offs_e < C))


def route_options(pool: Pool) -> dict[str, int]:
    rows = max(1, min(MOST_ROWS, TILE // pool.padded))
    return {"BM": rows, "num_warps": 4, "enable_fp_fusion": True}


def route(z: Tensor, segments: TaskSegments, pool: Pool) -> tuple[Tensor, Tensor]:
    """As :func:`kernels.experts.reference.route`: (g (G, T, N), P (G, tasks, C)) of z (G, T, C), contiguous fp32."""
    (readers, tokens, columns), options = z.shape, route_options(pool)
    blocks = segments.blocks(tokens, options["BM"])
    g, means = z.new_empty(readers, tokens, pool.experts), z.new_empty(readers, segments.tasks, blocks, columns)
    route_kernel[(blocks, readers)](
        z, segments.offsets, g, means, segments.length, tokens, pool.gating.k,
        N=pool.experts, C=columns, NP=pool.padded, TASKS=segments.tasks, **pool.gate_constants, **options,
    )  # fmt: skip
    return g, means.sum(2)


def route_backward(z: Tensor, g: Tensor, dg: Tensor, dp: Tensor, segments: TaskSegments, pool: Pool) -> Tensor:
    """dz (G, T, C) from z, g (G, T, N) of :func:`route`, dg and dP (G, tasks, C), all fp32 and contiguous."""
    (readers, tokens, columns), options, dz = z.shape, route_options(pool), torch.empty_like(z)
    route_backward_kernel[(segments.blocks(tokens, options["BM"]), readers)](
        z, g, dg, dp, segments.offsets, dz, segments.length, tokens,
        N=pool.experts, C=columns, NP=pool.padded, GATING=pool.gating.name, TASKS=segments.tasks, **options,
    )  # fmt: skip
    return dz


def gate_reference(u: Tensor, g: Tensor, activation: str, biases: bool) -> Tensor:
    """H' or, with ``biases``, [H' | g]."""
    gated = (activate(u, activation) * g.repeat_interleave(u.shape[-1] // g.shape[-1], dim=-1)).to(u.dtype)
    return torch.cat([gated, g.to(u.dtype)], dim=-1) if biases else gated


@triton.jit
def gate_kernel(
    u, g, dgated, gated, du, dg, T, gated_stride, N, RANK,
    G: tl.constexpr, GP: tl.constexpr, ACTIVATION: tl.constexpr, BIASES: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None, None]
    experts = (tl.program_id(1) * BE + tl.arange(0, BE))[None, :, None]
    inside = (rows < T) & (experts < N)
    exact: tl.constexpr = u.dtype.element_ty == tl.float32
    reader = tl.arange(0, GP)[None, None, :]
    dgate = tl.zeros((BM, BE, GP), tl.float32)
    for start in range(0, RANK, BR):
        rank = start + tl.arange(0, BR)[None, None, :]
        columns, here = experts * RANK + rank, inside & (rank < RANK)
        value = tl.load(u + rows * (N * RANK) + columns, here, 0.0).to(tl.float32)
        hidden = value
        if ACTIVATION == "gelu":
            hidden = gelu_value(value, exact)
        dhidden = tl.zeros((BM, BE, BR), tl.float32)
        for i in tl.static_range(G):
            row = rows + i * T
            gate = tl.load(g + row * N + experts, inside, 0.0)
            if dgated is not None:
                through = tl.load(dgated + row * gated_stride + columns, here, 0.0).to(tl.float32)
                dhidden += gate * through
                dgate += tl.where(reader == i, tl.sum(hidden * through, 2)[:, :, None], 0.0)
            tl.store(gated + row * gated_stride + columns, (hidden * gate).to(gated.dtype.element_ty), here)
        if dgated is not None:
            if ACTIVATION == "gelu":
                dhidden *= gelu_derivative(value, exact)
            tl.store(du + rows * (N * RANK) + columns, dhidden.to(du.dtype.element_ty), here)
    row = rows + reader * T
    each = inside & (reader < G)
    if BIASES:
        bias = row * gated_stride + N * RANK + experts
        tl.store(gated + bias, tl.load(g + row * N + experts, each, 0.0).to(gated.dtype.element_ty), each)
        if dgated is not None:
            dgate += tl.load(dgated + bias, each, 0.0).to(tl.float32)
    if dgated is not None:
        tl.store(dg + row * N + experts, dgate, each)


def gate_options(tokens: int, experts: int, rank: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, tile sizes and options).

    BR divides the rank if that leaves at least 64 bytes of consecutive columns. Experts of small rank share a program.
    """
    divisor = rank & -rank  # the largest power of two
    columns = min(COLUMNS, divisor if divisor >= NARROWEST else next_power_of_two(rank))
    beside = min(COLUMNS // columns, next_power_of_two(experts))
    sizes = {"BM": BM, "BE": beside, "BR": columns}
    return (math.ceil(tokens / BM), math.ceil(experts / beside)), sizes | {"num_warps": 4, "enable_fp_fusion": True}


def gate(u: Tensor, g: Tensor, activation: str, biases: bool, dgated: Tensor | None = None) -> tuple[Tensor, ...]:
    """(H',), or with ``dgated``, the gradient of H', (H', dU, dg). H' is (G, T, R), with ``biases`` (G, T, R + N).

    u (T, R), dgated and the results have one type, g (G, T, N) and dg are fp32; all are contiguous.
    """
    (tokens, ranks), (readers, _, experts), rank = u.shape, g.shape, u.shape[1] // g.shape[2]
    gated = u.new_empty(readers, tokens, ranks + experts * biases)
    gradients = () if dgated is None else (torch.empty_like(u), torch.empty_like(g))
    grid, options = gate_options(tokens, experts, rank)
    gate_kernel[grid](
        u, g, dgated, gated, *(gradients or (None, None)), tokens, gated.stride(1), experts, rank,
        G=readers, GP=next_power_of_two(readers), ACTIVATION=activation, BIASES=biases, **options,
    )  # fmt: skip
    return gated, *gradients
