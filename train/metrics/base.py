"""What every metric is: sums that add."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Additive:
    """An accumulator whose ``state``, one float64 tensor, is a sum over pixels or images.

    The states of two sets add up to the state of both, so batches and processes may divide a set in any way;
    across processes one all-reduce (sum) of ``state`` does it. Counts are exact up to 2**53.
    """

    def __init__(self, *shape: int) -> None:
        self.state = torch.zeros(shape, dtype=torch.float64)

    def add(self, increment: Tensor) -> None:
        """Add to ``state``, which lives where its latest increment does."""
        self.state = self.state.to(increment.device) + increment

    def merge(self, other: "Additive") -> None:
        """Take in the set that ``other`` has seen."""
        self.add(other.state)


class Metric(Additive, ABC):
    """A score of one task over a set; scores are percent, degrees or a loss, and NaN where no label defines them."""

    @torch.no_grad()
    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Take in a batch: the raw output of the head and the labels, as the task's loss gets them."""
        self.count(self.postprocess(prediction), label)

    @staticmethod
    @abstractmethod
    def postprocess(prediction: Tensor) -> Tensor:
        """What a head says by its raw output (n, C, H, W): class ids, probabilities, vectors or logits."""

    @abstractmethod
    def count(self, postprocessed: Tensor, label: Tensor) -> None:
        """Take in a batch of what :meth:`postprocess` gives, wherever it comes from, and its labels."""

    @abstractmethod
    def compute(self) -> dict[str, float | None]:
        """The scores of the set so far, by name; None for a score that has a name but is not computed."""


def histogram(cell: Tensor, valid: Tensor, cells: int) -> Tensor:
    """int64 (cells,): how many valid pixels each cell has. Void pixels go to one cell more, which is dropped."""
    return torch.bincount(torch.where(valid, cell, cells).flatten(), minlength=cells + 1)[:-1]
