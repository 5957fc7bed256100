"""Decoders on a frozen encoder, by the commands: trained, resumed, scored, and refused on another encoder."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from kernels.dispatch import known_family
from model import VITS, ViT
from train.cli import main
from train.compare import main as compare
from train.evaluate import main as evaluate
from train.predict import main as predict

SCENES = ["--set", "scenes=8", "--set", "val_scenes=3", "--batch-size", "4", "--image-size", "16", "--workers", "0"]
ALL = "seg,parts,sal,normals,edge"


def save_encoder(path, seed=0):
    torch.manual_seed(seed)
    vit = ViT(VITS["vit_micro"], 16)
    save_file(vit.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A weights file of a micro ViT."""
    return save_encoder(tmp_path_factory.mktemp("encoder") / "micro.safetensors")


def train(out, encoder, *options):
    assert main(["--pretrained", str(encoder), *options, *SCENES, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def run(encoder, tmp_path_factory):
    """Two steps of fgmoe on all tasks."""
    return train(
        tmp_path_factory.mktemp("runs") / "fgmoe", encoder, "--decoder", "fgmoe", "--tasks", ALL, "--steps", "2"
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--decoder", "fgmoe", "--gating", "ase", "--fg", "2/1/2/1"],
        ["--decoder", "fgmoe", "--fg", "4/2/1/0", "--set", "fg_global=false", "--set", "fg_mixer=false"],
        ["--decoder", "plain"],
        ["--decoder", "mlore"],
        ["--decoder", "mlore", "--gating", "topk-renorm"],
        ["--decoder", "fgmoe", "--set", "precision=bf16"],
    ],
    ids=lambda options: " ".join(options),
)
def test_every_option_trains(options, encoder, tmp_path):
    out = train(tmp_path / "run", encoder, *options, "--tasks", "seg,edge", "--steps", "2")
    results = json.loads((out / "results.json").read_text())
    assert results["model"]["decoder"] == options[1] and results["model"]["backbone"] == "frozen"
    assert 0 < results["parameters"]["trainable"] < results["parameters"]["total"]
    assert set(results["final_losses"]) == {"seg", "edge"}


def test_triton_trains_as_the_reference(encoder, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="Triton's wheels are for Linux")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    known_family.cache_clear()  # another test may have asked without the interpreter
    options, losses = ["--decoder", "fgmoe", "--fg", "2/1/2/1", "--tasks", "seg,edge", "--steps", "2"], {}
    options += ["--set", "decoder_width=32"]  # interpreted, the default takes half a minute
    for kernel in ("triton", "reference"):
        out = train(tmp_path / kernel, encoder, *options, "--kernel", kernel)
        results = json.loads((out / "results.json").read_text())
        assert results["kernel"] == kernel
        losses[kernel] = results["final_losses"]
    # Two steps of AdamW, whose first is as large for a gradient of 1e-8 as for one of 1: rounding may grow.
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-4)


def test_the_run_says_that_it_is_a_reconstruction(encoder, tmp_path, capsys):
    train(tmp_path / "run", encoder, "--decoder", "fgmoe", "--tasks", "seg", "--steps", "1", "--set", "fg_mixer=false")
    out = capsys.readouterr().out
    assert "fgmoe (a reconstruction): 4/2/4/1, gating naive-shared (default), no mixer, kernel reference" in out
    assert "encoder frozen, one pass per image\n" in out


def test_a_checkpoint_holds_the_decoder_alone(run):
    names = load_file(run / "last" / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"decoder", "encoder_sha256", "image_mean", "image_std"}


