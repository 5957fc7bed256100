"""The adapted FFN as one operation: every algorithm of computing it against fp64, and what it saves, keeps and repeats.

Without a GPU the kernels run in Triton's interpreter, on the CPU; with one, the same tests run on it, in bf16 too.
"""

import os
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels.ffn import ALGORITHMS, ffn_reference  # noqa: E402
from kernels.packed import Packed  # noqa: E402

from kernels import GATINGS, Gating, TaskSegments, UserError, custom_ops  # noqa: E402
from kernels.reference import router_logits  # noqa: E402

ON_GPU = torch.cuda.is_available()
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter multiplies the bit patterns of bf16 in tl.dot"),
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
EVERY_HALF = pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
EVERY_GATING = pytest.mark.parametrize("gating", GATINGS)
STACKED = "columns stacked"  # with a copy of W1 and A for each task
EVERY_ALGORITHM = pytest.mark.parametrize("algorithm", ALGORITHMS)
EVERY_LAYOUT = pytest.mark.parametrize("algorithm", [*ALGORITHMS, STACKED])
WITH_SHARED = ("ase", "naive-shared")
RESULTS = ("y", "g", "P", "dx", "dA", "dB", "drouters")

# As in test_triton.py: norm of the error over the norm, of fp32 sums and beside plain PyTorch in half precision, over
# many shapes and on a single one, where the ratio of so few roundings scatters.
FP32_ERROR = 2e-6
TIMES_PYTORCH, TIMES_PYTORCH_ONCE = 1.1, 2.0

# ((N, k, S, r), tokens of each task, (d, F, D)); S is 0 and k one more where a gating knows no shared experts.
SHAPES = (
    ((16, 3, 1, 4), (5, 0, 33), (24, 40, 24)),
    ((5, 2, 2, 1), (9, 4, 2), (24, 72, 40)),  # R = 5 and tasks C = 15 or 9: neither a multiple of 8
    ((2, 1, 1, 1), (1,), (9, 7, 17)),  # widths that are multiples of nothing
    ((12, 4, 3, 16), (0, 66), (32, 48, 8)),  # R = 192; blocks of 32 and 64 tokens overfilled
    ((40, 7, 5, 2), (3, 1, 0, 2), (136, 16, 136)),  # several steps along d and D
)
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@dataclass
class FFN:
    """An adapted FFN with its tokens: x and the frozen weights in one type, the adapters fp32 masters, in ``leaves``.

    A and B are rounded to that type, so that casting them, which every implementation does, is exact."""

    gating: Gating
    segments: TaskSegments
    linears: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
    leaves: list[Tensor]  # x, A, B, routers
    cotangents: tuple[Tensor, Tensor]  # of y and P: neither drowns the other in dz
    packed: dict[bool, Packed] = field(init=False)  # not stacked, and stacked

    def __post_init__(self) -> None:
        x, *adapters = self.leaves
        (w1, _), (w2, _) = self.linears
        widths = w1.shape[1], len(w1), len(w2)
        self.packed = {stacked: Packed.empty(widths, adapters, x.dtype, stacked) for stacked in (False, True)}
        for packed in self.packed.values():
            packed.fill_frozen(*self.linears)
            packed.fill(*adapters)

    def forward(self, algorithm, x=None, leaves=None):
        x, a, b, routers = leaves or self.leaves if x is None else (x, *self.leaves[1:])
        packed, name = self.packed[algorithm == STACKED], algorithm.split(" ")[0]
        return custom_ops.lora_moe_packed(x, packed, (a, b), routers, self.segments, self.gating, name)

    def reference(self, dtype):
        """The results of PyTorch with x, the weights and the sums in ``dtype``, A, B and the routers no less exact."""
        exact = torch.promote_types(dtype, torch.float32)
        x, a, b, routers = leaves = [
            leaf.detach().to(dtype if place == 0 else exact).requires_grad_() for place, leaf in enumerate(self.leaves)
        ]
        linears = tuple(tuple(tensor.to(dtype) for tensor in linear) for linear in self.linears)
        return self.results(ffn_reference(x, linears, (a, b), routers, self.segments, self.gating), leaves)

    def __call__(self, algorithm):
        return self.results(self.forward(algorithm), self.leaves)

    def results(self, outputs, leaves):
        y, g, p = outputs
        weights = [weight.to(output.dtype) for weight, output in zip(self.cotangents, (y, p), strict=True)]
        gradients = torch.autograd.grad((y, p), leaves, weights)
        return dict(zip(RESULTS, (y.detach(), g.detach(), p.detach(), *gradients), strict=True))


