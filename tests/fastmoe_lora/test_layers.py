"""LoRALinear, LoRAMoE and adapt() on a small ViT with timm's names."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastmoe_lora import (
    LoRALinear,
    LoRAMoE,
    MoEConfig,
    Routing,
    RoutingStatistics,
    adapt,
    adapters_off,
    mutual_information_loss,
    routing_of,
)
from kernels import GATINGS, TaskSegments, UserError, lora_moe
from kernels.lora_linear import lora_linear

WIDTH, BLOCKS, TOKENS = 8, 2, 5
IMAGES = [2, 1, 1]  # (image, task) pairs of each task: four, task-major
CONFIGS = {
    "ase": MoEConfig(6, 2, 1, 2, "ase"),
    "naive-shared": MoEConfig(6, 2, 1, 2, "naive-shared"),
    "topk": MoEConfig(6, 2, 0, 2, "topk"),
    "topk-renorm": MoEConfig(6, 2, 0, 2, "topk-renorm"),
}
SITES = {"ffn": "mlp", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}  # within a block
LORA_TARGETS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
EVERY_SITE = pytest.mark.parametrize("site", SITES)
EVERY_GATING = pytest.mark.parametrize("gating", GATINGS)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), Mlp()

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Of a ViT only what adapting needs: its blocks, here on tokens (pairs, L, d)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[Block() for _ in range(BLOCKS)])

    def forward(self, x):
        return self.blocks(x)


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run():
    torch.manual_seed(0)


@pytest.fixture
def vit():
    return ViT()


@pytest.fixture
def x():
    return torch.randn(sum(IMAGES), TOKENS, WIDTH)


def spread(module):
    """Give the adapters the values of a trained model: B nonzero, routers that tell experts apart."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("lora_B", "routers")):
                parameter.normal_()
    return module


def adapted(vit, gating="ase", site="ffn"):
    return adapt(vit, CONFIGS[gating], len(IMAGES), f"*.{SITES[site]}", lora_rank=4)


def run(model, x, images=IMAGES, routing=None):
    """One pass in a batch of its own."""
    with (routing or routing_of(model)).batch(images):
        return model(x)


def with_lora(linear, rank, freeze=False):
    """``linear`` with plain LoRA beside it, which is trained with it unless it is to be frozen."""
    adapt(nn.Sequential(linear), None, lora_rank=rank, lora_where="0", freeze=freeze)
    return linear


def with_experts(base, gating="ase", tasks=len(IMAGES)):
    adapt(nn.Sequential(base), CONFIGS[gating], tasks, "0", freeze=False)
    return base


def values(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def gates_of(monkeypatch):
    """What routings are told: (gates, mean probabilities) of each pass."""
    seen, record = [], Routing.record

    def kept(self, batch, layer, mean_probs, gates, segments):
        seen.append((gates, mean_probs))
        record(self, batch, layer, mean_probs, gates, segments)

    monkeypatch.setattr(Routing, "record", kept)
    return seen


class TestLoRALinear:
    @pytest.mark.parametrize("bias", [True, False])
    def test_is_w_x_plus_b_plus_b_a_x(self, bias):
        linear = nn.Linear(7, 5, bias).double()
        layer = spread(with_lora(linear, 3).double())
        x = torch.randn(4, 6, 7, dtype=torch.float64)
        weight = linear.weight + layer.lora_B @ layer.lora_A
        expected = torch.einsum("...i,oi->...o", x, weight) + (linear.bias if bias else 0)
        # Sums of 7 products in another order.
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-14)

    def test_starts_as_the_frozen_layer(self):
        linear, x = nn.Linear(7, 5), torch.randn(4, 7)
        before = linear(x)
        layer = with_lora(linear, 3)
        assert torch.equal(layer(x), before)
        assert layer.lora_B.eq(0).all()
        assert layer.lora_A.ne(0).any()

    @pytest.mark.parametrize("bias", [True, False])
    def test_keeps_the_very_parameters_and_their_names(self, bias):
        linear = nn.Linear(7, 5, bias)
        parameters = dict(linear.named_parameters())
        layer = with_lora(linear, 3)
        assert layer is linear and isinstance(layer, LoRALinear)
        kept = dict(layer.named_parameters())
        added = {name: tuple(kept.pop(name).shape) for name in ("lora_A", "lora_B")}
        assert added == {"lora_A": (3, 7), "lora_B": (5, 3)}
        assert list(kept) == list(parameters)
        assert all(kept[name] is parameter for name, parameter in parameters.items())

    def test_loads_the_state_of_the_layer_it_replaces(self):
        linear, x = nn.Linear(7, 5), torch.randn(4, 7)
        layer = with_lora(nn.Linear(7, 5), 3)
        missing, unexpected = layer.load_state_dict(linear.state_dict(), strict=False)
        assert (missing, unexpected) == (["lora_A", "lora_B"], [])
        assert torch.equal(layer(x), linear(x))


