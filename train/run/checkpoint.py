"""Checkpoints: folders ``step-N/`` that are complete before they get their name, and ``last``, a link to the newest.

    model.safetensors   every parameter and buffer of the model
    optimizer.pt        the optimiser's state, tensors and numbers only
    state.json          the step, the run's settings and the metrics gathered before training

A killed run leaves the last good one.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kernels import UserError


def save(out: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write ``out/step-N``, point ``out/last`` at it, then remove the older ones."""
    folder, partial = out / f"step-{step}", out / f".step-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(model.state_dict(), partial / "model.safetensors")
    torch.save(optimizer.state_dict(), partial / "optimizer.pt")
    (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    for file in partial.iterdir():
        _sync(file)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    _point_last(out, folder)
    for old in out.glob("step-*"):
        if old != folder:
            shutil.rmtree(old)
    return folder


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _point_last(out: Path, folder: Path) -> None:
    link = out / ".last.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    link.replace(out / "last")


def read_state(folder: Path) -> dict[str, Any]:
    """The contents of state.json."""
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, json.JSONDecodeError):
        raise UserError(f"{folder} is not a checkpoint: give a folder step-N or last of an earlier run") from None


def find(given: Path) -> Path:
    """The folder step-N that a run's folder, its ``last`` or step-N itself leads to."""
    return ((given / "last") if (given / "last").exists() else given).resolve()


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The model's parameters and buffers."""
    with _undamaged(folder):
        return load_file(folder / "model.safetensors")


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load what :func:`save` wrote; nothing is unpickled that could run code."""
    weights = read_weights(folder)
    with _undamaged(folder):
        moments = torch.load(folder / "optimizer.pt", weights_only=True)
    model.load_state_dict(weights)
    optimizer.load_state_dict(moments)


@contextmanager
def _undamaged(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # readers raise a dozen kinds on damaged bytes; all mean the same to the user
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"checkpoint {folder} is damaged: {reason}; take another one") from None
