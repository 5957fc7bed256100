"""Weights files of every kind as plain tensors; none of them can run code."""

import argparse
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from kernels import UserError

WRAPPERS = ("model", "state_dict", "teacher", "student")  # entries of a training checkpoint, first choice first


def _read_npz(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def _read_pickle(path: Path) -> dict[str, object]:
    """Tensors and containers only, and argparse.Namespace: training scripts keep their options in one, as data."""
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # what it warns of is refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} is refused: unpickling it would run {found[1]}, and weights need no code; use the safetensors "
                "version, or save only the state dict where the file is trusted"
            ) from None
        raise


READERS: dict[str, tuple[str, Callable[[Path], dict]]] = {
    ".safetensors": ("safetensors", load_file),
    ".npz": ("NumPy", _read_npz),
    **dict.fromkeys((".pth", ".pt", ".bin"), ("PyTorch", _read_pickle)),
}


def read_tensors(path: Path) -> tuple[dict[str, Tensor], str]:
    """(tensors by the file's own names, the :data:`WRAPPERS` entry they came from or "").

    :class:`UserError`: no such file, a suffix that is not in :data:`READERS`, an unreadable file, a pickle
    that needs code, no tensors.
    """
    if not path.is_file():
        raise UserError(f"no such weights file: {path}")
    if path.suffix not in READERS:
        raise UserError(f"{path} is not a kind of weights file that can be read; use one of {', '.join(READERS)}")
    kind, reader = READERS[path.suffix]
    try:
        content = reader(path)
    except UserError:
        raise
    except Exception as error:  # arbitrary bytes make parsers raise anything, and advise to unpickle
        raise UserError(
            f"{path} is not a readable {kind} file ({type(error).__name__}): truncated, or of another kind than its "
            "suffix says; download it again"
        ) from None
    return _state_dict(content, path)


def _state_dict(content: object, path: Path) -> tuple[dict[str, Tensor], str]:
    content = content if isinstance(content, dict) else {}
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), "")
    content = content[wrapper] if wrapper else content
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no named tensors; save the state dict of the backbone")
    return tensors, wrapper
