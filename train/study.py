"""``python -m train.study FIGURE``: trains the arms of a figure or table of ASE, or all weightings; compares them."""

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from kernels import UserError
from train.cli import Parser, flags_of, guarded
from train.config.arms import DECODERS, FIGURES, PRETRAINING, PRETRAINING_SEED, ROUTED, SINGLE, Arm
from train.config.settings import Settings
from train.evaluation.baselines import references_of
from train.evaluation.results import Results, require_comparable
from train.evaluation.study import as_json, compare, table
from train.files.atomic import make_folder, write_json, write_text
from train.files.folders import claim
from train.output.charts import draw
from train.output.versions import versions
from train.run.arms import WEIGHTED, Runs, arms_of
from train.run.course import WRITTEN, draw_routing, read_course

DESCRIPTION = """\
Train the arms of a figure or table of ASE (arXiv 2510.00570) and compare them by Delta_m against single-task models,
over several seeds. Finished runs are not repeated: the same command continues a study that was stopped.

Without --data it adapts, on rendered scenes, a frozen backbone that was trained on one task. With --data it needs
--pretrained. OUT receives FIGURE.json, FIGURE.md, FIGURE.png, and in runs/ the runs. fig4 draws, as python -m
train.routing does, which experts the tasks chose in the course of one run. weighting compares every weighting of the
tasks' losses and gradients, and needs the extra torchjd; all stands for the figures and tables of ASE."""
SCENES, PAPER = "scenes_adapt", "paper"  # the recipes below all arms


def build_parser() -> Parser:
    parser = Parser("train.study", DESCRIPTION)
    choices = [*FIGURES, WEIGHTED, ROUTED.name, "all"]
    parser.add_argument("figures", metavar="FIGURE", nargs="+", choices=choices, help=", ".join(choices))
    parser.add_argument("--seeds", type=int, metavar="N", default=3, help="runs of every arm (%(default)s)")
    parser.add_argument("--out", metavar="DIR", default="runs/study", help="(%(default)s)")
    shared = parser.add_argument_group("what all arms share")
    shared.add_argument("--data", metavar="DIR", help="a tree of PASCAL-Context (rendered scenes)")
    shared.add_argument("--pretrained", metavar="FILE|NAME|RUN", help="the backbone (scenes: trained by the study)")
    shared.add_argument("--recipe", metavar="NAME|FILE", help=f"the settings ({PAPER}; scenes: {SCENES})")
    shared.add_argument("--steps", type=int, metavar="N", help="optimiser steps of every arm (as the recipe says)")
    shared.add_argument("--workers", type=int, metavar="N", help="processes that prepare batches (1)")
    shared.add_argument("--set", action="append", metavar="key=value", default=[], help="any setting of every arm")
    parser.settings = [*asdict(Settings())]
    return parser


def shared_settings(options: Namespace) -> dict[str, Any]:
    """What all arms share, without the backbone of a study on rendered scenes, which may have to be trained."""
    if options.seeds < 1:
        raise UserError(f"--seeds {options.seeds}: there must be one at least")
    if options.data and not options.pretrained:
        raise UserError("--data needs --pretrained: the arms adapt a backbone that was trained before")
    names = ("data", "pretrained", "recipe", "steps", "workers")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    flags, _ = flags_of(given | {"set": options.set})
    # Delta_m is against single-task models, so that no run needs baselines of its own.
    return {"recipe": PAPER if options.data else SCENES, "tracker": "none", "baselines": False} | flags


def require_shared(shared: Mapping[str, Any], arms: Sequence[Arm]) -> None:
    """UserError for a setting that not all arms can share, since an arm, or the study, gives it a value itself."""
    own = {"seed", "out"}.union(*(arm.values for arm in arms), {"decoder_width"} if {*DECODERS} & {*arms} else ())
    if given := sorted(own & shared.keys()):
        raise UserError(f"{given[0]} is not for all arms to share, each has its own: leave out --set {given[0]}")


