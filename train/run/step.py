"""One optimiser step: forward, losses, backward and update, over the batch or over parts of it."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastmoe_lora.ranks import over_ranks, world_size
from kernels import nvtx
from train.datasets.batches import Batch
from train.run.start import Run
from train.tasks import TASKS


@dataclass(frozen=True)
class StepResult:
    """What a step computed, still on the device: the unweighted losses, one per task in the model's order, and further
    numbers by the name that the record gives them, each a tensor without dimensions."""

    losses: Tensor
    extras: dict[str, Tensor]


def training_step(run: Run, batch: Batch) -> StepResult:
    """One optimiser step.

    With ``accumulate`` the batch goes through the model in so many parts, whose gradients add up. Each part then has
    batch-norm statistics and a mutual-information loss of its own; everything else is as for the whole batch. With
    ``on_nonfinite`` "skip" a step whose loss or gradient is not finite leaves model and optimiser as they were.
    """
    set_learning_rate(run)
    return update(run, batch)


def set_learning_rate(run: Run) -> None:
    """That of the step to come; where it is a tensor, since a CUDA graph reads it, the tensor is filled."""
    for group in run.optimizer.param_groups:
        own = run.learning_rate * group.get("lr_scale", 1.0)
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(own)
        else:
            group["lr"] = own


def update(run: Run, batch: Batch) -> StepResult:
    """:func:`training_step` at the learning rate that is set."""
    s = run.settings
    buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()] if s.on_nonfinite == "skip" else []
    run.optimizer.zero_grad()
    totals, parts, shares = whole_totals(run, batch), batch.parts(s.accumulate), []
    for number, part in enumerate(parts):
        with reducing(run, number == len(parts) - 1):
            shares.append(backward(run, part, totals))
    losses = over_ranks(reduce(operator.add, (share.losses for share in shares)))
    extras = {name: reduce(operator.add, (share.extras[name] for share in shares)) for name in shares[0].extras}
    if run.scaler.is_enabled():
        extras["loss_scale"] = run.scaler.scale(losses.new_ones(()))
    with nvtx.span("optimiser"):
        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), s.clip_norm)
        extras["gradient_norm"] = norm  # before clipping
        # The scaler itself skips a step whose scaled gradients overflow.
        if buffers and not (losses.isfinite().all() and (norm.isfinite() or run.scaler.is_enabled())):
            for buffer, before in buffers:
                buffer.copy_(before)
        else:
            run.scaler.step(run.optimizer)
        run.scaler.update()
    return StepResult(losses, extras)


def whole_totals(run: Run, batch: Batch) -> dict[str, Tensor]:
    """What each task's loss divides by, counted over the labels of the whole batch, of all processes."""
    totals = {task: TASKS[task].totals(label) for task, label in batch.labels.items()}
    if world_size() == 1:
        return totals
    flat = over_ranks(torch.cat([totals[task] for task in run.model.tasks]))
    sizes = [len(totals[task]) for task in run.model.tasks]
    return dict(zip(run.model.tasks, flat.split(sizes), strict=True))


@contextmanager
def reducing(run: Run, last: bool) -> Iterator[None]:
    """Processes add up their gradients in the backward pass of the last part alone."""
    if last or not isinstance(run.parallel, DistributedDataParallel):
        yield
    else:
        with run.parallel.no_sync():
            yield


def backward(run: Run, part: Batch, totals: dict[str, Tensor]) -> StepResult:
    """Adds the part's share of the gradient; returns its share of the losses and of the regularisers.

    DistributedDataParallel divides by the number of processes, of which every one has the same regulariser.
    """
    s = run.settings
    with run.computing():
        predictions = run.parallel(part.images, part.index)
    with nvtx.span("losses"):
        shares = {task: TASKS[task].loss(y, part.labels[task], totals[task]) for task, y in predictions.items()}
        objective = reduce(operator.add, (s.task_weights[task] * loss for task, loss in shares.items()))
        objective = objective * world_size()
        regularisers = {name: value / s.accumulate for name, value in run.model.regularisers().items()}
        for name, regulariser in regularisers.items():
            objective = objective + s.regulariser_weights[name] * regulariser
    with nvtx.span("backward"):
        run.scaler.scale(objective).backward()
    losses = torch.stack([shares[task] for task in run.model.tasks]).detach()
    return StepResult(losses, {name: value.detach() for name, value in regularisers.items()})