def make(gating, shape, dtype=torch.float32, device=None):
    """An FFN whose selection is beyond rounding: the k-th and the next logit of a token are at least 5e-5 apart, the
    rounding of an fp32 logit being about 1e-6. Else fp64 might choose other experts, which would drown all errors."""
    (experts, k, shared, rank), counts, (d, hidden, width) = shape
    gate = Gating(gating, k, shared) if gating in WITH_SHARED else Gating(gating, k + 1, 0)
    columns, tasks, tokens = gate.router_columns(experts), len(counts), sum(counts)
    device = device or torch.device("cuda" if ON_GPU else "cpu")
    for seed in range(100):
        rng = torch.Generator().manual_seed(seed)

        def normal(*size, scale=1.0, type=torch.float32, rng=rng):
            return (scale * torch.randn(size, generator=rng)).to(type).to(device)

        x, routers = normal(tokens, d, type=dtype), normal(tasks, columns, d, scale=1.5 * d**-0.5)
        a, b = normal(experts * rank, d, scale=d**-0.5, type=dtype), normal(width, experts * rank, type=dtype)
        linears = tuple(
            (normal(n, m, scale=m**-0.5, type=dtype), normal(n, type=dtype)) for n, m in ((hidden, d), (width, hidden))
        )
        segments = TaskSegments.of(counts, device)
        dp = normal(tasks, columns) * torch.tensor(counts, device=device)[:, None] * columns
        leaves = [leaf.requires_grad_() for leaf in (x, a.float(), b.float(), routers)]
        z = router_logits(x.detach().double(), routers.detach().double(), segments)
        ranked = z[:, : experts - gate.shared].sort(descending=True).values
        if gate.k == experts - gate.shared or (ranked[:, gate.k - 1] - ranked[:, gate.k]).min() > 5e-5:
            return FFN(gate, segments, linears, leaves, (normal(tokens, width, type=dtype), dp))
    raise AssertionError("no seed gives a clear selection")


@pytest.fixture
def ffn():
    """One that most tests are content with."""
    return make("ase", SHAPES[0])


def relative_error(actual, exact):
    difference, size = (actual.double() - exact).norm().item(), exact.norm().item()
    return difference / size if size else difference


def errors(actual, exact):
    assert torch.equal(actual["g"] > 0, exact["g"] > 0), "the selections differ"
    return {name: relative_error(actual[name], exact[name]) for name in RESULTS}


def too_large(measured, allowed):
    return {name: (error, allowed[name]) for name, error in measured.items() if not error <= allowed[name]}


def assert_same_bits(actual, expected, names=RESULTS):
    for name in names:
        assert torch.equal(actual[name], expected[name]), name


