"""What commands write and print: JSON files, versions, tables."""

import json
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels import UserError
from train.tasks import HEADLINES, Metrics


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
    """One row per metric that any column has, one column per entry of ``columns``, aligned."""
    lines = [f"{'task':<8} {'metric':<15}" + "".join(f"{name:>11}" for name in columns)]
    for task, metric, higher, unit in HEADLINES:
        values = [column.get(task, {}).get(metric) for column in columns.values()]
        if any(value is not None for value in values):
            cells = "".join(f"{number(value, unit):>11}" for value in values)
            lines.append(f"{task:<8} {f'{metric} {unit}':<12} {'^' if higher else 'v'} {cells}")
    return "\n".join(lines) + "\n(^ higher is better, v lower)"


def number(value: float | None, unit: str) -> str:
    """Two decimals of a score with a unit, four of a loss."""
    return "n/a" if value is None else f"{value:.{2 if unit else 4}f}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest entry, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows
    ]
    return "\n".join("  ".join(line) for line in lines)


def make_folder(path: Path) -> Path:
    """The folder of a report; UserError where it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}; choose another --out") from None
    return path
