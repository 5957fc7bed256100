"""What a decoder reads and gives."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Features:
    """``maps``: features of four blocks, (rows, width, h, w) each. ``index`` {task: (n_t,) int64}: the rows that each
    task reads. A row is an image or, with ``per_task``, one task's features of an image."""

    maps: tuple[Tensor, ...]
    index: Mapping[str, Tensor]
    per_task: bool = False


class Frame(NamedTuple):
    """What a decoder is built for: the encoder's width and grid (h, w), and the output channels of each task."""

    width: int
    grid: tuple[int, int]
    channels: Mapping[str, int]


class Decoder(nn.Module):
    """Features -> predictions {task: (n_t, channels, h', w')} at a resolution of the decoder's choice."""

    def forward(self, features: Features) -> dict[str, Tensor]:
        raise NotImplementedError

    def regularisers(self) -> dict[str, Tensor]:
        """As :meth:`model.base.MultiTaskModel.regularisers`."""
        return {}


def tokens_of(maps: Tensor) -> Tensor:
    """(n, C, h, w) -> (n h w, C)."""
    return maps.flatten(2).transpose(1, 2).flatten(0, 1)


def maps_of(tokens: Tensor, grid: tuple[int, int] | torch.Size) -> Tensor:
    """(n h w, C) -> (n, C, h, w)."""
    return tokens.view(-1, *grid, tokens.shape[-1]).permute(0, 3, 1, 2)


def in_compute_type(x: Tensor) -> Tensor:
    """x in the type of autocast, which the operators of kernels/ do not know of, or as it is outside of it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
