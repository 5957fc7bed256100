"""One backbone written to disk under every naming scheme, by rules stated apart from those that read it."""

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels import UserError
from model import MultiTaskViT, ViT, ViTConfig, convert_source, load_pretrained, read_source
from model.weights import NORMALISATIONS, read_weights

CONFIG = ViTConfig(width=24, depth=2, heads=3, patch=4)
State = dict[str, Tensor]
QKV = ("query", "key", "value")


def hugging_face(state: State, prefix: str = "") -> State:
    out = {
        f"{prefix}embeddings.cls_token": state["cls_token"],
        f"{prefix}embeddings.position_embeddings": state["pos_embed"],
        "classifier.weight": torch.zeros(5, 24),
    }
    for end in ("weight", "bias"):
        out[f"{prefix}embeddings.patch_embeddings.projection.{end}"] = state[f"patch_embed.proj.{end}"]
        out[f"{prefix}layernorm.{end}"] = state[f"norm.{end}"]
        out[f"{prefix}pooler.dense.{end}"] = torch.zeros(24)
        for i in range(2):
            ours, theirs = f"blocks.{i}", f"{prefix}encoder.layer.{i}"
            for name, part in zip(QKV, state[f"{ours}.attn.qkv.{end}"].chunk(3), strict=True):
                out[f"{theirs}.attention.attention.{name}.{end}"] = part.contiguous()
            out[f"{theirs}.attention.output.dense.{end}"] = state[f"{ours}.attn.proj.{end}"]
            out[f"{theirs}.intermediate.dense.{end}"] = state[f"{ours}.mlp.fc1.{end}"]
            out[f"{theirs}.output.dense.{end}"] = state[f"{ours}.mlp.fc2.{end}"]
            out[f"{theirs}.layernorm_before.{end}"] = state[f"{ours}.norm1.{end}"]
            out[f"{theirs}.layernorm_after.{end}"] = state[f"{ours}.norm2.{end}"]
    return out


def hugging_face_dinov2(state: State) -> State:
    """Of Dinov2Model: norms and MLP as timm's, LayerScale (here ones, which change nothing) as layer_scale."""
    out = {f"dinov2.{name}": tensor for name, tensor in hugging_face(state).items()}
    changed = {"layernorm_before": "norm1", "layernorm_after": "norm2", "intermediate.dense": "mlp.fc1"}
    changed |= {f"{i}.output.dense": f"{i}.mlp.fc2" for i in range(2)}
    for old, new in changed.items():
        out = {name.replace(old, new): tensor for name, tensor in out.items()}
    scales = {f"dinov2.encoder.layer.{i}.layer_scale{j}.lambda1": torch.ones(24) for i in range(2) for j in (1, 2)}
    return {**out, **scales, "dinov2.embeddings.mask_token": torch.zeros(1, 24)}


