"""Runs that differ in their seed alone: which they are, and what stands in their row."""

from statistics import mean, stdev

import pytest

from kernels import UserError
from train.compare import rows_of
from train.evaluation.seeds import arms_of, mean_and_deviation, require_comparable_arms


def result(seed, miou=50.0, data="NYUDv2", **settings):
    """What counts of a results.json."""
    images = {"images": 2, "ids": "a", "files": str(seed) if data == "scenes" else "b"}
    return {
        "settings": {"seed": seed, "lr": 0.1, "out": f"runs/{seed}"} | settings,
        "steps": 10,
        "protocol": "mini@64",
        "dataset": {"name": data, "image_size": 64},
        "evaluation": {"split": "val", "images": 2, "compared_at": "64 x 64", "labelled": {"seg": images}},
        "parameters": {"total": 5_000_000, "trainable": 1_500_000},
        "metrics": {"seg": {"mIoU": miou}},
    }


def test_runs_of_one_arm_differ_in_seed_and_places_alone():
    runs = {"ase-0": result(0), "low": result(0, lr=0.01), "ase-1": result(1), "ase-2": result(2) | {"steps": 20}}
    assert {name: [*arm] for name, arm in arms_of(runs).items()} == {
        "ase (2 seeds)": ["ase-0", "ase-1"],
        "low": ["low"],
        "ase-2": ["ase-2"],
    }


def test_a_run_that_was_scored_twice_is_two_arms():
    assert [*arms_of({"a": result(0), "b": result(0)})] == ["a", "b"]
    assert [*arms_of({"a": result(0), "b": result(1) | {"tta": "flip"}})] == ["a", "b"]
    assert [*arms_of({"a": {"metrics": {}}, "b": {"metrics": {}}})] == ["a", "b"], "predictions have no settings"


def test_names_of_arms_end_at_a_separator_and_are_distinct():
    runs = {"run-10": result(0), "run-11": result(1), "run-12": result(0, lr=1), "run-13": result(1, lr=1)}
    assert [*arms_of(runs)] == ["run (2 seeds)", "run-12 (2 seeds)"]
    assert [*arms_of({"0": result(0), "1": result(1)})] == ["0 (2 seeds)"]


def test_a_row_is_the_mean_and_the_deviation_of_a_sample():
    values = [50.0, 51.0, 54.0]
    runs = {f"ase-{seed}": result(seed, value) | {"delta_m": -value} for seed, value in enumerate(values)}
    head, row = rows_of(arms_of(runs))
    assert head == ["run", "trainable M", "all M", "seg mIoU ^", "Delta_m % ^"]
    spread = f"{stdev(values):.2f}"
    assert row == [
        "ase (3 seeds)",
        "1.50",
        "5.00",
        f"{mean(values):.2f} +- {spread}",
        f"{-mean(values):+.2f} +- {spread}",
    ]
    assert mean_and_deviation([1.0], "+.2f") == "+1.00"
    assert mean_and_deviation([1.0, None], ".2f") == mean_and_deviation([None], ".2f") == "n/a"


def test_the_seeds_of_rendered_scenes_have_their_own_images():
    """So that arms are compared seed by seed, over the same seeds."""
    runs = {f"{arm}-{seed}": result(seed, lr=lr, data="scenes") for arm, lr in (("a", 1), ("b", 2)) for seed in (0, 1)}
    require_comparable_arms(arms_of(runs))
    with pytest.raises(UserError, match=r"a \(2 seeds\) and b-1 .* theirs are 0, 1 and 1; give runs of the same seeds"):
        require_comparable_arms(arms_of({name: run for name, run in runs.items() if name != "b-0"}))
    runs["b-1"]["evaluation"]["labelled"]["seg"]["files"] = "other"
    with pytest.raises(UserError, match="a-1 and b-1 cannot be compared: seg of 2 images"):
        require_comparable_arms(arms_of(runs))


def test_photos_are_the_same_for_all_seeds():
    runs = {"a-0": result(0), "a-1": result(1)}
    require_comparable_arms(arms_of(runs))
    runs["a-1"]["evaluation"]["labelled"]["seg"]["files"] = "other"
    with pytest.raises(UserError, match="a-0 and a-1 cannot be compared"):
        require_comparable_arms(arms_of(runs))
