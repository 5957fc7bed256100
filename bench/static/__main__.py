"""Models the cost of every launch of kernels/ and of the adapted FFN on an H100 and an H200, from compiled code.

    python -m bench.static [--markdown] [--out FILE] [--kernels route_shrink,...] [--pools 16/3/1/4,...]
                           [--dtypes bf16,...] [--tokens 40960,...]
    python -m bench.static --check | --budget [--kernels ...] [--pools ...]

Launches are compiled as bench.aot compiles them, at ViT-B's width for five tasks. Instructions are counted in the
machine code. Trip counts of loops, bytes and operations come from Triton's intermediate code and the launch's
arguments. ``--check`` compares the instructions with bench/static/budget.json, and ``--budget`` renews that file.
Nothing is timed, and no GPU is needed.
"""

import argparse
import os
import sys
from itertools import product
from pathlib import Path

from tqdm import tqdm

from bench.aot import DTYPES, compiled
from bench.expert_launches import EXPERT_LAUNCHES, EXPERT_POOLS
from bench.grouped_launches import GROUPED_LAUNCHES, GROUPED_POOLS
from bench.launches import LAUNCHES
from bench.options import Parser, finish, keep, names, pools
from bench.static import budget, large, table
from bench.static.ffn import adapted, frozen
from bench.static.model import TARGET, cost
from kernels.custom_ops import ALGORITHMS
from kernels.experts.custom_ops import ALGORITHMS as LARGE

POOLS = ("16/3/1/4", "32/6/2/2", "64/12/4/1")
KERNELS = {
    **dict.fromkeys(LAUNCHES, POOLS),
    **dict.fromkeys(EXPERT_LAUNCHES, POOLS + EXPERT_POOLS),
    **dict.fromkeys(GROUPED_LAUNCHES, GROUPED_POOLS),
}  # pools by kernel
TOKENS, TASKS = (40_960, 7_880), 5
HALF = ("bf16", "fp16")  # the types of the assumed rates of cuBLAS


def model_kernels(kernels: list[str], pools: list[str], dtypes: list[str], tokens: list[int]) -> list[dict]:
    rows = []
    every = pools or list(dict.fromkeys(pool for own in KERNELS.values() for pool in own))
    combinations = [
        (n, pool, dtype, kernel)
        for n, pool, dtype, kernel in product(tokens, every, dtypes, kernels)
        if pools or pool in KERNELS[kernel]
    ]
    for n, pool, dtype, kernel in tqdm(combinations, "kernels", leave=False):
        launch = compiled(kernel, pool, dtype, TARGET, (n // TASKS,) * TASKS)
        setting = {"kernel": kernel, "pool": pool, "dtype": dtype, "tokens": n}
        rows.append(table.kernel_row(setting, launch, cost(launch)))
    return rows


def model_ratios(pools: list[str], dtypes: list[str], tokens: list[int]) -> list[dict]:
    rows = []
    halves = [dtype for dtype in dtypes if dtype in HALF]
    combinations = list(product(tokens, pools or POOLS, halves, ALGORITHMS))
    for n, pool, dtype, algorithm in tqdm(combinations, "ratios", leave=False):
        setting = {"pool": pool, "dtype": dtype, "tokens": n, "algorithm": algorithm}
        rows += table.ratio_rows(setting, adapted(pool, dtype, n, TASKS, algorithm), frozen(dtype, n))
    return rows


def model_large(pools: list[str], dtypes: list[str], tokens: list[int]) -> list[dict]:
    rows = []
    halves = [dtype for dtype in dtypes if dtype in HALF]
    combinations = list(product(tokens, [pool for pool in large.POOLS if pool in (pools or large.POOLS)], halves))
    for n, pool, dtype in tqdm(combinations, "large pools", leave=False):
        both = {name: large.passes(pool, dtype, n, TASKS, name) for name in LARGE}
        rows += [large.row({"pool": pool, "dtype": dtype, "tokens": n}, gpu, both) for gpu in table.GPUS]
    return rows


def tokens(text: str) -> list[int]:
    """The type of --tokens."""
    if not all(number.isdecimal() and int(number) >= TASKS for number in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} are not numbers of at least {TASKS}, separated by commas")
    return [int(number) for number in text.split(",")]


def options() -> Parser:
    parser = Parser("static", __doc__)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a kernel exceeds its budget")
    parser.add_argument("--budget", action="store_true", help="renew the budgets")
    parser.add_argument("--pools", type=pools, default=[], help="N/k/S/r,... (those of each kernel)")
    for name, choices in (("kernels", [*KERNELS]), ("dtypes", [*DTYPES][::-1])):
        parser.add_argument(f"--{name}", type=names(choices), default=choices, help=", ".join(choices))
    parser.add_argument("--tokens", type=tokens, default=list(TOKENS), help="of all tasks together, N,...")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = options()
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.static compiles: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    pools = {
        kernel: [p for p in KERNELS[kernel] if p in (chosen.pools or KERNELS[kernel])] for kernel in chosen.kernels
    }
    if (chosen.budget or chosen.check) and not any(pools.values()):
        parser.error(f"--pools {','.join(chosen.pools)}: there are no budgets of these kernels for them")
    if chosen.budget:
        for kernel in chosen.kernels:
            budget.renew([kernel], pools[kernel])
        return 0
    if chosen.check:
        found = (budget.exceeded([kernel], pools[kernel]) for kernel in chosen.kernels)
        lines = [line for each in found for line in each]
        print(
            "\n".join(
                [*lines, "on purpose? python -m bench.static --budget"] if lines else ["no kernel exceeds its budget"]
            )
        )
        return 1 if lines else 0
    rest = chosen.pools, chosen.dtypes, chosen.tokens
    results = {
        "kernels": model_kernels(chosen.kernels, *rest),
        "ratios": model_ratios(*rest),
        "large": model_large(*rest),
    }
    print(table.text(results, chosen.markdown))  # first, so that a full disk does not lose it
    keep(chosen.out, table.dump(results))
    return 0


if __name__ == "__main__":
    finish(main)
