"""Each Triton kernel against the PyTorch function that stands beside it, on the same inputs.

That function in fp64 is what is right, and in the kernel's own type what is allowed. The inputs of a kernel are random
and not what another kernel returned, so a mistake is found where it is made.
"""

import math
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels import Gating, TaskSegments, reference  # noqa: E402
from kernels.expand import expand, expand_reference  # noqa: E402
from kernels.gate_backward import gate_backward, gate_backward_reference  # noqa: E402
from kernels.gating import make_pool  # noqa: E402
from kernels.gelu import gelu, gelu_backward_reference, gelu_reference  # noqa: E402
from kernels.pack import aligned, pack_forward  # noqa: E402
from kernels.route_shrink import marked_reference, route_shrink, route_shrink_reference  # noqa: E402
from kernels.weight_grad import (  # noqa: E402
    Parts,
    empty_parts,
    reduce,
    reduce_reference,
    weight_grad,
    weight_grad_a_reference,
    weight_grad_b_reference,
)

ON_GPU = torch.cuda.is_available()
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(not ON_GPU, reason="Triton's interpreter multiplies the bit patterns of bf16 in tl.dot"),
)
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)

# (gating, (N, k, S, r), tokens of each task, d, D): every gating; one expert padded to 16 and N = 128; R = 1 to 256;
# blocks of 32 and 64 tokens filled, overfilled by one and empty; several column tiles and chunks of weight_grad.
CASES = (
    ("ase", (16, 3, 1, 4), (5, 0, 33), 24, 40),
    ("ase", (2, 1, 1, 1), (1,), 8, 136),
    ("ase", (24, 16, 8, 8), (65, 2), 136, 72),
    ("naive-shared", (5, 2, 3, 2), (0, 64), 48, 16),
    ("naive-shared", (12, 3, 1, 16), (3, 150), 32, 96),
    ("topk", (128, 5, 0, 2), (7, 0, 0, 12), 72, 72),
    ("topk", (3, 3, 0, 8), (32,), 16, 8),
    ("topk-renorm", (64, 9, 0, 1), (140, 1), 8, 64),
    ("topk-renorm", (8, 1, 0, 4), (31, 0), 120, 24),
)
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)

# As in test_triton.py: the rounding of fp32 sums relative to the norm, and in half precision the error of PyTorch.
FP32_ERROR, TIMES_PYTORCH = 2e-6, 1.1
SPLIT_ERROR = 2**-17  # beside bf16 tokens, fp32 routers and dz are sums of two bf16 numbers


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


def fp64(values):
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def listed(outputs):
    return [outputs] if isinstance(outputs, Tensor) else outputs


def assert_as_good_as(reference_function, inputs, outputs):
    """The errors of ``outputs`` to fp64 are those of fp32 sums or, where a number is half precision, of PyTorch."""
    exact = listed(reference_function(*fp64(inputs)))
    in_bf16 = any(isinstance(value, Tensor) and value.dtype == torch.bfloat16 for value in inputs)
    fp32_error = SPLIT_ERROR if in_bf16 else FP32_ERROR
    for place, (actual, right, plain) in enumerate(
        zip(listed(outputs), exact, listed(reference_function(*inputs)), strict=True)
    ):
        assert actual.shape == right.shape and actual.is_contiguous(), place
        error, allowed = ((value.double() - right).norm().item() for value in (actual, plain))
        assert error <= max(fp32_error * right.norm().item(), TIMES_PYTORCH * allowed), place


def split(dz, dtype):
    """dz as gate_backward returns it beside tokens of ``dtype``."""
    if dtype != torch.bfloat16:
        return dz
    high = dz.to(dtype)
    return torch.cat([high, (dz - high).to(dtype)], 1)


def summed(dz, dtype):
    """The inverse of split."""
    return dz.float().unflatten(1, (2, -1)).sum(1) if dtype == torch.bfloat16 else dz


class Inputs:
    """Random inputs of every kernel for one case, in ``dtype`` on ``device``; what is fp32 in the kernels is fp32."""

    def __init__(self, case, dtype, device):
        name, (experts, k, shared, rank), counts, d, self.width = case
        self.rng, self.dtype, self.device = torch.Generator().manual_seed(0), dtype, device
        self.gating, self.segments = Gating(name, k, shared), TaskSegments.of(counts, device)
        self.tokens, tasks, columns = sum(counts), len(counts), self.gating.router_columns(experts)
        self.x, self.base, self.dy = self.half(self.tokens, d), *(self.half(self.tokens, self.width) for _ in range(2))
        self.a, self.b = self.half(experts * rank, d, scale=d**-0.5), self.half(self.width, experts * rank)
        self.routers = self.full(tasks, columns, d, scale=d**-0.5)
        self.h, self.dh = (self.half(self.tokens, experts * rank) for _ in range(2))
        self.z = marked_reference(self.full(self.tokens, columns), self.gating)
        self.dz = self.full(self.tokens, columns)
        self.dp = self.full(tasks, columns, scale=self.tokens)
        self.pool = make_pool(len(self.a), columns, self.gating.text)
        self.split = pack_forward(None, (self.a, self.b, self.routers), dtype)[2:]

    def full(self, *shape, scale=1.0):
        return (scale * torch.randn(shape, generator=self.rng)).to(self.device)

    def half(self, *shape, scale=1.0):
        return self.full(*shape, scale=scale).to(self.dtype)


