"""Labels that take long to derive, kept as PNGs in a folder of the user's choice.

An entry is named by what it depends on, the source file's bytes and the derivation, so it is never out of date; any
number of processes may share the folder.
"""

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kernels.errors import UserError
from train.files.atomic import replacing
from train.files.reading import reading, require_file

Label = NDArray[np.uint8]


@dataclass(frozen=True)
class Cache:
    """The folder; None keeps nothing."""

    folder: Path | None = None

    def get(self, source: Path, derivation: str, derive: Callable[[Path], Label]) -> Label:
        """``derive(source)``, uint8 (H, W). ``derivation`` names the rule and its version."""
        if self.folder is None:
            return derive(source)
        require_file(source)
        with reading(source):
            key = hashlib.sha256(source.read_bytes() + derivation.encode()).hexdigest()
        entry = self.folder / f"{key}.png"
        label = _read(entry)
        if label is None:
            label = derive(source)
            with replacing(entry, sync=False) as partial:  # an entry that a power cut damages is derived again
                Image.fromarray(label).save(partial, "PNG")
        return label


def open_cache(folder: str, root: Path) -> Cache:
    """The cache in ``folder``, made if need be; none for "". UserError inside the data ``root`` or without access."""
    if not folder:
        return Cache()
    path = Path(folder).resolve()
    if path.is_relative_to(root.resolve()):
        raise UserError(f"cache {folder} lies inside the data set {root}, which is only read: choose another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"cannot write to cache {folder} ({error.strerror}): choose another --cache") from None
    return Cache(path)


def _read(entry: Path) -> Label | None:
    """None for an entry that is missing or damaged."""
    try:
        with Image.open(entry, formats=("PNG",)) as image:
            image.verify()  # its checksums
        with Image.open(entry, formats=("PNG",)) as image:
            return np.asarray(image) if image.mode == "L" else None
    except Exception:  # whatever a decoder makes of a damaged file
        return None