class TestLoRALinearOverFrozenWeights:
    """LoRA as further columns of the frozen product: the same function without a pass to add it."""

    @pytest.mark.parametrize("rank", [1, 3, 8])
    @pytest.mark.parametrize("bias", [True, False])
    def test_outputs_and_gradients_are_those_of_two_products(self, bias, rank):
        trained = spread(with_lora(nn.Linear(7, 5, bias), rank).double())
        frozen = copy.deepcopy(trained)
        frozen.weight.requires_grad_(False)
        if bias:
            frozen.bias.requires_grad_(False)
        x, dy = torch.randn(4, 6, 7, dtype=torch.float64), torch.randn(4, 6, 5, dtype=torch.float64)
        results = []
        for layer in (trained, frozen):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            results.append((y, *torch.autograd.grad(y, [leaf, layer.lora_A, layer.lora_B], dy)))
        for ours, right in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize(
        ("width", "passes"), [(11, ["aten.addmm.default"]), (7, ["aten.addmm.default", "aten.addmm_.default"])]
    )
    def test_a_pass_over_the_output_is_added_only_where_it_costs_less_than_a_copy_of_x(self, width, passes):
        layer = with_lora(nn.Linear(7, width), 3, freeze=True)
        x = torch.randn(20, 7)
        written, copied = [], []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                result = func(*args, **(kwargs or {}))
                if isinstance(result, torch.Tensor) and result.shape == (20, width) and not func.is_view:
                    written.append(str(func))
                if func is torch.ops.aten.copy_.default:
                    copied.append(tuple(result.shape))
                return result

        with Watch():
            lora_linear(x, (layer.weight, layer.bias), (layer.lora_A, layer.lora_B))
        assert written == passes
        assert copied == ([(20, 7)] if width > 7 else [])

    @pytest.mark.parametrize("width", [11, 7])
    def test_a_gradient_that_nobody_needs_is_not_computed(self, width):
        """With x frozen, as in a first block, the backward pass has the products of rank r alone."""
        layer, x = spread(with_lora(nn.Linear(7, width), 3, freeze=True)), torch.randn(20, 7)
        costs = []
        for needed in (False, True):
            y = layer(x.clone().requires_grad_(needed))
            with FlopCounterMode(display=False) as counter:
                y.sum().backward()
            costs.append(counter.get_total_flops())
        ranks = 2 * 20 * 3 * (7 + 2 * width)  # dH, dA and dB
        assert costs[0] == ranks
        assert costs[1] >= ranks + 2 * 20 * 7 * width

    def test_autocast_computes_in_its_type(self):
        layer = spread(with_lora(nn.Linear(16, 8), 4, freeze=True))
        x = torch.randn(5, 16)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32
        exact = x @ (layer.weight + layer.lora_B @ layer.lora_A).T + layer.bias
        assert (y - exact).norm() / exact.norm() < 2**-7  # a few roundings to 8 bits


