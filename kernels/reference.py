"""The reference: LoRA mixture-of-experts as the paper writes it (ASE, arXiv 2510.00570), dense over the experts.

Notation: T tokens of all tasks, task-major; N experts of rank r, the last S of them shared; R = N*r; expert e
owns rows e*r .. (e+1)*r of A and the same columns of B; C router columns, N or N - S.

    H  = x A^T                                   (T, R)   every expert's down-projection, equation (4)
    z  = x W_task^T                              (T, C)   router logits, equations (6) and (7)
    g  = gates(z)                                (T, N)   0 where an expert is inactive, equations (8) and (9)
    y  = base + (H * expand_r(g)) B^T            (T, D)   equation (10)

Logits, softmax and gates are fp32 (fp64 for fp64 inputs) whatever the type of x. With N*r of 64 the whole pool
is one 64-column matrix, so nothing is sorted or gathered: an inactive expert is a zero gate.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gating import Gating
from kernels.rows import TaskRows


def router_logits(x: Tensor, routers: Tensor, rows: TaskRows) -> Tensor:
    """z (T, C) in at least fp32: each task's rows of x (T, d) meet that task's router of ``routers`` (tasks, C, d)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    runs = x.to(exact).split(rows.counts)
    return torch.cat([F.linear(run, router.to(exact)) for run, router in zip(runs, routers, strict=True)])


def top_k_mask(z: Tensor, k: int) -> Tensor:
    """True at the k largest of each row of z (T, C); of equal logits the lowest index wins (torch.topk picks any)."""
    largest = z.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(z, dtype=torch.bool).scatter_(-1, largest, True)


def gates(z: Tensor, gating: Gating) -> Tensor:
    """g (T, N) from the logits z (T, C); exactly 0 at experts that are not active for a token."""
    shared = gating.shared
    sparse = z.shape[1] if gating.name == "naive-shared" else z.shape[1] - shared
    selected = top_k_mask(z[:, :sparse].detach(), gating.k)
    if gating.name == "topk":
        return z.softmax(-1) * selected
    if gating.name == "naive-shared":
        return torch.cat([z.softmax(-1) * selected, z.new_ones(len(z), shared)], dim=-1)
    active = F.pad(selected, (0, shared), value=True)
    return z.masked_fill(~active, -torch.inf).softmax(-1)


def mean_probs(z: Tensor, rows: TaskRows) -> Tensor:
    """P (tasks, C): mean over a task's tokens of softmax(z) before the top-k; 0 for a task without tokens.

    This is p(expert given task), all that the mutual-information loss needs.
    """
    runs = z.softmax(-1).split(rows.counts)
    return torch.stack([run.sum(0) / max(len(run), 1) for run in runs])


def lora_moe(
    x: Tensor, base: Tensor, lora: tuple[Tensor, Tensor], routers: Tensor, rows: TaskRows, gating: Gating
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D) = base + sum_e g_e B_e A_e x, with the gates g (T, N) and P (tasks, C).

    x (T, d) and base (T, D) share a floating type; ``lora`` is (A (R, d), B (D, R)); A, B and the routers
    may be kept in a wider type and are cast to x's.
    """
    a, b = (weight.to(x.dtype) for weight in lora)
    z = router_logits(x, routers, rows)
    g = gates(z, gating)
    hidden = F.linear(x, a)
    gated = (hidden * g.repeat_interleave(a.shape[0] // g.shape[1], dim=-1)).to(x.dtype)
    return torch.addmm(base, gated, b.t()), g, mean_probs(z, rows)
