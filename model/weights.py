"""Pretrained backbones: safetensors files with timm's names."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kernels import UserError
from model.vit import ViT, resize_pos_embed


@dataclass(frozen=True)
class LoadReport:
    """Which parameters of the backbone the file lacks, and which of its own were not used (its classifier, say)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        named = {"missing": self.missing, "unused": self.unexpected}
        return "; ".join(f"{what}: {', '.join(keys)}" for what, keys in named.items() if keys) or "every key matched"


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"no such weights file: {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


def load_pretrained(vit: ViT, path: str | Path) -> LoadReport:
    """Fill ``vit`` from a safetensors file of any floating type, its positional embedding resized to vit's grid.

    A parameter of another shape is a :class:`UserError`: those weights belong to another architecture. Keys
    that are missing or left over are returned, and the caller decides.
    """
    path = Path(path)
    weights = _read(path)
    own = vit.state_dict()
    if "pos_embed" in weights and weights["pos_embed"].shape[-1] == vit.width:
        side = round((own["pos_embed"].shape[1] - 1) ** 0.5)
        weights["pos_embed"] = resize_pos_embed(weights["pos_embed"].float(), (side, side))
    matched = {name: weights[name] for name in own if name in weights}
    for name, tensor in matched.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{path} holds another architecture: {name} is {tuple(tensor.shape)} there and "
                f"{tuple(own[name].shape)} in this model; choose the --model it was made for"
            )
    with torch.no_grad():
        for name, tensor in matched.items():
            own[name].copy_(tensor)
    return LoadReport(
        missing=tuple(name for name in own if name not in weights),
        unexpected=tuple(name for name in weights if name not in own),
    )
