"""``python -m train.export RUN --to FOLDER|FILE.pt2``: a folder to publish, or one program for PyTorch alone."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels import UserError
from model import MultiTaskViT, export_program, is_repository, load_program, save_program
from train.cli import Parser, guarded
from train.config.settings import Settings
from train.evaluation.results import Results, read_results
from train.files.atomic import make_folder, replacing, replacing_folder, write_text
from train.files.folders import require_new
from train.output.card import without_paths, write_card
from train.protocols import Protocol
from train.run import checkpoint
from train.run.build import load_checkpoint, load_on_cpu

DESCRIPTION = """\
Write the newest checkpoint of RUN to a folder that can be uploaded to the Hugging Face Hub as it is, or, with the
suffix .pt2, to a file of torch.export.

FOLDER receives model.safetensors, config.json (settings, without folders of this machine), SHA256SUMS and README.md, a
card with protocol, image set, scores, outputs, command and versions. train.predict and train.evaluate read FOLDER as
they read a run. The scores are those of RUN/results.json or, with --results, those of train.evaluate, which alone stand
beside published tables.

FILE.pt2 is a program (B, 3, H, W), float RGB in 0..255 -> {task: raw output} for any B. It needs PyTorch alone:
torch.export.load(FILE).module(). It is compared with the model before it gets its name."""

PATHS = ("data", "recipe", "pretrained", "cache")  # settings that may name folders of this machine
RTOL = 1e-4  # of the largest output: the program's products are those of the model in another order


def build_parser() -> Parser:
    parser = Parser("train.export", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--to", metavar="FOLDER|FILE.pt2", required=True, help="what does not exist yet")
    parser.add_argument("--results", metavar="DIR", help="results of train.evaluate on the same checkpoint")
    return parser


def public_settings(settings: Settings) -> Settings:
    """``settings`` without the folders of this machine: the last part of paths, nothing of outputs and caches."""
    data, recipe, weights = map(last_part, (settings.data, settings.recipe, settings.pretrained))
    pretrained = settings.pretrained if is_repository(settings.pretrained) else weights
    val_images = last_part(settings.val_images)
    return replace(settings, data=data, recipe=recipe, pretrained=pretrained, val_images=val_images, cache="", out="")


def public_state(state: checkpoint.State, settings: Settings) -> checkpoint.State:
    """``state`` with the ``settings`` of :func:`public_settings`, and commands without the folders of this machine."""
    commands = [
        entry
        | {"command": without_paths(entry["command"])}
        | {"changed": [text for text in entry["changed"] if text.split()[0] not in PATHS]}
        for entry in state.commands
    ]
    return replace(state, settings=asdict(settings), written=[], commands=commands)


def last_part(path: str) -> str:
    """The name of what ``path`` leads to, also of "." and ".."; "" for "" alone, which means that there is none."""
    return path and (os.path.basename(os.path.abspath(path)) or path)


def results_of(options: Namespace, step: int) -> Results:
    """Scores of the checkpoint of ``step``, with the versions of its training."""
    training = read_results(options.run)
    results = read_results(options.results) if options.results else training
    scored = results.get("step", results.get("steps"))
    if scored != step:
        raise UserError(
            f"{options.results or options.run} has scores of step {scored}, and {options.run} is at step {step}: score "
            "it with python -m train.evaluate, and give that folder as --results"
        )
    return results | {"versions": training["versions"]}


def run(options: Namespace) -> None:
    """Writes the folder or the file."""
    to = Path(options.to)
    require_new(to, "--to")
    folder = checkpoint.find(Path(options.run))
    if to.suffix == ".pt2":
        write_program(folder, to)
    else:
        write_folder(folder, to, options)


def write_folder(folder: Path, to: Path, options: Namespace) -> None:
    settings, model, state = load_checkpoint(folder)
    settings = public_settings(settings)
    state, results = public_state(state, settings), results_of(options, state.step)
    card = write_card(settings, results, state.step, model.patch, state.commands)
    with replacing_folder(to) as partial:
        checkpoint.publish(folder, state, partial)
        write_text(partial / "README.md", card)
    print(f"{to}/: model.safetensors, config.json, SHA256SUMS, README.md of step {state.step} of {options.run}")


def write_program(folder: Path, to: Path) -> None:
    settings, model, state = load_on_cpu(folder, kernel="reference")
    if not isinstance(model, MultiTaskViT):
        raise UserError(f"{folder} holds a decoder, and --to FILE.pt2 takes an adapted ViT: give a folder as --to")
    if settings.of_timm:
        raise UserError(f"{folder} has a backbone of timm, and --to FILE.pt2 takes our ViTs: give a folder as --to")
    program = export_program(model, settings.image_shape)
    state = public_state(state, public_settings(settings))
    make_folder(to.parent)
    with replacing(to) as partial:
        with checkpoint.failed_writes():
            save_program(program, partial, json.dumps(asdict(state), indent=1))
        difference = largest_difference(model, load_program(partial)[0], settings.source.protocol)
    print(f"{to}: step {state.step} of {folder}, outputs within {difference:.1e} of the model's largest")


@torch.inference_mode()
def largest_difference(
    model: MultiTaskViT, program: Callable[[Tensor], dict[str, Tensor]], protocol: Protocol
) -> float:
    """Over all tasks, relative to the largest output, on three photos of noise, prepared as train.predict does.
    RuntimeError above RTOL."""
    photos = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)
    inputs = np.stack([protocol.fit_photo(photo)[0] for photo in photos])
    images = torch.from_numpy(inputs).permute(0, 3, 1, 2).float()
    ours, theirs = model(images), program(images)
    worst = max(float((theirs[task] - y).abs().max() / y.abs().max()) for task, y in ours.items())
    if not worst <= RTOL:
        raise RuntimeError(f"the exported program differs from the model by {worst:.1e}")
    return worst


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
