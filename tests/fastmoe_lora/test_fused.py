"""LoRAMoE on a frozen FFN runs fused, falls back where it must, and never computes with weights of yesterday."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels.packed import Packed  # noqa: E402

from fastmoe_lora import LoRALinear, LoRAMoE, MoEConfig, Packing, Routing, adapt, packing  # noqa: E402
from kernels import GATINGS, custom_ops  # noqa: E402
from kernels.dispatch import RESOLVED  # noqa: E402
from model.vit import ViT, ViTConfig  # noqa: E402

WIDTH, OUT, TOKENS, IMAGES = 12, 20, 5, (2, 0, 3)
CONFIGS = {name: MoEConfig(6, 2, int(name in ("ase", "naive-shared")), 2, name) for name in GATINGS}
# Norm of the difference over the norm: two sums of some hundred fp32 products in different orders differ by 1e-6.
CLOSE = 1e-5

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the modules here are on the CPU; see test_gpu.py")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    RESOLVED.clear()  # another test may have asked without the interpreter
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


def layer_on(base, gating="ase", kernel="triton", frozen=True):
    routing = Routing(len(IMAGES), kernel)
    shape = WIDTH, getattr(base, "out_features", OUT)
    layer = spread(LoRAMoE(base.requires_grad_(not frozen), shape, CONFIGS[gating], routing, 0))
    routing.assign(IMAGES)
    return layer


@pytest.fixture
def layer():
    return layer_on(Mlp())


@pytest.fixture
def x():
    return torch.randn(sum(IMAGES), TOKENS, WIDTH)


def results(layer, x, dtype=torch.float32):
    """y, the mutual-information loss and every gradient, of a random cotangent: that of a mean square may cancel."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    loss = layer.routing.mi_loss()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    wanted = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad((y, loss), list(wanted.values()), (dy.to(y.dtype), torch.tensor(10.0)))
    return {"y": y.detach(), "loss": loss.detach()} | dict(zip(wanted, gradients, strict=True))


def as_reference(layer, x):
    """The results of a copy that the reference computes."""
    twin = copy.deepcopy(layer)
    twin.routing.kernel = "reference"
    assert not twin.fused
    return results(twin, x)


def assert_close(actual, expected, bound=CLOSE):
    assert actual.keys() == expected.keys()
    for name, right in expected.items():
        assert actual[name].dtype == right.dtype, name
        assert right.norm() > 0 and (actual[name] - right).norm() <= bound * right.norm(), name


@pytest.fixture
def operations(monkeypatch):
    """Which of the two operations ran, in order."""
    ran = []
    for name in ("lora_moe", "lora_moe_packed"):

        def counted(*arguments, name=name, original=getattr(custom_ops, name), **options):
            ran.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(custom_ops, name, counted)
    return ran


@pytest.fixture
def copies(monkeypatch):
    """How often frozen weights and adapters were copied."""
    count = {"fill_frozen": 0, "fill": 0}
    fill_frozen, fill_all = Packed.fill_frozen, packing.fill_all

    def counted_frozen(self, *linears):
        count["fill_frozen"] += 1
        fill_frozen(self, *linears)

    def counted(layers, adapters):
        count["fill"] += len(layers)
        fill_all(layers, adapters)

    monkeypatch.setattr(Packed, "fill_frozen", counted_frozen)
    monkeypatch.setattr(packing, "fill_all", counted)
    return count


