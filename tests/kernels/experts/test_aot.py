"""What compilers for five GPUs make of the grouped path's kernels, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from bench import aot
from bench.grouped_launches import GROUPED_LAUNCHES
from bench.launches import parse_pool
from kernels.experts import sort

ROOT = Path(__file__).resolve().parents[3]
TILES = {
    "shrink": "shrink", "shrink_backward": "shrink_backward", "expand": "expand", "expand_backward": "expand",
    "weight_grad_a": "weight_grad", "weight_grad_b": "weight_grad",
}  # fmt: skip
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"

pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason="this Triton has no ptxas, the assembler of NVIDIA code")


@pytest.mark.slow
@pytest.mark.parametrize("target", [pytest.param(target, marks=pytest.mark.long) for target in ("sm_80", "sm_90")])
def test_experts_with_activation_and_biases_compile_without_spills(target, tmp_path):
    """tests/kernels/test_aot.py compiles pools of LoRA."""
    out = tmp_path / "aot.json"
    chosen = [
        "--kernels",
        ",".join(GROUPED_LAUNCHES),
        "--pools",
        "16/4/2/256 gelu",
        "--dtypes",
        "bf16,fp32",
        "--targets",
        target,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot", "--out", out, *chosen],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["kernel"] for row in rows} == set(GROUPED_LAUNCHES) and len(rows) == 2 * len(GROUPED_LAUNCHES)
    for row in rows:
        assert row["spills"] == 0 and row["shared"] <= row["shared_limit"], row


@pytest.fixture(scope="module", params=["aot.json", "aot-3.6.json"])
def committed(request):
    rows = json.loads((ROOT / "bench" / "results" / request.param).read_text())["rows"]
    return [row for row in rows if row["kernel"] in GROUPED_LAUNCHES]


def test_committed_results_are_of_the_tiles_that_ship(committed):
    for row in committed:
        kernel = row["kernel"].removeprefix("grouped_")
        if kernel in TILES:
            rank = parse_pool(row["pool"].split()[0]).rank
            sizes = sort.tile(TILES[kernel], aot.DTYPES[row["dtype"]].itemsize, rank)
            sides = [sort.BLOCK, *(n for name, n in sizes.items() if name.startswith("B"))]
            assert sorted(row["tile"].split("x")) == sorted(map(str, sides)), row
            assert (row["num_warps"], row["num_stages"]) == (sizes["num_warps"], sizes["num_stages"]), row
