"""The products of the grouped algorithm over the blocks of :mod:`kernels.experts.sort`. The reference of shrink's
backward pass is autograd through those of H' and O.

    shrink      U  = x A_e^T + b_e              H' = act(U) g                                    (places, r)
                backward: dH' = dY B_e          dU = act'(U) g dH',  H' once more                (places, r)
                dg = sum over r of act(U) dH' + dY . c_e, 0 outside the selection                (M, N) fp32
    expand      O = H' B_e^T + g c_e  (places, D)               backward: O = dU A_e  (places, d)
    combine     y[row] = base[row] + sum over slots of O[place of (row, slot)]
                dx[t] = sum over gates and slots of O[place of (row i T + t, slot)]
    weight_grad dA_e = dU^T x  (r, d),  db_e = sum of dU;       dB_e = dY^T H'  (D, r),  dc_e = sum of g dY

A program of shrink gathers the rows of a block and multiplies them by the weights of their expert, BR ranks at a time;
one of expand computes BN columns of a block; one of weight_grad, grid (tile, id, part), sums a BW x BR tile over its
share of one id's blocks, in order. The number of parts depends on shapes only. Sums have a fixed order and no atomics:
the same bits in every run. Bytes: shrink M K (d + 2r) es; backward M K (D + 3r) es + 4 M N. expand M K (r + D) es,
combine M (K + 2) D es; backward M K (r + d) es, (M K + T) d es. weight_grad M K (d + r tiles) es and M K (D + r tiles)
es. FLOPs: 2 M K r d or 2 M K r D each.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts.reference import Experts, activate
from kernels.experts.sort import Sorted, expert_of_block, tile
from kernels.gelu import gelu_derivative, gelu_value
from kernels.tiles import multiprocessors

BT, COLUMNS = 16, 128  # tile of combine
MOST_PARTS = 8  # of weight_grad, while they leave fewer than four programs per multiprocessor


class Layer(NamedTuple):
    """One of the experts' two products: A as (sets, N, r, d) with b, or B as (sets, N, r, D) with c. Views."""

    weight: Tensor
    bias: Tensor | None


def layers(experts: Experts, number: int) -> tuple[Layer, Layer]:
    """Those of N = ``number`` experts."""
    up = experts.up.unflatten(2, (number, -1)).permute(0, 2, 3, 1)
    return Layer(experts.down.unflatten(1, (number, -1)), experts.hidden_bias), Layer(up, experts.output_bias)


def shrink_reference(x: Tensor, down: Layer, order: Sorted) -> Tensor:
    """U; 0 at empty places."""
    row, expert, used = order.pairs()
    u = torch.einsum("pd,prd->pr", x[row % len(x)], down.weight.flatten(0, 1)[expert])
    if down.bias is not None:
        u = u + down.bias.to(u.dtype).view(len(order.ends), -1)[expert]
    return u * used


def gated_reference(u: Tensor, g: Tensor, order: Sorted, activation: str) -> Tensor:
    """H'; 0 at empty places."""
    row, expert, used = order.pairs()
    return activate(u, activation) * g[row, expert % order.experts, None].to(u.dtype) * used


def expand_reference(hidden: Tensor, layer: Layer, g: Tensor, order: Sorted) -> Tensor:
    """O; 0 at empty places."""
    row, expert, used = order.pairs()
    out = torch.einsum("pr,prw->pw", hidden, layer.weight.flatten(0, 1)[expert])
    if layer.bias is not None:
        out = out + (g[row, expert % order.experts, None] * layer.bias.to(g.dtype).flatten(0, 1)[expert]).to(out.dtype)
    return out * used


def combine_reference(out: Tensor, base: Tensor | None, tokens: int, order: Sorted) -> Tensor:
    """y, or dx: (tokens, width)."""
    picked = out[order.places.clamp_min(0).long()] * (order.places >= 0)[..., None]
    total = picked.sum(1).view(-1, tokens, out.shape[1]).sum(0)
    return total if base is None else base + total


