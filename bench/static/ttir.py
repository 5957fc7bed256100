"""Reads the Triton IR of a launch: trip counts of its loops, ways through its branches, bytes, matrix products.

Loop bounds are computed from the launch's arguments for program (0, 0, 0); no other program has longer loops. The
conditions of branches are computed for every program of the grid's first axis.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch

from bench.aot import Launch, find

ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": lambda a, b: a // b,
    "divui": lambda a, b: a // b,
    "ceildivsi": lambda a, b: -(-a // b),
    "remsi": lambda a, b: a % b,
    "remui": lambda a, b: a % b,
    "minsi": min,
    "minui": min,
    "maxsi": max,
    "maxui": max,
    "andi": operator.and_,
}
COMPARISONS = {"eq": operator.eq, "ne": operator.ne, "sgt": operator.gt, "sge": operator.ge, "slt": operator.lt,
               "sle": operator.le}  # fmt: skip
SAME_VALUE = ("extsi", "extui", "trunci", "index_cast", "round")


class Unknown(ValueError):
    """A loop's bound that does not follow from the launch's arguments, or an address of no known argument."""


@dataclass
class Loop:
    """``for``: its first value, end and step by name, the loops around it and the (file, line) of its statement."""

    bounds: tuple[str, str, str]
    around: tuple["Block", ...]
    line: tuple[str, int] | None = None


@dataclass
class Branch:
    """``if`` without else: its condition by name, its place among the kernel's branches, its (file, line)."""

    condition: str
    index: int
    line: tuple[str, int] | None = None


Block = Loop | Branch


@dataclass
class Operation:
    """``operands`` by name. The operation "first.round" stands for the value of a loop variable, or of a
    loop-carried variable, in the first iteration."""

    name: str
    operands: list[str]
    text: str
    around: tuple[Block, ...]


