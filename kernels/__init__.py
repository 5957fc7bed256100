"""Pure functions on tensors: each Triton kernel beside its PyTorch reference."""

from kernels.dispatch import KERNELS, expert_mixture, lora_moe, resolve_kernel
from kernels.errors import UserError
from kernels.experts.reference import Experts
from kernels.gating import GATINGS, Gating
from kernels.segments import TaskSegments

# Hugging Face has a package called `kernels` too; fastmoe_lora tells them apart by this name.
FASTMOE_LORA = True

__all__ = [
    "FASTMOE_LORA",
    "GATINGS",
    "KERNELS",
    "Experts",
    "Gating",
    "TaskSegments",
    "UserError",
    "expert_mixture",
    "lora_moe",
    "resolve_kernel",
]