class TestFused:
    @pytest.mark.parametrize("gating", GATINGS)
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    def test_results_and_gradients_are_those_of_the_reference(self, gating, bias, x, operations):
        layer = layer_on(Mlp(bias=bias), gating)
        assert layer.fused
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["lora_moe_packed"]

    def test_on_a_vit_whose_blocks_have_timm_s_names(self, operations):
        vit = ViT(ViTConfig(width=16, depth=2, heads=2, patch=8), 16)
        routing = adapt(vit, CONFIGS["ase"], len(IMAGES), lora_rank=4, kernel="triton")
        spread(vit)
        assert all(block.mlp.fused for block in vit.blocks)
        routing.assign(IMAGES)
        vit.encode(vit.embed(torch.randn(sum(IMAGES), 3, 16, 16)))
        assert operations == 2 * ["lora_moe_packed"]

    @pytest.mark.parametrize("gating", GATINGS)
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    def test_a_linear_layer_wider_than_its_input_has_the_results_of_the_reference(self, gating, bias, x, operations):
        layer = layer_on(nn.Linear(WIDTH, OUT, bias), gating)
        assert layer.fused
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["lora_moe_packed"]

    @pytest.mark.parametrize(("site", "operation"), [("fc1", "lora_moe_packed"), ("fc2", "lora_moe")])
    def test_of_the_linear_layers_of_a_vit_the_one_that_widens(self, site, operation, operations):
        found = []
        for kernel in ("triton", "reference"):
            torch.manual_seed(0)
            vit = ViT(ViTConfig(width=16, depth=2, heads=2, patch=8), 16)
            routing = adapt(vit, CONFIGS["ase"], len(IMAGES), f"*.{site}", lora_rank=4, kernel=kernel)
            spread(vit)
            layers = [block.get_submodule(f"mlp.{site}") for block in vit.blocks]
            assert all(layer.fused == (site == "fc1" and kernel == "triton") for layer in layers)
            routing.assign(IMAGES)
            y = vit.encode(vit.embed(torch.randn(sum(IMAGES), 3, 16, 16)))
            loss = F.mse_loss(y, torch.randn(y.shape)) + routing.mi_loss()
            loss.backward()
            found.append({"y": y.detach()} | {name: p.grad for name, p in vit.named_parameters() if p.requires_grad})
        assert_close(*found)
        assert operations == 2 * [operation]

    def test_keeps_the_names_of_the_state_dict(self, layer):
        assert set(layer.state_dict()) == {"routers", "lora_A", "lora_B"} | {
            f"base.{name}" for name in Mlp().state_dict()
        }


def with_lora(linear):
    base = Mlp()
    setattr(base, linear, LoRALinear(getattr(base, linear), 2))
    return spread(base)


class Silu(Mlp):
    def __init__(self):
        super().__init__(act=nn.SiLU())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


FALLBACKS = {
    "trained FFN": lambda: (Mlp(), False),
    "LoRA on fc1": lambda: (with_lora("fc1"), False),
    "LoRA on fc2": lambda: (with_lora("fc2"), True),
    "tanh GELU": lambda: (Mlp(act=nn.GELU(approximate="tanh")), True),
    "another activation": lambda: (Silu(), True),
    "dropout": lambda: (Mlp(drop=0.1), True),
}


class TestFallsBack:
    @pytest.mark.parametrize("case", FALLBACKS)
    def test_to_the_unfused_operation_with_the_same_results(self, case, x, operations):
        base, frozen = FALLBACKS[case]()
        layer = layer_on(base, frozen=frozen).eval()  # dropout draws other numbers in every run of a training
        assert not layer.fused
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["lora_moe"]

    @pytest.mark.parametrize("make", [
        lambda: nn.Linear(WIDTH, WIDTH), lambda: LoRALinear(nn.Linear(WIDTH, OUT), 2), lambda: Doubled(WIDTH, OUT),
    ], ids=["no wider than its input", "LoRA", "a subclass"])  # fmt: skip
    def test_where_a_linear_layer_is_not_one_that_columns_serve(self, make, x, operations):
        layer = layer_on(spread(make()))
        assert not layer.fused
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["lora_moe"]

    def test_where_a_linear_layer_is_trained(self, x, operations):
        layer = layer_on(nn.Linear(WIDTH, OUT), frozen=False)
        assert not layer.fused
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["lora_moe"]

    @pytest.mark.parametrize("frozen", [False, True])
    def test_where_the_ffn_is_changed_afterwards(self, frozen, layer, x):
        layer(x)
        layer.base.fc1 = spread(LoRALinear(layer.base.fc1, 2)).requires_grad_(not frozen)
        assert not layer.fused
        assert_close(results(layer, x), as_reference(layer, x))

    def test_where_the_ffn_is_unfrozen_afterwards(self, layer, x, operations):
        layer(x)
        layer.base.fc2.bias.requires_grad_()
        assert not layer.fused
        assert_close(results(layer, x), as_reference(layer, x))
        assert operations == ["lora_moe_packed", "lora_moe"]


CHANGES = {
    "an optimiser's step": lambda layer: torch.optim.SGD(adapters(layer), 0.1).step(),
    "a change in place": lambda layer: [p.mul_(1.5) for p in adapters(layer)],
    "new data": lambda layer: [setattr(p, "data", 2 * p.data) for p in adapters(layer)],
    "a state dict": lambda layer: layer.load_state_dict({n: v.flip(0) for n, v in layer.state_dict().items()}),
    "an assigned state dict": lambda layer: layer.load_state_dict(
        {n: v.flip(0) for n, v in layer.state_dict().items()}, assign=True
    ),
    "a change of a frozen weight": lambda layer: layer.base.fc2.weight.mul_(2),
    "a new frozen bias": lambda layer: setattr(layer.base.fc1, "bias", nn.Parameter(torch.randn(28), False)),
}


def adapters(layer):
    return [layer.lora_A, layer.lora_B, layer.routers]


