"""save_adapters and load_adapters: what was added, in a file of its own."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastmoe_lora import (
    LoRALinear,
    LoRAMoE,
    MoEConfig,
    adapt,
    adapters_off,
    load_adapters,
    remove,
    routing_of,
    save_adapters,
)
from kernels import UserError
from model.vit import ViT, ViTConfig

IMAGES = [2, 1]
CONFIG = ViTConfig(width=16, depth=2, heads=2, patch=8)
# Experts beside FFNs, beside linear layers, with plain LoRA elsewhere and inside them, and plain LoRA alone.
RECIPES = {
    "ffn": ("6/2/1/2", {}),
    "topk": (MoEConfig(6, 2, 0, 2, "topk-renorm"), {}),
    "fc2": ("6/2/1/2", {"where": "*.fc2"}),
    "lora": ("6/2/1/2", {"lora_rank": 3}),
    "lora inside": ("6/2/1/2", {"lora_rank": 3, "lora_where": ["*.fc1", "*.qkv"]}),
    "lora alone": (None, {"lora_rank": 3}),
}


def plain(config=CONFIG):
    torch.manual_seed(0)
    return ViT(config, 16)


@pytest.fixture
def images():
    return torch.rand(sum(IMAGES), 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def file(tmp_path):
    """Adapters of 6/2/1/2 around the FFNs, with plain LoRA of rank 3."""
    model = plain()
    adapt(model, "6/2/1/2", 2, lora_rank=3)
    save_adapters(model, tmp_path / "adapters.safetensors")
    return tmp_path / "adapters.safetensors"


def results(model, routing, images):
    with routing.batch(IMAGES if routing.tasks > 1 else [sum(IMAGES)]):
        return model.encode(model.embed(images))


@pytest.mark.parametrize(("config", "options"), RECIPES.values(), ids=RECIPES)
def test_what_is_saved_is_loaded(config, options, images, tmp_path):
    model = plain()
    tasks = 2 if config else 1
    routing = adapt(model, config, tasks, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    expected = results(model, routing, images)
    save_adapters(model, tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    twin = plain()
    theirs = load_adapters(twin, str(tmp_path / "a.safetensors"), kernel="reference")
    assert torch.equal(results(twin, theirs, images), expected)
    assert (theirs.tasks, theirs.kernel) == (tasks, "reference")
    assert {n: (p.shape, p.requires_grad) for n, p in twin.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in model.named_parameters()
    }


def test_the_file_holds_the_adapters_alone_and_says_what_they_are(file):
    with safe_open(file, "pt") as opened:
        names, metadata = set(opened.keys()), opened.metadata()
    assert names == {
        f"blocks.{block}.{name}"
        for block in range(2)
        for name in ("mlp.lora_A", "mlp.lora_B", "mlp.routers")
        + tuple(f"attn.{linear}.lora_{ab}" for linear in ("qkv", "proj") for ab in "AB")
    }
    lists = {name: json.loads(metadata.pop(name)) for name in ("where", "lora_where")}
    assert metadata == {
        "format": "fastmoe_lora adapters 2",
        "base": '{"class": "ViT"}',
        "saved": "[]",
        "alpha": "null",
        "dropout": "0.0",
        "moe": "6/2/1/2",
        "gating": "ase",
        "tasks": "2",
        "lora_rank": "3",
        "layout": "expert-major",
    }
    assert lists["where"] == ["blocks.0.mlp", "blocks.1.mlp"]
    assert lists["lora_where"] == [f"blocks.{block}.attn.{linear}" for block in (0, 1) for linear in ("qkv", "proj")]


def test_expert_major_means_that_the_rows_of_an_expert_are_neighbours(images):
    """Switching off the rows and columns that the layout gives to an expert leaves no trace of it."""
    model = plain()
    adapt(model, "2/1/1/2")
    layer = model.blocks[1].mlp
    x = torch.randn(5, 16)
    with torch.no_grad():
        layer.lora_B.normal_()
        with adapters_off(model):
            base = layer(x)
        layer.lora_A[:2] = 0  # expert 0
        layer.lora_B[:, 2:] = 0  # expert 1
    assert torch.equal(layer(x), base)


class TestFilesThatDoNotFit:
    def load(self, model, path):
        with pytest.raises(UserError) as caught:
            load_adapters(model, path)
        assert not any(isinstance(module, (LoRALinear, LoRAMoE)) for module in model.modules())
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_a_model_with_other_names(self, file):
        model = type("ViT", (torch.nn.Sequential,), {})(torch.nn.Linear(16, 16))
        message = self.load(model, file)
        assert message == f"{file} does not fit the model, which has no blocks.0.mlp and 5 more"

    def test_a_model_of_another_class(self, file):
        message = self.load(torch.nn.Sequential(torch.nn.Linear(16, 16)), file)
        assert message == f"{file} is for a model of class ViT, not Sequential"

    def test_a_model_of_other_weights(self, file):
        model = plain()
        model.config = SimpleNamespace(_name_or_path="facebook/dinov2-base")
        adapt(model, "6/2/1/2", 2)
        save_adapters(model, file)
        other = plain()
        load_adapters(other, file)  # nothing is known of its weights
        other = plain()
        other.config = SimpleNamespace(_name_or_path="facebook/dinov2-large")
        message = self.load(other, file)
        assert message == f"{file} is for a model of weights facebook/dinov2-base, not facebook/dinov2-large"

    def test_a_model_with_fewer_blocks(self, file):
        message = self.load(plain(ViTConfig(width=16, depth=1, heads=2, patch=8)), file)
        assert message.endswith("has no blocks.1.mlp and 2 more")

    def test_a_model_of_another_width(self, file):
        message = self.load(plain(ViTConfig(width=32, depth=2, heads=2, patch=8)), file)
        assert ": blocks.0.attn.qkv.lora_A, (3, 16) in the file and (3, 32) in the model and " in message

    def test_a_model_with_other_adapters(self, file):
        model = plain()
        adapt(model, "6/2/1/2")
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(UserError, match=r"was made by another recipe .*: remove\(\) them first"):
            load_adapters(model, file)
        assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        remove(model)
        load_adapters(model, file)

    def test_leaves_what_is_trained_as_it_was(self, file):
        """Also where names fit and shapes do not."""
        for width in (16, 32):
            with safe_open(file, "pt") as opened:
                tensors = {name: opened.get_tensor(name)[:, :-1].contiguous() for name in opened.keys()}  # noqa: SIM118
                save_file(tensors, file.with_name("b.safetensors"), opened.metadata())
            model = plain(ViTConfig(width=width, depth=2, heads=2, patch=8))
            self.load(model, file.with_name("b.safetensors"))
            assert all(parameter.requires_grad for parameter in model.parameters())

    def test_a_file_that_is_not_there(self, tmp_path):
        assert "no.safetensors" in self.load(plain(), tmp_path / "no.safetensors")

    def test_a_file_of_something_else(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file({"w": torch.zeros(1)}, path)
        assert self.load(plain(), path).startswith(f"{path} is not a file of save_adapters")

    def test_a_damaged_file(self, file):
        file.write_bytes(file.read_bytes()[:-10])
        assert self.load(plain(), file).startswith(f"{file} is not a file of save_adapters")

    def test_a_file_that_lacks_tensors(self, file):
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys() if "routers" not in name}  # noqa: SIM118
            save_file(tensors, file, opened.metadata())
        assert "blocks.0.mlp.routers, absent in the file and (2, 6, 16) in the model" in self.load(plain(), file)

    @pytest.mark.parametrize(
        "change", [lambda t: t * float("nan"), lambda t: t.to(torch.int8), lambda t: t > 0], ids=["nan", "int8", "bool"]
    )
    def test_a_file_of_values_that_are_no_finite_numbers(self, change, file):
        with safe_open(file, "pt") as opened:
            tensors = {name: change(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
            save_file(tensors, file, opened.metadata())
        assert "that are no finite numbers" in self.load(plain(), file)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("where", "[1]"), ("where", "5"), ("lora_where", "5"), ("tasks", "-1"), ("tasks", "x"), ("lora_rank", "-1"),
            ("alpha", '"x"'), ("dropout", "[]"), ("saved", "{}"), ("base", "x"), ("base", "5"), ("moe", "6/9/1/2"),
            ("moe", ""), ("format", "3"), ("layout", "rank-major"), ("dropout", "NaN"), ("alpha", "true"),
        ],
    )  # fmt: skip
    def test_a_file_of_impossible_metadata(self, key, value, file):
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            save_file(tensors, file, opened.metadata() | {key: value})
        assert str(file) in self.load(plain(), file)


class TestFilesOfVersion01:
    """Format 1 knew no base, and an adapted FFN was ``base`` of a module around it."""

    METADATA = {
        "format": "fastmoe_lora adapters 1", "moe": "6/2/1/2", "gating": "ase", "tasks": "2", "lora_rank": "3",
        "where": '["blocks.0.mlp", "blocks.1.mlp"]', "lora_where": '["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]',
        "layout": "expert-major",
    }  # fmt: skip

    def test_load(self, images, tmp_path):
        model, path = plain(), tmp_path / "old.safetensors"
        routing = adapt(model, "6/2/1/2", 2, lora_rank=3, lora_where="*.fc1")
        with torch.no_grad():
            trained = {n: p.normal_().detach() for n, p in model.named_parameters() if p.requires_grad}
        save_file(
            {name.replace("mlp.fc1", "mlp.base.fc1"): tensor for name, tensor in trained.items()}, path, self.METADATA
        )
        twin = plain()
        assert torch.equal(results(twin, load_adapters(twin, path), images), results(model, routing, images))

    def test_with_both_kinds_beside_one_layer_are_one_line(self, tmp_path):
        path = tmp_path / "old.safetensors"
        metadata = self.METADATA | {"where": '["blocks.0.mlp.fc1"]', "lora_where": '["blocks.0.mlp.fc1"]'}
        save_file({"blocks.0.mlp.fc1.lora_A": torch.zeros(1)}, path, metadata)
        with pytest.raises(UserError, match="blocks.0.mlp.fc1 has both experts and plain LoRA"):
            load_adapters(plain(), path)

    def test_state_dicts_of_adapted_models_load(self, images):
        model, twin = plain(), plain()
        for each in (model, twin):
            routing = adapt(each, "6/2/1/2", 2, lora_rank=3, lora_where=["*.fc1", "*.qkv"])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        old = {name.replace(".mlp.fc", ".mlp.base.fc"): value for name, value in model.state_dict().items()}
        assert "blocks.0.mlp.base.fc1.lora_A" in old and "blocks.0.mlp.lora_A" in old
        twin.load_state_dict(old)
        assert torch.equal(results(twin, routing, images), results(model, routing_of(model), images))


class TestSaving:
    def test_a_model_without_adapters_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="no adapters to save"):
            save_adapters(plain(), tmp_path / "a.safetensors")

    def test_a_folder_that_is_not_there_is_one_line(self, tmp_path):
        model = plain()
        adapt(model, "6/2/1/2")
        with pytest.raises(UserError, match="cannot write"):
            save_adapters(model, tmp_path / "no" / "a.safetensors")
