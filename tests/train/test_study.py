"""Studies by their command, with runs of two steps: complete, killed and continued, and refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from model import VITS, ViT, load_pretrained
from train.cli import main as train
from train.config.arms import FIGURES
from train.run import checkpoint
from train.run.arms import Runs
from train.run.backbone import weights_of_run
from train.study import build_parser, main, pretrained, shared_settings

TINY = ["--set", "scenes=8", "--set", "val_scenes=2", "--set", "image_size=16", "--set", "batch_size=4"]
TINY += ["--steps", "2", "--workers", "0"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A run of the recipe that a study on rendered scenes begins with, of two steps."""
    out = tmp_path_factory.mktemp("backbone") / "run"
    assert train(["--recipe", "scenes-pretrain", "--tracker", "none", *TINY, "--out", str(out)]) == 0
    return out


@pytest.mark.long
def test_a_study_that_is_killed_is_continued_to_the_same_numbers(backbone, tmp_path, capsys):
    """Every figure, with one seed each."""
    argv = ["all", "--seeds", "1", "--pretrained", str(backbone), *TINY]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    took = time.monotonic() - began
    process = subprocess.Popen([sys.executable, "-m", "train.study", *argv, "--out", str(tmp_path / "killed")], env=env)
    time.sleep(random.Random(took).uniform(0.2, 0.9) * took)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main([*argv, "--out", str(tmp_path / "killed")]) == 0
    for figure in FIGURES:
        whole, killed = (json.loads((tmp_path / out / f"{figure}.json").read_text()) for out in ("whole", "killed"))
        assert whole["arms"] == killed["arms"] and whole["single_task_models"] == killed["single_task_models"]
        assert whole["seeds"] == {"finished": 1, "wanted": 1}
        assert [*whole["arms"]] == [*FIGURES[figure]]
        for suffix in ("md", "png"):
            assert (tmp_path / "whole" / f"{figure}.{suffix}").stat().st_size > 0
    assert "inconclusive" in (tmp_path / "whole" / "fig2.md").read_text()
    routing = [(tmp_path / out / "routing.json").read_text() for out in ("whole", "killed")]
    assert routing[0] == routing[1] and (tmp_path / "whole" / "fig4.png").exists()


def test_finished_runs_are_not_repeated_and_other_settings_are_refused(backbone, tmp_path, error_of):
    argv = ["fig2", "--seeds", "1", "--pretrained", str(backbone), *TINY, "--out", str(tmp_path)]
    assert main(argv) == 0
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/results.json")}
    assert len(runs) == 5 + 4
    assert not any(json.loads(path.read_text())["metrics_constant"] for path in runs), "no run scores baselines"
    assert main([*argv, "--seeds", "2"]) == 0
    assert {path: path.stat().st_mtime_ns for path in runs} == runs
    study = json.loads((tmp_path / "fig2.json").read_text())
    assert study["seeds"] == {"finished": 2, "wanted": 2} and "2 seeds" in study["note"]
    assert all(len(arm["delta_m"]) == 2 for arm in study["arms"].values())
    error = error_of(main, *argv, "--steps", "3")
    assert "was trained with other settings (steps 2 -> 3): choose another --out" in error


