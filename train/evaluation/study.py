"""What the runs of a study say: Delta_m against single-task models of the same seed, means, spread and differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student

from kernels.errors import UserError
from train.evaluation.baselines import Reference, delta_m, references_of
from train.evaluation.results import Results
from train.output.tables import format_table

CONFIDENCE = 0.95


class Difference(NamedTuple):
    """The mean of paired differences and its confidence interval; both ends are None for a single pair."""

    mean: float
    low: float | None
    high: float | None

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` where the interval lies on one side of zero."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "inconclusive"
        return "better" if self.low > 0 else "worse"


@dataclass(frozen=True)
class Summary:
    """One arm over all seeds, in their order: the score of each task that enters Delta_m, and Delta_m. ``against`` is
    Delta_m minus that of the first arm, None for the first arm itself."""

    trainable: int
    scores: dict[str, list[float]]
    delta: list[float]
    against: Difference | None


@dataclass(frozen=True)
class Comparison:
    """The arms, the scores of the single-task models by task and seed, and which score is compared."""

    arms: dict[str, Summary]
    singles: dict[str, list[float]]
    scores: dict[str, Reference]


def compare(arms: Mapping[str, Sequence[Results]], singles: Mapping[str, Sequence[Results]]) -> Comparison:
    """``arms[name][i]`` and ``singles[task][i]`` are the results of the i-th seed, whose images and batches are the
    same in all of them, so that differences between arms are paired."""
    baselines = {task: [references_of(results)[task] for results in runs] for task, runs in singles.items()}
    by_seed = [dict(zip(baselines, row, strict=True)) for row in zip(*baselines.values(), strict=True)]
    deltas = {
        name: [_delta(results, baseline) for results, baseline in zip(runs, by_seed, strict=True)]
        for name, runs in arms.items()
    }
    first = next(iter(deltas))
    return Comparison(
        {
            name: Summary(
                runs[0]["parameters"]["trainable"],
                {task: [own["metrics"][task][ref["metric"]] for own in runs] for task, ref in by_seed[0].items()},
                deltas[name],
                None if name == first else paired(deltas[name], deltas[first]),
            )
            for name, runs in arms.items()
        },
        {task: [reference["value"] for reference in row] for task, row in baselines.items()},
        by_seed[0],
    )


def _delta(results: Results, baseline: Mapping[str, Reference]) -> float:
    value = delta_m(results["metrics"], baseline)
    if value is None:
        raise UserError("Delta_m is not defined: a single-task model scores 0, or an arm lacks its score: train longer")
    return value


def paired(values: Sequence[float], others: Sequence[float]) -> Difference:
    """The mean of values - others with Student's interval of CONFIDENCE for pairs."""
    differences = [ours - theirs for ours, theirs in zip(values, others, strict=True)]
    middle, n = mean(differences), len(differences)
    if n < 2:
        return Difference(middle, None, None)
    reach = float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(differences) / sqrt(n)
    return Difference(middle, middle - reach, middle + reach)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Every number of the table, and those that it was computed from."""
    return {
        "scores": {task: {"key": ref["metric"], "higher": ref["higher"]} for task, ref in comparison.scores.items()},
        "single_task_models": comparison.singles,
        "arms": {
            name: {
                "trainable": arm.trainable,
                "scores": arm.scores,
                "delta_m": arm.delta,
                "delta_m_mean": mean(arm.delta),
                "delta_m_spread": stdev(arm.delta) if len(arm.delta) > 1 else None,
                "against_first": arm.against and arm.against._asdict() | {"verdict": arm.against.verdict},
            }
            for name, arm in comparison.arms.items()
        },
    }


def table(comparison: Comparison, markdown: bool = True) -> str:
    """One row for the single-task models and one per arm: trainable parameters, scores, Delta_m, and its difference to
    the first arm. The spread is the standard deviation over seeds."""
    heads = [f"{task} {ref['metric']} {'↑' if ref['higher'] else '↓'}" for task, ref in comparison.scores.items()]
    first = next(iter(comparison.arms))
    rows = [["arm", "trained M", *heads, "Delta_m % ↑", f"against {first}"]]
    rows.append(["single-task models", "", *(with_spread(v) for v in comparison.singles.values()), "0", ""])
    for name, arm in comparison.arms.items():
        scores = [with_spread(arm.scores[task]) for task in comparison.scores]
        against = describe(arm.against) if arm.against else ""
        rows.append([name, f"{arm.trainable / 1e6:.3f}", *scores, with_spread(arm.delta, sign=True), against])
    return format_table(rows, markdown)


def with_spread(values: Sequence[float], sign: bool = False) -> str:
    """The mean and, of more than one value, the standard deviation, to two decimals or, below 1, to four."""
    digits = 4 if abs(mean(values)) < 1 and not sign else 2
    text = f"{mean(values):{'+' if sign else ''}.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def describe(difference: Difference) -> str:
    if difference.low is None:
        return f"{difference.mean:+.2f}: {difference.verdict}"
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]: {difference.verdict}"
