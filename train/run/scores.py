"""The scores of a run in its course: Delta_m against the first, their table and curves, and the best checkpoint."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.evaluation.baselines import delta_m, references_of
from train.files.atomic import write_link
from train.output.scores import DELTA, course_table, headlines, title_of
from train.run import checkpoint
from train.run.distributed import leads
from train.run.record import NAME, Record, by_task
from train.run.start import Run
from train.tasks import Metrics

CURVES = "curves.png"
REDRAWN = 60  # seconds between two drawings of the curves, each of which takes half a second
ROWS = 3  # of the table: the first scores and the newest


def record_scores(run: Run, metrics: Metrics) -> None:
    """Records the scores of this step, with Delta_m against the first, keeps the best checkpoint, and draws the
    curves, at the end or where they are a minute old."""
    known, protocol = run.record.scores, run.data[0].protocol.reported
    first = by_task(next(iter(known.values()))) if known else metrics
    delta = delta_m(metrics, references_of({"protocol": protocol, "metrics": first}))
    run.record.add_scores(run.step, delta, metrics)
    run.record.flush()
    if leads():
        keep_best(run)
        if run.step == run.total or time.monotonic() - run.drawn > REDRAWN:
            draw_curves(run.out / CURVES, {run.out.name: run.record}, protocol)
            run.drawn = time.monotonic()


def keep_best(run: Run) -> None:
    """Points ``best`` at the checkpoint of the best scores among those that are there, and drops the one before. One
    whose scores were lost with the record stays: as the best until others are known, then beside it."""
    metric, unknown = run.settings.keep_best, best_without_scores(run)
    scores = run.record.scores_of(metric)
    found = {step: value for step, value in scores.items() if checkpoint.is_checkpoint(run.out / f"step-{step}")}
    sign = 1 if not metric or headlines()[metric].higher_is_better else -1
    run.best = max(found, key=lambda step: sign * found[step], default=unknown)
    if unknown not in (None, run.best):
        print(f"note      {NAME} has no scores of step-{unknown}, which was the best: it stays beside step-{run.best}")
        run.written = [name for name in run.written if name != f"step-{unknown}"]
    if run.best is None:
        (run.out / checkpoint.BEST).unlink(missing_ok=True)
    else:
        write_link(run.out / checkpoint.BEST, f"step-{run.best}")
    run.written = checkpoint.prune(run.out, run.written, run.settings.keep, run.best)


def best_without_scores(run: Run) -> int | None:
    """The step of the checkpoint that ``best`` names, where the record does not have its scores."""
    folder = checkpoint.find(run.out / checkpoint.BEST)
    if not run.settings.keep_best or not checkpoint.STEP.fullmatch(folder.name) or not checkpoint.is_checkpoint(folder):
        return None
    step = int(folder.name.removeprefix("step-"))
    return None if step in run.record.scores else step


def describe_best(run: Run) -> dict[str, Any] | None:
    """For results.json: the metric of --keep-best, the step of the checkpoint ``best``, and its score."""
    if run.best is None:
        return None
    metric = run.settings.keep_best
    return {"metric": metric, "step": run.best, "value": run.record.scores_of(metric).get(run.best)}


def shown_scores(record: Record, protocol: str) -> list[str]:
    """The names of the scores that enter Delta_m, and of Delta_m."""
    first = by_task(next(iter(record.scores.values()), {}))
    references = references_of({"protocol": protocol, "metrics": first})
    return [*(f"{task}/{reference['metric']}" for task, reference in references.items()), DELTA]


def describe_scores(run: Run) -> str:
    """The first scores and the newest, as a table."""
    (first, *later), names = run.record.scores.items(), shown_scores(run.record, run.data[0].protocol.reported)
    return course_table({f"step {step}": scores for step, scores in (first, *later[1 - ROWS :])}, names)


def draw_curves(path: Path, records: Mapping[str, Record], protocol: str) -> None:
    """Losses and scores over the steps, of one run or of several with the same protocol; of one also Delta_m.
    A score of a single step is no curve."""
    from train.output.charts import Panel, save_curves

    tasks = dict.fromkeys(task for record in records.values() for task in record.tasks)
    names = dict.fromkeys(name for record in records.values() for name in shown_scores(record, protocol))
    if len(records) > 1 or all(len(record.scores) < 2 for record in records.values()):  # each is against its own first
        names.pop(DELTA)
    losses = [Panel(task, "loss", {run: record.losses_of(task) for run, record in records.items()}) for task in tasks]
    scores = [
        Panel(title_of(name, "↑↓"), "score", {run: record.scores_of(name) for run, record in records.items()})
        for name in names
    ]
    moving = [panel for panel in scores if any(len(line) > 1 for line in panel.lines.values())]
    save_curves(path, [losses, moving] if moving else [losses])
