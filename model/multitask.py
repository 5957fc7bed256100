"""The multi-task model: one adapted backbone, one head per task, all tasks in one pass."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastmoe_lora import Routing
from kernels import nvtx
from model.backbone import Backbone, FeatureMap
from model.base import MultiTaskModel
from model.heads import HEADS


class MultiTaskViT(MultiTaskModel):
    """yhat_t = H_t(h_t^(L)),  h_t^(0) = x + e_t: equations (11) and (12).

    The (image, task) pairs are stacked task-major and go through the backbone together. ``routing`` is what
    :func:`fastmoe_lora.adapt` returned for ``vit``, or None where it has no mixture of experts.
    """

    def __init__(self, vit: Backbone, channels: Mapping[str, int], head: str, routing: Routing | None = None) -> None:
        super().__init__()
        self.tasks, self.patch = tuple(channels), vit.patch
        self.vit, self.routing = vit, routing
        self.task_embed = nn.Parameter(torch.empty(len(self.tasks), vit.width).normal_(std=0.02))
        self.heads = nn.ModuleDict({task: HEADS[head](vit.levels, n) for task, n in channels.items()})
        self.last = HEADS[head].last  # whether the heads read the last map alone
        # What training steps call; see compile_training().
        self._heads: dict[str, Callable[..., Tensor]] = dict(self.heads.items())
        self.set_normalisation((0.5,) * 3, (0.5,) * 3)

    def compile_training(self) -> None:
        """Compile the backbone, into one graph, and the heads, for training steps, anew for other numbers of images.
        Batches of partially labelled images have some dozen numbers of pairs, more than torch allows by default."""
        torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit
        self.vit.compile_training(self.last)
        self._heads = {task: torch.compile(head, fullgraph=True) for task, head in self.heads.items()}

    def forward(self, images: Tensor, index: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Predictions by task; see :class:`MultiTaskModel`."""
        if index is None:
            index = dict.fromkeys(self.tasks, torch.arange(len(images), device=images.device))
        with nvtx.span("backbone"):
            maps = self.maps(images, index, self.last)
        counts = [len(index[task]) if task in index else 0 for task in self.tasks]
        runs = zip(*([FeatureMap(run, each.grid) for run in each.tokens.split(counts)] for each in maps), strict=True)
        heads = self._heads if self.training else dict(self.heads.items())
        with nvtx.span("heads"):
            return {task: heads[task](run) for task, run in zip(self.tasks, runs, strict=True) if task in index}

    def maps(self, images: Tensor, index: Mapping[str, Tensor], last: bool = False) -> tuple[FeatureMap, ...]:
        """The backbone's maps of the pairs of ``index``, task-major."""
        embeddings = zip(self.tasks, self.task_embed, strict=True)
        with self.batch(index):
            pairs = [(index[task], e_t) for task, e_t in embeddings if task in index]
            return self.vit(self.normalise(images), pairs, last)

    def batch(self, index: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        """A context for the pass of the pairs of ``index`` through the backbone."""
        if self.routing is None:
            return nullcontext()
        return self.routing.batch([len(index[task]) if task in index else 0 for task in self.tasks])
