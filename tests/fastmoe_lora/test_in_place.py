"""An adapted layer stays the object it is: class, names, hooks, copies, files of the whole model, its readers."""

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune as prune
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from fastmoe_lora import LoRALinear, LoRAMoE, adapt, adapters_off, load_adapters, merge, remove, save_adapters
from kernels import UserError

WIDTH = 16


class Mlp(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp, self.proj = nn.LayerNorm(WIDTH), Mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(x + self.mlp(self.norm(x)))


def make():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block())


def adapted(model=None, **options):
    """Experts beside each FFN and plain LoRA beside each proj, as trained."""
    model = model or make()
    adapt(model, "4/2/1/2", lora_rank=2, lora_where="*.proj", **options)
    return spread(model)


def spread(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "routers" in name:
                parameter.normal_()
    return model


def is_adapted(model):
    return any(isinstance(module, (LoRALinear, LoRAMoE)) for module in model.modules())


@pytest.fixture
def x():
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))


class TestIdentity:
    def test_classes_names_and_objects_come_back(self, x):
        model = make()
        right = model(x)
        modules, names = dict(model.named_modules()), list(model.state_dict())
        adapted(model)
        assert all(module is modules[name] for name, module in model.named_modules())
        assert isinstance(model[0].mlp, Mlp) and type(model[0].mlp).__name__ == "LoRAMoEMlp"
        assert isinstance(model[0].proj, nn.Linear) and type(model[0].proj).__name__ == "LoRALinear"
        assert [name for name in model.state_dict() if not re.search("lora_|routers", name)] == names
        assert type(model[0].mlp) is type(model[1].mlp)
        remove(model)
        assert type(model[0].mlp) is Mlp and type(model[0].proj) is nn.Linear
        assert list(model.state_dict()) == names and torch.equal(model(x), right)
        assert vars(model[0].mlp).keys() == vars(Mlp()).keys()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy],
                             ids=["deepcopy", "pickle", "copy"])  # fmt: skip
    def test_copies_compute_the_same_and_can_be_removed(self, copied, x):
        model = adapted()
        y = model(x)
        twin = copied(model)
        assert torch.equal(twin(x), y)
        if copied is not copy.copy:
            remove(twin)
            assert not torch.equal(twin(x), y)
            assert torch.equal(model(x), y)

    def test_of_a_compiled_layer_too(self, x):
        model = adapted()
        model[0].mlp.compile(backend="eager")
        y = model(x)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)

    def test_torch_save_keeps_each_weight_once(self, x, tmp_path):
        model, plain = adapted(), make()
        torch.save(plain, tmp_path / "plain.pt")
        torch.save(model, tmp_path / "model.pt")
        added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
        grown = (tmp_path / "model.pt").stat().st_size - (tmp_path / "plain.pt").stat().st_size
        names = 20 * 1024  # of tensors, classes and zip entries
        assert grown < 4 * added + names
        assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), model(x))

    def test_a_weight_of_the_frozen_model_stands_in_memory_once(self, x):
        model = adapted()
        before = {p.data_ptr() for p in model.parameters()}
        model(x).square().mean().backward()
        tensors = [t for module in model.modules() for t in vars(module).values() if isinstance(t, torch.Tensor)]
        assert tensors == [] and {p.data_ptr() for p in model.parameters()} == before


class TestHooks:
    def test_of_every_part_keep_firing_and_after_remove(self, x):
        model, fired = make(), []
        parts = ["0.mlp", "0.mlp.fc1", "0.mlp.act", "0.mlp.fc2", "0.proj"]
        for name in parts:
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
        adapted(model)
        assert fired == []
        model(x)
        assert sorted(fired) == sorted(parts)
        fired.clear()
        remove(model)
        model(x)
        assert sorted(fired) == sorted(parts)

    @pytest.mark.parametrize("site", ["mlp", "proj"])
    def test_a_forward_on_the_instance_is_refused_and_nothing_changes(self, site, x):
        """As accelerate's hooks put there: it would call the method of the class of before."""
        model = make()
        layer = model[1].get_submodule(site)
        layer.forward = layer.forward
        with pytest.raises(UserError, match=rf"1.{site}.* has a forward of its own on the instance"):
            adapted(model)
        assert not is_adapted(model) and all(p.requires_grad for p in model.parameters())

    def test_a_forward_put_there_later_calls_the_adapter_and_must_go_before_remove(self, x):
        model, fired = adapted(), []
        right = model(x)
        for site in ("mlp", "proj"):
            layer = model[1].get_submodule(site)
            layer.forward = lambda x, forward=layer.forward: fired.append(1) or forward(x)
        assert torch.equal(model(x), right) and len(fired) == 2
        with pytest.raises(UserError, match=r"1.mlp has a forward of its own on the instance"):
            remove(model)
        assert torch.equal(model(x), right)
        del model[1].mlp.forward, model[1].proj.forward
        remove(model)
        assert not is_adapted(model)


