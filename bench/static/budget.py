"""Instruction budgets of the kernels: warp instructions per token, bf16, 40,960 tokens of five tasks.

``budget.json`` holds budgets for each minor version of Triton, since the compiler determines the count. A change
that makes a kernel more expensive on purpose renews them with ``python -m bench.static --budget`` and says why in the
commit.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import triton

from bench.aot import compiled
from bench.expert_launches import EXPERT_LAUNCHES
from bench.grouped_launches import GROUPED_LAUNCHES
from bench.launches import LAUNCHES
from bench.static.model import TARGET, cost

FILE = Path(__file__).with_name("budget.json")
DTYPE, COUNTS = "bf16", (8_192,) * 5
Budgets = dict[str, dict[str, float]]  # kernel: {pool: instructions}


def version() -> str:
    """Triton's minor version, such as 3.9."""
    return ".".join(triton.__version__.split(".")[:2])


def measure(kernel: str, pool: str) -> float:
    """Warp instructions per token, rounded up to a tenth."""
    found = cost(compiled(kernel, pool, DTYPE, TARGET, COUNTS))
    return -(-10 * found.instructions // sum(COUNTS)) / 10


def read(file: Path = FILE) -> Budgets:
    """The budgets of the installed Triton; {} with a warning where there are none."""
    budgets = json.loads(file.read_text())["triton"]
    if version() not in budgets:
        missing = f"there are no budgets for Triton {version()}, only for {', '.join(budgets)}"
        warnings.warn(f"{missing}: python -m bench.static --budget", stacklevel=2)
    return budgets.get(version(), {})


def renew(kernels: Sequence[str], pools: Sequence[str], file: Path = FILE) -> None:
    """Sets the budgets of these kernels for the installed Triton to what they need now; drops removed kernels."""
    budgets = json.loads(file.read_text())["triton"] if file.exists() else {}
    old = budgets.get(version(), {})
    budgets[version()] = {
        kernel: dict(old.get(kernel, {}))
        for kernel in (*LAUNCHES, *EXPERT_LAUNCHES, *GROUPED_LAUNCHES)
        if kernel in {*old, *kernels}
    }
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


def exceeded(kernels: Sequence[str], pools: Sequence[str], file: Path = FILE) -> list[str]:
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
