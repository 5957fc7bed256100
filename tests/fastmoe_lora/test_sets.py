"""What a user of PEFT expects: scale, dropout, sets of adapters, modules saved whole, merging, groups, mistakes."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastmoe_lora import (
    LoRALinear,
    LoRAMoE,
    adapt,
    adapters_off,
    files,
    load_adapters,
    merge,
    parameter_groups,
    print_trainable_parameters,
    remove,
    routing_of,
    save_adapters,
    use_adapters,
)
from kernels import UserError

WIDTH = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(x + self.mlp(x))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.norm((self.blocks(x) + self.cls_token).mean(1)))


LORA = {"config": None, "lora_rank": 2, "lora_where": "*.proj"}
EXPERTS = {"config": "4/2/1/2"}
EITHER = pytest.mark.parametrize("options", [LORA, EXPERTS, LORA | EXPERTS], ids=["LoRA", "experts", "both"])


def make():
    torch.manual_seed(0)
    return Classifier().eval()


def spread(model, seed=5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "routers" in name:
                parameter.normal_()
    return model


@pytest.fixture
def x():
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1))


class TestScaleAndDropout:
    @EITHER
    def test_alpha_scales_by_alpha_over_r(self, options, x):
        model, plain = make(), make()
        adapt(model, **options, alpha=6)
        adapt(plain, **options)
        spread(plain)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            ours.data.copy_(theirs)
        assert not torch.allclose(model(x), plain(x))
        with torch.no_grad():  # every rank is 2
            for name, parameter in plain.named_parameters():
                if name.endswith("lora_B"):
                    parameter.mul_(3)
        torch.testing.assert_close(model(x), plain(x))
        model(x).square().mean().backward()
        plain(x).square().mean().backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if ours.requires_grad:
                scale = 3 if name.endswith("lora_B") else 1
                torch.testing.assert_close(ours.grad, scale * theirs.grad, rtol=1e-4, atol=1e-6)

    @EITHER
    def test_dropout_acts_on_the_adapters_in_training_alone(self, options, x):
        model, plain = make(), make()
        adapt(model, **options, dropout=0.5)
        adapt(plain, **options)
        spread(plain)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            ours.data.copy_(theirs)
        assert torch.equal(model(x), plain(x))
        model.train()
        assert not torch.equal(model(x), model(x))
        with adapters_off(model):
            assert torch.equal(model(x), make()(x))

    def test_dropout_of_lora_is_that_of_its_input(self, x):
        model = make()
        adapt(model, **LORA, dropout=0.5)
        layer = spread(model).train().blocks[0].proj
        torch.manual_seed(3)
        y = layer(x)
        torch.manual_seed(3)
        added = F.dropout(x, 0.5) @ layer.lora_A.T @ layer.lora_B.T
        torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias) + added)

    @pytest.mark.parametrize(
        "wrong",
        [{"alpha": float("nan")}, {"alpha": "8"}, {"dropout": 1.0}, {"dropout": -0.1}, {"dropout": None}],
        ids=str,
    )
    def test_values_that_are_no_such_numbers_are_refused(self, wrong):
        model = make()
        with pytest.raises(UserError, match=rf"{next(iter(wrong))}="):
            adapt(model, **LORA, **wrong)
        assert all(p.requires_grad for p in model.parameters())


class TestSets:
    def two(self):
        """Experts by default, and other adapters on other layers too."""
        model = make()
        adapt(model, **EXPERTS)
        adapt(model, "4/1/0/2", 2, name="two", alpha=4)
        adapt(model, **LORA, name="lora")
        return spread(model)

    def test_each_is_as_if_alone(self, x):
        model = self.two()
        for name, options in (("", EXPERTS), ("two", {"config": "4/1/0/2", "tasks": 2, "alpha": 4}), ("lora", LORA)):
            alone = make()
            routing = adapt(alone, **options)
            suffix = f"_{name}" if name else ""
            given = dict(model.named_parameters())
            with torch.no_grad():
                for each, parameter in alone.named_parameters():
                    if parameter.requires_grad:
                        parameter.copy_(given[each + suffix])
            with (
                use_adapters(model, name),
                routing_of(model, name).batch([1] * (routing.tasks - 1) + [4 - routing.tasks]),
            ):
                y = model(x)
            with routing.batch([1] * (routing.tasks - 1) + [4 - routing.tasks]):
                assert torch.equal(y, alone(x))

    def test_of_those_not_used_no_parameter_has_a_gradient(self, x):
        model = self.two()
        with use_adapters(model, "lora"):
            model(x).square().mean().backward()
        assert {n for n, p in model.named_parameters() if p.grad is not None} == {
            f"blocks.{block}.proj.lora_{ab}_lora" for block in (0, 1) for ab in "AB"
        }

    def test_off_is_the_frozen_model_and_nests(self, x):
        model, right = self.two(), make()(x)
        default = model(x)
        with adapters_off(model):
            assert torch.equal(model(x), right)
            with use_adapters(model, ""):
                assert torch.equal(model(x), default)
            assert torch.equal(model(x), right)
        assert torch.equal(model(x), default)

    def test_files_hold_one_set_each(self, x, tmp_path):
        model = self.two()
        twin = make()
        for name in ("lora", ""):
            save_adapters(model, tmp_path / "a.safetensors", name=name)
            load_adapters(twin, tmp_path / "a.safetensors", name=name)
            with use_adapters(model, name), use_adapters(twin, name):
                assert torch.equal(model(x), twin(x))

    def test_a_file_that_does_not_fit_takes_no_other_set_with_it(self, x, tmp_path):
        model, other = self.two(), make()
        other.blocks[0].proj = nn.Linear(WIDTH, WIDTH + 1)
        adapt(other, **LORA)
        save_adapters(other, tmp_path / "a.safetensors")
        right = model(x)
        with pytest.raises(UserError, match="does not fit the model: blocks.0.proj.lora_B"):
            load_adapters(model, tmp_path / "a.safetensors", name="more")
        assert torch.equal(model(x), right) and not any("more" in name for name in model.state_dict())

    def test_remove_removes_all(self, x):
        model = self.two()
        remove(model)
        assert torch.equal(model(x), make()(x))
        assert model.state_dict().keys() == make().state_dict().keys()

    def test_mistakes(self):
        model = self.two()
        with pytest.raises(UserError, match="has no adapters 'three', but '', 'lora', 'two'"):
            use_adapters(model, "three")
        with pytest.raises(UserError, match="has adapters 'two' already"):
            adapt(model, **EXPERTS, name="two")
        with pytest.raises(UserError, match="is adapted already"):
            adapt(model, **EXPERTS)
        with pytest.raises(UserError, match="name='1.x'"):
            adapt(model, **EXPERTS, name="1.x")
        with pytest.raises(UserError, match="blocks.0.proj would have both experts and plain LoRA"):
            adapt(model, "4/2/1/2", where="*.proj", name="three")
        with pytest.raises(UserError, match="blocks.0.proj would have both experts and plain LoRA"):
            adapt(make(), "4/2/1/2", where="*.proj", lora_rank=2, lora_where="*.proj")


class TestModulesToSave:
    SAVED = ["head", "norm"]

    def trained(self, x):
        model = make()
        adapt(model, **EXPERTS, modules_to_save=self.SAVED)
        spread(model).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
        return model.eval()

    def test_are_trained_with_their_statistics_and_in_the_file(self, x, tmp_path):
        model, plain = self.trained(x), make()
        assert not torch.equal(model.head.weight, plain.head.weight)
        assert model.norm.num_batches_tracked == 2
        save_adapters(model, tmp_path / "a.safetensors")
        twin = make()
        load_adapters(twin, tmp_path / "a.safetensors")
        assert torch.equal(twin(x), model(x))
        trained = {name for name, p in twin.named_parameters() if p.requires_grad}
        assert {"head.weight", "head.bias", "norm.weight", "norm.bias"} <= trained
        twin.train()(x)
        assert twin.norm.num_batches_tracked == 3

    def test_are_loaded_into_an_adapted_model(self, x, tmp_path):
        model, twin = self.trained(x), make()
        routing = adapt(twin, **EXPERTS, modules_to_save=self.SAVED)
        save_adapters(model, tmp_path / "a.safetensors")
        assert load_adapters(twin, tmp_path / "a.safetensors") is routing
        assert torch.equal(twin(x), model(x))

    def test_with_tensors_that_are_no_numbers_are_refused(self, x, tmp_path):
        model = self.trained(x)
        model.norm.running_var[0] = float("nan")
        save_adapters(model, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match="holds norm.running_var .* no finite numbers"):
            load_adapters(make(), tmp_path / "a.safetensors")

    def test_that_share_a_tensor_are_saved(self, x, tmp_path):
        model = make()
        model.twin_head = nn.Linear(WIDTH, 3)
        model.twin_head.weight = model.head.weight
        adapt(model, **EXPERTS, modules_to_save=["head", "twin_head"])
        before = model.head.weight.detach().clone()
        save_adapters(model, tmp_path / "a.safetensors")
        with torch.no_grad():
            model.head.weight.zero_()
        load_adapters(model, tmp_path / "a.safetensors")
        assert torch.equal(model.head.weight, before) and model.twin_head.weight is model.head.weight

    def test_of_a_second_set_are_refused(self, x):
        model = make()
        adapt(model, **EXPERTS, modules_to_save="head")
        with pytest.raises(UserError, match="modules have one value for all sets"):
            adapt(model, **LORA, name="two", modules_to_save="norm")
        assert not model.norm.weight.requires_grad

    @pytest.mark.parametrize("saved", ["blocks.1", "blocks.1.proj"])
    def test_with_adapters_inside_are_refused(self, saved):
        with pytest.raises(UserError, match=rf"blocks.1.proj would be adapted and {saved} be trained as a whole"):
            adapt(make(), **LORA, modules_to_save=saved)


class TestMerge:
    def test_of_plain_lora_is_the_same_function_without_adapters(self, x):
        model = make()
        adapt(model, **LORA, alpha=4)
        right = spread(model)(x)
        merge(model)
        torch.testing.assert_close(model(x), right, rtol=1e-4, atol=1e-5)
        assert model.state_dict().keys() == make().state_dict().keys()
        assert not any(isinstance(module, (LoRALinear, LoRAMoE)) for module in model.modules())

    def test_of_the_set_that_is_used(self, x):
        model = make()
        for name in ("", "two"):
            adapt(model, **LORA, name=name)
        spread(model)
        with use_adapters(model, "two"):
            right = model(x)
            merge(model)
        torch.testing.assert_close(model(x), right, rtol=1e-4, atol=1e-5)

    def test_of_experts_says_why_not_and_changes_nothing(self, x):
        model = make()
        adapt(model, **(LORA | EXPERTS))
        right = spread(model)(x)
        with pytest.raises(UserError, match="its gates depend on the token: ship the model with save_adapters"):
            merge(model)
        assert torch.equal(model(x), right)


def test_parameter_groups_decay_matrices_alone(x):
    model = make()
    adapt(model, **EXPERTS, freeze=False)
    decayed, others = ({id(p) for p in group["params"]} for group in parameter_groups(model, 0.1))
    named = dict(model.named_parameters())
    assert {name for name in named if id(named[name]) in others} == {
        name for name, p in named.items() if p.ndim < 2
    } | {"cls_token"}
    assert decayed | others == {id(p) for p in named.values()} and not decayed & others


def test_trainable_parameters_are_counted_in_one_line(capsys):
    model = make()
    adapt(model, **LORA)
    print_trainable_parameters(model)
    trained, total = 2 * 2 * (WIDTH + WIDTH), sum(p.numel() for p in model.parameters())
    assert (
        capsys.readouterr().out == f"trainable: {trained:,} of {total:,} parameters ({100 * trained / total:.2f} %)\n"
    )


class TestNamesOfWrappers:
    WRAPPERS = {
        "torch.compile": torch.compile,
        "DDP": lambda model: nn.ModuleDict({"module": model}),
        "both": lambda model: nn.ModuleDict({"module": torch.compile(model)}),
        "other": lambda model: nn.ModuleDict({"module": nn.ModuleDict({"module": model})}),
    }

    @EITHER
    @pytest.mark.parametrize("wrapper", WRAPPERS)
    def test_do_not_count_on_either_side(self, wrapper, options, x, tmp_path):
        wrap, path = self.WRAPPERS[wrapper], tmp_path / "a.safetensors"
        model = make()
        adapt(model, **options, modules_to_save="head")
        save_adapters(wrap(spread(model)), path)
        plain = make()
        load_adapters(plain, path)
        save_adapters(model, path)
        wrapped = make()
        load_adapters(wrap(wrapped), path)
        assert torch.equal(plain(x), model(x)) and torch.equal(wrapped(x), model(x))

    def test_patterns_match_behind_them(self, x):
        model = make()
        adapt(torch.compile(model), "4/2/1/2", where="blocks.?.mlp")
        assert isinstance(model.blocks[0].mlp, LoRAMoE)


MISTAKES = {
    'where=["*.mlp", "*.tpyo"]': {"config": "4/2/1/2", "where": ["*.mlp", "*.tpyo"]},
    "tasks=0": {"config": "4/2/1/2", "tasks": 0},
    "tasks=-1": {"config": "4/2/1/2", "tasks": -1},
    'kernel="Triton"': {"config": "4/2/1/2", "kernel": "Triton"},
    "lora_rank=-1": {"config": None, "lora_rank": -1, "lora_where": "*.proj"},
    "nothing": {"config": None},
    "where=()": {"config": "4/2/1/2", "where": ()},
    "modules_to_save": {"config": "4/2/1/2", "modules_to_save": ["head", "haed"]},
}


@pytest.mark.parametrize("options", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(options):
    model = make()
    with pytest.raises(UserError) as caught:
        adapt(model, **options)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())
    assert [type(module) for module in model.modules()] == [type(module) for module in make().modules()]


class TestHub:
    def test_a_name_is_fetched(self, x, tmp_path, monkeypatch):
        model = make()
        adapt(model, **EXPERTS)
        save_adapters(spread(model), tmp_path / "a.safetensors")
        asked = []
        monkeypatch.setattr(files, "fetch", lambda *name: asked.append(name) or tmp_path / "a.safetensors")
        monkeypatch.chdir(tmp_path)
        twin = make()
        load_adapters(twin, "someone/adapters")
        assert asked == [("someone/adapters", "adapters.safetensors")]
        assert torch.equal(twin(x), model(x))

    def test_a_repository_without_the_file_is_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "fetch", lambda *name: None)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="someone/adapters on the Hugging Face Hub has no adapters.safetensors"):
            load_adapters(make(), "someone/adapters")

    def test_a_path_is_none(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files, "fetch", lambda *name: pytest.fail("asked the Hub"))
        with pytest.raises(UserError, match="cannot read"):
            load_adapters(make(), tmp_path / "no" / "a.safetensors")


def test_a_link_stays_and_its_target_is_written(tmp_path):
    model = make()
    adapt(model, **EXPERTS)
    (tmp_path / "there").mkdir()
    os.symlink("there/a.safetensors", tmp_path / "link.safetensors")
    save_adapters(model, tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["a.safetensors"]
    load_adapters(make(), tmp_path / "link.safetensors")


def test_a_copy_has_its_own_sets(x):
    model = make()
    for name in ("", "two"):
        adapt(model, **EXPERTS, name=name)
    with use_adapters(spread(model), "two"):
        twin = copy.deepcopy(model)
        assert not torch.equal(twin(x), model(x))  # of another model nothing is selected
        with use_adapters(twin, "two"):
            assert torch.equal(twin(x), model(x))
