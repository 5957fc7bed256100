"""The multi-task ViT: backbone, task heads and pretrained weights."""

from model.heads import HEADS
from model.multitask import MultiTaskViT
from model.vit import VITS, ViT, ViTConfig
from model.weights import LoadReport, load_pretrained

__all__ = ["HEADS", "VITS", "LoadReport", "MultiTaskViT", "ViT", "ViTConfig", "load_pretrained"]
