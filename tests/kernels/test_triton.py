"""The Triton kernels as one operation: against fp64 and PyTorch, at its edges, and what they save, launch and refuse.

Without a GPU they run in Triton's interpreter, on the CPU; with one, the same tests run on it, in bf16 too.
"""

import os
from dataclasses import fields, replace
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from fastmoe_lora import MoEConfig, adapt  # noqa: E402
from kernels import GATINGS, Gating, TaskSegments, UserError, custom_ops, lora_moe, resolve_kernel  # noqa: E402
from kernels.dispatch import known_family  # noqa: E402
from kernels.reference import router_logits, top_k_mask  # noqa: E402
from model.vit import ViT, ViTConfig  # noqa: E402

ON_GPU = torch.cuda.is_available()
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter multiplies the bit patterns of bf16 in tl.dot"),
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
EVERY_HALF = pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
EVERY_GATING = pytest.mark.parametrize("name", GATINGS)
WITH_SHARED = ("ase", "naive-shared")
RESULTS = ("y", "g", "P", "dx", "dbase", "dA", "dB", "drouters")
PER_TOKEN = ("y", "g", "dx")

# Norm of the error over the norm. The longest sums here are of some 300 products rounded at 6e-8 each; errors add like
# a random walk, and a router's gradient is a difference of such sums.
FP32_ERROR = 2e-6
# Half precision beside plain PyTorch in the same type: the bound over many shapes. On a single shape with few tokens
# the ratio of so few roundings, lucky or not, scatters widely, and so does fp32 where dz is left of a cancellation.
TIMES_PYTORCH, TIMES_PYTORCH_ONCE = 1.1, 2.0


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


def moved(problem, function):
    """The problem with ``function`` applied to its five tensors, which become new leaves."""
    names = [field.name for field in fields(problem) if isinstance(getattr(problem, field.name), Tensor)]
    return replace(problem, **{name: function(getattr(problem, name).detach()) for name in names}).fresh()


def typed(problem, dtype, device):
    """The problem as a model has it: x and base in ``dtype``, the parameters fp32 masters, logits of order 1.

    A and B are rounded to ``dtype``, so that casting them, which both implementations do, is exact.
    """
    width = problem.x.shape[1] ** -0.5
    a, b = ((weight.detach() * scale).to(dtype).float() for weight, scale in ((problem.a, width), (problem.b, 1)))
    x, base = problem.x.detach().to(dtype), problem.base.detach().to(dtype)
    routers = (1.5 * width * problem.routers.detach()).float()
    return moved(replace(problem, x=x, base=base, a=a, b=b, routers=routers), lambda tensor: tensor.to(device))


def task_rows(problem):
    return TaskSegments.of(problem.counts, problem.x.device)


def gating_of(problem):
    _, k, shared, _ = problem.shape
    return Gating(problem.gating, k, shared)


def operands(problem):
    """The arguments of the operator."""
    x, base, *adapters = (leaf.detach() for leaf in problem.leaves)
    segments = task_rows(problem)
    return x, base, *[None] * 4, *adapters, segments.offsets, segments.length, f"{gating_of(problem).text}/columns"


def forward(problem, kernel="triton", segments=None):
    lora, segments = (problem.a, problem.b), segments or task_rows(problem)
    return lora_moe(problem.x, problem.base, lora, problem.routers, segments, gating_of(problem), kernel)


def cotangents(problem):
    """Gradients of a loss by y and P, in their types and on their device: neither of the two drowns the other in dz."""
    rng = torch.Generator().manual_seed(1)
    y = torch.randn(problem.base.shape, generator=rng)
    counts = torch.tensor(problem.counts)[:, None]
    means = torch.randn(problem.routers.shape[:2], generator=rng) * counts * problem.routers.shape[1]
    return y.to(problem.base), means.to(problem.base.device)


def everything(problem, kernel="triton", weights=None):
    """y, g and P, and every gradient of a loss whose gradients by y and P are ``weights``, by name."""
    problem = problem.fresh()
    dy, dp = weights or cotangents(problem)
    y, g, means = forward(problem, kernel)
    gradients = torch.autograd.grad((y, means), problem.leaves, (dy.to(y.dtype), dp.to(means.dtype)))
    return dict(zip(RESULTS, (y.detach(), g.detach(), means.detach(), *gradients), strict=True))


