"""A run that is stopped at any moment and resumed ends as one that is not: weights, losses, metrics, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kernels import UserError
from train.cli import main
from train.datasets.batches import batch_ids
from train.run import checkpoint, loop, start
from train.run.backbone import settings_of
from train.run.losses import LossLog, NotFiniteError, read_losses
from train.tasks import TASKS

ROOT = Path(__file__).resolve().parents[3]
QUICK = ["--tasks", "seg,normals", "--batch-size", "4", "--set", "scenes=12", "--set", "val_scenes=4", "--workers", "0"]
LONG = [*QUICK, "--steps", "40", "--checkpoint-every", "1", "--keep", "2"]


def begin(*flags):
    """A training process, and what it says."""
    command = [sys.executable, "-m", "train", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def assert_same(*runs):
    ours, theirs = (load_file(out / "last" / "model.safetensors") for out in runs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert runs[0].joinpath("losses.csv").read_bytes() == runs[1].joinpath("losses.csv").read_bytes()
    one, other = (json.loads((out / "results.json").read_text()) for out in runs)
    for key in ("metrics", "metrics_untrained", "metrics_constant", "final_losses", "steps"):
        assert one[key] == other[key]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, seconds) of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    process = begin(*LONG, "--out", str(out))
    assert process.wait() == 0, process.stderr.read()
    return out, time.monotonic() - began


@pytest.mark.parametrize("kills", [5, pytest.param(25, marks=[pytest.mark.slow, pytest.mark.long])])
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(whole, kills, tmp_path):
    """With a checkpoint at every step many kills fall into the writing of one. No checkpoint is ever unreadable."""
    out, rng = tmp_path / "killed", random.Random(kills)
    for _ in range(kills):
        process = begin(*LONG, "--resume", "--out", str(out))
        try:
            process.wait(rng.uniform(0.3, 1) * whole[1])
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        if (out / "last").is_symlink():
            checkpoint.read_state(out / "last")
            checkpoint.read_weights(out / "last")
    process = begin(*LONG, "--resume", "--out", str(out))
    _, error = process.communicate()
    assert process.returncode == 0 or "is at step 40 of 40 already" in error, error
    assert_same(whole[0], out)


def test_sigterm_ends_after_the_step_with_a_checkpoint(whole, tmp_path):
    out = tmp_path / "preempted"
    flags = [*QUICK, "--steps", "40", "--keep", "2", "--out", str(out)]
    process = begin(*flags)
    while not (out / "losses.csv").exists() or len((out / "losses.csv").read_text().splitlines()) < 11:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 143, error
    step = checkpoint.read_state(out / "last").step
    assert 10 <= step <= 40
    assert f"stopped at step {step}: continue from {out}/step-{step} with --resume" in error
    assert "Traceback" not in error
    assert main([*flags, "--resume"]) == 0
    assert_same(whole[0], out)


@pytest.mark.parametrize("step", [3, 7, 8])
def test_a_sigterm_that_arrives_while_processes_agree_is_not_lost(step, tmp_path, monkeypatch):
    """It ends the step after, or the last one (8), and leaves a checkpoint."""
    calls, agreed = iter(range(1, 100)), loop.agreed

    def interrupted(mine):
        answer = agreed(mine)
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    monkeypatch.setattr(loop, "agreed", interrupted)
    assert main([*QUICK, "--steps", "8", "--out", str(tmp_path)]) == 143
    assert checkpoint.read_state(checkpoint.find(tmp_path)).step == min(step + 1, 8)


def test_a_run_that_was_killed_while_it_was_scored_is_finished(whole, tmp_path):
    out = tmp_path / "unscored"
    shutil.copytree(whole[0], out, symlinks=True)
    (out / "results.json").unlink()
    assert main(["--resume", "--out", str(out)]) == 0
    assert_same(whole[0], out)


def test_two_runs_cannot_share_a_folder(tmp_path):
    out = tmp_path / "shared"
    first = begin(*QUICK, "--steps", "2000", "--out", str(out))
    while not (out / "losses.csv").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = begin(*QUICK, "--steps", "2000", "--out", str(out))
    _, error = second.communicate()
    assert second.returncode == 2
    assert error == f"error: another run (process {first.pid}) writes to {out}: choose another --out\n"
    first.kill()
    first.communicate()
    assert main([*QUICK, "--steps", "1", "--out", str(out)]) == 0, "a killed run leaves no lock behind"


def test_workers_of_a_killed_run_end_in_silence(tmp_path):
    """They hold the run's stderr, so that it ends only when they have. By themselves they look up every 5 seconds."""
    process = begin(*QUICK, "--workers", "2", "--steps", "2000", "--out", str(tmp_path))
    while not (tmp_path / "losses.csv").exists() or len((tmp_path / "losses.csv").read_text().splitlines()) < 11:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    killed = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - killed < 1.5
    assert "Error" not in error and "Traceback" not in error


