"""adapt() on the models that others have: the classes of transformers, timm's structure, a decoder LLM."""

import copy
import importlib.util
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from fastmoe_lora import LoRALinear, LoRAMoE, RoutingStatistics, adapt, merge, parameter_groups, remove, routing_of
from fastmoe_lora.layers import frozen_weights
from kernels import UserError
from kernels.dispatch import choose_family, known_family

TASKS, IMAGES, MOE = 2, [2, 1], "4/2/1/2"
TINY = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
TINY |= {"hidden_size": 16, "intermediate_size": 32, "mlp_ratio": 2, "attn_implementation": "eager"}


class TimmBlock(nn.Module):
    """What timm's blocks have: qkv and proj, an FFN with dropouts and an optional norm, layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.ls2 = nn.LayerNorm(16), nn.LayerNorm(16), nn.Identity()
        self.attn = nn.ModuleDict({"qkv": nn.Linear(16, 48), "proj": nn.Linear(16, 16)})
        self.mlp = TimmMlp()

    def forward(self, x):
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, -1)
        x = x + self.attn["proj"](nn.functional.scaled_dot_product_attention(q, k, v))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TimmMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1, self.norm = nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.0), nn.Identity()
        self.fc2, self.drop2 = nn.Linear(32, 16), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 8, 8)
        self.blocks = nn.Sequential(TimmBlock(), TimmBlock())

    def forward(self, images):
        return (self.blocks(self.patch_embed(images).flatten(2).transpose(1, 2)),)


@dataclass(frozen=True)
class Backbone:
    """How to make a tiny ViT, and the names of its FFNs."""

    make: type[nn.Module]
    config: type | None
    ffns: str
    options: tuple = ()
    fused: bool = True

    def __call__(self) -> nn.Module:
        torch.manual_seed(0)
        if self.config is None:
            return self.make().eval()
        return self.make(self.config(**TINY, **dict(self.options))).eval()


BACKBONES = {
    "timm": Backbone(TimmViT, None, "blocks.{}.mlp"),
    "vit": Backbone(ViTModel, ViTConfig, "layers.{}.mlp"),
    "dinov2": Backbone(Dinov2Model, Dinov2Config, "encoder.layer.{}.mlp"),
    "dinov2-swiglu": Backbone(
        Dinov2Model, Dinov2Config, "encoder.layer.{}.mlp", (("use_swiglu_ffn", True),), fused=False
    ),
    "dinov2-registers": Backbone(Dinov2WithRegistersModel, Dinov2WithRegistersConfig, "encoder.layer.{}.mlp"),
    "dinov3": Backbone(DINOv3ViTModel, DINOv3ViTConfig, "model.layer.{}.mlp", (("num_register_tokens", 4),)),
    "dinov3-gated": Backbone(
        DINOv3ViTModel, DINOv3ViTConfig, "model.layer.{}.mlp", (("use_gated_mlp", True),), fused=False
    ),
}
# conftest.py makes Triton interpret where there is no GPU; on a GPU, test_gpu.py has tests of whole models.
WITHOUT_KERNELS = torch.cuda.is_available() or importlib.util.find_spec("triton") is None
INTERPRETED = pytest.param(
    "triton",
    marks=[
        pytest.mark.interpret,
        pytest.mark.skipif(WITHOUT_KERNELS, reason="Triton interprets where it is installed and there is no GPU"),
    ],
)
EVERY_BACKBONE = pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
LLAMA = LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=31, pad_token_id=0
)


@pytest.fixture(autouse=True)
def _asked_anew():
    known_family.cache_clear()  # another test may have asked for a kernel without the interpreter


@pytest.fixture
def images():
    return torch.rand(sum(IMAGES), 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


def quietly_adapt(model, *arguments, **options):
    """adapt() without its warning about DINOv3's position augmentation, which has a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return adapt(model, *arguments, **options)


