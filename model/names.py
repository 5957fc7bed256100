"""Converts the naming schemes of ViT weights to timm's, which :class:`model.ViT` uses."""

import re
from collections.abc import Mapping
from functools import reduce

import torch
from torch import Tensor

# Each table maps old text to new text, applied in order. Then q, k and v are concatenated to one tensor.
PREFIX = re.compile(r"^((backbone|vit|deit|dinov2|dinov2_with_registers|dinov3_vit)\.)+")
META = {"register_tokens": "reg_token", "storage_tokens": "reg_token", "rope_embed.": "rope."}
TIMM_EVA = {".gamma_1": ".ls1.gamma", ".gamma_2": ".ls2.gamma"}  # of timm's class Eva, which DINOv3 is there
HUGGING_FACE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.": "blocks.",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    ".output.dense": ".mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "layernorm.": "norm.",
}
HUGGING_FACE_DINOV3 = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.": "patch_embed.proj.",
    "layer.": "blocks.",
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
JAX = {
    "/": ".",
    "Transformer.": "",
    "encoderblock_": "blocks.",
    "encoder_norm": "norm",
    "posembed_input.pos_embedding": "pos_embed",
    "embedding.": "patch_embed.proj.",
    "cls": "cls_token",
    "LayerNorm_0": "norm1",
    "LayerNorm_2": "norm2",
    "MultiHeadDotProductAttention_1.query": "attn.q",
    "MultiHeadDotProductAttention_1.key": "attn.k",
    "MultiHeadDotProductAttention_1.value": "attn.v",
    "MultiHeadDotProductAttention_1.out": "attn.proj",
    "MlpBlock_3.Dense_0": "mlp.fc1",
    "MlpBlock_3.Dense_1": "mlp.fc2",
    "kernel": "weight",
    "scale": "weight",
}
LAYER_SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}  # scale -> the linear map it follows


def to_timm(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by timm's names and in its layouts, LayerScale folded into the linear maps it follows.

    A name of no known scheme stays as it is.
    """
    tensors = unfolded(raw)
    _fold_layer_scales(tensors)
    return tensors


def unfolded(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`to_timm` with LayerScale as parameters of its own: names and layouts change, values do not."""
    tensors = _renamed(raw)
    _fuse_qkv(tensors)
    _mask_biases(tensors)
    if any(name.endswith(".gamma_1") for name in raw):
        _join_biases(tensors)
    return tensors


def _renamed(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if any("/" in name for name in raw):
        return {_rename(name, JAX): _torch_layout(name, tensor) for name, tensor in raw.items()}
    names = {name: PREFIX.sub("", name) for name in raw}
    schemes = {"encoder.layer.": HUGGING_FACE, "layer.": HUGGING_FACE_DINOV3}
    ours = META | TIMM_EVA
    scheme = next((schemes[start] for start in schemes if any(n.startswith(start) for n in names.values())), ours)
    return {_rename(names[name], scheme): tensor for name, tensor in raw.items()}


def _rename(name: str, scheme: Mapping[str, str]) -> str:
    return reduce(lambda name, pair: name.replace(*pair), scheme.items(), name)


def _torch_layout(name: str, tensor: Tensor) -> Tensor:
    """A JAX parameter in PyTorch's layout: (h, w, in, out) -> (out, in, h, w); (in, out) -> (out, in); heads merged."""
    if name.endswith("/bias"):  # query, key and value: (heads, d/heads)
        return tensor.flatten()
    if not name.endswith("/kernel"):
        return tensor
    if tensor.ndim == 3:  # out: (heads, d/heads, d); query, key and value: (d, heads, d/heads)
        tensor = tensor.flatten(0, 1) if "/out/" in name else tensor.flatten(1, 2)
    return tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T


def _fuse_qkv(tensors: dict[str, Tensor]) -> None:
    """One linear map instead of three. DINOv3's keys have no bias: it is 0."""
    for query in [name for name in tensors if ".attn.q." in name]:
        names = [query.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if query.endswith(".bias"):
            tensors.setdefault(names[1], torch.zeros_like(tensors[query]))
        shapes = {tensors[name].shape if name in tensors else None for name in names}
        if len(shapes) == 1:
            tensors[query.replace(".attn.q.", ".attn.qkv.")] = torch.cat([tensors.pop(name) for name in names])


def _join_biases(tensors: dict[str, Tensor]) -> None:
    """One bias of qkv from timm's q_bias and v_bias; each of them that the file lacks is 0, and so is that of k."""
    for weight in [name for name in tensors if name.endswith(".attn.qkv.weight")]:
        block, zero = weight.removesuffix("qkv.weight"), torch.zeros_like(tensors[weight][:, 0]).chunk(3)[0]
        q, v = (tensors.pop(f"{block}{part}_bias", zero) for part in "qv")
        tensors.setdefault(f"{block}qkv.bias", torch.cat([q, zero, v]))


def _mask_biases(tensors: dict[str, Tensor]) -> None:
    """DINOv3's own files hold a bias that is multiplied by a mask, which is 0 for the keys."""
    for name in [name for name in tensors if name.endswith(".bias_mask")]:
        bias = tensors.get(name.removesuffix("_mask"))
        if bias is not None and bias.shape == tensors[name].shape:
            mask = tensors.pop(name)
            tensors[name.removesuffix("_mask")] = torch.where(mask == 0, torch.zeros_like(bias), bias * mask)


def _fold_layer_scales(tensors: dict[str, Tensor]) -> None:
    """gamma * (W x + b) = (gamma W) x + gamma b, rounded once."""
    for name in [name for name in tensors if name.endswith(tuple(LAYER_SCALES))]:
        block, scale = name[: -len("ls1.gamma")], name[-len("ls1.gamma") :]
        weight, bias = (tensors.get(f"{block}{LAYER_SCALES[scale]}.{part}") for part in ("weight", "bias"))
        if weight is not None and bias is not None and weight.shape[:1] == bias.shape == tensors[name].shape:
            gamma = tensors.pop(name).double()
            tensors[f"{block}{LAYER_SCALES[scale]}.weight"] = (gamma[:, None] * weight).to(at_least_fp32(weight))
            tensors[f"{block}{LAYER_SCALES[scale]}.bias"] = (gamma * bias).to(at_least_fp32(bias))


def at_least_fp32(tensor: Tensor) -> torch.dtype:
    """fp32 or fp64; the type of a tensor that is no :func:`is_float` stays, so that it is seen."""
    return torch.promote_types(tensor.dtype, torch.float32) if is_float(tensor) else tensor.dtype


def is_float(tensor: Tensor) -> bool:
    """Whether it holds real numbers of 16 bits or more."""
    return tensor.is_floating_point() and tensor.dtype.itemsize >= 2
