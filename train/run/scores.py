"""The scores of a run in its course: Delta_m against the first, and their table."""

from train.evaluation.baselines import delta_m, references_of
from train.output.scores import DELTA, course_table
from train.run.record import Record, by_task
from train.run.start import Run
from train.tasks import Metrics

ROWS = 3  # of the table: the first scores and the newest


def record_scores(run: Run, metrics: Metrics) -> None:
    """Records the scores of this step, with Delta_m against the first."""
    known, protocol = run.record.scores, run.data[0].protocol.reported
    first = by_task(next(iter(known.values()))) if known else metrics
    delta = delta_m(metrics, references_of({"protocol": protocol, "metrics": first}))
    run.record.add_scores(run.step, delta, metrics)
    run.record.flush()


def shown_scores(record: Record, protocol: str) -> list[str]:
    """The names of the scores that enter Delta_m, and of Delta_m."""
    first = by_task(next(iter(record.scores.values()), {}))
    references = references_of({"protocol": protocol, "metrics": first})
    return [*(f"{task}/{reference['metric']}" for task, reference in references.items()), DELTA]


def describe_scores(run: Run) -> str:
    """The first scores and the newest, as a table."""
    (first, *later), names = run.record.scores.items(), shown_scores(run.record, run.data[0].protocol.reported)
    return course_table({f"step {step}": scores for step, scores in (first, *later[1 - ROWS :])}, names)
