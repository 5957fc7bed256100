"""How custom operators run in eager mode: their Python bodies in an autograd.Function.

torch.library's dispatch and autograd cost the host about as much as the operator's own launches. Compiled code calls
the operator itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef
from torch.autograd.function import once_differentiable


def differentiable(
    op: CustomOpDef, backward_op: CustomOpDef, save: Callable[..., None], backward: Callable[..., tuple]
) -> Callable[..., Any]:
    """Register the autograd of ``op`` and return a function that calls it.

    ``save(ctx, inputs, output)`` is torch.library's setup_context; ``backward(run, ctx, *gradients)`` calls ``run`` for
    ``backward_op``.
    """
    op.register_autograd(lambda ctx, *gradients: backward(backward_op, ctx, *gradients), setup_context=save)
    body, backward_body = op._init_fn, backward_op._init_fn

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = body(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, *gradients):
            return backward(backward_body, ctx, *gradients)

    def call(*inputs):
        if torch.compiler.is_compiling():
            return op(*inputs)
        return Eager.apply(*inputs) if torch.is_grad_enabled() else body(*inputs)

    return call
