"""kernels.lora_moe against the equations: values, gradients, properties, and the types it computes in."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import grad, gradcheck

from kernels import GATINGS, Gating, TaskSegments, lora_moe, reference

# (N, k, S, r). Among them k = N - S, r = 1, N = 2 and a single sparse expert.
SHAPES_WITH_SHARED = [(16, 3, 1, 4), (8, 2, 2, 1), (5, 3, 2, 2), (4, 1, 3, 3), (2, 1, 1, 2)]
SHAPES_WITHOUT = [(16, 4, 0, 4), (6, 1, 0, 2), (4, 4, 0, 1), (2, 1, 0, 3), (2, 2, 0, 1)]
SHAPES = {
    "ase": SHAPES_WITH_SHARED,
    "naive-shared": SHAPES_WITH_SHARED,
    "topk": SHAPES_WITHOUT,
    "topk-renorm": SHAPES_WITHOUT,
}
LOGITS = ["random", "partly equal", "all equal"]
COUNTS = [(4, 1, 3), (2, 0, 3), (0, 2), (3, 0), (1,), (0, 1, 0)]  # unequal, tasks without rows, T = 1

# Every shape with every kind of logits, and every division of the rows with every gating.
CASES = [(name, shape, (3, 1, 2), logits) for name in GATINGS for shape in SHAPES[name] for logits in LOGITS]
CASES += [(name, SHAPES[name][1], counts, "random") for name in GATINGS for counts in COUNTS]
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
EVERY_GATING = pytest.mark.parametrize("name", GATINGS)
SUMS_TO_ONE = ("ase", "topk-renorm")

many = settings(max_examples=60, deadline=None)


def run(problem):
    _, k, shared, _ = problem.shape
    segments = TaskSegments.of(problem.counts, torch.device("cpu"))
    lora = problem.a, problem.b
    return lora_moe(problem.x, problem.base, lora, problem.routers, segments, Gating(problem.gating, k, shared))


def cotangent(output):
    """Weights of an output in a loss: of either sign, all different, the same in every run."""
    return torch.arange(1.0, output.numel() + 1, dtype=torch.float64).sin().view_as(output)


def gates_of(logits, name, k, shared):
    """The gates of tokens of one task whose logits are ``logits`` (T, C): the router is the identity."""
    logits = torch.as_tensor(logits, dtype=torch.float64)
    tokens, columns = logits.shape
    experts = columns + shared if name == "naive-shared" else columns
    lora = torch.zeros(experts, columns, dtype=torch.float64), torch.zeros(1, experts, dtype=torch.float64)
    routers = torch.eye(columns, dtype=torch.float64)[None]
    base = torch.zeros(tokens, 1, dtype=torch.float64)
    segments = TaskSegments.of((tokens,), torch.device("cpu"))
    return lora_moe(logits, base, lora, routers, segments, Gating(name, k, shared))[1]


@st.composite
def cases(draw, names=tuple(GATINGS), logits=tuple(LOGITS)):
    """Arguments of make_problem."""
    name = draw(st.sampled_from(names))
    experts = draw(st.integers(2, 9))
    shared = draw(st.integers(1, experts - 1)) if name in ("ase", "naive-shared") else 0
    shape = experts, draw(st.integers(1, experts - shared)), shared, draw(st.integers(1, 3))
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any))
    return name, shape, tuple(counts), draw(st.sampled_from(logits)), draw(st.integers(0, 2**31))


class TestAgainstTheEquations:
    @EVERY_CASE
    def test_values(self, case, make_problem, oracle, assert_fp64_close):
        problem = make_problem(*case)
        for actual, expected in zip(run(problem), oracle(problem), strict=True):
            assert_fp64_close(actual, expected)

    @EVERY_CASE
    def test_the_same_experts_are_active(self, case, make_problem, oracle):
        problem = make_problem(*case)
        assert torch.equal(run(problem)[1] > 0, oracle(problem)[1] > 0)

    @EVERY_CASE
    def test_gradients_through_y(self, case, make_problem, oracle, assert_fp64_close):
        problem, twin = make_problem(*case), make_problem(*case)
        weight = cotangent(problem.base)
        actual = grad((run(problem)[0] * weight).sum(), problem.leaves)
        expected = grad((oracle(twin)[0] * weight).sum(), twin.leaves)
        for left, right in zip(actual, expected, strict=True):
            assert_fp64_close(left, right)

    @EVERY_CASE
    def test_gradients_through_the_mutual_information_loss(
        self, case, make_problem, oracle, naive_mi_loss, assert_fp64_close
    ):
        problem, twin = make_problem(*case), make_problem(*case)
        inputs = problem.x, problem.routers
        actual = grad(naive_mi_loss(run(problem)[2], problem.counts), inputs)
        expected = grad(naive_mi_loss(oracle(twin)[2], twin.counts), (twin.x, twin.routers))
        for left, right in zip(actual, expected, strict=True):
            assert_fp64_close(left, right)

    @EVERY_GATING
    @pytest.mark.parametrize("counts", [(3, 0, 2), (0, 4), (1, 0)])
    def test_a_task_without_rows_moves_nothing(self, name, counts, make_problem):
        problem = make_problem(name, SHAPES[name][0], counts)
        y, _, mean_probs = run(problem)
        (router_grad,) = grad(y.square().sum() + mean_probs.square().sum(), [problem.routers])
        absent = counts.index(0)
        assert mean_probs[absent].eq(0).all()
        assert router_grad[absent].eq(0).all()
        assert all(router_grad[t].ne(0).any() for t in range(len(counts)) if t != absent)


def analytic_backward(problem, gates, dy, c):
    """The gradients of x, base, A, B and the routers, as design/kernels.md writes them and the kernels compute them.

    ``dy`` and ``c`` are the cotangents of y and P, ``gates`` the gates of the forward pass.
    """
    experts, _, shared, rank = problem.shape
    x, _, a, b, routers = (leaf.detach() for leaf in problem.leaves)
    task_of_row = torch.repeat_interleave(torch.arange(len(problem.counts)), torch.tensor(problem.counts))
    tokens, columns = len(x), routers.shape[1]

    hidden = x @ a.T
    gate_per_rank = gates.repeat_interleave(rank, 1)
    p = torch.einsum("td,tcd->tc", x, routers[task_of_row]).exp()
    p = p / p.sum(1, keepdim=True)
    m = (gates > 0)[:, :columns].double()

    d_gated = dy @ b
    db = dy.T @ (hidden * gate_per_rank)
    dg = (hidden * d_gated).view(tokens, experts, rank).sum(2)[:, :columns]
    d_hidden = d_gated * gate_per_rank
    if problem.gating in SUMS_TO_ONE:
        dz = gates * (dg - (gates * dg).sum(1, keepdim=True))
    else:  # over the N - S sparse experts where the shared ones have a fixed gate, which `columns` has cut off
        dz = p * (m * dg - (p * m * dg).sum(1, keepdim=True))
    rows = torch.tensor(problem.counts, dtype=torch.float64)[task_of_row, None]
    c = c[task_of_row]
    dz = dz + p * (c - (p * c).sum(1, keepdim=True)) / rows

    d_routers = torch.stack([dz[task_of_row == t].T @ x[task_of_row == t] for t in range(len(problem.counts))])
    dx = d_hidden @ a + torch.einsum("tc,tcd->td", dz, routers[task_of_row])
    return dx, dy, d_hidden.T @ x, db, d_routers


class TestTheBackwardFormulas:
    """The mathematics the Triton kernels implement, pinned on the operation they have to reproduce."""

    @EVERY_CASE
    def test_agree_with_autograd(self, case, make_problem, oracle, assert_fp64_close):
        problem = make_problem(*case)
        y, _, mean_probs = run(problem)
        dy, c = cotangent(y), cotangent(mean_probs)
        by_autograd = grad((y * dy).sum() + (mean_probs * c).sum(), problem.leaves)
        by_formula = analytic_backward(problem, oracle(problem)[1].detach(), dy, c)
        for left, right in zip(by_autograd, by_formula, strict=True):
            assert_fp64_close(left, right)

    @EVERY_GATING
    def test_autograd_agrees_with_finite_differences(self, name, make_problem):
        shape = (5, 2, 2, 2) if name in ("ase", "naive-shared") else (5, 2, 0, 2)
        problem = make_problem(name, shape, (2, 0, 1), d_in=4, d_out=3)
        sparse = problem.x.detach()[:, None] * problem.routers.detach()[[0, 0, 2], : shape[0] - shape[2]]
        ranked = sparse.sum(-1).sort(descending=True).values
        assert (ranked[:, 1] - ranked[:, 2]).min() > 1e-3, "a step of 1e-6 must not change the selection"

        def outputs(x, base, a, b, routers):
            return run(replace(problem, x=x, base=base, a=a, b=b, routers=routers))

        assert gradcheck(outputs, problem.leaves)


class TestGates:
    @many
    @given(case=cases())
    def test_are_nonnegative_and_as_many_as_promised(self, case, make_problem):
        problem = make_problem(*case)
        _, k, shared, _ = problem.shape
        gates = run(problem)[1]
        assert gates.ge(0).all()
        assert gates.ne(0).sum(1).eq(k + shared).all()

    @many
    @given(case=cases(names=SUMS_TO_ONE))
    def test_sum_to_one(self, case, make_problem):
        gates = run(make_problem(*case))[1]
        # At most nine gates below 1, each off by some 1e-16.
        torch.testing.assert_close(gates.sum(1), torch.ones_like(gates[:, 0]), rtol=0, atol=1e-14)

    @many
    @given(case=cases(names=("naive-shared",)))
    def test_of_naive_shared_experts_are_exactly_one_and_of_no_other(self, case, make_problem):
        problem = make_problem(*case)
        experts, k, shared, _ = problem.shape
        sparse, always = run(problem)[1].split([experts - shared, shared], dim=1)
        assert always.eq(1).all()
        # A single sparse expert has all of its softmax.
        assert experts - shared == 1 or sparse.lt(1).all()

    @many
    @given(case=cases(names=("ase", "naive-shared")))
    def test_of_shared_experts_are_the_last_and_never_zero(self, case, make_problem):
        problem = make_problem(*case)
        assert run(problem)[1][:, -problem.shape[2] :].gt(0).all()

    @many
    @given(data=st.data(), logits=st.lists(st.integers(-2, 2), min_size=2, max_size=12))
    def test_select_the_largest_logits_and_of_equals_the_lowest_index(self, data, logits):
        k = data.draw(st.integers(1, len(logits)))
        by_size_then_index = sorted(range(len(logits)), key=lambda e: (-logits[e], e))
        active = gates_of([logits], "topk", k, 0)[0].nonzero()[:, 0].tolist()
        assert active == sorted(by_size_then_index[:k])

    def test_of_topk_are_not_renormalised(self):
        # softmax([0, 0, 0, log 3]) = 1/6, 1/6, 1/6, 1/2
        gates = gates_of([[0, 0, 0, torch.tensor(3.0, dtype=torch.float64).log()]], "topk", 2, 0)
        expected = torch.tensor([[1 / 6, 0, 0, 1 / 2]], dtype=torch.float64)
        torch.testing.assert_close(gates, expected, rtol=0, atol=1e-15)

    def test_of_shared_experts_compete_in_ase(self):
        # Sparse logits 0, log 2, log 3 (one selected), shared logit 0: gates 3/4 and 1/4.
        logits = torch.tensor([[1, 2, 3, 1]], dtype=torch.float64).log()
        expected = torch.tensor([[0, 0, 3 / 4, 1 / 4]], dtype=torch.float64)
        torch.testing.assert_close(gates_of(logits, "ase", 1, 1), expected, rtol=0, atol=1e-15)

    @pytest.mark.parametrize("shape", SHAPES_WITH_SHARED, ids=str)
    def test_of_ase_with_a_zero_router_share_evenly(self, shape, make_problem):
        experts, k, shared, _ = shape
        gates = run(make_problem("ase", shape, (2, 1), "all equal"))[1]
        lowest_and_shared = torch.tensor([e < k or e >= experts - shared for e in range(experts)])
        expected = (lowest_and_shared.double() / (k + shared)).expand_as(gates)
        torch.testing.assert_close(gates, expected, rtol=0, atol=1e-15)

    @EVERY_GATING
    def test_do_not_change_when_all_logits_rise_by_a_thousand(self, name):
        shared = 2 if name in ("ase", "naive-shared") else 0
        logits = torch.tensor([[3.0, -1, 0, 3, 2, 1], [0, 0, 5, -2, 1, 1]])
        # Integers, so the sums are exact; exp(1000) overflows.
        assert torch.equal(gates_of(logits + 1000, name, 2, shared), gates_of(logits, name, 2, shared))


class TestSelection:
    @pytest.mark.parametrize("k", [1, 3, 6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_is_that_of_a_stable_sort(self, k, dtype):
        # Ties, infinities of which there are more than k, and NaN, which sorts above infinity.
        few = torch.tensor([-torch.inf, -torch.inf, -1, -0.0, 0.0, 1, torch.inf, torch.nan], dtype=dtype)
        z = few[torch.randint(len(few), (500, 6), generator=torch.Generator().manual_seed(0))]
        first = z.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(reference.top_k_mask(z, k), torch.zeros_like(z, dtype=torch.bool).scatter(-1, first, True))

    def test_leaves_the_logits_as_they_are(self):
        z = torch.tensor([[-torch.inf, 2, 1]])
        reference.top_k_mask(z, 2)
        assert torch.equal(z, torch.tensor([[-torch.inf, 2, 1]]))

    @EVERY_GATING
    def test_does_not_hide_a_logit_that_is_no_number(self, name):
        shared = 1 if name in ("ase", "naive-shared") else 0
        logits = torch.tensor([[0, torch.nan, 1, 2]], dtype=torch.float64)
        assert reference.gates(logits, Gating(name, 2, shared))[0, 1].isnan()


class TestSymmetries:
    @many
    @given(case=cases(), data=st.data())
    def test_permuting_the_tokens_of_a_task_permutes_the_outputs(self, case, data, make_problem, assert_fp64_close):
        problem = make_problem(*case)
        order, start = [], 0
        for count in problem.counts:
            order += data.draw(st.permutations(range(start, start + count)))
            start += count
        shuffled = replace(problem, x=problem.x[order], base=problem.base[order])
        (y, gates, mean_probs), actual = run(problem), run(shuffled)
        for left, right in zip(actual, (y[order], gates[order], mean_probs), strict=True):
            assert_fp64_close(left, right)

    @many
    @given(case=cases(logits=("random",)), data=st.data())
    def test_sparse_experts_can_be_relabelled(self, case, data, make_problem, assert_fp64_close):
        problem = make_problem(*case)
        experts, _, shared, rank = problem.shape
        order = data.draw(st.permutations(range(experts - shared))) + list(range(experts - shared, experts))
        columns = order[: problem.routers.shape[1]]
        ranks = [e * rank + i for e in order for i in range(rank)]
        relabelled = replace(problem, a=problem.a[ranks], b=problem.b[:, ranks], routers=problem.routers[:, columns])
        (y, gates, mean_probs), actual = run(problem), run(relabelled)
        for left, right in zip(actual, (y, gates[:, order], mean_probs[:, columns]), strict=True):
            assert_fp64_close(left, right)

    @pytest.mark.parametrize("name", ["topk", "topk-renorm"])
    @pytest.mark.parametrize(("experts", "rank"), [(2, 1), (5, 2), (16, 4)])
    def test_all_experts_alike_are_plain_lora_over_n(self, name, experts, rank, make_problem, assert_fp64_close):
        problem = make_problem(name, (experts, experts, 0, rank), (3, 2), "all equal")
        plain_lora = problem.x @ problem.a.T @ problem.b.T
        assert_fp64_close(run(problem)[0], problem.base + plain_lora / experts)


def in_half(problem, dtype):
    """The problem as a model under autocast has it: x and base in half precision, the parameters kept in fp32."""
    x, base = problem.x.to(dtype), problem.base.to(dtype)
    a, b, routers = problem.a.float(), problem.b.float(), 0.25 * problem.routers.float()  # logits of order 1
    return replace(problem, x=x, base=base, a=a, b=b, routers=routers).fresh()


def in_fp64(problem):
    """The very same numbers in fp64."""
    x, base, a, b, routers = (leaf.double() for leaf in problem.leaves)
    return replace(problem, x=x, base=base, a=a, b=b, routers=routers).fresh()


@EVERY_GATING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
class TestHalfPrecision:
    @pytest.fixture
    def problem(self, name, dtype, make_problem):
        shape = (16, 3, 1, 4) if name in ("ase", "naive-shared") else (16, 4, 0, 4)
        return in_half(make_problem(name, shape, (9, 4, 12), seed=3, d_in=32, d_out=24), dtype)

    def test_gates_and_mean_probs_are_computed_in_fp32(self, problem):
        _, gates, mean_probs = run(problem)
        _, exact_gates, exact_mean_probs = run(in_fp64(problem))
        assert gates.dtype == mean_probs.dtype == torch.float32
        # fp32 logits up to 3, sums of 32 products, are off by a few 1e-7, and a gate by at most half of the largest of
        # these errors; logits rounded to half precision would be off by 1e-3 or more.
        torch.testing.assert_close(gates.double(), exact_gates, rtol=0, atol=1e-6)
        torch.testing.assert_close(mean_probs.double(), exact_mean_probs, rtol=0, atol=1e-6)

    def test_y_has_the_type_of_x_and_five_roundings(self, problem):
        y, gates, _ = run(problem)
        exact = in_fp64(problem)
        expected = run(exact)[0]
        assert y.dtype == problem.x.dtype
        # A, B, H, H * g and y are rounded to half precision, each by at most eps / 2 of the terms summed.
        gate_per_rank = gates.double().repeat_interleave(4, 1)
        terms = exact.base.abs() + (exact.x.abs() @ exact.a.abs().T * gate_per_rank) @ exact.b.abs().T
        assert ((y.double() - expected).abs() <= 5 * torch.finfo(y.dtype).eps / 2 * terms).all()

    def test_gradients_have_the_types_of_what_they_belong_to(self, problem):
        y, _, mean_probs = run(problem)
        grads = grad(y.float().square().mean() + mean_probs.square().sum(), problem.leaves)
        half = problem.x.dtype
        assert [g.dtype for g in grads] == [half, half, torch.float32, torch.float32, torch.float32]
        assert all(g.isfinite().all() and g.any() for g in grads)
