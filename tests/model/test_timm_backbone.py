"""timm's models as backbones: maps, task embeddings, adapters, three steps, and weights by timm's names."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastmoe_lora import adapt
from fastmoe_lora.sites import adapted_layers
from kernels import UserError
from model import MultiTaskViT, TimmBackbone, read_source
from model.timm_backbone import width_of

# Architectures as timm builds them, made narrow and shallow.
NARROW = {"embed_dim": 48, "depth": 4, "num_heads": 3}
STAGES = {"depths": (1, 1, 1, 1)}
SMALL = {
    "swin_tiny_patch4_window7_224": STAGES | {"embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "convnext_tiny": STAGES | {"dims": (24, 48, 96, 192)},
    "convnext_tiny.dinov3_lvd1689m": STAGES | {"dims": (24, 48, 96, 192)},
    "vit_small_patch14_reg4_dinov2": NARROW,
    "eva02_tiny_patch14_224": NARROW,
    "vit_base_patch16_siglip_224": NARROW,
    "beit_base_patch16_224": NARROW,
    "vit_small_patch16_dinov3": NARROW,
    "vit_pe_spatial_tiny_patch16_512": NARROW,
    "vit_base_patch16_lingbot": NARROW,
}
HIERARCHICAL = ("swin", "convnext")
CHANNELS = {"seg": 5, "edge": 1}
INDEX = {"seg": torch.tensor([0, 1]), "edge": torch.tensor([1])}


def side_of(name: str) -> int:
    """Of a square of few patches."""
    return 56 if "patch14" in name else 64


@pytest.fixture
def build(monkeypatch):
    """A backbone by timm's name, for squares of few patches or of ``side``."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **given: create(name, **(SMALL.get(name, {}) | given)))

    def build(name: str, side: int = 0) -> TimmBackbone:
        torch.manual_seed(0)
        side = side or side_of(name)
        return TimmBackbone(f"timm:{name}", (side, side))

    return build


