"""The two algorithms of a mixture of experts, and which of them a pool takes.

    dense       U = x A^T + b                       y = base + [H' | g] [B | c]^T,  H' = act(U) * per_rank(g)
                [dH' | dg] = dy [B | c]             [dB | dc] = dy^T [H' | g]
                dA = dU^T x,  db = sum dU           dx = dU A
    grouped     sort, shrink, expand, combine; backward: shrink, weight_grad twice, expand, combine

Dense computes every expert for every token, an inactive one with gate 0: the work grows with R = N r. Its GEMMs are
cuBLAS's, one for each set of weights. Grouped computes the tokens of each expert, sorted: the work grows with K r.
Saved beside x and g: U, (T, R) if dense, (places, r) if grouped; H' is computed again. b, c and base are optional.
"""

import torch
from torch import Tensor

from kernels.experts.gates import gate
from kernels.experts.products import Layer, combine, expand, layers, shrink, weight_grad
from kernels.experts.reference import Experts
from kernels.experts.sort import Sorted, sort
from kernels.gating import Gating
from kernels.segments import TaskSegments

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
    sets, y = len(weights), x.new_empty(len(x), weights.shape[2])
    starts = bias if base is None else base.split(runs)
    for i, (rows, out) in enumerate(zip(x.split(runs), y.split(runs), strict=True)):
        if starts is None:
            torch.mm(rows, weights[i % sets], out=out)
        else:
            torch.addmm(starts[i % len(starts)], rows, weights[i % sets], out=out)
    return y


def product_backward(left: Tensor, right: Tensor, runs: Runs, sets: int) -> Tensor:
    """(sets, m, n): left^T right over the rows of each set, of left (rows, m) and right (rows, n)."""
    products: list[Tensor] = []
    for i, (rows, columns) in enumerate(zip(left.split(runs), right.split(runs), strict=True)):
        if i < sets:
            products.append(torch.mm(rows.t(), columns))
        else:
            products[i % sets].addmm_(rows.t(), columns)
    return products[0][None] if sets == 1 else torch.stack(products)


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