def jax(state: State) -> dict[str, np.ndarray]:
    """Of google-research/vision_transformer: kernels (in, out), attention with its 3 heads of 8 as axes."""

    def dense(ours: str, theirs: str, shape: tuple[int, ...], bias: tuple[int, ...]) -> None:
        out[f"{theirs}/kernel"] = weights[f"{ours}.weight"].T.reshape(shape)
        out[f"{theirs}/bias"] = weights[f"{ours}.bias"].reshape(bias)

    def norm(ours: str, theirs: str) -> None:
        out[f"{theirs}/scale"], out[f"{theirs}/bias"] = weights[f"{ours}.weight"], weights[f"{ours}.bias"]

    weights = {name: tensor.numpy() for name, tensor in state.items()}
    out = {
        "cls": weights["cls_token"],
        "Transformer/posembed_input/pos_embedding": weights["pos_embed"],
        "embedding/kernel": weights["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": weights["patch_embed.proj.bias"],
        "head/kernel": np.zeros((24, 5), np.float32),
    }
    norm("norm", "Transformer/encoder_norm")
    for i in range(2):
        ours, theirs = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for end in ("weight", "bias"):
            for name, part in zip(QKV, np.split(weights[f"{ours}.attn.qkv.{end}"], 3), strict=True):
                weights[f"{name}.{end}"] = part
        for name in QKV:
            dense(name, f"{attention}/{name}", (24, 3, 8), (3, 8))
        dense(f"{ours}.attn.proj", f"{attention}/out", (3, 8, 24), (24,))
        dense(f"{ours}.mlp.fc1", f"{theirs}/MlpBlock_3/Dense_0", (24, 96), (96,))
        dense(f"{ours}.mlp.fc2", f"{theirs}/MlpBlock_3/Dense_1", (96, 24), (24,))
        norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0")
        norm(f"{ours}.norm2", f"{theirs}/LayerNorm_2")
    return out


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def dino_checkpoint(state: State) -> dict[str, object]:
    """Of DINO's training: another student, heads, options."""
    student = prefixed("module.backbone.", {name: torch.zeros_like(tensor) for name, tensor in state.items()})
    teacher = {**prefixed("backbone.", state), "head.mlp.0.weight": torch.zeros(2, 24)}
    return {"student": student, "teacher": teacher, "epoch": 3, "args": argparse.Namespace(arch="vit_small")}


def _npz(path: Path, state: State) -> None:
    np.savez(path, **jax(state))


def _pickle(wrap: Callable[[State], object]) -> Callable[[Path, State], None]:
    return lambda path, state: torch.save(wrap(state), path)


def _safetensors(wrap: Callable[[State], State]) -> Callable[[Path, State], None]:
    return lambda path, state: save_file(wrap(state), path)


SCHEMES = {  # file name -> (family, write)
    "timm.safetensors": ("AugReg", _safetensors(dict)),
    "timm.pth": ("AugReg", _pickle(dict)),
    "ddp.pt": ("AugReg", _pickle(lambda s: {"state_dict": prefixed("module.", s), "epoch": 3})),
    "nested.pth": ("DeiT", _pickle(lambda s: {"model": s})),
    "deit_tiny_patch16_224.safetensors": ("DeiT", _safetensors(dict)),
    "dino_vitbase16_pretrain.pth": ("DINO", _pickle(dict)),
    "checkpoint.pth": ("DINO", _pickle(dino_checkpoint)),
    "hf.safetensors": ("Hugging Face ViT", _safetensors(hugging_face)),
    "hf_prefixed.bin": ("Hugging Face ViT", _pickle(lambda s: hugging_face(s, "vit."))),
    "hf_distilled.bin": ("DeiT", _pickle(lambda s: hugging_face(s, "deit."))),
    "hf_scaled.safetensors": ("DINOv2", _safetensors(hugging_face_dinov2)),
    "augreg.npz": ("AugReg", _npz),
}


@pytest.fixture
def source() -> ViT:
    return random_vit(CONFIG)


def random_vit(config: ViTConfig) -> ViT:
    torch.manual_seed(2)
    vit = ViT(config, 16)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vit


def features(vit: ViT) -> Tensor:
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return vit.double().encode(vit.embed(images))


def assert_same_features(path: Path, source: ViT, config: ViTConfig = CONFIG) -> None:
    vit = ViT(read_weights(path).adjust(replace(config, patch=16)), 16)
    assert load_pretrained(vit, path).missing == ()
    torch.testing.assert_close(features(vit), features(source), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_every_naming_scheme_gives_the_same_features(tmp_path, source, name):
    family, write = SCHEMES[name]
    write(tmp_path / name, source.state_dict())
    assert_same_features(tmp_path / name, source)
    weights = read_weights(tmp_path / name)
    assert weights.family == family
    assert weights.adjust(replace(CONFIG, patch=16)) == CONFIG


def converted(path: Path) -> tuple[Path, tuple[str, ...]]:
    """(the same weights by timm's names in another file, what was left out)."""
    tensors, left = convert_source(read_source(path))
    save_file(tensors, path.with_name("converted.safetensors"))
    return path.with_name("converted.safetensors"), left


@pytest.mark.parametrize("name", SCHEMES)
def test_every_naming_scheme_is_rewritten_by_timms_names_with_the_same_bits(tmp_path, source, name):
    SCHEMES[name][1](tmp_path / name, source.state_dict())
    path, left = converted(tmp_path / name)
    written, expected = load_file(path), source.state_dict()
    if name == "hf_scaled.safetensors":  # timm's DINOv2 has them too
        expected |= {f"blocks.{i}.ls{j}.gamma": torch.ones(24) for i in range(2) for j in (1, 2)}
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[key], expected[key]) for key in expected)
    assert all("blocks" not in key for key in left)
    again = read_weights(path).tensors
    assert all(
        torch.equal(again[key], tensor) for key, tensor in read_weights(tmp_path / name).tensors.items() if key in again
    )


