"""Pretrained backbones: recognises the family of a file, derives the ViT that it fits, and loads it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastmoe_lora.hub import download, is_repository, read_folder
from kernels import UserError
from model.formats import read_tensors
from model.names import at_least_fp32, is_float, to_timm
from model.vit import ViT, ViTConfig, resize_pos_embed

NORMALISATIONS = {  # (mean, std) of RGB in [0, 1]
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "satellite": ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143)),
}
SATELLITE = "sat493m"  # in the names of DINOv3's files that were trained on satellite images
FAMILIES = {  # family -> the normalisation its weights were trained with
    "AugReg": "inception",
    "Hugging Face ViT": "inception",
    "DeiT": "imagenet",
    "DINO": "imagenet",
    "DINOv2": "imagenet",
    "DINOv3": "imagenet",
}


@dataclass(frozen=True)
class Weights:
    """The tensors of a file, under timm's names. LayerScale is folded into the linear maps. The positional embedding
    has one row for the class token, then one per patch. ``normalisation`` is a key of :data:`NORMALISATIONS`."""

    path: Path
    family: str
    normalisation: str
    tensors: Mapping[str, Tensor]

    def adjust(self, config: ViTConfig) -> ViTConfig:
        """``config`` with the patch size, register tokens and kind of positions of these weights."""
        return derive_config(config, self.tensors, rope=self.family == "DINOv3")


@dataclass(frozen=True)
class LoadReport:
    """The parameters of the backbone that the file lacks, the tensors of the file that were not used (such as its
    classifier), the family it was recognised as, and that family's key in :data:`NORMALISATIONS`."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    family: str
    normalisation: str

    def __str__(self) -> str:
        named = {"missing": self.missing, "unused": self.unexpected}
        keys = "; ".join(f"{what}: {', '.join(keys)}" for what, keys in named.items() if keys) or "every key matched"
        return f"{self.family} weights, {self.normalisation} normalisation; {keys}"


@dataclass(frozen=True)
class Source:
    """A weights file as it is: its tensors by its own names, and what they were recognised as."""

    path: Path
    family: str
    normalisation: str
    raw: Mapping[str, Tensor]


def read_source(path: str | Path) -> Source:
    """The tensors in a .safetensors, .npz, .pth, .pt or .bin file, in a repository ``owner/name`` of the Hugging Face
    Hub, or in the folder of such a repository.

    :class:`UserError`: the file is missing, unreadable, of another kind, or a pickle that needs code; those of
    :func:`fastmoe_lora.hub.download` and :func:`fastmoe_lora.hub.read_folder`.
    """
    name = Path(path).name
    config: dict[str, Any] = {}
    if is_repository(path):
        name = str(path)
        path, config = download(name)
    elif Path(path).is_dir():
        path, config = read_folder(Path(path))
    path = Path(path)
    raw, wrapper = read_tensors(path)
    family = _family(name, wrapper, tuple(raw))
    usual = "satellite" if family == "DINOv3" and SATELLITE in name.lower() else FAMILIES[family]
    return Source(path, family, _declared_normalisation(path, config) or usual, raw)


def read_weights(path: str | Path) -> Weights:
    """The backbone in a file or repository that :func:`read_source` reads, in any known naming scheme; raises as it
    does."""
    return by_timm_names(read_source(path))


def by_timm_names(source: Source) -> Weights:
    tensors = to_timm(source.raw)
    _unify_pos_embed(tensors)
    return Weights(source.path, source.family, source.normalisation, tensors)


def derive_config(config: ViTConfig, tensors: Mapping[str, Tensor], rope: bool) -> ViTConfig:
    """``config`` for tensors by timm's names: their patch size and register tokens. ``rope`` means those of DINOv3."""
    kernel, registers = tensors.get("patch_embed.proj.weight"), tensors.get("reg_token")
    return replace(
        config,
        patch=kernel.shape[-1] if kernel is not None and kernel.ndim == 4 else config.patch,
        registers=registers.shape[1] if registers is not None and registers.ndim == 3 else 0,
        rope=rope,
        eps=1e-5 if rope else config.eps,
    )


