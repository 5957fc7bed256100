"""routing.csv: which experts the routers chose at some steps of the training.

A row per step, layer, task and measure, and a column per expert, shared ones last. ``mass`` is the mean gate over the
task's tokens of that step's batch, ``frequency`` the share of them that selected the expert.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fastmoe_lora import RoutingStatistics
from kernels import UserError
from train.evaluation.validate import merged
from train.files.atomic import append_lines, whole_lines, write_text
from train.files.reading import parse_lines, reading
from train.run.distributed import leads
from train.run.start import Run

NAME = "routing.csv"
MEASURES = ("mass", "frequency")


def is_due(run: Run) -> bool:
    """Whether the step to come is recorded: the first, every ``routing_every``-th, and the last."""
    every, step = run.settings.routing_every, run.step + 1
    return bool(every) and run.model.routing is not None and (step in (1, run.total) or step % every == 0)


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """A block with the training step to come, whose routing is written if it is due. Other steps cost nothing."""
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
    if leads():
        _append(run.out / NAME, run.step + 1, run.model.tasks, statistics)


def begin(run: Run, folder: Path | None) -> None:
    """Takes over what was recorded up to the checkpoint ``folder`` that the run continues, and nothing else."""
    path, kept = run.out / NAME, []
    if folder and (given := folder.parent / NAME).exists():
        with reading(given):
            head, *rows = whole_lines(given) or [""]
        steps = parse_lines(given, rows, lambda row: (int(row.partition(",")[0]), row))
        kept = [row for step, row in steps if step <= run.step]
    if kept:
        write_text(path, "".join([head, *kept]))
    else:
        path.unlink(missing_ok=True)


def read_routing(path: Path) -> tuple[tuple[str, ...], dict[int, tuple[Tensor, Tensor]]]:
    """(tasks, {step: (mass, frequency)}), both (layers, tasks, experts); NaN for a task without tokens."""
    if not path.exists():
        raise UserError(f"{path} does not exist: train with --set routing_every=N to record routing")
    with reading(path):
        rows = [line.rstrip().split(",") for line in whole_lines(path)][1:]
        blocks: dict[int, list[list[str]]] = {}
        for row in rows:
            blocks.setdefault(int(row[0]), []).append(row)
        first = next(iter(blocks.values()), [])
        tasks = tuple(dict.fromkeys(row[2] for row in first))
        found = {step: _tables(block, len(tasks)) for step, block in blocks.items() if len(block) == len(first)}
    if not found:
        raise UserError(f"{path} holds no record yet: wait for the first step")
    return tasks, found


def _tables(block: list[list[str]], tasks: int) -> tuple[Tensor, Tensor]:
    """(mass, frequency) of one step."""
    values = torch.tensor([[float(cell) for cell in row[4:]] for row in block], dtype=torch.float64)
    mass, frequency = values.view(-1, tasks, len(MEASURES), values.shape[1]).unbind(2)
    return mass, frequency


def _append(path: Path, step: int, tasks: tuple[str, ...], statistics: RoutingStatistics) -> None:
    both = torch.stack(statistics.compute(), dim=2)  # (layers, tasks, measures, experts)
    lines = [
        f"{step},{layer},{task},{measure}," + ",".join(f"{value:.6g}" for value in values)
        for layer, of_tasks in enumerate(both.tolist())
        for task, measures in zip(tasks, of_tasks, strict=True)
        for measure, values in zip(MEASURES, measures, strict=True)
    ]
    if not path.exists():
        lines.insert(0, "step,layer,task,measure," + ",".join(map(str, range(both.shape[-1]))))
    append_lines(path, lines)
