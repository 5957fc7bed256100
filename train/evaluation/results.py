"""results.json: the image set that its scores are over, reading it, and which results are comparable."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from train.datasets.base import DataSet
from train.files.reading import read_json
from train.tasks import TASKS

Results = dict[str, Any]
SCORE = (int, float, type(None))
SCHEMA = {  # what readers of results.json rely on, see require_schema
    "protocol": str,
    "metrics": {"*": {"*": SCORE}},
    "evaluation": {
        "split": str,
        "set?": str,
        "images": int,
        "compared_at": str,
        "labelled": {"*": {"images": int, "ids": str, "files?": str}},
    },
    "dataset": {"name": str, "image_size": int, "root?": str, "val_images?": str},
    "odsF?": {"mode": str, "variant": str, "images": int},
    "model?": {"name": str},
    "settings?": {"seed": int},
    "parameters?": {"total": int, "trainable": int},
    "step?": int,
    "steps?": int,
    "command": str,
    "checkpoint?": str,
    "predictions?": str,
    "tta?": str,
    "versions": {"*": str},
}


def describe_set(
    dataset: DataSet, tasks: Iterable[str], split: str, compared_at: str, set_name: str | None = None
) -> dict[str, Any]:
    """The image set of scores over ``dataset``: its split, and per task the number of images, a digest of their ids and
    one of what their files hold."""
    labelled, digests = {}, dict(zip(dataset.ids, dataset.digests, strict=True))
    for task in tasks:
        ids = sorted(dataset.labelled(task))
        files = [digests[image_id].get(task, "") for image_id in ids]
        labelled[task] = {"images": len(ids), "ids": _short_digest(ids), "files": _short_digest(files)}
    return {
        "split": split,
        "set": set_name,
        "images": len(dataset),
        "skipped": len(dataset.skipped),
        "compared_at": compared_at,
        "labelled": labelled,
    }


def _short_digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def read_results(given: str | Path) -> Results:
    """The results.json at this path or in this folder; UserError where there is none."""
    path = Path(given)
    path = path / "results.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist: give the folder of a finished run, or of python -m train.evaluate")
    results = read_json(path, SCHEMA)
    if unknown := [task for task in results["metrics"] if task not in TASKS]:
        raise UserError(f"{path} has scores of {unknown[0]!r}, a task that a script defines: add --import FILE")
    return results


def finished_results(run: Path, step: int) -> Results | None:
    """The results of a run at its checkpoint of ``step``; None where it has none, or those of another step, as a run
    has that was extended and is not finished."""
    results = read_results(run) if (run / "results.json").exists() else {}
    return results if results.get("steps") == step else None


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
    images_text = "{images} images (ids {ids}, files {files})"
    yield "protocol", first["protocol"], other["protocol"]
    yield "labels at", over["compared_at"], theirs["compared_at"]
    for task, images in over["labelled"].items():
        if task in theirs["labelled"]:
            ours, others = ({"files": "unknown"} | one for one in (images, theirs["labelled"][task]))
            yield f"{task} of", images_text.format_map(ours), images_text.format_map(others)
    if first.get("odsF") and other.get("odsF"):
        odsf_text = "{mode} {variant}"
        yield "odsF", odsf_text.format_map(first["odsF"]), odsf_text.format_map(other["odsF"])
