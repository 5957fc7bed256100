"""Where the curves of a run go: TensorBoard, Weights & Biases or nowhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

from train.run.distributed import leads
from train.run.start import Run

Tracker = Callable[[str, float, int], None]  # (name, value, step)


@contextmanager
def tracker(run: Run) -> Iterator[Tracker]:
    """Yields what takes a value of a curve. Of several processes the first one has the curves."""
    kind = run.settings.tracker if leads() else "none"
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(run.out / "tensorboard") as board:
            yield board.add_scalar
    elif kind == "wandb":
        import wandb

        with wandb.init(project="fastmoe_lora", name=run.out.name, dir=run.out, config=asdict(run.settings)) as tracked:
            yield lambda name, value, step: tracked.log({name: value}, step=step)
    else:
        yield lambda name, value, step: None
