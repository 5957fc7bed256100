"""Reads and checks NumPy's .npy files."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.errors import UserError
from train.files.reading import reading, require_file


def read_npy(path: Path, axes: int, kinds: str = "f") -> NDArray:
    """The array of a .npy file, with this number of axes and one of NumPy's ``kinds`` of numbers, all finite.

    UserError for any other file. No code in it is executed.
    """
    require_file(path)
    with reading(path):
        array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds or array.ndim != axes or not array.size:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        expected = "floats" if kinds == "f" else "numbers"
        raise UserError(f"{path} holds {found}, not {expected} on {axes} axes: restore it")
    if not np.isfinite(array).all():
        raise UserError(f"{path} holds numbers that are not finite: restore it")
    return array