def load_pretrained(vit: ViT, source: str | Path | Weights) -> LoadReport:
    """Fill ``vit`` from what :func:`read_weights` reads, its positional embedding resized to vit's grid.

    :class:`UserError`: as :func:`read_weights`, values that are not finite or quantised, and weights of another
    architecture, that is, a tensor of another shape, or other blocks or registers. Other missing or unused keys are
    returned, and the caller decides. Rotary periods that the file does not hold keep their default.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    own, tensors = vit.state_dict(), dict(weights.tensors)
    if vit.pos_embed is not None and "pos_embed" in tensors and is_pos_embed(tensors["pos_embed"], vit.width):
        side = isqrt(vit.pos_embed.shape[1] - 1)
        tensors["pos_embed"] = resize_pos_embed(tensors["pos_embed"], (side, side))
    _check_architecture(weights.path, tensors, own)
    for name in own.keys() & tensors.keys():
        if not is_float(tensors[name]):
            raise UserError(
                f"{weights.path} holds {name} as {tensors[name].dtype}: give the weights in fp16, bf16, fp32 or fp64, "
                "as they were before quantisation"
            )
        if not tensors[name].isfinite().all():
            raise UserError(f"{weights.path} has a value in {name} that is not finite: download it again")
    with torch.no_grad():
        for name in own.keys() & tensors.keys():
            own[name].copy_(tensors[name])
    return LoadReport(
        missing=tuple(name for name in own if name not in tensors and name != "rope.periods"),
        unexpected=tuple(name for name in tensors if name not in own),
        family=weights.family,
        normalisation=weights.normalisation,
    )


def _declared_normalisation(path: Path, config: Mapping[str, Any]) -> str:
    """The normalisation that timm's config.json declares, "" where it declares none."""
    declared = config.get("pretrained_cfg")
    if not isinstance(declared, dict) or not {"mean", "std"} <= declared.keys():
        return ""
    values = tuple(tuple(value) if isinstance(value, list) else value for value in (declared["mean"], declared["std"]))
    for name, known in NORMALISATIONS.items():
        if values == known:
            return name
    raise UserError(
        f"{path.with_name('config.json')} declares mean and std {values}: known are {', '.join(NORMALISATIONS)}; "
        "give the path of the weights beside it, with --set normalisation=NAME"
    )


def _family(file: str, wrapper: str, names: tuple[str, ...]) -> str:
    """Recognised by parameter names, else by the wrapper or the name of the file or repository, else AugReg, as most
    of timm's are."""
    if file.endswith(".npz"):
        return "AugReg"
    if any(name.endswith(("storage_tokens", "rope_embed.periods", "attention.o_proj.weight")) for name in names):
        return "DINOv3"
    if "reg_token" in names and "pos_embed" not in names and any(name.endswith(".gamma_1") for name in names):
        return "DINOv3"  # timm's
    if any(name.endswith(("ls1.gamma", "layer_scale1.lambda1")) for name in names):
        return "DINOv2"
    if wrapper in ("teacher", "student") or "dino" in file.lower():
        return "DINO"
    if wrapper == "model" or "deit" in file.lower() or any(name.startswith("deit.") for name in names):
        return "DeiT"
    return "Hugging Face ViT" if any("encoder.layer." in name for name in names) else "AugReg"


def _unify_pos_embed(tensors: dict[str, Tensor]) -> None:
    """(1, prefix + h*w, d) -> (1, 1 + h*w, d) where the prefix is empty, the class token, or the class token and the
    registers. A class token without a position gets zeros. Positions of registers are added to the registers."""
    pos, registers = tensors.get("pos_embed"), tensors.get("reg_token")
    if pos is None or pos.ndim != 3:
        return
    pos = pos.to(at_least_fp32(pos))
    if is_pos_embed(pos, pos.shape[2]):
        tensors["pos_embed"] = pos
    elif _is_square(pos.shape[1]):
        tensors["pos_embed"] = torch.cat([torch.zeros_like(pos[:, :1]), pos], dim=1)
    elif registers is not None and registers.shape[::2] == pos.shape[::2]:
        last = 1 + registers.shape[1]
        tensors["reg_token"] = registers + pos[:, 1:last]
        tensors["pos_embed"] = torch.cat([pos[:, :1], pos[:, last:]], dim=1)


def is_pos_embed(tensor: Tensor, width: int) -> bool:
    """Whether it has one row for the class token, then one per patch of a square."""
    return tensor.ndim == 3 and tensor.shape[::2] == (1, width) and _is_square(tensor.shape[1] - 1)


def _is_square(count: int) -> bool:
    return count > 0 and isqrt(count) ** 2 == count


def _check_architecture(path: Path, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Shared names must agree in shape. What changes every feature must be in both."""
    always = ("blocks.", "reg_token", "pos_embed", "norm_pre.")
    wrong = []
    for name in dict.fromkeys([*own, *tensors]):
        theirs, ours = (tuple(side[name].shape) if name in side else "absent" for side in (tensors, own))
        if theirs != ours and (name.startswith(always) or "absent" not in (theirs, ours)):
            wrong.append(f"{name} is {theirs} there and {ours} in this model")
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(
            f"{path} holds another architecture: {', '.join(wrong[:3])}{more}; choose the --model it was made for"
        )
