"""The reference: a mixture of experts of any width, which LoRA's pool is the special case of.

An expert is two products with a gate between them, and may have an activation and biases:

    U  = x A^T + b                 (T, R)   pre-activations of every expert
    H' = act(U) * per_rank(g)      (T, R)
    y  = base + H' B^T + g c       (T, D)

One set of A, b, B and c serves all tasks, or each task has its own. An expert may be a slice of a wide MLP's hidden
layer: cut into slices that all have gate 1, the MLP is unchanged, if one slice keeps its output bias. A token may have
several gates, one for each of G readers of the same experts: z (G, T, C), g (G, T, N), y (G, T, D); U is computed once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gating import Gating
from kernels.reference import gates, mean_probs
from kernels.segments import TaskSegments

ACTIVATIONS = ("none", "gelu")


@dataclass(frozen=True, eq=False)
class Experts:
    """``down`` A (sets, R, d), ``up`` B (sets, D, R), ``hidden_bias`` b (sets, R), ``output_bias`` c (sets, N, D)."""

    down: Tensor
    up: Tensor
    hidden_bias: Tensor | None = None
    output_bias: Tensor | None = None
    activation: str = "none"

    @property
    def sets(self) -> int:
        """1, or one for each task."""
        return len(self.down)


def activate(u: Tensor, activation: str) -> Tensor:
    return F.gelu(u) if activation == "gelu" else u


def route(z: Tensor, segments: TaskSegments, gating: Gating) -> tuple[Tensor, Tensor]:
    """(g, P) of z (T, C), or (G, T, C)."""
    if z.ndim == 2:
        return gates(z, gating), mean_probs(z, segments)
    g, p = zip(*(route(each, segments, gating) for each in z), strict=True)
    return torch.stack(g), torch.stack(p)


def mixture(x: Tensor, base: Tensor | None, experts: Experts, g: Tensor, segments: TaskSegments) -> Tensor:
    """y (T, D) from the gates g (T, N), or (G, T, D) from (G, T, N)."""
    runs, outputs = (len(x),) if experts.sets == 1 else segments.counts, []
    for i, (tokens, gate) in enumerate(zip(x.split(runs), g.split(runs, dim=-2), strict=True)):
        bias = None if experts.hidden_bias is None else experts.hidden_bias[i].to(x.dtype)
        hidden = activate(F.linear(tokens, experts.down[i].to(x.dtype), bias), experts.activation)
        gated = (hidden * gate.repeat_interleave(hidden.shape[-1] // g.shape[-1], dim=-1)).to(x.dtype)
        y = F.linear(gated, experts.up[i].to(x.dtype))
        if experts.output_bias is not None:
            y = y + (gate @ experts.output_bias[i].to(g.dtype)).to(x.dtype)
        outputs.append(y)
    y = torch.cat(outputs, dim=-2)
    return y if base is None else base + y


def expert_mixture(
    x: Tensor, base: Tensor | None, experts: Experts, z: Tensor, segments: TaskSegments, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the gates g and P from tokens x (T, d) and logits z (T, C), or (G, T, C) for G gates per token.

    ``base`` is added to y and has its shape; None is 0. Logits, softmax and gates are at least fp32. The weights are
    cast to the type of x. P is (tasks, C), or (G, tasks, C).
    """
    g, p = route(z, segments, gating)
    return mixture(x, base, experts, g, segments), g, p
