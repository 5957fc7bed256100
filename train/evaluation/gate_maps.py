"""The gates of every patch of one photo: which experts the layers use where."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoe_lora import RoutingStatistics
from kernels import UserError
from model import MultiTaskViT


class RecordedGates(RoutingStatistics):
    """The gates themselves, of one pass: by layer a tensor (tokens, N) for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[int, tuple[Tensor, ...]] = {}

    def add(self, layer: int, gates: Tensor, counts: Sequence[int]) -> None:
        self.layers[layer] = gates.split(list(counts))


@torch.inference_mode()
def gate_maps(model: MultiTaskViT, image: NDArray[np.uint8], tasks: Sequence[str]) -> Tensor:
    """``image`` (H, W, 3), the model's input -> gates (layers, tasks, rows, columns, N) of its patches, on the CPU. The
    class token and registers, which come before them, are left out. UserError for a hierarchical backbone, whose layers
    have patches of several sizes."""
    assert model.routing is not None
    if len(set(model.vit.levels)) > 1:
        strides = ", ".join(str(level.stride) for level in model.vit.levels)
        raise UserError(f"maps of experts are of a ViT: this backbone has patches of several sizes ({strides} pixels)")
    rows, columns = (side // model.patch for side in image.shape[:2])
    index = {task: torch.zeros(1, dtype=torch.int64, device=model.device) for task in tasks}
    model.routing.statistics = recorded = RecordedGates()
    try:
        model(torch.tensor(image, device=model.device).permute(2, 0, 1)[None], index)
    finally:
        model.routing.statistics = None
    positions = [model.tasks.index(task) for task in tasks]
    layers = [recorded.layers[layer] for layer in sorted(recorded.layers)]
    patches = torch.stack([torch.stack([gates[t][-rows * columns :] for t in positions]) for gates in layers])
    return patches.unflatten(2, (rows, columns)).float().cpu()