class TestAccuracy:
    @EVERY_SHAPE
    @EVERY_GATING
    @EVERY_LAYOUT
    def test_in_fp32(self, algorithm, gating, shape):
        ffn = make(gating, shape)
        exact, plain = ffn.reference(torch.float64), ffn.reference(torch.float32)
        allowed = {name: max(FP32_ERROR, TIMES_PYTORCH_ONCE * error) for name, error in errors(plain, exact).items()}
        assert too_large(errors(ffn(algorithm), exact), allowed) == {}

    @EVERY_HALF
    @EVERY_ALGORITHM
    def test_in_half_precision_is_pytorch_s(self, algorithm, dtype):
        pairs = []
        for gating in GATINGS:
            for shape in SHAPES:
                ffn = make(gating, shape, dtype)
                exact = ffn.reference(torch.float64)
                pairs.append((errors(ffn(algorithm), exact), errors(ffn.reference(dtype), exact)))
                allowed = {n: max(torch.finfo(dtype).eps / 4, TIMES_PYTORCH_ONCE * e) for n, e in pairs[-1][1].items()}
                assert too_large(pairs[-1][0], allowed) == {}, (gating, shape)
        ours, plain = (
            {name: (sum(each[name] ** 2 for each in many) / len(many)) ** 0.5 for name in RESULTS}
            for many in zip(*pairs, strict=True)
        )
        assert too_large(ours, {n: max(FP32_ERROR, TIMES_PYTORCH * error) for n, error in plain.items()}) == {}

    @EVERY_GATING
    def test_against_the_equations_token_by_token(self, gating, make_problem, oracle):
        """fp64 above is kernels.ffn.ffn_reference; this one shares no code with kernels/."""
        ffn = make(gating, ((5, 2, 2, 2), (3, 0, 2), (8, 16, 24)))
        experts, rank = 5, 2
        shape = experts, ffn.gating.k, ffn.gating.shared, rank
        problem = make_problem(gating, shape, ffn.segments.counts, d_in=8, d_out=24)
        x, problem.a, problem.b, problem.routers = leaves = [
            leaf.detach().double().cpu().requires_grad_() for leaf in ffn.leaves
        ]
        (w1, b1), (w2, b2) = ((tensor.double().cpu() for tensor in linear) for linear in ffn.linears)
        u = x @ w1.T + b1
        problem.x, problem.base = x, (u * (1 + torch.erf(u / 2**0.5)) / 2) @ w2.T + b2
        ffn.cotangents, weights = [w.cpu().double() for w in ffn.cotangents], ffn.cotangents
        expected = ffn.results(oracle(problem), leaves)
        ffn.cotangents = weights
        for name, error in errors({n: t.cpu() for n, t in ffn("").items()}, expected).items():
            assert error <= FP32_ERROR, name

    def test_the_ways_differ_in_the_rounding_of_products_alone(self):
        ffn = make("topk", SHAPES[3])
        first, *others = (ffn(algorithm) for algorithm in ALGORITHMS)
        for other in others:
            assert_same_bits(other, first, ("g", "P"))
            # Two fp32 sums in different orders, each as exact as FP32_ERROR promises.
            assert too_large(errors(other, first), dict.fromkeys(RESULTS, 2 * FP32_ERROR)) == {}

    @EVERY_LAYOUT
    def test_no_tokens_at_all(self, algorithm, device):
        tokens, adapters = torch.zeros(0, 24, device=device), [(8, 24), (40, 8), (2, 4, 24)]
        a, b, routers = (torch.randn(size, device=device) for size in adapters)
        leaves = [leaf.requires_grad_() for leaf in (tokens, a, b, routers)]
        weights = torch.randn(16, 24, device=device), torch.randn(40, 16, device=device)
        linears = tuple((weight, weight[:, 0].clone()) for weight in weights)
        dy, dp = torch.zeros(0, 40, device=device), torch.ones(2, 4, device=device)
        results = FFN(Gating("ase", 1, 1), TaskSegments.of((0, 0), device), linears, leaves, (dy, dp))(algorithm)
        assert results["y"].shape == (0, 40) and results["g"].shape == (0, 4) and results["dx"].shape == (0, 24)
        assert all(results[name].eq(0).all() for name in ("P", "dA", "dB", "drouters"))


