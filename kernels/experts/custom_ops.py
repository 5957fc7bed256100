"""expert_mixture as an autograd function over :mod:`kernels.experts.algorithms`, like :mod:`kernels.custom_ops`.

Saved beside parameters: x, z, g and U, never the output of an expert; the grouped algorithm sorts again in backward.
Backward does not write to its inputs, so it may run twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.custom_ops import check_type
from kernels.errors import UserError
from kernels.experts.algorithms import (
    ALGORITHMS,
    choose,
    dense_backward,
    dense_forward,
    grouped_backward,
    grouped_forward,
)
from kernels.experts.gates import route, route_backward
from kernels.experts.reference import Experts
from kernels.experts.sort import BLOCK, most_blocks, sort
from kernels.gating import Gating, Pool, make_pool
from kernels.segments import TaskSegments
from kernels.vmap import is_batched, looped

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # of Experts


def _parse(
    x: Tensor, z: Tensor, weights: Weights, segments: tuple[Tensor, Sequence[int] | None, int], setting: str
) -> tuple[Experts, TaskSegments, Pool, str]:
    """(experts in x's type, segments, pool, algorithm) from the arguments of an operator."""
    (down, up, *biases), (offsets, counts, length) = weights, segments
    gating, activation, algorithm = setting.rsplit("/", 2)
    experts = Experts(down.to(x.dtype), up.to(x.dtype), biases[0], biases[1], activation)
    pool = make_pool(down.shape[1], z.shape[2], gating)
    return experts, TaskSegments(offsets, tuple(counts) if counts else None, length), pool, algorithm


def forward(
    x: Tensor, base: Tensor | None, z: Tensor, down: Tensor, up: Tensor, hidden_bias: Tensor | None,
    output_bias: Tensor | None, offsets: Tensor, counts: Sequence[int] | None, length: int, setting: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, g, P, U); base, z, y, g and P have G gates per token as their first dimension. ``setting`` is gating,
    activation and algorithm as one text."""
    weights = down, up, hidden_bias, output_bias
    experts, segments, pool, algorithm = _parse(x, z, weights, (offsets, counts, length), setting)
    x, base = x.contiguous(), None if base is None else base.contiguous()
    with torch.cuda.device_of(x):
        g, p = route(z.contiguous(), segments, pool)
        if algorithm == "dense":
            y, u = dense_forward(x, base, experts, g, segments)
        else:
            y, u, _ = grouped_forward(x, base, experts, g, segments, pool.gating.slots)
    return y, g, p, u


def backward(
    dy: Tensor, dp: Tensor, x: Tensor, u: Tensor, z: Tensor, g: Tensor, down: Tensor, up: Tensor,
    hidden_bias: Tensor | None, output_bias: Tensor | None, offsets: Tensor, counts: Sequence[int] | None, length: int,
    setting: str, needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dz, dA, dB, db, dc), all but dz in the types of what they are gradients of; empty for an absent bias, and
    for x unless dx is needed."""
    weights = down, up, hidden_bias, output_bias
    experts, segments, pool, algorithm = _parse(x, z, weights, (offsets, counts, length), setting)
    dy, saved = dy.contiguous(), (x.contiguous(), u, g)
    with torch.cuda.device_of(x):
        if algorithm == "dense":
            dx, dg, *rest = dense_backward(dy, saved, experts, segments, needs_dx)
        else:
            order = sort(g, segments, pool.gating.slots, experts.sets)
            dx, dg, *rest = grouped_backward(dy, saved, experts, order, needs_dx)
        dz = route_backward(z.contiguous(), g, dg, dp.contiguous(), segments, pool)
    da, db, dhidden_bias, doutput_bias = (
        x.new_empty(0) if old is None or new is None else new.to(old.dtype).contiguous()
        for old, new in zip(weights, rest, strict=True)
    )
    return x.new_empty(0) if dx is None else dx, dz, da, db, dhidden_bias, doutput_bias


forward_op = torch.library.custom_op("fastmoe_lora::expert_mixture", forward, mutates_args=())
backward_op = torch.library.custom_op("fastmoe_lora::expert_mixture_backward", backward, mutates_args=())


@forward_op.register_fake
def _(x, base, z, down, up, hidden_bias, output_bias, offsets, counts, length, setting):
    text, _, algorithm = setting.rsplit("/", 2)
    (readers, tokens, columns), gating, ranks = z.shape, Gating.parse(text), down.shape[1]
    experts, pairs, u = gating.experts(columns), readers * tokens * gating.slots, (len(x), ranks)
    if algorithm == "grouped":
        u = most_blocks(pairs, len(down) * experts) * BLOCK, ranks // experts
    g, p = z.new_empty(readers, tokens, experts), z.new_empty(readers, len(offsets) - 1, columns)
    return x.new_empty(readers, tokens, up.shape[1]), g, p, x.new_empty(u)


@backward_op.register_fake
def _(dy, dp, x, u, z, g, down, up, hidden_bias, output_bias, offsets, counts, length, setting, needs_dx):
    like = x if needs_dx else None, z, down, up, hidden_bias, output_bias
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in like)


