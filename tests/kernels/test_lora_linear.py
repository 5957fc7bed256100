"""lora_linear: plain LoRA on a frozen linear layer is its reference, by both algorithms, and so are its gradients."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kernels.lora_linear import backward_op, columns_pay, forward_op, lora_linear, lora_linear_reference

TOKENS = 37
CASES = pytest.mark.parametrize(("d", "width", "rank"), [(24, 72, 4), (24, 24, 4), (96, 24, 8), (7, 11, 3), (11, 7, 1)])


def make(d, width, rank, dtype):
    """(leaves x, A, B; the frozen layer; dy), from the same random numbers in every type."""
    rng = torch.Generator().manual_seed(0)
    shapes = (TOKENS, d), (rank, d), (width, rank), (width, d), (width,), (TOKENS, width)
    x, a, b, weight, bias, dy = (torch.randn(shape, generator=rng).to(dtype) / shape[-1] ** 0.5 for shape in shapes)
    return [leaf.requires_grad_() for leaf in (x, a, b)], (weight, bias), dy


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
    leaves, linear, dy = make(d, width, rank, torch.float32)
    ours = results(lora_linear(leaves[0], linear, tuple(leaves[1:])), leaves, dy)
    assert {name: error for name, error in distance(ours, exact(leaves, linear, dy)).items() if error > 1e-6} == {}


@CASES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_errors_in_half_precision_are_those_of_two_products_and_a_sum(dtype, d, width, rank):
    leaves, linear, dy = make(d, width, rank, dtype)
    right = exact(leaves, linear, dy)
    plain = distance(results(lora_linear_reference(leaves[0], linear, tuple(leaves[1:])), leaves, dy), right)
    ours = distance(results(lora_linear(leaves[0], linear, tuple(leaves[1:])), leaves, dy), right)
    # Both round H or dH once and every output once; single cases differ by chance.
    assert {name: (error, plain[name]) for name, error in ours.items() if error > 1.3 * plain[name]} == {}


@CASES
def test_a_checkpointed_pass_has_the_gradients_of_a_plain_one(d, width, rank):
    leaves, linear, dy = make(d, width, rank, torch.float32)
    plain, again = (
        results(run(lambda *leaves: lora_linear(leaves[0], linear, leaves[1:]), *leaves), leaves, dy)
        for run in (lambda f, *x: f(*x), lambda f, *x: checkpoint(f, *x, use_reentrant=False))
    )
    assert all(torch.equal(again[name], value) for name, value in plain.items())


@CASES
def test_the_operators_keep_pytorch_s_rules(d, width, rank):
    leaves, linear, dy = make(d, width, rank, torch.float32)
    x, a, b = (leaf.detach() for leaf in leaves)
    torch.library.opcheck(forward_op, (x, *linear, a, b))
    _, h = forward_op(x, *linear, a, b)
    x, h = h.tensor_split([d], dim=1) if columns_pay(d, width) else (x, h)
    for needs_dx in (True, False):
        torch.library.opcheck(backward_op, (dy, x, h, linear[0], a, b, needs_dx))


@CASES
def test_compiled_it_is_one_graph_with_the_same_results(d, width, rank):
    leaves, linear, dy = make(d, width, rank, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    actual = results(compiled(leaves[0], linear, tuple(leaves[1:])), leaves, dy)
    expected = results(lora_linear(leaves[0], linear, tuple(leaves[1:])), leaves, dy)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@CASES
@pytest.mark.parametrize("trained", ["x and the adapters", "the adapters"])
def test_nothing_is_multiplied_for_a_gradient_that_is_not_needed(trained, d, width, rank):
    """dH, dA and dB, and for dx the frozen product and dH A."""
    leaves, linear, dy = make(d, width, rank, torch.float32)
    leaves[0].requires_grad_(trained != "the adapters")
    y = lora_linear(leaves[0], linear, tuple(leaves[1:]))
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        y.backward(dy)
    expected = 2 * width * rank + d * rank
    expected += d * width + d * rank if leaves[0].requires_grad else 0
    assert counter.get_total_flops() == 2 * TOKENS * expected


@CASES
def test_saved_beside_the_weights_is_h_and_where_x_was_copied_the_copy_in_its_stead(d, width, rank):
    leaves, linear, _ = make(d, width, rank, torch.float32)
    known = {tensor.data_ptr() for tensor in (*leaves, *linear)}
    saved = {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        lora_linear(leaves[0], linear, tuple(leaves[1:]))
    pays = columns_pay(d, width)
    assert (leaves[0].data_ptr() in saved) == (not pays)
    assert sum(size for place, size in saved.items() if place not in known) == 4 * TOKENS * (pays * d + rank)


@CASES
@pytest.mark.parametrize("biased", [True, False])
def test_weights_of_a_wider_type_are_cast_in_the_pass(biased, d, width, rank):
    """Masters and a frozen layer in fp32 beside bf16 tokens, as under autocast; gradients have the masters' type."""
    (x, a, b), (weight, bias), dy = make(d, width, rank, torch.bfloat16)
    linear = weight, bias if biased else None
    expected = results(lora_linear(x, linear, (a, b)), (x, a, b), dy)
    masters = [leaf.detach().float().requires_grad_() for leaf in (a, b)]
    wide = weight.float(), bias.float() if biased else None
    actual = results(lora_linear(x, wide, tuple(masters)), (x, *masters), dy)
    assert actual["dA"].dtype == actual["dB"].dtype == torch.float32
    assert all(torch.equal(actual[name].to(value), value) for name, value in expected.items())


@CASES
def test_batched_gradients_are_those_of_a_loop(d, width, rank):
    leaves, linear, dy = make(d, width, rank, torch.float32)
    y, many = lora_linear(leaves[0], linear, tuple(leaves[1:])), torch.stack([dy, 2 - dy, dy.square()])

    def gradients(cotangent, **options):
        return torch.autograd.grad(y, leaves, cotangent, retain_graph=True, **options)

    expected = [torch.stack(each) for each in zip(*map(gradients, many), strict=True)]
    for actual in (gradients(many, is_grads_batched=True), torch.vmap(gradients)(many)):
        assert all(map(torch.equal, actual, expected))


def test_a_gradient_of_a_gradient_is_refused():
    leaves, linear, dy = make(24, 72, 4, torch.float32)
    y = lora_linear(leaves[0], linear, tuple(leaves[1:]))
    (dx,) = torch.autograd.grad((y * y * dy).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
