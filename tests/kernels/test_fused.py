"""The experts fused with the frozen layer, a linear layer or an FFN, against fp64; what is saved, kept and repeated.

Without a GPU the kernels run in Triton's interpreter, on the CPU; with one, the same tests run on it, in bf16 too.
"""

import os
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels import GATINGS, Gating, TaskSegments, UserError, custom_ops  # noqa: E402
from kernels.custom_ops import ALGORITHMS  # noqa: E402
from kernels.reference import lora_moe, router_logits  # noqa: E402

ON_GPU = torch.cuda.is_available()
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter multiplies the bit patterns of bf16 in tl.dot"),
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
EVERY_HALF = pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
EVERY_GATING = pytest.mark.parametrize("gating", GATINGS)
LINEAR = "linear"  # beside one linear layer instead of an FFN
EVERY_ALGORITHM = pytest.mark.parametrize("algorithm", [*ALGORITHMS, LINEAR])
WITH_SHARED = ("ase", "naive-shared")
RESULTS = ("y", "g", "P", "dx", "dA", "dB", "drouters")

# As in test_triton.py: norm of the error over the norm, of fp32 sums and beside plain PyTorch in half precision, over
# many shapes and on a single one, where the ratio of so few roundings scatters.
FP32_ERROR = 2e-6
TIMES_PYTORCH, TIMES_PYTORCH_ONCE = 1.1, 2.0

# ((N, k, S, r), tokens of each task, (d, F, D)), of which a linear layer has (d, F); S is 0 and k one more where a
# gating knows no shared experts.
SHAPES = (
    ((16, 3, 1, 4), (5, 0, 33), (24, 40, 24)),
    ((5, 2, 2, 1), (9, 4, 2), (24, 72, 40)),  # R = 5 and tasks C = 15 or 9: neither a multiple of 8
    ((2, 1, 1, 1), (1,), (9, 17, 7)),  # widths that are multiples of nothing
    ((12, 4, 3, 16), (0, 66), (32, 48, 8)),  # R = 192; blocks of 32 and 64 tokens overfilled
    ((40, 7, 5, 2), (3, 1, 0, 2), (136, 16, 136)),  # several steps along d and D
)
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@dataclass
class Layer:
    """An adapted layer with its tokens: x and the frozen weights in one type, the adapters fp32 masters, in ``leaves``.

    A and B are rounded to that type, so that casting them, which every implementation does, is exact."""

    gating: Gating
    segments: TaskSegments
    linears: tuple[tuple[Tensor, Tensor], ...]  # one linear layer, or the two of an FFN
    leaves: list[Tensor]  # x, A, B, routers
    cotangents: tuple[Tensor, Tensor]  # of y and P: neither drowns the other in dz
    algorithm: str = ""

    def forward(self, leaves=None):
        x, a, b, routers = leaves or self.leaves
        rest = routers, self.segments, self.gating
        return custom_ops.lora_moe(x, self.linears, (a, b), *rest, algorithm=self.algorithm)

    def reference(self, dtype):
        """The results of PyTorch with x, the weights and the sums in ``dtype``, A, B and the routers no less exact."""
        exact = torch.promote_types(dtype, torch.float32)
        x, a, b, routers = leaves = [
            leaf.detach().to(dtype if place == 0 else exact).requires_grad_() for place, leaf in enumerate(self.leaves)
        ]
        linears = tuple(tuple(tensor.to(dtype) for tensor in linear) for linear in self.linears)
        return self.results(lora_moe(x, linears, (a, b), routers, self.segments, self.gating), leaves)

    def __call__(self):
        return self.results(self.forward(), self.leaves)

    @property
    def arguments(self):
        """Those of the operator."""
        x, *adapters = (leaf.detach() for leaf in self.leaves)
        frozen = *((None, None) if len(self.linears) == 1 else self.linears[0]), *self.linears[-1]
        setting = f"{self.gating.text}/{self.algorithm}"
        return x, None, *frozen, *adapters, self.segments.offsets, self.segments.length, setting

    def results(self, outputs, leaves):
        y, g, p = outputs
        weights = [weight.to(output.dtype) for weight, output in zip(self.cotangents, (y, p), strict=True)]
        gradients = torch.autograd.grad((y, p), leaves, weights)
        return dict(zip(RESULTS, (y.detach(), g.detach(), p.detach(), *gradients), strict=True))


