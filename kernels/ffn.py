"""The adapted FFN, LoRA as further columns of the frozen products:

    u = x W1^T + b1 ;  y = [gelu(u) | H'] [W2 | B]^T + b2
    [da | dH'] = dY [W2 | B] ;  dx = [du | dH | dz] [W1 ; A ; W_tasks]

with dz in columns of its task's own, 0 in the others'. H', dH and dz lie beside the wide activations from the start,
and B, A and the routers beside the frozen weights (:mod:`kernels.packed`), so no pass over tokens is added but
route_shrink, the two grams and a small grad_rank. Three ways of one layout, chosen by measurement (bench.tune):

    columns     cuBLAS over all columns
    matmul      the products that end in y and dx are ours, of which the second takes the routers as its last step
    expand      cuBLAS over the frozen columns; expand adds the rest in one pass over y, and over dx
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.expand import expand, expand_backward
from kernels.gating import Gating
from kernels.gelu import gelu, gelu_backward
from kernels.grad_rank import grad_rank, grad_rank_given
from kernels.gram import gram_a, gram_b
from kernels.matmul import matmul, matmul_routed
from kernels.packed import Linear, Packed
from kernels.pool import Pool
from kernels.ranges import span
from kernels.route_shrink import route_shrink
from kernels.rows import TaskRows

WAYS = ("columns", "matmul", "expand")


def ffn_reference(
    x: Tensor,
    linears: tuple[Linear, Linear],
    lora: tuple[Tensor, Tensor],
    routers: Tensor,
    rows: TaskRows,
    gating: Gating,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, g, P): equation (10) beside the frozen fc1 and fc2 of ``linears``."""
    down, up = linears
    base = F.linear(F.gelu(F.linear(x, *down)), *up)
    return reference.lora_moe(x, base, lora, routers, rows, gating)


def ffn_forward(
    x: Tensor, packed: Packed, routers: Tensor, rows: TaskRows, pool: Pool, way: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y (T, D), g, P, H, z, u (T, F)); x (T, d) in the type of ``packed``, routers (tasks, C, d) fp32."""
    hidden, up = packed.hidden, packed.up
    inner = x.new_empty(len(x), up.shape[1])
    a = packed.down[hidden : hidden + pool.ranks]
    with span("route"):
        h, z, g, p = route_shrink(x, a, routers, inner[:, hidden:], rows, pool)
    with span("ffn"):
        u = F.linear(x, packed.down[:hidden], packed.bias_down)
        gelu(u, inner[:, :hidden])
        if way == "columns":
            y = F.linear(inner, up, packed.bias_up)
        elif way == "matmul":
            y = matmul(inner, up.t(), packed.bias_up, rows, pool)
        else:
            base = F.linear(inner[:, :hidden], up[:, :hidden], packed.bias_up)
            y = expand(base, inner[:, hidden:], up[:, hidden:], rows, pool)
    return y, g, p, h, z, u


def ffn_backward(
    gradients: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    packed: Packed,
    routers: Tensor,
    rows: TaskRows,
    pool: Pool,
    way: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dB, dW), the last three fp32, from (dY, dP) and what the forward pass kept: (x, u, H, z)."""
    (dy, dp), (x, u, h, z) = gradients, saved
    hidden, held, up, down = packed.hidden, packed.held, packed.up, packed.down
    grad = x.new_empty(len(x), len(down) if way == "columns" else hidden + held)
    if way == "expand":
        torch.mm(dy, up[:, :hidden], out=grad[:, :hidden])
        dh, dz, gated, peak = grad_rank(dy, up[:, hidden:], h, z, dp, rows, pool)
    else:
        torch.mm(dy, up, out=grad[:, : hidden + held])
        dh, dz, gated, peak = grad_rank_given(grad[:, hidden:], held, h, z, dp, rows, pool)
    gelu_backward(u, grad[:, :hidden])
    db = gram_b(dy, gated, rows, pool)
    da, drouters = gram_a(x, dh, dz, peak, rows, pool)
    if way == "columns":
        dx = torch.mm(grad, down)
    elif way == "matmul":
        dx = matmul_routed(grad, down[: hidden + held], dz, routers, rows, pool)
    else:
        base = torch.mm(grad[:, :hidden], down[:hidden])
        dx = expand_backward(base, dh, dz, down[hidden : hidden + pool.ranks], routers, rows, pool)
    return dx, da, db, drouters
