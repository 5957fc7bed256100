"""`python -m train` as a user types it: what it prints, writes and promises."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from train.cli import main

TINY = ["--batch-size", "4", "--set", "scenes=8", "--set", "val_scenes=4"]
ALL = "seg,parts,sal,normals,edge"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, stdout) of a whole run of three steps from another folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-m", "train", "--tasks", ALL, "--steps", "3", *TINY]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "scenes", done.stdout


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished[0] / "results.json").read_text())


def test_results_name_everything_a_reader_needs(results):
    assert list(results) == [
        "format",
        "command",
        "commands",
        "settings",
        "protocol",
        "dataset",
        "evaluation",
        "model",
        "moe",
        "gating",
        "kernel",
        "seed",
        "processes",
        "steps",
        "skipped_steps",
        "images_per_second",
        "parameters",
        "final_losses",
        "best",
        "metrics",
        "metrics_constant",
        "metrics_untrained",
        "versions",
    ]
    assert results["format"] == 1 and results["protocol"] == "scenes" and results["steps"] == 3
    assert results["command"] == f"python -m train --tasks {ALL} --steps 3 {' '.join(TINY)}"
    assert (results["moe"], results["gating"], results["kernel"]) == ("16/3/1/4", "ase", "reference")
    assert 0 < results["parameters"]["trainable"] <= results["parameters"]["total"]
    assert list(results["final_losses"]) == ALL.split(",")
    for column in ("metrics", "metrics_constant", "metrics_untrained"):
        assert {task: set(values) for task, values in results[column].items()} == {
            "seg": {"mIoU", "mIoU_field"},
            "parts": {"mIoU", "mIoU_field"},
            "sal": {"maxF", "maxF_invpt", "mIoU", "maxF_A"},
            "normals": {"mErr", "median", "rmse", "within_11.25", "within_22.5", "within_30"},
            "edge": {"loss", "odsF"},
        }
        assert results[column]["edge"]["odsF"] is None


def test_the_three_columns_are_printed_side_by_side(finished, results):
    lines = finished[1].splitlines()
    header = next(line for line in lines if line.startswith("task"))
    assert header.split() == ["task", "metric", "untrained", "constant", "trained"]
    row = next(line for line in lines if line.startswith("normals "))
    columns = ("metrics_untrained", "metrics_constant", "metrics")
    assert row.split()[-3:] == [f"{results[column]['normals']['mErr']:.2f}" for column in columns]
    assert len({len(line) for line in lines[lines.index(header) : lines.index(header) + 7]}) == 1


def test_the_run_says_what_it_does(finished):
    out = finished[1]
    assert "gating ase (default), site ffn, kernel reference" in out
    assert "no --pretrained, so the backbone is trained in full" in out
    assert "scenes: 8 train, 4 val images at 64 px, protocol scenes" in out


def test_pictures_and_checkpoint_are_there(finished):
    folder = finished[0]
    assert Image.open(folder / "predictions.png").size > (400, 200)
    assert Image.open(folder / "routing.png").size > (400, 100)
    assert (folder / "last" / "model.safetensors").is_file()
    assert list((folder / "tensorboard").glob("events.*"))
    assert not [path for path in folder.iterdir() if "partial" in path.name]


def test_the_next_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["--tasks", "edge", "--steps", "1", *TINY]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["scenes", "scenes-2"]


@pytest.mark.parametrize(
    "options",
    [
        ["--tasks", "parts"],
        ["--tasks", "semseg,edge", "--moe", "none"],
        ["--tasks", "sal,normals", "--moe", "16/4/0/4", "--gating", "topk-renorm"],
        ["--tasks", "seg,sal", "--moe", "8/2/2/2", "--gating", "naive-shared", "--site", "fc1"],
        ["--tasks", "normals", "--site", "fc2", "--head", "up", "--image-size", "32", "--set", "lora_rank=2"],
        ["--tasks", "edge,seg", "--set", "precision=bf16", "--loss-weights", "edge=1"],
    ],
    ids=lambda options: " ".join(options),
)
def test_any_subset_of_tasks_and_every_option_trains(options, tmp_path):
    out = tmp_path / "run"
    assert main([*options, "--steps", "2", *TINY, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["metrics"].keys() == results["final_losses"].keys()


def test_real_images_and_weights(tmp_path, pascal_mini, vit_tiny_weights):
    """The second half of README: partially labelled real data, a frozen backbone."""
    out = tmp_path / "run"
    argv = ["--tasks", ALL, "--data", str(pascal_mini), "--partial-labels", "--pretrained", str(vit_tiny_weights)]
    small = ["--image-size", "64", "--steps", "5", "--out", str(out)]
    assert main([*argv, "--model", "vit_tiny", "--recipe", "mini", *small]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["protocol"] == "mini@64" and results["model"]["backbone"] == "frozen"
    assert results["parameters"]["trainable"] < 0.35 * results["parameters"]["total"]
