"""What every multi-task model offers to training, evaluation and prediction."""

import torch
from torch import Tensor, nn

from fastmoe_lora import Routing


class MultiTaskModel(nn.Module):
    """(images (B, 3, H, W), RGB in 0..255; index) -> predictions {task: (n_t, channels, H, W)}, raw.

    ``index`` {task: (n_t,) int64} names the images wanted for each task, so that unlabelled pairs cost nothing; a task
    it leaves out is not predicted. None means every image for every task.
    """

    tasks: tuple[str, ...]
    patch: int
    routing: Routing | None = None  # of a LoRA mixture of experts in the backbone
    image_mean: Tensor
    image_std: Tensor

    def set_normalisation(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """The input normalisation the weights were trained with, in units of [0, 1]; part of the state dict."""
        like = next(self.parameters())
        self.register_buffer("image_mean", like.new_tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("image_std", like.new_tensor(std).view(1, 3, 1, 1))

    def normalise(self, images: Tensor) -> Tensor:
        return (images / 255 - self.image_mean) / self.image_std

    @property
    def device(self) -> torch.device:
        return self.image_mean.device

    def regularisers(self) -> dict[str, Tensor]:
        """Losses of the routers in the last forward pass, by the name of their weight: ``mi`` or ``balance``."""
        return {} if self.routing is None else {"mi": self.routing.mi_loss()}