def in_fp64(problem):
    """The same numbers in fp64."""
    return moved(problem, Tensor.double)


def relative_error(actual, exact):
    difference, size = (actual.double() - exact).norm().item(), exact.norm().item()
    return difference / size if size else difference


def errors(problem):
    """The relative error of each result to fp64 on the same numbers, under the same selection: (ours, PyTorch's)."""
    weights = cotangents(problem)
    exact = everything(in_fp64(problem), "reference", weights)
    ours, plain = (everything(problem, kernel, weights) for kernel in ("triton", "reference"))
    assert torch.equal(ours["g"] > 0, exact["g"] > 0), "the selections differ"
    return tuple({name: relative_error(actual[name], exact[name]) for name in RESULTS} for actual in (ours, plain))


def assert_same_bits(actual, expected, names=RESULTS):
    for name in names:
        assert torch.equal(actual[name], expected[name]), name


def too_large(measured, allowed):
    """The errors above what is allowed, by result."""
    return {name: (error, allowed[name]) for name, error in measured.items() if not error <= allowed[name]}


def assert_accurate(problem):
    """At most FP32_ERROR in fp32 and where every type computes in fp32 (g, P), and in half precision one rounding of
    the result; more only where PyTorch errs about as much. Returns the errors."""
    ours, plain = errors(problem)
    allowed, dtype = {}, problem.x.dtype
    for name in RESULTS:
        fp32 = dtype == torch.float32 or name in ("g", "P")
        allowed[name] = max(FP32_ERROR if fp32 else torch.finfo(dtype).eps / 4, TIMES_PYTORCH_ONCE * plain[name])
    assert too_large(ours, allowed) == {}
    return ours, plain


def assert_as_accurate_as_pytorch(pairs):
    """The root mean squares of the errors, over many problems, are within TIMES_PYTORCH; g and P within FP32_ERROR."""
    ours, plain = (
        {name: (sum(each[name] ** 2 for each in many) / len(many)) ** 0.5 for name in RESULTS}
        for many in zip(*pairs, strict=True)
    )
    assert too_large(ours, {name: max(FP32_ERROR, TIMES_PYTORCH * plain[name]) for name in RESULTS}) == {}


@pytest.fixture(scope="session")
def problem_of(make_problem, device):
    """problem_of(gating, (N, k, S, r), counts, dtype, d_in=, d_out=): a problem whose selection is beyond rounding.

    The k-th and the next logit of a token are at least 5e-5 apart, the rounding of an fp32 logit being about 1e-6.
    """

    def build(name, shape, counts, dtype=torch.float32, d_in=24, d_out=40):
        experts, k, shared, _ = shape
        for seed in range(100):
            problem = typed(make_problem(name, shape, counts, "random", seed, d_in, d_out), dtype, device)
            z = router_logits(problem.x.double(), problem.routers.double(), task_rows(problem))
            ranked = z[:, : experts - shared].sort(descending=True).values
            if k == experts - shared or (ranked[:, k - 1] - ranked[:, k]).min() > 5e-5:
                return problem
        raise AssertionError("no seed gives a clear selection")

    return build


# The grid: every N with every rank that fits, under every gating; k, S, the widths and the rows are dealt from seeded,
# reshuffled decks, so each of their values comes about equally often.
EXPERTS = (2, 3, 5, 8, 12, 16, 24, 32, 64, 128)
RANKS = (1, 2, 4, 8, 16)
WIDEST = 256  # N * r, N padded to a power of two that is at least 16
COUNTS = (
    (1,),
    (3,),
    (17,),
    (65,),
    (2, 5),
    (33, 1),
    (5, 40),
    (7, 2, 12, 1),  # unequal rows, around the blocks of 32 and 64
    (0, 6),
    (2, 0, 0, 4),
    (0, 0, 1),
    (9, 0),  # tasks without rows
    (128, 3),  # two chunks of weight_grad
)
WIDTHS = tuple(range(8, 137, 8))


def deck(values, rng):
    while True:
        yield from rng.sample(values, len(values))


