"""Runs that differ in their seed alone, as one arm of a table: the mean and the deviation of their scores."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from kernels.errors import UserError
from train.datasets.scenes.dataset import Scenes
from train.evaluation.results import Results, require_comparable
from train.output.formats import PLUS_MINUS

# Settings in which runs of one arm may differ: no number depends on them, but for the seed.
FREE = {"seed", "recipe", "out", "cache", "workers", "tracker", "wandb_project", "nvtx", "keep", "checkpoint_every"}

Arms = dict[str, dict[str, Results]]


def arms_of(runs: Mapping[str, Results]) -> Arms:
    """``arms[name][run]``, in the order of the runs. Runs of one arm have the same settings, step and augmentation, and
    each a seed of its own: a run that was scored twice is two arms."""
    alike: dict[str, list[str]] = {}
    for name, results in runs.items():
        alike.setdefault(_identity(name, results), []).append(name)
    arms: Arms = {}
    for names in alike.values():
        distinct = len({_seed(runs[name]) for name in names}) == len(names)
        for same in [names] if distinct else [[name] for name in names]:
            arms[_arm_name(same, arms)] = {name: runs[name] for name in same}
    return arms


def _identity(name: str, results: Results) -> str:
    """The same text for runs of one arm."""
    if not results.get("settings"):
        return name
    settings = {key: value for key, value in results["settings"].items() if key not in FREE}
    return json.dumps([settings, results.get("step", results.get("steps")), results.get("tta")], sort_keys=True)


def _seed(results: Results) -> Any:
    return (results.get("settings") or {}).get("seed")


def _arm_name(names: Sequence[str], taken: Arms) -> str:
    """What the names of the runs begin with, up to a separator, and their number; that of a single run is its own."""
    if len(names) == 1:
        return names[0]
    common = "".join(os.path.commonprefix([re.split("([-_./])", name) for name in names])).rstrip("-_./")
    name = f"{common or names[0]} ({len(names)} seeds)"
    return f"{names[0]} ({len(names)} seeds)" if name in taken else name


def require_comparable_arms(arms: Arms) -> None:
    """UserError where runs cannot be compared. The seed of a run on rendered scenes decides its images, so that only
    runs of one seed are compared there, and all arms need the same seeds."""
    runs = {name: results for arm in arms.values() for name, results in arm.items()}
    rendered = all(results["dataset"]["name"] == Scenes.name for results in runs.values())
    if not rendered or None in map(_seed, runs.values()):
        require_comparable(runs)
        return
    seeds = {name: sorted(str(_seed(results)) for results in arm.values()) for name, arm in arms.items()}
    (first, ours), *others = seeds.items()
    for name, theirs in others:
        if theirs != ours:
            raise UserError(
                f"{first} and {name} cannot be compared: the seed decides what is rendered, and theirs are "
                f"{', '.join(ours)} and {', '.join(theirs)}; give runs of the same seeds"
            )
    for seed in ours:
        require_comparable({name: results for name, results in runs.items() if str(_seed(results)) == seed})


def mean_and_deviation(values: Sequence[float | None], form: str) -> str:
    """The mean and, of several values, the standard deviation (n - 1), each in the format ``form``. Not available where
    a value is not."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "n/a"
    middle = format(mean(known), form)
    return f"{middle}{PLUS_MINUS}{format(stdev(known), form.lstrip('+'))}" if len(known) > 1 else middle