def test_a_resumed_run_gives_the_bits_of_one_that_was_not(run, encoder, tmp_path):
    options = ["--decoder", "fgmoe", "--tasks", ALL]
    out = train(tmp_path / "run", encoder, *options, "--steps", "4", "--checkpoint-every", "2", "--keep", "2")
    again = tmp_path / "again"
    shutil.copytree(out / "step-2", again / "step-2")
    assert main(["--resume", str(again / "step-2"), "--out", str(again)]) == 0
    ours, theirs = (load_file(folder / "last" / "model.safetensors") for folder in (out, again))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_is_scored_predicts_and_compares(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of the encoder's weights does not depend on the folder
    assert evaluate([str(run), "--workers", "0", "--out", "scored"]) == 0
    scored, trained = (json.loads((folder / "results.json").read_text()) for folder in (tmp_path / "scored", run))
    assert scored["metrics"]["seg"]["mIoU"] == pytest.approx(trained["metrics"]["seg"]["mIoU"], rel=1e-5)
    Image.new("RGB", (40, 30), "green").save("photo.png")
    assert predict([str(run), "photo.png", "--out", "pictures"]) == 0
    assert Image.open("pictures/normals/photo.png").size == (40, 30)
    shutil.copytree(run, "again", symlinks=True)
    assert compare([str(run), "again", "--out", "compared"]) == 0
    assert (tmp_path / "compared" / "predictions.png").is_file()


def test_another_encoder_and_a_missing_one_are_refused(tmp_path, error_of):
    encoder = save_encoder(tmp_path / "micro.safetensors")
    out = train(tmp_path / "run", encoder, "--decoder", "fgmoe", "--tasks", "seg", "--steps", "1")
    resumed = ["--resume", out / "last", "--steps", "2"]
    save_encoder(encoder, seed=1)
    for command, argv in ((evaluate, [out, "--workers", "0", "--out", tmp_path / "scored"]), (main, resumed)):
        error = error_of(command, *argv)
        assert "this decoder was trained on an encoder whose weights have sha256" in error
        assert "give the --pretrained weights that it was trained with" in error
    encoder.rename(tmp_path / "moved.safetensors")
    error = error_of(evaluate, out, "--out", tmp_path / "scored")
    assert f"the encoder's weights are not at {encoder}: bring them there" in error
    save_encoder(tmp_path / "moved.safetensors")  # a resumed run may name another path of the same weights
    assert main([*map(str, resumed), "--pretrained", str(tmp_path / "moved.safetensors")]) == 0


@pytest.mark.parametrize("decoder", ["fgmoe", "mlore"])
def test_a_finished_run_is_an_encoder_per_image_and_task(decoder, tiny_scenes_run, tmp_path, capsys, error_of):
    """The encoder was trained on seg and sal."""
    argv = ["--decoder", decoder, "--pretrained", str(tiny_scenes_run), *SCENES, "--steps", "2"]
    assert main([*argv, "--tasks", "sal", "--out", str(tmp_path / "run")]) == 0
    assert "encoder frozen, one pass per image and task" in capsys.readouterr().out
    assert evaluate([str(tmp_path / "run"), "--workers", "0", "--out", str(tmp_path / "scored")]) == 0
    error = error_of(main, *argv, "--tasks", "sal,edge", "--out", tmp_path / "other")
    assert "the encoder has no task edge: choose --tasks among seg, sal" in error
    error = error_of(main, *argv, "--tasks", "sal", "--model", "vit_tiny", "--out", tmp_path / "other")
    assert "is a vit_micro: give --model vit_micro" in error
    nested = ["--decoder", decoder, "--pretrained", tmp_path / "run", *SCENES, "--steps", "2", "--tasks", "sal"]
    assert "holds a decoder" in error_of(main, *nested, "--out", tmp_path / "other")


def test_a_decoder_without_a_trained_encoder_is_refused(tmp_path, error_of):
    error = error_of(main, "--decoder", "fgmoe", *SCENES, "--out", tmp_path / "run")
    assert "--decoder fgmoe needs a trained encoder: give --pretrained FILE, or the folder of a run" in error
    error = error_of(main, "--decoder", "fgmoe", "--moe", "8/2/1/2", *SCENES, "--out", tmp_path / "run")
    assert "--moe 8/2/1/2 adapts the backbone, which --decoder fgmoe freezes: drop --moe" in error
