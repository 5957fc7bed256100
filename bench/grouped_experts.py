"""Our layer with its experts computed by kernels/grouped beside the frozen base, whatever the pool."""

from typing import Any

import torch
from torch import Tensor

from bench.peers.base import Forward, rows_of
from fastmoe_lora import LoRAMoE
from kernels.experts import Experts
from kernels.reference import gates, router_logits
from kernels.segments import TaskSegments


class GroupedExperts(torch.autograd.Function):
    """y of x, base, A (R, d), B (D, R) and the gates g (T, N)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: Tensor, a: Tensor, b: Tensor, g: Tensor, segments: TaskSegments, slots: int
    ) -> Tensor:
        from kernels.grouped.operation import grouped_forward  # imports Triton, which not every machine has

        y, u, ctx.order = grouped_forward(x, base[None], Experts(a[None], b[None]), g[None], segments, slots)
        ctx.save_for_backward(x, a, b, g, u)
        return y[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from kernels.grouped.operation import grouped_backward

        x, a, b, g, u = ctx.saved_tensors
        given = grouped_backward(dy[None], x, u, Experts(a[None], b[None]), g[None], ctx.order)
        return given.x, dy, given.down[0].to(a.dtype), given.up[0].to(b.dtype), given.g[0], None, None


def grouped(layer: LoRAMoE) -> Forward:
    gating = layer.config.gating

    def forward(x: Tensor) -> Tensor:
        segments = rows_of(layer, x)
        g = gates(router_logits(x, layer.routers, segments), gating)
        a, b = layer.lora_A.to(x.dtype), layer.lora_B.to(x.dtype)
        return GroupedExperts.apply(x, layer.base(x), a, b, g, segments, gating.k + gating.shared)

    return forward