def grid():
    rng = Random(0)
    decks = [deck(values, rng) for values in (range(1, 17), range(9), WIDTHS, WIDTHS, COUNTS)]
    pairs = [(n, r) for n in EXPERTS for r in RANKS if max(16, 1 << (n - 1).bit_length()) * r <= WIDEST]
    for experts, rank in pairs:
        for name in GATINGS:
            k, shared, d_in, d_out, counts = (next(values) for values in decks)
            shared = min(max(shared, 1), experts - 1) if name in WITH_SHARED else 0
            shape = experts, min(k, experts - shared), shared, rank
            yield name, shape, counts, d_in, d_out


GRID = tuple(grid())


class TestAccuracy:
    def test_the_grid_is_as_wide_as_promised(self):
        assert len(set(GRID)) == len(GRID) >= 150
        assert {shape[0] for _, shape, *_ in GRID} == set(EXPERTS)
        assert {shape[1] for _, shape, *_ in GRID} == set(range(1, 17))
        assert {shape[2] for _, shape, *_ in GRID} == set(range(9))
        assert {shape[3] for _, shape, *_ in GRID} == set(RANKS)
        assert {counts for _, _, counts, *_ in GRID} == set(COUNTS)
        assert {case[3] for case in GRID} == {case[4] for case in GRID} == set(WIDTHS)

    @pytest.mark.parametrize("case", GRID, ids=str)
    def test_on_the_grid(self, case, problem_of):
        name, shape, counts, *widths = case
        assert_accurate(problem_of(name, shape, counts, torch.float32, *widths))

    @EVERY_HALF
    @EVERY_GATING
    def test_on_the_grid_in_half_precision(self, name, dtype, problem_of):
        """Every second shape; all of them on a GPU, which is faster."""
        cases = [case for case in GRID if case[0] == name][:: 1 if ON_GPU else 2]
        assert len(cases) > 20
        assert_as_accurate_as_pytorch([assert_accurate(problem_of(*case[:3], dtype, *case[3:])) for case in cases])

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(data=st.data(), name=st.sampled_from(tuple(GATINGS)), dtype=st.sampled_from([torch.float32, torch.float16]))
    def test_on_random_shapes(self, data, name, dtype, problem_of):
        experts = data.draw(st.integers(2, 64))
        shared = data.draw(st.integers(1, min(8, experts - 1))) if name in WITH_SHARED else 0
        padded = max(16, 1 << (experts - 1).bit_length())
        rank = data.draw(st.sampled_from([r for r in RANKS if padded * r <= WIDEST]))
        shape = experts, data.draw(st.integers(1, min(16, experts - shared))), shared, rank
        counts = tuple(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)))
        # The kernels mask every edge, so widths need not be multiples of 8.
        assert_accurate(problem_of(name, shape, counts, dtype, *(data.draw(st.integers(2, 80)) for _ in range(2))))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "shape", [(16, 2, 1, 32), (17, 2, 1, 16), (256, 2, 1, 2), (2, 1, 1, 32), (4, 1, 1, 3), (5, 2, 1, 6)], ids=str
    )
    def test_of_pools_beyond_one_register_tile_and_of_any_rank(self, shape, dtype, problem_of):
        """These run through kernels.experts."""
        assert_accurate(problem_of("ase", shape, (5, 0, 3), dtype))

    @EVERY_GATING
    def test_against_the_equations_token_by_token(self, name, problem_of, oracle):
        """The grid's fp64 is kernels.reference; this one shares no code with kernels/."""
        problem = problem_of(name, (5, 2, 2 if name in WITH_SHARED else 0, 2), (3, 0, 2), d_in=8, d_out=16)
        weights, exact = cotangents(problem), moved(problem, lambda tensor: tensor.double().cpu())
        y, g, means = oracle(exact)
        gradients = torch.autograd.grad((y, means), exact.leaves, [weight.double().cpu() for weight in weights])
        expected = dict(zip(RESULTS, (y, g, means, *gradients), strict=True))
        for result, actual in everything(problem, weights=weights).items():
            assert relative_error(actual.cpu(), expected[result].detach()) <= FP32_ERROR, result

    @EVERY_DTYPE
    @EVERY_GATING
    def test_of_small_gradients_through_the_mean_probabilities_alone(self, name, dtype, problem_of):
        """A mutual-information loss spread over many tokens: dz is of order 1e-8, below what fp16 can express."""
        problem = problem_of(name, (8, 2, 2 if name in WITH_SHARED else 0, 2), (30, 11), dtype)
        dy, dp = cotangents(problem)
        weights = 0 * dy, 1e-8 * dp
        exact = everything(in_fp64(problem), "reference", weights)["drouters"]
        # dz passes through no half-precision number in plain PyTorch, so the fp32 bound holds in every type.
        assert relative_error(everything(problem, weights=weights)["drouters"], exact) <= FP32_ERROR

    @EVERY_DTYPE
    def test_of_gates_from_routers_as_small_as_they_start(self, dtype, problem_of):
        """LoRAMoE draws them with a standard deviation of 0.01; here they are ten times smaller."""
        problem = problem_of("ase", (16, 3, 1, 4), (30, 11), dtype, d_in=136)
        problem.routers.data.mul_(1e-3 / problem.routers.std())
        z = router_logits(problem.x, problem.routers, task_rows(problem))
        exact = router_logits(problem.x.double(), problem.routers.double(), task_rows(problem))
        actual = custom_ops.forward(*operands(problem))[4]
        assert relative_error(actual, exact) <= max(FP32_ERROR, TIMES_PYTORCH * relative_error(z, exact))


