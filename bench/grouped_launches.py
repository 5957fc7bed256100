"""Every launch of kernels/experts over sorted blocks on random tensors, for programs that compile them one by one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.launches import parse_pool
from kernels import Experts
from kernels.experts.products import Layer, combine, expand, layers, shrink, weight_grad
from kernels.experts.sort import BLOCK, Sorted, sort
from kernels.segments import TaskSegments

# LoRA pools of N/k/S/r, and slices of a hidden layer: experts with GELU, biases and a set for each task.
GROUPED_POOLS = ("64/12/4/16", "64/12/4/64", "16/4/2/256 gelu")


@dataclass(frozen=True, eq=False)
class Call:
    """The inputs of every launch: x (T, d), rows (T, d) that serve as dY and base, hidden rows and outputs by place."""

    x: Tensor
    rows: Tensor
    experts: Experts
    g: Tensor
    segments: TaskSegments
    slots: int
    order: Sorted
    hidden: Tensor
    out: Tensor


def make_call(pool: str, segments: TaskSegments, width: int, like: Tensor) -> Call:
    """Random inputs for the pool named ``pool``; ``like`` gives the dtype and the device. On tensors without memory
    every expert has equally many pairs."""
    numbers, _, activation = pool.partition(" ")
    shape, wide = parse_pool(numbers), bool(activation)
    assert segments.counts is not None
    tokens, sets, slots = sum(segments.counts), segments.tasks if wide else 1, shape.gating.slots

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=like.device).to(like.dtype)

    experts = Experts(
        normal(sets, shape.ranks, width),
        normal(sets, width, shape.ranks),
        normal(sets, shape.ranks) if wide else None,
        normal(sets, shape.experts, width) if wide else None,
        activation or "none",
    )
    scores = torch.rand(tokens, shape.experts, device=like.device)
    g = scores * (scores >= scores.topk(slots).values[:, -1:])
    order = sort(g[None], segments, slots, sets)
    if like.is_meta:
        ids = len(order.ends)
        blocks = math.ceil(math.ceil(tokens * slots / ids) / BLOCK)
        order = replace(order, ends=torch.arange(1, ids + 1, dtype=torch.int32) * blocks)
    places = len(order.rows)
    x, rows = normal(tokens, width), normal(tokens, width)
    return Call(x, rows, experts, g, segments, slots, order, normal(places, shape.rank), normal(places, width))


def _sort(c: Call) -> object:
    return sort(c.g[None], c.segments, c.slots, c.experts.sets)


def _down(c: Call) -> Layer:
    return layers(c.experts, c.order.experts)[0]


def _up(c: Call) -> Layer:
    return layers(c.experts, c.order.experts)[1]


# By name: a launcher, and which of its launches is meant.
GROUPED_LAUNCHES: dict[str, tuple[Callable[[Call], object], int]] = {
    "grouped_count": (_sort, 0),
    "grouped_prefix": (_sort, 1),
    "grouped_scatter": (_sort, 2),
    "grouped_shrink": (lambda c: shrink(c.x, _down(c), c.g, c.order, c.experts.activation), 0),
    "grouped_expand": (lambda c: expand(c.hidden, _up(c), c.g, c.order), 0),
    "grouped_combine": (lambda c: combine(c.out, c.rows, len(c.rows), c.order), 0),
    "grouped_shrink_backward": (lambda c: shrink(c.rows, _up(c), c.g, c.order, c.experts.activation, c.hidden), 0),
    "grouped_weight_grad_b": (lambda c: weight_grad(c.rows, c.hidden, c.order, *_up(c), c.g), 0),
    "grouped_weight_grad_a": (lambda c: weight_grad(c.x, c.hidden, c.order, *_down(c)), 0),
    "grouped_expand_backward": (lambda c: expand(c.hidden, Layer(_down(c).weight, None), c.g, c.order), 0),
    "grouped_combine_backward": (lambda c: combine(c.out, None, len(c.x), c.order), 0),
}