def spread(model):
    """Give the adapters the values of a trained model."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_B", "routers")):
                parameter.normal_()
    return model


def adapted(backbone, **options):
    model = backbone()
    routing = quietly_adapt(model, MOE, TASKS, **options)
    return model, routing


def run(model, images, counts=IMAGES):
    with routing_of(model).batch(counts):
        return model(images)[0]


def fused(layer):
    """Whether base and experts are one operation of the kernels."""
    kernel, config = layer.adapters.sets[""].routing.kernel, layer.adapters.sets[""].config
    family = choose_family(kernel, layer.lora_A.device, config.experts, config.rank)
    return frozen_weights(layer) is not None and family == "one tile"


class TestBackbones:
    @EVERY_BACKBONE
    @pytest.mark.parametrize("lora_rank", [0, 2])
    def test_the_ffn_of_every_block_is_adapted_and_starts_with_the_bits_of_the_model(self, backbone, lora_rank, images):
        before = backbone()(images)[0]
        model, _ = adapted(backbone, lora_rank=lora_rank)
        experts = [name for name, module in model.named_modules() if isinstance(module, LoRAMoE)]
        assert experts == [backbone.ffns.format(block) for block in range(2)]
        assert any(isinstance(module, LoRALinear) for module in model.modules()) == bool(lora_rank)
        after = run(model, images)
        if lora_rank:  # plain LoRA on a frozen layer is part of its product, which has other roundings
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(after, before)

    @EVERY_BACKBONE
    def test_in_training_mode_too(self, backbone, images):
        """Nothing random is left: DINOv3's augmentation of positions is off."""
        before = backbone()(images)[0]
        model, _ = adapted(backbone)
        assert torch.equal(run(model.train(), images), before)

    @EVERY_BACKBONE
    def test_gradients_reach_every_adapter_and_nothing_else(self, backbone, images):
        model, routing = adapted(backbone, lora_rank=2)
        spread(model)
        (run(model, images).square().mean() + 0.005 * routing.mi_loss()).backward()
        for name, parameter in model.named_parameters():
            ours = name.endswith(("lora_A", "lora_B", "routers"))
            assert parameter.requires_grad == ours
            assert ours == (parameter.grad is not None and bool(parameter.grad.any())), name

    @EVERY_BACKBONE
    @pytest.mark.parametrize("kernel", [INTERPRETED])
    def test_the_kernels_have_the_results_of_the_reference(self, kernel, backbone, images):
        found = []
        for implementation in (kernel, "reference"):
            model, routing = adapted(backbone, kernel=implementation)
            spread(model)
            layers = [module for module in model.modules() if isinstance(module, LoRAMoE)]
            assert all(fused(layer) == (backbone.fused and implementation == "triton") for layer in layers)
            y = run(model, images)
            (y.square().mean() + 0.005 * routing.mi_loss()).backward()
            found.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(1.0, theirs.abs().max().item()))

    @EVERY_BACKBONE
    def test_remove_restores_modules_names_and_bits(self, backbone, images):
        plain = backbone()
        model = spread(adapted(backbone, lora_rank=2)[0])
        assert not torch.equal(run(model, images), plain(images)[0])
        remove(model)
        types = [[(name, type(module)) for name, module in m.named_modules()] for m in (model, plain)]
        assert types[0] == types[1]
        states = model.state_dict(), plain.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert torch.equal(model(images)[0], plain(images)[0])
        quietly_adapt(model, MOE)  # it may be adapted again

    def test_recomputed_activations_give_the_same_gradients(self, images):
        found = []
        for recomputes in (False, True):
            model, routing = adapted(BACKBONES["vit"])
            spread(model).train()
            if recomputes:
                model.activation_checkpointing_enable()
            with routing.batch(IMAGES) as batch:  # which the backward pass needs, as it runs layers again
                (model(images)[0].square().mean() + 0.005 * batch.mi_loss()).backward()
            found.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))

    def test_a_copy_is_independent(self, images):
        model, routing = adapted(BACKBONES["vit"])
        y = run(spread(model), images)
        twin = copy.deepcopy(model)
        assert torch.equal(run(twin, images), y)
        assert not torch.equal(run(twin, images, [0, 3]), y)
        assert torch.equal(run(model, images), y)
        assert routing_of(twin) is not routing


