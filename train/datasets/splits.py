"""Which images a split has: lists of ids, and the division of a folder's images where a tree has no lists.

An id is the photo's path below its folder, without the suffix, such as ``2008_000008`` or
``aachen/aachen_000000_000019``. No id leads out of a folder: its parts are letters, digits, ``_`` and ``-``.
"""

import hashlib
import os
import re
from pathlib import Path

from kernels.errors import UserError
from train.files.folders import walk_files
from train.files.reading import reading, require_file

IMAGE_ID = re.compile(r"[\w-]+(/[\w-]+)*")
SHARE = re.compile(r"(0?\.\d+)(?::(\d+))?")


def read_ids(path: Path, example: str) -> list[str]:
    """The ids in a file, one per line; UserError for an invalid id, one that is listed twice, and for an empty list."""
    require_file(path)
    with reading(path):
        ids = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    seen = set()
    for image_id in ids:
        if not IMAGE_ID.fullmatch(image_id):
            raise UserError(f"{path} lists {image_id!r}, which is not an image id such as {example}: correct the list")
        if image_id in seen:
            raise UserError(f"{path} lists {image_id} twice: correct the list")
        seen.add(image_id)
    if not ids:
        raise UserError(f"{path} lists no image: restore the list")
    return ids


def find_ids(root: Path, pattern: str) -> list[str]:
    """The sorted ids of all files of a ``pattern`` with one ``{}``, in sub-folders too. Hidden files do not count."""
    start, suffix = pattern.split("{}")
    found = []
    for path in walk_files(root / start):
        if path.name.endswith(suffix):
            image_id = path.relative_to(root / start).as_posix().removesuffix(suffix)
            if not IMAGE_ID.fullmatch(image_id):
                raise UserError(f"{path} has a name of other characters than letters, digits, _ and -: rename it")
            found.append(image_id)
    if not found:
        raise UserError(f"{root / start} holds no photo *{suffix}: restore the photos")
    return sorted(found)


def divide(ids: list[str], val_images: str, split: str) -> list[str]:
    """Those of ``ids`` that are in "train" or "val".

    ``val_images`` says which are in "val": a share of them, ``0.1`` or ``0.1:7`` with seed 7, chosen by hashes, so that
    the choice depends on ids and seed alone; or a file that lists them. UserError for anything else.
    """
    if split not in ("train", "val"):
        raise UserError(f"--val-images divides images into train and val: there is no split {split!r}")
    given = SHARE.fullmatch(val_images)
    chosen = _share(ids, float(given[1]), given[2] or "0") if given else _listed(ids, Path(val_images))
    divided = [image_id for image_id in ids if (image_id in chosen) == (split == "val")]
    if not divided:
        raise UserError(f"--val-images {val_images} leaves none of {len(ids)} images in {split}: choose another")
    return divided


def _share(ids: list[str], share: float, seed: str) -> set[str]:
    ranked = sorted(ids, key=lambda image_id: hashlib.sha256(f"{seed} {image_id}".encode()).digest())
    return set(ranked[: round(share * len(ids))])


def _listed(ids: list[str], path: Path) -> set[str]:
    if not os.path.lexists(path):
        raise UserError(f"--val-images {path} is neither a share such as 0.1 or 0.1:7 nor a file of ids: give one")
    listed = read_ids(path, ids[0])
    known = set(ids)
    if alien := [image_id for image_id in listed if image_id not in known]:
        raise UserError(
            f"{path} lists {alien[0]}, which has no photo ({len(alien)} of {len(listed)}): correct the list"
        )
    return set(listed)
