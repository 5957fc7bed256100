"""The FFN with LoRA experts, computed as the frozen GEMMs with a few more columns:

    u = x W1^T + b1
    y = [gelu(u) | H'] [W2 | B]^T + b2
    [da | dH'] = dY [W2 | B]
    dx = [du | dH | dz] [W1 ; A ; W_tasks]

dz is block-structured: C columns per task, zero elsewhere. The kernels write H', dH and dz next to the wide
activations, and B, A and the routers are packed next to the frozen weights (:mod:`kernels.packed`). The passes over
tokens that the experts add are route_shrink, two of weight_grad and a gate_backward over T x R matrices.
Four algorithms over the same packed weights; kernels/tables.json chooses one by measurement (bench.tune):

    columns     cuBLAS over all columns
    matmul      our GEMM computes y and dx; the routers are the last step of its sum for dx
    expand      cuBLAS over the frozen columns, then expand adds the experts in one pass over y, and over dx
    fused       as columns, but our GEMMs compute u and [da | dH'], with GELU in their epilogue

With stacked weights, [W1 ; A ; W_task] for each task, dz has C columns in all, and dx is one batched GEMM over the
tasks if they have equally many tokens. If they have not, columns and fused compute dx as matmul does.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import reference
from kernels.expand import expand, expand_backward
from kernels.gate_backward import gate_backward, gate_backward_inplace
from kernels.gating import Gating
from kernels.gelu import gelu, gelu_backward
from kernels.matmul import matmul, matmul_routed
from kernels.matmul_gelu import matmul_gelu, matmul_gelu_backward
from kernels.nvtx import span
from kernels.packed import Linear, Packed
from kernels.pool import Pool
from kernels.route_shrink import route_shrink
from kernels.segments import TaskSegments
from kernels.weight_grad import weight_grads

ALGORITHMS = ("columns", "matmul", "expand", "fused")


def ffn_reference(
    x: Tensor,
    linears: tuple[Linear, Linear],
    lora: tuple[Tensor, Tensor],
    routers: Tensor,
    segments: TaskSegments,
    gating: Gating,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, g, P) of equation (10), with the frozen FFN of ``linears`` (fc1, fc2) as base."""
    down, up = linears
    base = F.linear(F.gelu(F.linear(x, *down)), *up)
    return reference.lora_moe(x, base, lora, routers, segments, gating)


def ffn_forward(
    x: Tensor, packed: Packed, segments: TaskSegments, pool: Pool, algorithm: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y (T, D), g, P, H, z, u (T, F)) from x (T, d), in the type of ``packed``."""
    hidden, up = packed.hidden, packed.up
    inner = x.new_empty(len(x), up.shape[1])
    a = packed.first_down[hidden : hidden + pool.ranks]
    with span("route"):
        h, z, g, p = route_shrink(x, a, packed.routers, inner[:, hidden:], segments, pool)
    with span("ffn"):
        if algorithm == "fused":
            u = matmul_gelu(x, packed.first_down[:hidden], packed.bias_down, inner[:, :hidden], pool)
        else:
            u = F.linear(x, packed.first_down[:hidden], packed.bias_down)
            gelu(u, inner[:, :hidden])
        if algorithm == "matmul":
            y = matmul(inner, up.t(), packed.bias_up, segments, pool)
        elif algorithm == "expand":
            base = F.linear(inner[:, :hidden], up[:, :hidden], packed.bias_up)
            y = expand(base, inner[:, hidden:], up[:, hidden:], segments, pool)
        else:
            y = F.linear(inner, up, packed.bias_up)
    return y, g, p, h, z, u


def ffn_backward(
    gradients: tuple[Tensor, Tensor],
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    packed: Packed,
    routers: Tensor,
    segments: TaskSegments,
    pool: Pool,
    algorithm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dA, dB, dW), the last three fp32, from (dY, dP) and (x, u, H, z), which the forward pass saved."""
    (dy, dp), (x, u, h, z) = gradients, saved
    hidden, up, down = packed.hidden, packed.up, packed.first_down
    width = up.shape[1]  # F + R, padded
    equal_runs = len(set(segments.counts)) == 1
    one_product = algorithm in ("columns", "fused") and (equal_runs or not packed.stacked)
    grad = x.new_empty(len(x), len(down) if one_product else width)
    if algorithm == "fused":
        matmul_gelu_backward(dy, up, u, grad[:, :width], pool)
    else:
        columns = hidden if algorithm == "expand" else width
        torch.mm(dy, up[:, :columns], out=grad[:, :columns])
        gelu_backward(u, grad[:, :hidden])
    if algorithm == "expand":
        dh, dz, gated, peak = gate_backward(dy, up[:, hidden:], h, z, dp, segments, pool)
    else:
        dh, dz, gated, peak = gate_backward_inplace(grad[:, hidden:], packed.padded_ranks, h, z, dp, segments, pool)
    da, db, drouters = weight_grads((dy, x), (gated, dh), (dz, peak), segments, pool)
    if one_product and packed.stacked:
        dx = torch.bmm(grad.view(len(packed.down), segments.counts[0], len(down)), packed.down).flatten(0, 1)
    elif one_product:
        dx = torch.mm(grad, down)
    elif algorithm == "expand":
        base = torch.mm(grad[:, :hidden], down[:hidden])
        dx = expand_backward(base, dh, dz, down[hidden : hidden + pool.ranks], routers, segments, pool)
    else:
        dx = matmul_routed(grad, down[:width], dz, routers, segments, pool)
    return dx, da, db, drouters