class TestOtherClasses:
    def test_parametrize_in_between_makes_remove_refuse(self, x):
        model = adapted()
        parametrizations.weight_norm(model[1].proj)
        right = model(x)
        with pytest.raises(UserError, match="1.proj became a ParametrizedLoRALinear after it was adapted"):
            remove(model)
        assert torch.equal(model(x), right) and isinstance(model[0].mlp, LoRAMoE)
        parametrize.remove_parametrizations(model[1].proj, "weight")
        remove(model)
        assert not is_adapted(model)

    def test_a_parametrized_layer_is_adapted(self, x):
        model = make()
        parametrizations.weight_norm(model[0].proj)
        y = model(x)
        adapt(model, None, lora_rank=2, lora_where="*.proj")
        torch.testing.assert_close(model(x), y)
        with torch.no_grad():
            model[0].proj.parametrizations.weight.original0.mul_(2)
        assert not torch.allclose(model(x), y)
        assert_lora_beside(spread(model)[0].proj, x)
        with pytest.raises(UserError, match="0.proj is a LoRAParametrizedLinear whose weight is no plain parameter"):
            merge(model)

    @pytest.mark.parametrize("where", ["0.proj", "0.mlp", "0.mlp.fc1"])
    def test_a_pruned_layer_stays_pruned(self, where, x):
        model = make()
        pruned = model[0].mlp.fc1 if "mlp" in where else model[0].proj
        prune.l1_unstructured(pruned, "weight", amount=0.5)
        right = model(x)
        adapt(model, "4/2/1/2", where=where)
        assert torch.equal(model(x), right)
        y = spread(model)(x)
        y.square().mean().backward()
        assert bool((pruned.weight == 0).sum() >= pruned.weight.numel() // 2)
        assert pruned.weight_orig.grad is None

    def test_a_pruned_layer_has_plain_lora_and_is_not_merged(self, x):
        model = make()
        prune.l1_unstructured(model[0].proj, "weight", amount=0.5)
        adapt(model, None, lora_rank=2, lora_where="0.proj")
        assert_lora_beside(spread(model)[0].proj, x)
        with pytest.raises(UserError, match="0.proj is a LoRALinear whose weight is no plain parameter"):
            merge(model)

    def test_a_subclass_that_holds_its_weight_otherwise_runs_beside(self, x):
        """As quantised layers do: the weight is a buffer of integers, and forward is the class's."""

        class Int8(nn.Linear):
            def __init__(self, linear):
                super().__init__(linear.in_features, linear.out_features)
                del self.weight, self.bias
                self.scale = float(linear.weight.detach().abs().max() / 127)
                self.register_buffer("weight", (linear.weight.detach() / self.scale).round().to(torch.int8))

            def forward(self, x):
                return x @ (self.weight.to(x.dtype) * self.scale).T

        model = make()
        model[0].proj, model[0].mlp.fc1 = Int8(model[0].proj), Int8(model[0].mlp.fc1)
        right = model(x)
        adapt(model, "4/2/1/2", where=["*.fc1"], lora_rank=2, lora_where="*.proj")
        torch.testing.assert_close(model(x), right, rtol=1e-5, atol=1e-6)
        assert_lora_beside(spread(model)[0].proj, x)
        model(x).square().mean().backward()
        assert all(p.grad.any() for p in model.parameters() if p.requires_grad)

    def test_a_layer_whose_class_reads_dtypes_is_adapted(self, x):
        """As T5 does with wo."""

        class T5FFN(nn.Module):
            def __init__(self):
                super().__init__()
                self.wi, self.wo = nn.Linear(WIDTH, 24, bias=False), nn.Linear(24, WIDTH, bias=False)

            def forward(self, x):
                hidden = F.relu(self.wi(x))
                if isinstance(self.wo.weight, torch.Tensor) and hidden.dtype != self.wo.weight.dtype:
                    hidden = hidden.to(self.wo.weight.dtype)
                return self.wo(hidden)

        model = nn.ModuleDict({"ffn": T5FFN()})
        right = model["ffn"](x)
        adapt(model, None, lora_rank=2, lora_where="ffn.w?")
        torch.testing.assert_close(model["ffn"](x), right)

    def test_a_layer_that_is_read_and_never_called_is_refused(self, x):
        """As timm's EVA, BEiT and Swin V2 do with qkv where they add biases of q and v."""

        class EvaAttention(nn.Module):
            def __init__(self):
                super().__init__()
                self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
                self.q_bias = nn.Parameter(torch.zeros(WIDTH))

            def forward(self, x):
                bias = torch.cat([self.q_bias, torch.zeros(2 * WIDTH)])
                q, k, v = F.linear(input=x, weight=self.qkv.weight, bias=bias).chunk(3, -1)
                return self.proj(F.scaled_dot_product_attention(q, k, v))

        model = nn.Sequential(nn.ModuleDict({"attn": EvaAttention()}))
        message = "matches 0.attn.qkv, a Linear: EvaAttention reads its weight and never calls it"
        with pytest.raises(UserError, match=message):
            adapt(model, None, lora_rank=2)
        adapt(model, None, lora_rank=2, lora_where="*.proj")

    def test_pytorch_s_attention_reads_its_output_projection(self):
        model = nn.TransformerEncoderLayer(WIDTH, 2, 24)
        with pytest.raises(UserError, match="self_attn.out_proj, a NonDyn.*: MultiheadAttention reads its weight"):
            adapt(nn.ModuleList([model]), None, lora_rank=2)


def assert_lora_beside(layer, x):
    with adapters_off(layer):
        base = layer(x)
    assert layer.lora_B.any()
    torch.testing.assert_close(layer(x), base + x @ layer.lora_A.T @ layer.lora_B.T, rtol=1e-5, atol=1e-5)


class TestFastPathsOfTransformerEncoder:
    def layer(self):
        torch.manual_seed(0)
        return nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)

    def test_layers_give_the_same_in_training_and_evaluation(self, x):
        model = nn.ModuleDict({"layer": self.layer()})
        adapt(model, None, lora_rank=2, lora_where="layer.linear1")
        right = spread(model)["layer"](x)
        with torch.no_grad(), adapters_off(model):
            assert not torch.allclose(model["layer"](x), right, atol=0.01)
        with torch.no_grad():
            torch.testing.assert_close(model.eval()["layer"](x), right, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("norm", [True, False])
    def test_encoders_give_the_same_under_a_mask(self, norm, x):
        model = nn.TransformerEncoder(self.layer(), 2, nn.LayerNorm(WIDTH) if norm else None)
        adapt(model, None, lora_rank=2, lora_where="*.linear?")
        mask = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
        right = spread(model)(x, src_key_padding_mask=mask)[~mask]
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(x, src_key_padding_mask=mask)[~mask], right, rtol=1e-5, atol=1e-5)

    def test_come_back(self):
        model = nn.TransformerEncoder(self.layer(), 2)
        fast = model.use_nested_tensor, model.layers[0].activation_relu_or_gelu
        adapt(model, None, lora_rank=2, lora_where="*.linear?")
        remove(model)
        assert (model.use_nested_tensor, model.layers[0].activation_relu_or_gelu) == fast == (True, 1)