def identity_routers(problem, logits):
    """The problem with routers that copy the first C features of x, which hold ``logits`` (T, C); the experts look at
    the other features only, so that extreme logits do not reach y by another way."""
    columns = problem.routers.shape[1]
    x, a, routers = problem.x.detach().clone(), problem.a.detach().clone(), torch.zeros_like(problem.routers)
    x[:, :columns], a[:, :columns] = logits, 0
    routers[:, range(columns), range(columns)] = 1
    return replace(problem, x=x, a=a, routers=routers).fresh()


class TestSelection:
    @EVERY_DTYPE
    @EVERY_GATING
    def test_of_equal_logits_the_lowest_index_wins(self, name, dtype, problem_of):
        shared = 2 if name in WITH_SHARED else 0
        problem = problem_of(name, (12, 4, shared, 2), (40, 3), dtype)
        columns = problem.routers.shape[1]
        logits = torch.randint(-1, 2, (43, columns), generator=torch.Generator().manual_seed(0)).to(problem.x)
        g = forward(identity_routers(problem, logits))[1]
        assert torch.equal(g[:, : 12 - shared] > 0, top_k_mask(logits[:, : 12 - shared], 4))

    @EVERY_GATING
    def test_zero_routers_select_the_first_experts(self, name, problem_of):
        shared = 1 if name in WITH_SHARED else 0
        problem = problem_of(name, (8, 3, shared, 2), (5, 2))
        problem.routers.data.zero_()
        g = forward(problem)[1]
        assert (g > 0).all(0).tolist() == (g > 0).any(0).tolist() == [e < 3 or e >= 8 - shared for e in range(8)]
        assert_accurate(problem)

    @EVERY_DTYPE
    @pytest.mark.parametrize("name", ["topk", "topk-renorm"])
    def test_all_experts_alike_are_plain_lora_over_n(self, name, dtype, problem_of):
        problem = problem_of(name, (8, 8, 0, 4), (6, 0, 11), dtype)
        problem.routers.data.zero_()
        y, g, means = forward(problem)
        x, base, a, b, _ = in_fp64(problem).leaves
        assert g.eq(1 / 8).all() and means[[0, 2]].sub(1 / 8).abs().max() < 1e-7  # P: a sum of up to 11 eighths
        # H, H * g and y are rounded to the type of x, each by at most eps / 2 of the terms summed.
        terms = base.abs() + x.abs() @ a.abs().T @ b.abs().T / 8
        assert ((y - base - x @ a.T @ b.T / 8).abs() <= 2 * torch.finfo(dtype).eps * terms).all()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, in the interpreter