@pytest.fixture
def inputs(case, dtype, device):
    return Inputs(case, dtype, device)


def reduced(i, dy, x, dh):
    """(dA, dB, dW), of which the kernel of each product fills its part."""
    parts = empty_parts(dy, x, dh, i.segments, i.pool)
    weight_grad(dy, i.h, None, parts, i.segments, i.pool)
    weight_grad(x, dh, split(i.dz, i.dtype), parts, i.segments, i.pool)
    return reduce(parts, i.segments)


def backward_buffer(i, dgated):
    """(the buffer of gate_backward between other columns, with dH' in it; the columns before those of dz)."""
    ranks, padded = i.pool.ranks, aligned(i.pool.ranks)
    wide = Between(i.tokens, padded + aligned(i.dp.numel()), i.dtype, i.device)
    wide.target[:, :ranks] = dgated
    return wide, padded


@EVERY_DTYPE
@EVERY_CASE
class TestKernels:
    def test_route_shrink(self, inputs):
        i = inputs
        gated = torch.empty_like(i.h)
        h, z, g, means = route_shrink(i.x, i.a, i.split, gated, i.segments, i.pool)
        # Apart, since where two logits are as close as rounding fp64 may select otherwise: H and z from the inputs, g
        # and P from the logits that the kernel returned.
        given = i.x, i.a, i.routers, i.segments, i.gating
        assert_as_good_as(lambda *given: route_shrink_reference(*given)[:2], given, (h, z))
        assert_as_good_as(
            lambda z: (reference.gates(z, i.gating), reference.mean_probs(z, i.segments)), (z,), (g, means)
        )
        assert torch.equal(g > 0, reference.gates(z, i.gating) > 0)
        assert torch.equal(z, marked_reference(z, i.gating)), "the selection stands in the logits"
        assert torch.equal(gated, (h * g.repeat_interleave(i.pool.rank, dim=1)).to(i.dtype))
        assert (h.dtype, z.dtype, g.dtype, means.dtype) == (i.dtype, *[torch.float32] * 3)

    def test_expand(self, inputs):
        i = inputs
        assert_as_good_as(expand_reference, (i.base, i.h, i.b), expand(i.base, i.h, i.b, i.pool))

    def test_gate_backward(self, inputs):
        i, ranks, columns = inputs, inputs.pool.ranks, inputs.pool.columns
        wide, padded = backward_buffer(i, i.dh)
        buffer = wide.target
        dz, gated = gate_backward(buffer, padded, (i.h, i.z), i.dp, i.segments, i.pool)
        assert dz.dtype == (i.dtype if i.dtype == torch.bfloat16 else torch.float32) and gated.dtype == i.dtype
        # dH' I is dH', exactly.
        given = i.dh, torch.eye(ranks, dtype=i.dtype, device=i.device), i.h, i.z, i.dp, i.segments, i.gating
        assert_as_good_as(gate_backward_reference, given, (buffer[:, :ranks].contiguous(), summed(dz, i.dtype), gated))
        assert buffer[:, ranks:padded].eq(0).all() and wide.left_alone()
        spread = torch.zeros_like(buffer[:, padded:])
        first = 0
        for task, count in enumerate(i.segments.counts):
            run = slice(first, first := first + count)
            spread[run, task * columns : (task + 1) * columns] = dz[run, :columns]
        assert torch.equal(buffer[:, padded:], spread)

    def test_weight_grads(self, inputs):
        i = inputs
        da, db, drouters = reduced(i, i.dy, i.x, i.dh)
        assert_as_good_as(weight_grad_b_reference, (i.dy, i.h), db)
        assert_as_good_as(weight_grad_a_reference, (i.x, i.dh, i.dz, i.segments), (da, drouters))
        assert da.dtype == db.dtype == drouters.dtype == torch.float32
        absent = [task for task, count in enumerate(i.segments.counts) if count == 0]
        assert drouters[absent].eq(0).all()


