"""The adapted linear layer as one operation: against fp64, and what it saves, keeps and repeats.

Without a GPU the kernels run in Triton's interpreter, on the CPU; with one, the same tests run on it, in bf16 too.
"""

import os
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels.linear import linear_reference  # noqa: E402
from kernels.packed import Packed, columns_pay  # noqa: E402

from kernels import GATINGS, Gating, TaskSegments, custom_ops  # noqa: E402
from kernels.reference import router_logits  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        DEVICE.type == "cpu", reason="Triton's interpreter multiplies the bit patterns of bf16 in tl.dot"
    ),
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
EVERY_HALF = pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
EVERY_GATING = pytest.mark.parametrize("gating", GATINGS)
WITH_SHARED = ("ase", "naive-shared")
RESULTS = ("y", "g", "P", "dx", "dA", "dB", "drouters")

# As in test_ffn.py: norm of the error over the norm, of fp32 sums and beside plain PyTorch in half precision, over
# many shapes and on a single one, where the ratio of so few roundings scatters.
FP32_ERROR = 2e-6
TIMES_PYTORCH, TIMES_PYTORCH_ONCE = 1.1, 2.0

# ((N, k, S, r), tokens of each task, (d, D)); S is 0 and k one more where a gating knows no shared experts.
SHAPES = (
    ((16, 3, 1, 4), (5, 0, 33), (24, 40)),
    ((5, 2, 2, 1), (9, 4, 2), (24, 72)),  # R = 5, not a multiple of 8
    ((2, 1, 1, 1), (1,), (9, 17)),  # widths that are multiples of nothing
    ((12, 4, 3, 16), (0, 66), (32, 48)),  # R = 192; blocks of 32 and 64 tokens overfilled
    ((40, 7, 5, 2), (3, 1, 0, 2), (136, 16)),  # several steps along d; wider than y
)
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@dataclass
class Layer:
    """An adapted linear layer with its tokens: x and the frozen weight in one type, the adapters fp32 masters, in
    ``leaves``. A and B are rounded to that type, so that casting them, which every implementation does, is exact."""

    gating: Gating
    segments: TaskSegments
    linear: tuple[Tensor, Tensor]
    leaves: list[Tensor]  # x, A, B, routers
    cotangents: tuple[Tensor, Tensor]  # of y and P: neither drowns the other in dz
    packed: Packed = field(init=False)

    def __post_init__(self) -> None:
        x, *adapters = self.leaves
        self.packed = Packed.empty(self.linear[0].shape[::-1], adapters, x.dtype)
        self.packed.fill_frozen(self.linear)
        self.packed.fill(*adapters)

    def forward(self):
        x, a, b, routers = self.leaves
        return custom_ops.lora_moe_packed(x, self.packed, (a, b), routers, self.segments, self.gating)

    def __call__(self):
        return self.results(self.forward(), self.leaves)

    def reference(self, dtype):
        """The results of PyTorch with x, the weight and the sums in ``dtype``, the adapters no less exact."""
        exact = torch.promote_types(dtype, torch.float32)
        x, a, b, routers = leaves = [
            leaf.detach().to(dtype if place == 0 else exact).requires_grad_() for place, leaf in enumerate(self.leaves)
        ]
        linear = tuple(tensor.to(dtype) for tensor in self.linear)
        return self.results(linear_reference(x, linear, (a, b), routers, self.segments, self.gating), leaves)

    def results(self, outputs, leaves):
        y, g, p = outputs
        weights = [weight.to(output) for weight, output in zip(self.cotangents, (y, p), strict=True)]
        gradients = torch.autograd.grad((y, p), leaves, weights)
        return dict(zip(RESULTS, (y.detach(), g.detach(), p.detach(), *gradients), strict=True))


