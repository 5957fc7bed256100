"""A run that is stopped at any moment and resumed ends as one that is not: weights, losses, metrics, bit for bit."""

import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from train.cli import main
from train.compare import main as compare
from train.datasets.batches import batch_ids
from train.evaluation.results import finished_results
from train.run import checkpoint, loop, start
from train.run.backbone import settings_of
from train.run.record import NAME, read_lines, read_record
from train.tasks import TASKS

ROOT = Path(__file__).resolve().parents[3]
QUICK = ["--tasks", "seg,normals", "--batch-size", "4", "--set", "scenes=12", "--set", "val_scenes=4", "--workers", "0"]
LONG = [*QUICK, "--steps", "40", "--checkpoint-every", "1", "--keep", "2"]


def begin(*flags):
    """A training process, the first of a group, and what it says."""
    command = [sys.executable, "-m", "train", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **streams)


def assert_same(*runs):
    ours, theirs = (load_file(out / "last" / "model.safetensors") for out in runs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    kept = ([line for line in read_lines(out / NAME) if line["kind"] != "pace"] for out in runs)
    assert next(kept) == next(kept)
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
    assert process.returncode == 0, error
    assert_same(whole[0], out)


def test_sigterm_ends_after_the_step_with_a_checkpoint(whole, tmp_path):
    """Schedulers and containers send it to all processes, of which those that load batches are needed for that step."""
    out = tmp_path / "preempted"
    flags = [*QUICK, "--workers", "2", "--steps", "40", "--keep", "2", "--out", str(out)]
    process = begin(*flags)
    while not (out / NAME).exists() or len((out / NAME).read_text().splitlines()) < 11:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate()
    assert process.returncode == 143, error
    step = checkpoint.read_state(out / "last").step
    assert 10 <= step <= 40
    assert f"stopped at step {step}: continue from {out}/step-{step} with --resume" in error
    assert "Traceback" not in error
    assert main([*flags, "--resume"]) == 0
    assert_same(whole[0], out)


@pytest.mark.parametrize(
    ("step", "number"), [(3, signal.SIGTERM), (7, signal.SIGHUP), (7, signal.SIGUSR1), (8, signal.SIGTERM)]
)
def test_a_signal_that_arrives_while_processes_agree_is_not_lost(step, number, tmp_path, monkeypatch):
    """It ends the step after, or the last one (8), and leaves a checkpoint."""
    calls, agreed = iter(range(1, 100)), loop.agreed

    def interrupted(mine):
        answer = agreed(mine)
        if next(calls) == step:
            os.kill(os.getpid(), number)
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


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A finished run of four steps, with the checkpoints of steps 2 and 4; do not change it."""
    out = tmp_path_factory.mktemp("short") / "run"
    assert main([*QUICK, "--steps", "4", "--checkpoint-every", "2", "--keep", "2", "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied(short, tmp_path):
    """A copy of it that a test may change."""
    return shutil.copytree(short, tmp_path / "run", symlinks=True)


def steps_of(out):
    return json.loads((out / "results.json").read_text())["steps"]


def test_a_run_that_is_extended_and_killed_while_it_is_scored_is_finished(copied, capsys, monkeypatch):
    more = ["--resume", "--out", str(copied), "--steps", "5"]

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop, "score", killed)
        assert main(more) == 130
    assert checkpoint.find(copied).name == "step-5" and steps_of(copied) == 4, "results.json says of which step it is"
    assert finished_results(copied, 5) is None and finished_results(copied, 4)
    capsys.readouterr()
    assert compare([str(copied), "--out", str(copied.parent / "compared")]) == 0
    assert "no picture, as there is no checkpoint of run" in capsys.readouterr().out, "not that of other weights"
    assert main(more) == 0 and steps_of(copied) == 5
    assert main(more) == 0 and "has its 5 steps and their results" in capsys.readouterr().out


@pytest.mark.parametrize("last", ["absent", "dangling", "text"])
def test_a_run_whose_link_was_lost_continues_from_its_newest_checkpoint(last, copied, capsys):
    """rsync -r, a zip or an object store loses links, or makes files of them."""
    (copied / "last").unlink()
    (copied / "results.json").unlink()
    if last == "dangling":
        (copied / "last").symlink_to("step-3")
    elif last == "text":
        (copied / "last").write_text("step-4")
    before = (copied / NAME).read_text()
    assert main([*QUICK, "--out", str(copied), "--steps", "4"]) == 2
    assert "already holds a run: continue it with --resume" in capsys.readouterr().err
    assert main(["--resume", "--out", str(copied), "--steps", "3", "--lr", "0.1"]) == 2
    assert "step-4 is at step 4 of 3 already" in capsys.readouterr().err
    assert main(["--resume", "--out", str(copied), "--steps", "5", "--keep", "9"]) == 0
    said = capsys.readouterr().out
    assert f"resumed   from step 4 of {copied}/step-4" in said and ("last is lost" in said) == (last == "absent")
    assert (copied / NAME).read_text().startswith(before) and (copied / "step-4").is_dir()
    assert os.readlink(copied / "last") == "step-5"


def test_a_disk_without_links_and_without_sync_of_folders_holds_a_run(copied, monkeypatch):
    """exFAT, SMB, Google Drive."""

    def no_link(*_, **__):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    def sync(handle, real=os.fsync):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(handle)

    monkeypatch.setattr(os, "symlink", no_link)
    monkeypatch.setattr(os, "fsync", sync)
    for step in (5, 6):
        assert main(["--resume", str(copied / "last"), "--steps", str(step)]) == 0
        assert (copied / "last").read_text() == f"step-{step}\n" and not (copied / "last").is_symlink()
        assert checkpoint.find(copied / "last") == checkpoint.find(copied) == copied / f"step-{step}"


def test_what_a_disk_cannot_do_is_found_before_training(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "rename", refuse)
    monkeypatch.setattr(loop, "score", lambda *_: pytest.fail("it began"))
    assert main([*QUICK, "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "Operation not permitted" in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "predictions.png", "tensorboard", "step-2"])
def test_a_run_replaces_nothing_that_it_did_not_write(name, tmp_path, capsys):
    (tmp_path / name).mkdir() if name == "step-2" else (tmp_path / name).write_text("mine")
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path / name} was not written by train: move it away" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_resumed_run_replaces_nothing_either(copied, capsys):
    (copied / "step-6").mkdir()
    assert main(["--resume", "--out", str(copied), "--steps", "6"]) == 2
    assert f"{copied}/step-6 was not written by train: move it away" in capsys.readouterr().err
    (copied / "step-6").rmdir()
    (copied / ".written").unlink()  # by a copy that leaves out hidden files
    assert main(["--resume", "--out", str(copied), "--steps", "5"]) == 0


def test_a_full_disk_under_the_record_is_one_line(tmp_path, capsys, monkeypatch):
    def full(path, mode="r", *arguments, real=Path.open, **options):
        if (path.name, mode) == (NAME, "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, *arguments, **options)

    monkeypatch.setattr(Path, "open", full)
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write {tmp_path}/metrics.jsonl (No space left on device): free some space")
    assert error.count("\n") == 1


@pytest.mark.parametrize("out", ["loop", "file", "file/below"])
def test_an_out_that_can_be_no_folder_is_one_line(out, tmp_path, error_of):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    assert f"{tmp_path / out}" in error_of(main, *QUICK, "--steps", "1", "--out", tmp_path / out)


def test_signals_that_are_ignored_stay_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with start.Stopping().listening():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_runs_cannot_share_a_folder(tmp_path):
    out = tmp_path / "shared"
    first = begin(*QUICK, "--steps", "2000", "--out", str(out))
    while not (out / NAME).exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = begin(*QUICK, "--steps", "2000", "--out", str(out))
    _, error = second.communicate()
    assert second.returncode == 2
    assert error == f"error: another command (process {first.pid}) writes to {out}: choose another --out\n"
    first.kill()
    first.communicate()
    assert main([*QUICK, "--steps", "1", "--out", str(out)]) == 0, "a killed run leaves no lock behind"


@pytest.mark.parametrize("victim", ["run", "worker"])
def test_a_run_and_its_workers_end_together_without_a_traceback(victim, tmp_path):
    """They hold the run's stderr, so that it ends only when they have. By themselves they look up every 5 seconds."""
    process = begin(*QUICK, "--workers", "2", "--steps", "2000", "--out", str(tmp_path))
    while not (tmp_path / NAME).exists() or len((tmp_path / NAME).read_text().splitlines()) < 11:
        assert process.poll() is None
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if victim == "run" else int(workers[-1]), signal.SIGKILL)
    killed = time.monotonic()
    _, error = process.communicate(timeout=30)
    if victim == "run":
        assert time.monotonic() - killed < 1.5
        assert "Error" not in error and "Traceback" not in error
    else:
        assert process.returncode == 2
        assert error.endswith("batches was killed, perhaps for lack of memory: use fewer --workers\n"), error
        assert error.count("\n") == 1


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
    rows = read_record(tmp_path).losses
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
    recorded = (out / NAME).read_text() + '{"kind": "pace", "step": 3}\n'  # of a step after the checkpoint
    (out / NAME).write_text(recorded)
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
        assert (out / NAME).read_text() == recorded, "a refused command changes nothing"
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
