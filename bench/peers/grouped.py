"""Peers that sort tokens by expert and run two grouped GEMMs: PyTorch's, or QuACK's, which SonicMoE uses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers.base import Forward, Layer, Peer, base_of, config_of, experts_of, pad_rank, select

Product = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows sorted by expert (M, K), weights (N, K, J), ends (N,)


def sorted_experts(product: Product, layer: Layer) -> Forward:
    """Gather the tokens expert by expert, shrink, weigh by the gates, expand, and add back."""

    def forward(x: Tensor) -> Tensor:
        active, weights = select(layer, x)
        a, b = pad_rank(*experts_of(layer, x.dtype), multiple=8)
        order = active.flatten().argsort(stable=True)
        token = order // active.shape[1]
        ends = torch.bincount(active.flatten(), minlength=config_of(layer).experts).cumsum(0).to(torch.int32)
        hidden = product(x[token], a.transpose(1, 2), ends) * weights.flatten()[order].to(x.dtype)[:, None]
        return base_of(layer)(x).index_add(0, token, product(hidden, b.transpose(1, 2), ends))

    return forward


def torch_grouped(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(x, weights, offs=ends)


class QuackGrouped(torch.autograd.Function):
    """Autograd for QuACK's variable-length GEMMs, which have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
        from quack.gemm_interface import gemm

        starts = F.pad(ends, (1, 0))
        ctx.save_for_backward(x, weights, starts)
        return gemm(x, weights, cu_seqlens_m=starts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        from quack.gemm_interface import gemm

        x, weights, starts = ctx.saved_tensors
        dy = dy.contiguous()
        dx = gemm(dy, weights.transpose(1, 2), cu_seqlens_m=starts)
        return dx, gemm(x.T, dy, cu_seqlens_k=starts), None


PEERS = (
    Peer("grouped-mm", partial(sorted_experts, torch_grouped)),
    Peer(
        "quack",
        partial(sorted_experts, QuackGrouped.apply),
        package="quack",
        install="pip install quack-kernels",
        gpu=True,
        compiled=True,
    ),
)
