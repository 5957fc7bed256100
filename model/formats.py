"""Reads weights files of several formats as plain tensors, without running code from them."""

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

# Names that wrappers of modules prepend: Lightning and Hugging Face's DINOv3, DataParallel and DDP; and those that
# torch.compile, FSDP and activation checkpointing insert wherever they wrap.
PREPENDED = re.compile(r"^((module|model|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
INSERTED = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
LFS = b"version https://git-lfs"  # what git clone leaves of a large file where git-lfs is not installed
WRAPPERS = ("model", "state_dict", "teacher", "student")  # keys of a checkpoint under which weights may be, in order


def _read_npz(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def _read_pickle(path: Path) -> dict[str, object]:
    """Loads tensors and containers only, and argparse.Namespace, in which training scripts store their options."""
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
    """(tensors by the file's own names without those of wrappers, the :data:`WRAPPERS` entry they came from or "").

    :class:`UserError`: no such file, a suffix that is not in :data:`READERS`, an unreadable file, a pickle
    that needs code, no tensors, two tensors of one name.
    """
    if not path.is_file():
        raise UserError(f"no such weights file: {path}")
    if path.suffix not in READERS:
        raise UserError(f"{path} is not a kind of weights file that can be read; use one of {', '.join(READERS)}")
    try:
        with path.open("rb") as file:
            head = file.read(len(LFS))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if head == LFS:
        raise UserError(f"{path} is a pointer of Git LFS and not the weights: run git lfs pull there")
    kind, reader = READERS[path.suffix]
    try:
        content = reader(path)
    except UserError:
        raise
    except Exception as error:  # parsers raise anything on arbitrary bytes, or advise to unpickle
        raise UserError(
            f"{path} is not a readable {kind} file ({type(error).__name__}): truncated, or of another kind than its "
            "suffix says; download it again"
        ) from None
    return _state_dict(content, path)


def _state_dict(content: object, path: Path) -> tuple[dict[str, Tensor], str]:
    content = content if isinstance(content, dict) else {}
    wrapper = next((key for key in WRAPPERS if isinstance(content.get(key), dict)), "")
    content = content[wrapper] if wrapper else content
    found = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not found:
        raise UserError(f"{path} holds no named tensors; save the state dict of the backbone")
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        if value.is_quantized or value.layout != torch.strided or value.device.type != "cpu":  # loaded to the CPU: meta
            raise UserError(f"{path} holds {name} quantised, sparse or without values: save it as a dense tensor")
        if (short := INSERTED.sub("", PREPENDED.sub("", name))) in tensors:
            raise UserError(f"{path} holds {short} under two names, one of them {name}: save one state dict alone")
        tensors[short] = value
    return tensors, wrapper
