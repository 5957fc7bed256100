"""Pretrained files: any float type, any grid, and one clear line for what does not fit."""

import errno
import os
import pickle
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kernels import UserError
from model import ViT, ViTConfig, load_pretrained, read_weights

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
    assert str(report) == "AugReg weights, inception normalisation; missing: norm.bias; unused: head.weight"


def test_positional_embedding_follows_the_input_size(tmp_path, source):
    vit = ViT(CONFIG, 32)
    load_pretrained(vit, write(tmp_path / "w.safetensors", source.state_dict()))
    assert vit.pos_embed.shape == (1, 65, 24)
    assert torch.equal(vit.pos_embed[:, 0], source.pos_embed[:, 0])


def test_another_architecture_is_refused_by_name(tmp_path, source):
    path = write(tmp_path / "w.safetensors", source.state_dict())
    with pytest.raises(UserError, match=r"w.safetensors holds another architecture: cls_token is \(1, 1, 24\) there"):
        load_pretrained(ViT(ViTConfig(width=48, depth=2, heads=3, patch=4), 16), path)


def refusal(path, config=CONFIG) -> str:
    """The one line, which names the file, that refuses it; nothing is printed beside it."""
    with pytest.raises(UserError) as caught, warnings.catch_warnings(record=True) as noise:
        warnings.simplefilter("always")
        load_pretrained(ViT(config, 16), path)
    message = str(caught.value)
    assert not [w.message for w in noise]
    assert "\n" not in message and str(path) in message and "weights_only" not in message
    return message


def test_the_first_three_mismatches_are_listed_with_both_shapes(tmp_path, source):
    path = write(tmp_path / "w.safetensors", source.state_dict())
    message = refusal(path, ViTConfig(width=48, depth=2, heads=3, patch=4))
    assert (
        "cls_token is (1, 1, 24) there and (1, 1, 48) in this model, pos_embed is (1, 17, 24) there and (1, 17, 48) in "
        "this model, patch_embed.proj.weight is (24, 3, 4, 4) there and (48, 3, 4, 4) in this model, and 27 more;"
    ) in message


def test_another_depth_is_another_architecture(tmp_path, source):
    path = write(tmp_path / "w.safetensors", source.state_dict())
    deeper, shallower = (ViTConfig(width=24, depth=depth, heads=3, patch=4) for depth in (3, 1))
    assert "blocks.2.norm1.weight is absent there and (24,) in this model" in refusal(path, deeper)
    assert "blocks.1.attn.proj.bias is (24,) there and absent in this model" in refusal(path, shallower)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"patch_embed.proj.weight": torch.zeros(24, 3, 8, 8)}, "patch_embed.proj.weight is (24, 3, 8, 8) there"),
        ({"pos_embed": torch.zeros(1, 18, 24)}, "pos_embed is (1, 18, 24) there"),
        ({"reg_token": torch.zeros(1, 4, 24)}, "reg_token is (1, 4, 24) there and absent in this model"),
        ({"blocks.0.attn.q_norm.weight": torch.zeros(8)}, "blocks.0.attn.q_norm.weight is (8,) there and absent"),
        ({"blocks.1.ls1.gamma": torch.ones(23)}, "blocks.1.ls1.gamma is (23,) there and absent"),
        ({"blocks.0.mlp.fc1.weight": None}, "blocks.0.mlp.fc1.weight is absent there and (96, 24) in this model"),
    ],
)
def test_what_would_change_the_features_is_refused(tmp_path, source, changes, first):
    path = write(tmp_path / "w.safetensors", source.state_dict(), **changes)
    assert f"holds another architecture: {first}" in refusal(path)


