"""The command line of ``python -m train``."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from kernels import GATINGS, KERNELS, UserError
from model import HEADS, VITS
from train.config.settings import CHOICES, DECODERS, PRECISIONS, SITES, Settings, list_recipes, own_values
from train.files.folders import holding
from train.files.printing import printable, printing
from train.files.processes import killed_workers
from train.files.progress import quiet
from train.files.scripts import import_script
from train.output.scores import DELTA
from train.output.tables import format_table
from train.output.versions import versions
from train.protocols import PROTOCOLS
from train.run.optimizers import OPTIMIZERS, TIMM
from train.run.stopping import TerminatedError
from train.run.weighting import WEIGHTINGS
from train.tasks import DEFAULT_TASKS, TASKS

DESCRIPTION = """\
Train a multi-task ViT with a LoRA mixture-of-experts and show what it learned.

Without --data it trains on rendered scenes (recipe 'scenes', minutes on two CPU cores); with --data on a PASCAL_MT
tree. OUT receives results.json, last (the newest checkpoint), metrics.jsonl (losses and scores), curves.png,
predictions.png and routing.png."""


HEAD = re.compile(r'"""``python -m (train\.\w+).*``: (.*)"""')  # of a command's file: its name, what it does
TYPO = 0.7  # how similar a mistyped name is, by difflib


class Parser(argparse.ArgumentParser):
    """Of ``python -m PROG``: flags are written out, the description keeps its lines.

    ``defaults`` are those that ``--help`` shows of flags that have none in the parser, and ``settings`` the names that
    ``--set`` takes.
    """

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=f"python -m {prog}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        self.defaults: dict[str, Any] = {}
        self.settings: Sequence[str] = ()
        self._given: Sequence[str] = ()
        self.add_argument("--quiet", action="store_true", help="print errors only")
        self.add_argument("--import", action=Imported, metavar="FILE", help="a script that registers heads or tasks")
        self.add_argument("--version", action=ShowVersions, nargs=0, help="print the versions that results depend on")

    def format_help(self) -> str:
        """As the base class. The help of a flag with a value ends with its default, in brackets."""
        for action in self._actions:
            valued = action.option_strings and action.nargs != 0 and not action.required
            if valued and not (text := action.help or "").endswith(")"):
                default = self.defaults.get(action.dest, action.default)
                action.help = f"{text} ({'none' if default in (None, '', argparse.SUPPRESS) else default})".strip()
        return super().format_help()

    def print_help(self, file: Any = None) -> None:
        """As the base class, into a pipe that its reader may close."""
        with printing():
            super().print_help(file)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the base class. What --import names is imported first, since other flags may take names from there."""
        self._given = sys.argv[1:] if args is None else args
        scripts = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        scripts.add_argument("--import", action="append", nargs="?", dest="files", default=[])
        try:
            for file in filter(None, scripts.parse_known_args(self._given)[0].files):
                import_script(Path(file))
        except UserError as error:
            self.exit(2, f"error: {printable(str(error))}\n")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exits with one line instead of the whole usage."""
        self.exit(2, f"error: {message}{self._suggestion()} ({self.prog} --help explains)\n")

    def _suggestion(self) -> str:
        """What a flag that the parser does not know was meant to be."""
        known = {name.replace("_", "-"): f"--set {name}=..." for name in self.settings}
        known |= {flag.lstrip("-"): flag for action in self._actions for flag in action.option_strings}
        given = [text.partition("=")[0] for text in self._given if text.startswith("-")]
        wrong = next((flag for flag in given if flag not in self._option_string_actions), "")
        close = difflib.get_close_matches(wrong.lstrip("-").replace("_", "-"), known, n=1, cutoff=TYPO)
        return f"; did you mean {known[close[0]]}?" if close else ""


class Imported(argparse.Action):
    """--import, which :meth:`Parser.parse_args` has done before: no setting of the run."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"default": argparse.SUPPRESS})

    def __call__(self, *_: Any) -> None:
        pass


