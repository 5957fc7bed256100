"""The Triton kernels of the mixture of experts, by both algorithms: against fp64, and what they save and choose."""

import os
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from bench.traffic import counting  # noqa: E402
from kernels import GATINGS, Experts, Gating, TaskSegments, UserError, expert_mixture  # noqa: E402
from kernels.experts import custom_ops  # noqa: E402
from kernels.experts.custom_ops import ALGORITHMS, choose  # noqa: E402
from kernels.experts.gates import gate, gate_reference, route, route_backward  # noqa: E402
from kernels.experts.reference import route as route_reference  # noqa: E402
from kernels.gating import make_pool  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the problems are on the CPU, for the interpreter")

# Norm of the error over the norm: as in test_triton.py, sums of up to some hundred products rounded at 6e-8 each.
FP32_ERROR = 2e-6
TIMES_PYTORCH = 2.0  # on a single small problem the ratio of two roundings scatters widely
EVERY_ALGORITHM = pytest.mark.parametrize("algorithm", ALGORITHMS)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
CASES = [
    {"rank": 3},
    {"rank": 5, "sets": 3, "counts": (4, 4, 4)},
    {"rank": 24, "sets": 3},
    {"rank": 24, "readers": 2, "biases": "c", "activation": "none"},
    {"rank": 4, "readers": 5, "sets": 3, "biases": "b"},
    {"rank": 300, "experts": 4, "readers": 2, "counts": (3,)},  # more columns than a tile
    {"rank": 16, "experts": 33, "biases": "", "activation": "none", "counts": (1, 10)},
]


def relative_error(actual, exact):
    difference, size = (actual.double() - exact).norm().item(), exact.norm().item()
    return difference / size if size else difference


def assert_accurate(mixture, dtype, algorithm):
    """Within FP32_ERROR, in half precision within two roundings, of an intermediate tensor and of the result; more only
    where PyTorch errs about as much."""
    ours, plain = mixture.to(dtype).everything("triton", algorithm), mixture.to(dtype).everything("reference")
    exact = mixture.to(torch.float64).everything("reference")
    assert torch.equal(ours["g"] > 0, exact["g"] > 0), "the selections differ"
    for name, right in exact.items():
        one = FP32_ERROR if dtype == torch.float32 or name in ("g", "P") else 2**0.5 * torch.finfo(dtype).eps / 4
        allowed = max(one, TIMES_PYTORCH * relative_error(plain[name], right))
        assert relative_error(ours[name], right) <= allowed, name


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("case", "algorithm"),
    [*((case, "dense") for case in CASES), *((case, "grouped") for case in (CASES[2], CASES[3], CASES[5]))],
    ids=str,
)
def test_outputs_and_gradients_of_every_kind_of_mixture(case, dtype, algorithm, make_mixture):
    assert_accurate(make_mixture(**case), dtype, algorithm)


@EVERY_DTYPE
@pytest.mark.parametrize("gating", GATINGS)
def test_outputs_and_gradients_of_every_gating(gating, dtype, make_mixture):
    """The gates are the same in both algorithms."""
    assert_accurate(make_mixture(gating), dtype, "dense")


@EVERY_ALGORITHM
@pytest.mark.parametrize("counts", [(0, 0, 6), (1, 0, 0), (0, 0, 0)])
def test_tasks_without_tokens(counts, algorithm, make_mixture):
    assert_accurate(make_mixture(counts=counts, sets=3), torch.float32, algorithm)


@EVERY_ALGORITHM
def test_results_have_the_same_bits_every_time_and_backward_runs_twice(algorithm, make_mixture):
    mixture = make_mixture(rank=5, readers=2).to(torch.float16)
    y, _, p = mixture.run("triton", algorithm)
    leaves = list(mixture.leaves.values())
    first, second = (torch.autograd.grad((y, p), leaves, mixture.cotangents(), retain_graph=True) for _ in range(2))
    again = mixture.to(torch.float16).everything("triton", algorithm)
    for name, left, right in zip(mixture.leaves, first, second, strict=True):
        assert torch.equal(left, right) and torch.equal(left, again[f"d{name}"]), name
    assert torch.equal(y, again["y"]) and torch.equal(p, again["P"])


