"""Task heads: the backbone's maps of one task -> a prediction at image resolution."""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backbone import FeatureMap, Level, to_grid
from model.norm import BatchNorm2d


class Head(nn.Module):
    """Built for the levels of a backbone's maps and the channels of a prediction. ``last`` means that the last map
    alone is read and given."""

    last: ClassVar[bool] = True

    def __init__(self, levels: Sequence[Level], channels: int) -> None:
        super().__init__()
        self.stride = levels[-1].stride

    def forward(self, maps: Sequence[FeatureMap]) -> Tensor:
        """Maps of n rows -> (n, channels, H, W)."""
        raise NotImplementedError


class UpHead(Head):
    """The paper's head: LayerNorm, four 3x3 conv + BN + ReLU of 256 channels with x2 bilinear resizes between them,
    1x1 conv, and a last bilinear resize to the image's size.

    The 1x1 conv comes before the last resize. The two commute, and the conv then has a quarter of the pixels.
    """

    def __init__(self, levels: Sequence[Level], channels: int) -> None:
        super().__init__(levels, channels)
        width = levels[-1].channels
        widths = (width, 256, 256, 256, 256)
        self.norm = nn.LayerNorm(width)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), BatchNorm2d(o), nn.ReLU()) for i, o in pairwise(widths)
        )
        self.predict = nn.Conv2d(256, channels, 1)

    def forward(self, maps: Sequence[FeatureMap]) -> Tensor:
        tokens, grid = maps[-1]
        x = to_grid(self.norm(tokens), grid)
        for i, conv in enumerate(self.convs):
            if i > 0:
                x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = conv(x)
        return F.interpolate(self.predict(x), [side * self.stride for side in grid], mode="bilinear")


class LightHead(Head):
    """For CPUs: LayerNorm, a linear map of each token to its patch at half resolution (pixel shuffle), one 3x3
    conv across the patch borders, 1x1 conv, x2 bilinear."""

    HIDDEN = 24

    def __init__(self, levels: Sequence[Level], channels: int) -> None:
        super().__init__(levels, channels)
        width = levels[-1].channels
        self.norm = nn.LayerNorm(width)
        self.unfold = nn.Linear(width, self.HIDDEN * (self.stride // 2) ** 2)
        self.mix = nn.Conv2d(self.HIDDEN, self.HIDDEN, 3, padding=1)
        self.predict = nn.Conv2d(self.HIDDEN, channels, 1)

    def forward(self, maps: Sequence[FeatureMap]) -> Tensor:
        tokens, grid = maps[-1]
        x, side = F.gelu(to_grid(self.unfold(self.norm(tokens)), grid)), self.stride // 2
        if len(x):
            x = F.pixel_shuffle(x, side)
        else:  # a task without images, of which PyTorch's backward pass returns another shape
            x = x.reshape(0, self.HIDDEN, grid[0] * side, grid[1] * side)
        x = F.gelu(self.mix(x))
        return F.interpolate(self.predict(x), scale_factor=2, mode="bilinear")


class PyramidHead(Head):
    """The head of the field's table: each of four maps through a linear map to C/4 channels, C those of the last one,
    and resized to a quarter of the image's size; these joined, 3x3 conv + BN + GELU of C channels, 1x1 conv, and a last
    bilinear resize to the image's size."""

    last = False

    def __init__(self, levels: Sequence[Level], channels: int) -> None:
        super().__init__(levels, channels)
        quarter = levels[-1].channels // 4
        joined = quarter * len(levels)
        self.reduce = nn.ModuleList(nn.Linear(level.channels, quarter) for level in levels)
        self.mix = nn.Sequential(nn.Conv2d(joined, joined, 3, padding=1, bias=False), BatchNorm2d(joined), nn.GELU())
        self.predict = nn.Conv2d(joined, channels, 1)

    def forward(self, maps: Sequence[FeatureMap]) -> Tensor:
        size = [side * self.stride for side in maps[-1].grid]
        at_quarter = [
            F.interpolate(to_grid(reduce(tokens), grid), [side // 4 for side in size], mode="bilinear")
            for reduce, (tokens, grid) in zip(self.reduce, maps, strict=True)
        ]
        return F.interpolate(self.predict(self.mix(torch.cat(at_quarter, dim=1))), size, mode="bilinear")


HEADS: dict[str, type[Head]] = {"up": UpHead, "light": LightHead, "pyramid": PyramidHead}
