"""What a model needs of its backbone: maps of features on several levels, and where experts and LoRA go."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

Pairs = Sequence[tuple[Tensor, Tensor]]  # per task the rows (n_t,) of its images, and its embedding (width,)

TAPS = 4  # maps of a backbone, which decoders and the pyramid read


class Level(NamedTuple):
    """A map's channels, and how many pixels of the image a cell of it is high and wide."""

    channels: int
    stride: int


class FeatureMap(NamedTuple):
    """``tokens`` (n, prefix + h*w, channels) of the ``grid`` (h, w): cells row by row, after tokens without a place."""

    tokens: Tensor
    grid: tuple[int, int]


def to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, prefix + h*w, d) -> (n, d, h, w): the class token and the registers, which come first, are dropped.

    It is a view, whose memory is channels-last. Convolutions, norms and resizes keep that order."""
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def spaced(depth: int) -> tuple[int, ...]:
    """The indices of TAPS of ``depth`` blocks, evenly spaced, the last block among them."""
    return tuple(math.ceil(depth * k / TAPS) - 1 for k in range(1, TAPS + 1))


class Backbone(nn.Module):
    """Normalised images (B, 3, H, W) -> a map for each of ``levels``, fine ones first.

    With ``pairs`` the maps are those of the (image, task) pairs, task-major, and every pair goes through the backbone
    once. ``last`` asks for the last map alone. The sides of images are multiples of ``patch``, task embeddings have
    ``width`` channels.

    ``sites`` and ``lora_layers`` are patterns of :func:`fastmoe_lora.adapt`, of what may get experts and plain LoRA, by
    the names that a user chooses among; a site of None is the FFN of every block, as ``adapt`` finds it.
    """

    levels: tuple[Level, ...]
    patch: int
    width: int
    sites: Mapping[str, str | None]
    lora_layers: Mapping[str, Sequence[str]]

    def forward(self, images: Tensor, pairs: Pairs | None = None, last: bool = False) -> tuple[FeatureMap, ...]:
        raise NotImplementedError

    def compile_training(self, last: bool) -> None:
        """Compile what training steps run to get the maps, or the ``last`` one alone."""
        raise NotImplementedError