@EVERY_GATING
class TestExtremeLogits:
    @pytest.fixture
    def problem(self, name, problem_of):
        return problem_of(name, (6, 2, 2 if name in WITH_SHARED else 0, 2), (4, 3))

    def logits(self, problem):
        shape = len(problem.x), problem.routers.shape[1]
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(problem.x)

    def test_minus_infinity_is_never_selected_and_leaves_everything_finite(self, name, problem):
        logits = self.logits(problem)
        logits[:, [0, 2]] /= 1e20
        logits[[1, 5], [0, 2]] = -1e20
        problem = identity_routers(problem, logits)
        problem.routers.data[:, [0, 2]] *= 1e20  # -1e40 is -inf, in fp32 and only there
        columns = problem.routers.shape[1]
        z = router_logits(problem.x, problem.routers, task_rows(problem))
        assert z.isneginf().nonzero().tolist() == [[1, 0], [5, 2]] and z.isfinite().sum() == z.numel() - 2
        actual, expected = everything(problem), everything(problem, "reference")
        assert actual["g"][1, 0] == actual["g"][5, 2] == 0
        for result in RESULTS:
            assert actual[result].isfinite().all(), result
            left, right = actual[result], expected[result]
            if result in ("dx", "dA", "drouters"):  # apart from the features of 1e20, beside which all else is nothing
                left, right = left[..., columns:], right[..., columns:]
            assert relative_error(left, right.double()) <= FP32_ERROR, result

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
    def test_nan_or_plus_infinity_is_nan_in_that_token_and_moves_no_other(self, name, value, problem):
        """The policy is that of IEEE numbers, and of torch.softmax: a token with a NaN or +inf logit has a y of NaN,
        for all to see; every other token's y, gates and gradient have the bits they have without it."""
        logits = self.logits(problem)
        clean = identity_routers(problem, logits)
        clean.routers.data.mul_(10)
        dirty = clean.fresh()
        dirty.x.data[1, 0] = value  # token 1 is of task 0; 3e38 becomes a logit of +inf
        dy, dp = cotangents(clean)
        actual, expected = everything(dirty, weights=(dy, dp)), everything(clean, weights=(dy, dp))
        assert actual["y"][1].isnan().all()
        assert torch.equal(everything(dirty, "reference", (dy, dp))["y"].isnan(), actual["y"].isnan())
        others = [token for token in range(len(logits)) if token != 1]
        for result in PER_TOKEN:
            assert torch.equal(actual[result][others], expected[result][others]), result
        assert actual["P"][0].isnan().all() and torch.equal(actual["P"][1], expected["P"][1])
        assert torch.equal(actual["drouters"][1], expected["drouters"][1])

    def test_one_expert_can_take_everything(self, name, problem):
        logits = self.logits(problem)
        logits[:, 1] += 100
        problem = identity_routers(problem, logits)
        actual, expected = everything(problem), everything(in_fp64(problem), "reference", cotangents(problem))
        assert actual["P"][:, 1].sub(1).abs().max() < 1e-6
        for result in RESULTS:
            # exp(-100) is 0 or a subnormal number: an absolute error of that size is none.
            difference = (actual[result].double() - expected[result]).norm()
            assert difference <= FP32_ERROR * expected[result].norm() + 1e-30, result


def scattered(matrix):
    """The same values in rows that lie apart."""
    return torch.cat([matrix, torch.full_like(matrix, 1e4)], -1)[..., : matrix.shape[-1]]


def transposed(matrix):
    """The same values in transposed storage."""
    return matrix.mT.contiguous().mT