def weight_types(layer):
    """Of all that is packed but the routers' scales, which are fp32."""
    return {tensor.dtype for tensor in layer.packing.packed.tensors[:-1]}


class TestNewestWeights:
    @pytest.mark.parametrize("change", CHANGES)
    def test_are_used_after(self, change, layer, x):
        before = results(layer, x)
        for p in adapters(layer):
            p.grad = torch.randn_like(p)
        with torch.no_grad():
            CHANGES[change](layer)
        if change == "an assigned state dict":
            layer.base.requires_grad_(False)
        after = results(layer, x)
        assert layer.fused and not torch.equal(after["y"], before["y"])
        assert_close(after, as_reference(layer, x))

    def test_are_read_by_a_pass_that_follows_no_assign(self, layer, x):
        layer(x)
        with torch.no_grad():
            layer.lora_B.zero_()
        torch.testing.assert_close(layer(x), layer.base(x), rtol=CLOSE, atol=CLOSE)

    def test_are_copied_once_for_each_pass_and_the_frozen_ones_once_for_all(self, x, copies):
        layer = layer_on(Mlp())
        Packing(layer).pack()
        assert copies == {"fill_frozen": 1, "fill": 1}
        optimizer = torch.optim.SGD(adapters(layer), 0.1)
        for step in range(3):
            Packing(layer).pack()
            for _ in range(2):  # two batches for one step
                layer(x).sum().backward()
                layer.routing.mi_loss()
            assert copies == {"fill_frozen": 1, "fill": 1 + 2 * (step + 1)}
            optimizer.step()

    def test_serve_a_pass_back_that_follows_an_optimiser_s_step(self, layer, x):
        """The graph holds what it was made with, or PyTorch says that it does not: never gradients of other weights."""
        y, expected = layer(x), results(layer, x)
        with torch.no_grad():
            layer.lora_B.mul_(2)
        Packing(layer).pack()
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, layer.lora_A, dy)
        assert expected["y"].equal(y)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_are_in_the_type_that_the_module_was_moved_to(self, dtype, layer, x):
        layer(x)
        layer.to(dtype)
        Packing(layer).pack()
        assert weight_types(layer) == {dtype}
        if dtype == torch.float16:  # the interpreter multiplies bf16 wrongly
            y, plain = layer(x.to(dtype)), as_reference(layer, x.to(dtype))["y"]
            assert y.dtype == dtype
            exact = as_reference(copy.deepcopy(layer).double(), x.to(dtype).double())["y"]
            assert (y.double() - exact).norm() <= 1.1 * (plain.double() - exact).norm()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_are_in_autocast_s_type_within_it_and_in_their_own_without(self, dtype, layer, x):
        before = results(layer, x)
        with torch.autocast("cpu", dtype):
            Packing(layer).pack()
            assert weight_types(layer) == {dtype}
            if dtype == torch.float16:
                within = results(layer, x)
                assert within["y"].dtype == dtype and within["lora_A"].dtype == within["x"].dtype == torch.float32
                # A dozen roundings of 2^-11 each in sequence, for either.
                for name, right in as_reference(layer, x).items():
                    assert (within[name].float() - right.float()).norm() <= 0.01 * right.float().norm(), name
        after = results(layer, x)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_of_a_copy_are_its_own(self, layer, x):
        before = results(layer, x)
        twin = copy.deepcopy(layer)
        assert twin.packing is not layer.packing
        with torch.no_grad():
            twin.lora_B.mul_(2)
            twin.base.fc1.weight.mul_(2)
        changed = results(twin, x)
        assert not torch.equal(changed["y"], before["y"])
        assert_close(changed, as_reference(twin, x))
        assert all(torch.equal(right, before[name]) for name, right in results(layer, x).items())

    @pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
    def test_made_while_evaluating_serve_training(self, mode, x):
        routing = Routing(len(IMAGES), "triton")
        layer = spread(LoRAMoE(Mlp().requires_grad_(False), (WIDTH, OUT), CONFIGS["ase"], routing, 0))
        with mode():
            routing.assign(IMAGES)
            Packing(layer).pack()
            y = layer(x)
            routing._mean_probs.clear()
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
    twin.blocks[0].mlp.routing.kernel = "reference"
    found = []
    for model in (vit, twin):
        model.blocks[0].mlp.routing.assign(IMAGES)
        y = model.encode(model.embed(images))
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        loss = F.mse_loss(y, weight) + model.blocks[0].mlp.routing.mi_loss()
        loss.backward()
        found.append({"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert vit.blocks[0].mlp.fused and not twin.blocks[0].mlp.fused
    assert_close(*found)
