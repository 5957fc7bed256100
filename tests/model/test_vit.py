"""The backbone: shapes, positional embeddings, an independent forward pass, real weights."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F

from kernels import UserError
from model import VITS, ViT, ViTConfig, load_pretrained
from model.vit import resize_pos_embed

TINY = ViTConfig(width=24, depth=2, heads=3, patch=4)


@pytest.fixture
def vit() -> ViT:
    torch.manual_seed(0)
    vit = ViT(TINY, 16).double()
    for parameter in vit.parameters():  # away from the zeros of the initialisation
        torch.nn.init.normal_(parameter, std=0.1)
    return vit


@pytest.mark.parametrize("name", VITS)
def test_every_size_makes_tokens_of_its_width(name):
    with torch.device("meta"):
        config = VITS[name]
        vit = ViT(config, 4 * config.patch)
        tokens = vit.encode(vit.embed(torch.empty(2, 3, 4 * config.patch, 4 * config.patch)))
    assert tokens.shape == (2, 17, config.width)


def test_agrees_with_the_transformer_written_out(vit):
    """Same parameters, formulas of the ViT paper with explicit softmax attention, in fp64."""
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    weights = vit.state_dict()
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)  # (B, patches, 3*4*4)
    x = patches @ weights["patch_embed.proj.weight"].flatten(1).T + weights["patch_embed.proj.bias"]
    x = torch.cat([weights["cls_token"].expand(2, -1, -1), x], 1) + weights["pos_embed"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    for i in range(TINY.depth):
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, -1)
        heads = []
        for h in range(3):
            part = slice(8 * h, 8 * h + 8)
            attention = (q[..., part] @ k[..., part].mT / 8**0.5).softmax(-1)
            heads.append(attention @ v[..., part])
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.attn.proj")
        u = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(u * 0.5 * (1 + torch.erf(u / 2**0.5)), f"blocks.{i}.mlp.fc2")
    torch.testing.assert_close(vit.encode(vit.embed(images)), norm(x, "norm"), rtol=1e-11, atol=1e-11)


def test_any_input_size_whose_sides_are_multiples_of_the_patch(vit):
    assert vit.embed(torch.zeros(1, 3, 24, 8, dtype=torch.float64)).shape == (1, 1 + 6 * 2, 24)


def test_resized_positional_embedding_keeps_the_class_token_and_smooth_functions():
    ramp = torch.linspace(-1, 1, 14)
    plane = torch.stack([ramp[:, None].expand(14, 14), ramp.expand(14, 14)], -1).flatten(0, 1)
    pos_embed = torch.cat([torch.tensor([[7.0, 8.0]]), plane])[None]
    resized = resize_pos_embed(pos_embed, (28, 28))
    assert torch.equal(resized[:, 0], pos_embed[:, 0])
    inner = resized[0, 1:].unflatten(0, (28, 28))[4:-4, 4:-4]
    step = (inner[1:, :, 0] - inner[:-1, :, 0]).unique()
    torch.testing.assert_close(step, torch.full_like(step, 1 / 13), rtol=0, atol=1e-5)  # a plane stays a plane
    assert resize_pos_embed(pos_embed, (14, 14)) is pos_embed


def test_image_size_must_be_a_multiple_of_the_patch():
    with pytest.raises(UserError, match="image size 63 is not a multiple of the patch size 8"):
        ViT(VITS["vit_micro"], 63)


def test_real_weights_name_the_dogs_in_real_photos(vit_tiny_weights, pascal_mini):
    """The file's own ImageNet classifier on our features: dogs are its classes 151 to 268."""
    vit = ViT(VITS["vit_tiny"], 224).eval()
    report = load_pretrained(vit, vit_tiny_weights)
    assert report.missing == () and set(report.unexpected) == {"head.weight", "head.bias"}
    head = {name: tensor.float() for name, tensor in load_file(vit_tiny_weights).items() if name.startswith("head")}
    images = torch.stack([_square_photo(pascal_mini, name) for name in _photos_of_dogs(pascal_mini, 16)])
    with torch.inference_mode():
        class_token = vit.encode(vit.embed(images / 127.5 - 1))[:, 0]
    named = (class_token @ head["head.weight"].T + head["head.bias"]).argmax(-1)
    assert ((named >= 151) & (named <= 268)).float().mean() >= 0.75


def _photos_of_dogs(root, count):
    """Photos of which at least a third is dog (class 12), in order of their names."""
    labels = sorted((root / "semseg" / "VOC12").glob("*.png"))
    return list(islice((p.stem for p in labels if (np.asarray(Image.open(p)) == 12).mean() > 1 / 3), count))


def _square_photo(root, name):
    photo = Image.open(root / "JPEGImages" / f"{name}.jpg").convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1).float()