def make(algorithm, gating, shape, dtype=torch.float32, device=None):
    """A layer whose selection is beyond rounding: the k-th and the next logit of a token are at least 5e-5 apart, the
    rounding of an fp32 logit being about 1e-6. Else fp64 might choose other experts, which would drown all errors."""
    (experts, k, shared, rank), counts, widths = shape
    widths, algorithm = (widths[:2], "") if algorithm == LINEAR else (widths, algorithm)
    gate = Gating(gating, k, shared) if gating in WITH_SHARED else Gating(gating, k + 1, 0)
    columns, tasks, tokens, d = gate.router_columns(experts), len(counts), sum(counts), widths[0]
    device = device or torch.device("cuda" if ON_GPU else "cpu")
    for seed in range(100):
        rng = torch.Generator().manual_seed(seed)

        def normal(*size, scale=1.0, type=torch.float32, rng=rng):
            return (scale * torch.randn(size, generator=rng)).to(type).to(device)

        x, routers = normal(tokens, d, type=dtype), normal(tasks, columns, d, scale=1.5 * d**-0.5)
        a, b = normal(experts * rank, d, scale=d**-0.5, type=dtype), normal(widths[-1], experts * rank, type=dtype)
        linears = tuple((normal(n, m, scale=m**-0.5, type=dtype), normal(n, type=dtype)) for m, n in pairwise(widths))
        segments = TaskSegments.of(counts, device)
        dp = normal(tasks, columns) * torch.tensor(counts, device=device)[:, None] * columns
        leaves = [leaf.requires_grad_() for leaf in (x, a.float(), b.float(), routers)]
        z = router_logits(x.detach().double(), routers.detach().double(), segments)
        ranked = z[:, : experts - gate.shared].sort(descending=True).values
        if gate.k == experts - gate.shared or not tokens or (ranked[:, gate.k - 1] - ranked[:, gate.k]).min() > 5e-5:
            return Layer(gate, segments, linears, leaves, (normal(tokens, widths[-1], type=dtype), dp), algorithm)
    raise AssertionError("no seed gives a clear selection")


@pytest.fixture
def layer(algorithm):
    """One that most tests are content with."""
    return make(algorithm, "ase", SHAPES[0])


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
    @EVERY_ALGORITHM
    def test_in_fp32(self, algorithm, gating, shape):
        layer = make(algorithm, gating, shape)
        exact, plain = layer.reference(torch.float64), layer.reference(torch.float32)
        allowed = {name: max(FP32_ERROR, TIMES_PYTORCH_ONCE * error) for name, error in errors(plain, exact).items()}
        assert too_large(errors(layer(), exact), allowed) == {}

    @EVERY_HALF
    @EVERY_ALGORITHM
    def test_in_half_precision_is_pytorch_s(self, algorithm, dtype):
        pairs = []
        for gating in GATINGS:
            for shape in SHAPES:
                layer = make(algorithm, gating, shape, dtype)
                exact = layer.reference(torch.float64)
                pairs.append((errors(layer(), exact), errors(layer.reference(dtype), exact)))
                allowed = {n: max(torch.finfo(dtype).eps / 4, TIMES_PYTORCH_ONCE * e) for n, e in pairs[-1][1].items()}
                assert too_large(pairs[-1][0], allowed) == {}, (gating, shape)
        ours, plain = (
            {name: (sum(each[name] ** 2 for each in many) / len(many)) ** 0.5 for name in RESULTS}
            for many in zip(*pairs, strict=True)
        )
        assert too_large(ours, {n: max(FP32_ERROR, TIMES_PYTORCH * error) for n, error in plain.items()}) == {}

    @EVERY_HALF
    @EVERY_ALGORITHM
    def test_of_one_layer_in_half_precision(self, algorithm, dtype):
        """As above, quickly enough to be interpreted from machine code (test_ptx.py)."""
        layer = make(algorithm, "ase", SHAPES[0], dtype)
        exact = layer.reference(torch.float64)
        allowed = {
            name: max(torch.finfo(dtype).eps / 4, TIMES_PYTORCH_ONCE * error)
            for name, error in errors(layer.reference(dtype), exact).items()
        }
        assert too_large(errors(layer(), exact), allowed) == {}

    @EVERY_GATING
    @pytest.mark.parametrize("algorithm", ["", LINEAR])
    def test_against_the_equations_token_by_token(self, algorithm, gating, make_problem, oracle):
        """fp64 above is kernels.reference; this one shares no code with kernels/."""
        layer = make(algorithm, gating, ((5, 2, 2, 2), (3, 0, 2), (8, 24, 16)))
        shape = 5, layer.gating.k, layer.gating.shared, 2
        width = len(layer.linears[-1][0])
        problem = make_problem(gating, shape, layer.segments.counts, d_in=8, d_out=width)
        problem.x, problem.a, problem.b, problem.routers = leaves = [
            leaf.detach().double().cpu().requires_grad_() for leaf in layer.leaves
        ]
        *down, (w, b) = ([tensor.double().cpu() for tensor in linear] for linear in layer.linears)
        inner = problem.x
        for weight, bias in down:
            u = inner @ weight.T + bias
            inner = u * (1 + torch.erf(u / 2**0.5)) / 2
        problem.base = inner @ w.T + b
        actual = {name: result.cpu() for name, result in layer().items()}
        layer.cotangents = [w.cpu().double() for w in layer.cotangents]
        measured = errors(actual, layer.results(oracle(problem), leaves))
        assert too_large(measured, dict.fromkeys(RESULTS, FP32_ERROR)) == {}

    def test_the_algorithms_differ_in_the_rounding_of_products_alone(self):
        first, other = (make(algorithm, "topk", SHAPES[3])() for algorithm in ALGORITHMS)
        assert_same_bits(other, first, ("g", "P"))
        # Two fp32 sums in different orders, each as exact as FP32_ERROR promises.
        assert too_large(errors(other, first), dict.fromkeys(RESULTS, 2 * FP32_ERROR)) == {}

    @EVERY_ALGORITHM
    def test_no_tokens_at_all(self, algorithm):
        results = make(algorithm, "ase", ((4, 1, 1, 2), (0, 0), (24, 16, 16)))()
        assert results["y"].shape == (0, 16) and results["g"].shape == (0, 4) and results["dx"].shape == (0, 24)
        assert all(results[name].eq(0).all() for name in ("P", "dA", "dB", "drouters"))