@dataclass
class Code:
    """The operations of a kernel in order, those with a result also by its name."""

    launch: Launch
    operations: list[Operation] = field(default_factory=list)
    results: dict[str, Operation] = field(default_factory=dict)
    loops: list[Loop] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)

    @property
    def programs(self) -> int:
        return prod(self.launch.grid)

    def value(self, name: str, program: int = 0) -> int:
        """The value of an integer in program (``program``, 0, 0), in the first iteration of its loops."""
        if name in self.launch.arguments:
            return self.launch.arguments[name]
        operation = self.results.get(name)
        if operation is None:
            raise Unknown(f"nothing is known of {name}")
        return self._compute(operation, program)

    def _compute(self, operation: Operation, program: int) -> int:
        name, given = operation.name.partition(".")[2], operation.operands

        def values() -> list[int]:
            return [self.value(operand, program) for operand in given[:2]]

        if name == "constant":
            return int(find(r"constant (-?\d+)", operation.text)[1])
        if name == "get_program_id":
            return program if find(r"get_program_id ([xyz])", operation.text)[1] == "x" else 0
        if name == "get_num_programs":
            axis = "xyz".index(find(r"get_num_programs ([xyz])", operation.text)[1])
            return (*self.launch.grid, 1, 1)[axis]
        if name == "cmpi":
            return int(COMPARISONS[find(r"cmpi (\w+)", operation.text)[1]](*values()))
        if name == "select":
            return self.value(given[1 if self.value(given[0], program) else 2], program)
        if name == "load":
            if len(given) == 3 and not self.value(given[1], program):
                return self.value(given[2], program)
            tensor, place = self.address(given[0], program)
            return int(tensor.flatten()[place])
        if name in SAME_VALUE:
            return self.value(given[0], program)
        if name in ARITHMETIC:
            return ARITHMETIC[name](*values())
        raise Unknown(f"no rule for {operation.text.strip()}")

    def address(self, name: str, program: int = 0) -> tuple[torch.Tensor, int]:
        """(tensor, element) that a scalar pointer points to."""
        if name in self.launch.arguments:
            return self.launch.arguments[name], 0
        base, offset = self.results[name].operands
        tensor, place = self.address(base, program)
        return tensor, place + self.value(offset, program)

    def argument(self, name: str) -> str:
        """The launch's argument behind a pointer, a tile of pointers or a tensor descriptor."""
        while name not in self.launch.arguments:
            if name not in self.results:
                raise Unknown(f"no argument is known behind {name}")
            name = self.results[name].operands[0]
        return name

    def trips(self, loop: Loop) -> int:
        first, end, step = map(self.value, loop.bounds)
        return max(0, -(-(end - first) // step))

    @cached_property
    def ways(self) -> Counter[tuple[bool, ...]]:
        """How many programs take which of the branches."""
        conditions = [branch.condition for branch in self.branches]
        along = self.launch.grid[0] if conditions else 1
        found = Counter(tuple(bool(self.value(name, n)) for name in conditions) for n in range(along))
        return Counter({way: count * self.programs // along for way, count in found.items()})

    def rounds(self, around: tuple[Block, ...]) -> int:
        """How often a program that enters these loops executes their body."""
        return prod(self.trips(block) for block in around if isinstance(block, Loop))

    def executions(self, around: tuple[Block, ...]) -> int:
        """How often all programs together execute what stands in these loops and branches."""
        dealt = [block for block in around if isinstance(block, Loop) and self.is_dealt(block)]
        if dealt:
            return self.value(dealt[0].bounds[1]) * self.rounds(tuple(loop for loop in around if loop not in dealt))
        taken = [block.index for block in around if isinstance(block, Branch)]
        return self.rounds(around) * sum(count for way, count in self.ways.items() if all(way[i] for i in taken))

    def is_dealt(self, loop: Loop) -> bool:
        """Whether a persistent grid shares out the loop's rounds: from the program's number, in steps of the grid."""
        first, _, step = (self.results.get(bound) for bound in loop.bounds)
        if first is None or step is None:
            return False
        return (first.name, step.name) == ("tt.get_program_id", "tt.get_num_programs")

    @property
    def imbalance(self) -> float | None:
        """Rounds of the fullest program of a persistent grid over the mean; None of another grid."""
        for loop in filter(self.is_dealt, self.loops):
            return self.programs * self.trips(loop) / max(1, self.executions((loop,)))
        return None

    def is_constant(self, loop: Loop) -> bool:
        """Whether the compiler knows its trip count."""
        known = (self.results.get(bound) for bound in loop.bounds)
        return all(operation and operation.name == "arith.constant" for operation in known)

    def flops(self) -> int:
        """Operations of all programs, padding included."""
        total = 0
        for operation in self.operations:
            if operation.name == "tt.dot":
                (m, k), (_, n) = (
                    map(int, shape) for shape in re.findall(r"tensor<(\d+)x(\d+)x\w+>", operation.text)[:2]
                )
                total += 2 * m * n * k * self.executions(operation.around)
        return total

    def product(self) -> tuple[int, int]:
        """(inner, outer dimension) of the launch's longest product; the tokens are the rows of its longest matrix."""
        inner = 0
        for operation in self.operations:
            if operation.name == "tt.dot":
                step = int(find(r"tensor<\d+x(\d+)x", operation.text)[1])
                inner = max(inner, step * self.rounds(operation.around[-1:]))
        rows = max(
            (tensor.shape[0] for tensor in self.launch.arguments.values() if len(_shape(tensor)) == 2), default=1
        )
        return inner, self.flops() // (2 * inner * rows) if inner else 0

    def traffic(self) -> tuple[int, int]:
        """(bytes of DRAM traffic, bytes that all programs request). A tensor goes through DRAM once in each direction,
        since repeats hit the L2, and never more of it than is requested. Masked lanes count in full."""
        asked: dict[tuple[str, str], int] = {}
        for operation in self.operations:
            for direction in _DIRECTIONS.get(operation.name, ()):
                key = self.argument(operation.operands[0]), direction
                moved = _tile_bytes(operation.text) * self.executions(operation.around)
                asked[key] = asked.get(key, 0) + moved
        seen = {key: min(n, _tensor_bytes(self.launch.arguments[key[0]])) for key, n in asked.items()}
        return sum(seen.values()), sum(asked.values())


_DIRECTIONS = {
    "tt.load": ("read",),
    "tt.store": ("written",),
    "tt.descriptor_load": ("read",),
    "tt.descriptor_store": ("written",),
    "tt.atomic_rmw": ("read", "written"),
}


def _tile_bytes(text: str) -> int:
    """Bytes of the last type in a load or a store: that of the tile, of its pointers or of one element."""
    sizes, kind = re.findall(r"(?:tensor<((?:\d+x)*))?(?:!tt\.ptr<)?(?:b?f|i)(\d+)>", text)[-1]
    return prod(map(int, sizes.split("x")[:-1])) * max(1, int(kind) // 8)


def _shape(argument: object) -> tuple[int, ...]:
    """The shape of a tensor or a tensor descriptor; () for a number."""
    return tuple(getattr(argument, "shape", ()))


def _tensor_bytes(argument: Any) -> int:
    tensor = getattr(argument, "base", argument)  # what a tensor descriptor describes
    return tensor.numel() * tensor.element_size()


def parse(text: str, launch: Launch) -> Code:
    parser = _Parser(Code(launch))
    for row in text.splitlines():
        if location := re.match(r"(#loc\d*) = (loc\(.*\))$", row):
            parser.locations[location[1]] = location[2]
    for row in text.splitlines():
        parser.read(row.strip())
    return parser.code


class _Parser:
    """Reads a kernel line by line. A block may reuse a name of an earlier block, so every result gets a unique name.
    ``names`` has, for each open block, a map from the names in the text to the unique ones."""

    def __init__(self, code: Code) -> None:
        self.code = code
        self.locations: dict[str, str] = {}
        self.blocks: list[Block | None] = []
        self.names: list[dict[str, str]] = [{}]

    @property
    def around(self) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block)

    def known(self, name: str) -> str:
        return self.names[-1].get(name, name)

    def define(self, name: str, operation: Operation) -> None:
        unique = f"{name}@{len(self.code.results)}"
        self.code.results[unique] = operation
        self.names[-1][name] = unique

    def read(self, row: str) -> None:
        if row.startswith("}") and self.blocks:
            block = self.blocks.pop()
            self.names.pop()
            if block and (place := re.search(r"loc\((#loc\d*)\)$", row)):
                block.line = _line(place[1], self.locations)
        if found := re.match(r"(?:%[\w:]+ = )?scf\.for %(\w+) = %(\w+) to %(\w+) step %(\w+)(.*)\{$", row):
            self.open_loop(*found.groups())
        elif found := re.match(r"(?:%[\w:]+ = )?scf\.if %([\w#]+)", row):
            branch = Branch(self.known(found[1]), len(self.code.branches))
            self.code.branches.append(branch)
            self.blocks.append(branch)
            self.names.append(dict(self.names[-1]))
        elif row.endswith(("{", "({")):
            self.blocks.append(None)
            self.names.append(dict(self.names[-1]))
        elif found := re.match(r'(?:%([\w:]+) = )?"?((?:tt|arith|math|scf)\.\w+)"?(.*)$', row):
            operands = [self.known(name) for name in re.findall(r"%([\w#.]+)", found[3])]
            operation = Operation(found[2], operands, row.rpartition(" loc(")[0], self.around)
            self.code.operations.append(operation)
            if found[1]:
                self.define(found[1], operation)

    def open_loop(self, variable: str, first: str, end: str, step: str, rest: str) -> None:
        loop = Loop((self.known(first), self.known(end), self.known(step)), self.around)
        starts = [(name, self.known(start)) for name, start in re.findall(r"%(\w+) = %([\w#]+)", rest)]
        self.code.loops.append(loop)
        self.blocks.append(loop)
        self.names.append(dict(self.names[-1]))
        for name, start in [(variable, self.known(first)), *starts]:
            self.define(name, Operation("first.round", [start], rest, loop.around))


def _line(name: str, locations: dict[str, str]) -> tuple[str, int] | None:
    """(file, line) of a location; for inlined code, that in the inlined function."""
    text = locations.get(name, "")
    if found := re.match(r'loc\("(?:.*/)?([^"/]+)":(\d+):\d+\)', text):
        return found[1], int(found[2])
    for inner in re.findall(r"#loc\d*", text):
        if line := _line(inner, locations):
            return line
    return None