def test_a_diverging_run_keeps_its_last_good_checkpoint(tmp_path, capsys):
    assert main([*QUICK, "--steps", "6", "--out", str(tmp_path)]) == 0
    good = load_file(tmp_path / "last" / "model.safetensors")
    (tmp_path / "step-6-backup").mkdir()
    capsys.readouterr()
    diverging = ["--resume", "--out", str(tmp_path), "--lr", "1e6", "--steps", "60", "--checkpoint-every", "20"]
    assert main([*diverging, "--set", "clip_norm=1e9"]) == 2
    error = capsys.readouterr().err
    assert "with --resume and a lower --lr" in error and error.count("\n") == 1
    assert (tmp_path / "step-6-backup").is_dir()
    weights = checkpoint.read_weights(checkpoint.find(tmp_path))
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert checkpoint.read_state(checkpoint.find(tmp_path)).step < 60 and weights.keys() == good.keys()


def spoil(monkeypatch, steps):
    """Make the loss of ``steps`` (counted from 0) NaN."""
    called, loss = iter(range(1000)), type(TASKS["seg"]).loss
    spoiled = lambda *arguments: loss(*arguments) * (torch.nan if next(called) in steps else 1)  # noqa: E731
    monkeypatch.setattr(type(TASKS["seg"]), "loss", staticmethod(spoiled))


