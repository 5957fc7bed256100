"""A frozen encoder, which runs without a graph, and a trained decoder for all tasks."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import UserError, nvtx
from model.backbone import Backbone, to_grid
from model.base import MultiTaskModel
from model.decoders.base import Decoder, Features, Frame
from model.multitask import MultiTaskViT


class EncoderDecoder(MultiTaskModel):
    """The features of four blocks of a frozen encoder go to a decoder, which alone is trained.

    The encoder is a backbone, which runs once per image, or a trained :class:`MultiTaskViT`, which runs once per
    labelled (image, task) pair. Its weights are not part of the state dict. Their hash is, and a state dict with
    another one is refused: the decoder in it belongs to another encoder.
    """

    encoder_sha256: Tensor

    def __init__(
        self,
        encoder: Backbone | MultiTaskViT,
        channels: Mapping[str, int],
        grid: tuple[int, int],
        make: Callable[[Frame], Decoder],
    ) -> None:
        super().__init__()
        self.tasks, self.patch = tuple(channels), encoder.patch
        known = encoder.tasks if isinstance(encoder, MultiTaskViT) else self.tasks
        if lacking := [task for task in channels if task not in known]:
            raise UserError(f"the encoder has no task {', '.join(lacking)}: choose --tasks among {', '.join(known)}")
        levels = (encoder.vit if isinstance(encoder, MultiTaskViT) else encoder).levels
        if len(levels) != 4 or len(set(levels)) > 1:
            raise UserError("decoders read four maps of one size, and this encoder has others: use --head pyramid")
        self.encoder = encoder.requires_grad_(False).eval()
        self.decoder = make(Frame(levels[-1].channels, grid, channels))
        self.set_normalisation((0.5,) * 3, (0.5,) * 3)
        self.register_buffer("encoder_sha256", hash_of(encoder))
        self.register_state_dict_post_hook(_without_encoder)
        self.register_load_state_dict_pre_hook(_with_encoder)

    @property
    def per_task(self) -> bool:
        """Whether the encoder runs once per (image, task) pair."""
        return isinstance(self.encoder, MultiTaskViT)

    def train(self, mode: bool = True) -> "EncoderDecoder":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: Tensor, index: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Predictions by task; see :class:`MultiTaskModel`."""
        if index is None:
            index = dict.fromkeys(self.tasks, torch.arange(len(images), device=images.device))
        with torch.no_grad(), nvtx.span("encoder"):
            features = self._encode(images, index)
        with nvtx.span("decoder"):
            predictions = self.decoder(features)
            return {task: F.interpolate(y, images.shape[-2:], mode="bilinear") for task, y in predictions.items()}

    def regularisers(self) -> dict[str, Tensor]:
        return self.decoder.regularisers()

    def _encode(self, images: Tensor, index: Mapping[str, Tensor]) -> Features:
        if isinstance(self.encoder, MultiTaskViT):
            maps = self.encoder.maps(images, index)
            runs = {task: len(index[task]) for task in self.encoder.tasks if task in index}
            rows = torch.arange(sum(runs.values()), device=images.device).split(list(runs.values()))
            index = dict(zip(runs, rows, strict=True))
        else:
            maps = self.encoder(self.normalise(images))
        return Features(tuple(to_grid(*each) for each in maps), index, self.per_task)


def hash_of(encoder: nn.Module) -> Tensor:
    """SHA-256 of names, types, shapes and values of an encoder's parameters and buffers: (32,) uint8.

    The position embedding is left out: it is resized to the grid of the images, which machines may round differently.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if name.endswith("pos_embed"):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def _without_encoder(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}encoder.")]:
        del state[name]


def _with_encoder(model: EncoderDecoder, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Completes a state dict by the model's own encoder. UserError if it belongs to another one."""
    theirs = state.get(f"{prefix}encoder_sha256")
    if theirs is not None and not torch.equal(theirs.cpu(), model.encoder_sha256.cpu()):
        named = [bytes(digest.tolist()).hex()[:12] for digest in (theirs, model.encoder_sha256)]
        raise UserError(
            f"this decoder was trained on an encoder whose weights have sha256 {named[0]}..., not {named[1]}...: "
            "give the --pretrained weights that it was trained with"
        )
    state |= {f"{prefix}encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
