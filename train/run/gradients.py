"""The gradient of every task on its own, for weightings that look at them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmoe_lora.ranks import over_ranks, world_size
from kernels import UserError
from train.run.weighting import Weighting

PER_TASK = ("task_embed", "routers", "global_bias")  # parameters with rows for each task, which share nothing


class TaskGradients:
    """Adds up the gradients of a batch over its parts.

    Tasks share a parameter if the losses of two of them reach it: backbone, adapters, experts. Its gradients are kept
    by task. Every other parameter, of a head, a router or a task embedding, gets the sum of its gradients at once.
    """

    def __init__(self, model: nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.divisible = [not name.endswith(PER_TASK) for name, _ in named]
        self.by_task: dict[nn.Parameter, Tensor] = {}  # (tasks, numbers)

    def add(self, losses: Sequence[Tensor], rest: Tensor) -> None:
        """The gradients of the weighted ``losses``, one per task, and of what no task alone adds, ``rest``."""
        rows = [torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True) for loss in losses]
        if rest.requires_grad:
            self._add_to_all(torch.autograd.grad(rest, self.parameters, allow_unused=True))
        for parameter, divisible, *row in zip(self.parameters, self.divisible, *rows, strict=True):
            reached = [gradient for gradient in row if gradient is not None]
            if divisible and len(reached) > 1:
                table = torch.stack([torch.zeros_like(parameter) if g is None else g for g in row]).flatten(1)
                self.by_task[parameter] = self.by_task[parameter] + table if parameter in self.by_task else table
            else:
                for gradient in reached:
                    _add_gradient(parameter, gradient)

    def _add_to_all(self, gradients: tuple[Tensor | None, ...]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                _add_gradient(parameter, gradient)

    def combine(self, weighting: Weighting, losses: Tensor, step: int) -> Tensor:
        """Fill the gradients of all parameters, the mean over processes; returns the weights (tasks,). UserError where
        the tasks share nothing."""
        if not self.by_task:
            raise UserError(
                "the tasks share no trained parameter whose gradients --weighting could compare: leave it out"
            )
        jacobian = torch.cat(list(self.by_task.values()), dim=1)
        if world_size() > 1:
            jacobian = over_ranks(jacobian) / world_size()
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.copy_(over_ranks(parameter.grad) / world_size())
        weights = weighting.combine(jacobian @ jacobian.T, losses, step)
        sizes = [parameter.numel() for parameter in self.by_task]
        for parameter, gradient in zip(self.by_task, (weights @ jacobian).split(sizes), strict=True):
            _add_gradient(parameter, gradient.view_as(parameter))
        return weights


def _add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """In the parameter's memory layout, which fused optimisers take for granted."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad += gradient
