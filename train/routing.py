"""``python -m train.routing RUN``: which experts the tasks chose in the course of a training."""

import sys
from argparse import Namespace
from pathlib import Path

from kernels import UserError
from model import MultiTaskViT
from train.cli import Parser, guarded
from train.datasets.base import open_dataset
from train.datasets.batches import train_loader
from train.evaluation.conflict import gradient_cosines
from train.evaluation.gate_maps import gate_maps
from train.files.atomic import make_folder, write_json
from train.files.folders import claim, require_new
from train.files.images import read_photo
from train.output.expert_maps import ExpertMaps, Place, save_expert_maps
from train.output.routing import save_agreement
from train.output.tables import format_table
from train.run import checkpoint
from train.run.build import load_checkpoint
from train.run.course import WRITTEN, draw_routing, read_course
from train.run.record import NAME
from train.tasks import parse_tasks

CONFLICT_BATCHES = 8
CONFLICT = ("conflict.png", "conflict.json")
EXPERTS = "experts.png"
DESCRIPTION = f"""\
Draw which experts the tasks of a run chose in the course of its training, from its {NAME}, which
python -m train --set routing_every=N writes. OUT receives fig4.png (gate mass by layer and expert at the first, an
early and the last step), gate_mass.png (shared experts and mutual information over training) and routing.json; with
--conflict also conflict.png (cosines between the gradients of the tasks in the experts of the last checkpoint).

With --image, draw instead which experts the last checkpoint uses for the patches of a photo, which needs no record: the
photo, by task and layer the sparse expert with the largest gate, and the gate mass of the shared experts."""


def build_parser() -> Parser:
    parser = Parser("train.routing", DESCRIPTION)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--conflict", action="store_true", help=f"measure gradients, on {CONFLICT_BATCHES} batches")
    parser.add_argument("--image", metavar="PHOTO", help=f"draw {EXPERTS}: which experts the patches of this photo use")
    parser.add_argument("--layers", metavar="I,J", help="layers that --image shows, from 0 (first, middle and last)")
    parser.add_argument("--tasks", metavar="A,B", help="tasks that --image shows (all of the run)")
    parser.add_argument("--to", metavar="FILE", help=f"draw --image into this new .png or .pdf (OUT/{EXPERTS})")
    parser.add_argument("--out", metavar="DIR", help="(RUN)")
    return parser


def run(options: Namespace) -> None:
    if options.image:
        draw_experts(options)
        return
    if given := [name for name in ("layers", "tasks", "to") if getattr(options, name)]:
        raise UserError(f"--{given[0]} says what --image draws: give a photo, --image PHOTO")
    folder, names = Path(options.run), [*WRITTEN, *(CONFLICT if options.conflict else ())]
    course = read_course(folder)
    out = claim(options.out or folder, "train.routing", names, alone=bool(options.out))  # RUN may be training
    print(draw_routing(course, out))
    if options.conflict:
        conflict(folder, out)
    print(f"\n{out}/: {', '.join(names)}")


def draw_experts(options: Namespace) -> None:
    """Draws the maps of one photo."""
    if options.conflict:
        raise UserError("--image draws no gradients: leave out --conflict")
    photo, folder = read_photo(Path(options.image)), Path(options.run)
    settings, model, state = load_checkpoint(checkpoint.find(folder))
    if not (config := settings.moe_config) or not isinstance(model, MultiTaskViT) or model.routing is None:
        raise UserError(f"{folder} has no experts in its backbone: give a run with --moe N/k/S/r")
    tasks = parse_tasks(options.tasks) if options.tasks else model.tasks
    if lacking := [task for task in tasks if task not in model.tasks]:
        raise UserError(f"{folder} has no task {', '.join(lacking)}: choose --tasks among {', '.join(model.tasks)}")
    layers = parse_layers(options.layers, len(model.routing.layers))
    path = path_of_maps(options)
    image, window = settings.source.protocol.fit_photo(photo)
    maps = ExpertMaps(layers, tasks, gate_maps(model, image, tasks)[layers], config.shared)
    save_expert_maps(path, photo, Place(photo.shape[:2], image.shape[:2], window), maps)
    print(f"{path}: experts {config} of step {state.step}, layers {', '.join(map(str, layers))}")


def parse_layers(text: str | None, count: int) -> list[int]:
    """``"0,5"`` -> [0, 5]; without a text the first, the middle and the last of ``count`` layers."""
    if not text:
        return sorted({0, (count - 1) // 2, count - 1})
    try:
        layers = [int(word) for word in text.split(",")]
    except ValueError:
        layers = [-1]
    if len(set(layers)) < len(layers) or not all(0 <= layer < count for layer in layers):
        raise UserError(f"--layers {text}: give different numbers of 0 to {count - 1}, such as 0,{count - 1}")
    return layers


def path_of_maps(options: Namespace) -> Path:
    """The file that --to names, which must be new, or the one in the folder that this command claims."""
    if not options.to:
        folder = options.out or options.run
        return claim(folder, "train.routing", [EXPERTS], alone=bool(options.out)) / EXPERTS
    to = Path(options.to)
    if options.out:
        raise UserError(f"--to {to} names the file: leave out --out")
    if to.suffix.lower() not in (".png", ".pdf"):
        raise UserError(f"--to {to} must end in .png or .pdf")
    require_new(to, "--to")
    make_folder(to.parent)
    return to


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
