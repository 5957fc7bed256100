"""results.json and the table that is printed at the end."""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.evaluate import Metrics
from train.metrics import HEADLINES


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    for name in ("triton", "fastmoe_lora"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: written beside its place, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


def table(columns: dict[str, Metrics]) -> str:
    """One row per metric, one column per entry of ``columns``, aligned."""
    lines = [f"{'task':<8} {'metric':<12}" + "".join(f"{name:>11}" for name in columns)]
    for task, metric, higher, unit in HEADLINES:
        if all(task in column for column in columns.values()):
            values = "".join(f"{_number(column[task][metric], unit):>11}" for column in columns.values())
            lines.append(f"{task:<8} {f'{metric} {unit}':<8} {'^' if higher else 'v':<3}{values}")
    return "\n".join(lines) + "\n(^ higher is better, v lower)"


def _number(value: float | None, unit: str) -> str:
    return "n/a" if value is None else f"{value:.{2 if unit else 4}f}"
