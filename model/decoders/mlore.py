"""MLoRE's decoder (CVPR 2024): low-rank convolutional experts that all tasks share, gated per image and task.

Four levels of two blocks each. A block has 15 experts of ranks r_i, all in one pair of convolutions: W (R, C, 3, 3)
and M (C, R) with R = sum r_i. For task t and image n, with o = Conv1x1_t(x):

    E_i(o) = M_i (W_i * o + b_W) + b_M                                  no activation
    s      = BN_at(sum_i g_i E_i(o)) + mix TaskLoRA_t(o) + Conv3x3(stop_gradient(o))
    out    = Conv1x1_t(GELU(BN_t(s)))

The gates g and mix come from the router of the task, once per image. Everything between o and s is linear, so that in
evaluation it folds into one 3x3 convolution per image and task (:attr:`Block.folded`).
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmoe_lora.ranks import over_ranks
from kernels import nvtx
from kernels.reference import gates
from model.decoders.base import Decoder, Features, Frame
from model.decoders.config import MLoREConfig
from model.norm import BatchNorm2d

LEVELS, BLOCKS = 4, 2


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (n, C, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Router(nn.Module):
    """x (n, C, h, w) -> logits (n, experts), noise scales (n, experts), mix (n, 1).

    One branch averages a small network over the pixels. The other one has a weight for every pixel, so that it knows
    positions; images of another grid are resized to the grid it was made for.
    """

    def __init__(self, width: int, grid: tuple[int, int], experts: int) -> None:
        super().__init__()
        quarter = width // 4
        self.grid, self.experts = grid, experts
        self.local = nn.Sequential(
            nn.Conv2d(width, quarter, 1), ChannelNorm(quarter), nn.GELU(), nn.Conv2d(quarter, quarter, 1)
        )
        self.pixels = nn.Linear(grid[0] * grid[1], 1, bias=False)  # LayerNorm would remove a bias
        self.position = nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, quarter))
        self.out = nn.Linear(2 * quarter, 2 * experts + 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        placed = x if x.shape[-2:] == self.grid else F.interpolate(x, self.grid, mode="bilinear", antialias=True)
        both = [self.local(x).mean((2, 3)), self.position(self.pixels(placed.flatten(2)).squeeze(-1))]
        return cast(tuple[Tensor, Tensor, Tensor], self.out(torch.cat(both, dim=1)).split([self.experts] * 2 + [1], 1))


class LowRankConv(nn.Module):
    """Experts of a 3x3 convolution C -> r_i and a 1x1 convolution r_i -> C each, both with bias."""

    def __init__(self, width: int, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, sum(ranks), 3, padding=1)
        self.up = nn.Parameter(torch.empty(width, sum(ranks)))
        self.up_bias = nn.Parameter(torch.zeros(len(ranks), width))
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        nn.init.zeros_(cast(Tensor, self.down.bias))
        for expert in self.up.split(ranks, dim=1):
            nn.init.kaiming_uniform_(expert.data, a=5**0.5)
        self.register_buffer("expert_of_rank", torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks)), False)

    expert_of_rank: Tensor

    def forward(self, x: Tensor, g: Tensor) -> Tensor:
        """sum_i g_i E_i(x) of x (n, C, h, w) with gates g (n, experts)."""
        hidden = self.down(x) * g[:, self.expert_of_rank, None, None].to(x.dtype)
        return F.conv2d(hidden, self.up[:, :, None, None]) + (g @ self.up_bias)[:, :, None, None]

    def fold(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The same as one convolution per image: kernels (n, C, C, 3, 3) and biases (n, C)."""
        gated = self.up * g[:, None, self.expert_of_rank]
        kernel = (gated @ self.down.weight.flatten(1)).unflatten(2, self.down.weight.shape[1:])
        return kernel, gated @ cast(Tensor, self.down.bias) + g @ self.up_bias


