"""The mixture of experts as a PyTorch custom operator, with its fake version and its autograd.

    forward     route, then the forward pass of one of :mod:`kernels.experts.algorithms`
    backward    its backward pass, then route_backward
    saved       x, U, z and g; the output of an expert never is

Backward does not write to its inputs, so it may run twice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.custom_ops import check_type
from kernels.eager import differentiable
from kernels.errors import UserError
from kernels.experts import algorithms
from kernels.experts.reference import Experts
from kernels.experts.route import route, route_backward
from kernels.gating import Gating
from kernels.pool import make_pool
from kernels.segments import TaskSegments


@torch.library.custom_op("fastmoe_lora::expert_mixture", mutates_args=())
def expert_mixture_op(
    x: Tensor,
    base: Tensor | None,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    offsets: Tensor,
    counts: Sequence[int],
    activation: str,
    gating: str,
    k: int,
    shared: int,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, g, P, U); base, z, y, g and P have G gates per token as their first dimension."""
    segments, pool = TaskSegments(tuple(counts), offsets), make_pool(down.shape[1], z.shape[2], gating, k, shared)
    experts = Experts(down, up, hidden_bias, output_bias, activation)
    g, p = route(z.contiguous(), segments, pool)
    y, u = algorithms.forward(algorithm, (x, base, g), experts, segments, pool.gating)
    return y, g, p, u


@expert_mixture_op.register_fake
def _(x, base, z, down, up, hidden_bias, output_bias, offsets, counts, activation, gating, k, shared, algorithm):
    readers, tokens, columns = z.shape
    number = Gating(gating, k, shared).experts(columns)
    pairs = readers * tokens * (k + shared)
    return (
        x.new_empty(readers, tokens, up.shape[1]),
        z.new_empty(readers, tokens, number),
        z.new_empty(readers, len(counts), columns),
        x.new_empty(algorithms.saved_shape(algorithm, tokens, Experts(down, up), number, pairs)),
    )


@torch.library.custom_op("fastmoe_lora::expert_mixture_backward", mutates_args=())
def expert_mixture_backward_op(
    dy: Tensor,
    dp: Tensor,
    x: Tensor,
    u: Tensor,
    z: Tensor,
    g: Tensor,
    down: Tensor,
    up: Tensor,
    hidden_bias: Tensor | None,
    output_bias: Tensor | None,
    offsets: Tensor,
    counts: Sequence[int],
    activation: str,
    gating: str,
    k: int,
    shared: int,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dz, dA, dB, db, dc), the last four in the types of their parameters and empty where there is none."""
    segments, pool = TaskSegments(tuple(counts), offsets), make_pool(down.shape[1], z.shape[2], gating, k, shared)
    experts = Experts(down, up, hidden_bias, output_bias, activation)
    dx, dg, da, db, *dbiases = algorithms.backward(algorithm, dy, (x, u, g), experts, segments, pool.gating)
    dz = route_backward(z.contiguous(), g, dg, dp.contiguous(), segments, pool)
    dhidden, doutput = (
        x.new_empty(0) if bias is None or gradient is None else gradient.to(bias.dtype).contiguous()
        for bias, gradient in zip((hidden_bias, output_bias), dbiases, strict=True)
    )
    return dx, dz, da.to(down.dtype), db.to(up.dtype).contiguous(), dhidden, doutput


@expert_mixture_backward_op.register_fake
def _(dy, dp, x, u, z, g, down, up, hidden_bias, output_bias, *rest):
    biases = (x.new_empty(0) if bias is None else bias.new_empty(bias.shape) for bias in (hidden_bias, output_bias))
    return *(t.new_empty(t.shape) for t in (x, z, down, up)), *biases


def _save(ctx, inputs, output):
    x, _, z, *weights, offsets = inputs[:8]
    _, g, _, u = output
    ctx.static = inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, u, z, g, *weights, offsets)
    ctx.mark_non_differentiable(g, u)


def _backward(run, ctx, dy, dg, dp, du):
    x, _, z, g, _, up, *biases, _ = saved = ctx.saved_tensors  # asked for once, as checkpointing requires
    through = x.new_zeros(*z.shape[:2], up.shape[1]) if dy is None else dy
    means = z.new_zeros(len(z), len(ctx.static[0]), z.shape[2]) if dp is None else dp
    dx, dz, da, db, *dbiases = run(through, means, *saved, *ctx.static)
    given = [None if bias is None else gradient for bias, gradient in zip(biases, dbiases, strict=True)]
    dbase = dy if ctx.needs_input_grad[1] else None
    return dx, dbase, dz, da, db, *given, *[None] * 7


_expert_mixture = differentiable(expert_mixture_op, expert_mixture_backward_op, _save, _backward)


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
    if algorithm not in ("", *algorithms.ALGORITHMS):
        raise UserError(f"unknown algorithm {algorithm!r}: choose among {', '.join(algorithms.ALGORITHMS)}")
    single, logits = z.ndim == 2, z.float()
    if single:
        logits, base = logits[None], None if base is None else base[None]
    algorithm = algorithm or algorithms.choose(experts, gating.experts(logits.shape[2]), gating, len(logits))
    weights = experts.down, experts.up, experts.hidden_bias, experts.output_bias
    static = segments.counts, experts.activation, gating.name, gating.k, gating.shared, algorithm
    y, g, p, _ = _expert_mixture(x, base, logits, *weights, segments.offsets, *static)
    return (y.squeeze(0), g.squeeze(0), p.squeeze(0)) if single else (y, g, p)
