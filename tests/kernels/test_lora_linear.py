"""lora_linear: plain LoRA on a frozen linear layer is its reference, by both algorithms, and so are its gradients."""

import pytest
import torch
from kernels.packed import Packed, columns_pay
from torch.utils.checkpoint import checkpoint

from kernels.lora_linear import lora_linear, lora_linear_backward_op, lora_linear_op, lora_linear_reference

TOKENS = 37
CASES = pytest.mark.parametrize(("d", "width", "rank"), [(24, 72, 4), (24, 24, 4), (96, 24, 8), (7, 11, 3), (11, 7, 1)])


def make(d, width, rank, dtype):
    """(leaves x, A, B; the packed weights; the frozen layer; dy), from the same random numbers in every type."""
    rng = torch.Generator().manual_seed(0)
    shapes = (TOKENS, d), (rank, d), (width, rank), (width, d), (width,), (TOKENS, width)
    x, a, b, weight, bias, dy = (torch.randn(shape, generator=rng).to(dtype) / shape[-1] ** 0.5 for shape in shapes)
    packed = Packed.empty((d, width), (a, b), dtype)
    packed.fill_frozen((weight, bias))
    packed.fill(a, b)
    return [leaf.requires_grad_() for leaf in (x, a, b)], packed, (weight, bias), dy


def results(y, leaves, dy):
    return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *torch.autograd.grad(y, leaves, dy)), strict=True))


def distance(actual, exact):
    return {name: ((actual[name].double() - right).norm() / right.norm()).item() for name, right in exact.items()}


def exact(leaves, linear, dy):
    """The reference in fp64, from the same values."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    linear = tuple(tensor.double() for tensor in linear)
    return results(lora_linear_reference(leaves[0], linear, tuple(leaves[1:])), leaves, dy.double())


def test_the_cases_are_of_both_algorithms():
    assert [columns_pay(*case[:2]) for case in CASES.args[1]] == [True, False, False, True, False]


@CASES
def test_outputs_and_gradients_in_fp32_are_the_reference_s(d, width, rank):
    leaves, packed, linear, dy = make(d, width, rank, torch.float32)
    ours = results(lora_linear(leaves[0], packed, tuple(leaves[1:])), leaves, dy)
    assert {name: error for name, error in distance(ours, exact(leaves, linear, dy)).items() if error > 1e-6} == {}


@CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_errors_in_half_precision_are_those_of_two_products_and_a_sum(dtype, d, width, rank):
    leaves, packed, linear, dy = make(d, width, rank, dtype)
    right = exact(leaves, linear, dy)
    plain = distance(results(lora_linear_reference(leaves[0], linear, tuple(leaves[1:])), leaves, dy), right)
    ours = distance(results(lora_linear(leaves[0], packed, tuple(leaves[1:])), leaves, dy), right)
    # Both round H or dH once and every output once; single cases differ by chance.
    assert {name: (error, plain[name]) for name, error in ours.items() if error > 1.3 * plain[name]} == {}


@CASES
def test_a_checkpointed_pass_has_the_gradients_of_a_plain_one(d, width, rank):
    leaves, packed, _, dy = make(d, width, rank, torch.float32)
    plain, again = (
        results(run(lambda *leaves: lora_linear(leaves[0], packed, leaves[1:]), *leaves), leaves, dy)
        for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False))
    )
    assert all(torch.equal(again[name], value) for name, value in plain.items())


@CASES
def test_the_operators_keep_pytorch_s_rules(d, width, rank):
    leaves, packed, _, dy = make(d, width, rank, torch.float32)
    torch.library.opcheck(lora_linear_op, (*leaves, *packed.tensors[:3]))
    x, a, b = (leaf.detach() for leaf in leaves)
    _, h = lora_linear_op(x, a, b, *packed.tensors[:3])
    x, h = h.tensor_split([d], dim=1) if columns_pay(d, width) else (x, h)
    torch.library.opcheck(lora_linear_backward_op, (dy, x, h, a, b, packed.up, packed.down))


@CASES
def test_compiled_it_is_one_graph_with_the_same_results(d, width, rank):
    leaves, packed, _, dy = make(d, width, rank, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    actual = results(compiled(leaves[0], packed, tuple(leaves[1:])), leaves, dy)
    expected = results(lora_linear(leaves[0], packed, tuple(leaves[1:])), leaves, dy)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
