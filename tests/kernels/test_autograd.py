"""What autograd and torch.compile may do with a pass: several gradients, frozen inputs, two passes, one graph."""

import os

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels import Gating, TaskSegments, lora_moe  # noqa: E402
from kernels.segments import offsets_of  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GATING, COUNTS, TOKENS, D, HIDDEN, N, RANKS = Gating("ase", 2, 1), (5, 0, 7), 12, 16, 24, 8, 16
KERNELS = ["triton", "reference"]
LAYERS = ["beside", "linear", "ffn"]
EVERY_KERNEL = pytest.mark.parametrize("kernel", KERNELS)
EVERY_LAYER = pytest.mark.parametrize("layer", LAYERS)


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


class Layer:
    """(y, P) of x under adapters that can be changed, beside a base."""

    def __init__(self, layer, kernel):
        self.kernel, self.beside = kernel, layer == "beside"
        widths = {"beside": (), "linear": ((D, D),), "ffn": ((HIDDEN, D), (D, HIDDEN))}[layer]
        self.linears = tuple((normal(*shape, seed=3) / 4, normal(shape[0], seed=4)) for shape in widths)
        shapes = (RANKS, D), (D, RANKS), (len(COUNTS), N, D)
        self.adapters = [normal(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes, start=5)]
        self.x = normal(TOKENS, D, seed=1).requires_grad_()

    @property
    def leaves(self):
        return [self.x, *self.adapters]

    def __call__(self, x=None, segments=None):
        x = self.x if x is None else x
        base, (a, b, routers) = x.sin() if self.beside else self.linears, self.adapters
        segments = segments or TaskSegments.of(COUNTS, DEVICE)
        y, _, p = lora_moe(x, base, (a, b), routers, segments, GATING, self.kernel)
        return y, p


def gradients(outputs, leaves, **options):
    y, p = outputs
    return torch.autograd.grad((y, p), leaves, (normal(*y.shape, seed=8), normal(*p.shape, seed=9)), **options)


def assert_same_bits(actual, expected):
    assert all(torch.equal(left, right) for left, right in zip(actual, expected, strict=True))


@EVERY_LAYER
def test_batched_gradients_are_those_of_a_loop(layer):
    """As torch.autograd.grad(is_grads_batched=True) and TorchJD ask for them, of y and of P."""
    made = Layer(layer, "triton")
    y, p = made()
    dy, dp = normal(2, *y.shape, seed=8), normal(2, *p.shape, seed=9)

    def both(dy, dp, **options):
        return torch.autograd.grad((y, p), made.leaves, (dy, dp), retain_graph=True, **options)

    def of_y(dy, **options):
        return torch.autograd.grad(y, made.leaves, dy, retain_graph=True, **options)

    for function, cotangents in ((both, (dy, dp)), (of_y, (dy,))):
        expected = [torch.stack(each) for each in zip(*map(function, *cotangents), strict=True)]
        assert_same_bits(function(*cotangents, is_grads_batched=True), expected)
    assert_same_bits(torch.vmap(of_y)(dy), expected)


@pytest.mark.parametrize(("layer", "frozen"), [("linear", D * D), ("ffn", 2 * D * HIDDEN), ("beside", 0)])
def test_no_product_is_made_for_a_frozen_x(layer, frozen):
    """dH' = dY B alone; a trained x adds the frozen products, dH A and dz W_task for every task."""
    products = {}
    for trained in (True, False):
        made = Layer(layer, "triton")
        made.x.requires_grad_(trained)
        outputs = made()
        with FlopCounterMode(display=False) as counter:
            gradients(outputs, made.leaves if trained else made.adapters)
        products[trained] = counter.get_total_flops() / (2 * TOKENS)
    assert products[False] == D * RANKS
    assert products[True] == frozen + D * RANKS + D * (RANKS + len(COUNTS) * N)


@EVERY_LAYER
def test_gradients_of_a_frozen_x_are_those_of_a_trained_one(layer):
    made = Layer(layer, "triton")
    expected = gradients(made(), made.leaves)[1:]
    made.x.requires_grad_(False)
    for actual, right in zip(gradients(made(), made.adapters), expected, strict=True):
        assert (actual - right).norm() <= 2e-6 * right.norm()  # dH' from another GEMM


