"""results.json: the image set that its scores are over, reading it, and which results are comparable."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from train.datasets.base import DataSet
from train.files.reading import reading

Results = dict[str, Any]


def describe_set(
    dataset: DataSet, tasks: Iterable[str], split: str, compared_at: str, set_name: str | None = None
) -> dict[str, Any]:
    """The image set of scores over ``dataset``: its split, and per task the number of images and a digest of ids."""
    labelled = {}
    for task in tasks:
        ids = sorted(dataset.labelled(task))
        labelled[task] = {"images": len(ids), "ids": hashlib.sha256("\n".join(ids).encode()).hexdigest()[:12]}
    return {
        "split": split,
        "set": set_name,
        "images": len(dataset),
        "skipped": len(dataset.skipped),
        "compared_at": compared_at,
        "labelled": labelled,
    }


def read_json(path: Path) -> dict[str, Any]:
    with reading(path):
        return dict(json.loads(path.read_text()))


def read_results(given: str | Path) -> Results:
    """The results.json at this path or in this folder; UserError where there is none."""
    path = Path(given)
    path = path / "results.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist: give the folder of a finished run, or of python -m train.evaluate")
    results = read_json(path)
    if not {"protocol", "metrics", "evaluation"} <= results.keys():
        raise UserError(f"{path} does not say which images its scores are over: score again with train.evaluate")
    for task, scores in _mapping(path, "metrics", results["metrics"]).items():
        for name, value in _mapping(path, f"the metrics of {task}", scores).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise UserError(f"{path} has {value!r} as {task} {name}, which is not a number: score again")
    return results


def _mapping(path: Path, what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path} has {value!r} as {what}: score again with train.evaluate")
    return value


def require_comparable(results: Mapping[str, Results]) -> None:
    """UserError where two of the ``results``, by name, are of different protocols, image sets or kinds of odsF.

    Image sets are compared for the tasks that both results have, odsF only where both have it.
    """
    (first_name, first), *others = results.items()
    for name, other in others:
        for what, ours, theirs in _aspects(first, other):
            if ours != theirs:
                raise UserError(
                    f"{first_name} and {name} cannot be compared: {what} {ours} and {theirs}; score both alike "
                    "with python -m train.evaluate"
                )


def _aspects(first: Results, other: Results) -> Iterator[tuple[str, str, str]]:
    """(name, value in ``first``, value in ``other``) of everything that must agree."""
    over, theirs = first["evaluation"], other["evaluation"]
    images_text = "{images} images ({ids})"
    yield "protocol", first["protocol"], other["protocol"]
    yield "labels at", over["compared_at"], theirs["compared_at"]
    for task, images in over["labelled"].items():
        if task in theirs["labelled"]:
            other_images = theirs["labelled"][task]
            yield f"{task} of", images_text.format_map(images), images_text.format_map(other_images)
    if first.get("odsF") and other.get("odsF"):
        odsf_text = "{mode} {variant}"
        yield "odsF", odsf_text.format_map(first["odsF"]), odsf_text.format_map(other["odsF"])
