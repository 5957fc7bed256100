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
from train.run.gradients import TaskGradients
from train.run.start import Run
from train.run.weighting import average_gradients
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
    gradients = TaskGradients(run.model) if run.weighting.sees_gradients else None
    for number, part in enumerate(parts):
        with reducing(run, number == len(parts) - 1):
            shares.append(backward(run, part, totals, gradients))
    losses = over_ranks(reduce(operator.add, (share.losses for share in shares)))
    extras = {name: reduce(operator.add, (share.extras[name] for share in shares)) for name in shares[0].extras}
    extras |= weigh(run, losses, gradients)
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


def backward(run: Run, part: Batch, totals: dict[str, Tensor], gradients: TaskGradients | None) -> StepResult:
    """Adds the part's share of the gradient, task by task where a weighting sees ``gradients``; returns its share of
    the losses and of the regularisers.

    DistributedDataParallel divides by the number of processes, of which every one has the same regulariser. It has no
    part in ``gradients``, which are no single backward pass.
    """
    s, tasks = run.settings, run.model.tasks
    with run.computing():
        predictions = (run.parallel if gradients is None else run.model)(part.images, part.index)
    with nvtx.span("losses"):
        shares = [TASKS[task].loss(predictions[task], part.labels[task], totals[task]) for task in tasks]
        weights = run.weighting(run.step) * world_size()
        weighted = [weight * share for weight, share in zip(weights, shares, strict=True)]
        regularisers = {name: value / s.accumulate for name, value in run.model.regularisers().items()}
        rest = run.weighting.penalty([totals[task] for task in tasks]) / s.accumulate
        for name, regulariser in regularisers.items():
            rest = rest + s.regulariser_weights[name] * regulariser
    with nvtx.span("backward"):
        if gradients is None:
            run.scaler.scale(reduce(operator.add, weighted) + rest).backward()
        else:
            gradients.add(weighted, rest)
    return StepResult(torch.stack(shares).detach(), {name: value.detach() for name, value in regularisers.items()})


def weigh(run: Run, losses: Tensor, gradients: TaskGradients | None) -> dict[str, Tensor]:
    """Lets the weighting see the ``losses`` of the whole batch and complete the gradient; returns its weights."""
    weights = run.weighting.factors(run.step).detach()
    if gradients is None:
        average_gradients(run.weighting)
    else:
        weights = weights * gradients.combine(run.weighting, losses, run.step)
    run.weighting.observe(losses, run.step)
    named = {f"weight/{task}": weight for task, weight in zip(run.model.tasks, weights, strict=True)}
    return {} if run.settings.weighting == "fixed" else named
