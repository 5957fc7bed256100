"""GELU with one exponential: how far it is from the exact function, before and after rounding, and at the edges."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402

from kernels.gelu import gelu  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# Relative error of ex2.approx.ftz.f32 (PTX ISA: 2^-22.5 in the range used here); the interpreter's exp2 is exact.
EX2_ERROR = 2**-22.5
pytestmark = pytest.mark.skipif(not INTERPRETED and DEVICE.type == "cpu", reason="no GPU and no interpreter")


@pytest.fixture(params=[-EX2_ERROR, 0.0, EX2_ERROR] if INTERPRETED else [0.0], ids=lambda error: f"ex2 {error:+.1e}")
def ex2(request, monkeypatch):
    """Exponentials as far off as the GPU's may be."""
    exp2 = InterpreterBuilder.create_exp2

    def approximate(self, argument):
        result = exp2(self, argument)
        return TensorHandle((result.data * (1 + request.param)).astype(np.float32), result.dtype)

    if INTERPRETED:
        monkeypatch.setattr(InterpreterBuilder, "create_exp2", approximate)


def computed(u):
    """(gelu(u), gelu'(u)) of half-precision u, in fp32 before they are rounded."""
    u = u.to(DEVICE).view(1, -1)
    value, derivative = torch.empty_like(u, dtype=torch.float32), torch.ones_like(u, dtype=torch.float32)
    gelu(u, value)
    gelu(u, derivative, backward=True)
    return value[0].cpu(), derivative[0].cpu()


def exact(u):
    """The same in fp64."""
    u = u.double()
    phi = torch.exp(-0.5 * u * u) / (2 * torch.pi) ** 0.5
    below = torch.special.log_ndtr(u).exp()
    return u * below, below + u * phi


def every_finite(dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


@HALVES
def test_before_rounding_every_finite_input_is_near_the_exact_value(dtype, ex2):
    u = every_finite(dtype)
    for actual, right, bound in zip(computed(u), exact(u), (2e-6, 5e-6), strict=True):
        # Large values are those of u itself, which fp32 holds.
        assert (actual.double() - right).abs().max() <= bound


@HALVES
def test_relative_accuracy_holds_up_to_5(dtype, ex2):
    u = every_finite(dtype)
    u = u[(u.abs() <= 5) & (u.abs() > 2.0**-100)]
    value, right = computed(u)[0].double(), exact(u)[0]
    assert ((value - right).abs() / right.abs()).max() <= 2e-5


@pytest.mark.parametrize(("dtype", "forward"), [(torch.bfloat16, 1e-5), (torch.float16, 1e-3)], ids=str)
def test_rounded_it_seldom_differs_from_the_exact_value_rounded(dtype, forward, ex2):
    u = every_finite(dtype)
    drawn = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, counts = drawn.view(torch.int16).unique(return_counts=True)
    weight = torch.zeros(2**16, dtype=torch.float64)
    weight[values.int() + 2**15] = counts.double() / len(drawn)
    weight = weight[u.view(torch.int16).int() + 2**15]
    for actual, right, share in zip(computed(u), exact(u), (forward, 3e-3), strict=True):
        assert weight[actual.to(dtype) != right.to(dtype)].sum() <= share


@HALVES
def test_infinities_nan_and_zeros(dtype):
    inf, nan = float("inf"), float("nan")
    value, derivative = (out.to(dtype) for out in computed(torch.tensor([-inf, inf, nan, -0.0, 0.0]).to(dtype)))
    assert value[:2].tolist() == [0, inf] and derivative[:2].tolist() == [0, 1]
    assert value[2].isnan() and derivative[2].isnan()
    assert value[3:].tolist() == [0, 0] and derivative[3:].tolist() == [0.5, 0.5]
    assert value.signbit().tolist()[::3] == [True, True] and not value[4].signbit()


def test_the_machine_code_keeps_nan():
    """PTX's min and max drop a NaN, which the interpreter does not show; the kernel must use min.NaN."""
    code = (
        "from bench.aot import compiled\n"
        "for kernel in ('gelu', 'gelu_backward'):\n"
        "    print(compiled(kernel, '16/3/1/4', 'bf16', 'sm_90').binary.asm['ptx'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert "min.NaN.f32" in lines
    assert not {"min.f32", "max.f32", "min.ftz.f32", "max.ftz.f32"} & set(lines)
