"""Files that transformers writes give the features of transformers, for every ViT of the guide's table."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTModel
from transformers import ViTConfig as TheirConfig

from model import ViT, ViTConfig, load_pretrained, read_weights

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}
MODELS = {
    "Hugging Face ViT": lambda: ViTModel(TheirConfig(**SIZES, intermediate_size=96)),
    "DINOv2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "DINOv2 with registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES)),
}


@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_transformers(name, tmp_path):
    torch.manual_seed(0)
    theirs = MODELS[name]().eval().requires_grad_(False)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3).add_(1.0 if parameter.ndim == 1 else 0.0)
    theirs.save_pretrained(tmp_path)
    weights = read_weights(tmp_path / "model.safetensors")
    assert weights.family == name.removesuffix(" with registers")
    ours = ViT(weights.adjust(ViTConfig(width=24, depth=2, heads=3)), 16).eval()
    assert load_pretrained(ours, weights).missing == ()
    images = torch.randn(2, 3, 16, 16)
    # ViTModel's norms have eps 1e-12 and ours, as timm's, 1e-6: 5e-7 of each normalised value, of which there are many.
    with torch.inference_mode():
        expected = theirs(images).last_hidden_state
        torch.testing.assert_close(ours.encode(ours.embed(images)), expected, rtol=0, atol=2e-5)