def test_one_output_alone_may_have_a_gradient(make_mixture):
    mixture = make_mixture().to(torch.float32)
    dy, dp = mixture.cotangents()
    for i, cotangent in ((0, dy), (2, dp)):
        gradients = [
            torch.autograd.grad(mixture.run(kernel)[i], mixture.leaves["z"], cotangent)[0].double()
            for kernel in ("triton", "reference")
        ]
        assert relative_error(*gradients) <= FP32_ERROR


@pytest.mark.parametrize(("sets", "algorithm"), [(1, "dense"), (3, "dense"), (1, "grouped")])
def test_without_a_base(sets, algorithm, make_mixture):
    mixture = make_mixture(sets=sets, counts=(3, 3, 3))
    del mixture.leaves["base"]
    assert_accurate(mixture, torch.float32, algorithm)


def test_no_output_of_an_expert_is_saved(make_mixture):
    """x, U, z and g, and the weights."""
    mixture, saved = make_mixture(counts=(50, 10), readers=2).to(torch.float32), []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mixture.run("triton", "dense")
    tokens, n, ranks = 60, 6, 18
    per_token = [t for t in saved if tokens in t.shape]
    assert sum(t.numel() for t in per_token) == tokens * (10 + ranks + 2 * n + 2 * n)


def test_the_grouped_algorithm_saves_only_the_pairs_that_are_active(make_mixture):
    """k + S = 2 of 30 experts of rank 16: U in place of (T, R) has a row for each pair, and incomplete blocks."""
    mixture, saved = make_mixture("topk", 30, 16, counts=(600,), biases="").to(torch.float32), []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mixture.run("triton", "grouped")
    (u,) = (t for t in saved if t.ndim == 2 and t.shape[1] == 16)
    assert u.shape == ((600 * 2 // 64 + 30) * 64, 16)


@pytest.mark.parametrize(
    ("pool", "width", "algorithm"),
    [
        (("ase", 64, 16, 12, 4), 768, "dense"),  # R = 1,024, 16 experts for each token
        (("topk", 16, 384, 4, 0), 768, "grouped"),  # R = 6,144, 4 experts
    ],
)
def test_few_active_experts_of_a_large_pool_are_computed_by_the_grouped_algorithm(pool, width, algorithm):
    name, experts, rank, k, shared = pool
    like = torch.empty(1, experts * rank, width, device="meta")
    assert choose(Experts(like, like.mT), experts, Gating(name, k, shared), 1) == algorithm


def test_by_default_the_algorithm_is_the_chosen_one(make_mixture, monkeypatch):
    mixture = make_mixture().to(torch.float32)
    for algorithm in ALGORITHMS:
        monkeypatch.setattr("kernels.experts.custom_ops.choose", lambda *given, name=algorithm: name)
        assert torch.equal(mixture.run("triton")[0], mixture.run("triton", algorithm)[0])


def test_the_kernels_equal_their_references(make_mixture):
    mixture = make_mixture("topk", readers=2, rank=5).to(torch.float32)
    z, experts = mixture.leaves["z"].detach(), 6
    segments, pool = TaskSegments.of(mixture.counts, z.device), make_pool(30, experts, "topk/2/0")
    g, p = route(z, segments, pool)
    for actual, right in zip((g, p), route_reference(z, segments, mixture.gating), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-6, atol=1e-6)
    rng = torch.Generator().manual_seed(3)
    u, dgated, dp = (torch.randn(*shape, generator=rng) for shape in ((9, 30), (2, 9, 36), (2, 3, experts)))
    torch.testing.assert_close(gate(u, g, "gelu", True)[0], gate_reference(u, g, "gelu", True), rtol=1e-6, atol=1e-6)
    actual, leaves = gate(u, g, "gelu", True, dgated), (u.requires_grad_(), g.clone().requires_grad_())
    gated = gate_reference(*leaves, "gelu", True)
    for left, right in zip(actual, (gated, *torch.autograd.grad(gated, leaves, dgated)), strict=True):
        torch.testing.assert_close(left, right.detach(), rtol=1e-5, atol=1e-5)
    dz = route_backward(z, g, actual[2], dp, segments, pool)
    outputs = route_reference(z.requires_grad_(), segments, mixture.gating)
    (expected,) = torch.autograd.grad(outputs, z, (actual[2], dp))
    torch.testing.assert_close(dz, expected, rtol=1e-5, atol=1e-5)


# The rows of U that complete a block of the grouped algorithm are never written, so that two runs differ there.
ALL_BUT_EQUAL_OUTPUTS = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(("case", "algorithm"), [(CASES[3], "dense"), (CASES[1], "grouped")], ids=str)
def test_torch_accepts_the_operators(case, algorithm, make_mixture):
    mixture = make_mixture(**case).to(torch.float32)
    t, dy = {name: leaf.detach() for name, leaf in mixture.leaves.items()}, mixture.cotangents()
    if t["z"].ndim == 2:
        t["z"], t["base"], dy = t["z"][None], t["base"][None], tuple(each[None] for each in dy)
    weights, offsets = [t.get(name) for name in "ABbc"], TaskSegments.of(mixture.counts, t["x"].device).offsets
    static = mixture.counts, 1, f"{mixture.gating.text}/{mixture.activation}/{algorithm}"
    forward = t["x"], t["base"], t["z"], *weights, offsets, *static
    _, g, _, u = custom_ops.forward_op(*forward)
    checks = {} if algorithm == "dense" else {"test_utils": ALL_BUT_EQUAL_OUTPUTS}
    torch.library.opcheck(custom_ops.forward_op, forward, **checks)
    backward = *dy, t["x"], u, t["z"], g, *weights, offsets, *static, True
    torch.library.opcheck(custom_ops.backward_op, backward, **checks)


@EVERY_ALGORITHM
def test_compiled_into_one_graph_it_has_the_bits_of_eager_mode(algorithm, make_mixture):
    mixture = make_mixture(readers=2).to(torch.float32)
    eager = mixture.everything("triton", algorithm)
    compiled = torch.compile(lambda: mixture.run("triton", algorithm), backend="aot_eager", fullgraph=True)
    y, g, p = compiled()
    gradients = torch.autograd.grad((y, p), list(mixture.leaves.values()), mixture.cotangents())
    for actual, expected in zip((y, g, p, *gradients), eager.values(), strict=True):
        assert torch.equal(actual, expected)


def test_an_unknown_algorithm_is_refused(make_mixture):
    mixture = make_mixture().to(torch.float32)
    t, segments = mixture.leaves, TaskSegments.of(mixture.counts, torch.device("cpu"))
    with pytest.raises(UserError, match="unknown algorithm 'sparse': choose among dense, grouped"):
        custom_ops.expert_mixture(t["x"], None, mixture.experts, t["z"], segments, mixture.gating, "sparse")


@pytest.mark.parametrize(("kernel", "algorithm"), [("triton", "dense"), ("triton", "grouped"), ("reference", "")])
def test_one_set_of_weights_needs_no_counts_on_the_host(kernel, algorithm, make_mixture):
    """As in a compiled pass: rows 0..4 and 4..10 are segments of images of two rows, the one between them is empty."""
    mixture = make_mixture(counts=(4, 0, 6), readers=2).to(torch.float32)
    t, images = mixture.leaves, torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    rest = mixture.gating, kernel, algorithm
    results = []
    for segments in (TaskSegments.of(mixture.counts, t["x"].device), TaskSegments(images, len(images) - 1, None, 2)):
        y, g, p = expert_mixture(t["x"], t["base"], mixture.experts, t["z"], segments, *rest)
        results.append((y, g, p, *torch.autograd.grad((y, p), list(t.values()), mixture.cotangents())))
    for known, unknown in zip(*results, strict=True):
        torch.testing.assert_close(known, unknown, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sets", [1, 3])
def test_gradients_in_a_batch_are_those_one_after_the_other(sets, make_mixture):
    mixture = make_mixture(sets=sets).to(torch.float32)
    y, _, p = mixture.run("triton", "dense")
    leaves, (dy, dp) = list(mixture.leaves.values()), mixture.cotangents()
    cotangents = torch.stack([dy, -2 * dy]), torch.stack([dp, dp])
    batched = torch.autograd.grad((y, p), leaves, cotangents, retain_graph=True, is_grads_batched=True)
    for i in range(2):
        one = torch.autograd.grad((y, p), leaves, (cotangents[0][i], cotangents[1][i]), retain_graph=True)
        assert all(torch.equal(many[i], single) for many, single in zip(batched, one, strict=True))


@EVERY_ALGORITHM
def test_tokens_without_a_gradient_cost_no_product(algorithm, make_mixture):
    mixture, costs, results = make_mixture().to(torch.float16), [], []
    for needed in (True, False):
        mixture.leaves["x"].requires_grad_(needed)
        y, _, p = mixture.run("triton", algorithm)
        wanted = [leaf for name, leaf in mixture.leaves.items() if name != "x"]
        with counting(9) as traffic:
            results.append(torch.autograd.grad((y, p), wanted, mixture.cotangents()))
        costs.append(sum(traffic.launches.values()) + sum(n for op, n in traffic.operators.items() if ".mm." in op))
    assert costs[0] - costs[1] == {"dense": 1, "grouped": 2}[algorithm]
    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


WRONG = {
    "x": (lambda t: t[:-1], r"z has shape \(9, 6\), beside x of shape \(8, 10\) it is \(8, 6\)"),
    "base": (lambda t: t[:, 1:], r"base has shape \(9, 6\), beside x of shape \(9, 10\) it is \(9, 7\)"),
    "z": (lambda t: t[1:], r"z has shape \(8, 6\), beside x of shape \(9, 10\) it is \(9, 6\)"),
    "A": (lambda t: t[..., 1:], r"A has shape \(3, 18, 9\), beside x of shape \(9, 10\) it is \(3, 18, 10\)"),
    "B": (lambda t: t[:2], r"B has shape \(2, 7, 18\), beside x of shape \(9, 10\) it is \(3, 7, 18\)"),
    "b": (lambda t: t[:, 1:], r"b has shape \(3, 17\), beside x of shape \(9, 10\) it is \(3, 18\)"),
    "c": (lambda t: t[:, 1:], r"c has shape \(3, 5, 7\), beside x of shape \(9, 10\) it is \(3, 6, 7\)"),
}


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_a_tensor_that_does_not_fit_is_named_with_both_shapes(name, kernel, make_mixture):
    mixture, (cut, message) = make_mixture(sets=3).to(torch.float32), WRONG[name]
    mixture.leaves[name] = cut(mixture.leaves[name].detach())
    with pytest.raises(ValueError, match=message):
        mixture.run(kernel)


@pytest.mark.parametrize("kernel", ["triton", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gating": Gating("ase", 30, 2)}, r"k = 30, but z of shape \(9, 6\) have 4 sparse experts"),
        ({"gating": Gating("naive-shared", 2, 1)}, r"A of shape \(3, 18, 10\) has no equally many rows .* 7 experts"),
        ({"counts": (4, 0, 4)}, r"segments of \(4, 0, 4\) rows for x of shape \(9, 10\): they must add up"),
        ({"activation": "relu"}, "unknown activation 'relu': choose among none, gelu"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(change, message, kernel, make_mixture):
    mixture = replace(make_mixture(sets=3, biases="").to(torch.float32), **change)
    with pytest.raises(ValueError, match=message):
        mixture.run(kernel)


def test_a_set_per_task_needs_counts(make_mixture):
    mixture = make_mixture(sets=3).to(torch.float32)
    t, segments = mixture.leaves, TaskSegments(torch.tensor([0, 4, 4, 9], dtype=torch.int32), 3)
    with pytest.raises(ValueError, match="A has a set for each of 3 tasks, but the segments have no counts"):
        expert_mixture(t["x"], t["base"], mixture.experts, t["z"], segments, mixture.gating)