class ShowVersions(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        found = versions()
        with printing():
            print(", ".join(f"{name} {found[name]}" for name in sorted(found, key=lambda name: name != "fastmoe_lora")))
        parser.exit()


class ListRecipes(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        with printing():
            print(format_table([["recipe", "what it is for"], *list_recipes()], text_columns=2))
        parser.exit()


def add_cache(parser: argparse._ActionsContainer, default: str = "") -> None:
    """Adds --cache, which every command that reads labels has."""
    parser.add_argument(
        "--cache", metavar="DIR", default=default, help="folder for labels that take long to derive, outside the data"
    )


def add_tta(parser: argparse._ActionsContainer) -> None:
    """Adds --tta, which the commands that predict have."""
    what = "average over mirrored (flip) and resized copies of each image, beside the image itself"
    parser.add_argument("--tta", metavar="flip,0.75,..", default="", help=what)


def add_val_images(parser: argparse._ActionsContainer, default: str = "") -> None:
    """Adds --val-images, which every command that lists the images of a tree has."""
    parser.add_argument(
        "--val-images",
        metavar="SHARE[:SEED]|FILE",
        default=default,
        help="read no lists: of all photos, this share, or those whose ids FILE lists, are val and the others train",
    )


def new_folder(name: str) -> str:
    """The help of an --out whose default is a folder that did not exist."""
    return f"({name}, or the first of {name}-2, ... that does not exist)"


def build_parser(prog: str = "train", description: str = DESCRIPTION) -> Parser:
    """The parser of a command that takes the settings of a run."""
    parser = Parser(prog, description, argument_default=argparse.SUPPRESS)
    _add_data(parser.add_argument_group("tasks and data"))
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    settings, scenes = asdict(Settings()), own_values("scenes")
    parser.settings = [*settings]
    for name, value in settings.items():
        other = f"; scenes: {scenes[name]}" if scenes.get(name, value) != value else ""
        parser.defaults[name] = f"{value}{other}" if value != "" else ""
    parser.epilog = _epilog({action.dest for action in parser._actions})
    if prog == "train":
        parser.epilog += f"\n\ncommands, each with --help:\n{list_commands()}"
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tasks", metavar="A,B", help=f"any of {', '.join(TASKS)} ({','.join(DEFAULT_TASKS)})")
    group.add_argument(
        "--data", metavar="DIR", help="a tree of PASCAL-Context, NYUD-v2 or Cityscapes (rendered scenes)"
    )
    add_val_images(group, argparse.SUPPRESS)
    group.add_argument("--partial-labels", action="store_true", help="a missing label file means void for that task")
    add_cache(group, argparse.SUPPRESS)
    group.add_argument("--skip-bad", action="store_true", help="skip images with a damaged or missing file")
    group.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="selects the preprocessing; compare published numbers only within one protocol (the data's usual one)",
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="height of the input in pixels; its width follows (the protocol's; scenes: 64)",
    )
    group.add_argument("--workers", type=int, metavar="N", help="processes that prepare batches")


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", metavar="NAME", help=f"{', '.join(VITS)}, or timm:NAME, any backbone of timm")
    group.add_argument(
        "--pretrained",
        metavar="FILE|NAME|RUN",
        help="weights of the backbone: a file (.safetensors, .npz, .pth; timm, AugReg, DeiT, DINO, Hugging Face), or "
        "owner/name of a repository on the Hugging Face Hub or a folder with its files, or a finished run, whose "
        "backbone is taken; with them the "
        "backbone is frozen, without them it is trained in full",
    )
    group.add_argument("--head", choices=HEADS, help="up: the paper's; light: for CPUs; pyramid: of four maps")
    group.add_argument(
        "--decoder",
        choices=DECODERS,
        help="train a decoder on the frozen features of --pretrained, instead of experts in the backbone: fgmoe (a "
        "reconstruction), mlore, or plain, which is fgmoe without gates",
    )
    group.add_argument(
        "--fg", metavar="N/K/m/K_s", help="fgmoe: experts / active / slices of an expert / shared slices"
    )
    group.add_argument("--moe", metavar="N/k/S/r", help="experts / active sparse / shared / rank, or none")
    group.add_argument("--gating", choices=GATINGS, help="gating of the experts (ase where S > 0, topk where S = 0)")
    group.add_argument("--site", choices=SITES, help="which layers get experts")
    group.add_argument("--kernel", choices=KERNELS, help="implementation of the experts")
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="choose kernels by pool and width alone: a token's bits in our kernels do not depend on its batch",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help="settings from a yaml file, or a recipe of --list-recipes; flags override it (without --data: scenes)",
    )
    group.add_argument("--list-recipes", action=ListRecipes, nargs=0, help="print the recipes and what they are for")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    length.add_argument("--steps", type=int, metavar="N", help="optimiser steps, instead of epochs")
    group.add_argument("--batch-size", type=int, metavar="N", help="images per step, of all processes")
    group.add_argument(
        "--accumulate", type=int, metavar="N", help="parts in which the batch goes through the model, to save memory"
    )
    group.add_argument(
        "--optimizer",
        metavar="NAME",
        help=f"{', '.join(OPTIMIZERS)}, or {TIMM}NAME of the package timm; each has its own scale of --lr",
    )
    group.add_argument("--lr", type=float, metavar="X", help="peak learning rate")
    group.add_argument("--loss-weights", metavar="T=X,..", help="loss weight per task")
    group.add_argument(
        "--weighting",
        metavar="NAME",
        help=f"how the tasks' losses, or gradients, become one update: {', '.join(WEIGHTINGS)}",
    )
    group.add_argument(
        "--eval-every", type=int, metavar="E", help="evaluate and checkpoint every E epochs; 0: only at the end"
    )
    group.add_argument(
        "--checkpoint-every", type=int, metavar="N", help="checkpoint every N steps too; 0: only as --eval-every says"
    )
    group.add_argument("--keep", type=int, metavar="N", help="checkpoints that are kept, the newest")
    group.add_argument(
        "--keep-best",
        nargs="?",
        const=DELTA,
        metavar="METRIC",
        help="also keep the checkpoint that scored best, as OUT/best: by TASK/KEY, such as seg/mIoU, or without METRIC "
        "by Delta_m against the first scores",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile backbone and heads for training steps (a minute at the start)"
    )
    group.add_argument(
        "--cuda-graphs", action="store_true", help="launch a whole training step at once; never run on a GPU yet"
    )
    group.add_argument("--precision", choices=PRECISIONS, help="type of the products; parameters stay fp32")
    group.add_argument(
        "--on-nonfinite", choices=("stop", "skip"), help="what a loss that is NaN or infinite does to the run"
    )
    group.add_argument("--seed", type=int, metavar="N", help="of weights, batches, augmentation and rendered scenes")
    group.add_argument("--device", choices=("cpu", "cuda"), help="(cuda where it is available)")
    group.add_argument("--tracker", choices=CHOICES["tracker"], help="where curves go beside metrics.jsonl")
    group.add_argument("--nvtx", action="store_true", help="mark the parts of a step with NVTX ranges for a profiler")
    group.add_argument("--out", metavar="DIR", help="folder of the run (runs/NAME)")
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="continue from a checkpoint folder; without FILE from OUT/last, or from step 0 where there is none "
        "(a new run)",
    )
    group.add_argument("--set", action="append", metavar="key=value", help="any setting by name, see below")


