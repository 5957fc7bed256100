"""expert_mixture as an autograd function over the kernels, by one of two algorithms:

    dense       U = x A^T + b                       y = base + [H' | g] [B | c]^T,  H' = act(U) * per_rank(g)
                [dH' | dg] = dy [B | c]             [dB | dc] = dy^T [H' | g]
                dA = dU^T x,  db = sum dU           dx = dU A
    grouped     sort, shrink, expand, combine; backward: shrink, weight_grad twice, expand, combine

Dense computes every expert for every token, an inactive one with gate 0: the work grows with R = N r. Its GEMMs are
cuBLAS's: one for all sets of equally many rows, else one for each. Grouped sorts: the work grows with K r.
Saved beside parameters: x, z, g and U, (T, R) if dense, (places, r) if grouped, which sorts again in backward. Backward
does not write to its inputs, so it may run twice. A compiled pass calls custom operators, as in kernels/custom_ops.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.custom_ops import check_type
from kernels.errors import UserError
from kernels.experts.gates import gate, route, route_backward
from kernels.experts.products import Layer, combine, expand, layers, shrink, weight_grad
from kernels.experts.reference import Experts
from kernels.experts.sort import BLOCK, Sorted, most_blocks, sort
from kernels.gating import Gating, Pool, make_pool
from kernels.segments import TaskSegments
from kernels.vmap import is_batched, looped

ALGORITHMS = ("dense", "grouped")
Runs = tuple[int, ...]  # of consecutive rows with one set of weights; run i has set i modulo the number of sets
Saved = tuple[Tensor, Tensor, Tensor]  # x (T, d), U and the gates g (G, T, N) fp32
# Of x, g and the weights, in the order of Experts; None for an absent bias, and for x if not needed
Gradients = tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]
FLOPS_PER_BYTE = 184  # of an H200: 790 TFLOP/s in bf16 and 4.3 TB/s, both measured by others for large operands


def crossover(d: int, width: int, slots: int, rank: int, readers: int = 1) -> float:
    """The R at which both algorithms should take the same time forward, for K = ``slots`` experts per row and G gates:

    dense     2 R (d + G D) FLOPs per token
    grouped   G 2 K r (d + D) FLOPs and 2 G (K d + (2 K + 2) D) bytes: rows gathered, outputs of the pairs written
              and read, base and y
    """
    moved = FLOPS_PER_BYTE * (slots * d + (2 * slots + 2) * width)
    return readers * (moved + slots * rank * (d + width)) / (d + readers * width)


def choose(experts: Experts, number: int, gating: Gating, readers: int) -> str:
    """The faster algorithm by the model above; tokens do not matter, so a token's bits do not depend on the batch."""
    (_, ranks, d), width = experts.down.shape, experts.up.shape[1]
    return ALGORITHMS[ranks > crossover(d, width, gating.slots, ranks // number, readers)]


def _runs(experts: Experts, segments: TaskSegments, shape: torch.Size) -> tuple[Runs, Runs]:
    """The runs of T tokens and of G T rows; ``shape`` begins with G and T."""
    if experts.sets == 1:
        return (shape[1],), (shape[0] * shape[1],)
    assert segments.counts is not None
    return segments.counts, segments.counts * shape[0]


def product(x: Tensor, weights: Tensor, runs: Runs, bias: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """x W (rows, n) of x (rows, k), W from ``weights`` (sets, k, n); plus ``bias`` (sets, n) or ``base`` (rows, n)."""
    sets = len(weights)
    if sets > 1 and runs == runs[:1] * sets:
        tokens, start = x.unflatten(0, (sets, runs[0])), None if bias is None else bias[:, None]
        if base is not None:
            start = base.unflatten(0, (sets, runs[0]))
        return (torch.bmm(tokens, weights) if start is None else torch.baddbmm(start, tokens, weights)).flatten(0, 1)
    y, starts = x.new_empty(len(x), weights.shape[2]), bias if base is None else base.split(runs)
    for i, (rows, out) in enumerate(zip(x.split(runs), y.split(runs), strict=True)):
        if starts is None:
            torch.mm(rows, weights[i % sets], out=out)
        else:
            torch.addmm(starts[i % len(starts)], rows, weights[i % sets], out=out)
    return y


def product_backward(left: Tensor, right: Tensor, runs: Runs, sets: int) -> Tensor:
    """(sets, m, n): left^T right over the rows of each set, of left (rows, m) and right (rows, n)."""
    if sets == 1:
        return torch.mm(left.t(), right)[None]
    if runs == runs[:1] * sets:
        return torch.bmm(left.unflatten(0, (sets, runs[0])).mT, right.unflatten(0, (sets, runs[0])))
    total = left.new_zeros(sets, left.shape[1], right.shape[1])
    for i, (rows, columns) in enumerate(zip(left.split(runs), right.split(runs), strict=True)):
        total[i % sets].addmm_(rows.t(), columns)
    return total


def _up(experts: Experts) -> Tensor:
    """[B | c] (sets, D, R or R + N)."""
    up, bias = experts.up, experts.output_bias
    return up if bias is None else torch.cat([up, bias.mT.to(up.dtype)], dim=2)


def dense_forward(
    x: Tensor, base: Tensor | None, experts: Experts, g: Tensor, segments: TaskSegments
) -> tuple[Tensor, Tensor]:
    """(y (G, T, D), U (T, R)) of x (T, d), base (G, T, D) and g (G, T, N) fp32; A and B have the type of x."""
    token_runs, row_runs = _runs(experts, segments, g.shape)
    bias = None if experts.hidden_bias is None else experts.hidden_bias.to(x.dtype)
    u = product(x, experts.down.mT, token_runs, bias)
    (gated,) = gate(u, g, experts.activation, experts.output_bias is not None)
    start = None if base is None else base.flatten(0, 1)
    return product(gated.flatten(0, 1), _up(experts).mT, row_runs, base=start).unflatten(0, g.shape[:2]), u


def dense_backward(
    dy: Tensor, saved: Saved, experts: Experts, segments: TaskSegments, needs_dx: bool = True
) -> Gradients:
    """From dy (G, T, D)."""
    (x, u, g), sets, biases, rows = saved, experts.sets, experts.output_bias is not None, dy.flatten(0, 1)
    token_runs, row_runs = _runs(experts, segments, g.shape)
    dgated = product(rows, _up(experts), row_runs).unflatten(0, g.shape[:2])
    gated, du, dg = gate(u, g, experts.activation, biases, dgated)
    db, dc = product_backward(rows, gated.flatten(0, 1), row_runs, sets).tensor_split([u.shape[1]], dim=2)
    dbias = None
    if experts.hidden_bias is not None:
        dbias = torch.stack([run.sum(0, dtype=torch.float32) for run in du.split(token_runs)])
    dx = product(du, experts.down, token_runs) if needs_dx else None
    return dx, dg, product_backward(du, x, token_runs, sets), db, dbias, dc.mT if biases else None


def grouped_forward(
    x: Tensor, base: Tensor | None, experts: Experts, g: Tensor, segments: TaskSegments, slots: int
) -> tuple[Tensor, Tensor, Sorted]:
    """(y (G, T, D), U (places, r), the order of the pairs). x (T, d), ``base`` (G, T, D), A and B have one type, biases
    any. g (G, T, N) is fp32 and contiguous; at most ``slots`` of a row, k and the shared experts, are not 0."""
    order, rows, (down, up) = sort(g, segments, slots, experts.sets), g.flatten(0, 1), layers(experts, g.shape[2])
    u, gated = shrink(x, down, rows, order, experts.activation)
    y = combine(expand(gated, up, rows, order), None if base is None else base.flatten(0, 1), len(rows), order)
    return y.unflatten(0, g.shape[:2]), u, order


def grouped_backward(dy: Tensor, saved: Saved, experts: Experts, order: Sorted, needs_dx: bool = True) -> Gradients:
    """From dy (G, T, D); fp32 but for dx. ``order`` is that of :func:`grouped_forward`, or sorted anew from g."""
    (x, u, g), (down, up) = saved, layers(experts, order.experts)
    rows, dy = g.flatten(0, 1), dy.flatten(0, 1)
    du, gated, dg = shrink(dy, up, rows, order, experts.activation, u)
    dup, dc = weight_grad(dy, gated, order, *up, rows)
    ddown, db = weight_grad(x, du, order, *down)
    dx = combine(expand(du, Layer(down.weight, None), rows, order), None, len(x), order) if needs_dx else None
    return dx, dg.view(g.shape), ddown.flatten(1, 2), dup.permute(0, 3, 1, 2).flatten(2), db, dc


def _parse(
    x: Tensor, z: Tensor, weights: tuple, segments: tuple[Tensor, Sequence[int] | None, int], setting: str
) -> tuple[Experts, TaskSegments, Pool, str]:
    """(experts in x's type, segments, pool, algorithm) from the arguments of an operator."""
    gating, activation, algorithm = setting.rsplit("/", 2)
    down, up = (weight.to(x.dtype).contiguous() for weight in weights[:2])
    hidden_bias, output_bias = (None if bias is None else bias.contiguous() for bias in weights[2:])
    experts, (offsets, counts, length) = Experts(down, up, hidden_bias, output_bias, activation), segments
    known = TaskSegments(offsets, len(offsets) - 1, tuple(counts) if counts else None, length)
    return experts, known, make_pool(down.shape[1], z.shape[2], gating), algorithm


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
    experts, pairs, u = columns + gating.unrouted, readers * tokens * gating.slots, (len(x), ranks)
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
    check_type(x.dtype)
    if algorithm not in ("", *ALGORITHMS):
        raise UserError(f"unknown algorithm {algorithm!r}: choose among {', '.join(ALGORITHMS)}")
    one, z = z.ndim == 2, z.float()
    if one:
        z, base = z[None], None if base is None else base[None]
    algorithm = algorithm or choose(experts, z.shape[2] + gating.unrouted, gating, len(z))
    weights = experts.down, experts.up, experts.hidden_bias, experts.output_bias
    counts = None if experts.sets == 1 else segments.counts  # one graph serves every composition of a batch
    static = counts, segments.length, f"{gating.text}/{experts.activation}/{algorithm}"
    run = _ExpertMixture.apply if torch.compiler.is_compiling() or torch.is_grad_enabled() else forward
    y, g, p = run(x, base, z, *weights, segments.offsets, *static)[:3]
    return (y.squeeze(0), g.squeeze(0), p.squeeze(0)) if one else (y, g, p)