class TestLoRAMoE:
    @EVERY_GATING
    def test_starts_equal_to_its_base(self, gating, x):
        base = Mlp()
        before = base(x)
        assert torch.equal(run(with_experts(base, gating), x), before)

    @EVERY_GATING
    def test_is_the_operation_on_the_tokens_in_task_major_order(self, gating, x):
        layer = spread(with_experts(Mlp(), gating))
        tokens = torch.cat(list(x))
        with adapters_off(layer):
            base = layer(tokens)
        segments = TaskSegments.of(tuple(n * TOKENS for n in IMAGES), x.device)
        lora = layer.lora_A, layer.lora_B
        expected = lora_moe(tokens, base, lora, layer.routers, segments, CONFIGS[gating].gating)[0]
        torch.testing.assert_close(run(layer, x), expected.view(len(x), TOKENS, WIDTH))

    def test_passes_the_gradient_of_its_base_on(self, x):
        base = Mlp()
        x.requires_grad_()
        (through_base,) = torch.autograd.grad(base(x).square().sum(), x)
        (through_layer,) = torch.autograd.grad(run(with_experts(base), x).square().sum(), x)
        torch.testing.assert_close(through_layer, through_base)

    def test_reads_each_image_with_the_router_of_its_task_only(self, x):
        layer = spread(with_experts(Mlp()))
        before = run(layer, x)
        with torch.no_grad():
            layer.routers[1].neg_()
        changed = (run(layer, x) != before).flatten(1).any(1)
        assert changed.tolist() == [False, False, True, False]

    @pytest.mark.parametrize(("gating", "columns"), [("ase", 6), ("naive-shared", 5), ("topk", 6), ("topk-renorm", 6)])
    def test_has_a_router_column_for_every_gate_that_is_computed(self, gating, columns):
        assert with_experts(Mlp(), gating, tasks=4).routers.shape == (4, columns, WIDTH)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @EVERY_GATING
    def test_keeps_fp32_logits_under_autocast(self, gating, dtype, x, monkeypatch):
        layer = spread(with_experts(Mlp(), gating))
        seen = gates_of(monkeypatch)
        with torch.no_grad():
            layer.routers.mul_(0.3)  # logits of order 1
        with torch.autocast("cpu", dtype):
            y = run(layer, x)
        assert y.dtype == dtype
        # The same numbers, x as autocast rounds it, in fp64. fp32 logits near 1 are off by 1e-7, half ones by 1e-3.
        run(layer.double(), x.to(dtype).double())
        for half, exact in zip(*seen, strict=True):
            assert half.dtype == torch.float32
            torch.testing.assert_close(half.double(), exact, rtol=0, atol=1e-6)

    def test_gives_fp32_gradients_under_autocast(self, vit, x):
        routing = adapted(vit)
        spread(vit)
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(vit, x).float().square().mean() + 0.005 * routing.mi_loss()
        loss.backward()
        grads = [p.grad for p in vit.parameters() if p.requires_grad]
        assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)

    def test_shows_its_configuration(self):
        assert "6/2/1/2, gating=ase, tasks=3" in repr(with_experts(Mlp()))
        linear = with_experts(nn.Linear(WIDTH, WIDTH))
        assert re.match(rf"LoRAMoELinear\(in_features={WIDTH}, .* experts=6/2/1/2, gating=ase", repr(linear))


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 7), (2, 3, 4, 7)], ids=str)
@pytest.mark.parametrize("freeze", [True, False])
def test_inputs_of_any_shape_are_served_as_before(freeze, shape):
    x, linear, base = torch.randn(shape), nn.Linear(7, 5), nn.Linear(7, 5)
    expected = linear(x), base(x)
    adapt(nn.Sequential(base), CONFIGS["ase"], where="0", freeze=freeze)
    found = with_lora(linear, 3, freeze)(x), base(x)
    for y, right in zip(found, expected, strict=True):
        assert y.shape == right.shape
        torch.testing.assert_close(y, right)


