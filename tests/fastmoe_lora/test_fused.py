"""LoRAMoE on a frozen FFN runs fused, falls back where it must, and computes with the newest weights."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from fastmoe_lora import MoEConfig, adapt, routing_of  # noqa: E402
from fastmoe_lora.layers import frozen_weights  # noqa: E402
from kernels import GATINGS, custom_ops  # noqa: E402
from kernels.dispatch import choose_family, known_family  # noqa: E402
from model.vit import ViT, ViTConfig  # noqa: E402

WIDTH, OUT, TOKENS, IMAGES = 12, 20, 5, (2, 0, 3)
CONFIGS = {name: MoEConfig(6, 2, int(name in ("ase", "naive-shared")), 2, name) for name in GATINGS}
# Norm of the difference over the norm: two sums of some hundred fp32 products in different orders differ by 1e-6.
CLOSE = 1e-5

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the modules here are on the CPU; see test_gpu.py")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    known_family.cache_clear()  # another test may have asked without the interpreter
    torch.manual_seed(0)


class Mlp(nn.Module):
    """timm's names."""

    def __init__(self, act=None, drop=0.0, bias=True):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 28, bias)
        self.act = act or nn.GELU()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(28, OUT, bias)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def spread(module):
    """As trained: B nonzero, routers that tell experts apart."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("lora_B", "routers")):
                parameter.normal_()
    return module


def layer_on(base, gating="ase", kernel="triton", frozen=True, **options):
    """``base`` with experts beside it."""
    model = nn.Sequential(base.requires_grad_(not frozen))
    adapt(model, CONFIGS[gating], len(IMAGES), "0", kernel=kernel, freeze=False, **options)
    return spread(base)


def fused(layer):
    """Whether base and experts are one operation of the kernels."""
    kernel, config = layer.adapters.sets[""].routing.kernel, layer.adapters.sets[""].config
    family = choose_family(kernel, layer.lora_A.device, config.experts, config.rank)
    return frozen_weights(layer) is not None and family == "one tile"


def run(layer, x):
    with routing_of(layer).batch(IMAGES):
        return layer(x)


@pytest.fixture
def layer():
    return layer_on(Mlp())


@pytest.fixture
def x():
    return torch.randn(sum(IMAGES), TOKENS, WIDTH)


def results(layer, x, dtype=torch.float32):
    """y, the mutual-information loss and every gradient, of a random cotangent: that of a mean square may cancel."""
    x = x.detach().clone().requires_grad_()
    y = run(layer, x)
    loss = routing_of(layer).mi_loss()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    wanted = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((y, loss), list(wanted.values()), (dy.to(y.dtype), torch.tensor(10.0)))
    return {"y": y.detach(), "loss": loss.detach()} | dict(zip(wanted, gradients, strict=True))


def as_reference(layer, x):
    """The results of a copy that the reference computes."""
    twin = copy.deepcopy(layer)
    routing_of(twin).kernel = "reference"
    assert not fused(twin)
    return results(twin, x)


def assert_close(actual, expected, bound=CLOSE):
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        assert actual[name].dtype == right.dtype, name
        assert right.norm() > 0 and (actual[name] - right).norm() <= bound * right.norm(), name


@pytest.fixture
def operations(monkeypatch):
    """Which of the two forms of the operation ran, in order: with the frozen layer in it, or beside its output."""
    ran, original = [], custom_ops.lora_moe

    def counted(x, base, *arguments):
        ran.append("beside" if isinstance(base, torch.Tensor) else "fused")
        return original(x, base, *arguments)

    monkeypatch.setattr(custom_ops, "lora_moe", counted)
    return ran


class TestFused:
    @pytest.mark.parametrize("gating", GATINGS)
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    def test_results_and_gradients_are_those_of_the_reference(self, gating, bias, x, operations):
        layer = layer_on(Mlp(bias=bias), gating)
        assert fused(layer)
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["fused"]

    def test_on_a_vit_whose_blocks_have_timm_s_names(self, operations):
        vit = ViT(ViTConfig(width=16, depth=2, heads=2, patch=8), 16)
        routing = adapt(vit, CONFIGS["ase"], len(IMAGES), lora_rank=4, kernel="triton")
        spread(vit)
        assert all(fused(block.mlp) for block in vit.blocks)
        with routing.batch(IMAGES):
            vit.encode(vit.embed(torch.randn(sum(IMAGES), 3, 16, 16)))
        assert operations == 2 * ["fused"]

    @pytest.mark.parametrize("gating", GATINGS)
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    def test_a_linear_layer_wider_than_its_input_has_the_results_of_the_reference(self, gating, bias, x, operations):
        layer = layer_on(nn.Linear(WIDTH, OUT, bias), gating)
        assert fused(layer)
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["fused"]

    @pytest.mark.parametrize(("site", "operation"), [("fc1", "fused"), ("fc2", "beside")])
    def test_of_the_linear_layers_of_a_vit_the_one_that_widens(self, site, operation, operations):
        found = []
        for kernel in ("triton", "reference"):
            torch.manual_seed(0)
            vit = ViT(ViTConfig(width=16, depth=2, heads=2, patch=8), 16)
            routing = adapt(vit, CONFIGS["ase"], len(IMAGES), f"*.{site}", lora_rank=4, kernel=kernel)
            spread(vit)
            layers = [block.get_submodule(f"mlp.{site}") for block in vit.blocks]
            assert all(fused(layer) == (site == "fc1" and kernel == "triton") for layer in layers)
            with routing.batch(IMAGES):
                y = vit.encode(vit.embed(torch.randn(sum(IMAGES), 3, 16, 16)))
            loss = F.mse_loss(y, torch.randn(y.shape)) + routing.mi_loss()
            loss.backward()
            found.append({"y": y.detach()} | {name: p.grad for name, p in vit.named_parameters() if p.requires_grad})
        assert_close(*found)
        assert operations == 2 * [operation]

    def test_keeps_the_names_of_the_state_dict(self, layer):
        assert set(layer.state_dict()) == {"routers", "lora_A", "lora_B"} | set(Mlp().state_dict())


class Silu(Mlp):
    def __init__(self):
        super().__init__(act=nn.SiLU())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Residual(Mlp):
    """timm's names, but another function."""

    def forward(self, x):
        return super().forward(x) + x[..., :1]


