"""``python -m train.routing RUN``: which experts the tasks chose in the course of a training."""

import sys
from argparse import Namespace
from pathlib import Path

from train.cli import Parser, guarded
from train.datasets.base import open_dataset
from train.datasets.batches import train_loader
from train.evaluation.conflict import gradient_cosines
from train.files.atomic import write_json
from train.files.folders import claim
from train.output.routing import save_agreement
from train.output.tables import format_table
from train.run import checkpoint
from train.run.build import load_checkpoint
from train.run.course import WRITTEN, draw_routing, read_course
from train.run.record import NAME

CONFLICT_BATCHES = 8
CONFLICT = ("conflict.png", "conflict.json")
DESCRIPTION = f"""\
Draw which experts the tasks of a run chose in the course of its training, from its {NAME}, which
python -m train --set routing_every=N writes. OUT receives fig4.png (gate mass by layer and expert at the first, an
early and the last step), gate_mass.png (shared experts and mutual information over training) and routing.json; with
--conflict also conflict.png (cosines between the gradients of the tasks in the experts of the last checkpoint)."""


def build_parser() -> Parser:
    parser = Parser("train.routing", DESCRIPTION)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--conflict", action="store_true", help=f"measure gradients, on {CONFLICT_BATCHES} batches")
    parser.add_argument("--out", metavar="DIR", help="(RUN)")
    return parser


def run(options: Namespace) -> None:
    folder, names = Path(options.run), [*WRITTEN, *(CONFLICT if options.conflict else ())]
    course = read_course(folder)
    out = claim(options.out or folder, "train.routing", names, alone=bool(options.out))  # RUN may be training
    print(draw_routing(course, out))
    if options.conflict:
        conflict(folder, out)
    print(f"\n{out}/: {', '.join(names)}")


def conflict(folder: Path, out: Path) -> None:
    """Measures the cosines, prints and draws them, and writes them by kind of expert, layer and pair of tasks."""
    settings, model, _ = load_checkpoint(checkpoint.find(folder))
    train_set, tasks = open_dataset(settings.source, "train"), model.tasks
    steps = range(CONFLICT_BATCHES)
    batches = train_loader(train_set, tasks, settings.batch_size, steps, settings.seed, settings.workers)
    kinds = dict(zip(("shared experts", "sparse experts"), gradient_cosines(model, batches), strict=True))
    kinds = {kind: cosines for kind, cosines in kinds.items() if cosines.isfinite().any()}
    means = {kind: cosines.nanmean(0) for kind, cosines in kinds.items()}
    for kind, cosines in means.items():
        rows = [[task, *(f"{value:+.3f}" for value in row)] for task, row in zip(tasks, cosines.tolist(), strict=True)]
        print(f"\n{format_table([[f'gradients in {kind}', *tasks], *rows])}")
    save_agreement(out / "conflict.png", means, tasks)
    write_json(out / "conflict.json", {"tasks": tasks} | {kind: cosines.tolist() for kind, cosines in kinds.items()})


def main(argv: list[str] | None = None) -> int:
    """Draw; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