@EVERY_ALGORITHM
class TestGradients:
    @EVERY_DTYPE
    def test_have_the_types_of_what_they_belong_to(self, algorithm, dtype):
        results = make("naive-shared", SHAPES[1], dtype)(algorithm)
        assert [results[name].dtype for name in RESULTS] == [dtype, *[torch.float32] * 2, dtype, *[torch.float32] * 3]

    @EVERY_DTYPE
    def test_are_the_same_bits_in_every_run_and_every_pass_back(self, algorithm, dtype):
        ffn = make("ase", SHAPES[0], dtype)
        saved = {}

        def keep(tensor):
            saved.setdefault(id(tensor), (tensor, tensor.detach().clone()))
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y, g, p = ffn.forward(algorithm)
        cotangents = [weight.to(output.dtype) for weight, output in zip(ffn.cotangents, (y, p), strict=True)]
        before = [weight.clone() for weight in cotangents]
        once, twice = (torch.autograd.grad((y, p), ffn.leaves, cotangents, retain_graph=True) for _ in range(2))
        first = dict(zip(RESULTS, (y, g, p, *once), strict=True))
        assert_same_bits(dict(zip(RESULTS, (y, g, p, *twice), strict=True)), first)
        assert_same_bits(ffn(algorithm), first)
        assert saved and all(torch.equal(tensor, was) for tensor, was in saved.values())
        assert all(torch.equal(weight, was) for weight, was in zip(cotangents, before, strict=True))

    def test_do_not_depend_on_strides(self, algorithm, ffn):
        (dy, dp), x = ffn.cotangents, ffn.leaves[0].detach()
        expected = ffn(algorithm)
        apart = torch.cat([x, x + 1], 1)[:, : x.shape[1]].requires_grad_()
        columns = x.t().contiguous().t().requires_grad_()
        for layout in (apart, columns):
            assert not layout.is_contiguous()
            ffn.leaves[0] = layout
            for ffn.cotangents in ((dy, dp), (torch.cat([dy, dy + 1], 1)[:, : dy.shape[1]], dp.t().contiguous().t())):
                assert_same_bits(ffn(algorithm), expected)

    def test_of_a_sum_whose_cotangents_are_one_row_expanded(self, algorithm, ffn):
        segments = [weight[:1].expand_as(weight) for weight in ffn.cotangents]
        ffn.cotangents = [row.contiguous() for row in segments]
        expected = ffn(algorithm)
        ffn.cotangents = segments
        assert_same_bits(ffn(algorithm), expected)
        y = ffn.forward(algorithm)[0]
        ffn.cotangents = torch.ones_like(y), torch.zeros_like(ffn.cotangents[1])
        assert torch.equal(torch.autograd.grad(y.sum(), ffn.leaves[0])[0], ffn(algorithm)["dx"])

    def test_through_y_alone_or_p_alone_are_enough(self, algorithm, ffn):
        dy, dp = ffn.cotangents
        for output, weight, both in ((0, dy, (dy, 0 * dp)), (2, dp, (0 * dy, dp))):
            ffn.cotangents = both
            expected = ffn(algorithm)
            actual = torch.autograd.grad(ffn.forward(algorithm)[output], ffn.leaves, weight)
            assert_same_bits(dict(zip(RESULTS[3:], actual, strict=True)), expected, RESULTS[3:])

    def test_of_a_checkpointed_pass_are_those_of_a_plain_one(self, algorithm, ffn):
        outputs = checkpoint(lambda *leaves: ffn.forward(algorithm, leaves=leaves), *ffn.leaves, use_reentrant=False)
        assert_same_bits(ffn.results(outputs, ffn.leaves), ffn(algorithm))

    def test_leave_the_packed_weights_as_they_are(self, algorithm, ffn):
        before = [tensor.clone() for packed in ffn.packed.values() for tensor in packed.tensors]
        ffn(algorithm)
        after = [tensor for packed in ffn.packed.values() for tensor in packed.tensors]
        assert all(torch.equal(tensor, was) for tensor, was in zip(after, before, strict=True))


@EVERY_DTYPE
@EVERY_GATING
@EVERY_ALGORITHM
def test_saved_beside_the_weights_are_x_u_h_and_the_logits(algorithm, gating, dtype):
    """To the byte, so neither gelu(u) nor anything else of its width is kept."""
    (experts, _, _, rank), counts, (_, hidden, _) = shape = SHAPES[0]
    ffn = make(gating, shape, dtype)
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in (*ffn.leaves, *ffn.packed[False].tensors, ffn.segments.offsets)
    }
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = ffn.forward(algorithm)
    assert {leaf.untyped_storage().data_ptr() for leaf in ffn.leaves} <= saved.keys() and outputs[0].requires_grad
    extra = sum(size for place, size in saved.items() if place not in known)
    columns = ffn.gating.router_columns(experts)
    assert extra == sum(counts) * ((hidden + experts * rank) * dtype.itemsize + 4 * columns)