class Scaled(Mlp):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((OUT,), 2.0))

    def forward(self, x):
        return self.scale * super().forward(x)


FALLBACKS = {
    "trained FFN": lambda: (Mlp(), {"frozen": False}),
    "LoRA on fc1": lambda: (Mlp(), {"lora_rank": 2, "lora_where": "0.fc1"}),
    "LoRA on fc2": lambda: (Mlp(), {"lora_rank": 2, "lora_where": "0.fc2"}),
    "tanh GELU": lambda: (Mlp(act=nn.GELU(approximate="tanh")), {}),
    "another activation": lambda: (Silu(), {}),
    "dropout": lambda: (Mlp(drop=0.1), {}),
    "another function": lambda: (Residual(), {}),
    "a scale of the FFN": lambda: (Scaled(), {}),
}


class TestFallsBack:
    @pytest.mark.parametrize("case", FALLBACKS)
    def test_to_the_unfused_operation_with_the_same_results(self, case, x, operations):
        base, options = FALLBACKS[case]()
        layer = layer_on(base, **options).train(case != "dropout")  # which draws other numbers in every run
        assert fused(layer) == (case == "dropout")  # which does nothing in evaluation
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == (["fused"] if case == "dropout" else ["beside"])

    def test_where_dropout_acts(self, x, operations):
        layer = layer_on(Mlp(drop=0.1))
        assert not fused(layer)
        run(layer, x)
        assert operations == ["beside"]

    @pytest.mark.parametrize("make", [lambda: nn.Linear(WIDTH, WIDTH), lambda: Doubled(WIDTH, OUT)],
                             ids=["no wider than its input", "a subclass"])  # fmt: skip
    def test_where_a_linear_layer_is_not_one_that_columns_serve(self, make, x, operations):
        layer = layer_on(spread(make()))
        assert not fused(layer)
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["beside"]

    def test_where_a_linear_layer_is_trained(self, x, operations):
        layer = layer_on(nn.Linear(WIDTH, OUT), frozen=False)
        assert not fused(layer)
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["beside"]

    @pytest.mark.parametrize("frozen", [False, True])
    def test_where_the_ffn_is_changed_afterwards(self, frozen, layer, x):
        run(layer, x)
        layer.fc1 = nn.Sequential(nn.Linear(WIDTH, 28), nn.Tanh()).requires_grad_(not frozen)
        assert not fused(layer)
        assert_close(results(layer, x), as_reference(layer, x))

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: setattr(layer, "act", nn.SiLU()),
            lambda layer: setattr(layer.act, "approximate", "tanh"),
            lambda layer: setattr(layer, "norm", nn.LayerNorm(28).requires_grad_(False)),
        ],
        ids=["activation", "kind of GELU", "norm"],
    )
    def test_where_a_part_without_weights_is_changed_afterwards(self, change, layer, x):
        before = run(layer, x)
        change(layer)
        assert not fused(layer)
        after = results(layer, x)
        assert (after["y"] - before).norm() > 3 * CLOSE * before.norm()
        assert_close(after, as_reference(layer, x))

    @pytest.mark.parametrize("part", ["fc1", "act", "drop1", "norm", "fc2", "drop2"])
    def test_where_a_part_has_a_hook(self, part, layer, x, operations):
        fired = []
        handle = layer.get_submodule(part).register_forward_hook(lambda *_: fired.append(part))
        run(layer, x)
        assert (fired, operations) == ([part], ["beside"])
        handle.remove()
        run(layer, x)
        assert (fired, operations) == ([part], ["beside", "fused"])

    def test_where_a_part_has_a_forward_on_the_instance(self, layer, x):
        """As accelerate's hooks put there."""
        fired, forward = [], layer.fc1.forward
        layer.fc1.forward = lambda x: fired.append("fc1") or forward(x)
        run(layer, x)
        assert fired == ["fc1"]

    def test_where_the_ffn_is_unfrozen_afterwards(self, layer, x, operations):
        run(layer, x)
        layer.fc2.bias.requires_grad_()
        assert not fused(layer)
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["fused", "beside"]


