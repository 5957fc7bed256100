"""One linear layer with LoRA experts, computed as a wider GEMM:

    y = [x | H'] [W | B]^T + b
    [dx_0 | dH'] = dY [W | B]
    dx = dx_0 + dH A + dz W_task

x is copied into the buffer [x | H'], whose last columns route_shrink writes. dH overwrites dH'. The copy costs less
than a separate pass over y if D > d (:func:`kernels.packed.columns_pay`).
Bytes beyond the frozen GEMM and beyond T x R matrices: forward T 3 d es (route_shrink and the copy); backward T (D + 3
d) es (weight_grad reads dY and x, expand reads dx_0 and writes dx).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.expand import expand_backward
from kernels.gate_backward import gate_backward_inplace
from kernels.gating import Gating
from kernels.nvtx import span
from kernels.packed import Linear, Packed
from kernels.pool import Pool
from kernels.route_shrink import route_shrink
from kernels.segments import TaskSegments
from kernels.weight_grad import weight_grads


def linear_reference(
    x: Tensor, linear: Linear, lora: tuple[Tensor, Tensor], routers: Tensor, segments: TaskSegments, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, g, P) of equation (10), with the frozen ``linear`` as base."""
    return reference.lora_moe(x, F.linear(x, *linear), lora, routers, segments, gating)


def linear_forward(
    x: Tensor, packed: Packed, segments: TaskSegments, pool: Pool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y (T, D), g, P, H, z); x (T, d) in the type of ``packed``."""
    inner = x.new_empty(len(x), packed.up.shape[1])
    with span("route"):
        h, z, g, p = route_shrink(
            x, packed.down[: pool.ranks], packed.routers, inner[:, packed.inner :], segments, pool
        )
    with span("ffn"):
        inner[:, : packed.inner] = x
        y = F.linear(inner, packed.up, packed.bias_up)
    return y, g, p, h, z


def linear_backward(
    gradients: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor],
    packed: Packed,
    routers: Tensor,
    segments: TaskSegments,
    pool: Pool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dB, dW), the last three fp32, from (dY, dP) and (x, H, z), which the forward pass saved."""
    (dy, dp), (x, h, z) = gradients, saved
    grad = torch.mm(dy, packed.up)
    dh, dz, gated, peak = gate_backward_inplace(grad[:, packed.inner :], packed.padded_ranks, h, z, dp, segments, pool)
    da, db, drouters = weight_grads((dy, x), (gated, dh), (dz, peak), segments, pool)
    dx = expand_backward(grad[:, : packed.inner], dh, dz, packed.down[: pool.ranks], routers, segments, pool)
    return dx, da, db, drouters
