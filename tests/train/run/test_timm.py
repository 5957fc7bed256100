"""``--model timm:NAME``: trained, resumed, evaluated, predicted, published, under a decoder, or refused in one line."""

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from train.cli import main
from train.convert import main as convert
from train.evaluate import main as evaluate
from train.export import main as export
from train.predict import main as predict
from train.run import checkpoint
from train.run.build import load_checkpoint

SMALL = {
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "convnext_tiny": {"depths": (1, 1, 1, 1), "dims": (24, 48, 96, 192)},
    "vit_small_patch16_dinov3": {"embed_dim": 48, "depth": 4, "num_heads": 3},
}
SWIN, CONVNEXT, DINOV3 = (f"timm:{name}" for name in SMALL)
OPTIONS = ["--tasks", "seg,edge", "--set", "scenes=6", "--set", "val_scenes=2", "--batch-size", "2", "--workers", "0"]
OPTIONS += ["--image-size", "64", "--tracker", "none", "--set", "baselines=false", "--head", "pyramid"]
EXPERTS = ["--moe", "4/2/1/2", "--set", "lora_rank=2"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **(SMALL.get(name, {}) | given)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "swin"
    with pytest.MonkeyPatch.context() as patch:
        create = timm.create_model
        patch.setattr(timm, "create_model", lambda name, **given: create(name, **(SMALL.get(name, {}) | given)))
        argv = ["--model", SWIN, *EXPERTS, *OPTIONS, "--steps", "3", "--checkpoint-every", "2", "--keep", "2"]
        assert main([*argv, "--out", str(out)]) == 0
    return out


def test_a_run_is_resumed_with_the_same_bits(run, tmp_path):
    assert main(["--resume", str(run / "step-2"), "--out", str(tmp_path / "parts")]) == 0
    ours, theirs = (load_file(folder / "step-3" / "model.safetensors") for folder in (run, tmp_path / "parts"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_is_evaluated_predicts_photos_and_is_published(run, tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "photo.png")
    assert evaluate([str(run), "--out", str(tmp_path / "scores")]) == 0
    assert export([str(run), "--results", str(tmp_path / "scores"), "--to", str(tmp_path / "public")]) == 0
    assert SWIN in (tmp_path / "public/README.md").read_text()
    assert predict([str(tmp_path / "public"), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out/semseg/photo.png").size == (40, 24)


def test_weights_are_frozen_and_read_by_experts_or_a_decoder(tmp_path):
    theirs = timm.create_model("vit_small_patch16_dinov3", img_size=128)
    save_file(theirs.state_dict(), tmp_path / "dinov3.safetensors")
    argv = ["--model", DINOV3, "--pretrained", str(tmp_path / "dinov3.safetensors"), *OPTIONS, "--steps", "1"]
    assert main([*argv, *EXPERTS, "--out", str(tmp_path / "experts")]) == 0
    assert main([*argv, "--decoder", "mlore", "--out", str(tmp_path / "decoder")]) == 0
    for name, prefix in (("experts", "vit.net."), ("decoder", "encoder.net.")):
        state = load_checkpoint(checkpoint.find(tmp_path / name))[1].state_dict()
        if name == "decoder":
            assert not any(key.startswith(prefix) for key in state), "the encoder is not part of its checkpoint"
        else:
            weight = theirs.state_dict()["blocks.0.mlp.fc1.weight"]
            assert any(torch.equal(tensor, weight) for tensor in state.values() if tensor.shape == weight.shape)


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--model", "timm:swan_tiny"], "timm has no model 'swan_tiny'"),
        (
            ["--model", CONVNEXT, "--moe", "none", "--set", "lora_rank=4"],
            "give --set lora_rank=0 or --set lora_targets",
        ),
        (["--model", SWIN, "--image-size", "80"], "image size 80 is not a multiple of the patch size 32"),
        (["--model", DINOV3, "--compile"], "--compile is for our own ViTs"),
        (["--model", "swin"], "unknown model 'swin': choose among vit_micro"),
    ],
)
def test_a_mistake_is_one_line(argv, expected, tmp_path, error_of):
    assert expected in error_of(main, *OPTIONS, *argv, "--steps", "1", "--out", str(tmp_path / "run"))


def test_what_a_run_cannot_give_is_one_line(run, tmp_path, error_of):
    assert "takes our ViTs: give a folder" in error_of(export, str(run), "--to", str(tmp_path / "program.pt2"))
    assert "is not taken out of a run" in error_of(convert, str(run), "--to", str(tmp_path / "swin.safetensors"))
    as_weights = ["--model", SWIN, "--pretrained", str(run), "--out", str(tmp_path / "next")]
    assert "is a run, and timm:swin_tiny" in error_of(main, *OPTIONS, *as_weights, "--steps", "1")
    decoder = [*as_weights, "--decoder", "plain", "--steps", "1"]
    assert "decoders read four maps of one size" in error_of(main, *OPTIONS, *decoder)
