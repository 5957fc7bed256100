"""DINOv3: features of Hugging Face's implementation, on random weights, from files of either naming scheme."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from kernels import UserError
from model import (
    VITS,
    MultiTaskViT,
    ViT,
    ViTConfig,
    convert_source,
    load_pretrained,
    read_source,
    read_weights,
    timm_layout,
)
from model.rope import RoPE, rotate

WIDTH, HEADS, DEPTH, PATCH = 32, 2, 2, 4
CONFIG = ViTConfig(width=WIDTH, depth=DEPTH, heads=HEADS)


@pytest.fixture(scope="module")
def theirs() -> DINOv3ViTModel:
    config = DINOv3ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        patch_size=PATCH, num_register_tokens=4,
    )  # fmt: skip
    model = DINOv3ViTModel(config).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():  # large enough for attention that depends on positions
        torch.nn.init.normal_(parameter, std=0.3).add_(1.0 if parameter.ndim == 1 else 0.0)
    return model


def official(state: dict[str, Tensor], periods: Tensor) -> dict[str, Tensor]:
    """Their file under the names of the facebookresearch release: biases of keys are noise, which a mask removes."""
    renamed = {
        "embeddings.patch_embeddings": "patch_embed.proj", "embeddings.register_tokens": "storage_tokens",
        "embeddings.": "", "layer.": "blocks.", "attention.o_proj": "attn.proj", "mlp.up_proj": "mlp.fc1",
        "mlp.down_proj": "mlp.fc2", "layer_scale1.lambda1": "ls1.gamma", "layer_scale2.lambda1": "ls2.gamma",
    }  # fmt: skip
    out = {"rope_embed.periods": periods}
    for name, tensor in state.items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        out[name] = tensor
    for i in range(DEPTH):
        attention = f"blocks.{i}.attention"
        biases = [out.pop(f"{attention}.{part}_proj.bias", torch.randn(WIDTH)) for part in "qkv"]
        out[f"blocks.{i}.attn.qkv.weight"] = torch.cat([out.pop(f"{attention}.{part}_proj.weight") for part in "qkv"])
        out[f"blocks.{i}.attn.qkv.bias"] = torch.cat(biases)
        out[f"blocks.{i}.attn.qkv.bias_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(WIDTH)
    return out


def timm(state: dict[str, Tensor], periods: Tensor) -> dict[str, Tensor]:
    """Their file under the names of timm's ``vit_*_patch16_dinov3_qkvb``, which has no periods."""
    renamed = {"storage_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}
    out = official(state, periods)
    for old, new in renamed.items():
        out = {name.replace(old, new): tensor for name, tensor in out.items()}
    for i in range(DEPTH):
        q, _, v = out.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        out |= {f"blocks.{i}.attn.q_bias": q.contiguous(), f"blocks.{i}.attn.v_bias": v.contiguous()}
    return {name: tensor for name, tensor in out.items() if not name.endswith(("periods", "bias_mask"))}


@pytest.fixture(scope="module", params=["hugging face", "in memory", "official", "timm"])
def path(request, theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov3")
    theirs.save_pretrained(folder)
    state, path = load_file(folder / "model.safetensors"), folder / "written.safetensors"
    periods = 1 / theirs.rope_embeddings.inv_freq
    wrap = {
        "hugging face": lambda: state,
        "in memory": theirs.state_dict,
        "official": lambda: official(state, periods),
        "timm": lambda: timm(state, periods),
    }
    save_file(wrap[request.param](), path)
    return path


def load(path) -> ViT:
    weights = read_weights(path)
    vit = ViT(weights.adjust(CONFIG), 32).eval()
    assert load_pretrained(vit, weights).missing == ()
    return vit


def test_patch_registers_and_positions_are_derived(path):
    weights = read_weights(path)
    assert weights.adjust(CONFIG) == replace(CONFIG, patch=PATCH, registers=4, rope=True, eps=1e-5)
    assert (weights.family, weights.normalisation) == ("DINOv3", "imagenet")
    assert load_pretrained(load(path), weights).unexpected == ("mask_token",)


def test_weights_for_satellite_images_have_their_normalisation(path, tmp_path):
    renamed = tmp_path / f"dinov3_vitl16_pretrain_sat493m-eadcf0ff{path.suffix}"
    renamed.symlink_to(path)
    assert read_weights(renamed).normalisation == "satellite"


@pytest.mark.parametrize("size", [(32, 32), (16, 40), (60, 8), (4, 4)])
def test_features_are_those_of_hugging_face(path, theirs, size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    vit = load(path)
    with torch.inference_mode():
        ours = vit.encode(vit.embed(images), vit.grid(images))
        expected = theirs(images).last_hidden_state
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_a_transposed_grid_gives_other_features(path, theirs):
    """The tolerance above would show a wrong grid."""
    vit, images = load(path), torch.randn(1, 3, 16, 40)
    with torch.inference_mode():
        tokens = vit.embed(images)
        assert (vit.encode(tokens, (4, 10)) - vit.encode(tokens, (10, 4))).abs().max() > 1e-2


def test_the_periods_of_a_file_win_over_the_default_base(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    periods = RoPE(WIDTH // HEADS, base=20.0).periods
    save_file(official(load_file(tmp_path / "model.safetensors"), periods), tmp_path / "other.safetensors")
    assert torch.equal(load(tmp_path / "other.safetensors").rope.periods, periods)
    assert "rope.periods" in convert_source(read_source(tmp_path / "other.safetensors"))[0], "timm has others"


def test_biases_that_timm_leaves_out_are_zero(theirs, tmp_path):
    """The names of timm's ``vit_*_patch16_dinov3``, whose release has zeros there."""
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    zero = {
        name: torch.zeros_like(tensor)
        for name, tensor in state.items()
        if name.endswith(("q_proj.bias", "v_proj.bias"))
    }
    save_file(state | zero, tmp_path / "zeros.safetensors")
    written = timm(state, torch.ones(1))
    save_file({name: t for name, t in written.items() if not name.endswith("_bias")}, tmp_path / "timm.safetensors")
    ours, expected = (load(tmp_path / f"{name}.safetensors").state_dict() for name in ("timm", "zeros"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    tensors, _ = convert_source(read_source(tmp_path / "zeros.safetensors"))
    assert not any(name.endswith("_bias") for name in tensors)


def test_files_are_rewritten_as_timm_stores_them(path, theirs, tmp_path):
    tensors, left = convert_source(read_source(path))
    save_file(tensors, tmp_path / "converted.safetensors")
    expected = timm({name.removeprefix("model."): t for name, t in theirs.state_dict().items()}, torch.ones(1))
    assert left == ("mask_token",) and {*tensors} == {*expected} - {"mask_token"}
    assert all(torch.equal(tensors[name], expected[name]) for name in {*expected} - {"mask_token"})
    assert_same_bits(load(tmp_path / "converted.safetensors").state_dict(), load(path).state_dict())


def assert_same_bits(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Periods are computed anew where a file of timm is read, and differ by rounding."""
    assert state.keys() == expected.keys()
    torch.testing.assert_close(state["rope.periods"], expected["rope.periods"], rtol=1e-6, atol=0)
    assert all(torch.equal(state[name], expected[name]) for name in expected if name != "rope.periods")


def test_a_backbone_in_memory_is_written_as_timm_stores_it(path, tmp_path):
    """Its LayerScale was folded, so that timm's is 1."""
    state = load(path).state_dict()
    save_file(timm_layout(state, rope=True), tmp_path / "converted.safetensors")
    assert_same_bits(load(tmp_path / "converted.safetensors").state_dict(), state)


def test_a_bias_of_keys_cannot_be_written(path):
    state = load(path).state_dict()
    state["blocks.1.attn.qkv.bias"][WIDTH] = 1
    with pytest.raises(UserError, match="blocks.1.attn.qkv has a bias of keys"):
        timm_layout(state, rope=True)


def test_angles_are_two_pi_times_the_coordinate_over_the_period():
    """Centres of 2 rows are -1/2 and 1/2, of 3 columns -2/3, 0 and 2/3; the periods of 8 channels are 1 and 10."""
    cos, sin = RoPE(8)((2, 3))
    y, x = -1 / 2, 2 / 3  # the third patch
    angles = 2 * torch.pi * torch.tensor([y, y / 10, x, x / 10] * 2)
    torch.testing.assert_close(cos[2], angles.cos())
    torch.testing.assert_close(sin[2], angles.sin())


def test_a_rotation_keeps_lengths_and_tokens_without_position():
    x = torch.randn(2, 3, 1 + 6, 8, dtype=torch.float64)
    y = rotate(x, RoPE(8).double()((2, 3)))
    assert torch.equal(y[:, :, 0], x[:, :, 0]) and not torch.equal(y, x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_heads_whose_width_is_no_multiple_of_four_have_no_rotary_positions():
    with pytest.raises(ValueError, match="head_dim is 6"):
        RoPE(6)


def test_a_grid_that_is_not_given_is_refused():
    vit = ViT(replace(CONFIG, rope=True), 32)
    with pytest.raises(ValueError, match="pass the grid of patches"):
        vit.encode(vit.embed(torch.zeros(1, 3, 32, 32)))


def test_half_precision_stays_half(path):
    vit, images = load(path).to(torch.bfloat16), torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)
    assert vit.encode(vit.embed(images), vit.grid(images)).dtype == torch.bfloat16


def test_a_multi_task_model_knows_the_grid_of_its_images(path):
    model = MultiTaskViT(load(path), {"seg": 5}, "light").eval()
    assert model(torch.randint(0, 256, (1, 3, 16, 40)))["seg"].shape == (1, 5, 16, 40)


def test_a_gated_ffn_is_refused_in_one_line(path, tmp_path):
    """DINOv3's S+, H+ and 7B have another FFN."""
    weights = load_file(path)
    names = [name for name in weights if "fc1" in name or "up_proj" in name]
    for name in names:
        weights[name.replace("fc1", "w1").replace("up_proj", "gate_proj")] = weights.pop(name)
    save_file(weights, tmp_path / "gated.safetensors")
    with pytest.raises(UserError, match="holds another architecture: blocks.0.mlp.fc1.weight is absent there") as error:
        load(tmp_path / "gated.safetensors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "width", "depth"), [("small", 384, 12), ("base", 768, 12), ("large", 1024, 24)])
def test_our_sizes_are_those_of_dinov3(name, width, depth):
    """All of them have heads of 64 channels, and so 16 periods."""
    config = VITS[f"vit_{name}"]
    assert (config.width, config.depth, config.width // config.heads) == (width, depth, 64)
