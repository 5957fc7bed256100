"""``python -m train.lossdiff``: where two runs part."""

import json
import math

import pytest

from train.cli import main as train
from train.lossdiff import compare, main, relative
from train.run.record import NAME

QUICK = ["--batch-size", "4", "--set", "scenes=12", "--set", "val_scenes=4", "--workers", "0", "--steps", "4"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs that are the same, and one with another seed."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", "0"), ("same", "0"), ("other", "1")):
        assert train([*QUICK, "--seed", seed, "--out", str(folder / name)]) == 0
    return folder


@pytest.mark.parametrize("allowed", [[], ["--assert-equal"], ["--rtol", "0"]])
def test_equal_runs(allowed, runs, tmp_path, capsys):
    assert main([str(runs / "one"), str(runs / "same"), *allowed, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("none") == 5 and "over 4 common steps" in printed.out and not printed.err
    assert json.loads((tmp_path / "lossdiff.json").read_text())["seg"]["first"] is None
    assert (tmp_path / "lossdiff.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("allowed", "status"), [([], 0), (["--assert-equal"], 1), (["--rtol", "1e-9"], 1), (["--rtol", "9"], 0)]
)
def test_other_runs(allowed, status, runs, tmp_path, capsys):
    assert main([str(runs / "one"), str(runs / "other" / NAME), *allowed, "--out", str(tmp_path)]) == status
    printed = capsys.readouterr()
    assert printed.out.count("step 1 ") == 5
    assert ("the losses differ: seg by " in printed.err) == bool(status)


def test_a_shorter_run_is_not_equal(runs, tmp_path, capsys):
    path = tmp_path / NAME
    path.write_text("".join((runs / "one" / NAME).read_text().splitlines(keepends=True)[:2]))
    argv = [str(runs / "one"), str(path), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    assert main([*argv, "--assert-equal"]) == 1
    assert "the runs have 4 and 2 steps" in capsys.readouterr().err


def test_the_first_step_and_the_largest_difference_by_hand():
    one = {1: (1.0, 2.0), 2: (1.0, 2.0), 3: (1.0, math.nan), 4: (1.0, 4.0)}
    other = {1: (1.0, 2.0), 2: (1.0, 2.5), 3: (1.0, math.nan), 4: (1.0, 4.1), 5: (1.0, 0.0)}
    assert (compare(one, other, 0).first, compare(one, other, 0).largest) == (None, 0.0)
    found = compare(one, other, 1)
    assert (found.first, found.worst, found.largest) == (2, 2, pytest.approx(0.2))
    assert relative(1.0, math.nan) == math.inf == relative(math.inf, 1.0)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("missing", "missing does not exist: give the output folder"),
        (["seg"], "the runs have other tasks"),
        (["seg", "parts", "sal", "normals", "edge"], "the runs have no step in common"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(second, message, runs, tmp_path, capsys):
    path = tmp_path / NAME
    if second == "missing":
        path = tmp_path / "missing"
    else:
        path.write_text(json.dumps({"kind": "step", "step": 9} | {f"loss/{task}": 0.5 for task in second}) + "\n")
    assert main([str(runs / "one"), str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
