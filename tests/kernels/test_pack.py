"""The wide matrices of a pass are the parameters, cast and side by side, in every type and layout that a layer has."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels import pack  # noqa: E402
from kernels.pack import (  # noqa: E402
    aligned,
    down_reference,
    pack_backward,
    pack_forward,
    router_scales,
    split_reference,
    up_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu")
# The interpreter truncates what it converts to bf16: copies of bf16 are exact, casts are a GPU's to prove.
CASTS = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    DEVICE.type == "cpu", reason="Triton's interpreter truncates what it converts to bf16"))]  # fmt: skip
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, *CASTS], ids=str)
# (D, F, d, R, (tasks, C)): several tiles of 8 x 512; R and tasks C multiples of 8 and not; widths multiples of nothing.
SHAPES = ((40, 72, 24, 64, (2, 16)), (13, 520, 9, 5, (3, 3)), (9, 7, 1030, 1, (1, 1)))
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)
# Which frozen products the layer has: an FFN, one linear layer, none.
EVERY_LAYER = pytest.mark.parametrize("layer", ["ffn", "linear", "beside"])
LAYOUTS = {
    "contiguous": lambda m: m,
    "rows apart": lambda m: torch.cat([m, torch.full_like(m, torch.nan)], -1)[..., : m.shape[-1]],
    "transposed": lambda m: m.mT.contiguous().mT,
}


@pytest.fixture(autouse=True)
def tiles_of_a_gpu(monkeypatch):
    """Else these matrices would fit one of the interpreter's."""
    monkeypatch.setattr(pack, "TALLER", 1)


def parameters(shape, layer, frozen=torch.float32, adapters=torch.float32, layout="contiguous"):
    """(W1, W2, (A, B, routers))."""
    (width, hidden, d, ranks, logits), rng = shape, torch.Generator().manual_seed(0)

    def normal(*size, dtype):
        return LAYOUTS[layout](torch.randn(size, generator=rng).to(dtype).to(DEVICE))

    a, b = normal(ranks, d, dtype=adapters), normal(width, ranks, dtype=adapters)
    routers = 0.01 * normal(*logits, d, dtype=torch.float32)
    w1 = normal(hidden, d, dtype=frozen) if layer == "ffn" else None
    w2 = None if layer == "beside" else normal(width, hidden if layer == "ffn" else d, dtype=frozen)
    return w1, w2, (a, b, routers)


def assert_forward(given, dtype):
    _, w2, (a, b, routers) = given
    up, down, parts, scales = pack_forward(w2, (a, b, routers), dtype)
    # An fp32 B beside any module is not copied and has no padding: only expand reads it.
    expected = b if w2 is None and dtype == torch.float32 else up_reference(w2, b, dtype)
    assert torch.equal(up, expected) and up.shape == expected.shape
    assert torch.equal(down, a.to(dtype)) and all(m.dtype == dtype and m.is_contiguous() for m in (up, down, parts))
    if dtype == torch.float32:
        assert torch.equal(parts, routers.float()) and scales is None
        return
    high, low, factors = split_reference(routers, dtype)
    assert torch.equal(parts[0], high) and torch.equal(parts[1], low)
    assert torch.equal(scales, factors) if dtype == torch.float16 else scales is None


def assert_backward(given, dtype):
    w1, w2, adapters = given
    up, down = pack_backward((w1, w2), adapters, dtype)
    expected = up_reference(w2, adapters[1], dtype), down_reference(w1, adapters[0], adapters[2], dtype)
    for actual, right in zip((up, down), expected, strict=True):
        assert torch.equal(actual, right) and actual.dtype == dtype and actual.is_contiguous()


@EVERY_LAYER
@EVERY_SHAPE
class TestPacked:
    @EVERY_DTYPE
    def test_from_fp32_masters(self, dtype, shape, layer):
        assert_forward(parameters(shape, layer), dtype)
        assert_backward(parameters(shape, layer), dtype)

    @pytest.mark.parametrize("dtype", CASTS, ids=str)
    def test_from_frozen_weights_of_the_pass_and_masters(self, dtype, shape, layer):
        assert_forward(parameters(shape, layer, frozen=dtype), dtype)
        assert_backward(parameters(shape, layer, frozen=dtype), dtype)

    def test_copies_of_bf16_keep_their_bits(self, shape, layer):
        """In the interpreter too, which casts nothing then but the routers."""
        w1, w2, (a, b, routers) = parameters(shape, layer, torch.bfloat16, torch.bfloat16)
        rounded = a, b, routers.bfloat16().float()
        assert_backward((w1, w2, rounded), torch.bfloat16)
        assert_forward((w1, w2, rounded), torch.bfloat16)

    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    def test_from_parameters_of_any_strides(self, dtype, layout, shape, layer):
        given = parameters(shape, layer, layout=layout)
        assert_forward(given, dtype)
        assert_backward(given, dtype)


@EVERY_SHAPE
def test_every_row_begins_at_16_bytes_where_the_frozen_widths_allow_it(shape):
    width, hidden, *_, ranks, logits = shape
    w1, w2, adapters = parameters(shape, "ffn")
    up, down = pack_backward((w1, w2), adapters, torch.float16)
    assert up.shape == (width, hidden + aligned(ranks)) and aligned(ranks) % 8 == 0
    assert len(down) == hidden + aligned(ranks) + aligned(logits[0] * logits[1])
    assert up[:, hidden + ranks :].eq(0).all() and down[hidden + ranks : hidden + aligned(ranks)].eq(0).all()


@pytest.mark.parametrize("dtype", CASTS, ids=str)
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e4])
def test_high_and_low_are_the_fp32_routers_to_17_bits(scale, dtype):
    if dtype == torch.bfloat16 and scale < 1e-20:
        pytest.skip("the low half of such a router is below bf16's normal numbers")
    _, _, (a, b, routers) = parameters(SHAPES[0], "ffn")
    routers = routers * scale
    _, _, parts, scales = pack_forward(None, (a, b, routers), dtype)
    factor = 1 if scales is None else scales.double()[:, None, None]
    error = factor * parts.double().sum(0) - routers.double()
    # Relative to the largest of a task: fp16 has fewer bits for small numbers.
    assert (error.abs() <= 2**-17 * routers.abs().amax((1, 2), keepdim=True)).all()


def test_scales_are_powers_of_two_near_the_largest_router_of_a_task():
    routers = torch.zeros(4, 2, 8, device=DEVICE)
    routers[1], routers[2, 0, 3], routers[3] = 1.0, -3e-9, 1e35
    mantissa, _ = torch.frexp(router_scales(routers, torch.float16))
    assert mantissa.eq(0.5).all()
    assert router_scales(routers, torch.float16)[1:3].tolist() == [2.0, 2.0**-28]
    assert router_scales(routers, torch.bfloat16).eq(1).all()
