"""lora_linear: plain LoRA on a frozen linear layer, y = W x + b + B A x, as one operator of PyTorch GEMMs.

Two algorithms over the same packed weights; :func:`kernels.packed.columns_pay` chooses by the layer's widths:

    columns     y = [x | H] [W | B]^T + b                       D > d: copies x, adds no pass over y
                [dx_0 | dH] = dy [W | B]
    add         y = x W^T + b, then y += H B^T                  else: reads and writes y once more
                dx_0 = dy W,  dH = dy B

with H = x A^T, and in both dx = dx_0 + dH A, dA = dH^T x, dB = dy^T H.
Saved for backward: [x | H] (columns), or x and H (add).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.eager import differentiable
from kernels.packed import Linear, Packed, columns_pay


def lora_linear_reference(x: Tensor, linear: Linear, lora: tuple[Tensor, Tensor]) -> Tensor:
    """y (.., D) of x (.., d); ``linear`` is (W (D, d), b (D,) or None), ``lora`` is (A (r, d), B (D, r)).

    A and B may have a wider type and are cast to that of x.
    """
    a, b = (weight.to(x.dtype) for weight in lora)
    return F.linear(x, *linear) + F.linear(F.linear(x, a), b)


def _widened(x: Tensor, up: Tensor) -> bool:
    return columns_pay(x.shape[1], len(up))


@torch.library.custom_op("fastmoe_lora::lora_linear", mutates_args=())
def lora_linear_op(x: Tensor, a: Tensor, b: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(y, [x | H] or H). A and B are read from ``down`` and ``up``; as arguments they receive gradients."""
    d = x.shape[1]
    if _widened(x, up):
        inner = x.new_empty(len(x), up.shape[1])
        inner[:, :d] = x
        torch.mm(x, down.t(), out=inner[:, d:])
        return F.linear(inner, up, bias), inner
    h = F.linear(x, down)
    return F.linear(x, up[:, :d], bias).addmm_(h, up[:, d:].t()), h


@lora_linear_op.register_fake
def _(x, a, b, up, down, bias):
    return x.new_empty(len(x), len(up)), x.new_empty(len(x), up.shape[1] if _widened(x, up) else len(down))


@torch.library.custom_op("fastmoe_lora::lora_linear_backward", mutates_args=())
def lora_linear_backward_op(
    dy: Tensor, x: Tensor, h: Tensor, a: Tensor, b: Tensor, up: Tensor, down: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB), the last two in the types of A and B; x (T, d) and h (T, r padded) may be columns of [x | H]."""
    d, rank = x.shape[1], len(a)
    if _widened(x, up):
        grad = torch.mm(dy, up)
        dx, dh = grad[:, :d], grad[:, d:]
    else:
        dx, dh = torch.mm(dy, up[:, :d]), torch.mm(dy, up[:, d:])
    da, db = torch.mm(dh.t(), x)[:rank], torch.mm(dy.t(), h)[:, :rank]
    return dx.addmm_(dh, down), da.to(a.dtype), db.to(b.dtype).contiguous()


@lora_linear_backward_op.register_fake
def _(dy, x, h, a, b, up, down):
    width = up.shape[1] if _widened(x, up) else x.shape[1]
    return x.new_empty(len(x), width)[:, : x.shape[1]], torch.empty_like(a), torch.empty_like(b)


def _save(ctx, inputs, output):
    x, a, b, up, down, _ = inputs
    h = output[1]
    # Not saved tensors: another pass may pack the same values once more before this one's backward.
    ctx.packed, ctx.columns = (up, down), x.shape[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((h,) if _widened(x, up) else (x, h)), a, b)
    ctx.mark_non_differentiable(h)


def _backward(run, ctx, dy, _):
    if dy is None:
        return (None,) * 6
    *tokens, a, b = ctx.saved_tensors
    x, h = tokens if len(tokens) == 2 else tokens[0].tensor_split([ctx.columns], dim=1)
    gradients = run(dy, x, h, a, b, *ctx.packed)
    return *gradients, None, None, None


_lora_linear = differentiable(lora_linear_op, lora_linear_backward_op, _save, _backward)


def lora_linear(x: Tensor, packed: Packed, lora: tuple[Tensor, Tensor]) -> Tensor:
    """y (T, D) of x (T, d), as :func:`lora_linear_reference`; differentiable in x and ``lora``.

    ``packed`` holds the frozen layer and the newest values of ``lora``, in x's type, which is any floating type.
    """
    return _lora_linear(x, *lora, packed.up, packed.down, packed.bias_up)[0]
