"""What compilers for five GPUs make of the kernels, without a GPU: registers, shared memory, instructions."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import triton

from bench import aot
from bench.expert_launches import EXPERT_LAUNCHES
from bench.grouped_launches import GROUPED_LAUNCHES
from bench.launches import parse_pool
from kernels import gelu, pack, tiles, weight_grad
from kernels.experts import gates

ROOT = Path(__file__).resolve().parents[2]
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"

NO_PRODUCT = (
    "pack_forward",
    "pack_backward",
    "reduce",
    "gate_backward",
    "gelu",
    "gelu_backward",
    *EXPERT_LAUNCHES,
    *(f"grouped_{name}" for name in ("count", "prefix", "scatter", "combine", "combine_backward")),
)  # nothing there for tensor cores
SPILLS = {"sm_100": 8}  # bytes, in three rows: it has no tiles of its own
SAME_TILE = {"matmul_gelu_backward": "matmul_gelu"}
# Tiles that depend on neither the pool nor the architecture.
FIXED_TILES = {
    **dict.fromkeys(("gelu", "gelu_backward"), (gelu.BM, gelu.BN)),
    **dict.fromkeys(("pack_forward", "pack_backward"), (pack.BM, pack.BN)),
    "reduce": (weight_grad.BP, weight_grad.BN),
}

pytestmark = pytest.mark.skipif(not PTXAS.exists(), reason="this Triton has no ptxas, the assembler of NVIDIA code")


def assert_promises(row):
    assert row["spills"] <= SPILLS.get(row["target"], 0), row
    assert row["shared"] <= row["shared_limit"], row
    if row["dtype"] == "fp32":  # TF32 keeps 10 bits of 23
        assert row["tf32"] == 0, row
    elif row["target"] == "sm_90":
        assert (row["wgmma"] > 0) == (row["kernel"] not in NO_PRODUCT), row


@pytest.mark.parametrize(
    ("pool", "dtypes", "targets"),
    [
        ("16/3/1/4", "bf16", "sm_90"),
        pytest.param("16/3/1/4", "fp32", "sm_90", marks=pytest.mark.long),
        pytest.param("16/3/1/4", "bf16,fp32", "sm_80,sm_89,sm_100,gfx942", marks=pytest.mark.long),
        pytest.param("16/3/1/16,128/8/4/2", "bf16", "sm_90", marks=pytest.mark.long),
    ],
)
@pytest.mark.slow
def test_every_kernel_compiles_without_spills_within_shared_memory(pool, dtypes, targets, tmp_path):
    out = tmp_path / "aot.json"
    chosen = ["--pools", pool, "--dtypes", dtypes, "--targets", targets]
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
    lengths = [len(names.split(",")) for names in (pool, dtypes, targets)]
    assert len(rows) == len(aot.KERNELS) * lengths[0] * lengths[1] * lengths[2]
    for row in rows:
        assert_promises(row)


# Those of the other targets are compiled by pytest -m long.
COMMITTED = {"aot.json": ("sm_80", "sm_89", "sm_90", "sm_100"), "aot-3.6.json": ("sm_90",)}


@pytest.fixture(scope="module", params=COMMITTED)
def committed(request):
    rows = json.loads((ROOT / "bench" / "results" / request.param).read_text())["rows"]
    assert {row["target"] for row in rows} == set(COMMITTED[request.param])
    return rows


def test_committed_results_keep_the_promises(committed):
    for row in committed:
        assert_promises(row)


def test_committed_results_are_of_every_launch(committed):
    measured = [tuple(row[name] for name in ("kernel", "pool", "dtype", "target")) for row in committed]
    pairs = [(kernel, pool) for kernel, pools in aot.KERNELS.items() for pool in pools]
    targets = {row["target"] for row in committed}
    assert sorted(measured) == sorted((*pair, *rest) for pair, *rest in product(pairs, aot.DTYPES, targets))


def tile_of(sizes):
    return "x".join(str(n) for name, n in sizes.items() if name.startswith("B"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_committed_results_are_of_the_tiles_that_ship(target, committed, monkeypatch):
    """Of every row that the table has for this architecture, its own or the default's. The tiles of kernels/grouped are
    in none; grouped/test_aot.py compares them."""
    if target not in {row["target"] for row in committed}:
        pytest.skip(f"not compiled for {target} with this Triton")
    monkeypatch.setattr(tiles, "architecture", lambda device: target)
    measured = set()
    for row in (row for row in committed if row["target"] == target and row["kernel"] not in GROUPED_LAUNCHES):
        if row["kernel"] in FIXED_TILES:
            assert row["tile"] == "x".join(map(str, FIXED_TILES[row["kernel"]])), row
            continue
        kernel, pool = SAME_TILE.get(row["kernel"], row["kernel"]), parse_pool(row["pool"])
        if kernel.startswith("experts_gate"):
            assert row["tile"] == tile_of(gates.gate_options(1, pool.experts, pool.rank)[1]), row
            continue
        if kernel.startswith("experts_route"):
            assert row["tile"] == tile_of(gates.route_options(pool)), row
            continue
        x = torch.empty(0, dtype=aot.DTYPES[row["dtype"]])
        sizes = tiles.tile.__wrapped__(kernel, x.device, x.dtype, pool)  # not from the cache: another architecture
        assert row["tile"] == tile_of(sizes), row
        assert (row["num_warps"], row["num_stages"]) == (sizes["num_warps"], sizes["num_stages"]), row
        limits = tiles._row(kernel, x.device)[str(x.element_size())]
        measured.add((kernel, x.element_size(), min(n for n in map(int, limits) if pool.tile_columns <= n)))
    table = {kernel: tiles._row(kernel, x.device) for kernel in tiles.NAMES}
    assert measured == {(k, int(size), int(limit)) for k in table for size, rows in table[k].items() for limit in rows}


def test_every_architecture_with_rows_of_its_own_is_compiled_for():
    assert set(tiles.TABLES) - {"default"} <= set(aot.TARGETS)


def test_compiling_under_the_interpreter_is_refused_in_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "bench.aot"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["bench.aot compiles: unset TRITON_INTERPRET"]
