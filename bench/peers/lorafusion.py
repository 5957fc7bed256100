"""LoRAFusion: plain LoRA in the GEMM's own loop, without routing. A bound, not a rival: it computes less.

Its LoRA stands beside a linear layer, so all N r ranks are one LoRA beside fc1.
"""

from torch import Tensor
from torch.nn import functional as F

from bench.peers.base import Forward, Peer
from fastmoe_lora import LoRAMoE


def _weights(layer: LoRAMoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """A (R, d) and B (4d, R), the layer's own B four times over."""
    b = layer.lora_B.to(x.dtype)
    return layer.lora_A.to(x.dtype), b.repeat(len(layer.base.get_parameter("fc1.weight")) // len(b), 1)


def lorafusion(layer: LoRAMoE) -> Forward:
    def forward(x: Tensor) -> Tensor:
        from lorafusion.ops.lora_v1 import FusedLinearLoRA

        weight, bias = layer.base.get_parameter("fc1.weight"), layer.base.get_parameter("fc1.bias")
        hidden = FusedLinearLoRA.apply(x, weight, *_weights(layer, x), 1.0, 0.0, 0, bias)
        return layer.base.get_submodule("fc2")(F.gelu(hidden))

    return forward


def lora_beside_fc1(layer: LoRAMoE) -> Forward:
    """What it must equal."""

    def forward(x: Tensor) -> Tensor:
        a, b = _weights(layer, x)
        fc1, fc2 = layer.base.get_submodule("fc1"), layer.base.get_submodule("fc2")
        return fc2(F.gelu(fc1(x) + (x @ a.T) @ b.T))

    return forward


PEERS = (
    Peer(
        "lorafusion",
        lorafusion,
        reference=lora_beside_fc1,
        package="lorafusion",
        install="pip install git+https://github.com/CentML/lorafusion",
        gpu=True,
        compiled=True,
    ),
)
