"""gate: the elementwise pass between the two products of the experts, and its gradients.

    H'  = act(U) * per_rank(g)                              (G, T, R)       U (T, R), g (G, T, N) fp32
    dU  = act'(U) * sum over G of per_rank(g) dH'           (T, R)
    dg  = sum over an expert's columns of act(U) dH'        (G, T, N) fp32

With output biases H' is [H' | g] (G, T, R + N), so that one product with [B | c]^T adds them, and dH' has N more
columns, which are added to dg. The backward pass writes H' again, for dB, instead of keeping it.

Grid (block of BM tokens, BE experts). A program takes BR columns of each of its experts at a time; a row of U is read
once for all G gates. Rows are read and written 16 bytes at a time if R, and with biases R + N, is a multiple of 16. The
arithmetic is fp32; GELU is that of :mod:`kernels.gelu`.
Bytes: forward T R es + G T 4N read, G T R es written; backward T R es + G T (R es + 4N) read and as many written; with
biases, N es more for each row of H' and of dH'.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.gating import next_power_of_two
from kernels.gelu import gelu_derivative, gelu_value
from kernels.segments import ceil_div

BM, COLUMNS = 8, 256  # tokens and columns of a program's tile
NARROWEST = 32  # columns of an expert that are read at once where a tile need not have padding


def gate_reference(u: Tensor, g: Tensor, activation: str, biases: bool) -> Tensor:
    """H' or, with ``biases``, [H' | g]."""
    hidden = F.gelu(u) if activation == "gelu" else u
    gated = (hidden * g.repeat_interleave(u.shape[-1] // g.shape[-1], dim=-1)).to(u.dtype)
    return torch.cat([gated, g.to(u.dtype)], dim=-1) if biases else gated


def gate_backward_reference(
    u: Tensor, g: Tensor, dgated: Tensor, activation: str, biases: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dU, dg, H' or [H' | g]); ``dgated`` is dH', with N more columns if there are ``biases``."""
    rank = u.shape[-1] // g.shape[-1]
    dh, dbias = dgated[..., : u.shape[-1]], dgated[..., u.shape[-1] :]
    hidden = F.gelu(u) if activation == "gelu" else u
    du = (g.repeat_interleave(rank, dim=-1) * dh).sum(0).to(u.dtype)
    if activation == "gelu":
        du = torch.ops.aten.gelu_backward(du, u)
    dg = (hidden * dh).unflatten(-1, (-1, rank)).to(g.dtype).sum(-1)
    return du, dg + dbias if biases else dg, gate_reference(u, g, activation, biases)


@triton.jit
def tokens_and_experts(T, N, BM: tl.constexpr, BE: tl.constexpr):
    """(rows (BM, 1, 1) int64, experts (1, BE, 1), mask (BM, BE, 1)) of this program."""
    rows = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None, None]
    experts = (tl.program_id(1) * BE + tl.arange(0, BE))[None, :, None]
    return rows, experts, (rows < T) & (experts < N)


@triton.jit
def gate_kernel(
    u, g, gated, T, gated_stride, N, RANK,
    G: tl.constexpr, ACTIVATION: tl.constexpr, BIASES: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    rows, experts, inside = tokens_and_experts(T, N, BM, BE)
    exact: tl.constexpr = u.dtype.element_ty == tl.float32
    for start in range(0, RANK, BR):
        rank = start + tl.arange(0, BR)[None, None, :]
        columns, here = experts * RANK + rank, inside & (rank < RANK)
        hidden = tl.load(u + rows * (N * RANK) + columns, here, 0.0).to(tl.float32)
        if ACTIVATION == "gelu":
            hidden = gelu_value(hidden, exact)
        for i in tl.static_range(G):
            row = rows + i * T
            gate = tl.load(g + row * N + experts, inside, 0.0)
            tl.store(gated + row * gated_stride + columns, (hidden * gate).to(gated.dtype.element_ty), here)
    if BIASES:
        for i in tl.static_range(G):
            row = rows + i * T
            gate = tl.load(g + row * N + experts, inside, 0.0)
            tl.store(gated + row * gated_stride + N * RANK + experts, gate.to(gated.dtype.element_ty), inside)


@triton.jit
def gate_backward_kernel(
    u, g, dgated, du, dg, gated, T, gated_stride, N, RANK,
    G: tl.constexpr, GP: tl.constexpr, ACTIVATION: tl.constexpr, BIASES: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    rows, experts, inside = tokens_and_experts(T, N, BM, BE)
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
            through = tl.load(dgated + row * gated_stride + columns, here, 0.0).to(tl.float32)
            dhidden += gate * through
            dgate += tl.where(reader == i, tl.sum(hidden * through, 2)[:, :, None], 0.0)
            tl.store(gated + row * gated_stride + columns, (hidden * gate).to(gated.dtype.element_ty), here)
        if ACTIVATION == "gelu":
            dhidden *= gelu_derivative(value, exact)
        tl.store(du + rows * (N * RANK) + columns, dhidden.to(du.dtype.element_ty), here)
    row = rows + reader * T
    each = inside & (reader < G)
    if BIASES:
        bias = row * gated_stride + N * RANK + experts
        dgate += tl.load(dgated + bias, each, 0.0).to(tl.float32)
        tl.store(gated + bias, tl.load(g + row * N + experts, each, 0.0).to(gated.dtype.element_ty), each)
    tl.store(dg + row * N + experts, dgate, each)


def launch_options(tokens: int, experts: int, rank: int) -> tuple[tuple[int, int], dict[str, int]]:
    """(grid, tile sizes and options).

    BR divides the rank if that leaves at least 64 bytes of consecutive columns. Experts of small rank share a program.
    """
    divisor = rank & -rank  # the largest power of two
    columns = min(COLUMNS, divisor if divisor >= NARROWEST else next_power_of_two(rank))
    beside = min(COLUMNS // columns, next_power_of_two(experts))
    sizes = {"BM": BM, "BE": beside, "BR": columns}
    return (ceil_div(tokens, BM), ceil_div(experts, beside)), sizes | {"num_warps": 4, "enable_fp_fusion": True}


def gate(u: Tensor, g: Tensor, activation: str, biases: bool) -> Tensor:
    """H' (G, T, R), or [H' | g] with ``biases``, of u (T, R) and g (G, T, N) fp32, both contiguous; in u's type."""
    (tokens, ranks), (readers, _, experts) = u.shape, g.shape
    gated = u.new_empty(readers, tokens, ranks + experts * biases)
    grid, options = launch_options(tokens, experts, ranks // experts)
    gate_kernel[grid](
        u, g, gated, tokens, gated.stride(1), experts, ranks // experts,
        G=readers, ACTIVATION=activation, BIASES=biases, **options,
    )  # fmt: skip
    return gated


def gate_backward(u: Tensor, g: Tensor, dgated: Tensor, activation: str, biases: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(dU (T, R), dg (G, T, N) fp32, H' or [H' | g]) from ``dgated``, the gradient of the latter.

    u (T, R), dgated (G, T, R or R + N) in one type and g (G, T, N) fp32 are contiguous.
    """
    (tokens, ranks), (readers, _, experts) = u.shape, g.shape
    du, dg, gated = torch.empty_like(u), torch.empty_like(g), torch.empty_like(dgated)
    grid, options = launch_options(tokens, experts, ranks // experts)
    gate_backward_kernel[grid](
        u, g, dgated, du, dg, gated, tokens, gated.stride(1), experts, ranks // experts,
        G=readers, GP=next_power_of_two(readers), ACTIVATION=activation, BIASES=biases, **options,
    )  # fmt: skip
    return du, dg, gated
