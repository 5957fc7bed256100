"""Checkpoints: complete or absent, bit-exact to resume from, safe to open."""

import errno
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels import UserError
from train.cli import main
from train.evaluate import main as evaluate
from train.run import checkpoint
from train.run.backbone import weights_of_run
from train.run.build import load_on_cpu

QUICK = ["--tasks", "seg,normals", "--batch-size", "4", "--set", "scenes=12", "--set", "val_scenes=4"]


@pytest.fixture
def trained():
    """A model and its optimiser after one step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, {"optimizer": optimizer}


def state(step, written=()):
    return checkpoint.State(step, {}, written=list(written))


def assert_same_weights(*runs):
    ours, theirs = (load_file(out / "last" / "model.safetensors") for out in runs)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_saving_and_evaluating_on_the_way_changes_no_bit(tmp_path):
    straight, stopping = tmp_path / "straight", tmp_path / "stopping"
    assert main([*QUICK, "--steps", "6", "--out", str(straight)]) == 0
    assert main([*QUICK, "--epochs", "2", "--eval-every", "1", "--workers", "2", "--out", str(stopping)]) == 0
    assert json.loads((stopping / "results.json").read_text())["steps"] == 6
    assert_same_weights(straight, stopping)


@pytest.mark.slow
def test_a_killed_run_leaves_its_last_checkpoint_and_resumes_to_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    length = ["--epochs", "20", "--eval-every", "1"]
    assert main([*QUICK, *length, "--out", str(whole)]) == 0
    command = [sys.executable, "-m", "train", *QUICK, *length, "--out", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "last").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = checkpoint.read_state(killed / "last").step
    assert 0 < step < 60
    assert main(["--resume", "--out", str(killed)]) == 0
    assert_same_weights(whole, killed)
    before, after = (json.loads((out / "results.json").read_text()) for out in (whole, killed))
    assert before["metrics"] == after["metrics"] and before["metrics_untrained"] == after["metrics_untrained"]


def test_a_finished_run_says_that_nothing_is_left(tmp_path, capsys):
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path)]) == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != ".lock"}
    assert main(["--resume", str(tmp_path / "last")]) == 0
    assert f"finished  {tmp_path} has its 2 steps and their results" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert main(["--resume", str(tmp_path / "last"), "--steps", "1"]) == 2
    assert "is at step 2 of 1 already: raise --steps" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "last"), "--steps", "3"]) == 0
    assert checkpoint.read_state(tmp_path / "last").step == 3


def test_last_is_a_link_to_the_newest_and_older_ones_go(tmp_path, trained):
    written = []
    for step in (1, 2):
        now = state(step, written)
        checkpoint.save(tmp_path, now, *trained)
        written = now.written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-2"]
    assert (tmp_path / "last").resolve() == tmp_path / "step-2"


def test_a_failure_while_saving_keeps_the_older_one(tmp_path, trained, monkeypatch):
    checkpoint.save(tmp_path, state(1), *trained)
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="^cannot write .*/step-2 .disk full.: "):
        checkpoint.save(tmp_path, state(2), *trained)
    assert checkpoint.read_state(tmp_path / "last").step == 1
    assert not (tmp_path / "step-2").exists()


def test_a_disk_that_fills_up_while_saving_is_one_line_and_keeps_the_older_one(tmp_path, trained):
    """A limit on the size of files stands for the disk; torch and safetensors report it in errors of their own."""
    model = torch.nn.Linear(300, 300)  # 360 kB
    heavy = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 300)).sum().backward()
    heavy.step()
    checkpoint.save(tmp_path, state(1), *trained)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, (weights, moments) in {2: (model, trained[1]), 3: (trained[0], {"optimizer": heavy})}.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(UserError, match=f"^cannot write .*/step-{step} .*File too large") as caught:
                checkpoint.save(tmp_path, state(step), weights, moments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-1"]
    assert checkpoint.read_state(tmp_path / "last").step == 1


def test_what_a_killed_save_left_goes_with_the_next(tmp_path, trained):
    (tmp_path / f".step-1.{uuid4().hex}.partial").mkdir()
    (tmp_path / f".last.{uuid4().hex}.partial").symlink_to("step-1")
    (tmp_path / "step-2").mkdir()  # killed before "last" pointed at it, then saved again by the resumed run
    checkpoint.save(tmp_path, state(2), *trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-2"]
    assert checkpoint.read_state(tmp_path / "last").step == 2


def test_restore_gives_back_every_bit(tmp_path, trained):
    model, parts = trained
    folder = checkpoint.save(tmp_path, checkpoint.State(1, {"note": "kept"}), model, parts)
    expected = torch.rand(3)
    fresh = torch.nn.Linear(3, 2)
    other = torch.optim.AdamW(fresh.parameters())
    checkpoint.restore(folder, fresh, {"optimizer": other})
    assert torch.equal(torch.rand(3), expected), "the random state is that of the moment of saving"
    assert torch.equal(fresh.weight, model.weight)
    moments = [parts["optimizer"].state_dict()["state"][0], other.state_dict()["state"][0]]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0])
    assert checkpoint.read_state(folder).settings == {"note": "kept"}


def test_a_checkpoint_of_a_gpu_is_restored_on_a_cpu(tmp_path, trained, monkeypatch):
    """torch.save writes the device of each tensor; the tag is set here without a GPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        folder = checkpoint.save(tmp_path, state(1), *trained)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.restore(folder, model, {"optimizer": optimizer})
    expected = trained[1]["optimizer"].state_dict()["state"][0]["exp_avg"]
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], expected)


