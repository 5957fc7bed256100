"""The dense prediction tasks, one object each. A new task is one file here and one entry in :data:`TASKS`."""

from collections.abc import Sequence

from kernels.errors import UserError
from train.metrics.base import Metric
from train.metrics.constant import Constant
from train.tasks.base import GREY, VOID, Headline, Picture, Shape, Task
from train.tasks.cls import ImageClass
from train.tasks.depth import DepthTask
from train.tasks.edge import EdgeTask
from train.tasks.normals import NormalsTask
from train.tasks.parts import PART_NAMES, HumanParts
from train.tasks.sal import SaliencyTask
from train.tasks.seg import Segmentation

__all__ = [
    "DEFAULT_TASKS", "GREY", "PART_NAMES", "TASKS", "VOID", "Classes", "Headline", "Metrics", "Picture",
    "Shape", "Task", "build_constants", "build_metrics", "output_channels", "parse_tasks", "shown_headlines",
]  # fmt: skip

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Segmentation(), HumanParts(), SaliencyTask(), NormalsTask(), EdgeTask(), DepthTask(), ImageClass())
}
DEFAULT_TASKS = ("seg", "parts", "sal", "normals", "edge")  # PASCAL-Context's


Classes = dict[str, tuple[str, ...]]  # names of the classes of a task in a data set
Metrics = dict[str, dict[str, float | None]]  # {task: {score: value}}, None where nothing was labelled


def shown_headlines(scores: Sequence[Metrics]) -> list[tuple[str, Headline]]:
    """The (task, headline) pairs that a table of these ``scores`` shows."""

    def values(task: str, key: str) -> list[float | None]:
        return [score.get(task, {}).get(key) for score in scores]

    return [
        (name, headline)
        for name, task in TASKS.items()
        for headline in task.headlines
        if any(value is not None for value in values(name, headline.key))
        and values(name, headline.key) != values(name, headline.variant_of)
    ]


def parse_tasks(text: str) -> tuple[str, ...]:
    """``"semseg,edge"`` -> ``("seg", "edge")``: canonical names in canonical order, each once."""
    canonical = {alias: task.name for task in TASKS.values() for alias in (task.name, *task.aliases)}
    names = []
    for given in (name.strip() for name in text.split(",")):
        if given not in canonical:
            aliases = " and ".join(alias for task in TASKS.values() for alias in task.aliases)
            raise UserError(f"unknown task {given!r}: choose among {', '.join(TASKS)}, or {aliases}")
        if canonical[given] in names:
            raise UserError(f"task {canonical[given]!r} is given twice: name each task once")
        names.append(canonical[given])
    return tuple(task for task in TASKS if task in names)


def output_channels(tasks: tuple[str, ...], classes: Classes) -> dict[str, int]:
    """Channels that each task's head predicts."""
    return {name: TASKS[name].head_channels(classes.get(name, ())) for name in tasks}


def build_metrics(tasks: tuple[str, ...], classes: Classes) -> dict[str, Metric]:
    """One fresh metric per task."""
    return {name: TASKS[name].metric(classes.get(name, ())) for name in tasks}


def build_constants(tasks: tuple[str, ...], classes: Classes) -> dict[str, Constant]:
    """One unfitted constant per task."""
    return {name: TASKS[name].constant(classes.get(name, ())) for name in tasks}
