"""NVIDIA machine code (SASS) as nvdisasm prints it: instructions, their units, and loops."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from math import inf, prod
from pathlib import Path
from typing import Any

import triton

from bench.aot import find

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Units of a multiprocessor by opcode. Opcodes in none of these sets run on the ALU: integers, comparisons, moves.
UNITS = {
    "fma": {"FFMA", "FMUL", "FADD", "FFMA32I", "FMUL32I", "FADD32I"},
    "imad": {"IMAD", "IDP", "IDP4A"},
    "fp16": {"HFMA2", "HADD2", "HMUL2", "HMNMX2"},
    "xu": {"MUFU", "F2I", "I2F", "F2F", "POPC", "FLO", "I2FP", "FRND", "BREV"},
    "lsu": {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "SHFL", "ATOM", "RED", "ATOMS", "ATOMG",
            "LD", "ST", "LDL", "STL"},
    "tensor": {"HGMMA", "HMMA", "IMMA"},
    "control": {"BRA", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "BREAK", "RET", "CALL", "BAR", "DEPBAR", "SYNCS",
                "WARPGROUP", "LDGDEPBAR", "FENCE", "MEMBAR", "ERRBAR", "CCTL", "ELECT", "ACQBULK", "NANOSLEEP",
                "UBLKCP", "UTMALDG", "UTMASTG", "UTMACMDFLUSH", "UTMACCTL", "USETMAXREG", "S2R", "S2UR", "CS2R",
                "LDC", "R2P", "P2R", "VOTE", "VOTEU"},
}  # fmt: skip
UNIT_OF = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes} | {"R2UR": "uniform"}


@dataclass(frozen=True)
class Instruction:
    """One instruction. ``control`` holds the bits of its encoding that schedule it, ``line`` the (file, line) of the
    source it comes from, ``target`` the label it branches to."""

    address: int
    text: str
    line: tuple[str, int] | None = None
    control: int = 0

    @cached_property
    def opcode(self) -> str:
        """With its modifiers, such as LDG.E.128."""
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0]

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str | None:
        found = re.search(r"`\((\.L_x_\d+)\)", self.text)
        return found and found[1]

    @property
    def stall(self) -> int:
        """Clocks until the same warp may issue its next instruction."""
        return max(1, self.control & 15)

    @property
    def releases(self) -> tuple[int, int]:
        """(scoreboard released with the result, scoreboard released once the operands are read); 7 is none."""
        return self.control >> 5 & 7, self.control >> 8 & 7

    @property
    def waits(self) -> list[int]:
        """The scoreboards that it waits for."""
        return [board for board in range(6) if self.control >> 11 & 1 << board]

    @property
    def unit(self) -> str:
        return UNIT_OF.get(self.name, "uniform" if self.name.startswith("U") else "alu")

    @property
    def wavefronts(self) -> float:
        """Passes of 128 bytes through L1 and shared memory, for a full warp without bank conflicts."""
        if self.unit != "lsu":
            return 0
        if self.name in ("LDSM", "STSM"):  # LDSM.16.M88.4: four 8 x 8 matrices
            count = re.search(r"\.([124])$", self.opcode)
            return int(count[1]) if count else 1
        widths = {".128": 4, ".64": 2, ".U16": 0.5, ".S16": 0.5, ".U8": 0.25, ".S8": 0.25}
        return 1 if self.name == "SHFL" else next((n for mark, n in widths.items() if mark in self.opcode), 1)

    @property
    def product(self) -> tuple[int, int, int]:
        """(m, n, k) of a warpgroup's product; zeros of another instruction."""
        if self.name != "HGMMA":
            return 0, 0, 0
        m, n, k = map(int, find(r"\.(\d+)x(\d+)x(\d+)", self.opcode).groups())
        return m, n, k

    @property
    def operations(self) -> float:
        """A warp's share of the operations of its warpgroup's product."""
        return 2 * prod(self.product) / 4

    @property
    def tensor_clocks(self) -> float:
        """Clocks of the tensor cores for a warp's share of a warpgroup's product: 4096 half-precision operations a
        clock, and operands from shared memory at 128 bytes a clock."""
        m, n, k = self.product
        size = 4 if "TF32" in self.opcode else 2
        a_in_registers = re.search(r"HGMMA\S*\s+R\d+,\s*R\d+,", self.text)
        operands = (0 if a_in_registers else m * k * size) + n * k * size
        return max(2 * m * n * k / (8192 / size), operands / 128) / 4


@dataclass(frozen=True)
class Loop:
    """The instructions from address ``first`` to ``last``, a branch back; ``line`` is that of the source's ``for``."""

    first: int
    last: int
    line: tuple[str, int] | None


@dataclass(frozen=True)
class Branch:
    """The instructions from address ``first`` to before ``end``, which a branch forward or an exit may skip; ``line``
    is that of the source's ``if``."""

    first: int
    end: float
    line: tuple[str, int] | None


@dataclass
class Code:
    """A kernel's instructions in order, and the addresses of its labels."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @cached_property
    def loops(self) -> list[Loop]:
        """In order of address, outer loops before inner ones."""
        found: dict[int, Loop] = {}
        for i in self.instructions:
            start = self.labels.get(i.target) if i.name == "BRA" and i.target else None
            if start is not None and start < i.address:
                found[start] = Loop(start, i.address, i.line)  # the last branch back to a label ends its loop
        return sorted(found.values(), key=lambda loop: (loop.first, -loop.last))

    @cached_property
    def branches(self) -> list[Branch]:
        """In order of address."""
        found = []
        for i, following in pairwise(self.instructions):
            if i.text.startswith("@") and i.name in ("BRA", "EXIT"):
                end = self.labels.get(i.target or "", 0) if i.name == "BRA" else inf
                found += [Branch(following.address, end, i.line)] if end > i.address else []
        return found


def parse(text: str) -> Code:
    """Parses the output of ``nvdisasm -c -g -hex`` for a file with one kernel."""
    code, waiting, line = Code(), [], None
    words: list[list[Any]] = []
    for row in text.splitlines():
        if source := re.match(r'\s*//## File "(?:.*/)?([^"]+)", line (\d+)', row):
            line = source[1], int(source[2])
        elif label := re.match(r"(\.L_x_\d+):\s*$", row):
            waiting.append(label[1])
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", row):
            address = int(found[1], 16)
            code.labels |= dict.fromkeys(waiting, address)
            waiting = []
            words.append([address, found[2], line, 0])
        elif words and (high := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$", row)):
            words[-1][3] = int(high[1], 16) >> 41
    code.instructions = [Instruction(*word) for word in words]
    code.instructions = [i for i in code.instructions[: _length(code.instructions)] if i.name != "NOP"]
    return code


def _length(instructions: list[Instruction]) -> int:
    """How many are the kernel's: up to the last EXIT, or where that is predicated, to the branch that its loop ends in.
    What follows is out of line: waits for barriers that are rarely taken, subroutines, padding."""
    last = max(n for n, i in enumerate(instructions) if i.name == "EXIT")
    if instructions[last].text.startswith("@"):
        rest = enumerate(instructions[last:], last)
        last = next((n for n, i in rest if i.name == "BRA" and not i.text.startswith("@")), last)
    return last + 1


def disassemble(cubin: bytes) -> tuple[str, int]:
    """(SASS with source lines and encodings, registers of a thread)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output("nvdisasm", "-c", "-g", "-hex", file.name)
        usage = _output("cuobjdump", "-res-usage", file.name)
    return text, int(find(r"REG:(\d+)", usage)[1])


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