def pretrained(runs: Path, shared: dict[str, Any]) -> str:
    """The backbone of all arms; without one in ``shared`` a run of PRETRAINING, of its own length."""
    if "pretrained" in shared:
        return shared["pretrained"]
    own = {name: value for name, value in shared.items() if name not in ("steps", "recipe")}
    pretraining = Runs(runs, own | {"recipe": PRETRAINING.recipe})
    say(PRETRAINING, PRETRAINING_SEED, pretraining.run(PRETRAINING, PRETRAINING_SEED))
    return str(pretraining.folder(PRETRAINING, PRETRAINING_SEED))


def say(arm: Arm, seed: int, results: Results) -> None:
    scores = (f"{task} {ref['value']:.4g}" for task, ref in references_of(results).items())
    print(f"{arm.name:<24} seed {seed}  {'  '.join(scores)}", flush=True)


def run(options: Namespace) -> None:
    shared, out = shared_settings(options), Path(options.out)
    every = {"all": (*FIGURES, ROUTED.name)}
    asked = dict.fromkeys(name for given in options.figures for name in every.get(given, (given,)))
    figures = [figure for figure in asked if figure != ROUTED.name]
    require_shared(shared, [*arms_to_compare(figures), *([ROUTED] if ROUTED.name in asked else [])])
    names = [f"{figure}.{kind}" for figure in figures for kind in ("json", "md", "png")]
    claim(out, "train.study", ["runs", *names, *(WRITTEN if ROUTED.name in asked else ())])
    make_folder(out / "runs")
    runs = Runs(out / "runs", shared | {"pretrained": pretrained(out / "runs", shared)})
    run_figures(runs, figures, out, options.seeds)
    for figure in figures:
        print(
            f"\n{(out / f'{figure}.md').read_text(encoding='utf-8')}\n{out}/: {figure}.json, {figure}.md, {figure}.png"
        )
    if ROUTED.name in asked:
        say(ROUTED, 0, runs.run(ROUTED, 0))
        print(f"\n{draw_routing(read_course(runs.folder(ROUTED, 0)), out)}\n\n{out}/: {', '.join(WRITTEN)}")


def arms_to_compare(figures: Sequence[str]) -> list[Arm]:
    """The single-task models and the arms of the figures, each once."""
    return list(dict.fromkeys((*SINGLE, *(arm for figure in figures for arm in arms_of(figure))))) if figures else []


def run_figures(runs: Runs, figures: Sequence[str], out: Path, seeds: int) -> None:
    """Train what the figures compare, seed by seed, and write them after each."""
    arms = arms_to_compare(figures)
    finished: list[dict[Arm, Results]] = []
    for seed in range(seeds):
        finished.append({})
        for arm in arms:
            finished[-1][arm] = runs.run(arm, seed)
            say(arm, seed, finished[-1][arm])
        for figure in figures:
            report(out, figure, finished, seeds)


def report(out: Path, figure: str, finished: Sequence[Mapping[Arm, Results]], wanted: int) -> None:
    """Write the table, the chart and their numbers, over the seeds that are finished for every arm."""
    arms = arms_of(figure)
    for results in finished:
        require_comparable({arm.name: results[arm] for arm in (*SINGLE, *arms)})
    comparison = compare(
        {arm.name: [results[arm] for results in finished] for arm in arms},
        {arm.tasks[0]: [results[arm] for results in finished] for arm in SINGLE},
    )
    note = caption(finished[0][arms[0]], len(finished), wanted)
    about = {
        "figure": figure,
        "note": note,
        "seeds": {"finished": len(finished), "wanted": wanted},
        "versions": versions(),
        "commands": {arm.name: finished[0][arm]["command"] for arm in (*SINGLE, *arms)},
    }
    write_json(out / f"{figure}.json", about | as_json(comparison))
    write_text(out / f"{figure}.md", f"{table(comparison)}\n\n{note}\n")
    draw(out / f"{figure}.png", figure, {arm: comparison.arms[arm.name].delta for arm in arms}, note)


def caption(results: Results, seeds: int, wanted: int) -> str:
    """One line: images, model, steps, seeds and machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU of {os.cpu_count()} cores"
    of = f"{seeds} of {wanted} seeds, unfinished" if seeds < wanted else f"{seeds} seed{'s' * (seeds > 1)}"
    return f"{results['dataset']['name']}, {results['model']['name']}, {results['steps']} steps, {of}, {device}"


def main(argv: list[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
