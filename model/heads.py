"""Task heads: patch tokens of one task -> a prediction at image resolution."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from model.norm import BatchNorm2d


def _to_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, prefix + h*w, d) -> (n, d, h, w): the class token and the registers, which come first, are dropped.

    It is a view, whose memory is channels-last. Convolutions, norms and resizes keep that order."""
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


class UpHead(nn.Module):
    """The paper's head: LayerNorm, four 3x3 conv + BN + ReLU of 256 channels with x2 bilinear resizes between them,
    1x1 conv, and a last bilinear resize to the image's size.

    The 1x1 conv comes before the last resize. The two commute, and the conv then has a quarter of the pixels.
    """

    def __init__(self, width: int, channels: int, patch: int) -> None:
        super().__init__()
        widths = (width, 256, 256, 256, 256)
        self.norm = nn.LayerNorm(width)
        self.convs = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), BatchNorm2d(o), nn.ReLU()) for i, o in pairwise(widths)
        )
        self.predict = nn.Conv2d(256, channels, 1)
        self.patch = patch

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(n, prefix + h*w, width) -> (n, channels, h*patch, w*patch)."""
        x = _to_grid(self.norm(tokens), grid)
        for i, conv in enumerate(self.convs):
            if i > 0:
                x = F.interpolate(x, scale_factor=2, mode="bilinear")
            x = conv(x)
        return F.interpolate(self.predict(x), [side * self.patch for side in grid], mode="bilinear")


class LightHead(nn.Module):
    """For CPUs: LayerNorm, a linear map of each token to its patch at half resolution (pixel shuffle), one 3x3
    conv across the patch borders, 1x1 conv, x2 bilinear."""

    HIDDEN = 24

    def __init__(self, width: int, channels: int, patch: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.unfold = nn.Linear(width, self.HIDDEN * (patch // 2) ** 2)
        self.mix = nn.Conv2d(self.HIDDEN, self.HIDDEN, 3, padding=1)
        self.predict = nn.Conv2d(self.HIDDEN, channels, 1)
        self.patch = patch

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """(n, prefix + h*w, width) -> (n, channels, h*patch, w*patch)."""
        x, side = F.gelu(_to_grid(self.unfold(self.norm(tokens)), grid)), self.patch // 2
        if len(x):
            x = F.pixel_shuffle(x, side)
        else:  # a task without images, of which PyTorch's backward pass returns another shape
            x = x.reshape(0, self.HIDDEN, grid[0] * side, grid[1] * side)
        x = F.gelu(self.mix(x))
        return F.interpolate(self.predict(x), scale_factor=2, mode="bilinear")


HEADS = {"up": UpHead, "light": LightHead}