def make(gating, shape, dtype=torch.float32):
    """A layer whose selection is beyond rounding: the k-th and the next logit of a token are at least 5e-5 apart, the
    rounding of an fp32 logit being about 1e-6. Else fp64 might choose other experts, which would drown all errors."""
    (experts, k, shared, rank), counts, (d, width) = shape
    gate = Gating(gating, k, shared) if gating in WITH_SHARED else Gating(gating, k + 1, 0)
    columns, tasks, tokens = gate.router_columns(experts), len(counts), sum(counts)
    for seed in range(100):
        rng = torch.Generator().manual_seed(seed)

        def normal(*size, scale=1.0, type=dtype, rng=rng):
            return (scale * torch.randn(size, generator=rng)).to(type).to(DEVICE)

        x, routers = normal(tokens, d), normal(tasks, columns, d, scale=1.5 * d**-0.5, type=torch.float32)
        a, b = normal(experts * rank, d, scale=d**-0.5).float(), normal(width, experts * rank).float()
        segments = TaskSegments.of(counts, DEVICE)
        z = router_logits(x.double(), routers.double(), segments)
        ranked = z[:, : experts - gate.shared].sort(descending=True).values
        if gate.k == experts - gate.shared or not tokens or (ranked[:, gate.k - 1] - ranked[:, gate.k]).min() > 5e-5:
            linear = normal(width, d, scale=d**-0.5), normal(width)
            dp = normal(tasks, columns, type=torch.float32) * torch.tensor(counts, device=DEVICE)[:, None] * columns
            leaves = [leaf.requires_grad_() for leaf in (x, a, b, routers)]
            return Layer(gate, segments, linear, leaves, (normal(tokens, width), dp))
    raise AssertionError("no seed gives a clear selection")


@pytest.fixture
def layer():
    """One that most tests are content with."""
    return make("ase", SHAPES[0])


def errors(actual, exact):
    """Norm of the difference relative to the norm, if that is not 0."""
    assert torch.equal(actual["g"] > 0, exact["g"] > 0), "the selections differ"
    sizes = {name: exact[name].norm().item() or 1.0 for name in RESULTS}
    return {name: (actual[name].double() - exact[name]).norm().item() / sizes[name] for name in RESULTS}


def too_large(measured, allowed):
    return {name: (error, allowed[name]) for name, error in measured.items() if not error <= allowed[name]}


def assert_same_bits(actual, expected, names=RESULTS):
    for name in names:
        assert torch.equal(actual[name], expected[name]), name


class TestAccuracy:
    @EVERY_SHAPE
    @EVERY_GATING
    def test_in_fp32(self, gating, shape):
        layer = make(gating, shape)
        exact = layer.reference(torch.float64)
        plain = errors(layer.reference(torch.float32), exact)
        allowed = {name: max(FP32_ERROR, TIMES_PYTORCH_ONCE * error) for name, error in plain.items()}
        assert too_large(errors(layer(), exact), allowed) == {}

    @EVERY_HALF
    def test_in_half_precision_is_pytorch_s(self, dtype):
        pairs = []
        for gating in GATINGS:
            for shape in SHAPES:
                layer = make(gating, shape, dtype)
                exact = layer.reference(torch.float64)
                pairs.append((errors(layer(), exact), errors(layer.reference(dtype), exact)))
                allowed = {n: max(torch.finfo(dtype).eps / 4, TIMES_PYTORCH_ONCE * e) for n, e in pairs[-1][1].items()}
                assert too_large(pairs[-1][0], allowed) == {}, (gating, shape)
        ours, plain = (
            {name: (sum(each[name] ** 2 for each in many) / len(many)) ** 0.5 for name in RESULTS}
            for many in zip(*pairs, strict=True)
        )
        assert too_large(ours, {n: max(FP32_ERROR, TIMES_PYTORCH * error) for n, error in plain.items()}) == {}

    @EVERY_GATING
    def test_against_the_equations_token_by_token(self, gating, make_problem, oracle):
        """fp64 above is kernels.linear.linear_reference; this one shares no code with kernels/."""
        layer = make(gating, ((5, 2, 2, 2), (3, 0, 2), (8, 24)))
        shape = 5, layer.gating.k, layer.gating.shared, 2
        problem = make_problem(gating, shape, layer.segments.counts, d_in=8, d_out=24)
        x, problem.a, problem.b, problem.routers = leaves = [
            leaf.detach().double().cpu().requires_grad_() for leaf in layer.leaves
        ]
        weight, bias = (tensor.double().cpu() for tensor in layer.linear)
        problem.x, problem.base = x, x @ weight.T + bias
        expected = layer.results(oracle(problem), leaves)
        measured = errors({name: result.cpu() for name, result in layer().items()}, expected)
        assert too_large(measured, dict.fromkeys(RESULTS, FP32_ERROR)) == {}

    def test_no_tokens_at_all(self):
        results = make("ase", ((4, 1, 1, 2), (0, 0), (24, 40)))()
        assert results["y"].shape == (0, 40) and results["g"].shape == (0, 4) and results["dx"].shape == (0, 24)
        assert all(results[name].eq(0).all() for name in ("P", "dA", "dB", "drouters"))