@triton.jit
def shrink_kernel(
    tokens, weight, bias, g, row_of_place, ends, u, gated, du, dg, T, tokens_stride, set_stride, expert_stride,
    rank_stride, inner_stride, K,
    N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RANK: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``tokens`` is x (row i uses x[i % T]), ``bias`` b (E, r); backward dY (T = M) and c (E, D)."""
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
    if du is not None and bias is not None:
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
        if du is not None:
            hidden = tl.load(u + at, here, 0.0).to(tl.float32)
        else:
            if bias is not None:
                total += tl.load(bias + expert * RANK + rank, rank < RANK, 0.0).to(tl.float32)
            hidden = total.to(u.dtype.element_ty)
            tl.store(u + at, hidden, here)
            hidden = hidden.to(tl.float32)
        value = hidden
        if ACTIVATION == "gelu":
            value = gelu_value(hidden, exact)
        tl.store(gated + at, (value * gate).to(gated.dtype.element_ty), here)
        if du is not None:
            slope = gate
            if ACTIVATION == "gelu":
                slope = gelu_derivative(hidden, exact) * gate
            tl.store(du + at, (slope * total).to(du.dtype.element_ty), here)
            dgate += tl.sum(value * total, 1)
    if du is not None:
        tl.store(dg + row * N + expert % N, dgate[:, None], inside)


@triton.jit
def expand_kernel(
    hidden, weight, bias, g, row_of_place, ends, out, set_stride, expert_stride, rank_stride, outer_stride, W,
    N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RANK: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(W, BN)
    block, outer = tl.program_id(0) // tiles, tl.program_id(0) % tiles * BN + tl.arange(0, BN)[None, :]
    expert = expert_of_block(ends, block, E, EP)
    if expert == E:
        return
    local = tl.arange(0, BM)[:, None]
    origin = block.to(tl.int64) * BM
    row = tl.load(row_of_place + origin + local).to(tl.int64)
    inside = row >= 0
    weights = weight + (expert // N).to(tl.int64) * set_stride + expert % N * expert_stride
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, RANK, BK):
        across, inner = start + tl.arange(0, BK)[None, :], start + tl.arange(0, BK)[:, None]
        left = tl.load(hidden + origin * RANK + local * RANK + across, inside & (across < RANK), 0.0)
        right = tl.load(weights + inner * rank_stride + outer * outer_stride, (inner < RANK) & (outer < W), 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    if bias is not None:
        gate = tl.load(g + row * N + expert % N, inside, 0.0)
        total += gate * tl.load(bias + expert * W + outer, outer < W, 0.0).to(tl.float32)
    tl.store(out + origin * W + local * W + outer, total.to(out.dtype.element_ty), inside & (outer < W))


@triton.jit
def combine_kernel(
    out, base, places, y, T, base_stride, gates, W, SLOTS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr
):
    tiles = tl.cdiv(W, BN)
    token = (tl.program_id(0) // tiles * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    outer = tl.program_id(0) % tiles * BN + tl.arange(0, BN)[None, :]
    inside = (token < T) & (outer < W)
    total = tl.zeros((BT, BN), tl.float32)
    if base is not None:
        total = tl.load(base + token * base_stride + outer, inside, 0.0).to(tl.float32)
    for gate in range(gates):
        for slot in tl.static_range(SLOTS):
            place = tl.load(places + (gate * T + token) * SLOTS + slot, token < T, -1).to(tl.int64)
            total += tl.load(out + place * W + outer, inside & (place >= 0), 0.0).to(tl.float32)
    tl.store(y + token * W + outer, total.to(y.dtype.element_ty), inside)


def shrink(
    tokens: Tensor, layer: Layer, g: Tensor, order: Sorted, activation: str, u: Tensor | None = None
) -> tuple[Tensor, ...]:
    """(U, H') of x (T, d), A and b, or with U (dU, H', dg) of dY (M, D), B and c; x and dY have any row stride.

    U, dU and H' (places, r) are undefined at empty places; g and dg (M, N) are fp32."""
    (rank, width), kernel = layer.weight.shape[2:], "shrink" if u is None else "shrink_backward"
    hidden, gated = (tokens.new_empty(len(order.rows), rank) for _ in range(2))
    du, dg = (None, None) if u is None else (hidden, torch.zeros_like(g))
    shrink_kernel[(order.blocks,)](
        tokens, layer.weight, layer.bias, g, order.rows, order.ends, hidden if u is None else u, gated, du, dg,
        len(tokens), tokens.stride(0), *layer.weight.stride(), width,
        **order.constants(), RANK=rank, ACTIVATION=activation, **tile(kernel, tokens.element_size(), rank),
    )  # fmt: skip
    return (hidden, gated) if dg is None else (hidden, gated, dg)


def expand(hidden: Tensor, layer: Layer, g: Tensor, order: Sorted) -> Tensor:
    """O (places, width of ``layer``) in the type of ``hidden`` (places, r), undefined at empty places."""
    rank, width = layer.weight.shape[2:]
    out, sizes = hidden.new_empty(len(hidden), width), tile("expand", hidden.element_size(), rank)
    expand_kernel[(order.blocks * math.ceil(width / sizes["BN"]),)](
        hidden, layer.weight, layer.bias, g, order.rows, order.ends, out, *layer.weight.stride(), width,
        **order.constants(), RANK=rank, **sizes,
    )  # fmt: skip
    return out


def combine(out: Tensor, base: Tensor | None, tokens: int, order: Sorted) -> Tensor:
    """base + the sum of each token's pairs of O = ``out``, (tokens, width): y for ``tokens`` = M; dx for T, over all
    gates. ``base`` has any row stride."""
    (rows, slots), width = order.places.shape, out.shape[1]
    y, stride = out.new_empty(tokens, width), 0 if base is None else base.stride(0)
    combine_kernel[(math.ceil(tokens / BT) * math.ceil(width / COLUMNS),)](
        out, base, order.places, y, tokens, stride, rows // max(1, tokens), width,
        SLOTS=slots, BT=BT, BN=COLUMNS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def weight_grad_reference(wide: Tensor, narrow: Tensor, g: Tensor, order: Sorted) -> tuple[Tensor, Tensor, Tensor]:
    """(the product (E, r, W), sums of ``narrow`` (E, r), sums of g ``wide`` (E, W)) of every id."""
    row, expert, used = order.pairs()
    tokens, ranks = wide[row % len(wide)] * used, narrow * used
    owner = torch.nn.functional.one_hot(expert, len(order.ends)).to(wide.dtype)
    gate = g[row, expert % order.experts, None].to(wide.dtype)
    return torch.einsum("pe,pw,pr->erw", owner, tokens, ranks), owner.T @ ranks, owner.T @ (gate * tokens)


@triton.jit
def weight_grad_kernel(
    wide, narrow, g, row_of_place, ends, product, bias, T, wide_stride, W, sizes, bias_size, set_stride, expert_stride,
    rank_stride, outer_stride,
    N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RANK: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """``bias`` gets sums of ``narrow``, or with g sums of g ``wide``."""
    tiles = tl.cdiv(RANK, BR)
    outer = tl.program_id(0) // tiles * BW + tl.arange(0, BW)
    rank = tl.program_id(0) % tiles * BR + tl.arange(0, BR)
    expert, part = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.load(ends + expert - 1, expert > 0, 0)
    last = tl.load(ends + expert)
    share = tl.cdiv(last - first, tl.num_programs(2))
    begin = first + tl.program_id(2) * share
    total = tl.zeros((BW, BR), tl.float32)
    bias_total = tl.zeros((BR if g is None else BW,), tl.float32)
    for start in range(begin * BM, tl.minimum(begin + share, last) * BM, BT):
        place = (start + tl.arange(0, BT)).to(tl.int64)[:, None]
        row = tl.load(row_of_place + place).to(tl.int64)
        inside = row >= 0
        across = tl.load(wide + row % T * wide_stride + outer[None, :], inside & (outer[None, :] < W), 0.0)
        ranks = tl.load(narrow + place * RANK + rank[None, :], inside & (rank[None, :] < RANK), 0.0)
        total = tl.dot(tl.trans(across), ranks, total, input_precision="ieee")
        if bias is not None:
            if g is None:
                bias_total += tl.sum(ranks.to(tl.float32), 0)
            else:
                gate = tl.load(g + row * N + expert % N, inside, 0.0)
                bias_total += tl.sum(gate * across.to(tl.float32), 0)
    offset = part * sizes + (expert // N).to(tl.int64) * set_stride + expert % N * expert_stride
    at = product + offset + outer[:, None] * outer_stride + rank[None, :] * rank_stride
    tl.store(at, total, (outer[:, None] < W) & (rank[None, :] < RANK))
    if bias is not None:
        bias += part * bias_size
        if g is None and tl.program_id(0) // tiles == 0:
            tl.store(bias + expert * RANK + rank, bias_total, rank < RANK)
        if g is not None and tl.program_id(0) % tiles == 0:
            tl.store(bias + expert * W + outer, bias_total, outer < W)


def weight_grad(
    wide: Tensor, narrow: Tensor, order: Sorted, weight: Tensor, bias: Tensor | None, g: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """fp32 gradients of ``weight`` (sets, N, r, W), A or B, with its strides, and of ``bias``, b or c, None without it.

    From x and dU (places, r), or dY, H' (places, r) and g (M, N); ``wide``, x or dY, has any row stride.
    """
    rank, width = weight.shape[2:]
    sizes = tile("weight_grad", narrow.element_size(), rank)
    tiles, ids = math.ceil(width / sizes["BW"]) * math.ceil(rank / sizes["BR"]), len(order.ends)
    parts = max(1, min(MOST_PARTS, 4 * multiprocessors(wide.device) // (tiles * ids)))
    strides, device = (weight.numel(), *weight.stride()), weight.device
    product = torch.empty_strided((parts, *weight.shape), strides, dtype=torch.float32, device=device)
    dbias = None if bias is None else torch.empty(parts, *bias.shape, dtype=torch.float32, device=device)
    weight_grad_kernel[(tiles, ids, parts)](
        wide, narrow, g, order.rows, order.ends, product, dbias, len(wide), wide.stride(0), width,
        strides[0], 0 if bias is None else bias.numel(), *strides[1:],
        **order.constants(), RANK=rank, **sizes,
    )  # fmt: skip
    if parts == 1:
        return product[0], None if dbias is None else dbias[0]
    return product.sum(0), None if dbias is None else dbias.sum(0)
