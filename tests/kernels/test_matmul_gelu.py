"""The GEMMs with GELU in their epilogue, alone, against fp64: with tensor descriptors and with pointers.

Without a GPU they run in Triton's interpreter, on the CPU; with one, the same tests run on it, in bf16 too.
"""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from bench.launches import parse_pool  # noqa: E402
from kernels import matmul_gelu as m  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POOL = parse_pool("16/3/1/4")  # the tiles are the same for all pools
BF16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        DEVICE.type == "cpu", reason="Triton's interpreter multiplies the bit patterns of bf16 in tl.dot"
    ),
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
# (T, d, F, R): several ragged tiles each way; less than one tile; F in the middle of a tile; one row.
SHAPES = [(300, 72, 280, 64), (38, 24, 40, 16), (130, 136, 64, 192), (1, 8, 16, 8)]
UNALIGNED = [(5, 9, 7, 8), (150, 17, 133, 1)]  # rows that begin at multiples of no 16 bytes: no descriptor takes them
EVERY_SHAPE = pytest.mark.parametrize("shape", [*SHAPES, *UNALIGNED], ids=str)
FP32_ERROR = 2e-6  # of fp32 sums, norm over norm, as in test_fused.py


class Case:
    """Operands of both products; ``buffer`` has columns of others around the result, filled with 7."""

    def __init__(self, shape, dtype):
        (tokens, d, hidden, ranks), rng = shape, torch.Generator().manual_seed(0)

        def normal(*size, scale=1.0):
            return (scale * torch.randn(size, generator=rng)).to(dtype).to(DEVICE)

        self.x, self.down, self.bias = normal(tokens, d), normal(hidden, d, scale=d**-0.5), normal(hidden)
        self.dy, self.up = normal(tokens, d), normal(d, hidden + ranks, scale=d**-0.5)
        self.u, self.shape = normal(tokens, hidden, scale=2.0), shape

    def buffer(self):
        tokens, _, hidden, ranks = self.shape
        return torch.full((tokens, hidden + ranks + 8), 7.0, dtype=self.x.dtype, device=DEVICE)

    def forward(self):
        buffer, hidden = self.buffer(), len(self.down)
        u = m.matmul_gelu(self.x, self.down, self.bias, buffer[:, :hidden], POOL)
        assert (buffer[:, hidden:] == 7).all()
        return u, buffer[:, :hidden]

    def backward(self):
        buffer, width = self.buffer(), self.up.shape[1]
        m.matmul_gelu_backward(self.dy, self.up, self.u, buffer[:, :width], POOL)
        assert (buffer[:, width:] == 7).all()
        return buffer[:, :width]


@pytest.fixture
def operands(monkeypatch):
    """The types of operands of every launch."""
    seen, described = [], m._described

    def watched(*arguments):
        found = described(*arguments)
        seen.append({type(operand) for operand in found})
        return found

    monkeypatch.setattr(m, "_described", watched)
    return seen


def relative_error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


@EVERY_SHAPE
@DTYPES
def test_both_products_are_as_exact_as_their_type(dtype, shape):
    """u and du are rounded once, a twice: u before GELU, whose slope is at most 1.13, and a itself."""
    case = Case(shape, dtype)
    u, a = case.forward()
    exact = m.matmul_gelu_reference(case.x.double(), case.down.double(), case.bias.double())
    grad = m.matmul_gelu_backward_reference(case.dy.double(), case.up.double(), case.u.double())
    rounding = max(FP32_ERROR, torch.finfo(dtype).eps / 2)
    assert relative_error(u, exact[0]) <= rounding
    assert relative_error(a, exact[1]) <= 2.2 * rounding
    assert relative_error(case.backward(), grad) <= rounding


@DTYPES
def test_a_is_that_of_the_rounded_u(dtype):
    """The backward pass reads the rounded u, so a must be GELU of it."""
    u, a = Case(SHAPES[0], dtype).forward()
    expected = torch.nn.functional.gelu(u.double()).to(dtype)
    assert relative_error(a, expected.double()) <= max(FP32_ERROR, torch.finfo(dtype).eps / 16)  # some round elsewhere


@DTYPES
def test_the_gradient_of_h_passes_unchanged(dtype):
    case = Case(SHAPES[2], dtype)
    hidden = case.u.shape[1]
    exact = case.dy.double() @ case.up.double()
    assert relative_error(case.backward()[:, hidden:], exact[:, hidden:]) <= max(FP32_ERROR, torch.finfo(dtype).eps / 2)


@EVERY_SHAPE
@DTYPES
def test_descriptors_and_pointers_give_the_same_bits_in_every_run(dtype, shape, operands, monkeypatch):
    case = Case(shape, dtype)
    first = (*case.forward(), case.backward())
    again = (*case.forward(), case.backward())
    monkeypatch.setattr(m, "has_descriptors", lambda device: False)
    pointers = (*case.forward(), case.backward())
    assert operands[-1] == {torch.Tensor}
    if DEVICE.type == "cpu":
        assert operands[0] == {torch.Tensor if shape in UNALIGNED else TensorDescriptor}
    for one, *others in zip(first, again, pointers, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_operands_may_have_any_row_stride(operands):
    case = Case(SHAPES[0], torch.float32)
    expected = (*case.forward(), case.backward())
    for layout in (lambda t: torch.cat([t, t], 1)[:, : t.shape[1]], lambda t: torch.cat([t, t[:, :1]], 1)[:, :-1]):
        case.x, case.dy, case.down, case.up = map(layout, (case.x, case.dy, case.down, case.up))
        assert all(map(torch.equal, (*case.forward(), case.backward()), expected))
    assert operands[-1] == {torch.Tensor}  # 73 elements from row to row


def test_rows_that_overlap_are_read_by_pointers(operands):
    case = Case(SHAPES[0], torch.float32)
    case.dy = case.dy[:1].expand_as(case.dy)
    expected = Case.backward(case)
    assert operands[-1] == {torch.Tensor}
    case.dy = case.dy.contiguous()
    assert torch.equal(case.backward(), expected)


def test_no_tokens_are_no_launch():
    case = Case((0, 24, 40, 16), torch.float16)
    assert case.forward()[0].shape == (0, 40) and case.backward().shape == (0, 56)


@pytest.fixture
def sums_in_order(monkeypatch):
    """The interpreter multiplies by numpy's BLAS, which sums in an order that depends on the row; einsum does not."""

    def product(a, b, dtype):
        return np.einsum("mk,kn->mn", a.astype(dtype), b.astype(dtype), optimize=False)

    if DEVICE.type == "cpu":
        monkeypatch.setattr(np, "matmul", product)


@DTYPES
def test_a_token_s_bits_do_not_depend_on_the_others(dtype, sums_in_order):
    case = Case(SHAPES[0], dtype)
    whole = (*case.forward(), case.backward())
    case.x, case.dy, case.u = (matrix[137:].contiguous() for matrix in (case.x, case.dy, case.u))
    case.shape = len(case.x), *case.shape[1:]
    for part, all_ in zip((*case.forward(), case.backward()), whole, strict=True):
        assert torch.equal(part, all_[137:])