CHANGES = {
    "an optimiser's step": lambda layer: torch.optim.SGD(adapters(layer), 0.1).step(),
    "a change in place": lambda layer: [p.mul_(1.5) for p in adapters(layer)],
    "new data": lambda layer: [setattr(p, "data", 2 * p.data) for p in adapters(layer)],
    "a state dict": lambda layer: layer.load_state_dict({n: v.flip(0) for n, v in layer.state_dict().items()}),
    "an assigned state dict": lambda layer: layer.load_state_dict(
        {n: v.flip(0) for n, v in layer.state_dict().items()}, assign=True
    ),
    "a change of frozen data": lambda layer: [p.data.mul_(2) for p in layer.parameters()],
    "numpy": lambda layer: layer.fc1.weight.detach().numpy().__imul__(2),
    "another tensor as data": lambda layer: setattr(layer.fc2.weight, "data", layer.fc2.weight.data * 2),
    "a change of a frozen weight": lambda layer: layer.fc2.weight.mul_(2),
    "a new frozen bias": lambda layer: setattr(layer.fc1, "bias", nn.Parameter(torch.randn(28), False)),
}


def adapters(layer):
    return [layer.lora_A, layer.lora_B, layer.routers]


class TestNewestWeights:
    @pytest.mark.parametrize("change", CHANGES)
    def test_are_used_after(self, change, layer, x):
        before = results(layer, x)
        for p in adapters(layer):
            p.grad = torch.randn_like(p)
        with torch.no_grad():
            CHANGES[change](layer)
        if change == "an assigned state dict":
            layer.fc1.requires_grad_(False), layer.fc2.requires_grad_(False)
        after = results(layer, x)
        assert fused(layer) and not torch.equal(after["y"], before["y"])
        assert_close(after, as_reference(layer, x))

    def test_serve_a_pass_back_that_follows_an_optimiser_s_step(self, layer, x):
        """The graph holds what it was made with, or PyTorch says that it does not: never gradients of other weights."""
        y, expected = run(layer, x), results(layer, x)
        with torch.no_grad():
            layer.lora_B.mul_(2)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, layer.lora_A, dy)
        assert expected["y"].equal(y)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_are_in_the_type_that_the_module_was_moved_to(self, dtype, layer, x):
        run(layer, x)
        layer.to(dtype)
        if dtype == torch.bfloat16:
            with pytest.raises(ValueError, match="interpreter multiplies bf16 wrongly"):
                run(layer, x.to(dtype))
            return
        y, plain = run(layer, x.to(dtype)), as_reference(layer, x.to(dtype))["y"]
        assert y.dtype == dtype
        exact = as_reference(copy.deepcopy(layer).double(), x.to(dtype).double())["y"]
        assert (y.double() - exact).norm() <= 1.1 * (plain.double() - exact).norm()

    def test_are_in_autocast_s_type_within_it_and_in_their_own_without(self, layer, x):
        before = results(layer, x)
        with torch.autocast("cpu", torch.float16):
            within = results(layer, x)
            assert within["y"].dtype == torch.float16 and within["lora_A"].dtype == within["x"].dtype == torch.float32
            # A dozen roundings of 2^-11 each in sequence, for either.
            for name, right in as_reference(layer, x).items():
                assert (within[name].float() - right.float()).norm() <= 0.01 * right.float().norm(), name
        after = results(layer, x)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_of_a_copy_are_its_own(self, layer, x):
        before = results(layer, x)
        twin = copy.deepcopy(layer)
        with torch.no_grad():
            twin.lora_B.mul_(2)
            twin.fc1.weight.mul_(2)
        changed = results(twin, x)
        assert not torch.equal(changed["y"], before["y"])
        assert_close(changed, as_reference(twin, x))
        assert all(torch.equal(right, before[name]) for name, right in results(layer, x).items())

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_after_an_evaluation_serve_training(self, mode, layer, x):
        with mode():
            y = run(layer, x)
        trained = results(layer, x)
        assert torch.equal(trained["y"], y)
        assert_close(trained, as_reference(layer, x))


def test_a_whole_vit_with_plain_lora_beside_has_the_gradients_of_the_reference():
    """LoRA on the attention, the fused FFN behind it: the gradient passes through both."""
    vit = ViT(ViTConfig(width=16, depth=2, heads=2, patch=8), 16)
    adapt(vit, CONFIGS["topk"], len(IMAGES), lora_rank=4, kernel="triton")
    spread(vit)
    images = torch.randn(sum(IMAGES), 3, 16, 16)
    twin = copy.deepcopy(vit)
    routing_of(twin).kernel = "reference"
    found = []
    for model in (vit, twin):
        with routing_of(model).batch(IMAGES):
            y = model.encode(model.embed(images))
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        loss = F.mse_loss(y, weight) + routing_of(model).mi_loss()
        loss.backward()
        found.append({"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert fused(vit.blocks[0].mlp) and not fused(twin.blocks[0].mlp)
    assert_close(*found)