class TestExperts:
    @EVERY_GATING
    @EVERY_SITE
    def test_starts_as_the_vit(self, site, gating, vit, x):
        before = vit(x)
        adapt(vit, CONFIGS[gating], len(IMAGES), f"*.{SITES[site]}")
        after = run(vit, x)
        assert after.shape == (sum(IMAGES), TOKENS, WIDTH)
        assert torch.equal(after, before)

    @pytest.mark.parametrize(
        ("site", "d_in", "d_out"), [("ffn", WIDTH, WIDTH), ("fc1", WIDTH, 4 * WIDTH), ("fc2", 4 * WIDTH, WIDTH)]
    )
    def test_puts_the_experts_at_the_site_of_every_block(self, site, d_in, d_out, vit):
        bases = [block.get_submodule(SITES[site]) for block in vit.blocks]
        kinds = [type(base) for base in bases]
        routing = adapt(vit, CONFIGS["ase"], 3, f"*.{SITES[site]}")
        layers = [block.get_submodule(SITES[site]) for block in vit.blocks]
        assert routing.layers == layers
        assert [layer.adapters.sets[""].layer for layer in layers] == [0, 1]
        for layer, base, kind in zip(layers, bases, kinds, strict=True):
            assert layer is base
            assert isinstance(layer, LoRAMoE) and isinstance(layer, kind)
            assert layer.adapters.sets[""].routing is routing
            shapes = [tuple(p.shape) for p in (layer.lora_A, layer.lora_B, layer.routers)]
            assert shapes == [(12, d_in), (d_out, 12), (3, 6, d_in)]

    @EVERY_SITE
    def test_nonzero_experts_change_every_image(self, site, vit, x):
        before = vit(x)
        adapt(vit, CONFIGS["ase"], len(IMAGES), f"*.{SITES[site]}")
        after = run(spread(vit), x)
        assert (after != before).any(-1).all()

    def test_a_pattern_without_a_match_names_the_closest_modules(self, vit):
        message = r"where='\*.mpl' matches no module; the closest names are blocks.\*.mlp, blocks"
        with pytest.raises(UserError, match=message):
            adapt(vit, CONFIGS["ase"], 3, "*.mpl")

    def test_without_a_batch_says_so(self, vit, x):
        adapt(vit, CONFIGS["ase"], 3)
        with pytest.raises(UserError, match=r"a pass of 3 tasks outside `with routing.batch"):
            vit(x)


class TestPlainLoRA:
    @pytest.mark.parametrize("targets", [("qkv", "proj"), ("fc1",), tuple(LORA_TARGETS)], ids=str)
    def test_adapts_the_named_layers_and_no_other(self, targets, vit, x):
        before = vit(x)
        adapt(vit, None, lora_rank=3, lora_where=[f"*.{LORA_TARGETS[target]}" for target in targets])
        for block in vit.blocks:
            for target, path in LORA_TARGETS.items():
                assert isinstance(block.get_submodule(path), LoRALinear) == (target in targets)
        assert torch.equal(vit(x), before)

    def test_a_target_that_is_no_linear_layer_is_named(self, vit):
        with pytest.raises(UserError, match="matches blocks.0.mlp, a Mlp: LoRA needs nn.Linear"):
            adapt(vit, None, lora_rank=4, lora_where="*.mlp")


