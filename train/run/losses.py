"""losses.csv: the unweighted loss of every task at every step, as the numbers that were computed."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from train.files.atomic import append_lines, whole_lines, write_text
from train.files.reading import parse_lines, reading

Row = tuple[float, ...]


class LossLog:
    """The losses of a run, in ``path`` and, as far as they were not written yet, on the device; None writes nothing.
    The file is untouched until :meth:`begin`.

    ``tasks`` names the columns after ``step``. ``earlier`` are the rows of the steps before this log begins.
    """

    def __init__(self, path: Path | None, tasks: Sequence[str], earlier: dict[int, Row]) -> None:
        self.path, self.tasks, self.rows = path, tuple(tasks), dict(earlier)
        self._pending: dict[int, Tensor] = {}

    def begin(self) -> None:
        """Write the file anew, with the earlier rows."""
        lines = [",".join(("step", *self.tasks)), *(_line(step, row) for step, row in self.rows.items())]
        if self.path is not None:
            write_text(self.path, "".join(f"{line}\n" for line in lines))

    def add(self, step: int, losses: Tensor) -> None:
        """The losses (tasks,) of ``step``; the host does not wait for them."""
        self._pending[step] = losses

    def flush(self) -> None:
        """Write what was added. UserError, after it is written, where a loss is not finite."""
        if not self._pending:
            return
        table = torch.stack(list(self._pending.values())).tolist()
        new = {step: tuple(row) for step, row in zip(self._pending, table, strict=True)}
        self._pending.clear()
        self.rows |= new
        if self.path is not None:
            append_lines(self.path, (_line(step, row) for step, row in new.items()))
        for step, row in new.items():
            for task, loss in zip(self.tasks, row, strict=True):
                if not math.isfinite(loss):
                    raise NotFiniteError(step, task, loss)

    @property
    def skipped(self) -> int:
        """Steps with a loss that is not finite."""
        return sum(not all(map(math.isfinite, row)) for row in self.rows.values())

    def mean(self, steps: int) -> dict[str, float]:
        """Each task's loss, averaged over those of the last ``steps`` steps that are finite; NaN if none is. A step
        without a label of the task, where its loss is 0, does not count."""
        finite = [row for row in list(self.rows.values())[-steps:] if all(map(math.isfinite, row))]
        rows = torch.tensor(finite, dtype=torch.float64).reshape(-1, len(self.tasks))
        means = rows.sum(0) / rows.count_nonzero(0).clamp(min=min(len(rows), 1))
        return dict(zip(self.tasks, means.tolist(), strict=True))


class NotFiniteError(Exception):
    """The loss of ``task`` at ``step`` is NaN or infinite."""

    def __init__(self, step: int, task: str, loss: float) -> None:
        super().__init__(f"the loss of {task} is {loss} at step {step}")
        self.step, self.task = step, task


def read_losses(path: Path, until: int, tasks: Sequence[str] | None = None) -> tuple[tuple[str, ...], dict[int, Row]]:
    """(tasks, {step: losses}) of a losses.csv up to the step ``until``. Damaged lines are left out, and so
    is one that a kill cut short. Where the ``tasks`` are known, the heading does not matter."""
    with reading(path):
        heading, *lines = whole_lines(path) or [""]
        step, *named = heading.rstrip().split(",")
        if tasks is None and step != "step":
            raise ValueError("it is not a table of losses")
    tasks = tuple(named if tasks is None else tasks)

    def parse(line: str) -> tuple[int, Row]:
        number, *losses = line.split(",")
        if len(losses) != len(tasks):
            raise ValueError
        return int(number), tuple(map(float, losses))

    return tasks, {step: row for step, row in parse_lines(path, lines, parse) if step <= until}


def _line(step: int, row: Row) -> str:
    return ",".join((str(step), *map(repr, row)))
