"""The operation, whichever implementation runs it."""

from torch import Tensor

from kernels import reference
from kernels.backend import resolve
from kernels.gating import Gating
from kernels.packed import Packed
from kernels.rows import TaskRows


def lora_moe(
    x: Tensor,
    base: Tensor,
    lora: tuple[Tensor, Tensor],
    routers: Tensor,
    rows: TaskRows,
    gating: Gating,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D) = base + sum_e g_e B_e A_e x, the gates g (T, N) and P (tasks, C); see :mod:`kernels.reference`.

    x (T, d) and base (T, D) share a floating type, ``lora`` is (A (R, d), B (D, R)), ``routers`` (tasks, C, d); the
    parameters may be fp32 masters. UserError where ``kernel="triton"`` cannot run.
    """
    if resolve(kernel, x.device) == "reference":
        return reference.lora_moe(x, base, lora, routers, rows, gating)
    from kernels import operators  # imports Triton, which not every machine has

    return operators.lora_moe(x, base, lora, routers, rows, gating)


def lora_moe_packed(
    x: Tensor, packed: Packed, lora: tuple[Tensor, Tensor], routers: Tensor, rows: TaskRows, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """The same beside the FFN or the linear layer in ``packed``, by the Triton kernels: y, g and P of
    :func:`kernels.ffn.ffn_reference` or :func:`kernels.linear.linear_reference`. ``packed`` holds the newest values
    of ``lora`` and ``routers``, in x's type."""
    from kernels import operators

    return operators.lora_moe_packed(x, packed, lora, routers, rows, gating)
