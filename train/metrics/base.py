"""The base of all metrics: accumulators whose states add up."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor


class Additive:
    """An accumulator whose ``state``, one float64 tensor, is a sum over pixels or images.

    The states of two sets add up to the state of their union. So a set may be divided into batches and over processes
    in any way, and one all-reduce (sum) of ``state`` combines processes. Counts are exact up to 2**53.
    """

    def __init__(self, *shape: int) -> None:
        self.state = torch.zeros(shape, dtype=torch.float64)

    def add(self, increment: Tensor) -> None:
        """Adds to ``state``, which moves to the device of ``increment``."""
        self.state = self.state.to(increment.device) + increment

    def __getstate__(self) -> dict[str, Any]:
        """On its way to another process the state is on the CPU."""
        return self.__dict__ | {"state": self.state.cpu()}

    def merge(self, other: "Additive") -> None:
        """Adds the state of ``other``."""
        self.add(other.state)


class Metric(Additive, ABC):
    """A score of one task over a set; scores are percent, degrees or a loss, and NaN where no label defines them."""

    @torch.no_grad()
    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Adds a batch: the raw output of the head and the labels, as the task's loss gets them."""
        self.count(self.postprocess(prediction), label)

    @staticmethod
    @abstractmethod
    def postprocess(prediction: Tensor) -> Tensor:
        """Raw output of a head (n, C, H, W) -> class ids, probabilities, vectors or logits."""

    @abstractmethod
    def count(self, postprocessed: Tensor, label: Tensor) -> None:
        """Adds a batch of postprocessed predictions, from a model or from files, and its labels."""

    @abstractmethod
    def compute(self) -> dict[str, float | None]:
        """The scores of the set so far, by name; None for a score that is computed elsewhere."""


def histogram(cell: Tensor, valid: Tensor, cells: int) -> Tensor:
    """int64 (cells,): valid pixels per cell. Void pixels go to one extra cell, which is dropped."""
    return torch.bincount(torch.where(valid, cell, cells).flatten(), minlength=cells + 1)[:-1]
