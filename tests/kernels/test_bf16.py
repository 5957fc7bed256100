"""dz in bf16 is two numbers, high and low: what the split keeps, in PyTorch and in the kernels' own arithmetic.

Triton's interpreter multiplies the bit patterns of bf16 and truncates what it converts to bf16. Here its products are
made right, so that what is left beside a GPU is the truncation: 2^-15 instead of 2^-17 for a split number.
"""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from kernels import Gating, TaskSegments  # noqa: E402
from kernels.gate_backward import gate_backward, gate_backward_reference  # noqa: E402
from kernels.gating import Pool  # noqa: E402
from kernels.pack import aligned  # noqa: E402
from kernels.route_shrink import marked_reference  # noqa: E402
from kernels.weight_grad import empty_parts, reduce, weight_grad, weight_grad_a_reference  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
SPLIT_ERROR = 2**-14 if INTERPRETED else 2**-16
BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="no GPU and no interpreter")


@pytest.fixture
def right_products(monkeypatch):
    dot = InterpreterBuilder.create_dot

    def widened(self, a, b, d, *rest):
        if a.dtype.name == "bf16":
            a, b = (
                TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), triton.language.float32)
                for operand in (a, b)
            )
        return dot(self, a, b, d, *rest)

    if INTERPRETED:
        monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


def test_two_bf16_numbers_hold_an_fp32_one_to_17_bits():
    dz = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 1e-8  # as small as they come
    high = dz.to(BF16)
    low = (dz - high.float()).to(BF16)
    assert ((dz - high.float() - low.float()).abs() <= 2**-17 * dz.abs()).all()


def test_a_product_over_the_parts_is_the_fp32_one():
    rng = torch.Generator().manual_seed(0)
    x, dz = torch.randn(500, 32, generator=rng).to(BF16), torch.randn(500, 16, generator=rng)
    high = dz.to(BF16)
    parts = high.float().T @ x.float() + (dz - high.float()).to(BF16).float().T @ x.float()
    exact = dz.double().T @ x.double()
    assert (parts.double() - exact).norm() <= 2**-17 * exact.norm()


@pytest.mark.usefixtures("right_products")
@pytest.mark.parametrize("scale", [1.0, 1e-8], ids=["of order 1", "of order 1e-8"])
@pytest.mark.parametrize(
    ("name", "shape"), [("ase", (16, 3, 1, 4)), ("naive-shared", (6, 2, 2, 2)), ("topk", (64, 12, 0, 1))]
)
def test_router_gradients_are_those_of_an_unrounded_dz(name, shape, scale):
    """dz is of order ``scale``, small as that of a mutual-information loss: no scaling is needed in bf16."""
    (experts, k, shared, rank), counts, d = shape, (70, 0, 33), 40
    gating, rng = Gating(name, k, shared), torch.Generator().manual_seed(0)
    columns = gating.router_columns(experts)

    def normal(*size):
        return torch.randn(size, generator=rng).to(DEVICE)

    tokens, ranks = sum(counts), experts * rank
    x, h, dgated = normal(tokens, d).to(BF16), normal(tokens, ranks).to(BF16), (scale * normal(tokens, ranks)).to(BF16)
    z, dp = marked_reference(normal(tokens, columns), gating), scale * tokens * normal(3, columns)
    segments, pool, padded = TaskSegments.of(counts, DEVICE), Pool(experts, columns, rank, gating), aligned(ranks)
    buffer = torch.empty(tokens, padded + aligned(3 * columns), dtype=BF16, device=DEVICE)
    buffer[:, :ranks] = dgated
    dz, gated = gate_backward(buffer, padded, (h, z), dp, segments, pool)
    dh = buffer[:, :ranks]
    # dH' I is dH', exactly.
    given = dgated.double(), torch.eye(ranks, dtype=torch.float64, device=DEVICE), h.double(), z.double(), dp.double()
    right = gate_backward_reference(*given, segments, gating)
    assert dz.dtype == BF16 and dz.shape == (tokens, 2 * columns)
    assert (dz.double().unflatten(1, (2, -1)).sum(1) - right[1]).norm() <= SPLIT_ERROR * right[1].norm()
    parts = empty_parts(x, x, dh, segments, pool)
    weight_grad(x, gated, None, parts, segments, pool)
    weight_grad(x, dh, dz, parts, segments, pool)
    da, _, drouters = reduce(parts, segments)
    exact_a, _ = weight_grad_a_reference(x.double(), dh.double(), right[1], segments)
    _, exact_routers = weight_grad_a_reference(x.double(), right[0], right[1], segments)
    assert (da.double() - exact_a).norm() <= 2e-6 * exact_a.norm()
    assert (drouters.double() - exact_routers).norm() <= SPLIT_ERROR * exact_routers.norm()
