"""bench/gpu.sh where there is no GPU; what it does on one is on record in its own results."""

import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from bench import bench_layer
from kernels.custom_ops import ALGORITHMS

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.sh"


def bash(*arguments, **environment):
    # No device is visible, so that a machine with a GPU runs the test too.
    env = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(["bash", *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120)


def test_the_script_parses():
    done = bash("-n", SCRIPT)
    assert (done.returncode, done.stderr) == (0, "")


def test_without_a_gpu_it_says_so_in_one_line_and_leaves_nothing(tmp_path):
    done = bash(SCRIPT, tmp_path / "results")
    assert done.returncode == 2
    assert (done.stdout + done.stderr).splitlines() == ["gpu.sh: no NVIDIA GPU that torch can use: nothing was run"]
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("arguments", [(), ("one", "two")])
def test_without_a_directory_it_says_so_in_one_line(arguments):
    done = bash(SCRIPT, *arguments)
    assert done.returncode == 2
    assert done.stderr == "gpu.sh: one argument wanted, the directory for the results\n"


def test_a_python_without_torch_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = bash(SCRIPT, tmp_path / "results", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"gpu.sh: torch, triton and pytest wanted where {sys.executable} finds them"


def test_the_benchmark_s_short_form_is_of_every_algorithm_in_the_cases_that_decide():
    ours, sizes = (re.search(rf'local {name}="(.*)"', SCRIPT.read_text())[1] for name in ("ours", "sizes"))
    assert '-k "($ours) and ($sizes) or bench_product or training"' in SCRIPT.read_text()
    every = product(bench_layer.SUBJECTS, (384, 768, 1024), (1_575, 7_880, 40_960), bench_layer.CONFIGS)
    names = ["-".join(map(str, case)) for case in every]
    chosen = [
        name for name in names if all(any(word in name for word in words.split(" or ")) for words in (ours, sizes))
    ]
    decisive = product([f"ours-{name}-768" for name in ALGORITHMS], ("7880", "40960"), ("16/3/1/4", "64/12/4/1"))
    assert sorted(chosen) == sorted(map("-".join, decisive))


def test_the_limits_of_its_parts_sum_to_less_than_nine_minutes():
    limits = [int(seconds) for seconds in re.findall(r"^\s+part \w+ (\d+) ", SCRIPT.read_text(), re.MULTILINE)]
    grace = 3  # between the signal to end and the one that kills
    assert len(limits) == 6
    assert sum(limits) + grace * len(limits) < 9 * 60
