"""``python -m train.convert``: backbones by timm's names, with the bits that they had."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import VITS, ViT, ViTConfig, load_pretrained
from train.cli import main as train
from train.convert import main as convert

SCENES = ["--set", "scenes=4", "--set", "val_scenes=2", "--batch-size", "2", "--image-size", "16", "--workers", "0"]


def test_a_backbone_trained_in_full_is_written_with_its_bits(tiny_scenes_run, tmp_path, capsys):
    path = tmp_path / "new" / "backbone.safetensors"
    assert convert([str(tiny_scenes_run), "--to", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "left out: heads, task embeddings, experts 16/3/1/4" in printed and "normalisation" not in printed
    stored = load_file(tiny_scenes_run / "last" / "model.safetensors")
    vit = ViT(VITS["vit_micro"], 64)
    assert load_file(path).keys() == vit.state_dict().keys()
    report = load_pretrained(vit, path)
    assert report.missing == report.unexpected == ()
    for name, tensor in vit.state_dict().items():
        assert torch.equal(tensor, stored.get(f"vit.{name}", stored.get(f"vit.{name}".replace("mlp.", "mlp.base.")))), (
            name
        )


@pytest.mark.parametrize("adapters", [["--site", "fc1"], ["--moe", "none"]])
def test_a_frozen_backbone_comes_back_as_the_file_it_was(adapters, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(ViT(VITS["vit_micro"], 16).state_dict(), tmp_path / "dino_micro.safetensors")
    frozen = ["--pretrained", "dino_micro.safetensors", "--tasks", "seg", "--steps", "1", "--set", "lora_rank=2"]
    assert train([*frozen, *adapters, *SCENES, "--out", "run"]) == 0
    capsys.readouterr()
    assert convert(["run", "--to", "again.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "LoRA of rank 2" in printed and "--set normalisation=imagenet" in printed
    before, after = (load_file(f"{name}.safetensors") for name in ("dino_micro", "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_real_file_of_timm_keeps_its_names_and_bits(vit_tiny_weights, tmp_path):
    assert convert([str(vit_tiny_weights), "--to", str(tmp_path / "tiny.safetensors")]) == 0
    before, after = load_file(vit_tiny_weights), load_file(tmp_path / "tiny.safetensors")
    assert {*before} - {*after} == {"head.weight", "head.bias"}
    assert all(
        torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype for name, tensor in after.items()
    )


def test_a_folder_of_the_hub_is_no_run(tmp_path):
    folder = tmp_path / "vit"
    folder.mkdir()
    save_file(ViT(ViTConfig(width=24, depth=2, heads=3, patch=4), 16).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text('{"architecture": "vit"}')
    assert convert([str(folder), "--to", str(tmp_path / "w.safetensors")]) == 0
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "w.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_mistakes_are_one_line(tiny_scenes_run, pascal_copy, tmp_path, error_of):
    path = tmp_path / "w.safetensors"
    save_file(ViT(ViTConfig(width=24, depth=2, heads=3, patch=4), 16).state_dict(), path)
    assert "exists already and is not overwritten" in error_of(convert, path, "--to", path)
    assert "must end in .safetensors" in error_of(convert, path, "--to", tmp_path / "w.pth")
    assert "which is only read" in error_of(convert, path, "--to", pascal_copy / "w.safetensors")
    to = tmp_path / "to.safetensors"
    assert "no such weights file" in error_of(convert, tmp_path / "absent.safetensors", "--to", to)
    assert "is not a checkpoint" in error_of(convert, tmp_path, "--to", to)
    run = shutil.copytree(tiny_scenes_run, tmp_path / "run", symlinks=True)
    with (run / "last" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    assert "damaged" in error_of(convert, run, "--to", to)
    assert not to.exists()


def test_a_decoder_names_the_weights_to_convert(tmp_path, monkeypatch, error_of):
    monkeypatch.chdir(tmp_path)
    save_file(ViT(VITS["vit_micro"], 16).state_dict(), tmp_path / "micro.safetensors")
    argv = ["--decoder", "plain", "--pretrained", "micro.safetensors", "--tasks", "seg", "--steps", "1", *SCENES]
    assert train([*argv, "--out", "run"]) == 0
    assert f"take {tmp_path / 'micro.safetensors'} instead" in error_of(convert, "run", "--to", "to.safetensors")
