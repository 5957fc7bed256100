"""The reference: a mixture of experts of any width, which LoRA's pool is the special case of.

An expert is two products with a gate between them, and may have an activation and biases:

    U  = x A^T + b                 (T, R)   pre-activations of every expert
    H' = act(U) * per_rank(g)      (T, R)
    y  = base + H' B^T + g c       (T, D)

A, b, B and c come in sets. One set serves all tasks, or each task has its own. The r rows of an expert in A may be a
slice of a wide MLP's hidden layer: cut into slices that all have gate 1, the MLP is unchanged, but for its output bias,
which one slice keeps.

A token may have several gates, one for each of G readers of the same experts: z (G, T, C), g (G, T, N), y (G, T, D).
U is computed once. The symbols are those of :mod:`kernels.reference`.
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


def expert_mixture(
    x: Tensor, base: Tensor | None, experts: Experts, z: Tensor, segments: TaskSegments, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the gates g and P from tokens x (T, d) and logits z (T, C), or (G, T, C) for G gates per token.

    ``base`` is added to y and has its shape; None is 0. Logits, softmax and gates are at least fp32. The weights are
    cast to the type of x. P is (tasks, C), or (G, tasks, C).
    """
    if z.ndim == 3:
        each = [
            expert_mixture(x, None if base is None else base[i], experts, z[i], segments, gating) for i in range(len(z))
        ]
        y, g, p = (torch.stack(parts) for parts in zip(*each, strict=True))
        return y, g, p
    g = gates(z, gating)
    runs = (len(x),) if experts.sets == 1 else segments.counts
    outputs = [
        _one_set(tokens, gate, experts, i)
        for i, (tokens, gate) in enumerate(zip(x.split(runs), g.split(runs), strict=True))
    ]
    y = torch.cat(outputs)
    return (y if base is None else base + y), g, mean_probs(z, segments)


def _one_set(x: Tensor, g: Tensor, experts: Experts, i: int) -> Tensor:
    """H' B^T + g c of the tokens x (T, d) with the weights of set ``i``."""
    bias = None if experts.hidden_bias is None else experts.hidden_bias[i].to(x.dtype)
    hidden = F.linear(x, experts.down[i].to(x.dtype), bias)
    if experts.activation == "gelu":
        hidden = F.gelu(hidden)
    rank = hidden.shape[1] // g.shape[1]
    y = F.linear((hidden * g.repeat_interleave(rank, dim=-1)).to(x.dtype), experts.up[i].to(x.dtype))
    return y if experts.output_bias is None else y + (g @ experts.output_bias[i].to(g.dtype)).to(x.dtype)