@pytest.mark.parametrize(
    ("counts", "chunk", "shape"),
    [
        ((9,), 9, (16, 8, 3)),
        ((20, 0, 13), 8, (64, 40, 70)),
        ((0, 7, 1, 0, 12), 6, (16, 72, 130)),
        ((57, 90), 8, (4, 8, 16)),  # 20 chunks: several rounds
    ],
)
def test_reduce(counts, chunk, shape, device):
    """The partial sums of the three gradients: within rounding of fp64, and exactly where nothing is rounded."""
    (ranks, d, width), segments = shape, TaskSegments.of(counts, device)
    rng, chunks = torch.Generator().manual_seed(0), segments.blocks(sum(counts), chunk)
    sizes, used = (width * ranks, ranks * d, 16 * d), sum(math.ceil(count / chunk) for count in counts)

    def given(numbers):
        numbers[used:] = 0  # chunks beyond those of this composition, which weight_grad fills with zeros
        db, da, drouters = numbers.to(device).split(sizes, -1)
        return Parts(
            db.unflatten(-1, (width, ranks)), da.unflatten(-1, (ranks, d)), drouters.unflatten(-1, (16, d)), chunk
        )

    parts = given(torch.randn(chunks, sum(sizes), generator=rng))
    exact = Parts(parts.db.double(), parts.da.double(), parts.drouters.double(), chunk)
    for actual, expected in zip(reduce(parts, segments), reduce_reference(exact, segments), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-5)
    parts = given(torch.randint(-1000, 1000, (chunks, sum(sizes)), generator=rng).float())
    for actual, expected in zip(reduce(parts, segments), reduce_reference(parts, segments), strict=True):
        assert torch.equal(actual, expected)


class Between:
    """Columns of a wider buffer, ``target``, with other columns on both sides, which the kernels are to leave alone."""

    def __init__(self, tokens, columns, dtype, device):
        self.buffer = torch.full((tokens, columns + 13), torch.nan, dtype=dtype, device=device)
        self.target = self.buffer[:, 8 : 8 + columns]

    def left_alone(self):
        return bool(self.buffer[:, :8].isnan().all() and self.buffer[:, 8 + self.target.shape[1] :].isnan().all())


@EVERY_DTYPE
@EVERY_CASE
class TestKernelsBesideOtherColumns:
    def test_route_shrink_pads_with_zeros(self, inputs):
        i, ranks = inputs, inputs.pool.ranks
        alone, wide = torch.empty_like(i.h), Between(i.tokens, aligned(ranks), i.dtype, i.device)
        outputs = (route_shrink(i.x, i.a, i.split, gated, i.segments, i.pool) for gated in (alone, wide.target))
        assert all(torch.equal(left, right) for left, right in zip(*outputs, strict=True))
        assert torch.equal(wide.target[:, :ranks], alone) and wide.target[:, ranks:].eq(0).all()
        assert wide.left_alone()

    def test_gelu(self, inputs):
        i = inputs
        # Where GELU bends, and far out, where it is u or 0: products of 0 with large numbers must not spoil it.
        u = torch.cat([2 * i.base, 50 * i.base, 1e4 * i.base.sign()], 1)
        wide = Between(i.tokens, u.shape[1], i.dtype, i.device)
        target = wide.target
        gelu(u, target)
        bent, far = slice(0, i.width), slice(i.width, None)
        for part in (bent, far):  # apart, or the error of the large would hide that of the small
            assert_as_good_as(gelu_reference, (u[:, part],), target[:, part].contiguous())
        target.copy_(i.dy.repeat(1, 3))
        gelu(u, target, backward=True)
        for part in (bent, far):
            given = u[:, part], i.dy.repeat(1, 3)[:, part]
            assert_as_good_as(gelu_backward_reference, given, target[:, part].contiguous())
        assert wide.left_alone()


@EVERY_DTYPE
@pytest.mark.parametrize("case", CASES[:2], ids=str)
class TestLayouts:
    def test_rows_may_lie_apart(self, inputs):
        """The kernels take row strides, no copy is made."""
        i = inputs

        def apart(matrix):
            padded = torch.cat([torch.full_like(matrix, 1e4), matrix, torch.full_like(matrix, 1e4)], 1)
            return padded[:, matrix.shape[1] : 2 * matrix.shape[1]]

        calls = (
            (lambda x: route_shrink(x, i.a, i.split, torch.empty_like(i.h), i.segments, i.pool), i.x),
            (lambda base: expand(base, i.h, i.b, i.pool), i.base),
            (lambda gated: expand(i.base, gated, i.b, i.pool), i.h),
            (lambda b: expand(i.base, i.h, b, i.pool), i.b),
            (lambda dh: reduced(i, i.dy, i.x, dh), i.dh),
            (lambda dy: reduced(i, dy, i.x, i.dh), i.dy),
            (lambda x: reduced(i, i.dy, x, i.dh), i.x),
        )
        for call, matrix in calls:
            for left, right in zip(listed(call(apart(matrix))), listed(call(matrix)), strict=True):
                assert torch.equal(left, right)
