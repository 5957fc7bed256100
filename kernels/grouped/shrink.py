"""shrink: the gathered product of one expert's rows per block, forward to H' and backward to dU.

    forward     U  = x A_e^T + b_e          H' = act(U) g                                    (places, r)
    backward    dH' = dY B_e                dU = act'(U) g dH'        H' = act(U) g          (places, r)
                dg = sum over r of act(U) dH' + dY . c_e                                     (M, N) fp32

One kernel serves both: a program gathers the BLOCK rows of a block of :mod:`kernels.grouped.sort` and multiplies them
by the weights of their expert, BR ranks at a time. H' is not kept for the backward pass, which recomputes it from U. A
gate's gradient is an inner product of act(U) and dH', so no expert's output is stored; dg is 0 outside the selection.
Bytes: M K d es gathered, M K 2r es written; backward M K (D + r) es read, M K 2r es + 4 M N written. FLOPs: 2 M K r d,
backward 2 M K r D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts.reference import Experts
from kernels.gelu import gelu_derivative, gelu_value
from kernels.grouped.sort import Sorted, expert_of_block
from kernels.grouped.weights import down, gather_rows, of_places, rank_tile, up


def activation_reference(u: Tensor, name: str) -> Tensor:
    return torch.nn.functional.gelu(u) if name == "gelu" else u


def shrink_reference(x: Tensor, experts: Experts, g: Tensor, order: Sorted) -> tuple[Tensor, Tensor]:
    """(U, H'); 0 at empty places."""
    row, expert, used = of_places(order)
    u = torch.einsum("pd,prd->pr", gather_rows(x, row), down(experts, order.experts, x.dtype)[expert])
    if experts.hidden_bias is not None:
        u = u + experts.hidden_bias.to(x.dtype).view(len(order.ends), -1)[expert]
    u = u * used
    gate = g[row, expert % order.experts, None].to(x.dtype)
    return u, activation_reference(u, experts.activation) * gate * used


def shrink_backward_reference(
    dy: Tensor, experts: Experts, g: Tensor, u: Tensor, order: Sorted
) -> tuple[Tensor, Tensor, Tensor]:
    """(dU, H', dg)."""
    row, expert, used = of_places(order)
    dgated = torch.einsum("pD,pDr->pr", dy[row], up(experts, order.experts, dy.dtype)[expert]) * used
    with torch.enable_grad():
        leaf = u.detach().requires_grad_()
        value = activation_reference(leaf, experts.activation)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    gate = g[row, expert % order.experts, None].to(u.dtype)
    dgates = (value.detach() * dgated).sum(1)
    if experts.output_bias is not None:
        dgates = dgates + (dy[row] * experts.output_bias.to(dy.dtype).flatten(0, 1)[expert]).sum(1)
    dg = torch.zeros_like(g)
    dg[row[used[:, 0]], expert[used[:, 0]] % order.experts] = dgates[used[:, 0]].to(g.dtype)
    return slope * gate * dgated, value.detach() * gate * used, dg


@triton.jit
def activate(u, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == "gelu":
        return gelu_value(u, EXACT)
    return u


@triton.jit
def activation_derivative(u, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == "gelu":
        return gelu_derivative(u, EXACT)
    return tl.full(u.shape, 1.0, tl.float32)


@triton.jit
def shrink_kernel(
    tokens, weight, bias, g, row_of_place, ends, u, gated, du, dg, T, tokens_stride, set_stride, expert_stride,
    inner_stride, rank_stride, K,
    N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RANK: tl.constexpr, BACKWARD: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``tokens`` is x (row i uses x[i % T]) or dY (T = M). ``bias`` is b (E, r), or backward c (E, D)."""
    expert = expert_of_block(ends, tl.program_id(0), E, EP)
    if expert == E:
        return
    local = tl.arange(0, BM)[:, None]
    origin = tl.program_id(0).to(tl.int64) * BM
    row = tl.load(row_of_place + origin + local).to(tl.int64)
    inside = row >= 0
    gate = tl.load(g + row * N + expert % N, inside, 0.0)
    source = tokens + row % T * tokens_stride
    weights = weight + (expert // N).to(tl.int64) * set_stride + expert % N * expert_stride
    exact: tl.constexpr = u.dtype.element_ty == tl.float32
    dgate = tl.zeros((BM,), tl.float32)
    if BACKWARD and BIAS:
        for start in range(0, K, BK):
            across = start + tl.arange(0, BK)[None, :]
            grad = tl.load(source + across, inside & (across < K), 0.0).to(tl.float32)
            dgate += tl.sum(grad * tl.load(bias + expert * K + across, across < K, 0.0).to(tl.float32), 1)
    for first in range(0, RANK, BR):
        rank = first + tl.arange(0, BR)[None, :]
        total = tl.zeros((BM, BR), tl.float32)
        for start in range(0, K, BK):
            across, inner = start + tl.arange(0, BK)[None, :], start + tl.arange(0, BK)[:, None]
            left = tl.load(source + across, inside & (across < K), 0.0)
            right = tl.load(weights + inner * inner_stride + rank * rank_stride, (inner < K) & (rank < RANK), 0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        at, here = origin * RANK + (local * RANK + rank), inside & (rank < RANK)
        if BACKWARD:
            hidden = tl.load(u + at, here, 0.0).to(tl.float32)
        else:
            if BIAS:
                total += tl.load(bias + expert * RANK + rank, rank < RANK, 0.0).to(tl.float32)
            hidden = total.to(u.dtype.element_ty)
            tl.store(u + at, hidden, here)
            hidden = hidden.to(tl.float32)
        value = activate(hidden, ACTIVATION, exact)
        tl.store(gated + at, (value * gate).to(gated.dtype.element_ty), here)
        if BACKWARD:
            slope = activation_derivative(hidden, ACTIVATION, exact)
            tl.store(du + at, (slope * gate * total).to(du.dtype.element_ty), here)
            dgate += tl.sum(value * total, 1)
    if BACKWARD:
        tl.store(dg + row * N + expert % N, dgate[:, None], inside)


def shrink(x: Tensor, experts: Experts, g: Tensor, order: Sorted) -> tuple[Tensor, Tensor]:
    """(U, H'), each (places, r) in x's type and undefined at empty places.

    x (T, d) has any row stride and A is in its type; g (M, N) is fp32. The row i T + t reads x[t].
    """
    sets, ranks, d = experts.down.shape
    rank = ranks // order.experts
    u, gated = x.new_empty(len(order.rows), rank), x.new_empty(len(order.rows), rank)
    bias = experts.hidden_bias
    shrink_kernel[(order.blocks,)](
        x, experts.down, x if bias is None else bias, g, order.rows, order.ends, u, gated, u, g, len(x), x.stride(0),
        ranks * d, rank * d, 1, d, d,
        **order.constants(), RANK=rank, BACKWARD=False, BIAS=bias is not None, ACTIVATION=experts.activation,
        **tile(x, rank),
    )  # fmt: skip
    return u, gated


def shrink_backward(dy: Tensor, experts: Experts, g: Tensor, u: Tensor, order: Sorted) -> tuple[Tensor, Tensor, Tensor]:
    """(dU, H', dg): the first two like u (places, r), dg (M, N) fp32.

    dy (M, D) has any row stride and B is in its type.
    """
    sets, width, ranks = experts.up.shape
    du, gated, dg = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(g)
    bias = experts.output_bias
    shrink_kernel[(order.blocks,)](
        dy, experts.up, dy if bias is None else bias, g, order.rows, order.ends, u, gated, du, dg, len(dy),
        dy.stride(0), width * ranks, u.shape[1], ranks, 1, width,
        **order.constants(), RANK=u.shape[1], BACKWARD=True, BIAS=bias is not None, ACTIVATION=experts.activation,
        **tile(dy, u.shape[1], backward=True),
    )  # fmt: skip
    return du, gated, dg


def tile(x: Tensor, rank: int, backward: bool = False) -> dict[str, int]:
    """Tile sizes and Triton's options for tokens of x's type and experts of this rank."""
    if x.element_size() == 4:
        sizes = {"BR": rank_tile(rank, 32), "BK": 32, "num_warps": 4, "num_stages": 3}
    elif rank <= 64:
        sizes = {"BR": rank_tile(rank, 64), "BK": 64, "num_warps": 4, "num_stages": 3}
    else:  # backward, wider tiles need all registers of a multiprocessor for one program
        sizes = {"BR": 64 if backward else 128, "BK": 64, "num_warps": 8, "num_stages": 3}
    return sizes | {"enable_fp_fusion": True}