def test_a_loss_that_is_not_finite_names_step_task_and_images(tmp_path, capsys, monkeypatch):
    spoil(monkeypatch, {3})
    assert main([*QUICK, "--steps", "8", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    train_set, _ = loop_data()
    names = ", ".join(batch_ids(train_set, 4, 3, 0))
    assert error.startswith(f"error: the loss of seg is nan at step 4, with images {names}: start again and a lower")
    assert "--on-nonfinite skip" in error


def loop_data():
    from train.cli import parse
    from train.config.settings import resolve_settings

    return start.build.build_data(resolve_settings(parse(QUICK)[0]))


def test_a_skipped_step_leaves_everything_as_it_was(tmp_path, monkeypatch):
    """Only the learning rate goes on: with a constant one, a run with one step skipped is the run without its batch."""
    spoil(monkeypatch, {3})
    assert main([*QUICK, "--steps", "8", "--on-nonfinite", "skip", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["skipped_steps"] == 1
    _, rows = read_losses(tmp_path / "losses.csv", 8)
    assert [step for step, row in rows.items() if row[0] != row[0]] == [4]
    assert all(value == value for value in results["final_losses"].values())


def test_what_gives_a_run_its_meaning_cannot_change(tmp_path, capsys, pascal_copy):
    data = [
        "--data",
        str(pascal_copy),
        "--protocol",
        "mini",
        "--model",
        "vit_micro",
        "--head",
        "light",
        "--tasks",
        "seg",
    ]
    small = ["--image-size", "64", "--batch-size", "4", "--workers", "0", "--set", "lora_rank=0"]
    out = tmp_path / "run"
    assert main([*data, *small, "--steps", "1", "--out", str(out)]) == 0
    for flags, message in [
        (["--skip-bad"], "skip_bad was False and cannot become True"),
        (["--data", ""], "cannot become '' when a run is resumed"),
        (["--protocol", "ase"], "protocol was 'mini' and cannot become 'ase'"),
    ]:
        capsys.readouterr()
        assert main(["--resume", "--out", str(out), "--steps", "2", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    moved = pascal_copy.rename(tmp_path / "moved")
    assert main(["--resume", "--out", str(out), "--steps", "2", "--data", str(moved)]) == 0, "the same tree elsewhere"
    lists = Path("ImageSets/Context/train.txt")
    fewer = "".join((moved / lists).read_text().splitlines(keepends=True)[1:]).encode()
    for file, content in (
        (lists, fewer),
        (Path("semseg/VOC12/2009_000001.png"), (moved / "semseg/VOC12/2009_000000.png").read_bytes()),
        (Path("JPEGImages/2008_000001.jpg"), (moved / "JPEGImages/2008_000000.jpg").read_bytes()),
    ):
        before = (moved / file).read_bytes()
        (moved / file).write_bytes(content)
        capsys.readouterr()
        assert main(["--resume", "--out", str(out), "--steps", "3", "--data", str(moved)]) == 2
        assert "the images or labels are not those that" in capsys.readouterr().err
        (moved / file).write_bytes(before)


def test_what_changed_is_said(tmp_path, capsys):
    assert main([*QUICK, "--steps", "1", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main(["--resume", "--out", str(tmp_path), "--steps", "2", "--lr", "0.5"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed   from step 1 of "))
    assert line.endswith("; changed: steps 1 -> 2, lr 0.002 -> 0.5")
    results = json.loads((tmp_path / "results.json").read_text())
    first, second = results["commands"]
    assert first["from_step"] == 0 and first["changed"] == [] and "--steps 1" in first["command"]
    assert second["from_step"] == 1 and second["changed"] == ["steps 1 -> 2", "lr 0.002 -> 0.5"]
    assert second["command"] == results["command"] and "--lr 0.5" in second["command"]
    assert results["settings"] == asdict(settings_of(tmp_path / "last")) | {"out": str(tmp_path)}
    assert results["settings"]["lr"] == 0.5
    assert checkpoint.read_state(tmp_path / "last").commands == results["commands"]


def test_a_fresh_run_may_say_resume(tmp_path, capsys):
    """So that a scheduler's command is the same before and after the first checkpoint."""
    assert main([*QUICK, "--steps", "1", "--resume", "--out", str(tmp_path)]) == 0
    assert "holds no checkpoint yet: the run begins at step 0" in capsys.readouterr().out


@pytest.mark.parametrize("below", [".", "runs/mine", "ImageSets"])
def test_a_data_set_is_not_written_to(below, tmp_path, capsys, pascal_copy, monkeypatch):
    before = sorted(pascal_copy.rglob("*"))
    assert main([*QUICK, "--steps", "1", "--out", str(pascal_copy / below)]) == 2
    error = capsys.readouterr().err
    assert f"lies inside the data set {pascal_copy}, which is only read: choose another --out" in error
    monkeypatch.chdir(pascal_copy)
    assert main([*QUICK, "--steps", "1"]) == 2
    assert sorted(pascal_copy.rglob("*")) == before


def test_the_log_keeps_every_number(tmp_path):
    path = tmp_path / "losses.csv"
    log = LossLog(path, ("seg", "edge"), {})
    losses = torch.rand(5, 2)
    for step, row in enumerate(losses, 1):
        log.add(step, row)
    log.flush()
    with path.open("a") as file:
        file.write("6,0.25,0.")  # cut short by a kill
    tasks, rows = read_losses(path, 4)
    assert tasks == ("seg", "edge") and list(rows) == [1, 2, 3, 4]
    assert torch.equal(torch.tensor(list(rows.values())), losses[:4])
    again = LossLog(path, tasks, rows)
    again.add(5, losses[4])
    again.flush()
    assert read_losses(path, 9)[1] == {step: tuple(row) for step, row in enumerate(losses.tolist(), 1)}
    assert again.mean(2) == pytest.approx(dict(zip(tasks, losses[3:].mean(0).tolist(), strict=True)))
    again.add(6, torch.tensor([1.0, torch.inf]))
    with pytest.raises(NotFiniteError, match="^the loss of edge is inf at step 6$"):
        again.flush()
    path.write_text("colour\n")
    with pytest.raises(UserError, match="is not a table of losses"):
        read_losses(path, 1)
