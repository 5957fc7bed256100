"""``python -m train.parameters``, with the flags of ``python -m train``: counts parameters by part, trains nothing."""

import sys
from collections.abc import Iterator

from torch import nn

from train.cli import guarded, parse
from train.config.settings import resolve_settings
from train.files.progress import quiet
from train.output.tables import format_table
from train.run.build import build_model

DESCRIPTION = """\
Count the parameters of a run by part. It takes the flags of python -m train, and trains nothing."""


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


def main(argv: list[str] | None = None) -> int:
    """Count; returns the exit status."""

    def run() -> None:
        flags, _ = parse(argv, "train.parameters", DESCRIPTION)
        with quiet(flags.pop("quiet", False)):
            settings = resolve_settings(flags)
            print(table(build_model(settings, settings.source.classes, counted=True)))

    return guarded(run)


if __name__ == "__main__":
    sys.exit(main())
