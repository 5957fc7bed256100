"""The entry point of the mixture of experts, and the switch between its Triton kernels and its reference."""

from torch import Tensor

from kernels.dispatch import resolve_kernel
from kernels.experts import reference
from kernels.experts.reference import Experts
from kernels.gating import Gating
from kernels.segments import TaskSegments


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

    x (T, d) and ``base`` (T, D) share a floating type, the weights may be fp32 masters, z (T, C) is fp32. With z
    (G, T, C) there are G gates per token, and base, y, g and P have G as their first dimension too. The gates g are for
    statistics and have no gradient.

    ``algorithm`` is that of the Triton kernels, ``dense`` or ``grouped`` (:mod:`kernels.experts.algorithms`); by
    default it is chosen by pool and widths. UserError if ``kernel="triton"`` cannot run.
    """
    if resolve_kernel(kernel, x.device) == "triton":
        from kernels.experts import ops  # imports Triton, which not every machine has

        return ops.expert_mixture(x, base, experts, z, segments, gating, algorithm)
    y, g, p = reference.expert_mixture(x, base, experts, z, segments, gating)
    return y, g.detach(), p
