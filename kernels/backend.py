"""Which implementation runs: ``auto``, ``triton`` or ``reference``, the same switch everywhere."""

import importlib.util
import os

import torch

from kernels.errors import UserError

KERNELS = ("auto", "triton", "reference")


def resolve(kernel: str, device: torch.device) -> str:
    """The implementation ``kernel`` stands for on ``device``: ``auto`` is triton on a GPU that can run it.

    Never falls back in silence: what is asked for by name either runs or ends in a :class:`UserError`.
    """
    if (kernel, device) not in RESOLVED:  # a dict, since torch.compile looks behind functools.cache
        RESOLVED[kernel, device] = _resolve(kernel, device)
    return RESOLVED[kernel, device]


RESOLVED: dict[tuple[str, torch.device], str] = {}


def _resolve(kernel: str, device: torch.device) -> str:
    if kernel not in KERNELS:
        raise UserError(f"unknown kernel {kernel!r}: choose among {', '.join(KERNELS)}")
    if kernel == "reference":
        return kernel
    obstacle = _obstacle(device)
    if kernel == "triton" and obstacle:
        raise UserError(f"--kernel=triton: {obstacle}")
    return "reference" if obstacle or device.type == "cpu" and kernel == "auto" else "triton"


def _obstacle(device: torch.device) -> str:
    """Why Triton cannot run on ``device``, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (its wheels are for Linux); use --kernel=reference"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return "" if (major, minor) >= (8, 0) else f"the GPU has capability {major}.{minor}, Triton needs 8.0"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"no GPU in use (device {device.type}); set TRITON_INTERPRET=1 to interpret, or use --kernel=reference"
    return ""
