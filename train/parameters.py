"""``python -m train.parameters RUN``: parameters by part, FLOPs and latency; without RUN, of the flags of a run."""

import sys
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from kernels import UserError
from train.cli import build_parser, flags_of, guarded
from train.config.settings import resolve_settings
from train.evaluation.cost import PASSES, WARM_UP, count_flops, measure_latency, name_of
from train.output.tables import format_table
from train.run import checkpoint
from train.run.build import build_model, kernel_of, load_checkpoint, load_on_cpu

DESCRIPTION = """\
Count the parameters of a model by part: that of RUN, a trained run, or that of the flags of python -m train; nothing is
trained. Of RUN it also prints what one image costs: the FLOPs of its products, and its latency on this device."""


def parts(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """(name, parameters) of each part: the model's children, and those of a decoder."""
    for name, child in model.named_children():
        if name == "decoder":
            own = [(f"decoder.{key}", p) for key, p in child.named_parameters()]
            for part in dict.fromkeys(".".join(key.split(".")[:2]) for key, _ in own):
                yield part, [p for key, p in own if key == part or key.startswith(f"{part}.")]
        else:
            yield name, list(child.parameters())
    if direct := list(model.parameters(recurse=False)):
        yield "task embeddings", direct


def table(model: nn.Module) -> str:
    """One row per part and their sum, in whole numbers."""
    counts = [(name, sum(p.numel() for p in own), _trainable(own)) for name, own in parts(model)]
    counts.append(("all", sum(p.numel() for p in model.parameters()), _trainable(list(model.parameters()))))
    return format_table([["part", "parameters", "trainable"], *([name, f"{n:,}", f"{t:,}"] for name, n, t in counts)])


def _trainable(parameters: list[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters if p.requires_grad)


def cost(folder: Path) -> str:
    """The table of a checkpoint's parameters, and two lines: FLOPs and latency of one image."""
    settings, plain, _ = load_on_cpu(folder, kernel="reference")
    height, width = settings.image_shape
    giga = count_flops(plain, settings.image_shape) / 1e9
    _, model, _ = load_checkpoint(folder)
    kernel = kernel_of(settings, model.device)
    dense, used = (", all experts included", f", kernel {kernel}") if kernel else ("", "")
    lines = [
        table(plain) + "\n",
        f"FLOPs     {giga:,.3f} G for one image of {width} x {height}",
        f"          counted: products of linear layers, attention and convolutions{dense}; a multiply-add is two",
        f"latency   {measure_latency(model, settings.image_shape):,.2f} ms for one image",
        f"          median of {PASSES} passes after {WARM_UP} to warm up, {name_of(model.device)}, fp32{used}",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Count; returns the exit status."""
    parser = build_parser("train.parameters", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", nargs="?", help="a run, or a checkpoint of one, instead of flags")
    options = vars(parser.parse_args(argv))
    silent, given = options.pop("quiet", False), options.pop("run", None)

    def run() -> None:
        if given and options:
            raise UserError(f"--{next(iter(options)).replace('_', '-')} is a flag of a new model: give it or {given}")
        if given:
            print(cost(checkpoint.find(Path(given))))
            return
        settings = resolve_settings(flags_of(options)[0])
        print(table(build_model(settings, settings.source.classes, counted=True)))

    return guarded(run, silent)


if __name__ == "__main__":
    sys.exit(main())
