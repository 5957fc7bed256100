"""Pretrained files: any float type, any grid, and one clear line for what does not fit."""

import pytest
import torch
from safetensors.torch import save_file

from kernels import UserError
from model import ViT, ViTConfig, load_pretrained

CONFIG = ViTConfig(width=24, depth=2, heads=3, patch=4)


@pytest.fixture
def source() -> ViT:
    torch.manual_seed(1)
    vit = ViT(CONFIG, 16)
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter)
    return vit


def write(path, weights, **changes):
    save_file({name: tensor for name, tensor in {**weights, **changes}.items() if tensor is not None}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_type_loads_into_fp32(tmp_path, source, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in source.state_dict().items()}
    vit = ViT(CONFIG, 16)
    report = load_pretrained(vit, write(tmp_path / "w.safetensors", stored))
    assert report.missing == report.unexpected == ()
    for name, tensor in vit.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float())


def test_missing_and_unexpected_keys_are_named_exactly(tmp_path, source):
    changes = {"norm.bias": None, "head.weight": torch.zeros(5, 24)}
    path = write(tmp_path / "w.safetensors", source.state_dict(), **changes)
    report = load_pretrained(ViT(CONFIG, 16), path)
    assert report.missing == ("norm.bias",)
    assert report.unexpected == ("head.weight",)
    assert str(report) == "missing: norm.bias; unused: head.weight"


def test_positional_embedding_follows_the_input_size(tmp_path, source):
    vit = ViT(CONFIG, 32)
    load_pretrained(vit, write(tmp_path / "w.safetensors", source.state_dict()))
    assert vit.pos_embed.shape == (1, 65, 24)
    assert torch.equal(vit.pos_embed[:, 0], source.pos_embed[:, 0])


def test_another_architecture_is_refused_by_name(tmp_path, source):
    path = write(tmp_path / "w.safetensors", source.state_dict())
    with pytest.raises(UserError, match=r"w.safetensors holds another architecture: cls_token is \(1, 1, 24\) there"):
        load_pretrained(ViT(ViTConfig(width=48, depth=2, heads=3, patch=4), 16), path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_an_unreadable_file_is_one_line(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="w.safetensors is not a readable safetensors file"):
        load_pretrained(ViT(CONFIG, 16), path)
    with pytest.raises(UserError, match="no such weights file"):
        load_pretrained(ViT(CONFIG, 16), tmp_path / "absent")
