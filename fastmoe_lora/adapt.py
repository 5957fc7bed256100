"""Adapting a ViT in place: LoRA-MoE at one site of every block, plain LoRA on its linear layers."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastmoe_lora.config import MoEConfig
from fastmoe_lora.layers import LoRALinear, LoRAMoE
from fastmoe_lora.routing import Routing
from kernels import UserError

SITES = {"ffn": "mlp", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
LORA_TARGETS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}


def _look_up(name: str, table: dict[str, str], what: str) -> str:
    if name not in table:
        raise UserError(f"unknown {what} {name!r}: choose among {', '.join(table)}")
    return table[name]


def _site_shape(site: Any) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer or of an FFN with fc1 and fc2."""
    if isinstance(site, nn.Linear):
        return site.in_features, site.out_features
    return site.fc1.in_features, site.fc2.out_features


def add_lora(vit: nn.Module, rank: int, targets: Sequence[str] = ("qkv", "proj")) -> None:
    """Put LoRA of ``rank`` on the named linear layers of every block."""
    for block in vit.get_submodule("blocks").children():
        for target in targets:
            path = _look_up(target, LORA_TARGETS, "LoRA target")
            linear: Any = block.get_submodule(path)
            block.set_submodule(path, LoRALinear(linear, rank))


def add_moe(vit: nn.Module, config: MoEConfig, tasks: int, site: str = "ffn", kernel: str = "auto") -> Routing:
    """Put a LoRA-MoE around ``site`` of every block: ``ffn`` (the whole FFN), ``fc1`` or ``fc2``."""
    path = _look_up(site, SITES, "site")
    routing = Routing(tasks, kernel)
    for layer, block in enumerate(vit.get_submodule("blocks").children()):
        base = block.get_submodule(path)
        block.set_submodule(path, LoRAMoE(base, _site_shape(base), config, routing, layer))
    return routing


def adapt(
    vit: nn.Module, config: MoEConfig, tasks: int, site: str = "ffn", lora_rank: int = 4, kernel: str = "auto"
) -> Routing:
    """Freeze ``vit`` and adapt it in place for ``tasks`` tasks; only the adapters are left trainable.

    Works on any ViT whose ``blocks`` have timm's names (``attn.qkv``, ``attn.proj``, ``mlp.fc1``, ``mlp.fc2``).
    Before a forward pass, ``routing.assign([8, 8, ...])`` says how many images of the task-major batch belong
    to each task; after it ``routing.mi_loss()`` is the regulariser to add, times 0.005.
    """
    vit.requires_grad_(False)
    if lora_rank:
        add_lora(vit, lora_rank)
    return add_moe(vit, config, tasks, site, kernel)
