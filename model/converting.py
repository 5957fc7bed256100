"""Writes a backbone by the names and in the layouts of timm's own files."""

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from kernels import UserError
from model.names import unfolded
from model.rope import RoPE
from model.vit import ViT, ViTConfig
from model.weights import Source, by_timm_names, is_pos_embed, load_pretrained

# Axes of the tensors by which a ViT's shape is told.
AXES = {"cls_token": 3, "patch_embed.proj.weight": 4, "pos_embed": 3, "reg_token": 3, "rope.periods": 1}


def convert_source(source: Source) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the backbone in ``source`` as timm stores it, the names that were left out: classifiers, mask tokens).

    :class:`UserError`: those of :func:`load_pretrained`, and a file that holds no complete ViT.
    """
    weights = by_timm_names(source)
    wrong = [name for name, axes in AXES.items() if name in weights.tensors and weights.tensors[name].ndim != axes]
    if wrong or not {"cls_token", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= weights.tensors.keys():
        raise UserError(f"{source.path} holds no ViT by names that are known: {', '.join([*source.raw][:3])}, ...")
    report = load_pretrained(_vit_like(weights.tensors, rope=source.family == "DINOv3"), weights)
    if report.missing:
        raise UserError(f"{source.path} lacks parameters of its ViT: {', '.join(report.missing)}")
    tensors = {name: tensor for name, tensor in unfolded(source.raw).items() if name not in report.unexpected}
    return timm_layout(tensors, source.family == "DINOv3"), report.unexpected


def timm_layout(tensors: Mapping[str, Tensor], rope: bool) -> dict[str, Tensor]:
    """Tensors of a whole ViT by timm's names, as the files of its class hold them: VisionTransformer, or Eva where
    positions are rotary (``rope``).

    With register tokens the class token has its position added, as in timm's files; its features stay the same bits.
    """
    out = dict(tensors)
    pos = out.get("pos_embed")
    if rope:
        _as_eva(out)
    elif pos is not None and "reg_token" in out and is_pos_embed(pos, pos.shape[-1]):
        out["cls_token"], out["pos_embed"] = out["cls_token"] + pos[:, :1], pos[:, 1:]
    return {name: tensor.contiguous() for name, tensor in out.items()}


def _vit_like(tensors: Mapping[str, Tensor], rope: bool) -> ViT:
    """A ViT without memory, of the shapes of ``tensors``. Heads matter for the number of rotary periods only."""
    width, patch = tensors["cls_token"].shape[-1], tensors["patch_embed.proj.weight"].shape[-1]
    pos, registers, periods = (tensors.get(name) for name in ("pos_embed", "reg_token", "rope.periods"))
    config = ViTConfig(
        width=width,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        heads=1 if periods is None else max(1, width // max(4 * len(periods), 1)),
        patch=patch,
        registers=0 if registers is None else registers.shape[1],
        rope=rope,
    )
    with torch.device("meta"):
        return ViT(config, patch * (1 if pos is None else isqrt(pos.shape[1] - 1)))


def _as_eva(tensors: dict[str, Tensor]) -> None:
    """Biases of queries and values apart, and none where all are 0; LayerScale, 1 where it was folded, as gamma_1 and
    gamma_2; no rotary periods. timm computes the periods: others than those stay, so that it refuses the file."""
    periods = tensors.get("rope.periods")
    if periods is not None and torch.allclose(periods.float(), RoPE(4 * len(periods)).periods, rtol=1e-6):
        del tensors["rope.periods"]
    biases: dict[str, Tensor] = {}
    for weight in [name for name in tensors if name.endswith(".attn.qkv.weight")]:
        block = weight.removesuffix("attn.qkv.weight")
        q, k, v = tensors.pop(f"{block}attn.qkv.bias").chunk(3)
        if k.any():
            raise UserError(f"{block}attn.qkv has a bias of keys, and timm's class Eva has none")
        biases |= {f"{block}attn.q_bias": q, f"{block}attn.v_bias": v}
        for i in (1, 2):
            tensors[f"{block}gamma_{i}"] = tensors.pop(f"{block}ls{i}.gamma", torch.ones_like(q))
    if any(bias.any() for bias in biases.values()):
        tensors |= biases
