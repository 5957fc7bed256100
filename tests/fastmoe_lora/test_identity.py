"""Experts keep their identity: what belongs to an expert moves with it, and nothing of another moves."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from torch import nn  # noqa: E402

from fastmoe_lora import MoEConfig, adapt  # noqa: E402
from fastmoe_lora.layers import frozen_weights  # noqa: E402
from kernels.dispatch import known_family  # noqa: E402
from model.vit import Mlp  # noqa: E402

WIDTH, TOKENS, IMAGES, RANK = 16, 9, (1, 2), 2
CONFIG = MoEConfig(6, 2, 2, RANK)
ORDER = [2, 0, 3, 1, 5, 4]  # sparse experts among themselves, shared ones among themselves
EVERY_KERNEL = pytest.mark.parametrize("kernel", ["reference", "triton"])

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the modules here are on the CPU; see test_gpu.py")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    known_family.cache_clear()


def build(kernel):
    """A layer with experts that differ, over a frozen FFN; with the Triton kernels it is fused."""
    torch.manual_seed(0)
    layer = Mlp(WIDTH)
    adapt(nn.Sequential(layer), CONFIG, len(IMAGES), "0", kernel=kernel)
    with torch.no_grad():
        for parameter in adapters(layer):
            parameter.normal_()
    assert frozen_weights(layer) is not None
    return layer


def adapters(layer):
    return [layer.lora_A, layer.lora_B, layer.routers]


def run(layer, x):
    """(y, the gates, gradients of A, B and the routers)."""
    seen, routing = [], layer.adapters.sets[""].routing
    routing.record = lambda batch, number, mean_probs, gates, segments: seen.append(gates.detach())
    with routing.batch(IMAGES):
        y = layer(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return y.detach(), seen[0], torch.autograd.grad(y, adapters(layer), dy)


def experts(matrix, axis):
    """The rows, or columns, of each expert."""
    return matrix.unflatten(axis, (CONFIG.experts, RANK)).movedim(axis, 0)


def permuted(a, b, routers):
    rows = torch.tensor(ORDER)
    ranks = (rows[:, None] * RANK + torch.arange(RANK)).flatten()
    return a[ranks], b[:, ranks], routers[:, rows]


@pytest.fixture
def x():
    return torch.randn(sum(IMAGES), TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))


@EVERY_KERNEL
def test_a_permutation_of_the_experts_permutes_gates_and_gradients_and_nothing_else(kernel, x):
    layer = build(kernel)
    y, gates, gradients = run(layer, x)
    with torch.no_grad():
        for parameter, new in zip(adapters(layer), permuted(*adapters(layer)), strict=True):
            parameter.copy_(new)
    moved, moved_gates, moved_gradients = run(layer, x)
    torch.testing.assert_close(moved, y, rtol=1e-5, atol=1e-5)  # sums over experts in another order
    assert torch.equal(moved_gates > 0, gates[:, ORDER] > 0)
    torch.testing.assert_close(moved_gates, gates[:, ORDER], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(moved_gradients, permuted(*gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@EVERY_KERNEL
@pytest.mark.parametrize("expert", [1, 5])
def test_an_expert_that_changes_changes_its_share_alone(kernel, expert, x):
    """A token that does not use it keeps every bit; the others move by their gate times the change."""
    layer = build(kernel)
    y, gates, gradients = run(layer, x)
    a = experts(layer.lora_A.detach(), 0)[expert].clone()
    change = torch.randn(WIDTH, RANK, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        experts(layer.lora_B, 1)[expert] += change
    changed, same_gates, new_gradients = run(layer, x)
    assert torch.equal(gates, same_gates)
    share = gates[:, expert, None] * (x.flatten(0, 1) @ a.T @ change.T)
    torch.testing.assert_close((changed - y).flatten(0, 1), share, rtol=1e-4, atol=1e-4)
    unused = gates[:, expert] == 0
    assert torch.equal(changed.flatten(0, 1)[unused], y.flatten(0, 1)[unused])
    assert bool(unused.any()) == (expert < 4), "expert 1 is sparse, 5 is shared"
    others = [e for e in range(CONFIG.experts) if e != expert]
    for axis, before, after in ((0, gradients[0], new_gradients[0]), (1, gradients[1], new_gradients[1])):
        assert torch.equal(experts(before, axis)[others], experts(after, axis)[others])


@EVERY_KERNEL
def test_an_expert_that_no_token_uses_has_no_gradient(kernel, x):
    layer = build(kernel)
    with torch.no_grad():
        layer.routers[:, 2] = -20  # the lowest logit of tokens whose mean is 1
    _, gates, (a, b, routers) = run(layer, x + 1)
    idle = [e for e in range(CONFIG.experts) if not gates[:, e].any()]
    busy = [e for e in range(CONFIG.experts) if gates[:, e].any()]
    assert 2 in idle and {4, 5} <= set(busy)
    assert not experts(a, 0)[idle].any() and not experts(b, 1)[idle].any() and not routers[:, idle].any()
    assert all(experts(a, 0)[e].any() and experts(b, 1)[e].any() for e in busy)
