"""Where the curves of a run go: TensorBoard, Weights & Biases or nowhere.

Curves are a convenience, since losses.csv has every loss: a tracker that fails (a full disk, a lost connection) is left
out from then on, with one warning, and the run goes on.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from train.run.distributed import leads
from train.run.start import Run

Tracker = Callable[[str, float, int], None]  # (name, value, step)


@contextmanager
def tracker(run: Run) -> Iterator[Tracker]:
    """Yields what takes a value of a curve. Of several processes the first one has the curves."""
    kind = run.settings.tracker if leads() else "none"
    if kind == "none":
        yield lambda name, value, step: None
        return
    attempts, opened = Attempts(kind), ExitStack()
    with attempts.hearing_threads():
        board = attempts.call(lambda: opened.enter_context(TRACKERS[kind](run)))

        def add(name: str, value: float, step: int) -> None:
            if not attempts.failed:
                attempts.call(lambda: board(name, value, step))

        try:
            yield add
        finally:
            attempts.call(opened.__exit__, *sys.exc_info())


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
            print(f"warning: --tracker {self.kind} ends here ({reason}); losses.csv goes on", file=sys.stderr)

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
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run.out / "tensorboard") as board:
        yield board.add_scalar


@contextmanager
def _wandb(run: Run) -> Iterator[Tracker]:
    import wandb

    with wandb.init(project="fastmoe_lora", name=run.out.name, dir=run.out, config=asdict(run.settings)) as tracked:
        yield lambda name, value, step: tracked.log({name: value}, step=step)


TRACKERS: dict[str, Callable[[Run], AbstractContextManager[Tracker]]] = {"tensorboard": _tensorboard, "wandb": _wandb}