def test_a_convolutional_network_is_refused(tmp_path):
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7), "fc.bias": torch.zeros(5)}, tmp_path / "resnet.pth")
    assert "blocks.0.norm1.weight is absent there and (24,) in this model" in refusal(tmp_path / "resnet.pth")


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
@pytest.mark.parametrize(
    ("suffix", "kind"), [("safetensors", "safetensors"), ("npz", "NumPy"), ("pth", "PyTorch"), ("bin", "PyTorch")]
)
def test_an_unreadable_file_is_one_line(tmp_path, content, suffix, kind):
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    message = refusal(path)
    assert f"w.{suffix} is not a readable {kind} file" in message and "download it again" in message


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pth", "legacy.pth"])
def test_a_truncated_file_is_one_line(tmp_path, source, suffix):
    path, state = tmp_path / f"w.{suffix}", source.state_dict()
    if suffix == "safetensors":
        write(path, state)
    elif suffix == "npz":
        np.savez(path, **state)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == "pth")
    whole = path.read_bytes()
    for length in (len(whole) // 20, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:length])
        assert "is not a readable" in refusal(path)


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"model": {"cls_token": evil}}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, wrap, zipped):
    path, folder = tmp_path / "w.pth", tmp_path / "owned"
    torch.save(wrap(Malicious(folder)), path, _use_new_zipfile_serialization=zipped)
    message = refusal(path)
    assert f"unpickling it would run {os.name}.mkdir" in message and "safetensors" in message
    assert not folder.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_of_any_protocol_is_not_run(tmp_path, protocol):
    path, folder = tmp_path / "w.bin", tmp_path / "owned"
    path.write_bytes(pickle.dumps(Malicious(folder), protocol=protocol))
    refusal(path)
    assert not folder.exists()


def test_a_malicious_array_is_refused_and_not_run(tmp_path):
    path, folder = tmp_path / "w.npz", tmp_path / "owned"
    np.savez(path, cls=np.array([Malicious(folder)], dtype=object))
    assert "is not a readable NumPy file" in refusal(path)
    assert not folder.exists()


def test_a_whole_pickled_model_is_refused(tmp_path, source):
    torch.save(source, tmp_path / "w.pth")
    assert "save only the state dict" in refusal(tmp_path / "w.pth")


def test_files_that_are_no_weights(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pth")
    assert "holds no named tensors" in refusal(tmp_path / "w.pth")
    (tmp_path / "w.onnx").touch()
    assert "use one of .safetensors, .npz, .pth, .pt, .bin" in refusal(tmp_path / "w.onnx")
    assert refusal(tmp_path / "absent").startswith("no such weights file")


WRAPPERS = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", WRAPPERS)
def test_names_that_wrappers_prepend_are_taken_off(tmp_path, source, prefix):
    torch.save({prefix + name: tensor for name, tensor in source.state_dict().items()}, tmp_path / "w.pth")
    vit = ViT(CONFIG, 16)
    report = load_pretrained(vit, tmp_path / "w.pth")
    assert report.missing == report.unexpected == ()
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in vit.state_dict().items())


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_checkpoint_wrapped_module."])
def test_names_that_wrappers_of_blocks_insert_are_taken_off(tmp_path, source, wrapper):
    weights = {re.sub(r"^blocks\.\d\.", rf"\g<0>{wrapper}", name): t for name, t in source.state_dict().items()}
    assert f"blocks.0.{wrapper}norm1.weight" in weights
    report = load_pretrained(ViT(CONFIG, 16), write(tmp_path / "w.safetensors", weights))
    assert report.missing == report.unexpected == ()


def test_a_family_is_recognised_behind_a_wrapper(tmp_path):
    names = {"module.deit.embeddings.cls_token": torch.zeros(1, 1, 24)}
    assert read_weights(write(tmp_path / "w.safetensors", names)).family == "DeiT"


def test_two_tensors_of_one_name_are_refused(tmp_path, source):
    path = write(tmp_path / "w.safetensors", source.state_dict(), **{"module.cls_token": torch.ones(1, 1, 24)})
    assert "holds cls_token under two names" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "pos_embed", "blocks.1.attn.qkv.bias"])
def test_quantised_weights_are_refused(tmp_path, source, dtype, name):
    path = tmp_path / "w.pth"
    torch.save(source.state_dict() | {name: source.state_dict()[name].to(dtype)}, path)
    assert f"holds {name} as {dtype}" in refusal(path)


@pytest.mark.parametrize("stored", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_tensors_that_are_not_dense_are_refused(tmp_path, source, stored):
    path = tmp_path / "w.pth"
    torch.save(source.state_dict() | {"pos_embed": stored(source.pos_embed.detach())}, path)
    assert "holds pos_embed quantised, sparse or without values" in refusal(path)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_pointer_of_git_lfs_is_told_from_damage(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "is a pointer of Git LFS and not the weights: run git lfs pull there" in refusal(path)


def test_a_file_that_the_system_does_not_give_is_not_called_damaged(tmp_path, source, monkeypatch):
    path = write(tmp_path / "w.safetensors", source.state_dict())

    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "open", refuse)
    assert refusal(path) == f"{path} cannot be read: Permission denied"
