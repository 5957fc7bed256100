"""The wheel holds all that the default job needs."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "source", ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(folder / "source")], check=True)
    return next(folder.glob("*.whl"))


def test_it_holds_the_packages_and_their_data_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {
        "kernels",
        "fastmoe_lora",
        "model",
        "train",
        "bench",
    }
    for path in ROOT.glob("train/**/*"):
        if path.suffix in (".py", ".yaml", ".json"):
            assert str(path.relative_to(ROOT)) in names
    assert "bench/static/budget.json" in names, "bench.static --check reads it"
    assert {f"{package}/py.typed" for package in ("kernels", "fastmoe_lora", "model", "train")} <= set(names)


def test_it_runs_the_default_job_from_another_folder(wheel, tmp_path):
    """In an environment of its own, which sees the libraries of this one but not this repository."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(pip, check=True)
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))

    def run(*arguments):
        done = subprocess.run([python, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import train; print(train.__file__)").startswith(str(site))
    quick = ["--steps", "5", "--set", "scenes=64", "--set", "val_scenes=8"]
    run("-m", "train", "--tasks", "seg,parts,sal,normals,edge", *quick)
    assert json.loads((tmp_path / "runs" / "scenes" / "results.json").read_text())["steps"] == 5
