"""Where the curves of a run go: TensorBoard, Weights & Biases or nowhere.

A tracker gets the lines of the run's record (:mod:`train.run.record`): every number of a line is a curve. Curves are a
convenience, since the record has them all: a tracker that fails (a full disk, a lost connection) is left out from then
on, with one warning, and the run goes on.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from train.files.atomic import make_folder, write_text
from train.run.distributed import leads
from train.run.record import NAME, Line
from train.run.start import Run

Tracker = Callable[[Line], None]


@contextmanager
def tracker(run: Run) -> Iterator[Tracker]:
    """Yields what takes a line of the record. Of several processes the first one has the curves."""
    kind = run.settings.tracker if leads() else "none"
    if kind == "none":
        yield lambda line: None
        return
    attempts, opened = Attempts(kind), ExitStack()
    with attempts.hearing_threads():
        board = attempts.call(lambda: opened.enter_context(TRACKERS[kind](run)))

        def add(line: Line) -> None:
            if not attempts.failed:
                attempts.call(board, line)

        try:
            yield add
        finally:
            attempts.call(opened.__exit__, *sys.exc_info())


def curves_of(line: Line) -> dict[str, float]:
    """The numbers of a line by the names of their curves."""
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, (int, float))}


class Attempts:
    """Calls of a tracker, which raise nothing. The first that fails is a warning."""

    def __init__(self, kind: str) -> None:
        self.kind, self.failed = kind, False

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:  # whatever a package that is no part of the run may raise
            self.fail(error)

    def fail(self, error: BaseException | None) -> None:
        if not self.failed:
            self.failed, reason = True, " ".join(str(error).split())
            print(f"warning: --tracker {self.kind} ends here ({reason}); {NAME} goes on", file=sys.stderr)

    @contextmanager
    def hearing_threads(self) -> Iterator[None]:
        """A block in which an exception in a thread of TensorBoard, which writes by one, is a failure too."""
        before = threading.excepthook

        def hear(arguments: threading.ExceptHookArgs) -> None:
            of_tracker = type(arguments.thread).__module__.startswith("tensorboard")
            self.fail(arguments.exc_value) if of_tracker else before(arguments)

        threading.excepthook = hear
        try:
            yield
        finally:
            threading.excepthook = before


@contextmanager
def _tensorboard(run: Run) -> Iterator[Tracker]:
    """Curves of a run that was killed after its last checkpoint are continued from there."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run.out / "tensorboard", purge_step=run.step + 1) as board:

        def add(line: Line) -> None:
            for name, value in curves_of(line).items():
                board.add_scalar(name, value, line["step"])

        yield add


@contextmanager
def _wandb(run: Run) -> Iterator[Tracker]:
    """One run there for each here, however often it is resumed. Its summary has the last scores, to rank a sweep by."""
    import wandb

    about = {"project": run.settings.wandb_project, "name": run.out.name, "config": asdict(run.settings)}
    with wandb.init(**about, dir=run.out, id=wandb_id(run.out), resume="allow") as tracked:

        def add(line: Line) -> None:
            tracked.log(curves_of(line), step=line["step"])
            if line["kind"] == "scores":
                tracked.summary.update(curves_of(line))

        yield add


def wandb_id(out: Path) -> str:
    """By which Weights & Biases knows the run in the folder ``out``."""
    path = make_folder(out / "wandb") / "id.txt"
    if not path.exists():
        write_text(path, uuid4().hex)
    return path.read_text(encoding="utf-8")


TRACKERS: dict[str, Callable[[Run], AbstractContextManager[Tracker]]] = {"tensorboard": _tensorboard, "wandb": _wandb}
