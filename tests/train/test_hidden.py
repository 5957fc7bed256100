"""Files that hide our packages: one line that names the file and the remedy, and nothing of the file is run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BESIDE = "raise SystemExit('the file was run')\n"


def python(folder, *arguments, path=ROOT):
    """(exit status, stderr) of Python in ``folder``, which precedes our packages on its path, as in a user's shell."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


@pytest.mark.parametrize("file", ["kernels.py", "model.py", "fastmoe_lora.py", "model/__init__.py"])
@pytest.mark.parametrize("command", ["train", "train.check", "bench.report"])
def test_a_command_names_the_file_that_hides_a_package(file, command, tmp_path):
    path, package = tmp_path / file, file.partition("/")[0].removesuffix(".py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(BESIDE)
    status, error = python(tmp_path, "-m", command, "--help")
    assert status == 2 and error.startswith(f"error: {path} hides the package {package} of fastmoe_lora: rename it")
    assert error.count("\n") == 1


def test_hugging_faces_kernels_installed_over_ours_is_one_line(tmp_path):
    for package, text in {"train": (ROOT / "train/__init__.py").read_text(), "kernels": BESIDE}.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(text)
    status, error = python(ROOT.parent, "-m", "train", path=tmp_path)
    assert status == 2 and error.startswith(f"error: {tmp_path}/kernels/__init__.py hides the package kernels")
    assert "uninstall that, then reinstall fastmoe_lora" in error and error.count("\n") == 1


@pytest.mark.parametrize("statement", ["import fastmoe_lora", "import model", "import train.cli"])
def test_an_import_says_the_same(statement, tmp_path):
    (tmp_path / "kernels.py").write_text("x = 1\n")
    status, error = python(tmp_path, "-c", statement)
    last = error.splitlines()[-1]
    assert status == 1 and last.startswith(
        f"ImportError: {tmp_path}/kernels.py hides the package kernels of fastmoe_lora"
    )


def test_a_folder_without_code_hides_nothing(tmp_path):
    for package in ("kernels", "model"):
        (tmp_path / package).mkdir()
    assert python(tmp_path, "-c", "import train") == (0, "")
