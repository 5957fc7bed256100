"""LoRA mixture-of-experts with adaptive shared experts for multi-task vision transformers."""

import kernels

if not getattr(kernels, "FASTMOE_LORA", False):
    raise ImportError(
        f"{kernels.__file__} hides the package kernels of fastmoe_lora: rename it; if it is Hugging Face's kernels, "
        "uninstall that, then reinstall fastmoe_lora"
    )

from fastmoe_lora.adapt import (
    adapt,
    adapters_off,
    merge,
    parameter_groups,
    print_trainable_parameters,
    remove,
    routing_of,
    use_adapters,
)
from fastmoe_lora.config import MoEConfig
from fastmoe_lora.files import load_adapters, save_adapters
from fastmoe_lora.layers import LoRALinear, LoRAMoE
from fastmoe_lora.routing import Batch, Routing, RoutingStatistics, mutual_information_loss

__all__ = [
    "Batch",
    "LoRALinear",
    "LoRAMoE",
    "MoEConfig",
    "Routing",
    "RoutingStatistics",
    "adapt",
    "adapters_off",
    "load_adapters",
    "merge",
    "mutual_information_loss",
    "parameter_groups",
    "print_trainable_parameters",
    "remove",
    "routing_of",
    "save_adapters",
    "use_adapters",
]
