"""The scores of a run in its course: Delta_m against the first, their table and curves."""

from collections.abc import Mapping
from pathlib import Path

from train.evaluation.baselines import delta_m, references_of
from train.output.scores import DELTA, course_table, title_of
from train.run.distributed import leads
from train.run.record import Record, by_task
from train.run.start import Run
from train.tasks import Metrics

CURVES = "curves.png"
ROWS = 3  # of the table: the first scores and the newest


def record_scores(run: Run, metrics: Metrics) -> None:
    """Records the scores of this step, with Delta_m against the first, draws the curves."""
    known, protocol = run.record.scores, run.data[0].protocol.reported
    first = by_task(next(iter(known.values()))) if known else metrics
    delta = delta_m(metrics, references_of({"protocol": protocol, "metrics": first}))
    run.record.add_scores(run.step, delta, metrics)
    run.record.flush()
    if leads():
        draw_curves(run.out / CURVES, {run.out.name: run.record}, protocol)


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
    """Losses and scores over the steps, of one run or of several with the same protocol; of one also Delta_m."""
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
    known = [panel for panel in scores if any(panel.lines.values())]
    save_curves(path, [losses, known] if known else [losses])
