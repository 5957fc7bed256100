"""The scores of the best constant prediction, computed once per data set and kept.

The name of an entry is a hash of all that the scores follow from, so that an entry is never out of date: the images and
labels of both splits, the protocol, the tasks, which images the constant is fitted on, the source of this program and
the versions of what it computes with.
"""

import hashlib
import json
import math
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import PIL
import scipy

from kernels import UserError
from train.config.settings import Settings
from train.datasets.batches import eval_loader, train_loader
from train.datasets.cache import Cache, default_folder, open_cache
from train.evaluation.validate import score_constant
from train.output.versions import versions
from train.run.distributed import from_leader, leads
from train.run.start import Run
from train.tasks import TASKS, Metrics

IMAGES = 1500  # training images the constant is fitted on
SOURCE = Path(__file__).resolve().parents[1]


def constant_scores(run: Run) -> Metrics:
    """The best constant's metrics. It is fitted on one epoch of training batches, at most IMAGES images."""
    s, (train_set, val_set) = run.settings, run.data
    kept = from_leader(lambda: open_kept(s.cache))
    entry = entry_of(s, run.data, run.images)
    scores = from_leader(lambda: kept.read(entry))
    if scores is None:
        steps = math.ceil(min(len(train_set), IMAGES) / s.batch_size)
        fitted = train_loader(train_set, s.task_names, s.batch_size, range(steps), s.seed, s.workers)
        scored = eval_loader(val_set, s.task_names, s.batch_size, s.workers)
        scores = score_constant(fitted, scored, s.task_names, val_set.classes)
        if leads():
            with suppress(UserError):  # a full disk costs the next run a minute
                kept.write(entry, scores)
    return scores


def open_kept(folder: str) -> Cache:
    """The cache of the scores: --cache, else the user's own, where that can be written."""
    try:
        return open_cache(folder or default_folder())
    except UserError:
        return Cache()


def entry_of(s: Settings, data: tuple[Any, Any], images: dict[str, str]) -> str:
    """The name of the scores' entry; "" where a script defines a task, whose source is not known. ``images`` is the
    fingerprint of each split."""
    protocols = [split.protocol for split in data]
    if not all(type(part).__module__.startswith("train.") for part in (*protocols, *map(TASKS.get, s.task_names))):
        return ""
    origins = [split.origin for split in data]  # the layout says how files are read
    values = [images, origins, list(map(repr, protocols)), s.task_names, s.seed, s.batch_size, program()]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@cache
def program() -> str:
    """A hash of the source of train/ and of the versions that it computes with."""
    digest = hashlib.sha256(json.dumps(versions() | {m.__name__: m.__version__ for m in (cv2, PIL, scipy)}).encode())
    for path in sorted(SOURCE.rglob("*.py")):
        digest.update(path.relative_to(SOURCE).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
