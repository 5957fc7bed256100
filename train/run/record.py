"""metrics.jsonl: everything that a run measures in its course, one JSON object a line.

    {"kind": "step", "step": 10, "lr": 0.0005, "loss/seg": 1.25, "loss/edge": 0.07, "mi": -0.02, "gradient_norm": 3.5}
    {"kind": "pace", "step": 10, "images_per_second": 81.0, "images_per_second_without_waiting": 95.0}
    {"kind": "routing", "step": 10, "mass": {"seg": [[0.1, ...], ...], ...}, "frequency": {"seg": ...}}
    {"kind": "scores", "step": 50, "delta_m": 3.1, "seg/mIoU": 41.2, "edge/loss": 0.06}

Losses are unweighted. Numbers are written as they were computed, NaN and infinity as Python's json writes them.
Trackers get the same lines (:mod:`train.run.tracking`): every number of a line is a curve, by its name.
"""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import UserError
from train.files.atomic import append_lines, whole_lines, write_text
from train.files.reading import parse_lines, reading
from train.tasks import Metrics

NAME = "metrics.jsonl"
LOSS = "loss/"  # before the name of a task
Line = dict[str, Any]
Row = tuple[float, ...]


class Record:
    """The record of a run, in ``path`` and, as far as it was not written yet, on the device; None writes nothing. The
    file is untouched until :meth:`begin`.

    ``losses``, rows in the order of ``tasks``, and ``scores`` by name are what it says by step. ``earlier`` are the
    lines of the steps before this record begins. ``board`` gets every new line, after the file.
    """

    def __init__(self, path: Path | None, tasks: Sequence[str], earlier: Sequence[Line] = ()) -> None:
        self.path, self.tasks = path, tuple(tasks)
        self.losses: dict[int, Row] = {}
        self.scores: dict[int, dict[str, float | None]] = {}
        self.board: Callable[[Line], None] = lambda line: None
        self._earlier = earlier
        self._pending: list[tuple[Line, Mapping[str, Tensor]]] = []
        for line in earlier:
            self._take(line)

    def begin(self) -> None:
        """Write the file anew, with the earlier lines."""
        if self.path is not None:
            write_text(self.path, "".join(f"{json.dumps(line)}\n" for line in self._earlier))
        self._earlier = ()

    def add_step(self, step: int, losses: Tensor, extras: Mapping[str, Tensor], lr: float) -> None:
        """The losses (tasks,) of ``step`` and further numbers by name; the host does not wait for them."""
        named = {LOSS + task: loss for task, loss in zip(self.tasks, losses, strict=True)}
        self._pending.append(({"kind": "step", "step": step, "lr": lr}, {**named, **extras}))

    def add_scores(self, step: int, delta_m: float | None, metrics: Metrics) -> None:
        """The scores at ``step``, unless they are known."""
        if step not in self.scores:
            scores = {f"{task}/{key}": value for task, values in metrics.items() for key, value in values.items()}
            self.add("scores", step, {"delta_m": delta_m} | scores)

    def add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """A line of another kind, whose ``values`` are on the host."""
        self._pending.append(({"kind": kind, "step": step, **values}, {}))

    def flush(self) -> None:
        """Write what was added. NotFiniteError, after it is written, where a loss is not finite."""
        tensors = [tensor for _, of_line in self._pending for tensor in of_line.values()]
        numbers = iter(torch.stack(tensors).tolist() if tensors else ())
        lines = [line | {name: next(numbers) for name in of_line} for line, of_line in self._pending]
        self._pending.clear()
        if self.path is not None:
            append_lines(self.path, map(json.dumps, lines))
        for line in lines:
            self._take(line)
            self.board(line)
        for line in lines:
            for task in self.tasks if line["kind"] == "step" else ():
                if not math.isfinite(line[LOSS + task]):
                    raise NotFiniteError(line["step"], task, line[LOSS + task])

    def _take(self, line: Line) -> None:
        if line["kind"] == "step":
            self.losses[line["step"]] = tuple(line[LOSS + task] for task in self.tasks)
        elif line["kind"] == "scores":
            self.scores[line["step"]] = {name: value for name, value in line.items() if name not in ("kind", "step")}

    def losses_of(self, task: str) -> dict[int, float]:
        """Those that are finite, by step; a loss of 0 is that of a batch without labels of the task."""
        if task not in self.tasks:
            return {}
        column = self.tasks.index(task)
        return {step: row[column] for step, row in self.losses.items() if row[column] and math.isfinite(row[column])}

    def scores_of(self, name: str) -> dict[int, float]:
        """Those that are known, by step."""
        return {step: value for step, scores in self.scores.items() if (value := scores.get(name)) is not None}

    @property
    def skipped(self) -> int:
        """Steps with a loss that is not finite."""
        return sum(not all(map(math.isfinite, row)) for row in self.losses.values())

    def mean(self, steps: int) -> dict[str, float]:
        """Each task's loss, averaged over those of the last ``steps`` steps that are finite; NaN if none is. A step
        without a label of the task, where its loss is 0, does not count."""
        finite = [row for row in list(self.losses.values())[-steps:] if all(map(math.isfinite, row))]
        rows = torch.tensor(finite, dtype=torch.float64).reshape(-1, len(self.tasks))
        means = rows.sum(0) / rows.count_nonzero(0).clamp(min=min(len(rows), 1))
        return dict(zip(self.tasks, means.tolist(), strict=True))