class TestLayouts:
    @EVERY_DTYPE
    @pytest.mark.parametrize("layout", [scattered, transposed])
    @pytest.mark.parametrize("which", ["x", "base", "a", "b", "routers", "dy", "dp"])
    def test_strides_do_not_change_a_bit(self, which, layout, dtype, problem_of):
        problem = problem_of("ase", (8, 2, 1, 4), (20, 0, 5), dtype)
        weights = dict(zip(("dy", "dp"), cotangents(problem), strict=True))
        expected = everything(problem, weights=tuple(weights.values()))
        if which in weights:
            weights[which] = layout(weights[which])
            assert not weights[which].is_contiguous()
        else:
            problem = replace(problem, **{which: layout(getattr(problem, which).detach()).requires_grad_()})
            assert not getattr(problem, which).is_contiguous()
        problem.fresh = lambda: problem  # cloning may lay the tensors out anew
        assert_same_bits(everything(problem, weights=tuple(weights.values())), expected)

    def test_cotangents_may_be_one_row_expanded(self, problem_of):
        """As sum() over tokens and over tasks hands them back: strides of 0."""
        problem = problem_of("ase", (8, 2, 1, 4), (20, 0, 5))
        dy, dp = (weight[:1].expand_as(weight) for weight in cotangents(problem))
        expected = everything(problem, weights=(dy.contiguous(), dp.contiguous()))
        assert_same_bits(everything(problem, weights=(dy, dp)), expected)

    def test_a_gradient_through_y_alone_or_p_alone_is_enough(self, problem_of):
        problem = problem_of("ase", (8, 2, 1, 4), (20, 5))
        dy, dp = cotangents(problem)
        for output, weights in ((0, (dy, 0 * dp)), (2, (0 * dy, dp))):
            expected, fresh = everything(problem, weights=weights), problem.fresh()
            leaves = fresh.leaves if output == 0 else (fresh.x, fresh.routers)
            actual = torch.autograd.grad(forward(fresh)[output], leaves, weights[0] if output == 0 else weights[1])
            names = RESULTS[3:] if output == 0 else ("dx", "drouters")
            assert_same_bits(dict(zip(names, actual, strict=True)), expected, names)

    def test_no_tokens_at_all(self, problem_of, make_problem, device):
        problem = typed(make_problem("ase", (8, 2, 1, 4), (0, 0), "random", 0, 24, 40), torch.float32, device)
        results = everything(problem)
        assert results["y"].shape == (0, 40) and results["g"].shape == (0, 8)
        assert all(results[result].eq(0).all() for result in ("P", "dA", "dB", "drouters"))


class TestGradients:
    @EVERY_DTYPE
    @EVERY_GATING
    def test_have_the_types_of_what_they_belong_to(self, name, dtype, problem_of):
        problem = problem_of(name, (8, 2, 1 if name in WITH_SHARED else 0, 2), (9, 4), dtype)
        results = everything(problem)
        assert [results[n].dtype for n in RESULTS] == [dtype, *[torch.float32] * 2, *[dtype] * 2, *[torch.float32] * 3]

    @EVERY_DTYPE
    @EVERY_GATING
    def test_reach_every_parameter_and_no_router_of_an_absent_task(self, name, dtype, problem_of):
        experts, rank = 4, 2
        problem = problem_of(name, (experts, 2, 1 if name in WITH_SHARED else 0, rank), (40, 0, 30), dtype)
        results = everything(problem)
        assert results["g"].gt(0).any(0).all(), "every expert is selected by some token"
        assert results["dA"].ne(0).all() and results["dB"].ne(0).all()
        assert results["drouters"][[0, 2]].ne(0).all() and results["dx"].ne(0).any(1).all()
        assert results["drouters"][1].eq(0).all() and results["P"][1].eq(0).all()


class TestRepeatability:
    @pytest.fixture
    def rows_alike(self, monkeypatch):
        """The interpreter multiplies with BLAS, which rounds a row by its place in the tile; a GPU does not. With
        numpy's own loops in its stead, what is left to depend on a token's place is the kernels'."""
        if not ON_GPU:

            def product(a, b, dtype):
                return np.einsum("ik,kj->ij", a.astype(dtype), b.astype(dtype))

            monkeypatch.setattr(np, "matmul", product)

    @pytest.mark.usefixtures("rows_alike")
    @EVERY_DTYPE
    @EVERY_GATING
    def test_permuting_the_tokens_of_a_task_permutes_their_results_bit_for_bit(self, name, dtype, problem_of):
        problem = problem_of(name, (8, 3, 1 if name in WITH_SHARED else 0, 4), (70, 9), dtype)
        rng = torch.Generator().manual_seed(0)
        order = torch.cat([torch.randperm(70, generator=rng), 70 + torch.randperm(9, generator=rng)])
        dy, dp = cotangents(problem)
        shuffled = replace(problem, x=problem.x[order], base=problem.base[order])
        actual, expected = everything(shuffled, weights=(dy[order], dp)), everything(problem, weights=(dy, dp))
        assert_same_bits(actual, {name: expected[name][order] for name in PER_TOKEN}, PER_TOKEN)

    @EVERY_DTYPE
    def test_ten_repeats_give_the_same_bits(self, dtype, problem_of):
        problem = problem_of("ase", (16, 3, 1, 4), (40, 0, 3), dtype)
        first = everything(problem)
        for _ in range(9):
            assert_same_bits(everything(problem), first)