backward_op.register_vmap(looped(backward_op))


class _ExpertMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, base, z, down, up, hidden_bias, output_bias, offsets, counts, length, setting):
        weights, ctx.static = (down, up, hidden_bias, output_bias, offsets), (counts, length, setting)
        run = forward_op if torch.compiler.is_compiling() else forward
        y, g, p, u = run(x, base, z, *weights, *ctx.static)
        ctx.set_materialize_grads(False)  # g has no gradient; zeros for it would be a pass
        ctx.save_for_backward(x, u, z, g, *weights)
        ctx.mark_non_differentiable(g)
        return y, g, p

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dg, dp):
        x, _, z, _, _, up, *biases, offsets = saved = ctx.saved_tensors  # asked for once, as checkpointing requires
        needed = ctx.needs_input_grad
        dp = z.new_zeros(len(z), len(offsets) - 1, z.shape[2]) if dp is None else dp
        dy = x.new_zeros(*z.shape[:2], up.shape[1]) if dy is None else dy
        inputs = dy, dp, *saved, *ctx.static, needed[0]
        as_op = torch.compiler.is_compiling() or is_batched(dy) or is_batched(dp)
        dx, dz, da, db, *rest = (backward_op if as_op else backward)(*inputs)
        dbiases = [None if bias is None else gradient for bias, gradient in zip(biases, rest, strict=True)]
        return dx if needed[0] else None, dy if needed[1] else None, dz, da, db, *dbiases, None, None, None, None


def expert_mixture(
    x: Tensor,
    base: Tensor | None,
    experts: Experts,
    z: Tensor,
    segments: TaskSegments,
    gating: Gating,
    algorithm: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`kernels.experts.reference.expert_mixture`, in fp32, fp16 or bf16; g has no gradient."""
    check_type(x)
    if algorithm not in ("", *ALGORITHMS):
        raise UserError(f"unknown algorithm {algorithm!r}: choose among {', '.join(ALGORITHMS)}")
    one, z = z.ndim == 2, z.float()
    if one:
        z, base = z[None], None if base is None else base[None]
    algorithm = algorithm or choose(experts, gating.experts(z.shape[2]), gating, len(z))
    weights = experts.down, experts.up, experts.hidden_bias, experts.output_bias
    counts = None if experts.sets == 1 else segments.counts  # one graph serves every composition of a batch
    static = counts, segments.length, f"{gating.name}/{gating.k}/{gating.shared}/{experts.activation}/{algorithm}"
    run = _ExpertMixture.apply if torch.compiler.is_compiling() or torch.is_grad_enabled() else forward
    y, g, p = run(x, base, z, *weights, segments.offsets, *static)[:3]
    return (y.squeeze(0), g.squeeze(0), p.squeeze(0)) if one else (y, g, p)