@pytest.mark.parametrize("name", ["SHA256SUMS", "training.pt"])
def test_a_file_that_is_lost_is_damage(tmp_path, trained, name):
    folder = checkpoint.save(tmp_path, state(1), *trained)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"^checkpoint {folder} is damaged: {name} is missing; take another one$"):
        checkpoint.restore(folder, *trained)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the checkpoint ran')",))


def seal(folder):
    """Make the hashes those of the files as they are now, as someone who means harm would."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / "SHA256SUMS").write_text("".join(sums))


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pickle.dumps(Malicious(), protocol=2)], ids=["empty", "garbage", "malicious"]
)
def test_a_damaged_or_malicious_checkpoint_is_one_line(tmp_path, trained, content):
    folder = checkpoint.save(tmp_path, state(1), *trained)
    (folder / "training.pt").write_bytes(content)
    seal(folder)
    with pytest.raises(UserError) as caught:
        checkpoint.restore(folder, *trained)
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and "weights_only" not in message


def test_no_flipped_bit_is_accepted(tmp_path, trained):
    folder = checkpoint.save(tmp_path, state(1), *trained)
    files = sorted(folder.iterdir())
    rng = random.Random(0)
    for _ in range(300):
        path = rng.choice(files)
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=f"^checkpoint {folder} is damaged"):
            checkpoint.read_state(folder)
            checkpoint.restore(folder, *trained)
        path.write_bytes(whole)
    checkpoint.restore(folder, *trained)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"\xff\xfe", "codec can't decode"),
        (b"[]", "has no attribute"),
        (b'{"step": 1}', "of another version, which differs in baselines, commands, images, settings, written"),
        (
            b'{"step": "1", "settings": {}, "baselines": {}, "images": {}, "written": [], "commands": []}',
            "wrong type of step",
        ),
        (
            b'{"step": 1, "settings": {}, "baselines": {}, "images": {}, "written": [], "commands": [], "colour": 0}',
            "of another version, which differs in colour",
        ),
    ],
)
def test_a_foreign_state_is_one_line(tmp_path, trained, text, reason):
    folder = checkpoint.save(tmp_path, state(1), *trained)
    (folder / "state.json").write_bytes(text)
    seal(folder)
    with pytest.raises(UserError, match=f"^checkpoint {folder} cannot be read: .*{reason}") as caught:
        checkpoint.read_state(folder)
    assert "\n" not in str(caught.value)


def test_tensors_of_another_type_or_shape_are_one_line(tiny_scenes_run, tmp_path):
    """Of a published checkpoint, whose hashes are right: to evaluate, to resume from, and as a backbone."""
    folder = Path(shutil.copytree(checkpoint.find(tiny_scenes_run), tmp_path / "step-2"))
    whole = load_file(folder / "model.safetensors")
    for name, tensor, reason in (
        ("vit.norm.weight", whole["vit.norm.weight"].to(torch.int8), "vit.norm.weight is torch.int8"),
        ("task_embed", torch.zeros(3, 2), "task_embed"),
        ("image_mean", torch.ones(3, 1, 1), "image_mean is .1.0, 1.0, 1.0., of no known normalisation"),
    ):
        save_file(whole | {name: tensor}, folder / "model.safetensors", checkpoint.LAYOUT)
        seal(folder)
        read = weights_of_run if name == "image_mean" else partial(load_on_cpu, kernel="auto")
        with pytest.raises(UserError, match=f"^checkpoint {folder} cannot be read: .*{reason}") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


def test_foreign_tensors_are_one_line(tmp_path, capsys):
    assert main([*QUICK, "--steps", "1", "--out", str(tmp_path)]) == 0
    folder = checkpoint.find(tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["renamed"] = weights.pop("vit.norm.weight")
    save_file(weights, folder / "model.safetensors", checkpoint.LAYOUT)
    seal(folder)
    for run in (lambda: main(["--resume", str(folder), "--steps", "2"]), lambda: evaluate([str(folder)])):
        capsys.readouterr()
        assert run() == 2
        error = capsys.readouterr().err
        assert (
            f"checkpoint {folder} cannot be read: " in error and "vit.norm.weight" in error and error.count("\n") == 1
        )


def test_only_what_the_run_wrote_is_removed(tmp_path, trained):
    for name in ("step-6-backup", "step-3", "steps"):
        (tmp_path / name).mkdir()
    checkpoint.save(tmp_path, state(7, ["step-6", "../steps", "step-6-backup"]), *trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-3", "step-6-backup", "step-7", "steps"]


def test_the_newest_are_kept(tmp_path, trained):
    now = state(0)
    for step in range(5):
        now.step = step
        checkpoint.save(tmp_path, now, *trained, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-3", "step-4"]


@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_gets_no_name(tmp_path, trained, where):
    model, parts = trained
    checkpoint.save(tmp_path, state(1), *trained)
    moment = parts["optimizer"].state_dict()["state"][1]["exp_avg"]
    with torch.no_grad():
        (model.bias if where == "weight" else moment)[0] = torch.inf
    name = "bias" if where == "weight" else "exp_avg of parameter 1"
    with pytest.raises(UserError, match=f"^{name} is not finite, so .*/step-2 is not written: continue from .*/last"):
        checkpoint.save(tmp_path, state(2), *trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-1"]


def test_weights_that_are_not_finite_are_not_read(tmp_path, trained):
    folder = checkpoint.save(tmp_path, state(1), *trained)
    wrong = {"weight": torch.full((2, 3), torch.nan), "bias": torch.zeros(2)}
    save_file(wrong, folder / "model.safetensors", checkpoint.LAYOUT)
    seal(folder)
    with pytest.raises(UserError, match=f"^weight in checkpoint {folder} is not finite: take an earlier one$"):
        checkpoint.read_weights(folder)


def test_experts_in_another_order_are_refused(tmp_path, trained):
    folder = checkpoint.save(tmp_path, state(1), *trained)
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", {"experts": "rank-major"})
    seal(folder)
    with pytest.raises(
        UserError, match=f"^checkpoint {folder} cannot be read: .* its experts are in this program's order"
    ):
        checkpoint.read_weights(folder)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_keeps_the_older_one(tmp_path, trained, monkeypatch, number):
    checkpoint.save(tmp_path, state(1), *trained)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "save_file", refuse)
    with pytest.raises(UserError, match=f"^cannot write .*/step-2 .{os.strerror(number)}"):
        checkpoint.save(tmp_path, state(2), *trained)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-1"]


def test_a_last_that_is_no_link_is_refused_before_the_run(tmp_path, capsys):
    """A copy that follows links makes a folder of it; a link may also point at itself."""
    assert main([*QUICK, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for resume in ([], [str(tmp_path / "copy" / "last")]):
        capsys.readouterr()
        assert main(["--resume", *resume, "--out", str(tmp_path / "copy"), "--steps", "2"]) == 2
        error = capsys.readouterr().err
        assert "copy/last is a folder and not a link to step-N" in error and error.count("\n") == 1
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "last").symlink_to("last")
    for run in (
        lambda: main(["--resume", "--out", str(tmp_path / "loop")]),
        lambda: evaluate([str(tmp_path / "loop")]),
    ):
        assert run() == 2
        error = capsys.readouterr().err
        assert "points nowhere: give a folder step-N" in error and error.count("\n") == 1
