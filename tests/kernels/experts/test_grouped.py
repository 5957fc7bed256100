"""The grouped path beside fp64: y, every gradient and every kernel on its own, in fp32 and fp16."""

from dataclasses import replace

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels import Experts, Gating, TaskSegments  # noqa: E402
from kernels.experts import products, sort  # noqa: E402
from kernels.experts.custom_ops import grouped_backward, grouped_forward  # noqa: E402
from kernels.experts.products import Layer, layers  # noqa: E402
from kernels.experts.reference import expert_mixture, mixture  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="tensors are on the CPU")

# Relative to the norm of the right value. fp32: sums of at most some hundred products, each rounded at 6e-8. fp16 (one
# rounding is 2^-11 = 5e-4 at most, 2e-4 in the mean): U, H', the pairs' outputs and y are rounded in turn.
LIMITS = {torch.float32: 1e-6, torch.float16: 6e-4}
BIASED = {"activation": "gelu", "biases": True}
PROBLEMS = {
    "lora": {},
    "lora, two sets": {"sets": 2},
    "lora, three gates": {"gates": 3},
    "gelu and biases": BIASED,
    "gelu and biases, two sets and gates": BIASED | {"sets": 2, "gates": 2},
    "rank 24, wide": {"rank": 24, "widths": (72, 136)},
    "rank 64": {"rank": 64, **BIASED},
    "rank 160": {"rank": 160, "counts": (20, 0), **BIASED},
    "ragged": {"kind": "ragged", **BIASED},
    "one expert": {"kind": "one expert", "counts": (0, 140, 1), **BIASED},
    "empty experts": {"kind": "first experts", "sets": 2, "counts": (70, 0), **BIASED},
}
WEIGHTS = ("down", "up", "hidden_bias", "output_bias")
GRADIENTS = ("x", "g", *WEIGHTS)
DTYPES = pytest.mark.parametrize("dtype", LIMITS, ids=str)


def run(p):
    """y and every gradient of the kernels."""
    y, u, order = grouped_forward(p.x, p.base, p.experts, p.g, p.segments, p.slots)
    gradients = grouped_backward(p.dy, (p.x, u, p.g), p.experts, order)
    return {"y": y, **dict(zip(GRADIENTS, gradients, strict=True))}


def exact(p):
    """The same by autograd in fp64, from the same values, dense over the experts; g has no gradient where it is 0."""
    p = p.to(torch.float64)
    weights = [getattr(p.experts, name) for name in WEIGHTS]
    leaves = [None if t is None else t.detach().requires_grad_() for t in (p.x, p.g, *weights)]
    experts, g = Experts(*leaves[2:], p.experts.activation), leaves[1] * (leaves[1] != 0)
    y = mixture(leaves[0], p.base, experts, g, p.segments)
    given = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], p.dy))
    gradients = (None if t is None else next(given) for t in leaves)
    return {"y": y.detach(), **dict(zip(GRADIENTS, gradients, strict=True))}


def assert_close(actual, right, limit):
    error = ((actual.double() - right.double()).norm() / right.double().norm()).item()
    assert error <= limit, error


@DTYPES
@pytest.mark.parametrize("name", PROBLEMS)
def test_y_and_every_gradient_agree_with_fp64(make_problem, name, dtype):
    p = make_problem(**PROBLEMS[name]).to(dtype)
    actual, right = run(p), exact(p)
    for key, value in actual.items():
        if right[key] is None:
            assert value is None
            continue
        assert value.dtype == (dtype if key in ("y", "x") else torch.float32)
        assert value.shape == right[key].shape
        assert_close(value, right[key], LIMITS[dtype])


