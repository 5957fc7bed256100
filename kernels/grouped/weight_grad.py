"""weight_grad: the gradients of every expert's weights and biases, products over the places of its blocks.

    dA_e = dU^T x        (r, d)       db_e = sum of dU          (r,)
    dB_e = dY^T H'       (D, r)       dc_e = sum of g dY        (D,)

Grid (tile, id, part). A program gathers the rows of its share of one id's blocks, in order, and keeps a BW x BR tile of
the product in registers. The number of parts depends on shapes only, and their fp32 sums are added in a fixed order.
Bytes: M K (d + r tiles) es read for dA, M K (D + r tiles) es for dB. FLOPs: 2 M K r d and 2 M K r D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.grouped.sort import Sorted
from kernels.grouped.weights import gather_rows, of_places, rank_tile
from kernels.segments import ceil_div

PROGRAMS = 4 * 132  # parts are added while they leave fewer programs than four per multiprocessor of an H100
MOST_PARTS = 8


def weight_grad_reference(wide: Tensor, narrow: Tensor, g: Tensor, order: Sorted) -> tuple[Tensor, Tensor, Tensor]:
    """(the product (E, W, r), sums of ``narrow`` (E, r), sums of g ``wide`` (E, W)) of every id."""
    row, expert, used = of_places(order)
    ids = len(order.ends)
    tokens, ranks = gather_rows(wide, row) * used, narrow * used
    owner = torch.nn.functional.one_hot(expert, ids).to(wide.dtype)
    gate = g[row, expert % order.experts, None].to(wide.dtype)
    return torch.einsum("pe,pw,pr->ewr", owner, tokens, ranks), owner.T @ ranks, owner.T @ (gate * tokens)


@triton.jit
def weight_grad_kernel(
    wide, narrow, g, row_of_place, ends, product, bias, T, wide_stride, W, sizes, bias_size, set_stride, expert_stride,
    outer_stride, rank_stride,
    N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, RANK: tl.constexpr, NARROW_SUM: tl.constexpr,
    WIDE_SUM: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(RANK, BR)
    outer = tl.program_id(0) // tiles * BW + tl.arange(0, BW)
    rank = tl.program_id(0) % tiles * BR + tl.arange(0, BR)
    expert, part = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.load(ends + expert - 1, expert > 0, 0)
    last = tl.load(ends + expert)
    share = tl.cdiv(last - first, tl.num_programs(2))
    begin = first + tl.program_id(2) * share
    total = tl.zeros((BW, BR), tl.float32)
    bias_total = tl.zeros((BR if NARROW_SUM else BW,), tl.float32)
    for start in range(begin * BM, tl.minimum(begin + share, last) * BM, BT):
        place = (start + tl.arange(0, BT)).to(tl.int64)[:, None]
        row = tl.load(row_of_place + place).to(tl.int64)
        inside = row >= 0
        across = tl.load(wide + row % T * wide_stride + outer[None, :], inside & (outer[None, :] < W), 0.0)
        ranks = tl.load(narrow + place * RANK + rank[None, :], inside & (rank[None, :] < RANK), 0.0)
        total = tl.dot(tl.trans(across), ranks, total, input_precision="ieee")
        if NARROW_SUM:
            bias_total += tl.sum(ranks.to(tl.float32), 0)
        if WIDE_SUM:
            gate = tl.load(g + row * N + expert % N, inside, 0.0)
            bias_total += tl.sum(gate * across.to(tl.float32), 0)
    offset = part * sizes + (expert // N).to(tl.int64) * set_stride + expert % N * expert_stride
    at = product + offset + outer[:, None] * outer_stride + rank[None, :] * rank_stride
    tl.store(at, total, (outer[:, None] < W) & (rank[None, :] < RANK))
    bias += part * bias_size
    if NARROW_SUM and tl.program_id(0) // tiles == 0:
        tl.store(bias + expert * RANK + rank, bias_total, rank < RANK)
    if WIDE_SUM and tl.program_id(0) % tiles == 0:
        tl.store(bias + expert * W + outer, bias_total, outer < W)


def weight_grad_a(x: Tensor, du: Tensor, order: Sorted, sets: int, bias: bool) -> tuple[Tensor, Tensor | None]:
    """(dA (sets, R, d), db (sets, R) or None) fp32, from x (T, d) with any row stride and du (places, r)."""
    d, rank = x.shape[1], du.shape[1]
    shape = (sets, order.experts * rank, d)
    return _launch(x, du, du, order, shape, (rank * d, 1, d), shape[:2] if bias else None, True)


def weight_grad_b(
    dy: Tensor, gated: Tensor, g: Tensor, order: Sorted, sets: int, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """(dB (sets, D, R), dc (sets, N, D) or None) fp32, from dy (M, D) with any row stride and H' (places, r)."""
    width, rank = dy.shape[1], gated.shape[1]
    ranks = order.experts * rank
    bias_shape = (sets, order.experts, width) if bias else None
    return _launch(dy, gated, g, order, (sets, width, ranks), (rank, ranks, 1), bias_shape, False)


def _launch(
    wide: Tensor,
    narrow: Tensor,
    g: Tensor,
    order: Sorted,
    shape: tuple[int, ...],
    strides: tuple[int, int, int],
    bias_shape: tuple[int, ...] | None,
    narrow_sum: bool,
) -> tuple[Tensor, Tensor | None]:
    """``strides`` of the product: from expert to expert, from column to column of ``wide`` and from rank to rank."""
    rank, width = narrow.shape[1], wide.shape[1]
    sizes = tile(narrow, rank)
    tiles = ceil_div(width, sizes["BW"]) * ceil_div(rank, sizes["BR"])
    parts = max(1, min(MOST_PARTS, PROGRAMS // (tiles * len(order.ends))))
    product = narrow.new_empty(parts, *shape, dtype=torch.float32)
    bias = None if bias_shape is None else narrow.new_empty(parts, *bias_shape, dtype=torch.float32)
    weight_grad_kernel[(tiles, len(order.ends), parts)](
        wide, narrow, g, order.rows, order.ends, product, product if bias is None else bias, len(wide), wide.stride(0),
        width, product[0].numel(), 0 if bias is None else bias[0].numel(), product[0, 0].numel(), *strides,
        **order.constants(), RANK=rank, NARROW_SUM=bias is not None and narrow_sum,
        WIDE_SUM=bias is not None and not narrow_sum, **sizes,
    )  # fmt: skip
    return _add(product), None if bias is None else _add(bias)


def _add(parts: Tensor) -> Tensor:
    """The sum of the parts; one part is the sum already."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def tile(narrow: Tensor, rank: int) -> dict[str, int]:
    """Tile sizes and Triton's options for this type and experts of this rank."""
    if narrow.element_size() == 4:
        return {
            "BW": 64,
            "BR": rank_tile(rank, 64),
            "BT": 16,
            "num_warps": 8,
            "num_stages": 2,
            "enable_fp_fusion": True,
        }
    return {"BW": 128, "BR": rank_tile(rank, 128), "BT": 64, "num_warps": 8, "num_stages": 2, "enable_fp_fusion": True}