def test_layer_scale_is_not_folded_when_it_is_rewritten(tmp_path, source):
    stored = {key: tensor.half() for key, tensor in source.state_dict().items()}
    scales = {f"blocks.{i}.ls{j}.gamma": torch.randn(24).half() for i in range(2) for j in (1, 2)}
    torch.save({**stored, **scales, "mask_token": torch.zeros(1, 24)}, tmp_path / "w.pth")
    path, left = converted(tmp_path / "w.pth")
    written = load_file(path)
    assert left == ("mask_token",) and written.keys() == {*stored, *scales}
    assert all(torch.equal(written[key], tensor) for key, tensor in {**stored, **scales}.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cls_token": None}, "w.pth holds no ViT by names that are known: pos_embed, patch_embed.proj.weight"),
        ({"norm.bias": None}, "w.pth lacks parameters of its ViT: norm.bias"),
        ({"blocks.0.mlp.w12.weight": torch.ones(2)}, "blocks.0.mlp.w12.weight is (2,) there and absent in this model"),
    ],
)
def test_other_architectures_are_not_rewritten(tmp_path, source, changes, message):
    tensors = {key: tensor for key, tensor in {**source.state_dict(), **changes}.items() if tensor is not None}
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(UserError, match=re.escape(message)):
        convert_source(read_source(tmp_path / "w.pth"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["timm.safetensors", "nested.pth", "hf.safetensors"])
def test_half_precision_files_lose_nothing_more(tmp_path, source, name, dtype):
    stored = {key: tensor.to(dtype) for key, tensor in source.state_dict().items()}
    SCHEMES[name][1](tmp_path / name, stored)
    source.load_state_dict(stored)
    assert_same_features(tmp_path / name, source)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("names", ["meta", "hugging face"])
def test_layer_scale_is_folded_into_the_maps_it_follows(tmp_path, source, dtype, names):
    stored = {key: tensor.to(dtype) for key, tensor in source.state_dict().items()}
    source.load_state_dict(stored)
    scales = {f"blocks.{i}.ls{j}.gamma": torch.randn(24).to(dtype) for i in range(2) for j in (1, 2)}
    written = {**stored, **scales, "mask_token": torch.zeros(1, 24)}
    if names == "hugging face":
        gammas = {f"dinov2.encoder.layer.{k[7]}.layer_scale{k[11]}.lambda1": v for k, v in scales.items()}
        written = {**hugging_face_dinov2(stored), **gammas}
    torch.save(written, tmp_path / "w.pth")
    for i, block in enumerate(source.blocks):  # the reference applies them where DINOv2 does
        for j, module in ((1, block.attn), (2, block.mlp)):
            module.register_forward_hook(lambda _, __, out, gamma=scales[f"blocks.{i}.ls{j}.gamma"]: out * gamma)
    assert_same_features(tmp_path / "w.pth", source)
    assert "mask_token" in load_pretrained(ViT(CONFIG, 16), tmp_path / "w.pth").unexpected
    assert read_weights(tmp_path / "w.pth").family == "DINOv2"


def without_class_position(state: State) -> State:
    """timm's no_embed_class: the class token has its position added already."""
    class_position, patches = state["pos_embed"].split([1, 16], dim=1)
    return {**state, "cls_token": state["cls_token"] + class_position, "pos_embed": patches.contiguous()}


def with_register_positions(state: State) -> State:
    """Positions for registers too, as in timm's models that embed their whole prefix."""
    added = torch.randn(1, 4, 24)
    pos_embed = torch.cat([state["pos_embed"][:, :1], added, state["pos_embed"][:, 1:]], 1)
    return {**state, "reg_token": state["reg_token"] - added, "pos_embed": pos_embed}


def meta_registers(state: State) -> State:
    return {name.replace("reg_token", "register_tokens"): tensor for name, tensor in state.items()}


def hugging_face_registers(state: State) -> State:
    return {**hugging_face(state), "embeddings.register_tokens": state["reg_token"]}


@pytest.mark.parametrize(
    "wrap", [dict, without_class_position, with_register_positions, meta_registers, hugging_face_registers]
)
def test_register_tokens_and_their_positions(tmp_path, wrap):
    config = replace(CONFIG, registers=4)
    source = random_vit(config)
    save_file(wrap(source.state_dict()), tmp_path / "w.safetensors")
    assert read_weights(tmp_path / "w.safetensors").adjust(CONFIG) == config
    assert_same_features(tmp_path / "w.safetensors", source)
    path, _ = converted(tmp_path / "w.safetensors")
    prefix = load_file(path)["pos_embed"].shape[1] - 16
    assert prefix == (5 if wrap is with_register_positions else 0), "timm's no_embed_class, or its whole prefix"
    assert_same_features(path, source)


def test_registers_stand_between_the_class_token_and_the_patches():
    config = replace(CONFIG, registers=4)
    vit = random_vit(config)
    tokens = vit.embed(torch.zeros(2, 3, 16, 16))
    assert tokens.shape == (2, 1 + 4 + 16, 24)
    assert torch.equal(tokens[0, 1:5], vit.reg_token[0])
    assert torch.equal(tokens[0, 0], vit.cls_token[0, 0] + vit.pos_embed[0, 0])


@pytest.mark.parametrize("head", ["light", "up"])
def test_heads_see_the_patches_alone(head):
    """Without blocks, tokens do not mix, so a prediction cannot change with the registers."""
    vit = random_vit(replace(CONFIG, depth=0, registers=4))
    model = MultiTaskViT(vit, {"seg": 5}, head).eval()
    images = torch.randint(0, 256, (1, 3, 16, 16))
    before = model(images)["seg"]
    torch.nn.init.normal_(vit.reg_token)
    torch.nn.init.normal_(vit.cls_token)
    assert before.shape == (1, 5, 16, 16) and torch.equal(model(images)["seg"], before)


def test_positions_without_class_token(tmp_path, source):
    save_file(without_class_position(source.state_dict()), tmp_path / "w.safetensors")
    assert_same_features(tmp_path / "w.safetensors", source)
    larger = ViT(CONFIG, 32)
    load_pretrained(larger, tmp_path / "w.safetensors")
    assert larger.pos_embed.shape == (1, 65, 24) and not larger.pos_embed[:, 0].any()


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_resizes_its_positions_alike(tmp_path, source, name):
    save_file(source.state_dict(), tmp_path / "plain.safetensors")
    SCHEMES[name][1](tmp_path / name, source.state_dict())
    expected, vit = ViT(CONFIG, 24), ViT(CONFIG, 24)
    load_pretrained(expected, tmp_path / "plain.safetensors")
    load_pretrained(vit, tmp_path / name)
    assert torch.equal(vit.pos_embed, expected.pos_embed)


@pytest.mark.parametrize("name", SCHEMES)
def test_normalisation_goes_with_the_family(tmp_path, source, name):
    SCHEMES[name][1](tmp_path / name, source.state_dict())
    report = load_pretrained(ViT(CONFIG, 16), tmp_path / name)
    imagenet = SCHEMES[name][0] in ("DeiT", "DINO", "DINOv2")
    assert report.normalisation == ("imagenet" if imagenet else "inception")
    assert str(report).startswith(f"{report.family} weights, {report.normalisation} normalisation; ")
    mean, std = NORMALISATIONS[report.normalisation]
    assert (mean[0], std[2]) == ((0.485, 0.225) if imagenet else (0.5, 0.5))


def test_the_weights_that_were_read_need_no_second_reading(tmp_path, source):
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    weights = read_weights(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").unlink()
    for size in (16, 32, 16):  # the first load leaves them as they were
        vit = ViT(CONFIG, size)
        load_pretrained(vit, weights)
    assert torch.equal(vit.pos_embed, source.pos_embed)