@EVERY_ALGORITHM
class TestGradients:
    @EVERY_DTYPE
    def test_have_the_types_of_what_they_belong_to(self, algorithm, dtype):
        results = make(algorithm, "naive-shared", SHAPES[1], dtype)()
        assert [results[name].dtype for name in RESULTS] == [dtype, *[torch.float32] * 2, dtype, *[torch.float32] * 3]

    @EVERY_DTYPE
    def test_are_the_same_bits_in_every_run_and_every_pass_back(self, algorithm, dtype):
        layer = make(algorithm, "ase", SHAPES[0], dtype)
        saved = {}

        def keep(tensor):
            saved.setdefault(id(tensor), (tensor, tensor.detach().clone()))
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y, g, p = layer.forward()
        cotangents = [weight.to(output.dtype) for weight, output in zip(layer.cotangents, (y, p), strict=True)]
        before = [weight.clone() for weight in cotangents]
        once, twice = (torch.autograd.grad((y, p), layer.leaves, cotangents, retain_graph=True) for _ in range(2))
        first = dict(zip(RESULTS, (y, g, p, *once), strict=True))
        assert_same_bits(dict(zip(RESULTS, (y, g, p, *twice), strict=True)), first)
        assert_same_bits(layer(), first)
        assert saved and all(torch.equal(tensor, was) for tensor, was in saved.values())
        assert all(torch.equal(weight, was) for weight, was in zip(cotangents, before, strict=True))

    def test_do_not_depend_on_strides(self, layer):
        (dy, dp), x = layer.cotangents, layer.leaves[0].detach()
        expected = layer()
        apart = torch.cat([x, x + 1], 1)[:, : x.shape[1]].requires_grad_()
        columns = x.t().contiguous().t().requires_grad_()
        for layout in (apart, columns):
            assert not layout.is_contiguous()
            layer.leaves[0] = layout
            for layer.cotangents in ((dy, dp), (torch.cat([dy, dy + 1], 1)[:, : dy.shape[1]], dp.t().contiguous().t())):
                assert_same_bits(layer(), expected)

    def test_of_a_sum_whose_cotangents_are_one_row_expanded(self, layer):
        segments = [weight[:1].expand_as(weight) for weight in layer.cotangents]
        layer.cotangents = [row.contiguous() for row in segments]
        expected = layer()
        layer.cotangents = segments
        assert_same_bits(layer(), expected)
        y = layer.forward()[0]
        layer.cotangents = torch.ones_like(y), torch.zeros_like(layer.cotangents[1])
        assert torch.equal(torch.autograd.grad(y.sum(), layer.leaves[0])[0], layer()["dx"])

    def test_through_y_alone_or_p_alone_are_enough(self, layer):
        dy, dp = layer.cotangents
        for output, weight, both in ((0, dy, (dy, 0 * dp)), (2, dp, (0 * dy, dp))):
            layer.cotangents = both
            expected = layer()
            actual = torch.autograd.grad(layer.forward()[output], layer.leaves, weight)
            assert_same_bits(dict(zip(RESULTS[3:], actual, strict=True)), expected, RESULTS[3:])

    def test_of_a_checkpointed_pass_are_those_of_a_plain_one(self, layer):
        outputs = checkpoint(lambda *leaves: layer.forward(leaves), *layer.leaves, use_reentrant=False)
        assert_same_bits(layer.results(outputs, layer.leaves), layer())

    def test_leave_the_weights_as_they_are(self, layer):
        tensors = [*layer.leaves, *(tensor for linear in layer.linears for tensor in linear)]
        before = [tensor.detach().clone() for tensor in tensors]
        layer()
        assert all(torch.equal(tensor, was) for tensor, was in zip(tensors, before, strict=True))