class NotFiniteError(Exception):
    """The loss of ``task`` at ``step`` is NaN or infinite."""

    def __init__(self, step: int, task: str, loss: float) -> None:
        super().__init__(f"the loss of {task} is {loss} at step {step}")
        self.step, self.task = step, task


def by_task(scores: Mapping[str, float | None]) -> Metrics:
    """Scores by name as {task: {score: value}}."""
    metrics: Metrics = {}
    for name, value in scores.items():
        task, slash, key = name.partition("/")
        if slash:
            metrics.setdefault(task, {})[key] = value
    return metrics


def read_record(given: Path) -> Record:
    """What is recorded of the run in a folder, or in a metrics.jsonl; UserError where that is no step."""
    path = given / NAME if given.is_dir() else given
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the output folder of python -m train")
    lines = read_lines(path)
    tasks = next((tasks_of(line) for line in lines if line["kind"] == "step"), ())
    if not tasks:
        raise UserError(f"{path} holds no losses of a step: give the output folder of python -m train")
    return Record(None, tasks, lines)


def read_lines(path: Path, tasks: Sequence[str] = (), until: int = sys.maxsize) -> list[Line]:
    """The lines of a metrics.jsonl up to the step ``until``. Damaged ones are left out and named, and so is one that a
    kill cut short. A step has losses of the ``tasks``; where they are not known, of those of the first step."""
    expected = tuple(tasks)

    def parse(text: str) -> Line:
        nonlocal expected
        line = json.loads(text)
        if "\ufffd" in text or not isinstance(line, dict) or not _is_sound(line):
            raise ValueError
        if line["kind"] == "step":
            expected = expected or tasks_of(line)
            if tasks_of(line) != expected or not all(type(line[LOSS + task]) is float for task in expected):
                raise ValueError
        return line

    with reading(path):
        texts = whole_lines(path)
    return [line for line in parse_lines(path, texts, parse) if line["step"] <= until]


def tasks_of(line: Line) -> tuple[str, ...]:
    """The tasks that a step has losses of."""
    return tuple(name.removeprefix(LOSS) for name in line if name.startswith(LOSS))


def _is_sound(line: Line) -> bool:
    numbers = (value for name, value in line.items() if "/" in name or name == "delta_m")
    known = type(line.get("step")) is int and isinstance(line.get("kind"), str)
    return known and all(value is None or type(value) in (int, float) for value in numbers)