class TestAdapt:
    @EVERY_SITE
    def test_leaves_only_the_adapters_trainable(self, site, vit):
        adapted(vit, site=site)
        adapters = {
            f"blocks.{block}.{name}"
            for block in range(BLOCKS)
            for name in [f"attn.{target}.{ab}" for target in ("qkv", "proj") for ab in ("lora_A", "lora_B")]
            + [f"{SITES[site]}.{name}" for name in ("lora_A", "lora_B", "routers")]
        }
        assert {name for name, p in vit.named_parameters() if p.requires_grad} == adapters

    @pytest.mark.parametrize(("rank", "adapted_layers"), [(0, 0), (4, 2 * BLOCKS)])
    def test_lora_of_rank_zero_is_no_lora(self, rank, adapted_layers, vit):
        adapt(vit, CONFIGS["ase"], 3, lora_rank=rank)
        layers = [module for module in vit.modules() if isinstance(module, LoRALinear)]
        assert len(layers) == adapted_layers
        assert all(layer.lora_A.shape[0] == rank for layer in layers)

    @EVERY_GATING
    @EVERY_SITE
    def test_every_adapter_and_nothing_else_gets_a_gradient(self, site, gating, vit, x):
        routing = adapted(vit, gating, site)
        spread(vit)
        (run(vit, x).square().mean() + 0.005 * routing.mi_loss()).backward()
        for name, parameter in vit.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
            if name.endswith("routers"):
                assert parameter.grad.flatten(1).any(1).all(), f"{name}: some task's router has no gradient"
            elif parameter.requires_grad:
                assert parameter.grad.any(), name

    def test_the_first_step_reaches_b_and_nothing_behind_it(self, vit, x):
        adapted(vit)
        run(vit, x).square().mean().backward()
        reached = {name for name, p in vit.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {name for name, _ in vit.named_parameters() if name.endswith("lora_B")}

    @EVERY_SITE
    def test_training_leaves_the_base_untouched(self, site, x):
        vit = ViT()
        plain, before = copy.deepcopy(vit), values(vit)
        routing = adapted(vit, site=site)
        start = values(vit)
        optimizer = torch.optim.SGD([p for p in vit.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (run(vit, x).square().mean() + 0.005 * routing.mi_loss()).backward()
            optimizer.step()
        after = values(vit)
        adapters = {name for name, p in vit.named_parameters() if p.requires_grad}
        frozen = {name: value for name, value in after.items() if name not in adapters}
        assert frozen.keys() == before.keys()
        assert all(torch.equal(frozen[name], before[name]) for name in before)
        assert not any(torch.equal(after[name], start[name]) for name in adapters)
        assert not torch.equal(run(vit, x), plain(x))

    @EVERY_GATING
    @EVERY_SITE
    def test_a_state_dict_carries_the_whole_model(self, site, gating, vit, x):
        adapted(vit, gating, site)
        spread(vit)
        other = ViT()
        adapted(other, gating, site)
        other.load_state_dict(vit.state_dict())
        assert torch.equal(run(other, x), run(vit, x))

    def test_a_copy_made_after_a_forward_pass_works_and_is_independent(self, vit, x):
        routing = adapted(vit)
        with routing.batch(IMAGES) as batch:
            y = spread(vit)(x)
            twin = copy.deepcopy(vit)  # also of a routing whose batch is open
        batch.mi_loss().backward()
        (its_routing,) = {block.mlp.adapters.sets[""].routing for block in twin.blocks}
        assert its_routing is routing_of(twin) and its_routing is not routing
        assert its_routing.layers == [block.mlp for block in twin.blocks]
        assert torch.equal(run(twin, x), y)
        run(twin, x, [0, 0, 4])
        assert torch.equal(run(vit, x), y)

    def test_statistics_cover_every_layer_and_task(self, vit, x):
        routing = adapted(vit)
        routing.statistics = RoutingStatistics()
        for images in ([2, 1, 1], [1, 3, 0]):
            run(vit, x, images)
        mass, frequency = routing.statistics.compute()
        # ASE: two sparse experts and the shared one are active and their gates sum to 1 (to fp32).
        assert mass.shape == frequency.shape == (BLOCKS, len(IMAGES), 6)
        ones = torch.ones(BLOCKS, len(IMAGES), dtype=torch.float64)
        torch.testing.assert_close(mass.sum(-1), ones, rtol=0, atol=1e-6)
        torch.testing.assert_close(frequency.sum(-1), 3 * ones, rtol=0, atol=1e-12)

    def test_the_loss_of_a_pass_is_that_of_its_mean_probabilities(self, vit, x, monkeypatch):
        routing = adapted(vit)
        seen = gates_of(monkeypatch)
        run(spread(vit), x)
        expected = sum(mutual_information_loss(mean_probs) for _, mean_probs in seen)
        torch.testing.assert_close(routing.mi_loss(), expected)
