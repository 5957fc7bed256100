"""Which implementation runs: ``auto``, ``triton`` or ``reference``, the same switch everywhere."""

import torch

from kernels.errors import UserError

KERNELS = ("auto", "triton", "reference")


def resolve(kernel: str, device: torch.device) -> str:
    """The implementation ``kernel`` stands for on ``device``. Never falls back in silence: what was asked for
    by name either runs or ends in a :class:`UserError`."""
    if kernel not in KERNELS:
        raise UserError(f"unknown kernel {kernel!r}: choose among {', '.join(KERNELS)}")
    if kernel == "triton":
        raise UserError("--kernel=triton: this version has no Triton kernels yet; use --kernel=reference")
    return "reference"
