"""A budget of instructions for every kernel: warp instructions a token, bf16, 40,960 tokens of five tasks.

``budget.json`` holds one for each minor version of Triton, since its compiler decides. Whoever makes a kernel dearer
renews it on purpose, with ``python -m bench.static --budget``, and says why in the commit.
"""

import json
import warnings
from pathlib import Path

import triton

from bench.aot import compiled
from bench.launches import LAUNCHES
from bench.static.model import TARGET, cost

FILE = Path(__file__).with_name("budget.json")
DTYPE, COUNTS = "bf16", (8_192,) * 5
Budgets = dict[str, dict[str, float]]  # kernel: {pool: instructions}


def version() -> str:
    """Triton's minor version, such as 3.9."""
    return ".".join(triton.__version__.split(".")[:2])


def measure(kernel: str, pool: str) -> float:
    """Warp instructions a token, rounded up to a tenth."""
    found = cost(compiled(kernel, pool, DTYPE, TARGET, COUNTS))
    return -(-10 * found.instructions // sum(COUNTS)) / 10


def read(file: Path = FILE) -> Budgets:
    """Those of the Triton at hand; none, with a warning, where it has none."""
    budgets = json.loads(file.read_text())["triton"]
    if version() not in budgets:
        missing = f"there are no budgets for Triton {version()}, only for {', '.join(budgets)}"
        warnings.warn(f"{missing}: python -m bench.static --budget", stacklevel=2)
    return budgets.get(version(), {})


def renew(kernels: list[str], pools: list[str], file: Path = FILE) -> None:
    """Writes what these kernels need now into the budgets of the Triton at hand; kernels that are gone are dropped."""
    budgets = json.loads(file.read_text())["triton"] if file.exists() else {}
    old = budgets.get(version(), {})
    budgets[version()] = {kernel: dict(old.get(kernel, {})) for kernel in LAUNCHES if kernel in {*old, *kernels}}
    for kernel in kernels:
        budgets[version()][kernel].update((pool, measure(kernel, pool)) for pool in pools)
    file.write_text(dump(budgets))


def dump(budgets: dict[str, Budgets]) -> str:
    """JSON with one kernel to a line."""
    versions = [
        f'  "{name}": {{\n' + ",\n".join(f'   "{kernel}": {json.dumps(row)}' for kernel, row in own.items()) + "\n  }"
        for name, own in sorted(budgets.items())
    ]
    head = ' "what": "warp instructions a token; to renew: python -m bench.static --budget",\n "triton": {\n'
    return "{\n" + head + ",\n".join(versions) + "\n }\n}\n"


def exceeded(kernels: list[str], pools: list[str], file: Path = FILE) -> list[str]:
    """One line for every kernel that needs more than its budget, or has none."""
    budgets, lines = read(file), []
    for kernel in kernels if budgets else ():
        for pool in pools:
            limit, needed = budgets.get(kernel, {}).get(pool), measure(kernel, pool)
            if limit is None:
                lines.append(f"{kernel} {pool}: no budget, it needs {needed} instructions a token")
            elif needed > limit:
                lines.append(f"{kernel} {pool}: {needed} instructions a token, its budget is {limit}")
    return lines
