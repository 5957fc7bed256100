"""Measure the fastest tile sizes and FFN algorithm on the GPU at hand and write them to a copy of kernels/tables.json.

    python -m bench.tune --out kernels/tables.json [--kernels route_shrink,...,ffn]

ViT-B in bf16, five tasks. A tile that spills or does not fit is rejected. A candidate replaces the present tile only if
it is more than 2 % faster. Changes are printed; with --out kernels/tables.json they are used from then on.
"""

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from tqdm import tqdm
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from bench.launches import LAUNCHES, POOLS, AdaptedFFN, make_tensors, parse_pool
from bench.options import Parser, finish, keep, names
from kernels import tiles
from kernels.custom_ops import ALGORITHMS
from kernels.segments import TaskSegments

TASKS, WIDTH = 5, 768
TOKENS = {"small": 7_880, "large": 40_960}
SPACE = {  # of sizes in the order of tiles.NAMES, then warps and stages
    "route_shrink": ((64, 128), (16, 32, 64), (4, 8), (2, 3, 4)),
    "expand": ((64, 128), (16, 32, 64, 128), (4, 8), (2, 3)),
    "gate_backward": ((16, 32, 64, 128), (4, 8), (1,)),
    "weight_grad_a": ((64, 128, 256, 512), (16, 32), (4, 8), (2, 3, 4)),
    "weight_grad_b": ((64, 128, 256, 512), (16, 32), (4, 8), (2, 3, 4)),
    "matmul_gelu": ((128,), (128, 256), (32, 64), (4, 8), (3, 4)),
}
SAME_TILE = {"matmul_gelu": ("matmul_gelu", "matmul_gelu_backward")}
GAIN = 0.98
Table = dict[str, dict]


class Spills(Exception):
    """Raised for a candidate that spills registers."""


def fastest(present: Any, candidates: list, time: Callable[[Any], float]) -> Any:
    """The candidate with the least ``time``; ``present`` where none is more than 2 % faster."""
    best, limit = present, GAIN * time(present)
    for candidate in candidates:
        try:
            taken = time(candidate)
        except (OutOfResources, Spills):
            continue
        if taken < limit:
            best, limit = candidate, taken
    return best


def time_launch(kernel: str, pool_name: str, device: torch.device) -> float:
    """Milliseconds of all launches that share the kernel's tile, at the large number of tokens."""
    pool, counts = parse_pool(pool_name), (TOKENS["large"] // TASKS,) * TASKS
    t = make_tensors(pool, counts, WIDTH, torch.empty(0, dtype=torch.bfloat16, device=device))
    segments = TaskSegments.of(counts, device)
    calls = [LAUNCHES[name] for name in SAME_TILE.get(kernel, (kernel,))]
    _refuse_spills(lambda: [call(t, segments, pool) for call in calls])
    return sum(
        triton.testing.do_bench(lambda call=call: call(t, segments, pool), return_mode="median") for call in calls
    )


def _refuse_spills(launches: Callable[[], object]) -> None:
    run = JITFunction.run

    def checked(self, *args, **options):
        compiled = run(self, *args, **options)
        if compiled.n_spills:
            raise Spills
        return compiled

    JITFunction.run = checked
    try:
        launches()
    finally:
        JITFunction.run = run


def time_algorithm(algorithm: str, tokens: int, device: torch.device) -> float:
    """Milliseconds of the FFN's forward and backward pass."""
    segments = TaskSegments.of((tokens // TASKS,) * TASKS, device)
    like = torch.empty(0, dtype=torch.bfloat16, device=device)
    ffn = AdaptedFFN(parse_pool("16/3/1/4"), segments, WIDTH, like, algorithm)

    def step():
        ffn.forward()
        ffn.backward()

    return triton.testing.do_bench(step, return_mode="median")


def classes(kernel: str) -> Iterator[tuple[str, str]]:
    """(limit of columns, the widest pool that falls under it) of every class in the default table."""
    limits = sorted(map(int, tiles.TABLES["default"][kernel]["2"]))
    by_limit = {}
    for name in POOLS:
        pool = parse_pool(name)
        by_limit[min(limit for limit in limits if pool.tile_columns <= limit)] = name
    return ((str(limit), name) for limit, name in by_limit.items())


def tune_kernel(kernel: str, row: Table, device: torch.device) -> None:
    """Writes the fastest tiles of ``kernel`` into ``row``, the architecture's part of tiles.TABLES."""
    row.setdefault(kernel, json.loads(json.dumps(tiles.TABLES["default"][kernel])))
    for limit, pool in tqdm(list(classes(kernel)), kernel, leave=False):
        tile = row[kernel]["2"]

        def time(candidate, tile=tile, limit=limit, pool=pool):
            tile[limit] = list(candidate)
            tiles.tile.cache_clear()
            return time_launch(kernel, pool, device)

        present = tuple(tile[limit])
        tile[limit] = list(fastest(present, list(itertools.product(*SPACE[kernel])), time))


def tune_ffn(row: Table, device: torch.device) -> None:
    """The same for the algorithm of the FFN, by number of tokens."""
    present = row.setdefault("ffn", dict(tiles.TABLES["default"]["ffn"]))
    for name, tokens in TOKENS.items():
        present[name] = fastest(present[name], list(ALGORITHMS), partial(time_algorithm, tokens=tokens, device=device))


def difference(before: Table, after: Table) -> list[str]:
    """One line for every entry of an architecture that changed."""
    old, new = dict(_entries(before)), dict(_entries(after))
    return [
        f"{name:40} {old.get(name, 'default')!s:>24} -> {value}"
        for name, value in new.items()
        if old.get(name) != value
    ]


def _entries(table: Table, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        path = f"{prefix} {name}".strip()
        yield from _entries(value, path) if isinstance(value, dict) else [(path, value)]


def dump(tables: Table) -> str:
    """JSON with one line for every kernel and element size, as the file is kept."""
    text = json.dumps(tables, indent=2)
    for innermost in (r"\[[^\]]*\]", r"\{[^{}]*\}"):
        text = re.sub(innermost, lambda found: found[0][0] + " ".join(found[0][1:-1].split()) + found[0][-1], text)
    return text + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser, known = Parser("tune", __doc__), [*SPACE, "ffn"]
    parser.add_argument("--kernels", type=names(known), default=known, help=", ".join(known))
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the whole table as JSON")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.tune measures: it needs a GPU that torch can use", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    name = tiles.architecture(device)
    before = json.loads(json.dumps(tiles.TABLES.get(name, {})))
    row = tiles.TABLES.setdefault(name, {})
    for kernel in chosen.kernels:
        tune_ffn(row, device) if kernel == "ffn" else tune_kernel(kernel, row, device)
    print("\n".join(difference(before, row)) or f"nothing is faster than what {name} has")
    keep(chosen.out, dump(tiles.TABLES))
    return 0


if __name__ == "__main__":
    finish(main)