@EVERY_KERNEL
@EVERY_LAYER
class TestSeveralPasses:
    def test_two_forward_passes_and_one_backward_are_the_sum(self, layer, kernel):
        made, other = Layer(layer, kernel), normal(TOKENS, D, seed=2)
        weights = normal(TOKENS, D, seed=8)
        apart = [torch.autograd.grad((made(x)[0] * weights).sum(), made.adapters) for x in (made.x, other)]
        loss = sum((made(x)[0] * weights).sum() for x in (made.x, other))
        for actual, parts in zip(torch.autograd.grad(loss, made.adapters), zip(*apart, strict=True), strict=True):
            torch.testing.assert_close(actual, sum(parts), rtol=1e-6, atol=1e-6)

    def test_a_step_after_a_pass_that_is_dropped_changes_the_next(self, layer, kernel):
        """Nothing of a pass outlives it: the next reads the parameters as they are, its gradients too."""
        made, fresh = Layer(layer, kernel), Layer(layer, kernel)
        made()  # dropped
        for adapters in (made.adapters, fresh.adapters):
            with torch.no_grad():
                for parameter in adapters:
                    parameter.data.mul_(1.5)  # which no version counter sees
        assert_same_bits(made(), fresh())
        assert_same_bits(gradients(made(), made.leaves), gradients(fresh(), fresh.leaves))
        assert not torch.equal(made()[0], Layer(layer, kernel)()[0])

    def test_a_step_between_a_pass_and_its_backward_is_refused(self, layer, kernel):
        """By autograd's version check, since parameters are saved and not copies of them."""
        made = Layer(layer, kernel)
        y, _ = made()
        with torch.no_grad():
            made.adapters[1].mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_a_pass_without_gradients_has_the_same_bits(self, layer, kernel):
        made = Layer(layer, kernel)
        with torch.no_grad():
            quiet = made()
        with torch.inference_mode():
            inference = made()
        assert_same_bits(quiet, made())
        assert_same_bits(inference, made())


@EVERY_LAYER
def test_a_second_derivative_is_refused(layer):
    made = Layer(layer, "triton")
    y, _ = made()
    (dx,) = torch.autograd.grad(y.square().sum(), made.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.slow
@EVERY_KERNEL
@EVERY_LAYER
def test_compiled_twelve_compositions_of_a_batch_are_at_most_two_graphs(layer, kernel):
    """fullgraph, forward and backward; the offsets are data and not constants of the graph."""
    made, graphs = Layer(layer, kernel), []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(x, offsets):
        return made(x, TaskSegments(offsets, len(offsets) - 1, None, 1))

    for step in range(12):
        counts = (step, TOKENS - step, 0) if step % 2 else (0, step, TOKENS - step)
        offsets = offsets_of(counts, DEVICE)
        actual = compiled(made.x, offsets)
        found = gradients(actual, made.leaves)
        if step % 4 == 3:
            outputs = made(made.x, TaskSegments.of(counts, DEVICE))
            pairs = zip((*actual, *found), (*outputs, *gradients(outputs, made.leaves)), strict=True)
            assert all((left - right).norm() <= 4e-6 * right.norm() for left, right in pairs)
    assert len(graphs) <= 2


@pytest.mark.slow
@EVERY_LAYER
def test_compiled_through_aot_autograd_it_has_the_same_bits(layer):
    """Both directions are custom operators there, by their fakes."""
    made = Layer(layer, "triton")
    torch._dynamo.reset()
    segments = TaskSegments.of(COUNTS, DEVICE)
    compiled = torch.compile(
        lambda x: made(x, TaskSegments(segments.offsets, segments.tasks)), fullgraph=True, backend="aot_eager"
    )
    actual, expected = compiled(made.x), made()
    assert_same_bits(actual, expected)
    assert_same_bits(gradients(actual, made.leaves), gradients(expected, made.leaves))


def test_an_ffn_without_biases_is_one_with_zeros():
    made = Layer("ffn", "triton")
    made.linears = tuple((weight, torch.zeros_like(bias)) for weight, bias in made.linears)
    expected = made()[0]
    made.linears = tuple((weight, None) for weight, _ in made.linears)
    torch.testing.assert_close(made()[0], expected, rtol=1e-6, atol=1e-6)
    (w1, _), (w2, _) = made.linears
    base = F.linear(F.gelu(F.linear(made.x, w1)), w2)
    made.adapters[1].data.zero_()  # B: the base alone
    torch.testing.assert_close(made()[0], base, rtol=1e-5, atol=1e-5)
