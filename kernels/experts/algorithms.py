"""The algorithms of the mixture of experts, which of them a pool takes, and what they have in common.

    dense       :mod:`kernels.experts.dense`    every expert for every token: the work grows with R = N r
    grouped     :mod:`kernels.grouped`          tokens sorted by expert: the work grows with (k + S) r

Both compute y (G, T, D) and U, which backward needs: (T, R) in the dense algorithm; in the grouped one a row of r
numbers for each pair of a token and an active expert, sorted by expert. Backward sorts the pairs again.
"""

from dataclasses import replace

import torch
from torch import Tensor

from kernels.experts.dense import Gradients, dense_backward, dense_forward
from kernels.experts.reference import Experts
from kernels.gating import Gating
from kernels.grouped.crossover import is_grouped
from kernels.grouped.operation import grouped_backward, grouped_forward
from kernels.grouped.sort import BLOCK, most_blocks, sort
from kernels.segments import TaskSegments

ALGORITHMS = ("dense", "grouped")


def choose(experts: Experts, number: int, gating: Gating, readers: int) -> str:
    """The algorithm that should take less time for N = ``number`` experts and G = ``readers`` gates per token.

    It does not depend on the number of tokens.
    """
    (_, ranks, d), width = experts.down.shape, experts.up.shape[1]
    faster = is_grouped(ranks, d, width, gating.k + gating.shared, ranks // number, readers)
    return "grouped" if faster else "dense"


def forward(
    algorithm: str,
    tokens: tuple[Tensor, Tensor | None, Tensor],
    experts: Experts,
    segments: TaskSegments,
    gating: Gating,
) -> tuple[Tensor, Tensor]:
    """(y (G, T, D), U) of ``tokens``: x (T, d), base (G, T, D) or None, and the gates g (G, T, N) fp32."""
    x, base, g = tokens
    if algorithm == "dense":
        return dense_forward(x, base, experts, g, segments)
    start, slots = None if base is None else base.contiguous(), gating.k + gating.shared
    y, u, _ = grouped_forward(x.contiguous(), start, _typed(experts, x.dtype), g, segments, slots)
    return y, u


def backward(
    algorithm: str,
    dy: Tensor,
    tokens: tuple[Tensor, Tensor, Tensor],
    experts: Experts,
    segments: TaskSegments,
    gating: Gating,
) -> Gradients:
    """From dy (G, T, D) and ``tokens``, which are x, U and g; none of them is written."""
    x, u, g = tokens
    if algorithm == "dense":
        return dense_backward(dy, x, u, experts, g, segments)
    order = sort(g.flatten(0, 1), segments, gating.k + gating.shared, experts.sets)
    return grouped_backward(dy.contiguous(), x.contiguous(), u, _typed(experts, x.dtype), g, order)


def saved_shape(algorithm: str, tokens: int, experts: Experts, number: int, pairs: int) -> tuple[int, int]:
    """The shape of U for N = ``number`` experts and at most ``pairs`` pairs of a token and an active expert."""
    sets, ranks, _ = experts.down.shape
    return (tokens, ranks) if algorithm == "dense" else (most_blocks(pairs, sets * number) * BLOCK, ranks // number)


def _typed(experts: Experts, dtype: torch.dtype) -> Experts:
    """A and B in ``dtype``."""
    return replace(experts, down=experts.down.to(dtype), up=experts.up.to(dtype))
