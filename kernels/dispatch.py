"""The operation's entry points, and the switch between the Triton kernels and the PyTorch reference."""

import importlib.util
import os

import torch
from torch import Tensor

from kernels import reference
from kernels.errors import UserError
from kernels.gating import Gating
from kernels.packed import Packed
from kernels.pool import fits_one_tile
from kernels.segments import TaskSegments

KERNELS = ("auto", "triton", "reference")


def resolve_kernel(kernel: str, device: torch.device) -> str:
    """``"triton"`` or ``"reference"``: what ``kernel`` (one of KERNELS) means on ``device``.

    ``auto`` is triton on a GPU that can run it, else the reference. An implementation asked for by name either runs or
    ends in a :class:`UserError`; there is no silent fallback.
    """
    if (kernel, device) not in RESOLVED:  # a dict: torch.compile traces through functools.cache, but not into a dict
        RESOLVED[kernel, device] = _resolve_uncached(kernel, device)
    return RESOLVED[kernel, device]


RESOLVED: dict[tuple[str, torch.device], str] = {}


def _resolve_uncached(kernel: str, device: torch.device) -> str:
    if kernel not in KERNELS:
        raise UserError(f"unknown kernel {kernel!r}: choose among {', '.join(KERNELS)}")
    if kernel == "reference":
        return kernel
    obstacle = _obstacle(device)
    if kernel == "triton" and obstacle:
        raise UserError(f"--kernel=triton: {obstacle}")
    return "reference" if obstacle or device.type == "cpu" and kernel == "auto" else "triton"


def _obstacle(device: torch.device) -> str:
    """Why Triton cannot run on ``device``; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (its wheels are for Linux); use --kernel=reference"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return "" if (major, minor) >= (8, 0) else f"the GPU has capability {major}.{minor}, Triton needs 8.0"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"no GPU in use (device {device.type}); set TRITON_INTERPRET=1 to interpret, or use --kernel=reference"
    return ""


def lora_moe(
    x: Tensor,
    base: Tensor,
    lora: tuple[Tensor, Tensor],
    routers: Tensor,
    segments: TaskSegments,
    gating: Gating,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D) = base + sum_e g_e B_e A_e x, the gates g (T, N) and P (tasks, C); see :mod:`kernels.reference`.

    x (T, d) and base (T, D) share a floating type, ``lora`` is (A (R, d), B (D, R)), ``routers`` (tasks, C, d); the
    parameters may be fp32 masters. UserError if ``kernel="triton"`` cannot run. A pool that exceeds one register tile
    (:func:`kernels.pool.fits_one_tile`) runs as a mixture of experts without activation and biases.
    """
    if resolve_kernel(kernel, x.device) == "reference":
        return reference.lora_moe(x, base, lora, routers, segments, gating)
    from kernels import custom_ops  # imports Triton, which not every machine has

    experts = gating.experts(routers.shape[1])
    if fits_one_tile(experts, len(lora[0]) // experts):
        return custom_ops.lora_moe(x, base, lora, routers, segments, gating)
    from kernels.experts import Experts, ops  # its entry point imports this file

    z = reference.router_logits(x, routers, segments)
    down, up = (weight.unsqueeze(0) for weight in lora)
    return ops.expert_mixture(x, base, Experts(down, up), z, segments, gating)


def lora_moe_packed(
    x: Tensor,
    packed: Packed,
    lora: tuple[Tensor, Tensor],
    routers: Tensor,
    segments: TaskSegments,
    gating: Gating,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operation fused with the frozen FFN or linear layer in ``packed``, by the Triton kernels: y, g and P of
    :func:`kernels.ffn.ffn_reference` or :func:`kernels.linear.linear_reference`.

    ``packed`` holds the newest values of ``lora`` and ``routers``, in x's type. With ``deterministic``, algorithm and
    tiles depend on the pool, the widths and the device alone, so that in our kernels a token's bits do not depend on
    the other tokens of the batch. cuBLAS may still choose its kernel by the number of tokens.
    """
    from kernels import custom_ops

    return custom_ops.lora_moe_packed(x, packed, lora, routers, segments, gating, deterministic=deterministic)
