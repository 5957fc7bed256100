"""Checkpoints: complete or absent, bit-exact to resume from, safe to open."""

import json
import pickle
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from kernels import UserError
from train.cli import main
from train.run import checkpoint

QUICK = ["--tasks", "seg,normals", "--batch-size", "4", "--set", "scenes=12", "--set", "val_scenes=4"]


@pytest.fixture
def trained():
    """A model and its optimiser after one step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


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
    step = checkpoint.read_state(killed / "last")["step"]
    assert 0 < step < 60
    assert main(["--resume", "--out", str(killed)]) == 0
    assert_same_weights(whole, killed)
    before, after = (json.loads((out / "results.json").read_text()) for out in (whole, killed))
    assert before["metrics"] == after["metrics"] and before["metrics_untrained"] == after["metrics_untrained"]


def test_a_finished_run_says_that_nothing_is_left(tmp_path, capsys):
    assert main([*QUICK, "--steps", "2", "--out", str(tmp_path)]) == 0
    assert main(["--resume", str(tmp_path / "last")]) == 2
    assert "is at step 2 of 2 already" in capsys.readouterr().err
    assert main(["--resume", str(tmp_path / "last"), "--steps", "3"]) == 0
    assert checkpoint.read_state(tmp_path / "last")["step"] == 3


def test_last_is_a_link_to_the_newest_and_older_ones_go(tmp_path, trained):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, *trained, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-2"]
    assert (tmp_path / "last").resolve() == tmp_path / "step-2"


def test_a_failure_while_saving_keeps_the_older_one(tmp_path, trained, monkeypatch):
    checkpoint.save(tmp_path, 1, *trained, {})
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="^cannot write .*/step-2 .disk full.: "):
        checkpoint.save(tmp_path, 2, *trained, {})
    assert checkpoint.read_state(tmp_path / "last")["step"] == 1
    assert not (tmp_path / "step-2").exists()


def test_a_disk_that_fills_up_while_saving_is_one_line_and_keeps_the_older_one(tmp_path, trained):
    """A limit on the size of files stands for the disk; torch and safetensors report it in errors of their own."""
    model = torch.nn.Linear(300, 300)  # 360 kB
    heavy = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 300)).sum().backward()
    heavy.step()
    checkpoint.save(tmp_path, 1, *trained, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step, (weights, moments) in {2: (model, trained[1]), 3: (trained[0], heavy)}.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(UserError, match=f"^cannot write .*/step-{step} .*File too large") as caught:
                checkpoint.save(tmp_path, step, weights, moments, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-1"]
    assert checkpoint.read_state(tmp_path / "last")["step"] == 1


def test_what_a_killed_save_left_goes_with_the_next(tmp_path, trained):
    (tmp_path / ".step-1.0123.partial").mkdir()
    (tmp_path / ".last.0123.partial").symlink_to("step-1")
    (tmp_path / "step-2").mkdir()  # killed before "last" pointed at it, then saved again by the resumed run
    checkpoint.save(tmp_path, 2, *trained, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "step-2"]
    assert checkpoint.read_state(tmp_path / "last")["step"] == 2


def test_restore_gives_back_every_bit(tmp_path, trained):
    model, optimizer = trained
    folder = checkpoint.save(tmp_path, 1, model, optimizer, {"note": "kept"})
    fresh = torch.nn.Linear(3, 2)
    other = torch.optim.AdamW(fresh.parameters())
    checkpoint.restore(folder, fresh, other)
    assert torch.equal(fresh.weight, model.weight)
    moments = [optimizer.state_dict()["state"][0], other.state_dict()["state"][0]]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0])
    assert checkpoint.read_state(folder)["note"] == "kept"


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code of the checkpoint ran')",))


@pytest.mark.parametrize(
    "content", [b"", b"garbage", pickle.dumps(Malicious(), protocol=2)], ids=["empty", "garbage", "malicious"]
)
def test_a_damaged_or_malicious_checkpoint_is_one_line(tmp_path, trained, content):
    folder = checkpoint.save(tmp_path, 1, *trained, {})
    (folder / "optimizer.pt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        checkpoint.restore(folder, *trained)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
