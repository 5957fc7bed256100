"""How far the tasks pull the experts that they share into different directions: cosines between their gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from model import MultiTaskModel
from train.datasets.batches import Batch
from train.files.progress import progress
from train.tasks import TASKS


def gradient_cosines(model: MultiTaskModel, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """(always-on experts, sparse experts): cosines (layers, tasks, tasks) between the gradients of the tasks' losses,
    in A and B of those experts, each the mean over the batches.

    NaN where there are no such experts, or no batch has both tasks. The model is in eval(): nothing in it changes.
    """
    model.eval()
    tables = [_cosines(model, batch.to(model.device)) for batch in progress(batches, "gradients")]
    shared, sparse = torch.stack(tables).nanmean(0).unbind(0)
    return shared.cpu(), sparse.cpu()


def _cosines(model: MultiTaskModel, batch: Batch) -> Tensor:
    """(2, layers, tasks, tasks) of one batch."""
    assert model.routing is not None
    layers = model.routing.layers
    weights = [weight for layer in layers for weight in (layer.lora_A, layer.lora_B)]
    predictions = model(batch.images, batch.index)
    losses = [TASKS[task].loss(predictions[task], batch.labels[task]) for task in model.tasks]
    gradients = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses]
    each = [_of_layer(layer, [own[2 * i : 2 * i + 2] for own in gradients]) for i, layer in enumerate(layers)]
    return torch.stack(each, dim=1)


def _of_layer(layer: Any, gradients: list[tuple[Tensor, ...]]) -> Tensor:
    """(2, tasks, tasks) from the gradients (N r, d_in) of A and (d_out, N r) of B for each task."""
    config = layer.adapters.sets[""].config
    cut = (config.experts - config.shared) * config.rank
    shared = torch.stack([torch.cat([a[cut:].flatten(), b[:, cut:].flatten()]) for a, b in gradients])
    sparse = torch.stack([torch.cat([a[:cut].flatten(), b[:, :cut].flatten()]) for a, b in gradients])
    units = [vectors.double() / vectors.double().norm(dim=1, keepdim=True) for vectors in (shared, sparse)]
    nothing = torch.full((len(gradients),) * 2, torch.nan, dtype=torch.float64, device=layer.lora_A.device)
    return torch.stack([unit @ unit.T if unit.shape[1] else nothing for unit in units])
