"""A budget of instructions for every kernel: warp instructions a token, bf16, 40,960 tokens of five tasks.

``budget.json`` holds one for each minor version of Triton, since its compiler decides. Whoever makes a kernel dearer
renews it on purpose, with ``python -m bench.static --budget``, and says why in the commit.
"""

import json
import warnings
from pathlib import Path

import triton

from bench.aot import compiled
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
    budgets = json.loads(file.read_text())
    if version() not in budgets:
        missing = f"there are no budgets for Triton {version()}, only for {', '.join(budgets)}"
        warnings.warn(f"{missing}: python -m bench.static --budget", stacklevel=2)
    return budgets.get(version(), {})


def renew(kernels: list[str], pools: list[str], file: Path = FILE) -> None:
    """Writes what these kernels need now into the budgets of the Triton at hand."""
    budgets = json.loads(file.read_text()) if file.exists() else {}
    own = budgets.setdefault(version(), {})
    for kernel in kernels:
        own.setdefault(kernel, {}).update((pool, measure(kernel, pool)) for pool in pools)
    rows = [
        f' "{name}": {{\n' + ",\n".join(f'  "{kernel}": {json.dumps(row)}' for kernel, row in kernels.items()) + "\n }"
        for name, kernels in sorted(budgets.items())
    ]
    file.write_text("{\n" + ",\n".join(rows) + "\n}\n")


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