@EVERY_GATING
@pytest.mark.parametrize("counts", [(9, 9, 9), (11, 11, 11, 11)], ids=str)
def test_stacked_weights_make_dx_one_batched_product_over_equal_runs(counts, gating, monkeypatch):
    """C columns of dz instead of tasks C, both rounded up to multiples of 8."""
    ffn, tasks, product, operands = make(gating, ((5, 2, 2, 1), counts, (24, 72, 40))), len(counts), torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda *given: operands.append(given) or product(*given))
    exact = ffn.reference(torch.float64)
    operands.clear()
    assert too_large(errors(ffn(STACKED), exact), dict.fromkeys(RESULTS, FP32_ERROR)) == {}
    ((grad, down),) = operands
    assert grad.shape == (tasks, counts[0], 72 + 8 + 8) and down.shape == (tasks, 72 + 8 + 8, 24)


@pytest.mark.parametrize(("experts", "tasks", "stacked"), [(4, 2, False), (5, 1, False), (4, 3, True), (9, 2, True)])
def test_weights_are_stacked_where_that_makes_columns_fewer(experts, tasks, stacked):
    """Four logits of two tasks fill the eight columns that four logits are rounded up to."""
    ffn = make("topk", ((experts, 1, 1, 2), (7,) * tasks, (24, 40, 24)))
    assert ffn.packed[True].stacked == stacked
    assert too_large(errors(ffn(STACKED), ffn.reference(torch.float64)), dict.fromkeys(RESULTS, FP32_ERROR)) == {}


class TestOperators:
    """torch.library.opcheck: schema, fake tensors (shapes, strides, types), autograd registration, AOT dispatch."""

    CASES = (("ase", SHAPES[0], torch.float32, ""), ("topk", SHAPES[1], torch.float16, "matmul"),
             ("naive-shared", SHAPES[2], torch.float32, "expand"))  # fmt: skip
    EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)

    @staticmethod
    def arguments(ffn, algorithm):
        static = ffn.segments.counts, *vars(ffn.gating).values(), algorithm
        return *ffn.packed[False].tensors, ffn.segments.offsets, *static

    @EVERY_CASE
    def test_forward(self, case):
        *rest, algorithm = case
        ffn = make(*rest)
        torch.library.opcheck(custom_ops.lora_moe_packed_op, (*ffn.leaves, *self.arguments(ffn, algorithm)))

    @EVERY_CASE
    def test_backward(self, case):
        *rest, algorithm = case
        ffn = make(*rest)
        x, *adapters = (leaf.detach() for leaf in ffn.leaves)
        *_, h, z, u = custom_ops.lora_moe_packed_op(x, *adapters, *self.arguments(ffn, algorithm))
        arguments = *ffn.cotangents, x, u, h, z, *adapters, *self.arguments(ffn, algorithm)
        torch.library.opcheck(custom_ops.lora_moe_packed_backward_op, arguments)


class TestRefusals:
    @pytest.mark.parametrize(("shape", "words"), [
        (((17, 2, 1, 16), (2,), (8, 16, 8)), ("17 experts of rank 16", "need kernels.lora_moe")),
        (((4, 1, 1, 3), (2,), (8, 16, 8)), ("4 experts of rank 3", "need kernels.lora_moe")),
    ])  # fmt: skip
    def test_of_pools_that_no_tile_holds(self, shape, words):
        with pytest.raises(UserError) as caught:
            make("ase", shape)("")
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)

    def test_of_fp64(self):
        with pytest.raises(UserError, match=r"torch\.float64; use --kernel=reference"):
            make("ase", SHAPES[1], torch.float64)("")