class TaskPath(nn.Module):
    """What a block has for one task alone."""

    def __init__(self, config: MLoREConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        width = config.width
        self.enter = nn.Conv2d(width, width, 1)
        self.router = Router(width, grid, len(config.ranks))
        self.mixture_norm = BatchNorm2d(width)
        self.lora = LowRankConv(width, (config.task_rank,))
        self.norm = BatchNorm2d(width)
        self.leave = nn.Conv2d(width, width, 1)


class Block(nn.Module):
    """(n, C, h, w) of one task -> (n, C, h, w); ``folded`` computes s by one convolution per image in evaluation."""

    def __init__(self, config: MLoREConfig, grid: tuple[int, int], tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.gating, self.folded = config.gating, False
        self.experts = LowRankConv(config.width, config.ranks)
        self.shared = nn.Conv2d(config.width, config.width, 3, padding=1)
        self.paths = nn.ModuleDict({task: TaskPath(config, grid) for task in tasks})

    def forward(self, x: Tensor, task: str) -> tuple[Tensor, Tensor]:
        """(output, the experts' probabilities (n, experts) before the selection)."""
        path = cast(TaskPath, self.paths[task])
        o = path.enter(x)
        z, noise, mix = path.router(o)
        if self.training:
            z = z + torch.randn_like(z) * noise
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        g = gates(z, self.gating)
        s = self._folded(o, g, mix, path) if self.folded and not self.training else self._parts(o, g, mix, path)
        return path.leave(F.gelu(path.norm(s))), z.softmax(-1)

    def _parts(self, o: Tensor, g: Tensor, mix: Tensor, path: TaskPath) -> Tensor:
        mixture = path.mixture_norm(self.experts(o, g))
        return mixture + mix[:, :, None, None] * path.lora(o, torch.ones_like(g[:, :1])) + self.shared(o.detach())

    def _folded(self, o: Tensor, g: Tensor, mix: Tensor, path: TaskPath) -> Tensor:
        norm = path.mixture_norm
        scale = norm.weight * (cast(Tensor, norm.running_var) + norm.eps).rsqrt()
        kernel, bias = self.experts.fold(g)
        lora_kernel, lora_bias = path.lora.fold(mix)
        kernel = scale[:, None, None, None] * kernel + lora_kernel + self.shared.weight
        bias = norm.bias + (bias - cast(Tensor, norm.running_mean)) * scale + lora_bias + cast(Tensor, self.shared.bias)
        n = len(o)
        s = F.conv2d(o.flatten(0, 1)[None], kernel.flatten(0, 1), bias.flatten(), padding=1, groups=n)
        return s[0].unflatten(0, (n, -1))


class Fusion(nn.Module):
    """Four levels of one task -> its prediction at four times their resolution."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.weights = nn.Sequential(
            nn.Conv2d(LEVELS * width, width, 1, bias=False),
            BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, LEVELS, 3, padding=1),
        )
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            BatchNorm2d(width),
            nn.GELU(),
            nn.Conv2d(width, channels, 1),
        )

    def forward(self, levels: list[Tensor]) -> Tensor:
        weights = self.weights(torch.cat(levels, dim=1)).softmax(1)
        fused = (torch.stack(levels, dim=2) * weights[:, None]).sum(2)
        return self.head(F.interpolate(fused, scale_factor=4, mode="bilinear"))


class MLoRE(Decoder):
    """Predictions at four times the resolution of the features."""

    def __init__(self, frame: Frame, config: MLoREConfig) -> None:
        super().__init__()
        self.tasks = tuple(frame.channels)
        self.reduce = nn.ModuleList(nn.Conv2d(frame.width, config.width, 1) for _ in range(LEVELS))
        self.levels = nn.ModuleList(
            nn.ModuleList(Block(config, frame.grid, self.tasks) for _ in range(BLOCKS)) for _ in range(LEVELS)
        )
        self.fusions = nn.ModuleDict({task: Fusion(config.width, n) for task, n in frame.channels.items()})
        self._probabilities: list[list[Tensor]] = []

    def fold(self, folded: bool = True) -> None:
        """Compute every block by one 3x3 convolution per image and task in evaluation."""
        for module in self.modules():
            if isinstance(module, Block):
                module.folded = folded

    def forward(self, features: Features) -> dict[str, Tensor]:
        probabilities: list[list[Tensor]] = [[] for _ in range(LEVELS * BLOCKS)]
        reduced = [reduce(tap) for reduce, tap in zip(self.reduce, features.maps, strict=True)]
        predictions = {}
        for task in (task for task in self.tasks if task in features.index):
            levels = []
            with nvtx.span(f"mlore {task}"):
                for i, tap in enumerate(reduced):
                    x = tap[features.index[task]]
                    for j, block in enumerate(cast(nn.ModuleList, self.levels[i])):
                        x, p = block(x, task)
                        probabilities[i * BLOCKS + j].append(p)
                    levels.append(x)
                predictions[task] = self.fusions[task](levels)
        self._probabilities = probabilities
        return predictions

    def regularisers(self) -> dict[str, Tensor]:
        """``balance``: sum over blocks of (std / mean)^2 of the experts' mean probabilities over the images of the
        tasks that have any, also over those of other processes of a data-parallel run."""
        sums = torch.stack([torch.stack([p.sum(0) for p in block]) for block in self._probabilities])
        images = over_ranks(sums.new_tensor([len(p) for p in self._probabilities[0]]))
        self._probabilities = []
        each = (over_ranks(sums) / images.clamp(min=1)[:, None]).sum(1) / images.count_nonzero()
        return {"balance": (each.std(-1) / each.mean(-1)).square().sum()}
