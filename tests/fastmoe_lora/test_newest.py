"""A pass reads the parameters that the model has now, whatever changed them.

Versions of tensors do not tell: fused optimisers, numpy and changes by way of ``.data`` leave them as they are.
"""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from fastmoe_lora import adapt  # noqa: E402
from kernels import Gating, TaskSegments, reference  # noqa: E402
from kernels.dispatch import known_family  # noqa: E402
from model.vit import Mlp  # noqa: E402

WIDTH = 16
OPTIMISERS = {
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), "foreach": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=1e-3, fused=True),
}  # fmt: skip

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the modules here are on the CPU; see test_gpu.py")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    known_family.cache_clear()


def lora():
    layer = nn.Linear(WIDTH, 24)
    adapt(nn.Sequential(layer), None, lora_rank=2, lora_where="0")
    return layer


def experts():
    layer = Mlp(WIDTH)
    adapt(nn.Sequential(layer), "4/1/1/2", where="0", kernel="triton")
    return layer


def expected(layer, x):
    """What the layer is, from its parameters as they are."""
    if hasattr(layer, "weight"):
        return F.linear(x, layer.weight, layer.bias) + x @ layer.lora_A.T @ layer.lora_B.T
    weights = ((layer.fc1.weight, layer.fc1.bias), (layer.fc2.weight, layer.fc2.bias))
    segments = TaskSegments.of((len(x),), x.device)
    return reference.lora_moe(x, weights, (layer.lora_A, layer.lora_B), layer.routers, segments, Gating("ase", 1, 1))[0]


@pytest.fixture(params=[lora, pytest.param(experts, marks=pytest.mark.interpret)], ids=["LoRA", "experts"])
def layer(request):
    torch.manual_seed(0)
    layer = request.param()
    with torch.no_grad():
        for part in ("lora_B", "routers"):
            if hasattr(layer, part):
                getattr(layer, part).normal_()
    return layer


@pytest.fixture
def x():
    return torch.randn(10, WIDTH, generator=torch.Generator().manual_seed(1))


def trained(layer):
    return [p for p in layer.parameters() if p.requires_grad]


def assert_newest(layer, x, before=None):
    y, right = layer(x), expected(layer, x)
    assert (y - right).norm() <= 1e-5 * right.norm()
    assert before is None or (y - before).norm() > 1e-3 * right.norm()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_of_every_optimiser_are_seen(name, layer, x):
    optimiser = OPTIMISERS[name](trained(layer))
    for _ in range(2):
        before = layer(x)
        optimiser.zero_grad()
        before.square().sum().backward()
        optimiser.step()
        assert_newest(layer, x, before)


def train_the_base(layer):
    frozen = [p for p in layer.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    optimiser = torch.optim.AdamW(frozen, lr=0.1, fused=True)
    for _ in range(2):
        layer(torch.ones(1, WIDTH)).square().mean().backward()
        optimiser.step()
    for p in frozen:
        p.requires_grad_(False)


CHANGES = {
    "data": lambda layer: [p.data.mul_(2) for p in layer.parameters()],
    "numpy": lambda layer: [p.detach().numpy().__imul__(2) for p in layer.parameters()],
    "an optimiser of the frozen weights": train_the_base,
    "a state": lambda layer: layer.load_state_dict({n: 2 * v for n, v in layer.state_dict().items()}),
    "a state assigned": lambda layer: layer.load_state_dict(
        {n: nn.Parameter(2 * v, not n.endswith(("weight", "bias"))) for n, v in layer.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_seen(change, layer, x):
    before = layer(x).detach()
    CHANGES[change](layer)
    assert_newest(layer, x, before)


def test_a_copy_reads_its_own(layer, x):
    before = layer(x).detach()
    twin = copy.deepcopy(layer)
    for p in twin.parameters():
        p.data.mul_(2)
    assert_newest(twin, x, before)
    assert torch.equal(layer(x), before)


def test_given_parameters_are_read_for_one_pass(layer, x):
    given = {name: (2 * p).detach() for name, p in layer.named_parameters()}
    before = layer(x).detach()
    y = torch.func.functional_call(layer, given, (x,))
    twin = copy.deepcopy(layer)
    twin.load_state_dict(given)
    assert (y - expected(twin, x)).norm() <= 1e-5 * y.norm()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("how", ["two passes", "checkpoint", "a step between"])
def test_gradients_are_those_of_the_parameters_in_the_pass(how, layer, x):
    gradients = []
    for run in (layer, lambda x: expected(layer, x)):
        if how == "two passes":
            loss = run(x).square().sum() + run(2 * x).square().sum()
        elif how == "checkpoint":
            loss = checkpoint(run, x.clone().requires_grad_(), use_reentrant=False).square().sum()
        else:  # a pass whose result is discarded, and a step
            run(x)
            for p in trained(layer):
                p.data.add_(0.1 if run is layer else 0)
            loss = run(x).square().sum()
        gradients.append(torch.autograd.grad(loss, trained(layer)))
    for ours, right in zip(*gradients, strict=True):
        assert (ours - right).norm() <= 1e-5 * right.norm()
