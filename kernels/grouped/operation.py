"""grouped: y and all gradients of a mixture of experts, computed only for the experts that are selected.

    U = x A_e^T + b_e        H' = act(U) g        y = base + sum over the row's experts of H' B_e^T + g c_e

Forward: sort, shrink, expand, combine. Backward: shrink_backward, weight_grad of B and A, expand_backward, combine.
Nothing waits for the device, and every sum has a fixed order: the same bits in every run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.experts.reference import Experts
from kernels.grouped import expand, shrink, sort, weight_grad
from kernels.grouped.sort import Sorted
from kernels.segments import TaskSegments


class Gradients(NamedTuple):
    """dx has the type of x, the others are fp32 and shaped like what they are gradients of; None without a bias."""

    x: Tensor
    g: Tensor
    down: Tensor
    up: Tensor
    hidden_bias: Tensor | None
    output_bias: Tensor | None


def grouped_reference(x: Tensor, base: Tensor | None, experts: Experts, g: Tensor, segments: TaskSegments) -> Tensor:
    """y (M, D), dense over the experts and differentiable; g (M, N) has no gradient where it is 0."""
    gates = g * (g != 0)
    tokens, rank = len(x), experts.down.shape[1] // g.shape[1]
    task = torch.repeat_interleave(torch.tensor(segments.counts)).repeat(len(g) // tokens)
    which = task if experts.sets > 1 else torch.zeros_like(task)
    rows = x[torch.arange(len(g)) % tokens]
    hidden = torch.einsum("md,mRd->mR", rows, experts.down.to(x.dtype)[which])
    if experts.hidden_bias is not None:
        hidden = hidden + experts.hidden_bias.to(x.dtype)[which]
    gated = shrink.activation_reference(hidden, experts.activation) * gates.repeat_interleave(rank, 1).to(x.dtype)
    y = torch.einsum("mR,mDR->mD", gated, experts.up.to(x.dtype)[which])
    if experts.output_bias is not None:
        y = y + torch.einsum("mn,mnD->mD", gates, experts.output_bias.to(g.dtype)[which]).to(x.dtype)
    return y if base is None else base + y


def grouped_forward(
    x: Tensor, base: Tensor | None, experts: Experts, g: Tensor, segments: TaskSegments, slots: int
) -> tuple[Tensor, Tensor, Sorted]:
    """(y (G, T, D) in x's type, U (places, r) in x's type, the order of the pairs); backward takes the last two.

    x (T, d), ``base`` (G, T, D) or None for 0, A and B have one type, biases any. The gates g (G, T, N) are fp32 and
    contiguous, and at most ``slots`` of a row are not 0: k and the shared ones. Of more, those of the highest index are
    ignored. x has any row stride.
    """
    rows = g.flatten(0, 1)
    order = sort.sort(rows, segments, slots, experts.sets)
    u, gated = shrink.shrink(x, experts, rows, order)
    out = expand.expand(gated, experts, rows, order)
    y = expand.combine(out, None if base is None else base.flatten(0, 1), len(rows), order)
    return y.unflatten(0, g.shape[:2]), u, order


def grouped_backward(dy: Tensor, x: Tensor, u: Tensor, experts: Experts, g: Tensor, order: Sorted) -> Gradients:
    """All gradients but that of ``base``, which is dy (G, T, D); dy has x's type. dg is 0 where g is.

    ``u`` and ``order`` are those of :func:`grouped_forward`; the order may also be sorted anew from the same g.
    """
    sets, rows, dy = experts.sets, g.flatten(0, 1), dy.flatten(0, 1)
    du, gated, dg = shrink.shrink_backward(dy, experts, rows, u, order)
    up, output_bias = weight_grad.weight_grad_b(dy, gated, rows, order, sets, experts.output_bias is not None)
    down, hidden_bias = weight_grad.weight_grad_a(x, du, order, sets, experts.hidden_bias is not None)
    dx = expand.combine(expand.expand_backward(du, experts, order), None, len(x), order)
    return Gradients(dx, dg.view(g.shape), down, up, hidden_bias, output_bias)