def list_commands() -> str:
    """One line per command at the top of train/: what its file says of it first."""
    heads = (path.read_text(encoding="utf-8").partition("\n")[0] for path in sorted(Path(__file__).parent.glob("*.py")))
    return "\n".join(f"  {found[1]:<18} {found[2]}" for head in heads if (found := HEAD.fullmatch(head)))


def _epilog(flags: set[str]) -> str:
    rest = [f"  {name}={value}" for name, value in asdict(Settings()).items() if name not in flags]
    return "\n".join(["settings without a flag, for --set:", *rest])


def parse(
    argv: list[str] | None, prog: str = "train", description: str = DESCRIPTION
) -> tuple[dict[str, Any], str | None]:
    """(values by settings name, checkpoint to resume: a path, "" for OUT/last, None for a fresh run)."""
    return flags_of(vars(build_parser(prog, description).parse_args(argv)))


def flags_of(flags: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The same of parsed arguments."""
    resume = flags.pop("resume", None)
    for assignment in flags.pop("set", []):
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment!r} is not of the form key=value")
        flags[name.strip().replace("-", "_")] = value.strip()
    return flags, resume


def guarded(run: Callable[[], int | None], silent: bool = False) -> int:
    """The exit status of ``run``: 2 and one line on stderr after a UserError, 130 after an interrupt, 143 after a
    SIGTERM, SIGHUP or SIGUSR1 that it heard; SystemExit as :func:`printing` raises it. ``silent`` runs print nothing
    else."""
    try:
        with quiet(silent), printing(), killed_workers(), holding():
            return run() or 0
    except UserError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except TerminatedError:
        return 143


def main(argv: list[str] | None = None) -> int:
    """Train; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    options = build_parser().parse_args(given)
    silent = options.__dict__.pop("quiet", False)

    def run() -> None:
        from train.run.loop import train

        train(*flags_of(vars(options)), given)

    return guarded(run, silent)
