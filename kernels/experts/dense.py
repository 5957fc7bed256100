"""The dense algorithm: GEMM, gate, GEMM over all experts, whatever their number; an inactive expert has gate 0.

    forward     U = x A^T + b                       y = base + [H' | g] [B | c]^T,  H' = act(U) * per_rank(g)
    backward    [dH' | dg] = dy [B | c]             [dB | dc] = dy^T [H' | g]
                dA = dU^T x,  db = sum dU           dx = dU A

The GEMMs are cuBLAS's, one for each set of weights or batched over them. b, c and base are optional. The work grows
with R = N r, that of sorted tokens with k r. Saved beside x and g: U (T, R); H' is computed again.
"""

import torch
from torch import Tensor

from kernels.experts.gate import gate, gate_backward
from kernels.experts.products import product, product_backward, sums
from kernels.experts.reference import Experts
from kernels.segments import TaskSegments

# dx, dg and those of the weights, in the order of Experts; None for an absent bias
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _up(experts: Experts, dtype: torch.dtype) -> Tensor:
    """[B | c] (sets, D, R or R + N)."""
    up = experts.up.to(dtype)
    return up if experts.output_bias is None else torch.cat([up, experts.output_bias.mT.to(dtype)], dim=2)


def dense_forward(
    x: Tensor, base: Tensor | None, experts: Experts, g: Tensor, segments: TaskSegments
) -> tuple[Tensor, Tensor]:
    """(y (G, T, D), U (T, R)) of x (T, d), base (G, T, D) and g (G, T, N) fp32."""
    bias = None if experts.hidden_bias is None else experts.hidden_bias.to(x.dtype)
    u = product(x, experts.down.to(x.dtype).mT, segments.counts, bias=bias)
    gated = gate(u, g, experts.activation, experts.output_bias is not None).flatten(0, 1)
    start = None if base is None else base.flatten(0, 1)
    y = product(gated, _up(experts, x.dtype).mT, segments.counts, base=start)
    return y.unflatten(0, g.shape[:2]), u


def dense_backward(dy: Tensor, x: Tensor, u: Tensor, experts: Experts, g: Tensor, segments: TaskSegments) -> Gradients:
    """From dy (G, T, D), x, U and g; none of them is written."""
    sets, counts, biases, rows = experts.sets, segments.counts, experts.output_bias is not None, dy.flatten(0, 1)
    dgated = product(rows, _up(experts, x.dtype), counts).unflatten(0, g.shape[:2])
    du, dg, gated = gate_backward(u, g, dgated, experts.activation, biases)
    dup = product_backward(rows, gated.flatten(0, 1), sets, counts)
    db, dc = dup.tensor_split([u.shape[1]], dim=2)
    dbias = None if experts.hidden_bias is None else sums(du, sets, counts)
    dx = product(du, experts.down.to(x.dtype), counts)
    return dx, dg, product_backward(du, x, sets, counts), db, dbias, dc.mT if biases else None