@pytest.mark.parametrize(("sets", "gates"), [(1, 2), (3, 1)])
def test_y_is_that_of_the_reference_of_all_experts(make_problem, sets, gates):
    counts, gating = (20, 0, 13), Gating("ase", 2, 1)
    p = make_problem(experts=5, slots=3, counts=counts, sets=sets, gates=gates, **BIASED)
    z = torch.randn(gates, 33, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, g, _ = expert_mixture(p.x, p.base, p.experts, z, p.segments, gating)
    p = replace(p, g=g).to(torch.float32)
    assert_close(run(p)["y"], y, LIMITS[torch.float32])


def test_without_base_y_is_the_experts_sum(make_problem):
    p = make_problem().to(torch.float32)
    y = grouped_forward(p.x, None, p.experts, p.g, p.segments, p.slots)[0]
    assert_close(y, exact(p)["y"] - p.base, LIMITS[torch.float32])


def test_what_is_not_selected_gets_no_gradient(make_problem):
    p = make_problem(kind="first experts", **BIASED).to(torch.float32)
    actual = run(p)
    assert not actual["g"][..., p.slots :].any()
    for name, dim, each in (("down", 1, 16), ("up", 2, 16), ("hidden_bias", 1, 16), ("output_bias", 1, 1)):
        idle = actual[name].narrow(dim, p.slots * each, (4 - p.slots) * each)
        assert not idle.any() and actual[name].any()


def test_a_second_run_gives_the_same_bits(make_problem):
    p = make_problem(kind="ragged", gates=2, **BIASED).to(torch.float16)
    first, second = run(p), run(p)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def row_by_row(a, b, dtype):
    """A product whose loop treats every row alike, unlike BLAS's."""
    return np.einsum("ik,kj->ij", a.astype(dtype), b.astype(dtype))


@DTYPES
def test_a_tokens_bits_do_not_depend_on_the_other_tokens(make_problem, dtype, monkeypatch):
    monkeypatch.setattr(np, "matmul", row_by_row)
    p, few = make_problem(counts=(80,), **BIASED).to(dtype), slice(30, 41)
    tokens = {"x": p.x[few]} | {name: getattr(p, name)[:, few].contiguous() for name in ("base", "g", "dy")}
    whole, alone = run(p), run(replace(p, segments=TaskSegments.of((11,), p.x.device), **tokens))
    for name in ("y", "x", "g"):
        assert torch.equal(whole[name][..., few, :], alone[name]), name


def test_any_row_stride(make_problem):
    p = make_problem(**BIASED).to(torch.float32)
    wide = {name: torch.nn.functional.pad(getattr(p, name), (3, 2))[..., 3:-2] for name in ("x", "base", "dy")}
    assert not wide["x"].is_contiguous()
    expected, actual = run(p), run(replace(p, **wide))
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


# ---- every kernel beside its reference ----


def flat(p):
    """With the rows of all gates in one dimension."""
    return replace(p, base=p.base.flatten(0, 1), g=p.g.flatten(0, 1), dy=p.dy.flatten(0, 1))


@pytest.mark.parametrize("setting", [{}, BIASED | {"sets": 2, "gates": 2, "kind": "ragged"}], ids=["lora", "experts"])
def test_every_kernel_agrees_with_its_reference(make_problem, setting):
    whole = make_problem(**setting).to(torch.float32)
    p = flat(whole)
    q, limit, activation = p.to(torch.float64), LIMITS[torch.float32], p.experts.activation
    order = sort.sort(whole.g, p.segments, p.slots, p.experts.sets)
    used = order.pairs()[2]
    (down, up), (exact_down, exact_up) = layers(p.experts, 4), layers(q.experts, 4)

    def check(actual, right, mask=None):
        for a, b in zip(actual, right, strict=True):
            if mask is not None:
                assert not b[~mask.expand_as(b)].any(), "the reference writes to empty places"
                a, b = a.where(mask, 0), b
            assert_close(a, b, limit)

    u = products.shrink_reference(q.x, exact_down, order)
    gated = products.gated_reference(u, q.g, order, activation)
    check(products.shrink(p.x, down, p.g, order, activation), (u, gated), used)
    out = products.expand_reference(gated, exact_up, q.g, order)
    check([products.expand(gated.float(), up, p.g, order)], [out], used)
    combined = products.combine_reference(out, q.base, len(q.g), order)
    check([products.combine(out.float(), p.base, len(p.g), order)], [combined])
    right = mixture(q.x, whole.to(torch.float64).base, q.experts, whole.to(torch.float64).g, q.segments)
    assert_close(combined, right.flatten(0, 1), 1e-12)

    leaves = u.requires_grad_(), q.g.detach().requires_grad_()
    again = products.gated_reference(*leaves, order, activation)
    out = products.expand_reference(again, exact_up, leaves[1], order)
    du, dg = torch.autograd.grad(out, leaves, q.dy[order.pairs()[0]])
    right = du, gated, dg
    actual = products.shrink(p.dy, up, p.g, order, activation, u.detach().float())
    check(actual[:2], right[:2], used)
    check(actual[2:], right[2:])
    out = products.expand_reference(du, Layer(exact_down.weight, None), q.g, order)
    check([products.expand(du.float(), Layer(down.weight, None), p.g, order)], [out], used)
    right = products.combine_reference(out, None, len(q.x), order)
    check([products.combine(out.float(), None, len(p.x), order)], [right])


@pytest.mark.parametrize("parts", [1, 3])
def test_weight_gradients_agree_with_their_reference(make_problem, parts, monkeypatch):
    """Experts with one to three blocks in up to three parts, of which some are empty."""
    monkeypatch.setattr(products, "MOST_PARTS", parts)
    p = make_problem(counts=(150, 130), experts=4, kind="ragged", slots=4, **BIASED).to(torch.float32)
    order = sort.sort(p.g, p.segments, p.slots, 1)
    p, (down, up) = flat(p), layers(p.experts, 4)
    shrunk = products.shrink(p.x, down, p.g, order, p.experts.activation)
    _, gated = (t.where(order.pairs()[2], 0) for t in shrunk)
    limit = LIMITS[torch.float32]
    wide, narrow, gates = p.dy.double(), gated.double(), p.g.double()
    product, _, weighted = products.weight_grad_reference(wide, narrow, gates, order)
    db, dc = products.weight_grad(p.dy, gated, order, *up, p.g)
    assert_close(db[0], product, limit)
    assert_close(dc[0], weighted, limit)
    product, sums, _ = products.weight_grad_reference(p.x.double(), narrow, gates, order)
    da, dhidden = products.weight_grad(p.x, gated, order, *down)
    assert_close(da[0], product, limit)
    assert_close(dhidden[0], sums.flatten(), limit)
