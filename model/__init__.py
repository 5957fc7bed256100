"""The multi-task ViT: backbone, task heads and pretrained weights."""

from model.heads import HEADS
from model.multitask import MultiTaskViT
from model.vit import VITS, ViT, ViTConfig
from model.weights import NORMALISATIONS, LoadReport, Weights, load_pretrained, read_weights

__all__ = [
    "HEADS",
    "NORMALISATIONS",
    "VITS",
    "LoadReport",
    "MultiTaskViT",
    "ViT",
    "ViTConfig",
    "Weights",
    "load_pretrained",
    "read_weights",
]
