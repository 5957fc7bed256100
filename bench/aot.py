"""Compiles every kernel ahead of time for five GPU targets: registers, spills, shared memory, instructions.

    python -m bench.aot [--out FILE] [--kernels route_shrink,...] [--pools 16/3/1/4,...] [--dtypes bf16,...]
                        [--targets sm_90,...]

No GPU is needed. The launchers of kernels/ run on tensors without memory, with a driver that knows a target but has no
device. So every kernel is compiled with the types, tile sizes, specialised strides and options of a real launch.
"""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench.expert_launches import EXPERT_LAUNCHES, EXPERT_POOLS, make_expert_tensors
from bench.grouped_launches import GROUPED_LAUNCHES, GROUPED_POOLS, make_call
from bench.launches import LAUNCHES, POOLS, make_tensors, parse_pool
from bench.options import Parser, finish, keep, names, pools
from kernels import tiles
from kernels.segments import TaskSegments
from train.output.tables import format_table

# name: (target, bytes of shared memory that a block can have)
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 227 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COUNTS, WIDTH = (64, 64), 768
# Pools by kernel.
KERNELS = (
    dict.fromkeys(LAUNCHES, POOLS)
    | dict.fromkeys(EXPERT_LAUNCHES, EXPERT_POOLS)
    | dict.fromkeys(GROUPED_LAUNCHES, GROUPED_POOLS)
)
COLUMNS = (
    "kernel",
    "pool",
    "dtype",
    "target",
    "num_warps",
    "num_stages",
    "tile",
    "registers",
    "spills",
    "shared",
    "shared_limit",
    "wgmma",
    "tf32",
)


class Deviceless:
    """A stand-in for Triton's driver, with what a launch needs to compile; a device is a target's name."""

    def __init__(self, target: str) -> None:
        self.target = target

    def get_current_device(self) -> str:
        return self.target

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target][0]


@dataclass(frozen=True)
class Launch:
    """A compiled kernel, with the grid and the arguments of its launch, including constants and options, and what the
    assembler printed."""

    binary: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    log: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        """The tile sizes by name."""
        return {name: size for name, size in self.arguments.items() if re.fullmatch("B[A-Z]", name)}


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """In this context every launch is compiled for ``target`` and appended to the list, but not run."""
    launches: list[Launch] = []
    run, architecture = JITFunction.run, tiles.architecture

    def record(self, *args, grid, warmup, **options):
        self.device_caches.clear()  # a kernel that does not depend on the pool was compiled before, and has no log
        with contextlib.redirect_stdout(io.StringIO()) as log:
            binary = run(self, *args, grid=grid, warmup=True, **options)
        arguments = dict(zip(self.arg_names, args, strict=False)) | options
        launches.append(Launch(binary, grid, arguments, log.getvalue()))
        return binary

    driver.set_active(Deviceless(target))
    JITFunction.run, tiles.architecture = record, lambda device: target  # type: ignore[assignment]  # restored below
    tiles.tile.cache_clear()
    try:
        yield launches
    finally:
        JITFunction.run, tiles.architecture = run, architecture
        tiles.tile.cache_clear()


def compiled(kernel: str, pool: str, dtype: str, target: str, counts: tuple[int, ...] = COUNTS) -> Launch:
    """The launch named ``kernel`` over ``counts[t]`` tokens of task t. Tensors have no memory, so any number of tokens
    is possible. Later launches of the same launcher, such as a reduction of partial results, are left out."""
    like, segments = torch.empty(0, dtype=DTYPES[dtype], device="meta"), TaskSegments.of(counts, torch.device("cpu"))
    if kernel in GROUPED_LAUNCHES:
        launcher, index = GROUPED_LAUNCHES[kernel]
        with recording(target):  # the inputs are sorted by launches too
            call = make_call(pool, segments, WIDTH, like)
        with recording(target) as launches:
            launcher(call)
        return launches[index]
    shape = parse_pool(pool)
    make = make_expert_tensors if kernel in EXPERT_LAUNCHES else make_tensors
    with recording(target) as launches:
        (LAUNCHES | EXPERT_LAUNCHES)[kernel](make(shape, counts, WIDTH, like), segments, shape)
    return launches[0]


def measure(kernel: str, pool: str, dtype: str, target: str) -> dict:
    """One row of the table. ``spills`` is in bytes on NVIDIA, in registers on AMD; wgmma and tf32 count PTX lines."""
    launch = compiled(kernel, pool, dtype, target)
    binary = launch.binary
    if TARGETS[target][0].backend == "cuda":
        text = binary.asm["ptx"]
        registers, spills = _ptxas(launch.log)
    else:
        text = binary.asm["amdgcn"]
        registers = int(find(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = int(find(r"\.vgpr_spill_count:\s+(\d+)", text)[1])  # scalars spill to vectors, not to memory
    values = (
        kernel,
        pool,
        dtype,
        target,
        binary.metadata.num_warps,
        binary.metadata.num_stages,
        "x".join(map(str, launch.sizes.values())),
        registers,
        spills,
        binary.metadata.shared,
        TARGETS[target][1],
        text.count("wgmma.mma_async"),
        text.count("tf32") + text.count("xf32"),
    )
    return dict(zip(COLUMNS, values, strict=True))


def find(pattern: str, text: str) -> re.Match[str]:
    """The first match in the output of a compiler; ValueError where there is none."""
    if found := re.search(pattern, text):
        return found
    raise ValueError(f"the compiler wrote nothing like {pattern!r}")


def _ptxas(log: str) -> tuple[int, int]:
    """(registers, bytes of stack or of spills, whichever is more) as ptxas reports them."""
    stack = find(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return int(find(r"Used (\d+) registers", log)[1]), max(map(int, stack.groups()))


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("aot", __doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--pools", type=pools, default=[], help="N/k/S/r,... (those of each kernel)")
    for name, choices in (("kernels", KERNELS), ("dtypes", DTYPES), ("targets", TARGETS)):
        parser.add_argument(f"--{name}", type=names(choices), default=list(choices), help=", ".join(choices))
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.aot compiles: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    combinations = [
        (kernel, pool, dtype, target)
        for kernel in chosen.kernels
        for pool in chosen.pools or KERNELS[kernel]
        for dtype in chosen.dtypes
        for target in chosen.targets
    ]
    knobs.compilation.always_compile = True  # a cached kernel has no log
    knobs.nvidia.dump_ptxas_log = True
    rows = [measure(*combination) for combination in combinations]
    cells = [COLUMNS, *([str(row[name]) for name in COLUMNS] for row in rows)]
    print(format_table(cells, text_columns=len(COLUMNS)))  # first, so that a full disk does not lose it
    lines = ",\n".join(map(json.dumps, rows))  # one row to a line
    keep(chosen.out, f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    finish(main)
