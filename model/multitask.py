"""The multi-task ViT: one adapted backbone, one head per task, all tasks in one pass."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastmoe_lora import Packing, Routing
from kernels.nvtx import span
from model.heads import HEADS
from model.vit import ViT


class MultiTaskViT(nn.Module):
    """yhat_t = H_t(h_t^(L)),  h_t^(0) = x + e_t: equations (11) and (12).

    The (image, task) pairs are stacked task-major and cross the backbone together. ``routing`` is what
    :func:`fastmoe_lora.adapt` returned for ``vit``, or None where it has no mixture of experts.
    """

    def __init__(self, vit: ViT, channels: Mapping[str, int], head: str, routing: Routing | None = None) -> None:
        super().__init__()
        self.tasks = tuple(channels)
        self.vit, self.routing, self.packing = vit, routing, Packing(vit)
        self.task_embed = nn.Parameter(torch.empty(len(self.tasks), vit.width).normal_(std=0.02))
        self.heads = nn.ModuleDict({task: HEADS[head](vit.width, n, vit.patch) for task, n in channels.items()})
        self.set_normalisation((0.5,) * 3, (0.5,) * 3)

    image_mean: Tensor
    image_std: Tensor

    def set_normalisation(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """The input normalisation the weights were trained with, in units of [0, 1]; part of the state dict."""
        self.register_buffer("image_mean", self.task_embed.new_tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("image_std", self.task_embed.new_tensor(std).view(1, 3, 1, 1))

    def forward(self, images: Tensor, index: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Predictions {task: (n_t, channels, H, W)}, raw, for the images (B, 3, H, W), RGB in 0..255.

        ``index`` {task: (n_t,) int64} names the images wanted for each task, so that unlabelled pairs cost
        nothing; a task it leaves out is not predicted. None means every image for every task.
        """
        if index is None:
            index = dict.fromkeys(self.tasks, torch.arange(len(images), device=images.device))
        counts = [len(index[task]) if task in index else 0 for task in self.tasks]
        if self.routing is not None:
            self.routing.assign(counts)
        self.packing.pack()
        with span("backbone"):
            tokens = self.vit.embed((images / 255 - self.image_mean) / self.image_std)
            pairs = [
                tokens[index[task]] + e_t
                for task, e_t in zip(self.tasks, self.task_embed, strict=True)
                if task in index
            ]
            runs = self.vit.encode(torch.cat(pairs)).split(counts)
        grid = images.shape[-2] // self.vit.patch, images.shape[-1] // self.vit.patch
        with span("heads"):
            return {
                task: self.heads[task](run, grid) for task, run in zip(self.tasks, runs, strict=True) if task in index
            }
