"""The interface of a peer, and the routing shared by peers that compute the selected experts only."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastmoe_lora import LoRAMoE, MoEConfig
from fastmoe_lora.layers import Adapter
from fastmoe_lora.routing import Batch, Routing
from kernels import TaskSegments, reference

Forward = Callable[[Tensor], Tensor]
Layer = Any  # an adapted FFN: an FFN that is a LoRAMoE too


def plain(layer: Layer) -> Forward:
    """The layer's function computed by the reference, whatever kernel the layer runs: a peer must agree with it."""

    def forward(x: Tensor) -> Tensor:
        lora = layer.lora_A, layer.lora_B
        gating, base = config_of(layer).gating, base_of(layer)(x)
        return reference.lora_moe(x, base, lora, layer.routers, rows_of(layer, x), gating)[0]

    return forward


@dataclass(frozen=True)
class Peer:
    """One implementation to compare with.

    ``build(layer)`` gives a function x (T, d) -> y (T, D) of the layer's parameters, whose gradients are those of the
    layer. ``reference(layer)`` gives the function that it must equal: the layer's, except where a peer computes less.
    ``install``: how to get the package. ``gpu``: it needs a GPU. ``compiled``: another compiler than Triton makes its
    kernels.
    """

    name: str
    build: Callable[[Layer], Forward]
    reference: Callable[[Layer], Forward] = plain
    package: str = ""
    install: str = ""
    gpu: bool = False
    compiled: bool = False

    @property
    def countable(self) -> bool:
        """Whether Triton's interpreter and PyTorch's dispatcher see all that it does."""
        there = not self.package or importlib.util.find_spec(self.package) is not None
        return there and not self.compiled

    def absent(self, device: torch.device) -> str:
        """Why it cannot run here; empty where it can."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"not installed ({self.install})"
        return "needs a GPU" if self.gpu and device.type != "cuda" else ""


def base_of(layer: Layer) -> Forward:
    """The frozen FFN's own forward pass, without experts."""
    return super(LoRAMoE, layer).forward


def parts_of(layer: Layer) -> tuple[Adapter, MoEConfig, Routing]:
    """The layer's only set of experts."""
    adapter = layer.adapters.sets[""]
    assert adapter.config is not None and adapter.routing is not None
    return adapter, adapter.config, adapter.routing


def config_of(layer: Layer) -> MoEConfig:
    return parts_of(layer)[1]


def batch_of(layer: Layer) -> Batch:
    """The open batch."""
    batch = parts_of(layer)[2].current()
    assert batch is not None
    return batch


def rows_of(layer: Layer, x: Tensor) -> TaskSegments:
    """The segments of x (T, d), all tokens of the open batch."""
    batch = batch_of(layer)
    return batch.segments(x.unflatten(0, (batch.size, -1)))[0]


def select(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The active experts of every token, (T, k + S) int64, and their gates, fp32: equations (6) to (9), torch.topk."""
    config = config_of(layer)
    gating, experts = config.gating, config.experts
    z = reference.router_logits(x, layer.routers, rows_of(layer, x))
    sparse = experts - gating.shared
    chosen = z[:, :sparse].topk(gating.k).indices
    shared = torch.arange(sparse, experts, device=x.device).expand(len(x), -1)
    active = torch.cat([chosen, shared], dim=1)
    if gating.name == "naive-shared":
        return active, torch.cat([z.softmax(-1).gather(1, chosen), torch.ones_like(shared, dtype=z.dtype)], dim=1)
    if gating.name == "topk":
        return active, z.softmax(-1).gather(1, chosen)
    return active, z.gather(1, active).softmax(-1)


def experts_of(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A (N, r, d) and B (N, D, r), expert by expert."""
    config = config_of(layer)
    experts, rank = config.experts, config.rank
    a = layer.lora_A.to(dtype).unflatten(0, (experts, rank))
    return a, layer.lora_B.to(dtype).unflatten(1, (experts, rank)).transpose(0, 1)


def pad_rank(a: Tensor, b: Tensor, multiple: int) -> tuple[Tensor, Tensor]:
    """A and B, padded with zeros to a rank that is a multiple of ``multiple``."""
    missing = -a.shape[1] % multiple
    return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
