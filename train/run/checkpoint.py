"""Checkpoints: folders ``step-N/`` that are complete before they get their name, and ``last``, a link to the newest.

    model.safetensors   every parameter and buffer of the model
    optimizer.pt        the optimiser's state, tensors and numbers only
    state.json          the step, the run's settings and the metrics gathered before training

A killed run leaves the last good one.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kernels import UserError
from train.files.atomic import remove_partials, replacing, replacing_folder


def save(out: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write ``out/step-N``, point ``out/last`` at it, then remove the older ones and what a killed run left."""
    folder = out / f"step-{step}"
    with replacing_folder(folder) as partial, _failed_writes():
        save_file(model.state_dict(), partial / "model.safetensors")
        with (partial / "optimizer.pt").open("wb") as file:
            torch.save(optimizer.state_dict(), file)
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1))
    with replacing(out / "last") as link:
        link.symlink_to(folder.name)
    for old in out.glob("step-*"):
        if old != folder:
            shutil.rmtree(old)
    for name in ("step-*", "last"):
        remove_partials(out, name)
    return folder


@contextmanager
def _failed_writes() -> Iterator[None]:
    """Raises the OSError of a write that failed, which safetensors and torch hide in errors of their own kinds."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


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
