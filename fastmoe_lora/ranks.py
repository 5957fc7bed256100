"""Sums over the processes of a data-parallel run; without such a run each function returns what it is given.

Each process has a slice of the batch. A loss that is a ratio of sums over the whole batch is the same number on every
process if the sums are taken over all of them:

    y = sum over processes of x            backward: dx = sum over processes of dy

The backward sum makes a gradient that of the sum of all processes' losses. DistributedDataParallel divides gradients by
the number of processes, which leaves that of the loss itself.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def over_ranks(x: Tensor) -> Tensor:
    """The sum of ``x`` over all processes, differentiable; every process must call it, in the same order."""
    return _Sum.apply(x) if world_size() > 1 else x


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _sum(dy)


def _sum(x: Tensor) -> Tensor:
    total = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def gathered(value: T) -> list[T]:
    """The ``value`` of every process, by rank. It is pickled: keep it small, and on the CPU."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
