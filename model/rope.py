"""Rotary position embedding of DINOv3 (arXiv 2508.10104): positions enter as rotations of queries and keys."""

import math

import torch
from torch import Tensor, nn

Rotation = tuple[Tensor, Tensor]  # cosines and sines of the angles, (h*w, head_dim) each


class RoPE(nn.Module):
    """Angles of every patch of a grid.

    The centre of a patch has coordinates (y, x) in [-1, 1], whatever the grid's size. Each coordinate turns
    head_dim / 4 pairs of channels; pair j by the angle 2 pi coordinate / base^(4 j / head_dim). The denominators are
    the buffer ``periods`` (head_dim / 4,), which a weights file may bring along.
    """

    periods: Tensor

    def __init__(self, head_dim: int, base: float = 100.0) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"head_dim is {head_dim}: it must be a multiple of 4, for two coordinates in pairs")
        self.register_buffer("periods", base ** (torch.arange(head_dim // 4) * 4 / head_dim))

    def forward(self, grid: tuple[int, int]) -> Rotation:
        """(h, w) -> cosines and sines (h*w, head_dim), patches row by row, in the type of ``periods``."""
        centres = [(torch.arange(n).to(self.periods) + 0.5) / n * 2 - 1 for n in grid]
        positions = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1).flatten(0, 1)  # (h*w, 2)
        angles = (2 * math.pi * positions[:, :, None] / self.periods).flatten(1)  # (h*w, head_dim / 2)
        angles = angles.tile(2)  # channel c and channel c + head_dim / 2 are a pair
        return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys (.., L, head_dim) with their last h*w tokens, the patches, rotated; the others have no position.

    Computed in at least the precision of the angles, returned in the type of ``x``.
    """
    cos, sin = rotation
    others, patches = x.split([x.shape[-2] - len(cos), len(cos)], dim=-2)
    first, second = patches.chunk(2, dim=-1)
    rotated = patches * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([others, rotated.to(x.dtype)], dim=-2)
