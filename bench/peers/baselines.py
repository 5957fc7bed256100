"""Peers of plain PyTorch: dense with a mask, the same compiled, a loop over experts, an einsum over all of them."""

import torch
from torch import Tensor

from bench.peers.base import Forward, Layer, Peer, base_of, config_of, experts_of, plain, rows_of, select
from kernels.reference import gates, router_logits


def compiled(layer: Layer) -> Forward:
    """The reference under torch.compile, which fuses the operations between the GEMMs."""
    return torch.compile(plain(layer))


def loop(layer: Layer) -> Forward:
    """Expert by expert, over the tokens that selected it (MixLoRA)."""

    def forward(x: Tensor) -> Tensor:
        active, weights = select(layer, x)
        a, b = experts_of(layer, x.dtype)
        y = base_of(layer)(x)
        for expert in range(config_of(layer).experts):
            token, place = torch.where(active == expert)
            gate = weights[token, place].to(x.dtype)[:, None]
            y = y.index_add(0, token, (x[token] @ a[expert].T) @ b[expert].T * gate)
        return y

    return forward


def einsum(layer: Layer) -> Forward:
    """All experts' outputs, then their weighted sum (PEFT's arrow)."""

    def forward(x: Tensor) -> Tensor:
        g = gates(router_logits(x, layer.routers, rows_of(layer, x)), config_of(layer).gating).to(x.dtype)
        a, b = experts_of(layer, x.dtype)
        outputs = torch.einsum("tnr,nor->tno", torch.einsum("td,nrd->tnr", x, a), b)
        return base_of(layer)(x) + torch.einsum("tno,tn->to", outputs, g)

    return forward


PEERS = (
    Peer("dense", plain),  # our reference: every expert for every token, gate 0 where inactive
    Peer("dense-compiled", compiled, compiled=True),
    Peer("expert-loop", loop),
    Peer("arrow-einsum", einsum),
)
