"""The tuner's decisions and its file; what it times needs a GPU."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench import tune
from kernels import tiles

ROOT = Path(__file__).resolve().parents[2]


def test_a_candidate_wins_only_by_more_than_the_clock_s_rounding():
    assert tune.fastest("now", ["a", "b"], {"now": 1.0, "a": 0.99, "b": 0.995}.get) == "now"
    assert tune.fastest("now", ["a", "b"], {"now": 1.0, "a": 0.9, "b": 0.8}.get) == "b"


@pytest.mark.parametrize("error", [tune.Spills(), OutOfResources(300, 200, "shared memory")], ids=["spills", "too big"])
def test_what_spills_or_does_not_fit_is_no_candidate(error):
    def time(candidate):
        if candidate == "bad":
            raise error
        return {"now": 1.0, "good": 0.5}[candidate]

    assert tune.fastest("now", ["bad", "good"], time) == "good"


def test_every_class_of_every_kernel_is_measured():
    for kernel in tune.SPACE:
        assert {limit for limit, _ in tune.classes(kernel)} == set(tiles.TABLES["default"][kernel]["2"])


def test_tuning_writes_the_fastest_tiles_of_the_architecture_and_leaves_the_default(monkeypatch):
    def time_launch(kernel, pool, device):  # the largest step is the fastest
        columns = tune.parse_pool(pool).tile_columns
        entries = row[kernel]["2"]
        return 1 / entries[str(min(limit for limit in map(int, entries) if columns <= limit))][1]

    monkeypatch.setattr(tune, "time_launch", time_launch)
    times = {"columns": {7_880: 5, 40_960: 2}, "fused": {7_880: 2, 40_960: 5}}
    monkeypatch.setattr(tune, "time_algorithm", lambda name, tokens, device: times[name][tokens])
    default, row = json.dumps(tiles.TABLES["default"]), {}
    tune.tune_kernel("expand", row, torch.device("cpu"))
    tune.tune_ffn(row, torch.device("cpu"))
    assert {entry[1] for entry in row["expand"]["2"].values()} == {128}
    assert row["ffn"] == {"small": "fused", "large": "columns"}
    assert json.dumps(tiles.TABLES["default"]) == default
    changed = tune.difference({}, row)
    assert any(line.startswith("expand 2 512") and line.endswith("-> [64, 128, 4, 2]") for line in changed)


def test_the_file_that_ships_is_what_the_tuner_would_write():
    text = (resources.files("kernels") / "tables.json").read_text()
    assert tune.dump(json.loads(text)) == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [([], "bench.tune measures: it needs a GPU that torch can use"), (["--kernels", "sort"], "unknown 'sort'")],
)
def test_a_machine_or_name_that_will_not_do_ends_in_one_line(arguments, complaint):
    done = subprocess.run([sys.executable, "-m", "bench.tune", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and complaint in done.stderr.splitlines()[-1]
