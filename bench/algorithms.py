"""Our layer with each algorithm of the fused FFN and of large pools, whichever of them the layer chooses itself."""

import importlib.util
from functools import partial

from torch import Tensor

from bench.peers.base import Forward, Layer, Peer, base_of, config_of, rows_of
from fastmoe_lora.layers import frozen_weights
from kernels import Experts, expert_mixture
from kernels.reference import router_logits


def run(algorithm: str, layer: Layer) -> Forward:
    from kernels.custom_ops import lora_moe  # imports Triton, which not every machine has

    def forward(x: Tensor) -> Tensor:
        base, lora, gating = frozen_weights(layer), (layer.lora_A, layer.lora_B), config_of(layer).gating
        assert base is not None
        return lora_moe(x, base, lora, layer.routers, rows_of(layer, x), gating, algorithm=algorithm)[0]

    return forward


def grouped(layer: Layer) -> Forward:
    """The experts beside the frozen base, sorted by expert whatever the pool."""

    def forward(x: Tensor) -> Tensor:
        segments, gating = rows_of(layer, x), config_of(layer).gating
        z = router_logits(x, layer.routers, segments)
        experts = Experts(layer.lora_A[None], layer.lora_B[None])
        return expert_mixture(x, base_of(layer)(x), experts, z, segments, gating, "triton", "grouped")[0]

    return forward


GROUPED = Peer("ours-grouped", grouped, package="triton", install="its wheels are for Linux", gpu=True)


def subjects() -> dict[str, Peer]:
    """One row of benchmarks for each algorithm; none without Triton."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from kernels.custom_ops import ALGORITHMS

    return {f"ours-{name}": Peer(f"ours-{name}", partial(run, name), gpu=True) for name in ALGORITHMS}
