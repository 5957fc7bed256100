"""What one launch costs on an H100 and an H200, modelled from its compiled code. Nothing is timed.

Instructions are counted in the machine code and multiplied by the trip counts of their loops, the warps of a program
and the programs that take their branch. Each unit of a multiprocessor then needs a least time, and the longest of these
binds. Where a multiprocessor has few programs at once, their latency is not hidden and may bind instead.
"""

import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import cache

from bench.aot import Launch
from bench.static import latency, sass, ttir
from bench.static.constants import CONSTANTS, RATES, Constants

REGISTERS, SHARED_BYTES, WARPS, PROGRAMS = 65_536, 228 * 1024, 64, 32  # of one multiprocessor
SHORT = 8  # most instructions of a loop that waits for a barrier
TARGET = "sm_90"


@dataclass(frozen=True)
class Cost:
    """A launch's cost. ``per_warp`` has instructions by unit, wavefronts and clocks of the tensor cores; ``serial`` is
    the clocks of one warp alone; bytes and operations are those of all programs."""

    name: str
    programs: int
    warps: int
    registers: int
    shared: int
    per_warp: dict[str, float]
    serial: float
    dram_bytes: int
    l2_bytes: int
    flops: int
    product: tuple[int, int]  # inner and outer dimension of the longest product
    loops: tuple[tuple[str, int], ...] = ()  # (file:line of its ``for``, trips), by address
    imbalance: float | None = None  # of a persistent grid: rounds of its fullest program over the mean
    constants: Constants = CONSTANTS

    @property
    def instructions(self) -> int:
        """Warp instructions of all programs."""
        return round(self.per_warp["issue"] * self.warps * self.programs)

    @property
    def streams(self) -> bool:
        return not self.loops

    @property
    def resident(self) -> int:
        return resident(self.registers, self.shared, self.warps)

    @property
    def waves(self) -> float:
        return self.programs / (self.resident * self.constants.multiprocessors)

    @property
    def share(self) -> int:
        """Most programs on one multiprocessor."""
        return -(-self.programs // self.constants.multiprocessors)

    @property
    def is_product(self) -> bool:
        return self.flops > self.constants.product_intensity * self.dram_bytes

    def units(self, gpu: str) -> dict[str, float]:
        """Least microseconds by unit, and the latency of the programs in their waves."""
        busy = self._busy()
        scale = self.share * self.warps / (1e3 * self.constants.clock)
        found = {unit: clocks * scale for unit, clocks in busy.items()}
        found["L2"] = self.l2_bytes / (1e6 * self.constants.l2)
        found["DRAM"] = self.dram_bytes / (1e6 * self.constants.dram[gpu])
        found["latency"] = self._latency(max(busy.values()) * self.warps)
        return found

    def _busy(self) -> dict[str, float]:
        """Clocks for which one warp keeps each unit busy."""
        count = {unit: self.per_warp.get(unit, 0) for unit in RATES}
        busy = {unit: count[unit] / RATES[unit] for unit in RATES if unit not in ("fma", "imad")}
        busy["fma"] = max((count["fma"] + count["imad"]) / RATES["fma"], count["imad"] / RATES["imad"])
        busy["shared"] = self.per_warp.get("wavefronts", 0)
        busy["tensor"] = self.per_warp.get("tensor_clocks", 0)
        return busy

    def _latency(self, busiest: float) -> float:
        """Microseconds of all waves. A wave takes as long as one program alone or as its busiest unit, if longer."""
        clocks, left = 0.0, self.share
        while left > 0:
            together = min(self.resident, left)
            clocks += max(self.serial, together * busiest)
            left -= together
        return clocks / (1e3 * self.constants.clock)

    def stream_dram(self, gpu: str) -> float:
        """Microseconds of a launch that is bound by DRAM alone."""
        return self.dram_bytes / (1e6 * self.constants.dram[gpu] * self.constants.stream_dram_reached)

    def microseconds(self, gpu: str, speed: str = "mid") -> float:
        """The time of the launch; ``speed`` chooses cuBLAS's rates, from which those of our GEMMs follow."""
        c, units = self.constants, self.units(gpu)
        if self.streams:
            issue = self.instructions / (c.multiprocessors * RATES["issue"] * 1e3 * c.stream_clock)
            streamed = power_sum(c.stream_power, issue / c.stream_issue_reached, self.stream_dram(gpu))
            return max(streamed, units["latency"])
        units["DRAM"] /= c.dram_reached
        if self.is_product:
            # Published GEMMs with such tiles are faster than the L2 bandwidth assumed here allows.
            bounds = {unit: n for unit, n in units.items() if unit not in ("L2", "latency")}
            inner, outer = self.product
            bounds["product"] = self.flops / (1e6 * c.triton_of_cublas * c.cublas[speed][inner >= outer])
            if self.imbalance:  # the last wave, and what resident programs do not hide of each other's epilogues
                bounds["product"] *= self.imbalance
                bounds["product"] += max(0.0, units["latency"] - units["tensor"])
            return max(bounds.values())
        return max(units.values())

    def binding(self, gpu: str) -> str:
        units = self.units(gpu)
        return "product" if self.is_product else max(units, key=lambda unit: units[unit])


def power_sum(power: float, *values: float) -> float:
    """The p-norm of ``values`` with p = ``power``: a smooth maximum."""
    return sum(value**power for value in values) ** (1 / power)


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that fit one multiprocessor, with registers in units of 256 per warp and 1 KiB of shared memory reserved
    per program."""
    per_warp = -(-registers * 32 // 256) * 256
    by_memory = min(REGISTERS // (per_warp * warps), SHARED_BYTES // (shared + 1024))
    return max(1, min(PROGRAMS, WARPS // warps, by_memory))


def loop_trips(code: sass.Code, source: ttir.Code) -> list[int]:
    """Trip count of each loop of the machine code, found by the line of its ``for`` statement in the source. A loop
    that cannot be matched counts once and is named in a warning."""
    left: dict[object, list[ttir.Loop]] = {}
    for statement in source.loops:
        left.setdefault(statement.line, []).append(statement)
    found = []
    for loop in code.loops:
        inside = [i.name for i in code.instructions if loop.first <= i.address <= loop.last]
        waits = "SYNCS" in inside and len(inside) <= SHORT  # for a barrier in shared memory
        if left.get(loop.line) and not waits:
            found.append(source.trips(left[loop.line].pop(0)))
        else:
            found.append(1)
            if not waits:
                warnings.warn(f"the loop of {loop.line} was split by the compiler: a part counts once", stacklevel=2)
    for statement in (statement for statements in left.values() for statement in statements):
        if not source.is_constant(statement):  # a constant loop may have been unrolled
            warnings.warn(f"the loop of {statement.line} is not in the machine code: it counts once", stacklevel=2)
    return found


Ways = list[tuple[list[sass.Branch], int]]  # what programs skip, and how many programs skip it


def ways(code: sass.Code, source: ttir.Code) -> Ways:
    """The ways through the kernel's branches, which are found by the lines of their ``if`` statements. If not all are
    found in the source's order, every program counts as if it took all of them, with a warning."""
    lines = [branch.line for branch in source.branches]
    found = [branch for branch in code.branches if branch.line in lines]
    if [branch.line for branch in found] != lines:
        warnings.warn("the compiler changed the branches: every program counts as if it took all", stacklevel=2)
        return [([], source.programs)]
    return [
        ([branch for branch, taken in zip(found, way, strict=True) if not taken], n) for way, n in source.ways.items()
    ]


def count(code: sass.Code, trips: list[int], through: Ways) -> dict[str, float]:
    """Per warp, on average: all instructions (``issue``), those of each unit, wavefronts, clocks and operations of
    tensor cores. Predicated instructions count in full."""
    total: dict[str, float] = defaultdict(float)
    programs = sum(n for _, n in through)
    for i in code.instructions:
        rounds = sum(n for skipped, n in through if not any(b.first <= i.address < b.end for b in skipped))
        for loop, n in zip(code.loops, trips, strict=True):
            if loop.first <= i.address <= loop.last:
                rounds *= n
        total["issue"] += rounds
        total[i.unit] += rounds
        total["wavefronts"] += rounds * i.wavefronts
        total["tensor_clocks"] += rounds * i.tensor_clocks
        total["operations"] += rounds * i.operations
    return {unit: n / programs for unit, n in total.items()}


@cache
def machine_code(cubin: bytes) -> tuple[sass.Code, int]:
    """(instructions, registers of a thread)."""
    text, registers = sass.disassemble(cubin)
    return sass.parse(text), registers


def cost(launch: Launch) -> Cost:
    code, registers = machine_code(launch.binary.asm["cubin"])
    source = ttir.parse(launch.binary.asm["ttir"], launch)
    if any(i.name == "USETMAXREG" for i in code.instructions):
        warnings.warn("warps are specialised: every warp is counted as if it executed all of them", stacklevel=2)
    trips = loop_trips(code, source)
    through = ways(code, source)
    per_warp, flops = count(code, trips, through), source.flops()
    found = per_warp["operations"] * launch.binary.metadata.num_warps * source.programs
    if 0 < found < flops:  # a loop was missed; operations are known of HGMMA only
        warnings.warn(f"the machine code has {found / flops:.0%} of the source's products", stacklevel=2)
    return Cost(
        launch.binary.metadata.name,
        source.programs,
        launch.binary.metadata.num_warps,
        registers,
        launch.binary.metadata.shared,
        per_warp,
        max(latency.clocks(code, trips, skipped) for skipped, _ in through),
        *source.traffic(),
        flops,
        source.product(),
        tuple((":".join(map(str, loop.line or ())), n) for loop, n in zip(code.loops, trips, strict=True)),
        source.imbalance,
    )