def test_a_command_in_the_results_trains_the_same_run_again(backbone, tmp_path):
    assert main(["fig2", "--seeds", "1", "--pretrained", str(backbone), *TINY, "--out", str(tmp_path)]) == 0
    command = json.loads((tmp_path / "fig2.json").read_text())["commands"]["stl_sal"].split()
    assert command[:3] == ["python", "-m", "train"]
    again = [*command[3 : command.index("--out")], *command[command.index("--out") + 2 :], "--out", str(tmp_path / "x")]
    assert train(again) == 0
    ours, theirs = (checkpoint.read_weights(checkpoint.find(tmp_path / path)) for path in ("x", "runs/stl_sal-0"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_study_on_scenes_trains_its_backbone_on_one_task(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        Runs,
        "run",
        lambda runs, arm, seed: asked.append(runs.flags(arm, seed)) or {"protocol": "scenes", "metrics": {}},
    )
    options = build_parser().parse_args(["fig2", "--steps", "5", "--set", "image_size=32"])
    assert pretrained(tmp_path, shared_settings(options)) == str(tmp_path / "scenes_pretrain_seg-1000")
    (flags,) = asked
    assert flags["tasks"] == "seg" and flags["moe"] == "none" and flags["image_size"] == "32" and flags["steps"] == 600


def test_mistakes_are_one_line(backbone, tmp_path, error_of):
    assert "--data needs --pretrained" in error_of(main, "fig2", "--data", tmp_path)
    assert "--seeds 0" in error_of(main, "fig2", "--seeds", 0)
    out = ["--pretrained", backbone, "--out", tmp_path / "study", *TINY]
    for figure, name, value in (
        ("fig2", "seed", 7),
        ("fig2", "moe", "none"),
        ("fig2", "tasks", "seg"),
        ("fig2", "out", tmp_path),
        ("fig3a", "lora-rank", 2),
        ("decoders", "decoder_width", 8),
        ("fig4", "routing_every", 1),
        ("weighting", "weighting", "dwa"),
    ):
        error = error_of(main, figure, *out, "--set", f"{name}={value}")
        assert f"leave out --set {name.replace('-', '_')}" in error
    assert not (tmp_path / "study").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["fig5"])


def test_the_backbone_of_a_run_with_one_task_has_its_embedding_in_the_positions(backbone):
    tensors = checkpoint.read_weights(backbone / "last")
    vit = ViT(VITS["vit_micro"], 16)
    report = load_pretrained(vit, weights_of_run(checkpoint.find(backbone)))
    assert not report.missing and not report.unexpected
    plain = ViT(VITS["vit_micro"], 16)
    plain.load_state_dict({name.removeprefix("vit."): t for name, t in tensors.items() if name.startswith("vit.")})
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(vit.embed(images), plain.embed(images) + tensors["task_embed"][0])


def test_adapters_of_a_run_are_left_out_of_its_backbone(tiny_scenes_run, tmp_path, capsys):
    flags = [
        "--pretrained",
        str(tiny_scenes_run),
        "--recipe",
        "scenes_adapt",
        "--tasks",
        "seg,edge",
        "--tracker",
        "none",
    ]
    assert train([*flags, *TINY, "--out", str(tmp_path / "run")]) == 0
    assert "every key matched" in capsys.readouterr().out
    before, after = (checkpoint.read_weights(checkpoint.find(run)) for run in (tiny_scenes_run, tmp_path / "run"))
    name = "vit.blocks.0.mlp.fc1.weight"
    assert torch.equal(before[name], after[name])  # frozen


def test_the_backbone_is_trained_too_where_asked(backbone, tmp_path):
    flags = [
        "--pretrained",
        str(backbone),
        "--recipe",
        "scenes_adapt",
        "--set",
        "train_backbone=true",
        "--tracker",
        "none",
    ]
    assert train([*flags, "--moe", "none", *TINY, "--tasks", "seg", "--out", str(tmp_path / "run")]) == 0
    before, after = (checkpoint.read_weights(checkpoint.find(run)) for run in (backbone, tmp_path / "run"))
    name = "vit.blocks.0.attn.qkv.weight"
    assert not torch.equal(before[name], after[name])
    assert json.loads((tmp_path / "run" / "results.json").read_text())["model"]["backbone"] == "trained"


def test_a_pretrained_backbone_has_a_learning_rate_of_its_own(backbone, tmp_path):
    """Of 0: then it stays as it was, and the heads learn."""
    flags = [
        "--pretrained",
        str(backbone),
        "--recipe",
        "scenes_adapt",
        "--set",
        "train_backbone=true",
        "--tracker",
        "none",
    ]
    flags += ["--set", "backbone_lr=0", "--set", "weight_decay=0", "--moe", "none", "--tasks", "seg"]
    assert train([*flags, *TINY, "--out", str(tmp_path / "run")]) == 0
    before, after = (checkpoint.read_weights(checkpoint.find(run)) for run in (backbone, tmp_path / "run"))
    assert torch.equal(before["vit.blocks.0.attn.qkv.weight"], after["vit.blocks.0.attn.qkv.weight"])
    rate = torch.load(checkpoint.find(tmp_path / "run") / "training.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in rate} == {0.0, 1.0}
    lora = {name for name in after if name.endswith("lora_B")}
    assert lora and all(after[name].any() for name in lora)