class TestPositionAugmentation:
    def test_is_switched_off_with_a_warning_and_comes_back(self, images):
        config = DINOv3ViTConfig(**TINY, pos_embed_shift=0.5, pos_embed_rescale=2.0)
        model = DINOv3ViTModel(config).train()
        assert not torch.equal(model(images)[0], model(images)[0])
        with pytest.warns(UserWarning, match=r"position augmentation .*pos_embed_shift=0.5, pos_embed_rescale=2.0"):
            adapt(model, MOE)
        assert torch.equal(model(images)[0], model(images)[0])
        assert (config.pos_embed_shift, config.pos_embed_rescale) == (0.5, 2.0)  # other models may be made of it
        twin = copy.deepcopy(model)
        remove(model)
        assert not torch.equal(model(images)[0], model(images)[0])
        assert torch.equal(twin(images)[0], twin(images)[0])

    def test_stays_on_where_the_backbone_is_trained(self, images):
        model = DINOv3ViTModel(DINOv3ViTConfig(**TINY, pos_embed_shift=0.5)).train()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adapt(model, MOE, freeze=False)
        assert not torch.equal(model(images)[0], model(images)[0])
        assert all(parameter.requires_grad for parameter in model.parameters())


class TestDecoder:
    """One task needs no batch, so that a decoder LLM runs as it did."""

    TOKENS = torch.tensor([[5, 7, 11, 2], [3, 1, 4, 1]])

    @pytest.mark.parametrize("where", ["*.down_proj", "*.mlp", ["*.up_proj", "*.down_proj", "*.self_attn.o_proj"]])
    def test_starts_with_the_bits_of_the_model(self, where, llama):
        before = llama(self.TOKENS).logits
        adapt(llama, MOE, where=where)
        assert torch.equal(llama(self.TOKENS).logits, before)

    @pytest.mark.parametrize("kernel", [INTERPRETED])
    def test_kernels_and_reference_have_the_same_loss_and_gradients(self, kernel, llama):
        found = []
        for implementation in (kernel, "reference"):
            torch.manual_seed(3)
            model = copy.deepcopy(llama)
            routing = adapt(model, MOE, where="*.down_proj", kernel=implementation)
            loss = spread(model)(self.TOKENS, labels=self.TOKENS).loss
            assert routing.mi_loss() == 0
            loss.backward()
            trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            assert set(trained) == {
                f"model.layers.{layer}.mlp.down_proj.{part}"
                for layer in range(2)
                for part in ("lora_A", "lora_B", "routers")
            }
            found.append([loss, *trained.values()])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    def test_in_half_precision_too(self, llama):
        llama.bfloat16()
        before = llama(self.TOKENS).logits
        adapt(llama, MOE, where="*.down_proj")
        after = llama(self.TOKENS).logits
        assert after.dtype == torch.bfloat16
        assert torch.equal(after, before)
        spread(llama)(self.TOKENS).logits.float().square().mean().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in llama.parameters() if p.requires_grad)

    def test_generates(self, llama):
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(self.TOKENS)}
        before = llama.generate(self.TOKENS, **options)
        adapt(llama, MOE, where="*.down_proj")
        assert torch.equal(llama.generate(self.TOKENS, **options), before)
        after = spread(llama).generate(self.TOKENS, **options)
        assert after.shape == before.shape
        assert not torch.equal(after, before)

    @pytest.mark.parametrize("kernel", ["reference", INTERPRETED])
    def test_padding_counts_nowhere(self, kernel, llama):
        """Two sequences padded to one length have the loss, the gradients and the statistics of each alone."""
        mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        routing = adapt(llama, MOE, 2, where=["*.up_proj"], kernel=kernel)
        spread(llama)
        found = []
        for padded in (True, False):
            llama.zero_grad()
            routing.statistics = RoutingStatistics()
            if padded:
                with routing.batch([1, 1], mask):
                    logits = llama(self.TOKENS, attention_mask=mask).logits[mask.bool()]
            else:  # without padding: one sequence of six tokens in which the second attends to none of the first
                with routing.batch_tokens([4, 2]):
                    logits = packed(llama, [self.TOKENS[0], self.TOKENS[1, :2]])
            mi_loss = routing.mi_loss()
            (logits.square().mean() + mi_loss).backward()
            grads = [p.grad.clone() for p in llama.parameters() if p.requires_grad]
            found.append([logits, mi_loss, *grads, *routing.statistics.compute()])
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_with_padding_starts_with_the_bits_of_the_model(self, llama):
        mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
        before = llama(self.TOKENS, attention_mask=mask).logits
        with adapt(llama, MOE, where="*.up_proj").batch([2], mask):
            assert torch.equal(llama(self.TOKENS, attention_mask=mask).logits, before)