class TestBatchNorms:
    def backbone(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))

    @pytest.mark.parametrize("training", [True, False])
    def test_of_a_frozen_model_do_not_count_and_remove_restores_bits(self, training):
        x = torch.randn(32, 8)
        model = self.backbone().train(training)
        state, before = copy.deepcopy(model.state_dict()), self.backbone().eval()(x)
        adapt(model, "4/2/1/2", where="0")
        model.train()
        assert torch.equal(model(x), before)
        for _ in range(3):
            model(3 + torch.randn(32, 8))
        twin = copy.deepcopy(model).train()
        twin(3 + torch.randn(32, 8))
        for each in (model, twin):
            assert torch.equal(each(x), before)
            remove(each)
            assert all(torch.equal(each.state_dict()[name], state[name]) for name in state)
            assert each[1].training == each.training and type(each[1]) is nn.BatchNorm1d

    def test_of_a_trained_model_count(self):
        model = self.backbone()
        adapt(model, "4/2/1/2", where="0", freeze=False)
        model(3 + torch.randn(32, 8))
        assert model[1].num_batches_tracked == 1


def test_an_adapter_is_made_in_fp32_whatever_the_session_s_type():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = make()
        adapted(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("all_inside", [True, False])
def test_inference_mode_adapts_and_evaluates(all_inside, x):
    model = None if all_inside else make()
    with torch.inference_mode():
        model = adapted(model or make())
        y = model(x)
    assert y.isfinite().all()
    if not all_inside:
        model(x).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class TestFullyShard:
    @pytest.fixture
    def group(self):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()

    def test_trains_an_adapted_model(self, group, x, tmp_path):
        model, plain = adapted(), adapted()
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for block in model:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for each in (model, plain):
            torch.manual_seed(7)
            spread(each)
        torch.testing.assert_close(model(x), plain(x))
        optimizers = [
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], 0.1) for each in (model, plain)
        ]
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            each(x).square().mean().backward()
            optimizer.step()
        torch.testing.assert_close(model(x), plain(x))
        save_adapters(model, tmp_path / "sharded.safetensors")
        with pytest.raises(UserError, match="cannot be loaded into a model after fully_shard"):
            load_adapters(model, tmp_path / "sharded.safetensors")
        twin = make()
        load_adapters(twin, tmp_path / "sharded.safetensors")
        assert torch.equal(twin(x), plain(x))

    def test_of_the_adapted_layer_itself_makes_remove_refuse(self, group):
        model = adapted()
        fully_shard(model[0].mlp, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match="0.mlp became a FSDPLoRAMoEMlp after it was adapted"):
            remove(model)
        assert isinstance(model[0].proj, LoRALinear)
