"""A cache of what takes long to derive: labels as PNGs in a folder that the user chooses, and scores as JSON.

The name of an entry is a hash of all that it follows from, of a label the source file's bytes and the derivation, so an
entry is never out of date. An entry also holds a hash of its name and its content: one that something else has changed
is derived again. Any number of processes may share the folder.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kernels.errors import UserError
from train.files.atomic import replacing
from train.files.folders import require_outside_data, resolved
from train.files.reading import reading, require_file

Label = NDArray[np.uint8]


@dataclass(frozen=True)
class Cache:
    """A cache in ``folder``; None stores nothing."""

    folder: Path | None = None

    def get(self, source: Path, derivation: str, derive: Callable[[Path], Label]) -> Label:
        """``derive(source)``, uint8 (H, W). ``derivation`` names the rule and its version."""
        if self.folder is None:
            return derive(source)
        require_file(source)
        with reading(source):
            key = hashlib.sha256(source.read_bytes() + derivation.encode()).hexdigest()
        entry = self.folder / f"{key}.png"
        label = _read(entry, key)
        if label is None:
            label = derive(source)
            with replacing(entry, sync=False) as partial:  # an entry that a power cut damages is derived again
                Image.fromarray(label).save(partial, "PNG", pnginfo=_sealed(key, label))
        return label

    def read(self, key: str) -> Any:
        """The value that was written as ``key``; None where there is none, or it is damaged."""
        if self.folder is None or not key:
            return None
        try:
            entry = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            return entry["value"] if entry["sum"] == _sum(key, entry["value"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, key: str, value: Any) -> None:
        """Keeps a ``value`` of JSON, unless ``key`` is empty; UserError where the disk refuses."""
        if self.folder is not None and key:
            with replacing(self.folder / f"{key}.json", sync=False) as partial:
                partial.write_text(json.dumps({"sum": _sum(key, value), "value": value}), encoding="utf-8")


def default_folder() -> str:
    """The user's own cache, which FASTMOE_LORA_CACHE names; "" where that is empty or there is no home."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.environ.get("FASTMOE_LORA_CACHE", os.path.join(caches, "fastmoe_lora"))
    return folder if os.path.isabs(folder) else ""


def open_cache(folder: str) -> Cache:
    """The cache in ``folder``, which is created if needed; a cache that stores nothing for "".

    UserError for a folder inside a data set, or one that cannot be written.
    """
    if not folder:
        return Cache()
    path = resolved(Path(folder))
    require_outside_data(Path(folder), "--cache")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to cache {folder} ({error.strerror}): choose another --cache") from None
    return Cache(path)


def _sum(key: str, value: Any) -> str:
    return hashlib.sha256(f"{key} {json.dumps(value)}".encode()).hexdigest()


def _seal(key: str, label: Label) -> str:
    return hashlib.sha256(f"{key} {label.dtype} {label.shape} ".encode() + label.tobytes()).hexdigest()


def _sealed(key: str, label: Label) -> PngInfo:
    info = PngInfo()
    info.add_text("key", _seal(key, label))
    return info


def _read(entry: Path, key: str) -> Label | None:
    """None for an entry that is missing, damaged, changed or another one."""
    try:
        with Image.open(entry, formats=("PNG",)) as image:
            label = np.asarray(image)
            return label if image.info.get("key") == _seal(key, label) else None
    except Exception:  # a decoder may raise anything on a damaged file
        return None