def packed(llama, sequences):
    """Logits (tokens, vocabulary) of sequences in one row, each of which attends to itself only."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    owner = torch.repeat_interleave(torch.arange(len(sequences)), lengths)
    position = torch.cat([torch.arange(n) for n in lengths])
    sees = (owner[:, None] == owner) & (position[:, None] >= position)
    bias = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    return llama(torch.cat(sequences)[None], attention_mask=bias[None, None], position_ids=position[None]).logits[0]


class TestMistakes:
    def test_no_match_names_the_closest_modules_and_changes_nothing(self, llama):
        message = r"where='\*.dwn_proj' matches no module; the closest names are model.layers.\*.mlp.down_proj, "
        with pytest.raises(UserError, match=message):
            adapt(llama, MOE, where="*.dwn_proj")
        with pytest.raises(UserError, match=r"lora_where='\*.qvk' matches no module"):
            adapt(llama, MOE, lora_rank=2, lora_where="*.qvk")
        assert all(parameter.requires_grad for parameter in llama.parameters())

    @pytest.mark.parametrize(
        ("where", "match"), [("*.input_layernorm", "model.layers.0.input_layernorm"), ("model.layers", "ModuleList")]
    )
    def test_a_match_that_is_no_layer_with_weights_is_named(self, where, match, llama):
        with pytest.raises(UserError, match=match):
            adapt(llama, MOE, where=where)

    def test_a_layer_with_two_names_is_refused(self, llama):
        llama.model.layers[1].mlp = llama.model.layers[0].mlp
        with pytest.raises(UserError, match=r"model.layers.1.mlp is model.layers.0.mlp"):
            adapt(llama, MOE)

    def test_an_adapted_model_is_refused(self, llama):
        adapt(llama, MOE)
        with pytest.raises(UserError, match="adapted already"):
            adapt(llama, MOE)

    def test_merge_says_why_not(self, llama):
        adapt(llama, MOE)
        with pytest.raises(UserError, match="gates depend on the token"):
            merge(llama)


def test_modules_inside_a_match_are_left_alone(llama):
    adapt(llama, MOE, where=["*.mlp", "*.down_proj"])
    adapted_names = [name for name, module in llama.named_modules() if isinstance(module, LoRAMoE)]
    assert adapted_names == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_parameter_groups_hold_what_is_trained_once(llama):
    adapt(llama, MOE)
    llama.model.norm.requires_grad_(True)
    matrices, vectors = parameter_groups(llama, 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in vectors["params"]] == [id(llama.model.norm.weight)]
    grouped = {id(p) for group in (matrices, vectors) for p in group["params"]}
    assert grouped == {id(p) for p in llama.parameters() if p.requires_grad}
    assert len(grouped) == len(matrices["params"]) + 1
