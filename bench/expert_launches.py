"""Every launch of kernels/experts on random tensors, for programs that compile them one by one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.experts.gate import gate, gate_backward
from kernels.experts.route import route, route_backward
from kernels.gating import Pool
from kernels.segments import TaskSegments

Tensors = dict[str, Any]
# A pool of LoRA beyond one register tile, and slices of an MLP narrower and wider than a program's tile.
EXPERT_POOLS = ("64/12/4/16", "16/3/1/96", "8/1/1/384")
EXPERT_LAUNCHES: dict[str, Callable[[Tensors, TaskSegments, Pool], object]] = {
    "experts_route": lambda t, segments, pool: route(t["z"], segments, pool),
    "experts_route_backward": lambda t, segments, pool: route_backward(t["z"], t["g"], t["g"], t["dp"], segments, pool),
    "experts_gate": lambda t, segments, pool: gate(t["u"], t["g"], "gelu", True),
    "experts_gate_backward": lambda t, segments, pool: gate_backward(t["u"], t["g"], t["gated"], "gelu", True),
}


def make_expert_tensors(pool: Pool, counts: tuple[int, ...], width: int, like: Tensor) -> Tensors:
    """Random inputs of all launches, with two gates per token; ``like`` gives the dtype and the device."""
    readers, tokens = 2, sum(counts)

    def full(*shape: int) -> Tensor:
        return torch.randn(shape, device=like.device)

    return {
        "z": full(readers, tokens, pool.columns),
        "g": full(readers, tokens, pool.experts),
        "dp": full(readers, len(counts), pool.columns),
        "u": full(tokens, pool.ranks).to(like.dtype),
        "gated": full(readers, tokens, pool.ranks + pool.experts).to(like.dtype),
    }
