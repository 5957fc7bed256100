"""Delta_m, the mean relative gain over a baseline, and published rows to take as baselines."""

import difflib
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict

from kernels.errors import UserError
from train.evaluation.results import Results, read_results, require_comparable
from train.files.reading import read_json
from train.protocols import PHOTO_SIZE, PROTOCOLS, Protocol
from train.tasks import TASKS


class Reference(TypedDict):
    """A task's score in a baseline: its key in ``compute()``, its value there, and which way is better."""

    metric: str
    value: float
    higher: bool


def delta_m(scores: Mapping[str, Mapping[str, float | None]], baseline: Mapping[str, Reference]) -> float | None:
    """Percent: 100 / T sum_t (-1)^{l_t} (M_t - B_t) / B_t over the T tasks of the baseline, l_t = 1 where lower is
    better (ASTMT, CVPR 2019).

    ``scores`` is {task: {key: value}}; where it lacks a score of the baseline, or the baseline has none or one of 0,
    the result is None. By the field's rule the baseline is one single-task model per task, of the same backbone and
    under the same protocol.
    """
    gains = []
    for task, reference in baseline.items():
        value = scores.get(task, {}).get(reference["metric"])
        if value is None or not reference["value"]:
            return None
        gain = value / reference["value"] - 1
        gains.append(gain if reference["higher"] else -gain)
    return 100 * sum(gains) / len(gains) if gains else None


def published_rows() -> dict[str, dict[str, Any]]:
    """Results by name, as published: method, backbone, protocol, source, and scores.

    ``protocol`` says which published numbers a row is comparable with: on PASCAL-Context "A" (ASTMT, MTI-Net: resized
    to a square, saliency by mIoU), "B" (ATRC, InvPT: original size, saliency by maxF) or "ASE", on NYUD-v2 "NYUD B".
    ``scores`` is a baseline of :func:`delta_m`.
    """
    return json.loads((resources.files("train.evaluation") / "baselines.json").read_text())


def baseline_of(given: str, results: Results) -> tuple[dict[str, Any], dict[str, Reference]]:
    """(its name, source and protocol, its scores) of a baseline.

    ``given`` is the name of a published row, a JSON file of the same form, or a run. UserError for anything else, for a
    baseline without scores, and for another protocol than that of ``results``.
    """
    rows = {name.casefold(): name for name in published_rows()}
    if given.casefold() in rows:
        name = rows[given.casefold()]
        row = published_rows()[name]
    elif not Path(given).exists():
        close = difflib.get_close_matches(given.casefold(), rows, n=3, cutoff=0.3)
        hint = f"perhaps {', '.join(repr(rows[name]) for name in close)}" if close else f"or one of {', '.join(rows)}"
        raise UserError(f"no baseline {given!r}: give a JSON file, a run's folder, {hint}")
    elif Path(given).is_dir() or "metrics" in read_json(Path(given), {}):
        theirs = read_results(given)
        require_comparable({"the scores": results, given: theirs})
        scores = _require_scores(given, references_of(theirs))
        return {"name": given, "source": "its results.json", "protocol": theirs["protocol"]}, scores
    else:
        name, row = given, _checked_row(Path(given))
    _require_protocol(name, row["protocol"], results)
    scores = _require_scores(name, row["scores"])
    return {"name": name, "source": row["source"], "protocol": row["protocol"]}, scores


def _require_scores(name: str, scores: dict[str, Reference]) -> dict[str, Reference]:
    if not scores:
        raise UserError(f"baseline {name!r} has no score that enters Delta_m: choose another --baseline")
    return scores


def references_of(results: Results) -> dict[str, Reference]:
    """A run's scores as a baseline, one per task: those in the field's Delta_m (for saliency in family B, maxF). Where
    it was not computed, the first headline that was: in training edges count by their loss, as in the paper's
    ablations."""
    own = PROTOCOLS.get(results["protocol"].partition("@")[0], Protocol).saliency
    references: dict[str, Reference] = {}
    for name, task in TASKS.items():
        higher = {headline.key: headline.higher_is_better for headline in task.headlines}
        scores, usual = results["metrics"].get(name, {}), own if name == "sal" else task.delta_key
        if key := next((key for key in (usual, *higher) if scores.get(key) is not None), None):
            references[name] = {"metric": key, "value": scores[key], "higher": higher[key]}
    return references


def _checked_row(path: Path) -> dict[str, Any]:
    row = read_json(path, {})
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
    families = {kind.published: kind for kind in PROTOCOLS.values() if kind.published}
    family, dataset = families.get(protocol), results["dataset"]["name"]
    if family and family.dataset != dataset:
        raise UserError(f"baseline {name!r} is of {family.dataset}, the scores are of {dataset}: choose another")
    if (family.name if family else protocol) != own:
        raise UserError(
            f"baseline {name!r} is of protocol {protocol}, the scores are of {own}: they cannot be compared"
        )
    if protocol in families and compared_at != PHOTO_SIZE:
        raise UserError(
            f"baseline {name!r} was scored at {PHOTO_SIZE}, these scores at {compared_at}: use python -m train.evaluate"
        )


def with_baseline(results: Results, given: str) -> Results:
    """``results`` with "baseline", which lists the scores that count, and "delta_m", None where one is missing or 0."""
    about, scores = baseline_of(given, results)
    over = {task: reference["metric"] for task, reference in scores.items()}
    return results | {"baseline": about | {"over": over}, "delta_m": delta_m(results["metrics"], scores)}


def describe_baseline(about: Mapping[str, Any]) -> str:
    """The baseline, where it is from, and the scores that Delta_m is the mean over."""
    over = ", ".join(f"{task} {key}" for task, key in about["over"].items())
    return f"against {about['name']!r}, {about['source']}, over {over}"


def describe_delta(results: Results) -> str:
    """Delta_m and its baseline, or why Delta_m is not available."""
    about, over = results["baseline"], results["odsF"]
    if results["delta_m"] is None:
        return f"n/a: a score of {about['name']!r} is not among these, or is 0 there"
    fast = "; its odsF is over all images" if over and over["mode"] == "fast" else ""
    return f"{results['delta_m']:+.2f} % {describe_baseline(about)}{fast}"