class TestMemory:
    def test_a_checkpointed_pass_has_the_gradients_of_a_plain_one(self, problem_of):
        problem = problem_of("ase", (8, 2, 1, 4), (20, 0, 5))
        dy, dp = cotangents(problem)

        def run(*leaves):
            return forward(replace(problem, **dict(zip(("x", "base", "a", "b", "routers"), leaves, strict=True))))

        y, _, means = checkpoint(run, *problem.leaves, use_reentrant=False)
        gradients = torch.autograd.grad((y, means), problem.leaves, (dy, dp))
        expected = everything(problem, weights=(dy, dp))
        assert_same_bits(dict(zip(RESULTS[3:], gradients, strict=True)), expected, RESULTS[3:])

    @EVERY_DTYPE
    @EVERY_GATING
    @pytest.mark.parametrize("shape", [(16, 3, 1, 4), (5, 2, 2, 1), (32, 4, 8, 8)], ids=str)
    def test_saved_beside_the_inputs_are_h_and_the_logits(self, name, shape, dtype, problem_of):
        experts, k, shared, rank = shape
        shared = shared if name in WITH_SHARED else 0
        problem = problem_of(name, (experts, k, shared, rank), (7, 0, 12), dtype)
        segments = task_rows(problem)
        known = {t.untyped_storage().data_ptr() for t in (*problem.leaves, segments.offsets)}
        saved = {}

        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            forward(problem, segments=segments)
        assert known & saved.keys(), "the hooks see what is saved"
        extra = sum(size for place, size in saved.items() if place not in known)
        assert 0 < extra <= 19 * (experts * rank * dtype.itemsize + 4 * experts)


class TestOperators:
    """torch.library.opcheck: schema, fake tensors (shapes, strides, types), AOT dispatch."""

    CASES = (
        ("ase", (16, 3, 1, 4), (5, 0, 9), torch.float32),
        ("naive-shared", (5, 2, 2, 2), (3,), torch.float16),
        ("topk", (8, 2, 0, 1), (1, 4), torch.float32),
        ("topk-renorm", (4, 4, 0, 8), (0, 2), torch.float16),
    )

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_forward(self, case, problem_of):
        torch.library.opcheck(custom_ops.forward_op, operands(problem_of(*case)))

    def test_forward_of_matrices_that_are_not_contiguous(self, problem_of):
        x, base, *rest = operands(problem_of(*self.CASES[0]))
        torch.library.opcheck(custom_ops.forward_op, (transposed(x), scattered(base), *rest))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_backward(self, case, problem_of):
        problem = problem_of(*case)
        x, _, _, _, _, _, *rest = given = operands(problem)
        saved = custom_ops.forward_op(*given)[3:]
        torch.library.opcheck(custom_ops.backward_op, (*cotangents(problem), x, *saved, None, None, *rest, True))


class TestRefusals:
    @staticmethod
    def message(call, *arguments):
        with pytest.raises(UserError) as caught:
            call(*arguments)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_fp64(self, problem_of):
        message = self.message(forward, in_fp64(problem_of("ase", (4, 1, 1, 2), (2,))))
        assert "torch.float64" in message and "use --kernel=reference" in message

    @pytest.mark.skipif(ON_GPU, reason="a GPU computes in bf16")
    def test_bf16_in_the_interpreter(self, problem_of):
        message = self.message(forward, problem_of("ase", (4, 1, 1, 2), (2,), torch.bfloat16))
        assert "bf16" in message and "use fp32 or fp16" in message