class TestGradients:
    @EVERY_DTYPE
    def test_have_the_types_of_what_they_belong_to(self, dtype):
        results = make("naive-shared", SHAPES[1], dtype)()
        assert [results[name].dtype for name in RESULTS] == [dtype, *[torch.float32] * 2, dtype, *[torch.float32] * 3]

    @EVERY_DTYPE
    def test_are_the_same_bits_in_every_run_and_every_pass_back(self, dtype):
        layer = make("ase", SHAPES[0], dtype)
        saved = {}

        def keep(tensor):
            saved.setdefault(id(tensor), (tensor, tensor.detach().clone()))
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            y, g, p = layer.forward()
        given = [weight.clone() for weight in layer.cotangents]
        once, twice = (torch.autograd.grad((y, p), layer.leaves, given, retain_graph=True) for _ in range(2))
        first = dict(zip(RESULTS, (y, g, p, *once), strict=True))
        assert_same_bits(dict(zip(RESULTS, (y, g, p, *twice), strict=True)), first)
        assert_same_bits(layer(), first)
        assert saved and all(torch.equal(tensor, was) for tensor, was in saved.values())
        assert all(torch.equal(weight, was) for weight, was in zip(given, layer.cotangents, strict=True))

    def test_do_not_depend_on_strides(self, layer):
        (dy, dp), x = layer.cotangents, layer.leaves[0].detach()
        expected = layer()
        apart = [torch.cat([t, t + 1], 1)[:, : t.shape[1]] for t in (x, dy)]
        for strided, dy_strided in (apart, [t.t().contiguous().t() for t in (x, dy)]):
            assert not strided.is_contiguous() and not dy_strided.is_contiguous()
            layer.leaves[0], layer.cotangents = strided.requires_grad_(), (dy_strided, dp.t().contiguous().t())
            assert_same_bits(layer(), expected)

    def test_through_y_alone_or_p_alone_are_enough(self, layer):
        dy, dp = layer.cotangents
        for output, weight, both in ((0, dy, (dy, 0 * dp)), (2, dp, (0 * dy, dp))):
            layer.cotangents = both
            expected = layer()
            actual = torch.autograd.grad(layer.forward()[output], layer.leaves, weight)
            assert_same_bits(dict(zip(RESULTS[3:], actual, strict=True)), expected, RESULTS[3:])


@EVERY_DTYPE
@EVERY_GATING
def test_saved_beside_the_weights_are_x_h_and_the_logits(gating, dtype):
    """To the byte, so the copy of x beside H' is not kept."""
    (experts, _, _, rank), counts, _ = shape = SHAPES[0]
    layer = make(gating, shape, dtype)
    known = {
        tensor.untyped_storage().data_ptr() for tensor in (*layer.leaves, *layer.packed.tensors, layer.segments.offsets)
    }
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = layer.forward()
    assert outputs[0].requires_grad
    extra = sum(size for place, size in saved.items() if place not in known)
    assert extra == sum(counts) * (experts * rank * dtype.itemsize + 4 * layer.gating.router_columns(experts))


class TestOperators:
    """torch.library.opcheck: schema, fake tensors (shapes, strides, types), autograd registration, AOT dispatch."""

    @pytest.fixture
    def layer(self):
        return make("naive-shared", SHAPES[1], torch.float16)

    @staticmethod
    def arguments(layer):
        return *layer.packed.tensors, layer.segments.offsets, layer.segments.counts, *vars(layer.gating).values(), ""

    def test_forward(self, layer):
        torch.library.opcheck(custom_ops.lora_moe_packed_op, (*layer.leaves, *self.arguments(layer)))

    def test_backward(self, layer):
        x, *adapters = (leaf.detach() for leaf in layer.leaves)
        *_, h, z, u = custom_ops.lora_moe_packed_op(x, *adapters, *self.arguments(layer))
        arguments = *layer.cotangents, x, u, h, z, *adapters, *self.arguments(layer)
        torch.library.opcheck(custom_ops.lora_moe_packed_backward_op, arguments)


def test_columns_pay_where_the_layer_is_wider_than_its_input():
    assert columns_pay(768, 3072) and not columns_pay(3072, 768) and not columns_pay(768, 768)
