"""``--import FILE``: heads and tasks of a script, in every command; what is missing or broken is one line."""

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from model import HEADS
from train.cli import main
from train.compare import main as compare
from train.datasets.scenes.dataset import LABELS
from train.evaluate import main as evaluate
from train.export import main as export
from train.parameters import main as count
from train.predict import main as predict
from train.tasks import TASKS

SCRIPT = """\
from helper import NAME
from model import HEADS
from train.datasets.scenes.dataset import LABELS, label_sal
from train.tasks import TASKS
from train.tasks.sal import SaliencyTask

class Twin(SaliencyTask):
    name = folder = NAME
    aliases = ()

class Mine(HEADS["light"]):
    pass

TASKS[NAME], LABELS[NAME], HEADS["mine"] = Twin(), label_sal, Mine
"""
QUICK = ["--steps", "1", "--batch-size", "2", "--set", "scenes=4", "--set", "val_scenes=2", "--workers", "0"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """A script with the name of a package of this program, which imports a file from beside it."""
    path = tmp_path_factory.mktemp("script") / "model.py"
    path.write_text(SCRIPT)
    path.with_name("helper.py").write_text('NAME = "twin"\n')
    return path


@pytest.fixture(scope="module")
def scripted_run(script, tmp_path_factory):
    """A run with the script's head and tasks, the script forgotten after it."""
    out = tmp_path_factory.mktemp("runs") / "scripted"
    with patch.dict(TASKS), patch.dict(LABELS), patch.dict(HEADS):
        argv = ["--tasks", "seg,twin", "--head", "mine", "--import", str(script), *QUICK]
        assert main([*argv, "--out", str(out)]) == 0
    return out


@pytest.fixture
def forgetting():
    """What a script registers is gone after the test."""
    with patch.dict(TASKS), patch.dict(LABELS), patch.dict(HEADS):
        yield


def test_every_command_reads_a_run_with_its_script(scripted_run, script, tmp_path, forgetting):
    results = json.loads((scripted_run / "results.json").read_text())
    assert results["metrics"].keys() == {"seg", "twin"} and results["model"]["head"] == "mine"
    assert "import" not in results["settings"], "a script is no setting: resuming runs no code unasked"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    run, given = str(scripted_run), ["--import", str(script)]
    assert evaluate([run, *given, "--workers", "0", "--out", str(tmp_path / "scored")]) == 0
    assert predict([run, str(tmp_path / "photo.png"), *given, "--out", str(tmp_path / "predicted")]) == 0
    assert (tmp_path / "predicted/twin/photo.png").exists()
    assert compare([run, *given, "--out", str(tmp_path / "compared")]) == 0
    assert "twin maxF" in (tmp_path / "compared/table.csv").read_text()
    assert count([run, *given]) == 0
    copy = shutil.copytree(scripted_run, tmp_path / "copy", symlinks=True)
    assert main(["--resume", str(copy), *given, "--steps", "2"]) == 0


def test_a_script_that_was_not_imported_is_named(scripted_run, script, tmp_path, error_of):
    remedy = f"has the head 'mine', which a script defines: add --import {script}\n"
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(photo)
    assert error_of(evaluate, scripted_run, "--out", tmp_path / "scored").endswith(remedy)
    assert error_of(predict, scripted_run, photo).endswith(remedy)
    assert error_of(count, scripted_run).endswith(remedy)
    assert error_of(main, "--resume", scripted_run).endswith(remedy)
    assert error_of(export, scripted_run, "--to", tmp_path / "exported").endswith(remedy)
    assert "scores of 'twin', a task that a script defines: add --import FILE" in error_of(compare, scripted_run)
    assert not (tmp_path / "scored").exists() and not (tmp_path / "exported").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "error: no such file: "),
        ("import torch\n\nx = 1 / 0\n", "script.py, line 3, fails (ZeroDivisionError: division by zero): correct it\n"),
        ("def f(:\n", "script.py fails (SyntaxError: "),
        ("import absent_package\n", "line 1, fails (ModuleNotFoundError: No module named 'absent_package')"),
        ("raise SystemExit(3)\n", "line 1, fails (SystemExit: 3)"),
    ],
)
def test_a_script_that_fails_is_one_line_with_its_line(text, message, tmp_path, capsys):
    path = tmp_path / "script.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main([*QUICK, "--import", str(path), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not Path(tmp_path / "run").exists()


def test_a_file_that_is_no_script_is_one_line(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SystemExit):
        main(["--import", str(tmp_path / "notes.txt")])
    assert capsys.readouterr().err.endswith("notes.txt: the name of a script ends in .py\n")