@pytest.mark.parametrize("name", SMALL)
def test_maps_go_from_fine_to_coarse(name, build):
    backbone = build(name)
    strides = [level.stride for level in backbone.levels]
    assert strides == ([4, 8, 16, 32] if name.startswith(HIERARCHICAL) else [backbone.patch] * 4)
    other = side_of(name) if name.startswith("beit") else 3 * backbone.patch
    for side in (side_of(name), other):  # also images of another size than it was built for
        images = torch.randn(1, 3, side, side)
        maps = backbone.eval()(images)
        for level, (tokens, grid) in zip(backbone.levels, maps, strict=True):
            assert grid == (side // level.stride,) * 2 and tokens.shape == (1, grid[0] * grid[1], level.channels)
        assert torch.equal(backbone(images, last=True)[0].tokens, maps[-1].tokens)


def test_a_model_of_one_size_says_so(build):
    with pytest.raises(UserError, match=r"was built for images of \(64, 64\) pixels and takes no others"):
        build("beit_base_patch16_224")(torch.zeros(1, 3, 48, 48))


@pytest.mark.parametrize("name", SMALL)
def test_every_pair_has_the_embedding_of_its_task(name, build):
    backbone = build(name).eval()
    images, zero = torch.randn(2, 3, *(side_of(name),) * 2), torch.zeros(backbone.width)
    one = torch.linspace(-1, 1, backbone.width)
    plain = backbone(images)
    pairs = backbone(images, [(torch.tensor([0, 1]), zero), (torch.tensor([1]), one)])
    for ours, theirs in zip(pairs, plain, strict=True):
        torch.testing.assert_close(ours.tokens[:2], theirs.tokens, rtol=1e-4, atol=1e-4)
        assert (ours.tokens[2] - ours.tokens[1]).abs().max() > 1e-3


def train_three_steps(name: str, backbone: TimmBackbone, frozen: bool) -> None:
    """With experts and LoRA where adapt() puts them by itself."""
    backbone.requires_grad_(not frozen)
    lora = [pattern for layer in ("qkv", "proj") for pattern in backbone.lora_layers[layer]]
    rank = {"lora_rank": 2, "lora_where": lora} if lora else {}
    assert bool(lora) != name.startswith("convnext")
    routing = adapt(backbone, "4/2/1/2", 2, backbone.sites["ffn"], **rank, freeze=False)
    assert len(adapted_layers(backbone)) >= (4 if not lora else 8)
    model = MultiTaskViT(backbone, CHANNELS, "pyramid", routing)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    images = torch.randint(0, 256, (2, 3, *(side_of(name),) * 2)).float()
    moved: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        predictions = model(images, INDEX)
        assert {task: y.shape for task, y in predictions.items()} == {
            task: (len(INDEX[task]), channels, *images.shape[-2:]) for task, channels in CHANNELS.items()
        }
        loss = sum((y - 1).square().mean() for y in predictions.values()) + 0.01 * routing.mi_loss()
        loss.backward()
        moved |= {key for key, value in trained.items() if value.grad is not None}
        optimizer.step()
    assert moved == set(trained), "DistributedDataParallel needs a gradient of every parameter"
    own = {key for key, value in model.named_parameters() if not value.requires_grad}
    assert bool(own) == frozen and all(torch.equal(before[key], model.state_dict()[key]) for key in own)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_three_steps_train_all_that_is_not_frozen(name, frozen, build):
    train_three_steps(name, build(name), frozen)


@pytest.mark.long
@pytest.mark.parametrize("name", SMALL)
def test_three_steps_at_full_width_and_depth(name):
    train_three_steps(name, TimmBackbone(f"timm:{name}", (side_of(name),) * 2), frozen=False)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"])
def test_weights_of_another_size_are_loaded_by_timms_names(name, build, tmp_path, monkeypatch):
    theirs = timm.create_model(name, img_size=128)
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    ours = build(name)
    report = ours.load(read_source(tmp_path / "theirs.safetensors"))
    assert not report.missing and all(key.startswith(("head", "fc_norm")) for key in report.unexpected)
    same = [key for key, value in ours.net.state_dict().items() if value.shape == theirs.state_dict()[key].shape]
    assert "norm.weight" in same or "patch_embed.proj.weight" in same
    assert all(torch.equal(ours.net.state_dict()[key], theirs.state_dict()[key]) for key in same)


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda state: state.pop("blocks.1.mlp.fc1.weight"), "blocks.1.mlp.fc1.weight is missing"),
        (lambda state: state.update({"blocks.9.x": torch.zeros(1)}), "blocks.9.x is not in this model"),
        (
            lambda state: state.update({"norm.weight": torch.zeros(3)}),
            r"norm.weight is \(3,\) there and \(48,\) in this",
        ),
        (lambda state: state["norm.weight"].fill_(torch.nan), "norm.weight is quantised or not finite"),
        (lambda state: state.clear() or state.update({"x": torch.zeros(1)}), "is missing"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, expected, build, tmp_path):
    ours = build("vit_small_patch16_dinov3")
    state = {key: value.clone() for key, value in ours.net.state_dict().items()}
    change(state)
    save_file(state, tmp_path / "theirs.safetensors")
    before = {key: value.clone() for key, value in ours.net.state_dict().items()}
    with pytest.raises(UserError, match=f"theirs.safetensors does not fit timm:vit_small_patch16_dinov3.*{expected}"):
        ours.load(read_source(tmp_path / "theirs.safetensors"))
    assert all(torch.equal(value, before[key]) for key, value in ours.net.state_dict().items())


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vit_small_patch14_reg4_dinov2", "imagenet"),
        ("eva02_tiny_patch14_224", "clip"),
        ("beit_base_patch16_224", "inception"),
    ],
)
def test_images_are_normalised_as_the_models_own_weights_want(name, expected, build):
    assert build(name).normalisation == expected


def test_the_width_is_known_before_a_model_is_built():
    assert width_of("timm:vit_small_patch16_dinov3") == 384


@pytest.mark.parametrize(
    "name, side, expected",
    [
        (
            "vit_smal_patch16_dinov3",
            64,
            "timm has no model 'vit_smal_patch16_dinov3': perhaps vit_small_patch16_dinov3",
        ),
        ("vit_small_patch14_reg4_dinov2", 64, "image size 64 is not a multiple of the patch size 14"),
        ("hiera_tiny_224", 224, "timm:hiera_tiny_224 gives no normalised maps"),
    ],
)
def test_what_cannot_be_built_is_one_line(name, side, expected, build):
    with pytest.raises(UserError, match=expected):
        build(name, side)


@pytest.mark.parametrize(
    "lost, expected",
    [
        ("raise ImportError", "pip install 'fastmoe_lora.timm.'"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision was built for another torch"),
    ],
)
def test_a_timm_that_cannot_be_imported_is_one_line(lost, expected, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "timm"]:
        monkeypatch.delitem(sys.modules, name)
    Path(tmp_path / "timm.py").write_text(lost)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=expected):
        TimmBackbone("timm:convnext_tiny", (64, 64))


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_lingbot", "vit_base_patch16_dinov3_qkvb.eupe_lvd1689m"], ids=["LingBot", "EUPE"]
)
def test_the_newest_have_the_shapes_of_dinov3s(name):
    with torch.device("meta"):
        shapes = [
            {key: tuple(value.shape) for key, value in timm.create_model(each, num_classes=0).state_dict().items()}
            for each in (name, "vit_base_patch16_dinov3_qkvb")
        ]
    assert shapes[0] == shapes[1]
