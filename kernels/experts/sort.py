"""sort: a stable counting sort of (row, slot) pairs by expert on the device, with every expert's pairs in whole blocks.

A row is one token under one of its G gates: row i T + t is token t under gate i, M = G T rows in all. A slot is one of
the at most K experts of a row, those whose gate is not 0, lowest index first. Expert id = set N + e, E = sets N ids.
Each id owns consecutive blocks of BLOCK places, its rows in ascending order; the rest of its last block is empty. So a
program that computes one block multiplies by the weights of one expert.

    count    pairs by (id, chunk of rows)         grid (chunk, gate): no chunk spans two tasks
    prefix   exclusive sums over the chunks       grid (id)
    scatter  the row of every place, the place of every pair, and where every id's blocks end

The number of places is static, so nothing waits for the device. Bytes: 8 M N read, 4 M K + 4 places written.
"""

import itertools
import math
from dataclasses import dataclass
from functools import cache, partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gating import next_power_of_two
from kernels.jit_helpers import block_of_task, rows_of_block
from kernels.segments import TaskSegments

BLOCK = 64  # places that are computed by one program; Hopper's wgmma takes 64 rows
CHUNK, PART = 32, 1024  # rows of a count, counts of a step of the prefix
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@dataclass(frozen=True, eq=False)
class Sorted:
    """``rows`` (places,) holds the row of every place, -1 at an empty one; ``places`` (M, K) the place of every pair,
    -1 where a row has fewer experts; ``ends`` (E,) the end of each id's blocks, counted in blocks, so that the last is
    the number of blocks in use. All are int32. ``experts`` is N."""

    rows: Tensor
    places: Tensor
    ends: Tensor
    experts: int

    @property
    def blocks(self) -> int:
        return len(self.rows) // BLOCK

    def constants(self) -> dict[str, int]:
        """The constants of every kernel over sorted blocks."""
        return {"N": self.experts, "E": len(self.ends), "EP": next_power_of_two(len(self.ends)), "BM": BLOCK}

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(row, expert id, whether it is in use (places, 1)) of every place, for references; 0 and 0 if it is not."""
        block = torch.arange(self.blocks, device=self.ends.device)
        expert = torch.searchsorted(self.ends, block.int(), right=True).repeat_interleave(BLOCK)
        used = self.rows >= 0
        return self.rows.long() * used, expert * used, used[:, None]


def most_blocks(pairs: int, ids: int) -> int:
    """An upper bound of the blocks that ``pairs`` pairs fill: every id in use may leave one block incomplete."""
    return pairs // BLOCK + min(ids, pairs)


def sort_reference(g: Tensor, segments: TaskSegments, slots: int, sets: int) -> Sorted:
    """See :func:`sort`."""
    (readers, tokens, experts), chosen, ends = g.shape, (g != 0).flatten(0, 1), [0]
    slot, task = chosen.cumsum(1) - 1, segments.task_of_rows(tokens).repeat(readers) * (sets > 1)
    rows = torch.full((most_blocks(len(chosen) * slots, sets * experts) * BLOCK,), -1, dtype=torch.int32)
    places = torch.full((len(chosen), slots), -1, dtype=torch.int32)
    for number, expert in itertools.product(range(sets), range(experts)):
        row = (chosen[:, expert] & (slot[:, expert] < slots) & (task == number)).nonzero()[:, 0]
        place = ends[-1] * BLOCK + torch.arange(len(row))
        rows[place], places[row, slot[row, expert]] = row.int(), place.int()
        ends.append(ends[-1] + math.ceil(len(row) / BLOCK))
    return Sorted(rows, places, torch.tensor(ends[1:], dtype=torch.int32), experts)


@triton.jit
def chosen_experts(g, offsets, length, T, offs_e, N: tl.constexpr, SLOTS: tl.constexpr, TASKS: tl.constexpr, BT):
    """(1 at a row's first SLOTS experts, slot (BT, NP); rows (BT, 1); task) of this program's chunk."""
    task, first, end, _ = block_of_task(offsets, length, tl.program_id(0), TASKS, BT)
    rows, inside = rows_of_block(first, end, BT)
    rows += tl.program_id(1).to(tl.int64) * T
    marked = (tl.load(g + rows * N + offs_e, inside & (offs_e < N), 0.0) != 0).to(tl.int32)
    slot = tl.cumsum(marked, 1) - 1
    return marked * (slot < SLOTS).to(tl.int32), slot, rows, task


@triton.jit
def count_kernel(
    g, offsets, counts, length, T,
    N: tl.constexpr, NP: tl.constexpr, SLOTS: tl.constexpr, TASKS: tl.constexpr, SETS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    offs_e, chunks = tl.arange(0, NP)[None, :], tl.num_programs(1) * tl.num_programs(0)
    chosen, _, _, task = chosen_experts(g, offsets, length, T, offs_e, N, SLOTS, TASKS, BT)
    total = tl.sum(chosen, 0)[None, :]
    for s in tl.static_range(SETS):
        place = (s * N + offs_e) * chunks + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(counts + place, tl.where((SETS == 1) | (task == s), total, 0), offs_e < N)


@triton.jit
def prefix_kernel(counts, totals, chunks, BP: tl.constexpr):
    """Overwrites the counts of id program_id(0) by their exclusive prefix sums."""
    total = 0
    for first in range(0, chunks, BP):
        at = first + tl.arange(0, BP)
        here = counts + tl.program_id(0) * chunks + at
        values = tl.load(here, at < chunks, 0)
        tl.store(here, total + tl.cumsum(values, 0) - values, at < chunks)
        total += tl.sum(values, 0)
    tl.store(totals + tl.program_id(0), total)


@triton.jit
def scatter_kernel(
    g, offsets, counts, totals, row_of_place, places, ends, length, T,
    N: tl.constexpr, NP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, SLOTS: tl.constexpr,
    TASKS: tl.constexpr, SETS: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    offs_e, ids = tl.arange(0, NP)[None, :], tl.arange(0, EP)
    chunk, chunks = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.num_programs(1) * tl.num_programs(0)
    if chunk == 0:
        tl.store(ends + ids, tl.cumsum(tl.cdiv(tl.load(totals + ids, ids < E, 0), BM), 0), ids < E)
    chosen, slot, rows, task = chosen_experts(g, offsets, length, T, offs_e, N, SLOTS, TASKS, BT)
    own = task * N if SETS > 1 else 0
    blocks = tl.cdiv(tl.load(totals + own + offs_e, offs_e < N, 0), BM)
    before = tl.sum(tl.cdiv(tl.load(totals + ids, ids < own, 0), BM), 0) + tl.cumsum(blocks, 1) - blocks
    start = before * BM + tl.load(counts + (own + offs_e) * chunks + chunk, offs_e < N, 0)
    place = start + tl.cumsum(chosen, 0) - chosen
    tl.store(row_of_place + place, tl.broadcast_to(rows, place.shape).to(tl.int32), chosen != 0)
    tl.store(places + rows * SLOTS + slot, place, chosen != 0)


def sort(g: Tensor, segments: TaskSegments, slots: int, sets: int) -> Sorted:
    """The pairs with a gate in g (G, T, N), contiguous, by expert; a row's experts beyond ``slots``, K, are ignored."""
    readers, tokens, experts = g.shape
    rows, ids, grid = readers * tokens, sets * experts, (max(1, segments.blocks(tokens, CHUNK)), readers)
    empty = partial(torch.empty, dtype=torch.int32, device=g.device)
    counts, totals, ends = empty(ids, grid[0] * readers), empty(ids), empty(ids)
    sizes = most_blocks(rows * slots, ids) * BLOCK, rows * slots
    row_of_place, places = empty(sum(sizes)).fill_(-1).split(sizes)
    constants = {"N": experts, "NP": next_power_of_two(experts), "TASKS": segments.tasks, "SETS": sets, "BT": CHUNK}
    constants |= {"SLOTS": slots, **OPTIONS}
    count_kernel[grid](g, segments.offsets, counts, segments.length, tokens, **constants)
    prefix_kernel[(ids,)](counts, totals, counts.shape[1], BP=PART, **OPTIONS)
    scatter_kernel[grid](
        g, segments.offsets, counts, totals, row_of_place, places, ends, segments.length, tokens,
        E=ids, EP=next_power_of_two(ids), BM=BLOCK, **constants,
    )  # fmt: skip
    return Sorted(row_of_place, places.view(rows, slots), ends, experts)


@triton.jit
def expert_of_block(ends, block, E: tl.constexpr, EP: tl.constexpr):
    """The id whose block this is, or E if it is not in use."""
    ids = tl.arange(0, EP)
    return tl.sum((tl.load(ends + ids, ids < E, 2147483647) <= block).to(tl.int32), 0)


@cache
def tile(kernel: str, size: int, rank: int) -> dict[str, int]:
    """Tile sizes and Triton's options of a product, for elements of ``size`` bytes and experts of this rank."""
    ranks, half = max(16, next_power_of_two(rank)), size < 4
    warps, inner = 8 if half and rank > 64 else 4, 64 if half else 32
    sizes, warps, stages = {
        "shrink": ({"BR": min(ranks, 128 if half else 32), "BK": inner}, warps, 3),
        # A wider tile would need all registers of a multiprocessor for one program.
        "shrink_backward": ({"BR": min(ranks, 64 if half else 32), "BK": inner}, warps, 3),
        "expand": ({"BN": 128, "BK": min(ranks, 32)}, 4, 3) if half else ({"BN": 32, "BK": 32}, 4, 2),
        "weight_grad": ({"BW": 2 * inner, "BR": min(ranks, 2 * inner), "BT": 64 if half else 16}, 8, 2),
    }[kernel]
    return sizes | {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
