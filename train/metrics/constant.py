"""The constant baseline: the best prediction that ignores the image.

``update(label)`` fits it on the training labels; ``prediction(label)`` then has the form of a head's output, so
that the metrics can score it on the validation labels. States add up like those of metrics.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from train.metrics.base import Additive


class Constant(Additive, ABC):
    """The best constant output of one head."""

    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self._output: Tensor | None = None  # kept between predictions, forgotten when labels are added

    def add(self, increment: Tensor) -> None:
        super().add(increment)
        self._output = None

    @abstractmethod
    def update(self, label: Tensor) -> None:
        """Adds a batch of training labels."""

    @abstractmethod
    def output(self) -> Tensor:
        """The best output for the labels added so far, float32 (channels,)."""

    def prediction(self, label: Tensor) -> Tensor:
        """``output()`` at every pixel of ``label`` (n, ..., H, W): a view, float32 (n, channels, H, W)."""
        if self._output is None:
            self._output = self.output().to(label.device)
        return self._output[:, None, None].expand(len(label), -1, *label.shape[-2:])


class LabelCounts(Constant):
    """A constant that depends on how often each class is labelled: ``state`` (C,) counts valid pixels."""

    def update(self, label: Tensor) -> None:
        """``label`` uint8 (n, H, W)."""
        self.add(torch.bincount(label.flatten(), minlength=256)[: len(self.state)])
