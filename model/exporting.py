"""torch.export of the multi-task ViT: one graph of PyTorch's own operators, which runs without this package."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from kernels import UserError
from model.multitask import MultiTaskViT

CONFIG = "config.json"  # the file inside a .pt2 file that says what was exported


def export_program(model: MultiTaskViT, shape: tuple[int, int]) -> ExportedProgram:
    """The program images (B, 3, H, W), float32 RGB in 0..255 -> {task: (B, channels, H, W)} for (H, W) = ``shape`` and
    any B > 0.

    ``model`` is on the CPU and runs the reference kernels. Every task sees all images. ``model`` itself is unchanged.
    """
    # LoRA on a frozen layer is an operator of this package; on a trained one it is two products of PyTorch.
    model = copy.deepcopy(model).eval().requires_grad_(True)
    images = torch.zeros(2, 3, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the copy keeps what its routers chose
        return torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch", min=1)},), strict=True)


@dataclass(frozen=True)
class ExportedModel:
    """A program of :func:`export_program`, called like the model that it was made of."""

    program: Callable[[Tensor], dict[str, Tensor]]
    tasks: tuple[str, ...]
    device: torch.device = torch.device("cpu")

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        return self.program(images.float())


def save_program(program: ExportedProgram, path: Path, config: str) -> None:
    """Write a .pt2 file with the text ``config`` in it."""
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={CONFIG: config})


def load_program(path: Path) -> tuple[Callable[[Tensor], dict[str, Tensor]], str]:
    """(the program, ``config``) of a .pt2 file. Such a file can run any code: load only what you trust.

    :class:`UserError`: there is no such file, or it is not one of :func:`save_program`.
    """
    if not path.is_file():
        raise UserError(f"no such exported model: {path}")
    extra = {CONFIG: ""}
    try:
        with path.open("rb") as file:
            program = torch.export.load(file, extra_files=extra)
    except Exception as error:  # torch raises anything on arbitrary bytes
        raise UserError(
            f"{path} is not a readable .pt2 file ({type(error).__name__}): write it again with python -m train.export"
        ) from None
    if not extra[CONFIG]:
        raise UserError(f"{path} holds no {CONFIG}: it was not written by python -m train.export")
    return program.module(), extra[CONFIG]
