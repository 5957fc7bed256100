"""The reference of the mixture of experts: against loops over tokens and experts, and what it generalises."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import GATINGS, Experts, Gating, TaskSegments, expert_mixture, reference

CASES = [
    {},
    {"sets": 3},
    {"sets": 3, "counts": (3, 3, 3)},
    {"readers": 2, "biases": "b"},
    {"readers": 2, "sets": 3, "biases": "c"},
    {"biases": "", "activation": "none", "rank": 5},
]


def gelu(u: float) -> float:
    return u * 0.5 * (1 + math.erf(u / math.sqrt(2)))


def naive(x: Tensor, base: Tensor | None, experts: Experts, g: Tensor, counts: tuple[int, ...]) -> Tensor:
    """y (T, D) of one gate per token, a token and an expert at a time."""
    y = torch.zeros(len(x), experts.up.shape[1], dtype=torch.float64) if base is None else base.clone()
    task_of_token = [task for task, count in enumerate(counts) for _ in range(count)]
    rank = experts.down.shape[1] // g.shape[1]
    for t, task in enumerate(task_of_token):
        weights = task if experts.sets > 1 else 0
        for e in range(g.shape[1]):
            out = torch.zeros_like(y[t]) if experts.output_bias is None else experts.output_bias[weights, e].clone()
            for row in range(e * rank, (e + 1) * rank):
                u = torch.dot(experts.down[weights, row], x[t]).item()
                u += 0 if experts.hidden_bias is None else experts.hidden_bias[weights, row].item()
                out += experts.up[weights, :, row] * (gelu(u) if experts.activation == "gelu" else u)
            y[t] += g[t, e] * out
    return y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_are_those_of_loops_over_tokens_and_experts(case, make_mixture, assert_fp64_close):
    mixture = make_mixture(**case)
    y, g, p = (t.detach() for t in mixture.run("reference"))
    leaves = {name: t.detach() for name, t in mixture.leaves.items()}
    experts = Experts(*(leaves.get(name) for name in ("A", "B", "b", "c")), mixture.activation)
    if leaves["z"].ndim == 2:
        y, g, p, leaves["base"], leaves["z"] = (t[None] for t in (y, g, p, leaves["base"], leaves["z"]))
    for i, z in enumerate(leaves["z"]):
        assert torch.equal(g[i], reference.gates(z, mixture.gating))
        assert_fp64_close(p[i], reference.mean_probs(z, TaskSegments.of(mixture.counts, z.device)))
        assert_fp64_close(y[i], naive(leaves["x"], leaves["base"][i], experts, g[i], mixture.counts))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_finite_differences(case, make_mixture):
    mixture = make_mixture(**(case | {"counts": (1, 0, 1), "experts": 4, "rank": 2, "widths": (3, 2)}))
    names = list(mixture.leaves)

    def outputs(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        mixture.leaves = dict(zip(names, leaves, strict=True))
        y, _, p = mixture.run("reference")
        return y, p

    assert torch.autograd.gradcheck(outputs, tuple(mixture.leaves.values()))


@pytest.mark.parametrize("name", GATINGS)
def test_without_activation_and_biases_it_is_the_mixture_of_lora(name, make_mixture, assert_fp64_close):
    mixture = make_mixture(name, biases="", activation="none")
    x, base, a, b = (mixture.leaves[key] for key in ("x", "base", "A", "B"))
    routers = torch.randn(3, mixture.leaves["z"].shape[1], x.shape[1], dtype=torch.float64)
    segments = TaskSegments.of(mixture.counts, x.device)
    mixture.leaves["z"] = reference.router_logits(x, routers, segments)
    expected = reference.lora_moe(x, base, (a[0], b[0]), routers, segments, mixture.gating)
    for actual, right in zip(mixture.run("reference"), expected, strict=True):
        assert_fp64_close(actual, right)


def test_an_mlp_cut_into_slices_that_all_have_gate_1_is_the_mlp(assert_fp64_close):
    """Four always-on slices of its hidden layer; the output bias belongs to one of them, so that it counts once."""
    slices, width, d, out, tokens = 4, 12, 5, 6, 7

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)

    x, w1, b1, w2, b2 = normal(tokens, d), normal(width, d), normal(width), normal(out, width), normal(out)
    # One sparse expert of zeros, since naive-shared, whose shared gates are 1, selects at least one.
    rank = width // slices
    nothing = torch.zeros(rank, d, dtype=torch.float64)
    bias = torch.zeros(slices + 1, out, dtype=torch.float64)
    bias[1] = b2
    experts = Experts(
        torch.cat([nothing, w1])[None],
        torch.cat([nothing.new_zeros(out, rank), w2], 1)[None],
        torch.cat([nothing.new_zeros(rank), b1])[None],
        bias[None],
        "gelu",
    )
    z, segments = x.new_zeros(tokens, 1), TaskSegments.of((tokens,), x.device)
    y, g, _ = expert_mixture(x, None, experts, z, segments, Gating("naive-shared", 1, slices), "reference")
    assert (g == 1).all()
    assert_fp64_close(y, F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2))


def test_an_absent_base_is_zero(make_mixture):
    mixture = make_mixture()
    y = mixture.run("reference")[0]
    base = mixture.leaves.pop("base")
    torch.testing.assert_close(mixture.run("reference")[0] + base, y, rtol=1e-14, atol=1e-14)
