"""Clocks that one warp takes alone, from the stalls and scoreboards in its encoding and from assumed latencies.

Asynchronous copies and warpgroup MMAs finish in groups, in order. Loops run for their trip counts; a branch forward is
taken only over what is left out.
"""

import re
from bisect import bisect_left
from collections.abc import Sequence

from bench.static.constants import LATENCIES
from bench.static.sass import Branch, Code, Instruction

BARRIER, READ, PRODUCT_START, PRODUCT_END = 15, 15, 20, 15  # clocks


class Groups:
    """Work that was committed in groups; :meth:`wait` says when all but the ``keep`` newest are done."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def wait(self, now: float, keep: int) -> float:
        done = self.ends[: len(self.ends) - keep]
        self.ends = self.ends[len(done) :]
        return max([now, *done])


class Warp:
    """A warp's clock while it executes one instruction after the other."""

    def __init__(self) -> None:
        self.now = 0.0
        self.boards = [0.0] * 6
        self.copies, self.products = Groups(), Groups()
        self.copy_end = self.product_end = 0.0

    def execute(self, i: Instruction) -> None:
        self.now = max([self.now, *(self.boards[board] for board in i.waits)])
        latency = LATENCIES.get(i.name, 12)
        if i.name == "LDGSTS":
            self.copy_end = max(self.copy_end, self.now + latency)
        elif i.name == "LDGDEPBAR":
            self.copies.ends.append(self.copy_end)
            self.copy_end = 0.0
        elif i.name == "DEPBAR":
            self.now = self.copies.wait(self.now, _kept(i, "SB0"))
        elif i.name == "HGMMA":
            # The tensor cores work for all four warps of the group.
            self.product_end = max(self.product_end, self.now + PRODUCT_START) + 4 * i.tensor_clocks
            if "gsb0" in i.text:
                self.products.ends.append(self.product_end + PRODUCT_END)
        elif i.opcode.startswith("WARPGROUP.DEPBAR"):
            self.now = self.products.wait(self.now, _kept(i, "gsb0"))
        elif i.name in ("BAR", "FENCE", "MEMBAR"):
            self.now += BARRIER
        result, operands = i.releases
        if result < 6:
            self.boards[result] = max(self.boards[result], self.now + latency)
        if operands < 6:
            self.boards[operands] = max(self.boards[operands], self.now + READ)
        self.now += i.stall


def _kept(i: Instruction, board: str) -> int:
    found = re.search(rf"{board}, (0x[0-9a-f]+)", i.text)
    return int(found[1], 16) if found else 0


def clocks(code: Code, trips: list[int], left_out: Sequence[Branch] = ()) -> float:
    """Clocks of one warp that skips ``left_out``; ``trips`` are the trip counts of ``code.loops``."""
    addresses = [i.address for i in code.instructions]
    total = dict(zip((loop.last for loop in code.loops), trips, strict=True))
    first = {loop.last: bisect_left(addresses, loop.first) for loop in code.loops}
    left = dict(total)
    warp, n = Warp(), 0
    while n < len(code.instructions):
        i = code.instructions[n]
        n += 1
        if any(branch.first <= i.address < branch.end for branch in left_out):
            continue
        warp.execute(i)
        if i.name == "EXIT" and not i.text.startswith("@"):
            break
        if i.address in left:
            left[i.address] -= 1
            if left[i.address] > 0:
                n = first[i.address]
            else:
                left[i.address] = total[i.address]
    return warp.now
