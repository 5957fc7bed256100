"""Deformable sampling and the deformable mixer of the FGMoE decoder."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.norm import BatchNorm2d


def sample_at(x: Tensor, offsets: Tensor) -> Tensor:
    """x (n, C, h, w) read at every pixel's position plus its offset, bilinearly, zero outside the image.

    ``offsets`` (n, 2, h, w) are (rows down, columns right) in pixels. Equation (3) of deformable convolution
    (arXiv 1703.06211): y(p) = sum_q max(0, 1 - |q_y - p_y|) max(0, 1 - |q_x - p_x|) x(q).
    """
    height, width = x.shape[-2:]
    exact = torch.promote_types(offsets.dtype, torch.float32)
    rows = torch.arange(height, device=x.device, dtype=exact)[:, None] + offsets[:, 0]
    columns = torch.arange(width, device=x.device, dtype=exact) + offsets[:, 1]
    # grid_sample counts from -1 at the left border of the first pixel to 1 at the right border of the last.
    grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], dim=-1)
    return F.grid_sample(x.to(exact), grid, padding_mode="zeros", align_corners=False).to(x.dtype)


class DeformableMixer(nn.Module):
    """x (n, C, h, w) -> y + DeformableConv1x1(y), y = BN(GELU(Conv1x1(x))).

    A 3x3 convolution gives the offsets. It starts at zero, where the deformable convolution is a plain one.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = nn.Conv2d(width, width, 1)
        self.norm = BatchNorm2d(width)
        self.offsets = nn.Conv2d(width, 2, 3, padding=1)
        for parameter in self.offsets.parameters():
            nn.init.zeros_(parameter)
        self.sampled = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(F.gelu(self.channels(x)))
        return y + self.sampled(sample_at(y, self.offsets(y)))
