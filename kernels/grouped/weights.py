"""Views of the experts' weights, one matrix per expert id, for the references and the tile sizes."""

import torch
import triton
from torch import Tensor

from kernels.experts.reference import Experts
from kernels.grouped.sort import BLOCK, Sorted


def down(experts: Experts, count: int, dtype: torch.dtype) -> Tensor:
    """A (E, r, d), by expert id; ``count`` is N."""
    return experts.down.to(dtype).unflatten(1, (count, -1)).flatten(0, 1)


def up(experts: Experts, count: int, dtype: torch.dtype) -> Tensor:
    """B (E, D, r), by expert id."""
    return experts.up.to(dtype).unflatten(2, (count, -1)).transpose(1, 2).flatten(0, 1)


def of_places(order: Sorted) -> tuple[Tensor, Tensor, Tensor]:
    """(row, expert id, whether it is in use (places, 1)) of every place; 0 and 0 where it is not."""
    block = torch.arange(order.blocks, device=order.ends.device)
    expert = torch.searchsorted(order.ends, block.int(), right=True).repeat_interleave(BLOCK)
    used = order.rows >= 0
    return order.rows.long() * used, expert * used, used[:, None]


def gather_rows(x: Tensor, row: Tensor) -> Tensor:
    """x of every row; row i T + t is token t."""
    return x[row % max(1, len(x))]


def rank_tile(rank: int, most: int) -> int:
    """Ranks that a program computes at a time: a power of two, and at least 16, the narrowest product."""
    return min(most, max(16, triton.next_power_of_2(rank)))
