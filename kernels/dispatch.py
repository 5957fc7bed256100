"""The operation's entry points, and the switch between the Triton kernels and the PyTorch reference."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

from kernels import nvtx, reference
from kernels.errors import UserError
from kernels.experts import reference as experts_reference
from kernels.experts.reference import ACTIVATIONS, Experts
from kernels.gating import Gating, fits_one_tile
from kernels.reference import Linear
from kernels.segments import TaskSegments

KERNELS = ("auto", "triton", "reference")
Expected = dict[str, tuple[Tensor | None, tuple[int, ...]]]  # tensors by name, with the shapes they must have


def resolve_kernel(kernel: str, device: torch.device) -> str:
    """``"triton"`` or ``"reference"``: what ``kernel`` (one of KERNELS) means on ``device``.

    ``auto`` is triton on a GPU that can run it, else the reference. An implementation asked for by name either runs or
    ends in a :class:`UserError`; there is no silent fallback.
    """
    if kernel not in KERNELS:
        raise UserError(f"unknown kernel {kernel!r}: choose among {', '.join(KERNELS)}")
    obstacle = "reference" if kernel == "reference" else _obstacle(device)
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


def choose_family(kernel: str, device: torch.device, experts: int, rank: int) -> str:
    """What computes a pool: the ``"reference"``, the kernels of ``"one tile"`` or those of a ``"large pool"``."""
    if resolve_kernel(kernel, device) == "reference":
        return "reference"
    return "one tile" if fits_one_tile(experts, rank) else "large pool"


known_family = cache(choose_family)  # of eager passes; a graph that depends on what is cached would be compiled twice


def lora_moe(
    x: Tensor,
    base: Tensor | tuple[Linear, ...],
    lora: tuple[Tensor, Tensor],
    routers: Tensor,
    segments: TaskSegments,
    gating: Gating,
    kernel: str = "auto",
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D) = base + sum_e g_e B_e A_e x, the gates g (T, N) and P (tasks, C); see :mod:`kernels.reference`.

    x (T, d) and base (T, D) share a floating type, ``lora`` is (A (R, d), B (D, R)), ``routers`` (tasks, C, d); the
    parameters may be fp32 masters. ``base`` may instead be the frozen layer whose output it is, with which the kernels
    fuse the experts: ((W, b),) of a linear layer, or ((W1, b1), (W2, b2)) of an FFN with GELU. Its weights are cast to
    x's type, or all to that of autocast. The gates are for statistics.

    ValueError if shapes do not fit each other, UserError if ``kernel="triton"`` cannot run. A pool that exceeds one
    register tile (:func:`kernels.gating.fits_one_tile`) runs as a mixture of experts without activation and biases.
    With ``deterministic``, algorithm and tiles depend on the pool, the widths and the device alone, so that in our
    kernels a token's bits do not depend on the other tokens of the batch. cuBLAS may still choose its kernel by the
    number of tokens.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):  # which would compute the fp32 logits in half precision
        tokens = x if isinstance(base, Tensor) else x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return lora_moe(tokens, base, lora, routers, segments, gating, kernel, deterministic)
    check(x, base, lora, routers, segments, gating)
    experts = routers.shape[1] + gating.unrouted
    choose = choose_family if torch.compiler.is_compiling() else known_family
    family = choose(kernel, x.device, experts, len(lora[0]) // experts)
    if family == "one tile":
        from kernels import custom_ops  # imports Triton, which not every machine has

        return custom_ops.lora_moe(x, base, lora, routers, segments, gating, deterministic)
    if family == "reference":
        y, g, p = reference.lora_moe(x, base, lora, routers, segments, gating)
        return y, g.detach(), p
    from kernels.experts import custom_ops as experts_ops

    if not isinstance(base, Tensor):
        with nvtx.span("ffn"):
            base = reference.frozen(x, base)
    z = reference.router_logits(x, routers, segments)
    return experts_ops.expert_mixture(x, base, Experts(lora[0][None], lora[1][None]), z, segments, gating)


def expert_mixture(
    x: Tensor,
    base: Tensor | None,
    experts: Experts,
    z: Tensor,
    segments: TaskSegments,
    gating: Gating,
    kernel: str = "auto",
    algorithm: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, g, P) of :func:`kernels.experts.reference.expert_mixture`; differentiable in x, base, z and the weights.

    x (T, d) and ``base`` (T, D) or None share a floating type, the weights may be fp32 masters, z (T, C) is fp32. With
    z (G, T, C) there are G gates per token, and base, y, g and P have G as their first dimension too. The gates g are
    for statistics and have no gradient. Sets of weights per task need segments with counts.

    ``algorithm`` is that of the Triton kernels, ``dense`` or ``grouped`` (:mod:`kernels.experts.custom_ops`); by
    default it is chosen by pool and widths. Errors as in :func:`lora_moe`.
    """
    check_experts(x, base, experts, z, segments, gating)
    choose, number = choose_family if torch.compiler.is_compiling() else known_family, z.shape[-1] + gating.unrouted
    if choose(kernel, x.device, number, experts.down.shape[1] // number) == "reference":
        y, g, p = experts_reference.expert_mixture(x, base, experts, z, segments, gating)
        return y, g.detach(), p
    from kernels.experts import custom_ops as experts_ops  # imports Triton

    return experts_ops.expert_mixture(x, base, experts, z, segments, gating, algorithm)


def check(
    x: Tensor,
    base: Tensor | tuple[Linear, ...],
    lora: tuple[Tensor, Tensor],
    routers: Tensor,
    segments: TaskSegments,
    gating: Gating,
) -> None:
    """ValueError unless the arguments of :func:`lora_moe` fit each other; the device is not asked."""
    if x.ndim != 2 or routers.ndim != 3:
        shapes = f"x has shape {tuple(x.shape)}, routers {tuple(routers.shape)}"
        raise ValueError(f"{shapes}: they are (tokens, width) and (tasks, logits, width)")
    (a, b), (tokens, d), columns = lora, x.shape, routers.shape[1]
    expected: Expected = {
        "x": (x, (tokens, d)),
        "A": (a, (a.shape[0], d)),
        "B": (b, (b.shape[0], a.shape[0])),
        "routers": (routers, (segments.tasks, columns, d)),
    }
    if isinstance(base, Tensor):
        expected["base"] = base, (tokens, b.shape[0])
    else:
        inner = d
        for number, (weight, bias) in enumerate(base, start=1):
            outer = b.shape[0] if number == len(base) else weight.shape[0]
            expected |= {f"W{number}": (weight, (outer, inner)), f"b{number}": (bias, (outer,))}
            inner = outer
    _check(x, expected, "routers", columns + gating.unrouted, segments, gating)


def check_experts(
    x: Tensor, base: Tensor | None, experts: Experts, z: Tensor, segments: TaskSegments, gating: Gating
) -> None:
    """The same for :func:`expert_mixture`."""
    (tokens, d), (*readers, _, columns), (sets, ranks, _) = x.shape, z.shape, experts.down.shape
    number, width = columns + gating.unrouted, experts.up.shape[1]
    sets = sets if sets == 1 else segments.tasks
    expected: Expected = {
        "x": (x, (tokens, d)),
        "A": (experts.down, (sets, ranks, d)),
        "B": (experts.up, (sets, width, ranks)),
        "b": (experts.hidden_bias, (sets, ranks)),
        "c": (experts.output_bias, (sets, number, width)),
        "z": (z, (*readers, tokens, columns)),
        "base": (base, (*readers, tokens, width)),
    }
    _check(x, expected, "z", number, segments, gating)
    if experts.activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {experts.activation!r}: choose among {', '.join(ACTIVATIONS)}")
    if sets > 1 and segments.counts is None:
        raise ValueError(f"A has a set for each of {sets} tasks, but the segments have no counts")


def _check(x: Tensor, expected: Expected, logits: str, experts: int, segments: TaskSegments, gating: Gating) -> None:
    """Compare shapes, and N = ``experts`` with A, k and the tensor called ``logits``; the device is not asked."""
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, beside x of shape {tuple(x.shape)} it is {shape}"
            )
    shapes = {name: tuple(tensor.shape) for name, (tensor, _) in expected.items() if tensor is not None}
    if not 0 < gating.k <= experts - gating.shared:
        sparse = experts - gating.shared
        raise ValueError(f"k = {gating.k}, but {logits} of shape {shapes[logits]} have {sparse} sparse experts")
    if shapes["A"][-2] % experts:
        raise ValueError(f"A of shape {shapes['A']} has no equally many rows for each of {experts} experts")
    exporting = torch.compiler.is_exporting()  # counts are symbols, of which a program cannot hold a sum
    if segments.counts is not None and not exporting and sum(segments.counts) != len(x):
        raise ValueError(f"segments of {segments.counts} rows for x of shape {shapes['x']}: they must add up")
