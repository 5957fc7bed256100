"""results.json: what its scores were taken over, baselines, and which results may stand in one table."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kernels.errors import UserError
from train.evaluation.baselines import Reference, delta_m, published_rows
from train.files.reading import reading
from train.protocols.alignment import PHOTO_SIZE
from train.tasks.scores import HEADLINES

Results = dict[str, Any]

FAMILIES = {"A": "mtinet", "B": "invpt", "ASE": "ase"}  # of published rows: the protocol that is its own


def describe_set(
    dataset: Any, tasks: Iterable[str], split: str, compared_at: str, set_name: str | None = None
) -> dict[str, Any]:
    """What scores over ``dataset`` are scores of; of the images of each task a digest of their ids in any order."""
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
    """The results.json that a path is, or that is in this folder; UserError for what is none."""
    path = Path(given)
    path = path / "results.json" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist: give the folder of a finished run, or of python -m train.evaluate")
    results = read_json(path)
    if not {"protocol", "metrics", "evaluation"} <= results.keys():
        raise UserError(f"{path} does not say what its scores were taken over: make it again with train.evaluate")
    return results


def require_comparable(results: Mapping[str, Results]) -> None:
    """UserError where two of the ``results``, by name, are of different protocols, image sets or kinds of odsF.

    Sets need only agree in the images of the tasks that both have, kinds of odsF only where both have one.
    """
    (first_name, first), *others = results.items()
    for name, other in others:
        for what, ours, theirs in _aspects(first, other):
            if ours != theirs:
                raise UserError(
                    f"{first_name} and {name} cannot be compared: {what} {ours} and {theirs}; bring them to the same "
                    "with python -m train.evaluate"
                )


def _aspects(first: Results, other: Results) -> Iterator[tuple[str, str, str]]:
    """(what, in the first, in the other) of all that has to agree."""
    over, theirs = first["evaluation"], other["evaluation"]
    yield "protocol", first["protocol"], other["protocol"]
    yield "labels at", over["compared_at"], theirs["compared_at"]
    for task, images in over["labelled"].items():
        if task in theirs["labelled"]:
            yield f"{task} of", *("{images} images ({ids})".format_map(i) for i in (images, theirs["labelled"][task]))
    if first.get("odsF") and other.get("odsF"):
        yield "odsF", *("{mode} {variant}".format_map(results["odsF"]) for results in (first, other))


def baseline_of(given: str, results: Results) -> tuple[dict[str, Any], dict[str, Reference]]:
    """(its name, source and protocol, its scores) of a published row by name, a JSON file like one, or a run's results.

    UserError where it is none of these, or of another protocol than ``results``.
    """
    rows = {name.casefold(): name for name in published_rows()}
    if given.casefold() in rows:
        name = rows[given.casefold()]
        row = published_rows()[name]
    elif not Path(given).exists():
        close = difflib.get_close_matches(given.casefold(), rows, n=3, cutoff=0.3)
        hint = f"perhaps {', '.join(repr(rows[name]) for name in close)}" if close else f"or one of {', '.join(rows)}"
        raise UserError(f"no baseline {given!r}: give a JSON file, a run's folder, {hint}")
    elif Path(given).is_dir() or "metrics" in read_json(Path(given)):
        theirs = read_results(given)
        require_comparable({"the scores": results, given: theirs})
        return {"name": given, "source": "its results.json", "protocol": theirs["protocol"]}, references_of(theirs)
    else:
        name, row = given, _checked_row(Path(given))
    _require_protocol(name, row["protocol"], results)
    return {"name": name, "source": row["source"], "protocol": row["protocol"]}, row["scores"]


def references_of(results: Results) -> dict[str, Reference]:
    """A run's scores as a baseline: one per task, those of the field's Delta_m; saliency by maxF in family B."""
    saliency = "maxF" if results["protocol"].startswith("invpt") else "mIoU"
    chosen = {"seg": "mIoU", "parts": "mIoU", "sal": saliency, "normals": "mErr", "edge": "odsF"}
    higher = {(task, key): better for task, key, better, _ in HEADLINES}
    values = {task: results["metrics"].get(task, {}).get(key) for task, key in chosen.items()}
    return {
        task: {"metric": chosen[task], "value": value, "higher": higher[task, chosen[task]]}
        for task, value in values.items()
        if value
    }


def _checked_row(path: Path) -> dict[str, Any]:
    row = read_json(path)
    try:
        scores = {
            task: {"metric": str(cell["metric"]), "value": float(cell["value"]), "higher": bool(cell["higher"])}
            for task, cell in row["scores"].items()
        }
        return {"protocol": str(row["protocol"]), "source": str(row["source"]), "scores": scores}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is no baseline ({type(error).__name__}: {error}): give 'protocol', 'source' and 'scores', "
            "{task: {'metric': key, 'value': number, 'higher': true or false}}"
        ) from None


def _require_protocol(name: str, protocol: str, results: Results) -> None:
    own, compared_at = results["protocol"], results["evaluation"]["compared_at"]
    if FAMILIES.get(protocol, protocol) != own:
        raise UserError(f"baseline {name!r} is of protocol {protocol}, the scores are of {own}: they do not compare")
    if protocol in FAMILIES and compared_at != PHOTO_SIZE:
        raise UserError(
            f"baseline {name!r} was scored at {PHOTO_SIZE}, these scores at {compared_at}: use python -m train.evaluate"
        )


def with_baseline(results: Results, given: str) -> Results:
    """``results`` with "baseline" and "delta_m", None where a score of the baseline's is not there."""
    about, scores = baseline_of(given, results)
    return results | {"baseline": about, "delta_m": delta_m(results["metrics"], scores)}


def describe_delta(results: Results) -> str:
    """Delta_m and against what, or why there is none."""
    about, over = results["baseline"], results["odsF"]
    if results["delta_m"] is None:
        return f"n/a: a score of {about['name']!r} is not among these"
    fast = " (its odsF over all)" if over and over["mode"] == "fast" else ""
    return f"{results['delta_m']:+.2f} % against {about['name']!r}{fast}, {about['source']}"
