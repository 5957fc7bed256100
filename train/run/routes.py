"""Routing over a training: which experts the routers chose at some of its steps, in the run's record.

``mass`` is the mean gate over a task's tokens of that step's batch, ``frequency`` the share of them that selected the
expert: lists by layer and expert, shared experts last, of each task.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastmoe_lora import RoutingStatistics
from kernels import UserError
from train.evaluation.validate import merged
from train.files.reading import reading
from train.run.record import NAME, read_lines
from train.run.start import Run

MEASURES = ("mass", "frequency")


def is_due(run: Run) -> bool:
    """Whether the step to come is recorded: the first, every ``routing_every``-th, and the last."""
    every, step = run.settings.routing_every, run.step + 1
    return bool(every) and run.model.routing is not None and (step in (1, run.total) or step % every == 0)


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """A block with the training step to come, whose routing is recorded if it is due. Other steps cost nothing."""
    routing = run.model.routing
    if routing is None or not is_due(run):
        yield
        return
    routing.statistics = RoutingStatistics()
    try:
        yield
        statistics = merged(routing.statistics)
    finally:
        routing.statistics = None
    tables = {}
    for measure, values in zip(MEASURES, statistics.compute(), strict=True):  # (layers, tasks, experts)
        tables[measure] = {task: rounded(values[:, i]) for i, task in enumerate(run.model.tasks)}
    run.record.add("routing", run.step + 1, tables)


def rounded(values: Tensor) -> list[list[float]]:
    """To six digits."""
    return [[float(f"{value:.6g}") for value in row] for row in values.tolist()]


def read_routing(run: Path) -> tuple[tuple[str, ...], dict[int, tuple[Tensor, Tensor]]]:
    """(tasks, {step: (mass, frequency)}), both (layers, tasks, experts); NaN for a task without tokens."""
    path = run / NAME
    lines = [line for line in read_lines(path) if line["kind"] == "routing"] if path.exists() else []
    if not lines:
        raise UserError(f"{path} has no routing: train with --set routing_every=N to record it")
    with reading(path):
        tasks = tuple(lines[0]["mass"])
        tables = {line["step"]: [_table(line[measure], tasks) for measure in MEASURES] for line in lines}
    return tasks, {step: (mass, frequency) for step, (mass, frequency) in tables.items()}


def _table(of_tasks: dict[str, list[list[float]]], tasks: tuple[str, ...]) -> Tensor:
    return torch.tensor([of_tasks[task] for task in tasks], dtype=torch.float64).transpose(0, 1)
