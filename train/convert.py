"""``python -m train.convert SOURCE --to FILE.safetensors``: a backbone by timm's names."""

import sys
from argparse import Namespace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kernels import UserError
from model import convert_source, read_source, read_weights, timm_layout
from train.cli import Parser, guarded
from train.files.atomic import make_folder, replacing
from train.files.folders import require_new
from train.run import checkpoint
from train.run.backbone import is_run, settings_of, weights_of_run

DESCRIPTION = """\
Write the ViT in SOURCE by timm's names, to a file that timm and --pretrained read.

SOURCE is the folder of a run, or weights in any form that --pretrained reads: a file, or owner/name on the Hugging Face
Hub. Of a run the backbone is written, whether it was trained or frozen. Experts, LoRA, task embeddings and heads are
left out: gates depend on the token, so that experts cannot be merged. Values stay as they are, but for two: the
embedding of the only task that a backbone was trained on is added to its positions, and the position of a class token
in front of registers to that token, as in timm's files."""


def build_parser() -> Parser:
    parser = Parser("train.convert", DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", help="a run's folder, a weights file, or owner/name on the Hub")
    parser.add_argument("--to", metavar="FILE.safetensors", required=True, help="what does not exist yet")
    return parser


def of_run(run: Path) -> tuple[dict[str, Tensor], str, str]:
    """(tensors as timm stores them, the normalisation of the input, what was left out)."""
    folder = checkpoint.find(run)
    settings, weights = settings_of(folder), weights_of_run(folder)
    left = ["heads"]
    left += ["task embeddings"] if len(settings.task_names) > 1 or settings.frozen_backbone else []
    left += [f"experts {settings.moe_config}"] if settings.moe_config else []
    left += [f"LoRA of rank {settings.lora_rank}"] if settings.lora_rank else []
    return timm_layout(weights.tensors, "rope.periods" in weights.tensors), weights.normalisation, ", ".join(left)


def of_weights(given: str) -> tuple[dict[str, Tensor], str, str]:
    """The same of a weights file or of a repository on the Hub."""
    source = read_source(given)
    tensors, left = convert_source(source)
    return tensors, source.normalisation, ", ".join(left) or "nothing"


def run(options: Namespace) -> None:
    """Writes the file and says what it holds."""
    to = Path(options.to)
    if to.suffix != ".safetensors":
        raise UserError(f"--to {to} must end in .safetensors")
    require_new(to, "--to")
    given = options.source
    tensors, normalisation, left = of_run(Path(given)) if is_run(given) else of_weights(given)
    make_folder(to.parent)
    with replacing(to) as partial, checkpoint.failed_writes():
        save_file(tensors, partial, {"format": "pt"})
    print(f"{to}: {len(tensors)} tensors by timm's names; left out: {left}")
    if read_weights(to).normalisation != normalisation:
        print(f"train on it with --set normalisation={normalisation}, which the names do not tell")


def main(argv: list[str] | None = None) -> int:
    """Convert; returns the exit status."""
    options = build_parser().parse_args(argv)
    return guarded(lambda: run(options), options.quiet)


if __name__ == "__main__":
    sys.exit(main())
