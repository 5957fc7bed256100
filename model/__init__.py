"""The multi-task models: an adapted backbone with task heads, or a frozen encoder with a decoder; weights."""

from fastmoe_lora.hub import holds_weights, is_repository
from model.backbone import Backbone, Level
from model.base import MultiTaskModel
from model.converting import convert_source, timm_layout
from model.decoders import EncoderDecoder, FGConfig, FGMoE, MLoRE, MLoREConfig, Plain
from model.exporting import ExportedModel, export_program, load_program, save_program
from model.heads import HEADS
from model.multitask import MultiTaskViT
from model.timm_backbone import TimmBackbone
from model.vit import VITS, ViT, ViTConfig
from model.weights import NORMALISATIONS, LoadReport, Weights, derive_config, load_pretrained, read_source, read_weights

__all__ = [
    "HEADS",
    "Backbone",
    "EncoderDecoder",
    "ExportedModel",
    "FGConfig",
    "FGMoE",
    "MLoRE",
    "MLoREConfig",
    "MultiTaskModel",
    "Plain",
    "NORMALISATIONS",
    "VITS",
    "Level",
    "LoadReport",
    "MultiTaskViT",
    "TimmBackbone",
    "ViT",
    "ViTConfig",
    "Weights",
    "convert_source",
    "derive_config",
    "export_program",
    "holds_weights",
    "is_repository",
    "load_pretrained",
    "load_program",
    "read_source",
    "read_weights",
    "save_program",
    "timm_layout",
]
