"""The shape of the repository: which way imports point, what they cost, how long files are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "fastmoe_lora", "model", "train")  # each may import those before it
PACKAGES = (*FLOORS, "bench")


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(path):
    """Top-level names a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_looks_up(floor):
    above = {*FLOORS[FLOORS.index(floor) + 1 :], "bench", "tests"}
    for path in sources(floor):
        assert not above & set(imported(path)), path


@pytest.mark.parametrize("package", ["kernels", "fastmoe_lora", "bench"])
def test_the_library_needs_torch_triton_numpy_and_nvtx_only(package):
    allowed = {"torch", "triton", "numpy", "nvtx", "pytest", *PACKAGES, *sys.stdlib_module_names}
    if package == "bench":  # bars, plots, and peers that are imported where a user has them
        allowed |= {"tqdm", "matplotlib", "quack", "scattermoe", "lorafusion"}
    for path in sources(package):
        assert set(imported(path)) <= allowed, path


@pytest.mark.parametrize("package", PACKAGES)
def test_files_stay_short(package):
    limit = 300 if package == "kernels" else 400
    assert {path.name: n for path in sources(package) if (n := len(path.read_text().splitlines())) > limit} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_works_without_triton_and_starts_nothing(package):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, time; start = time.perf_counter()\n"
        f"import {package}\n"
        "assert time.perf_counter() - start < 2\n"
        "assert not torch.distributed.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_package_called_kernels_is_named_in_one_line(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "import fastmoe_lora"],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert f"the package 'kernels' at {tmp_path / 'kernels'} is not fastmoe_lora's" in done.stderr.splitlines()[-1]
