"""The shape of the repository: which way imports point, what they cost, how long files are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("kernels", "fastmoe_lora", "model", "train")  # each may import those before it
PACKAGES = (*FLOORS, "bench")
# The folders of train/: each may import those after it. The commands at the top of train/ may import all of them.
TRAIN = ("run", "evaluation", "output", "config", "datasets", "protocols", "tasks", "metrics", "files")


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported_modules(path):
    """Dotted names a file imports, wherever in it. ``from a.b import c`` gives ``a.b.c``, module or not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported(path):
    """Top-level names a file imports, wherever in it."""
    return {name.split(".")[0] for name in imported_modules(path)}


def imported_from_train(path):
    """Second-level names: the folders and commands of train/ that a file imports."""
    return {name.split(".")[1] for name in imported_modules(path) if name.startswith("train.")}


@pytest.mark.parametrize("floor", FLOORS)
def test_nothing_looks_up(floor):
    above = {*FLOORS[FLOORS.index(floor) + 1 :], "bench", "tests"}
    for path in sources(floor):
        assert not above & imported(path), path


@pytest.mark.parametrize("folder", TRAIN)
def test_folders_of_train_import_those_after_them(folder):
    allowed = set(TRAIN[TRAIN.index(folder) :])
    for path in sources(f"train/{folder}"):
        assert imported_from_train(path) <= allowed, path


def test_every_folder_of_train_has_its_place_in_the_order():
    assert {path.parent.name for path in (ROOT / "train").glob("*/__init__.py")} == set(TRAIN)


def test_commands_share_cli_and_nothing_else_of_each_other():
    for path in (ROOT / "train").glob("*.py"):
        assert imported_from_train(path) <= {*TRAIN, "cli"}, path


@pytest.mark.parametrize("name", ["resolve", "fit", "evaluate"])
def test_a_plain_verb_names_one_function(name):
    """Two functions of these names did different things in different files."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    defined = [
        path
        for package in PACKAGES
        for path in sources(package)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, functions) and node.name == name
    ]
    assert len(defined) <= 1, defined


@pytest.mark.parametrize("package", ["kernels", "fastmoe_lora", "bench"])
def test_the_library_needs_torch_triton_numpy_nvtx_and_safetensors_only(package):
    allowed = {"torch", "triton", "numpy", "nvtx", "safetensors", "pytest", *PACKAGES, *sys.stdlib_module_names}
    if package == "fastmoe_lora":  # imported where a user names a repository of the Hub
        allowed |= {"huggingface_hub"}
    if package == "bench":  # the suites, bars, plots, and peers that are imported where a user has them
        allowed |= {"pytest_benchmark", "tqdm", "matplotlib", "quack", "scattermoe", "lorafusion"}
    for path in sources(package):
        assert imported(path) <= allowed, path


@pytest.mark.parametrize("package", PACKAGES)
def test_files_stay_short(package):
    limit = 300 if package == "kernels" else 400
    assert {path.name: n for path in sources(package) if (n := len(path.read_text().splitlines())) > limit} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_works_without_triton_and_starts_nothing(package):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, time; start = time.process_time()\n"
        f"import {package}\n"
        "assert time.process_time() - start < 2\n"
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
    assert f"{tmp_path / 'kernels/__init__.py'} hides the package kernels" in done.stderr.splitlines()[-1]


def test_patterns_of_cost_name_files_that_exist(pytestconfig):
    """A test that moves must not fall back into the unit tier unseen."""
    (conftest,) = (p for p in pytestconfig.pluginmanager.get_plugins() if getattr(p, "COSTS", None))
    for pattern in conftest.COSTS:
        assert list((ROOT / "tests").glob(pattern)), pattern
