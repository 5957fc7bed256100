"""One adapted linear layer, LoRA as further columns of the frozen product:

    y = [x | H'] [W | B]^T + b
    [dx_0 | dH'] = dY [W | B] ;  dx = dx_0 + dH A + dz W_task

route_shrink writes H' beside a copy of x, and dH takes the place of dH'. Where the layer is wider than its input, the
copy is less than the pass over y that :func:`kernels.packed.columns_pay` weighs it against.
Bytes beside the frozen product's own and rank space: forward T 3 d es, for route_shrink and the copy; backward
T (D + 3 d) es, for the grams and expand's dx_0 -> dx.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.expand import expand_backward
from kernels.gating import Gating
from kernels.grad_rank import grad_rank_given
from kernels.gram import gram_a, gram_b
from kernels.packed import Linear, Packed
from kernels.pool import Pool
from kernels.ranges import span
from kernels.route_shrink import route_shrink
from kernels.rows import TaskRows


def linear_reference(
    x: Tensor, linear: Linear, lora: tuple[Tensor, Tensor], routers: Tensor, rows: TaskRows, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, g, P): equation (10) beside the frozen ``linear``."""
    return reference.lora_moe(x, F.linear(x, *linear), lora, routers, rows, gating)


def linear_forward(
    x: Tensor, packed: Packed, routers: Tensor, rows: TaskRows, pool: Pool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y (T, D), g, P, H, z); x (T, d) in the type of ``packed``, routers (tasks, C, d) fp32."""
    inner = x.new_empty(len(x), packed.up.shape[1])
    with span("route"):
        h, z, g, p = route_shrink(x, packed.down[: pool.ranks], routers, inner[:, packed.inner :], rows, pool)
    with span("ffn"):
        inner[:, : packed.inner] = x
        y = F.linear(inner, packed.up, packed.bias_up)
    return y, g, p, h, z


def linear_backward(
    gradients: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor],
    packed: Packed,
    routers: Tensor,
    rows: TaskRows,
    pool: Pool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dB, dW), the last three fp32, from (dY, dP) and what the forward pass kept: (x, H, z)."""
    (dy, dp), (x, h, z) = gradients, saved
    grad = torch.mm(dy, packed.up)
    dh, dz, gated, peak = grad_rank_given(grad[:, packed.inner :], packed.held, h, z, dp, rows, pool)
    db = gram_b(dy, gated, rows, pool)
    da, drouters = gram_a(x, dh, dz, peak, rows, pool)
    dx = expand_backward(grad[:, : packed.inner], dh, dz, packed.down[: pool.ranks], routers, rows, pool)
    return dx, da, db, drouters
