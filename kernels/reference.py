"""The reference: LoRA mixture-of-experts as the paper writes it (ASE, arXiv 2510.00570), dense over the experts.

    H  = x A^T                       (T, R)   the down-projection of every expert, equation (4)
    z  = x W_task^T                  (T, C)   router logits, equations (6) and (7)
    g  = gates(z)                    (T, N)   0 where an expert is inactive, equations (8) and (9)
    H' = H * per_rank(g)             (T, R)   each gate repeated r times, once per row of its expert
    y  = base + H' B^T               (T, D)   equation (10)

Logits, softmax and gates are fp32 (fp64 for fp64 inputs) whatever the type of x. At N r = 64 the whole pool is one
64-column matrix, so no token is sorted or gathered: an inactive expert has gate 0.

Symbols, the same in every file of kernels/ and fastmoe_lora/:

    T       tokens of all tasks, task-major: the tokens of a task are consecutive rows
    d, D    width of the layer's input x and output y
    F       width between fc1 and fc2 of an FFN
    N, S    experts; shared ones, which are the last S of them and always active
    k       sparse experts that are selected per token
    r, R    rank of an expert; R = N r. Expert e owns rows e r .. (e + 1) r of A and the same columns of B
    C       logits per token: N, or N - S where a shared expert has no logit (naive-shared)
    A, B    down-projections (R, d) and up-projections (D, R) of all experts; W_task the router (C, d) of a task
    H, H'   x A^T before and after the gates (T, R)
    z, g    logits (T, C) and gates (T, N)
    P       (tasks, C): mean of softmax(z) over a task's tokens, p(expert given task) of the mutual-information loss
    dX      gradient of the loss with respect to X: dy, dH, dH' = dy B, dz, dA, dB, dW
    u, a    input and output of the FFN's GELU (T, F)
    es      bytes of one element of x
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import nvtx
from kernels.gating import Gating
from kernels.segments import TaskSegments

Linear = tuple[Tensor, Tensor | None]  # weight (out, in) and bias (out,)


def router_logits(x: Tensor, routers: Tensor, segments: TaskSegments) -> Tensor:
    """z (T, C) in at least fp32: the rows of x (T, d) of each task times that task's router of (tasks, C, d)."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x, routers = x.to(exact), routers.to(exact)
    if segments.counts is None:  # in a compiled pass: every router for every row, of which one is picked
        task = segments.task_of_rows(len(x)).view(-1, 1, 1).expand(-1, 1, routers.shape[1])
        return F.linear(x, routers.flatten(0, 1)).unflatten(1, routers.shape[:2]).gather(1, task).squeeze(1)
    counts = segments.counts
    if all(count == counts[0] for count in counts):
        return torch.bmm(x.unflatten(0, (len(counts), counts[0])), routers.mT).flatten(0, 1)
    return torch.cat([F.linear(run, router) for run, router in zip(x.split(counts), routers, strict=True)])


def log_mask(z: Tensor, k: int, shared: int = 0) -> Tensor:
    """log m (T, C), where m is 1 at the k largest of each row of z (T, C) and at its last ``shared`` columns, else 0.

    The k are chosen among the other columns. Of equal logits the lowest index wins; NaN counts as the largest.
    """
    sparse = z.shape[1] - shared
    log_m = torch.zeros_like(z)
    log_m[:, :sparse] = -torch.inf
    rest = z[:, :sparse].clamp_min(torch.finfo(z.dtype).min)  # above -inf, which marks the selected
    for _ in range(k):
        largest = rest.max(-1, keepdim=True).indices  # the first of equals; torch.topk gives any of them
        rest.scatter_(-1, largest, -torch.inf)
        log_m.scatter_(-1, largest, 0.0)
    return log_m


def top_k_mask(z: Tensor, k: int) -> Tensor:
    """True at the k largest of each row of z (T, C), as :func:`log_mask` selects them."""
    return log_mask(z, k) == 0


def gates(z: Tensor, gating: Gating) -> Tensor:
    """g (T, N) from the logits z (T, C); exactly 0 at experts that are not active for a token."""
    if gating.name in ("ase", "topk-renorm"):
        return (z + log_mask(z.detach(), gating.k, gating.shared)).softmax(-1)
    return F.pad(z.softmax(-1) * top_k_mask(z.detach(), gating.k), (0, gating.shared), value=1.0)


def mean_probs(z: Tensor, segments: TaskSegments) -> Tensor:
    """P (tasks, C): mean over a task's tokens of softmax(z) before the top-k; 0 for a task without tokens.

    P is p(expert given task), the only input of the mutual-information loss.
    """
    p = z.softmax(-1)
    if segments.counts is None:  # in a compiled pass
        total = z.new_zeros(segments.tasks, z.shape[1]).index_add(0, segments.task_of_rows(len(z)), p)
        return total / (segments.offsets.diff() * segments.length).clamp_min(1)[:, None]
    return torch.stack([run.mean(0) if len(run) else run.sum(0) for run in p.split(segments.counts)])


def frozen(x: Tensor, linears: tuple[Linear, ...]) -> Tensor:
    """The frozen layer beside the experts: one linear layer, or the two of an FFN with GELU between them."""
    first, *second = [(w.to(x.dtype), None if b is None else b.to(x.dtype)) for w, b in linears]
    y = F.linear(x, *first)
    return F.linear(F.gelu(y), *second[0]) if second else y


def lora_moe(
    x: Tensor,
    base: Tensor | tuple[Linear, ...],
    lora: tuple[Tensor, Tensor],
    routers: Tensor,
    segments: TaskSegments,
    gating: Gating,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D) = base + sum_e g_e B_e A_e x, with the gates g (T, N) and P (tasks, C).

    x (T, d) and base (T, D) share a floating type; instead of its output, ``base`` may be a frozen layer's weights.
    ``lora`` is (A (R, d), B (D, R)). A, B and the routers may have a wider type; A and B are cast to that of x.
    """
    a, b = (weight.to(x.dtype) for weight in lora)
    z = router_logits(x, routers, segments)
    g = gates(z, gating)
    hidden = F.linear(x, a)
    gated = (hidden.unflatten(-1, (g.shape[1], -1)) * g.unsqueeze(-1)).flatten(-2).to(x.dtype)
    p = mean_probs(z, segments)
    if not isinstance(base, Tensor):  # last, since it fills the caches with other data
        with nvtx.span("ffn"):
            base = frozen(x, base)
    return torch.addmm(base, gated, b.t()), g, p
