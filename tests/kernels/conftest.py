"""What the tests of the kernels share: small problems of every kind, and the oracle they are judged by.

The oracle is the paper's equations (1) to (10), written out with loops over tasks, tokens and experts. It is slow
on purpose and shares no code with kernels/, so that a mistake there cannot be in both.
"""

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor


@dataclass
class Problem:
    """One call of the operation. ``shape`` is the paper's (N, k, S, r), ``counts`` the tokens of each task."""

    gating: str
    shape: tuple[int, int, int, int]
    counts: tuple[int, ...]
    x: Tensor
    base: Tensor
    a: Tensor
    b: Tensor
    routers: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The five tensors that gradients are taken of: x, base, A, B and the routers."""
        return self.x, self.base, self.a, self.b, self.routers

    def fresh(self) -> "Problem":
        """The same problem on new leaves, so that two backward passes cannot add up."""
        values = [getattr(self, field.name) for field in fields(self)]
        return Problem(*[v.detach().clone().requires_grad_() if isinstance(v, Tensor) else v for v in values])


def _routers(logits: str, tasks: int, columns: int, d: int, rng: torch.Generator) -> Tensor:
    if logits == "all equal":
        return torch.zeros(tasks, columns, d, dtype=torch.float64)
    if logits == "partly equal":
        # Three distinct rows dealt round robin. They are integers, as x then is, so that equal logits are equal
        # to the last bit in whatever order a product is summed.
        distinct = torch.randint(-1, 2, (tasks, 3, d), generator=rng, dtype=torch.float64)
        return distinct[:, [e % 3 for e in range(columns)]]
    return 0.7 * torch.randn(tasks, columns, d, generator=rng, dtype=torch.float64)


def _make_problem(gating, shape, counts, logits="random", seed=0, d_in=6, d_out=5) -> Problem:
    experts, _, shared, rank = shape
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    x = normal(sum(counts), d_in)
    if logits == "partly equal":
        x = torch.randint(-1, 2, x.shape, generator=rng, dtype=torch.float64)
    # Equation (5) gives a shared expert the gate 1 and no logit.
    columns = experts - shared if gating == "naive-shared" else experts
    routers = _routers(logits, len(counts), columns, d_in, rng)
    a, b = normal(experts * rank, d_in), normal(d_out, experts * rank)
    return Problem(gating, shape, tuple(counts), x, normal(sum(counts), d_out), a, b, routers).fresh()


def _softmax(logits: list[Tensor]) -> list[Tensor]:
    exps = [z.exp() for z in logits]
    return [e / sum(exps) for e in exps]


def _top_k(logits: list[Tensor], k: int) -> list[int]:
    """k times the largest logit not chosen yet; `>` keeps the first of equals, so the lowest index wins a tie."""
    chosen: list[int] = []
    for _ in range(k):
        best = None
        for e, z in enumerate(logits):
            if e not in chosen and (best is None or z.item() > logits[best].item()):
                best = e
        chosen.append(best)
    return chosen


def _token_gates(z: list[Tensor], gating: str, shape: tuple[int, int, int, int]) -> list[Tensor]:
    """The gates of one token from its logits; sparse experts first, the S shared ones last."""
    experts, k, shared, _ = shape
    sparse = experts - shared
    selected = _top_k(z[:sparse], k)
    g = [torch.zeros((), dtype=torch.float64) for _ in range(experts)]
    if gating == "ase":  # (6) to (9): one denominator D for the selected and the shared experts
        active = selected + list(range(sparse, experts))
        denominator = sum(z[e].exp() for e in active)
        for e in active:
            g[e] = z[e].exp() / denominator
    elif gating == "topk-renorm":
        for e, gate in zip(selected, _softmax([z[e] for e in selected]), strict=True):
            g[e] = gate
    else:  # (1) and (2), not renormalised over the selected; (5) adds experts whose gate is 1
        probs = _softmax(z[:sparse])
        for e in selected:
            g[e] = probs[e]
        for e in range(sparse, experts):
            g[e] = torch.ones((), dtype=torch.float64)
    return g


def _oracle(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, D), gates (T, N) and P (tasks, C) in fp64, differentiable."""
    experts, _, _, rank = problem.shape
    y, gates, mean_probs, row = [], [], [], 0
    for task, count in enumerate(problem.counts):
        router = problem.routers[task]
        total = [torch.zeros((), dtype=torch.float64) for _ in router]
        for _ in range(count):
            x = problem.x[row]
            z = [torch.dot(w, x) for w in router]
            g = _token_gates(z, problem.gating, problem.shape)
            out = problem.base[row]  # (3), (10): x + W_0 x, of which the operation is handed the sum
            for e in range(experts):
                block = range(e * rank, (e + 1) * rank)
                for i in block:  # (4): E(x) = B A x, one rank at a time
                    out = out + g[e] * problem.b[:, i] * torch.dot(problem.a[i], x)
            y.append(out)
            gates.append(torch.stack(g))
            total = [sum_ + p for sum_, p in zip(total, _softmax(z), strict=True)]
            row += 1
        mean_probs.append(torch.stack([sum_ / count if count else sum_ for sum_ in total]))
    return torch.stack(y), torch.stack(gates), torch.stack(mean_probs)


def _mutual_information_loss(mean_probs: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Mod-Squad's loss over the tasks that have tokens: -sum p(t,e) log(p(t,e) / (p(t) p(e)))."""
    present = [t for t, count in enumerate(counts) if count]
    p_t, loss = 1 / len(present), torch.zeros((), dtype=torch.float64)
    for e in range(mean_probs.shape[1]):
        p_e = sum(mean_probs[t, e] * p_t for t in present)
        for t in present:
            p_te = mean_probs[t, e] * p_t
            loss = loss - p_te * torch.log(p_te / (p_t * p_e))
    return loss


def _assert_fp64_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-12 of the largest entry, or of 1, the size of the problems' numbers, where that is larger.

    An entry is a sum of at most some hundred products rounded at 1.1e-16: 1e-14. The rest is for cancellation.
    """
    scale = max(expected.abs().max().item(), 1.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * scale)


# Functions handed out as fixtures: under --import-mode=importlib the tests cannot import this file. Their scope is
# the session, since hypothesis calls a test many times on one set of fixtures.


@pytest.fixture(scope="session")
def make_problem():
    """make_problem(gating, (N, k, S, r), counts, logits="random" | "partly equal" | "all equal", seed=0, ...)"""
    return _make_problem


@pytest.fixture(scope="session")
def oracle():
    """oracle(problem) -> (y, gates, P)"""
    return _oracle


@pytest.fixture(scope="session")
def naive_mi_loss():
    """naive_mi_loss(P, counts) -> the mutual-information loss"""
    return _mutual_information_loss


@pytest.fixture(scope="session")
def assert_fp64_close():
    """assert_fp64_close(actual, expected)"""
    return _assert_fp64_close
