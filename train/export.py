"""``python -m train.export RUN --to FOLDER``: a folder to publish, with weights, settings and a model card."""

import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

from kernels import UserError
from model import is_repository
from train.cli import Parser, guarded
from train.config.settings import Settings
from train.evaluation.results import Results, read_results
from train.files.atomic import replacing_folder, write_text
from train.files.folders import require_outside_data
from train.output.card import write_card
from train.run import checkpoint
from train.run.build import load_checkpoint

DESCRIPTION = """\
Write the newest checkpoint of RUN to a folder that can be uploaded to the Hugging Face Hub as it is.

FOLDER receives model.safetensors, config.json (settings, without folders of this machine), SHA256SUMS and README.md, a
card with protocol, image set, scores, outputs, command and versions. train.predict and train.evaluate read FOLDER as
they read a run. The scores are those of RUN/results.json or, with --results, those of train.evaluate, which alone stand
beside published tables."""


def build_parser() -> Parser:
    parser = Parser("train.export", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("--to", metavar="FOLDER", required=True, help="a folder that does not exist yet")
    parser.add_argument("--results", metavar="DIR", help="results of train.evaluate on the same checkpoint")
    return parser


def public_settings(settings: Settings) -> Settings:
    """``settings`` without the folders of this machine: the last part of paths, nothing of outputs and caches."""
    data, recipe, weights = (Path(path).name for path in (settings.data, settings.recipe, settings.pretrained))
    pretrained = settings.pretrained if is_repository(settings.pretrained) else weights
    return replace(settings, data=data, recipe=recipe, pretrained=pretrained, cache="", out="")


def results_of(options: Namespace, step: int) -> Results:
    """Scores of the checkpoint of ``step``, with the command that trained it as ``training_command``."""
    training = read_results(options.run)
    results = read_results(options.results) if options.results else training
    scored = results.get("step", results.get("steps"))
    if scored != step:
        raise UserError(
            f"{options.results or options.run} has scores of step {scored}, and {options.run} is at step {step}: score "
            "it with python -m train.evaluate, and give that folder as --results"
        )
    return results | {"training_command": training.get("command", "unknown"), "versions": training["versions"]}


def run(options: Namespace) -> None:
    """Writes the folder."""
    to = Path(options.to)
    require_outside_data(to)
    if to.exists():
        raise UserError(f"{to} exists already and is not overwritten: choose another --to")
    folder = checkpoint.find(Path(options.run))
    settings, model, state = load_checkpoint(folder)
    settings = public_settings(settings)
    results = results_of(options, state.step)
    card = write_card(settings, results, state.step, model.patch)
    with replacing_folder(to) as partial:
        checkpoint.publish(folder, replace(state, settings=asdict(settings), written=[]), partial)
        write_text(partial / "README.md", card)
    print(f"{to}/: model.safetensors, config.json, SHA256SUMS, README.md of step {state.step} of {options.run}")


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
