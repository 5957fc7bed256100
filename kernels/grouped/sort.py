"""sort: a stable counting sort of (row, slot) pairs by expert on the device, with every expert's pairs in whole blocks.

A row is one token under one of its G gates: row i T + t is token t under gate i, M = G T rows in all. An expert is
selected for a row where its gate g is not 0, since one with gate 0 adds nothing and gets no gradient. A slot is one of
the at most K experts that are selected for a row, lowest index first. Expert id = set N + e, E = sets N ids. The sorted
order has places: each id owns consecutive blocks of BLOCK places, its rows in ascending order, and the rest of its last
block stays empty. So a program that computes one block multiplies by the weights of one expert.

    count    pairs by (id, chunk of rows)         grid (chunk, task, gate): no chunk spans two tasks
    prefix   exclusive sums over the chunks       grid (id)
    scatter  the row of every place, the place of every pair, and where every id's blocks end

The number of places is static, so nothing waits for the device. Bytes: 8 M N of the gates read, 4 M K + 4 places
written.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.jit_helpers import task_rows
from kernels.segments import TaskSegments

BLOCK = 64  # places that are computed by one program; Hopper's wgmma takes 64 rows
CHUNK, PART = 32, 1024  # rows of a count, counts of a step of the prefix
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}


@dataclass(frozen=True, eq=False)
class Sorted:
    """``rows`` (places,) holds the row of every place, -1 at an empty one; ``places`` (M, K) the place of every pair,
    -1 where a row has fewer experts; ``ends`` (E,) the end of each id's blocks, counted in blocks. All are int32.

    ``ends[-1]`` is the number of blocks in use. ``experts`` is N.
    """

    rows: Tensor
    places: Tensor
    ends: Tensor
    experts: int

    @property
    def blocks(self) -> int:
        """All blocks, of which the last ones are not in use."""
        return len(self.rows) // BLOCK

    def constants(self) -> dict[str, int]:
        """The constants of every kernel over sorted blocks."""
        ids = len(self.ends)
        return {"N": self.experts, "E": ids, "EP": triton.next_power_of_2(ids), "BM": BLOCK}


def most_blocks(pairs: int, ids: int) -> int:
    """An upper bound of the blocks that ``pairs`` pairs fill: every id in use may leave one block incomplete."""
    return pairs // BLOCK + min(ids, pairs)


def sort_reference(g: Tensor, segments: TaskSegments, slots: int, sets: int) -> Sorted:
    """See :func:`sort`."""
    rows, experts = g.shape
    chosen = (g != 0) & ((g != 0).cumsum(1) <= slots)
    task = torch.repeat_interleave(torch.tensor(segments.counts)).repeat(rows // sum(segments.counts))
    row, expert = chosen.nonzero(as_tuple=True)
    ids = expert + (task[row] * experts if sets > 1 else 0)
    counts = torch.bincount(ids, minlength=sets * experts)
    ends = ((counts + BLOCK - 1) // BLOCK).cumsum(0)
    ids, order = torch.sort(ids, stable=True)
    within = torch.arange(len(ids)) - (counts.cumsum(0) - counts)[ids]
    place = (ends - (counts + BLOCK - 1) // BLOCK)[ids] * BLOCK + within
    row_of_place = torch.full((most_blocks(rows * slots, sets * experts) * BLOCK,), -1, dtype=torch.int32)
    row_of_place[place] = row[order].int()
    places = torch.full((rows, slots), -1, dtype=torch.int32)
    slot = chosen.cumsum(1)[row, expert] - 1
    places[row[order], slot[order]] = place.int()
    return Sorted(row_of_place, places, ends.int(), experts)


@triton.jit
def chosen_experts(g, T, offsets, column, N: tl.constexpr, SLOTS: tl.constexpr, BT: tl.constexpr):
    """(chosen, slot, rows, inside) of this program's chunk: chosen (BT, NP) is 1 at a row's first SLOTS experts."""
    rows, inside = task_rows(offsets, tl.program_id(0), BT)
    rows += tl.program_id(2).to(tl.int64) * T
    marked = (tl.load(g + rows * N + column, inside & (column < N), 0.0) != 0).to(tl.int32)
    slot = tl.cumsum(marked, 1) - 1
    return marked * (slot < SLOTS).to(tl.int32), slot, rows, inside


@triton.jit
def chunk_index(N: tl.constexpr, PER_TASK: tl.constexpr):
    """(first id, index of this program's chunk among those of its ids, how many there are), in the order of rows."""
    if PER_TASK:
        first = tl.program_id(1) * N
        index = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        count = tl.num_programs(2) * tl.num_programs(0)
    else:
        first = 0
        index = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
        count = tl.num_programs(2) * tl.num_programs(1) * tl.num_programs(0)
    return first, index, count


@triton.jit
def count_kernel(
    g, offsets, counts, T,
    N: tl.constexpr, NP: tl.constexpr, SLOTS: tl.constexpr, PER_TASK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, NP)[None, :]
    chosen, _, _, _ = chosen_experts(g, T, offsets, column, N, SLOTS, BT)
    first, index, count = chunk_index(N, PER_TASK)
    tl.store(counts + (first + column) * count + index, tl.sum(chosen, 0)[None, :], column < N)


@triton.jit
def prefix_kernel(counts, totals, count, BP: tl.constexpr):
    """Overwrites the counts of id program_id(0) by their exclusive prefix sums."""
    total = 0
    for first in range(0, count, BP):
        at = first + tl.arange(0, BP)
        here = counts + tl.program_id(0) * count + at
        values = tl.load(here, at < count, 0)
        tl.store(here, total + tl.cumsum(values, 0) - values, at < count)
        total += tl.sum(values, 0)
    tl.store(totals + tl.program_id(0), total)


@triton.jit
def scatter_kernel(
    g, offsets, counts, totals, row_of_place, places, ends, T,
    N: tl.constexpr, NP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, SLOTS: tl.constexpr, SP: tl.constexpr,
    PER_TASK: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    column, all_ids = tl.arange(0, NP)[None, :], tl.arange(0, EP)
    chosen, slot, rows, inside = chosen_experts(g, T, offsets, column, N, SLOTS, BT)
    first, index, count = chunk_index(N, PER_TASK)
    before = tl.sum(tl.cdiv(tl.load(totals + all_ids, all_ids < first, 0), BM), 0)  # blocks of the sets before
    blocks = tl.cdiv(tl.load(totals + first + column, column < N, 0), BM)
    end = before + tl.cumsum(blocks, 1)
    if index == 0:
        tl.store(ends + first + column, end, column < N)
    start = (end - blocks) * BM + tl.load(counts + (first + column) * count + index, column < N, 0)
    place = start + tl.cumsum(chosen, 0) - chosen
    tl.store(row_of_place + place, tl.broadcast_to(rows, place.shape).to(tl.int32), chosen != 0)
    tl.store(places + rows * SLOTS + slot, place, chosen != 0)
    unused = tl.arange(0, SP)[None, :]
    tl.store(places + rows * SLOTS + unused, -1, inside & (unused < SLOTS) & (unused >= tl.sum(chosen, 1)[:, None]))


def sort(g: Tensor, segments: TaskSegments, slots: int, sets: int) -> Sorted:
    """The pairs with a gate in g (M, N), contiguous, by expert; a row's experts beyond ``slots``, K, are ignored.

    With ``sets`` > 1 there is a set of experts for each task of ``segments``, whose tokens are those of one gate.
    """
    rows, experts = g.shape
    tokens, ids = sum(segments.counts), sets * experts
    chunks, tasks = segments.grid(CHUNK)
    grid = (max(1, chunks), tasks, max(1, rows // max(1, tokens)))
    parts = grid[0] * grid[2] * (1 if sets > 1 else tasks)
    empty = partial(torch.empty, dtype=torch.int32, device=g.device)
    counts, totals, ends, places = empty(ids, parts), empty(ids), empty(ids), empty(rows, slots)
    row_of_place = empty(most_blocks(rows * slots, ids) * BLOCK).fill_(-1)
    constants = {"N": experts, "NP": triton.next_power_of_2(experts), "SLOTS": slots, "PER_TASK": sets > 1, "BT": CHUNK}
    count_kernel[grid](g, segments.offsets, counts, tokens, **constants, **OPTIONS)
    prefix_kernel[(ids,)](counts, totals, parts, BP=PART, **OPTIONS)
    scatter_kernel[grid](
        g, segments.offsets, counts, totals, row_of_place, places, ends, tokens, E=ids,
        EP=triton.next_power_of_2(ids), SP=triton.next_power_of_2(slots), BM=BLOCK, **constants, **OPTIONS,
    )  # fmt: skip
    return Sorted(row_of_place, places, ends, experts)


@triton.jit
def expert_of_block(ends, block, E: tl.constexpr, EP: tl.constexpr):
    """The id whose block this is, or E if it is not in use."""
    ids = tl.arange(0, EP)
    return tl.sum((tl.load(ends + ids, ids < E, 2147483647) <= block).to(tl.int32), 0)
