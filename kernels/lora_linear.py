"""lora_linear: plain LoRA on a frozen linear layer, y = W x + b + B A x, as one operator of PyTorch GEMMs.

Two algorithms; :func:`columns_pay` chooses by the layer's widths:

    columns     y = [x | H] [W | B]^T + b                       D > d: copies x, adds no pass over y
                [dx_0 | dH] = dy [W | B]
    add         y = x W^T + b, then y += H B^T                  else: reads and writes y once more
                dx_0 = dy W,  dH = dy B

with H = x A^T, and in both dx = dx_0 + dH A, dA = dH^T x, dB = dy^T H. [W | B] is made in each pass.
Saved for backward beside the parameters: [x | H] (columns), or x and H (add).
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.reference import Linear
from kernels.vmap import is_batched, looped


def columns_pay(d: int, width: int) -> bool:
    """True if widening the GEMM of a linear layer d -> width is cheaper than adding LoRA to its output.

    Widening copies x (2 T d elements); a separate add reads and writes y (2 T D): fc1 yes, fc2 no.
    """
    return width > d


def lora_linear_reference(x: Tensor, linear: Linear, lora: tuple[Tensor, Tensor]) -> Tensor:
    """y (.., D) of x (.., d); ``linear`` is (W (D, d), b (D,) or None), ``lora`` is (A (r, d), B (D, r)).

    A and B may have a wider type and are cast to that of x.
    """
    a, b = (weight.to(x.dtype) for weight in lora)
    return F.linear(x, *linear) + F.linear(F.linear(x, a), b)


def forward(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(y, [x | H] or H) of x (T, d)."""
    (width, d), rank = w.shape, a.shape[0]
    w, a, b = w.to(x.dtype), a.to(x.dtype), b.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if columns_pay(d, width):
        inner = x.new_empty(x.shape[0], d + rank)
        inner[:, :d] = x
        torch.mm(x, a.t(), out=inner[:, d:])
        return F.linear(inner, torch.cat([w, b], 1), bias), inner
    h = F.linear(x, a)
    return F.linear(x, w, bias).addmm_(h, b.t()), h


def backward(
    dy: Tensor, x: Tensor, h: Tensor, w: Tensor, a: Tensor, b: Tensor, needs_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dA, dB), the last two in the types of A and B; x (T, d) and h (T, r) may be columns of [x | H]. dx is empty
    unless it is needed."""
    (width, d), small, up = w.shape, a.to(x.dtype), b.to(x.dtype)
    if not needs_dx:
        dx, dh = x.new_empty(0), torch.mm(dy, up)
    elif columns_pay(d, width):
        grad = torch.mm(dy, torch.cat([w.to(x.dtype), up], 1))
        dh = grad[:, d:]
        dx = torch.addmm(grad[:, :d], dh, small)
    else:
        dh = torch.mm(dy, up)
        dx = torch.mm(dy, w.to(x.dtype)).addmm_(dh, small)
    return dx, torch.mm(dh.t(), x).to(a.dtype), torch.mm(dy.t(), h).to(b.dtype)


forward_op = torch.library.custom_op("fastmoe_lora::lora_linear", forward, mutates_args=())
backward_op = torch.library.custom_op("fastmoe_lora::lora_linear_backward", backward, mutates_args=())


@forward_op.register_fake
def _(x, w, bias, a, b):
    (width, d), rank = w.shape, a.shape[0]
    return x.new_empty(x.shape[0], width), x.new_empty(x.shape[0], d + rank if columns_pay(d, width) else rank)


@backward_op.register_fake
def _(dy, x, h, w, a, b, needs_dx):
    dx = x.new_empty(x.shape) if needs_dx else x.new_empty(0)
    return dx, a.new_empty(a.shape), b.new_empty(b.shape)


backward_op.register_vmap(looped(backward_op))


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, a, b):
        run = forward_op if torch.compiler.is_compiling() else forward
        y, h = run(x, w, bias, a, b)
        ctx.save_for_backward(None if columns_pay(w.shape[1], w.shape[0]) else x, h, w, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, h, w, a, b = ctx.saved_tensors
        if x is None:
            x, h = h[:, : w.shape[1]], h[:, w.shape[1] :]
        rest = x, h, w, a, b, ctx.needs_input_grad[0]
        as_op = torch.compiler.is_compiling() or is_batched(dy)
        dx, da, db = (backward_op if as_op else backward)(dy, *rest)
        return dx if ctx.needs_input_grad[0] else None, None, None, da, db


def lora_linear(x: Tensor, linear: Linear, lora: tuple[Tensor, Tensor]) -> Tensor:
    """y (T, D) of x (T, d), as :func:`lora_linear_reference`; differentiable in x and ``lora``, not in ``linear``.

    x has any floating type, to which the weights are cast in the pass; autocast casts x too.
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return lora_linear(x.to(torch.get_autocast_dtype(kind)), linear, lora)
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return _LoRALinear.apply(x, *linear, *lora)
    return forward(x, *linear, *lora)[0]
