"""LoRAFusion: plain LoRA fused into the GEMM, without routing. It computes less than the layer, so it is a bound.

It adapts a single linear layer, so all N r ranks form one LoRA on fc1.
"""

from torch import Tensor
from torch.nn import functional as F

from bench.peers.base import Forward, Layer, Peer


def _weights(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """A (R, d) and B (4d, R), the layer's B repeated four times."""
    b = layer.lora_B.to(x.dtype)
    return layer.lora_A.to(x.dtype), b.repeat(len(layer.fc1.weight) // len(b), 1)


def lorafusion(layer: Layer) -> Forward:
    def forward(x: Tensor) -> Tensor:
        from lorafusion.ops.lora_v1 import FusedLinearLoRA

        hidden = FusedLinearLoRA.apply(x, layer.fc1.weight, *_weights(layer, x), 1.0, 0.0, 0, layer.fc1.bias)
        return layer.fc2(F.gelu(hidden))

    return forward


def lora_beside_fc1(layer: Layer) -> Forward:
    """The function that :func:`lorafusion` must equal."""

    def forward(x: Tensor) -> Tensor:
        a, b = _weights(layer, x)
        return layer.fc2(F.gelu(layer.fc1(x) + (x @ a.T) @ b.T))

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
