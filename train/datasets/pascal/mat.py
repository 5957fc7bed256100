"""Reads and checks the labels of PASCAL-Context and PASCAL-Part, which are MATLAB variables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.errors import UserError
from train.datasets.pascal.voc import PERSON
from train.files.matlab import load_variable
from train.files.reading import reading, require_file
from train.tasks import PART_NAMES

CONTEXT_CLASSES = 459
# PASCAL-Part's parts of a person, by the part of train.tasks that each belongs to.
PERSON_PARTS = {
    "head": ("hair", "head", "lear", "rear", "lebrow", "rebrow", "leye", "reye", "mouth", "nose"),
    "torso": ("neck", "torso"),
    "upper arm": ("luarm", "ruarm"),
    "lower arm": ("llarm", "rlarm", "lhand", "rhand"),
    "upper leg": ("luleg", "ruleg"),
    "lower leg": ("llleg", "rlleg", "lfoot", "rfoot"),
}
PART_IDS = {name: PART_NAMES.index(part) for part, names in PERSON_PARTS.items() for name in names}


def read_variable(path: Path, name: str) -> Any:
    """One variable of a MATLAB file up to version 7.2."""
    require_file(path)
    with reading(path):
        with path.open("rb") as file:
            start = file.read(10)
        if start.startswith((b"\x89HDF", b"MATLAB 7.3")):
            raise UserError(f"{path} is a MATLAB 7.3 (HDF5) file, which is not read here: save it with MATLAB's -v7")
        try:
            return load_variable(path, name)
        except KeyError:
            raise UserError(f"{path} holds no variable {name!r}: restore it") from None


def read_label_map(path: Path) -> NDArray[np.uint16]:
    """PASCAL-Context's LabelMap (H, W), class ids 0..459."""
    label_map = read_variable(path, "LabelMap")
    if not _is_matrix(label_map):
        raise UserError(f"{path}: LabelMap is not a matrix of numbers: restore it")
    whole = np.isfinite(label_map) & (label_map >= 0) & (label_map <= CONTEXT_CLASSES)
    if not whole.all() or (label_map % 1).any():
        raise UserError(f"{path}: LabelMap holds other values than the classes 0..{CONTEXT_CLASSES}: restore it")
    return label_map.astype(np.uint16)


def read_parts(path: Path) -> NDArray[np.uint8]:
    """Part ids (H, W) of all persons in a PASCAL-Part file, later parts over earlier ones; 0 elsewhere.

    The size is that of the file's masks, or (1, 1) where no person has a part.
    """
    label = None
    anno = _records(path, "anno", read_variable(path, "anno"), ("objects",))
    if len(anno) != 1:
        raise _odd(path, f"anno has {len(anno)} records instead of 1")
    for thing in _records(path, "objects", anno[0]["objects"], ("class_ind", "mask", "parts")):
        if _class_id(path, thing["class_ind"]) != PERSON:
            continue
        for part in _records(path, "parts", thing["parts"], ("part_name", "mask")):
            name, mask, person = _name(path, part["part_name"]), _mask(path, part["mask"]), thing["mask"]
            label = np.zeros(mask.shape, np.uint8) if label is None else label
            if not mask.shape == label.shape == getattr(person, "shape", None):
                raise _odd(path, f"the mask of {name!r} has another size than those before it")
            label[mask] = PART_IDS[name]
    return np.zeros((1, 1), np.uint8) if label is None else label


def _odd(path: Path, what: str) -> UserError:
    return UserError(f"{path} does not follow PASCAL-Part's format, {what}: restore it")


def _is_matrix(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.size > 0 and value.dtype.kind in "uif"


def _records(path: Path, what: str, value: Any, fields: Sequence[str]) -> list[dict[str, Any]]:
    """The elements of a struct array; an empty list for MATLAB's []."""
    if isinstance(value, np.ndarray) and value.size == 0:
        return []
    if not isinstance(value, list):
        raise _odd(path, f"{what} is not a struct")
    if lacking := [field for field in fields if value and field not in value[0]]:
        raise _odd(path, f"{what} has no field {lacking[0]!r}")
    return value


def _class_id(path: Path, value: Any) -> float:
    if not _is_matrix(value) or value.size != 1 or not float(value.item()).is_integer():
        raise _odd(path, "class_ind is not one whole number")
    return value.item()


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or name not in PART_IDS:
        raise _odd(path, f"a person has a part named {' '.join(repr(name).split())[:60]}")
    return name


def _mask(path: Path, value: Any) -> NDArray[np.bool_]:
    if not _is_matrix(value) or not ((value == 0) | (value == 1)).all():
        raise _odd(path, "a mask of a person is not a matrix of 0 and 1")
    return value.astype(bool)
