"""Pure functions on tensors: each operation with its PyTorch reference and its Triton kernel side by side."""

from kernels.backend import KERNELS, resolve
from kernels.errors import UserError
from kernels.gating import GATINGS, Gating
from kernels.operation import lora_moe, lora_moe_packed
from kernels.rows import TaskRows

# A package of Hugging Face is called `kernels` too; fastmoe_lora tells them apart by this name.
FASTMOE_LORA = True

__all__ = [
    "FASTMOE_LORA",
    "GATINGS",
    "KERNELS",
    "Gating",
    "TaskRows",
    "UserError",
    "lora_moe",
    "lora_moe_packed",
    "resolve",
]
