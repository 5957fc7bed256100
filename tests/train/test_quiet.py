"""What commands print and where curves go: as much as was asked for, and nothing into a pipe that is for a terminal."""

import errno
import io
import json
import os
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import pytest

from train.cli import guarded, main
from train.run.record import read_record

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = [f".{path.stem}" for path in (ROOT / "train").glob("[a-z]*.py") if path.stem != "cli"]
QUICK = ["--steps", "2", "--batch-size", "2", "--set", "scenes=8", "--set", "val_scenes=2", "--workers", "0"]


def test_quiet_prints_errors_only(tmp_path, capfd):
    assert main([*QUICK, "--quiet", "--out", str(tmp_path / "run")]) == 0
    assert capfd.readouterr() == ("", "")
    assert main([*QUICK, "--quiet", "--moe", "1/1/1/1", "--out", str(tmp_path / "other")]) == 2
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and printed.err.count("\n") == 1
    print("heard")
    assert capfd.readouterr().out == "heard\n", "stdout is as it was"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_has_it_and_its_own_name(command, capsys):
    module = import_module(f"train{command or '.cli'}")
    with pytest.raises(SystemExit) as caught:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert (
        caught.value.code == 0
        and "--quiet" in text
        and "--version" in text
        and text.startswith(f"usage: python -m train{command} ")
    )


def test_a_reader_that_leaves_ends_a_command_in_silence(monkeypatch, capsys):
    """As head does; status 141 is that of SIGPIPE."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as caught:
            guarded(lambda: print("to nobody"))
    assert caught.value.code == 141 and capsys.readouterr().err == ""


def test_what_a_terminal_cannot_encode_is_escaped(monkeypatch):
    """A name that is no UTF-8, and anything beyond ASCII in its locale."""
    for encoding, expected in (("ascii", b"caf\\xe9 \\udce9\n"), ("utf-8", "caf\xe9 \\udce9\n".encode())):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert guarded(lambda: print("caf\xe9 \udce9")) == 0
        assert stdout.buffer.getvalue() == expected


def test_no_bar_is_drawn_into_a_pipe(tmp_path):
    command = [sys.executable, "-m", "train", *QUICK, "--out", str(tmp_path / "run")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and "\r" not in done.stdout + done.stderr and "it/s" not in done.stderr


def test_recipes_are_listed(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--list-recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0
    assert any(line.startswith("paper ") and "The setting of ASE" in line for line in lines)


@pytest.mark.parametrize("tracker", ["tensorboard", "none"])
def test_curves_go_where_they_were_asked_to(tracker, tmp_path):
    assert main([*QUICK, "--tracker", tracker, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "tensorboard").exists() == (tracker == "tensorboard")


FAKE_WANDB = """
import json, pathlib
class init:
    def __init__(self, **given):
        self.given, self.curves, self.summary = given, [], {}
    def __enter__(self):
        return self
    def log(self, values, step):
        self.curves.append([step, values])
    def __exit__(self, *_):
        about = {name: self.given[name] for name in ("project", "name", "id", "resume")}
        with (pathlib.Path(self.given["dir"]) / "wandb.jsonl").open("a") as file:
            file.write(json.dumps({"about": about, "curves": self.curves, "summary": self.summary}) + "\\n")
"""


def test_weights_and_biases_gets_one_run_with_curves_and_final_scores(tmp_path, monkeypatch):
    """A stand-in for the package, which needs an account. The run is resumed once."""
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    out = tmp_path / "run"
    flags = [*QUICK, "--tracker", "wandb", "--set", "wandb_project=sweep", "--out", str(out)]
    assert main(flags) == main([*flags, "--resume", "--steps", "3"]) == 0
    sys.modules.pop("wandb", None)
    first, second = map(json.loads, (out / "wandb.jsonl").read_text().splitlines())
    assert first["about"] == second["about"] and len(first["about"]["id"]) == 32
    assert first["about"] | {"project": "sweep", "name": "run", "resume": "allow"} == first["about"]
    assert {"loss/seg", "lr", "gradient_norm", "mi"} <= first["curves"][0][1].keys()
    assert [sorted({step for step, _ in part["curves"]}) for part in (first, second)] == [[1, 2], [3]]
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    assert second["summary"]["seg/mIoU"] == metrics["seg"]["mIoU"] and "delta_m" in second["summary"]


@pytest.mark.parametrize("fault", ["full disk", "no folder"])
def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(fault, tmp_path, capfd, monkeypatch):
    """TensorBoard writes in a thread, whose exceptions are tracebacks by themselves."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fault == "full disk":
        monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    else:
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.__init__", full)
    hook = threading.excepthook
    assert main([*QUICK, "--quiet", "--steps", "30", "--out", str(tmp_path / "run")]) == 0
    warning = "warning: --tracker tensorboard ends here ([Errno 28] No space left on device); metrics.jsonl goes on\n"
    assert capfd.readouterr().err == warning and threading.excepthook is hook
    assert len(read_record(tmp_path / "run").losses) == 30


def test_weights_and_biases_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*QUICK, "--tracker", "wandb", "--out", str(tmp_path / "run")]) == 2
    assert "--tracker wandb needs the package wandb: pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["kernels", "fastmoe_lora", "model", "train.cli"])
def test_importing_takes_under_two_seconds_of_work_beyond_torch(package):
    """Processor seconds, which do not grow with what else is running."""

    def seconds(statement):
        before = os.times()
        subprocess.run([sys.executable, "-c", statement], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert seconds(f"import torch, {package}") - seconds("import torch") < 2
