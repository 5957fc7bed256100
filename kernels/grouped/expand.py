"""expand: the product of sorted hidden rows with their expert's weights; combine: the sum of every row's slots.

    expand      O = H' B_e^T + g c_e  (places, D)       backward O = dU A_e  (places, d)
    combine     y[row] = base[row] + sum over slots of O[place of (row, slot)]
                dx[t] = sum over gates and slots of O[place of (row i T + t, slot)]

Each is one kernel with two uses. The sums are fp32, gates by gates and slot by slot, so they need no atomics.
Bytes: M K (r + D) es, then M (K + 2) D es; backward M K (r + d) es, then (M K + T) d es. FLOPs: 2 M K r D, backward
2 M K r d.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts.reference import Experts
from kernels.grouped.sort import Sorted, expert_of_block
from kernels.grouped.weights import down, of_places, rank_tile, up
from kernels.segments import ceil_div


def expand_reference(gated: Tensor, experts: Experts, g: Tensor, order: Sorted) -> Tensor:
    """O; 0 at empty places."""
    row, expert, used = of_places(order)
    out = torch.einsum("pr,pDr->pD", gated * used, up(experts, order.experts, gated.dtype)[expert])
    if experts.output_bias is not None:
        gate = g[row, expert % order.experts, None] * used
        out = out + (gate * experts.output_bias.to(g.dtype).flatten(0, 1)[expert]).to(out.dtype)
    return out


def expand_backward_reference(du: Tensor, experts: Experts, order: Sorted) -> Tensor:
    """O of the backward pass."""
    _, expert, used = of_places(order)
    return torch.einsum("pr,prd->pd", du * used, down(experts, order.experts, du.dtype)[expert])


def combine_reference(out: Tensor, base: Tensor | None, tokens: int, order: Sorted) -> Tensor:
    """y, or dx: (tokens, width)."""
    picked = out[order.places.clamp_min(0).long()] * (order.places >= 0)[..., None]
    total = picked.sum(1).view(-1, tokens, out.shape[1]).sum(0)
    return total if base is None else base + total


@triton.jit
def expand_kernel(
    hidden, weight, bias, g, row_of_place, ends, out, set_stride, expert_stride, rank_stride, outer_stride, W,
    N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr,
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
    if BIAS:
        gate = tl.load(g + row * N + expert % N, inside, 0.0)
        total += gate * tl.load(bias + expert * W + outer, outer < W, 0.0).to(tl.float32)
    tl.store(out + origin * W + local * W + outer, total.to(out.dtype.element_ty), inside & (outer < W))


@triton.jit
def combine_kernel(
    out, base, places, y, T, base_stride, gates, W,
    SLOTS: tl.constexpr, BASE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(W, BN)
    token = (tl.program_id(0) // tiles * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    outer = tl.program_id(0) % tiles * BN + tl.arange(0, BN)[None, :]
    inside = (token < T) & (outer < W)
    if BASE:
        total = tl.load(base + token * base_stride + outer, inside, 0.0).to(tl.float32)
    else:
        total = tl.zeros((BT, BN), tl.float32)
    for gate in range(gates):
        for slot in tl.static_range(SLOTS):
            place = tl.load(places + (gate * T + token) * SLOTS + slot, token < T, -1).to(tl.int64)
            total += tl.load(out + place * W + outer, inside & (place >= 0), 0.0).to(tl.float32)
    tl.store(y + token * W + outer, total.to(y.dtype.element_ty), inside)


def expand(gated: Tensor, experts: Experts, g: Tensor, order: Sorted) -> Tensor:
    """O (places, D) in the type of H' = ``gated`` and B, undefined at empty places; g (M, N) is fp32."""
    sets, width, ranks = experts.up.shape
    return _expand(gated, experts.up, experts.output_bias, g, order, width, (gated.shape[1], 1, ranks))


def expand_backward(du: Tensor, experts: Experts, order: Sorted) -> Tensor:
    """O (places, d) of the backward pass in the type of du and A, undefined at empty places."""
    width = experts.down.shape[2]
    return _expand(du, experts.down, None, du, order, width, (du.shape[1] * width, width, 1))


def _expand(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    g: Tensor,
    order: Sorted,
    width: int,
    strides: tuple[int, int, int],
) -> Tensor:
    """``strides`` of the weight: from expert to expert, from rank to rank and from column to column."""
    rank = hidden.shape[1]
    out = hidden.new_empty(len(hidden), width)
    sizes = tile(hidden, rank)
    expand_kernel[(order.blocks * ceil_div(width, sizes["BN"]),)](
        hidden, weight, hidden if bias is None else bias, g, order.rows, order.ends, out, weight[0].numel(), *strides,
        width, **order.constants(), RANK=rank, BIAS=bias is not None, **sizes,
    )  # fmt: skip
    return out


def tile(hidden: Tensor, rank: int) -> dict[str, int]:
    """Tile sizes and Triton's options for hidden rows of this type and experts of this rank."""
    if hidden.element_size() == 4:
        return {"BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    return {"BN": 128, "BK": rank_tile(rank, 32), "num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def combine(out: Tensor, base: Tensor | None, tokens: int, order: Sorted) -> Tensor:
    """base + the sum of each token's pairs, (tokens, width) in the type of ``out`` (places, width).

    With ``tokens`` = M this is y; with T < M the G rows of a token are added too, which is dx. ``base`` (tokens, width)
    has any row stride; None is 0.
    """
    rows, slots = order.places.shape
    width = out.shape[1]
    y = out.new_empty(tokens, width)
    combine_kernel[(ceil_div(tokens, BT) * ceil_div(width, BN),)](
        out, out if base is None else base, order.places, y, tokens, 0 if base is None else base.stride(0),
        rows // max(1, tokens), width, SLOTS=slots, BASE=base is not None, BT=BT, BN=BN,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y


BT, BN = 16, 128  # of combine
