"""``--pretrained`` with a DINOv3 file: trained, resumed, rebuilt from its checkpoint, and under a decoder."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from fastmoe_lora import LoRAMoE
from fastmoe_lora.layers import frozen_weights
from model import VITS
from train.cli import main
from train.predict import main as predict
from train.run import checkpoint
from train.run.build import load_checkpoint

MICRO = VITS["vit_micro"]
SCENES = ["--set", "scenes=8", "--set", "val_scenes=3", "--batch-size", "4", "--image-size", "16", "--workers", "0"]
OPTIONS = ["--tasks", "seg,edge", *SCENES]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A micro ViT of DINOv3's kind, patch 4, as Hugging Face writes it."""
    torch.manual_seed(0)
    config = DINOv3ViTConfig(
        hidden_size=MICRO.width, num_hidden_layers=MICRO.depth, num_attention_heads=MICRO.heads,
        intermediate_size=4 * MICRO.width, patch_size=4, num_register_tokens=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("dinov3")
    DINOv3ViTModel(config).save_pretrained(folder)
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def run(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "dinov3"
    assert main(["--pretrained", str(weights), "--steps", "2", *OPTIONS, "--out", str(out)]) == 0
    return out


def test_the_checkpoint_rebuilds_without_the_file(run, weights, monkeypatch):
    monkeypatch.setattr("train.run.build.read_weights", None)
    _, model, _ = load_checkpoint(checkpoint.find(run))
    vit = model.vit
    assert vit.pos_embed is None and vit.reg_token.shape[1] == 4 and vit.patch == 4
    assert vit.norm.eps == vit.blocks[0].norm1.eps == 1e-5
    assert torch.equal(vit.patch_embed.proj.weight, load_file(weights)["embeddings.patch_embeddings.weight"])


def test_the_fused_kernels_accept_its_ffn(run):
    _, model, _ = load_checkpoint(checkpoint.find(run))
    layers = [module for module in model.modules() if isinstance(module, LoRAMoE)]
    for layer in layers:
        for part in layer.children():
            part.requires_grad_(False)
    assert len(layers) == MICRO.depth and all(len(frozen_weights(layer)) == 2 for layer in layers)


def test_a_run_is_resumed_with_the_same_bits(run, weights, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    argv = ["--pretrained", str(weights), *OPTIONS]
    assert main([*argv, "--steps", "3", "--out", str(whole), "--checkpoint-every", "2", "--keep", "2"]) == 0
    assert main([*argv, "--steps", "3", "--out", str(parts), "--resume", str(whole / "step-2")]) == 0
    ours, theirs = (load_file(folder / "step-3" / "model.safetensors") for folder in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_photos_are_predicted(run, tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "photo.png")
    assert predict([str(run), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out" / "semseg" / "photo.png").size == (40, 24)


@pytest.mark.parametrize("source", ["weights", "run"])
def test_a_decoder_reads_its_features(source, tmp_path, request):
    encoder = str(request.getfixturevalue(source))
    argv = ["--decoder", "fgmoe", "--pretrained", encoder, "--steps", "1", *OPTIONS, "--out", str(tmp_path / "run")]
    assert main(argv) == 0
    _, model, _ = load_checkpoint(checkpoint.find(tmp_path / "run"))
    assert model.patch == 4