@EVERY_DTYPE
@EVERY_GATING
@EVERY_ALGORITHM
def test_saved_beside_the_weights_are_x_u_h_and_the_logits(algorithm, gating, dtype):
    """To the byte, so neither gelu(u), nor a copy of x beside H', nor a packed weight is kept."""
    (experts, _, _, rank), counts, (_, hidden, _) = shape = SHAPES[0]
    layer = make(algorithm, gating, shape, dtype)
    frozen = [tensor for linear in layer.linears for tensor in linear]
    known = {tensor.untyped_storage().data_ptr() for tensor in (*layer.leaves, *frozen, layer.segments.offsets)}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = layer.forward()
    assert {leaf.untyped_storage().data_ptr() for leaf in layer.leaves} <= saved.keys() and outputs[0].requires_grad
    extra = sum(size for place, size in saved.items() if place not in known)
    columns, hidden = layer.gating.router_columns(experts), 0 if algorithm == LINEAR else hidden
    assert extra == sum(counts) * ((hidden + experts * rank) * dtype.itemsize + 4 * columns)


class TestOperators:
    """torch.library.opcheck: schema, fake tensors (shapes, strides, types), AOT dispatch."""

    EVERY_CASE = pytest.mark.parametrize(
        "case",
        [("columns", "ase", SHAPES[0], torch.float32), ("fused", "topk", SHAPES[1], torch.float16),
         ("fused", "naive-shared", SHAPES[2], torch.float32), (LINEAR, "naive-shared", SHAPES[1], torch.float16)],
        ids=str,
    )  # fmt: skip

    @EVERY_CASE
    def test_forward(self, case):
        torch.library.opcheck(custom_ops.forward_op, make(*case).arguments)

    @EVERY_CASE
    @pytest.mark.parametrize("needs_dx", [True, False])
    def test_backward(self, case, needs_dx):
        layer = make(*case)
        x, _, w1, _, w2, _, *rest = layer.arguments
        saved = custom_ops.forward_op(*layer.arguments)[3:]
        torch.library.opcheck(custom_ops.backward_op, (*layer.cotangents, x, *saved, w1, w2, *rest, needs_dx))


class TestRefusals:
    @pytest.mark.parametrize(("shape", "words"), [
        (((17, 2, 1, 16), (2,), (8, 16, 8)), ("17 experts of rank 16", "need kernels.lora_moe")),
        (((4, 1, 1, 3), (2,), (8, 16, 8)), ("4 experts of rank 3", "need kernels.lora_moe")),
    ])  # fmt: skip
    def test_of_pools_that_no_tile_holds(self, shape, words):
        with pytest.raises(UserError) as caught:
            make("", "ase", shape)()
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)

    def test_of_fp64(self):
        with pytest.raises(UserError, match=r"torch\.float64; use --kernel=reference"):
            make("", "ase", SHAPES[1], torch.float64)()