class TestResolve:
    @pytest.fixture(autouse=True)
    def _forget(self):
        known_family.cache_clear()
        yield
        known_family.cache_clear()

    def test_auto_on_a_cpu_is_the_reference_even_where_triton_can_be_interpreted(self, monkeypatch):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        cpu = torch.device("cpu")
        assert resolve_kernel("auto", cpu) == resolve_kernel("reference", cpu) == "reference"
        assert resolve_kernel("triton", cpu) == "triton"

    def test_triton_on_a_cpu_needs_the_interpreter(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        message = TestRefusals.message(resolve_kernel, "triton", torch.device("cpu"))
        assert "TRITON_INTERPRET=1" in message and "--kernel=reference" in message
        assert resolve_kernel("auto", torch.device("cpu")) == "reference"

    def test_an_unknown_kernel_is_refused(self):
        assert "choose among auto, triton, reference" in TestRefusals.message(
            resolve_kernel, "cuda", torch.device("cpu")
        )


@pytest.fixture
def launches(monkeypatch):
    """The list of kernels launched so far."""
    names = []
    if ON_GPU:
        owner, method = triton.runtime.jit.JITFunction, "run"
    else:
        owner, method = triton.runtime.interpreter.GridExecutor, "__call__"
    original = getattr(owner, method)

    def counted(self, *args, **kwargs):
        names.append(getattr(self, "fn", self).__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, counted)
    return names


class TestWholeModel:
    """LoRAMoE in every block of a small ViT."""

    IMAGES = (1, 0, 2)

    def run(self, name, kernel, device, experts=8, rank=2):
        torch.manual_seed(0)
        vit = ViT(ViTConfig(width=16, depth=2, heads=2, patch=8), 16)
        config = MoEConfig(experts, 2, 1 if name in WITH_SHARED else 0, rank, name)
        routing = adapt(vit, config, len(self.IMAGES), kernel=kernel, freeze=False)
        with torch.no_grad():  # as trained: B nonzero, routers that tell experts apart
            for parameter_name, parameter in vit.named_parameters():
                if parameter_name.endswith(("lora_B", "routers")):
                    parameter.normal_()
        images = torch.randn(sum(self.IMAGES), 3, 16, 16)
        vit.to(device)
        with routing.batch(self.IMAGES) as batch:
            y = vit.encode(vit.embed(images.to(device)))
            mi_loss = batch.mi_loss()
        weight = torch.arange(y.numel(), device=device).sin().view_as(y)
        yield y, mi_loss
        ((y * weight).sum() + mi_loss).backward()
        yield {parameter_name: parameter.grad for parameter_name, parameter in vit.named_parameters()}

    @pytest.mark.parametrize(
        ("name", "pool"), [*((name, (8, 2)) for name in GATINGS), ("ase", (64, 16)), ("naive-shared", (8, 3))], ids=str
    )
    def test_outputs_loss_and_gradients_are_those_of_the_reference(self, name, pool, device):
        runs = (list(self.run(name, kernel, device, *pool)) for kernel in ("triton", "reference"))
        (outputs, gradients), (expected, exact) = runs
        for left, right in zip(outputs, expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == exact.keys()
        for parameter_name, right in exact.items():
            # Rounding of two layers, to the largest entry; it is 1e-6 at most.
            atol = 1e-5 * right.abs().max().item()
            torch.testing.assert_close(gradients[parameter_name], right, rtol=1e-5, atol=atol, msg=parameter_name)

    def test_a_layer_launches_two_kernels_forward_and_five_backward(self, device, launches):
        run = self.run("ase", "triton", device)
        next(run)
        assert launches == 2 * ["route_shrink_kernel", "expand_kernel"]
        launches.clear()
        next(run)
        assert launches == 2 * [
            "pack_kernel",
            "gate_backward_kernel",
            "weight_grad_kernel",
            "weight_grad_kernel",
            "reduce_kernel",
        ]

    def test_a_layer_of_a_pool_beyond_one_register_tile_launches_two_kernels_in_each_direction(self, device, launches):
        run = self.run("ase", "triton", device, 64, 16)
        next(run)
        assert launches == 2 * ["route_kernel", "gate_kernel"]
        launches.clear()
        next(run)
        assert launches == 2 * ["gate_kernel", "route_backward_kernel"]

    def test_the_reference_launches_none(self, device, launches):
        list(self.run("ase", "reference", device))
        assert launches == []
