"""From settings to the objects of a run: data sets and model."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastmoe_lora import adapt
from fastmoe_lora.ranks import world_size
from kernels import UserError, resolve_kernel
from model import (
    NORMALISATIONS,
    VITS,
    Backbone,
    EncoderDecoder,
    ExportedModel,
    FGMoE,
    MLoRE,
    MultiTaskModel,
    MultiTaskViT,
    Plain,
    TimmBackbone,
    ViT,
    ViTConfig,
    Weights,
    derive_config,
    is_repository,
    load_pretrained,
    load_program,
    read_source,
    read_weights,
)
from model.decoders import Decoder, Frame
from train.config.settings import Settings, layer
from train.datasets.base import DataSet, open_dataset
from train.datasets.sampler import one_composition
from train.output.scores import DELTA, headlines
from train.run import checkpoint, optimizers
from train.run.backbone import is_plain, is_run, weights_of_run
from train.tasks import Classes, output_channels

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by --precision


def build_device(settings: Settings) -> torch.device:
    """The device asked for, by default a GPU where there is one."""
    name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no NVIDIA GPU here; use --device cpu")
    device = torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)
    resolve_kernel(settings.kernel, device)
    return device


def kernel_of(settings: Settings, device: torch.device) -> str | None:
    """The implementation of the experts on ``device``; None for a model without experts that are gated."""
    gated = settings.moe != "none" or settings.decoder == "fgmoe"
    return resolve_kernel(settings.kernel, device) if gated else None


def require_possible(settings: Settings, device: torch.device) -> None:
    """UserError for settings that cannot work together on ``device`` and with so many processes."""
    least = settings.accumulate * world_size()
    if least > settings.batch_size:
        raise UserError(
            f"--accumulate {settings.accumulate} in {world_size()} processes needs a batch of {least} images at least, "
            f"not {settings.batch_size}"
        )
    optimizers.require_known(settings.optimizer)
    if settings.tracker == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("--tracker wandb needs the package wandb: pip install wandb, or choose --tracker tensorboard")
    known = [name for name in headlines() if name.partition("/")[0] in (DELTA, *settings.task_names)]
    if settings.keep_best and settings.keep_best not in known:
        raise UserError(f"--keep-best {settings.keep_best}: choose among {', '.join(known)}")
    if settings.routing_every and (settings.compile or settings.cuda_graphs):
        raise UserError("routing_every records what a compiled or graphed step hides: leave out one of them")
    if settings.cuda_graphs and device.type != "cuda":
        raise UserError("--cuda-graphs needs a GPU: leave it out")
    if settings.cuda_graphs and (world_size() > 1 or settings.compile):
        raise UserError("--cuda-graphs is for one process without --compile: leave one of them out")
    if settings.cuda_graphs and settings.optimizer != "adamw":
        raise UserError(f"--cuda-graphs records the step of AdamW, not {settings.optimizer}: leave out one of them")
    if settings.cuda_graphs and (settings.precision == "fp16" or settings.on_nonfinite == "skip"):
        raise UserError("--cuda-graphs cannot record a step that may be skipped: use bf16 and --on-nonfinite stop")


def build_data(settings: Settings) -> tuple[DataSet, DataSet]:
    """(train, val). UserError for --cuda-graphs where training batches differ in composition."""
    train, val = (open_dataset(settings.source, split) for split in ("train", "val"))
    if settings.cuda_graphs and not one_composition([len(group) for group in train.groups], settings.batch_size):
        raise UserError(
            f"--cuda-graphs needs batches of one composition, and {len(train.groups)} groups of equally labelled "
            f"images do not share {settings.batch_size} places alike in every batch: leave it out"
        )
    if train.origin:
        print(f"tree      {train.origin}")
    return train, val


def build_model(settings: Settings, classes: Classes, counted: bool = False) -> MultiTaskModel:
    """The model on the CPU: the adapted multi-task ViT, whose backbone is frozen if it was pretrained and else trained
    in full, or a decoder on a frozen encoder. A model that is only ``counted`` may lack the encoder's weights."""
    torch.manual_seed(settings.seed)
    if settings.decoder != "none":
        model: MultiTaskModel = _build_decoder(settings, classes, counted)
    else:
        vit, normalisation = _build_backbone(settings)
        model = _adapt(vit, settings, classes)
        model.set_normalisation(*NORMALISATIONS[normalisation])
    store_frozen(model, COMPUTE[settings.precision])
    return model


def rebuild_model(settings: Settings, classes: Classes, tensors: dict[str, Tensor]) -> MultiTaskModel:
    """The model of a checkpoint from its settings and ``tensors``. Only a decoder needs the pretrained weights again,
    since its checkpoint does not hold them."""
    if settings.decoder != "none":
        model: MultiTaskModel = _build_decoder(settings, classes)
    else:
        vit = _empty_like(tensors, settings).requires_grad_(not settings.frozen_backbone)
        model = _adapt(vit, settings, classes)
    checkpoint.load_weights(model, tensors)
    return model.eval()


def load_checkpoint(folder: Path) -> tuple[Settings, MultiTaskModel, checkpoint.State]:
    """(settings, model, state) of a checkpoint, for evaluation with this machine's device and kernels."""
    settings, model, state = load_on_cpu(folder, kernel="auto")
    return settings, model.to(build_device(settings)), state


def load_exported(path: Path) -> tuple[Settings, ExportedModel, int]:
    """(settings, model, step) of a .pt2 file of :mod:`train.export`, which must be trusted: it can run any code."""
    program, config = load_program(path)
    state = json.loads(config)
    checkpoint.require_registered(path, state["settings"], state["commands"])
    settings = Settings(**layer(state["settings"], str(path)))
    return settings, ExportedModel(program, settings.task_names), state["step"]


def load_on_cpu(folder: Path, kernel: str) -> tuple[Settings, MultiTaskModel, checkpoint.State]:
    """(settings, model, state) of a checkpoint, with the given implementation of the experts."""
    state = checkpoint.read_state(folder)
    settings = replace(Settings(**layer(state.settings, f"checkpoint {folder}")), device="", kernel=kernel)
    weights = checkpoint.read_weights(folder)
    with checkpoint.readable(folder):
        return settings, rebuild_model(settings, settings.source.classes, weights), state


def _build_backbone(settings: Settings) -> tuple[Backbone, str]:
    """(the backbone, frozen if it was pretrained; the name of its normalisation)."""
    return _build_timm(settings) if settings.of_timm else _build_vit(settings)


def _build_timm(settings: Settings) -> tuple[Backbone, str]:
    backbone = TimmBackbone(settings.model, settings.image_shape)
    normalisation, usual = settings.normalisation or backbone.normalisation, backbone.normalisation
    if not normalisation:
        raise UserError(f"{settings.model} declares a mean and deviation of its own: give --set normalisation=NAME")
    if settings.pretrained:
        if is_run(settings.pretrained):
            raise UserError(f"--pretrained {settings.pretrained} is a run, and {settings.model} takes a file or a name")
        source = read_source(settings.pretrained)
        report = backbone.load(source)
        overridden = f"; overridden: {normalisation} normalisation" if normalisation != usual else ""
        print(f"weights   {source.path}: {report}{overridden}")
        backbone.requires_grad_(settings.train_backbone)
    return backbone, normalisation


def _empty_like(tensors: dict[str, Tensor], settings: Settings) -> Backbone:
    """The backbone of a checkpoint's tensors, to be filled with them."""
    if settings.of_timm:
        return TimmBackbone(settings.model, settings.image_shape)
    backbone = {name.removeprefix("vit."): tensor for name, tensor in tensors.items() if name.startswith("vit.")}
    config = derive_config(VITS[settings.model], backbone, rope="rope.periods" in backbone)
    return _empty_vit(config, settings)


def _build_vit(settings: Settings) -> tuple[Backbone, str]:
    weights = _weights(settings.pretrained) if settings.pretrained else None
    config = VITS[settings.model]
    vit = _empty_vit(weights.adjust(config) if weights else config, settings)
    normalisation = settings.normalisation or (weights.normalisation if weights else "inception")
    if weights:
        report = load_pretrained(vit, weights)
        if report.missing:
            raise UserError(f"{settings.pretrained} lacks parameters of {settings.model}: {', '.join(report.missing)}")
        overridden = f"; overridden: {normalisation} normalisation" if settings.normalisation else ""
        print(f"weights   {weights.path}: {report}{overridden}")
        vit.requires_grad_(settings.train_backbone)
    return vit, normalisation


def _weights(pretrained: str) -> Weights:
    """Those of a file, of a repository or of the backbone of a finished run."""
    return weights_of_run(checkpoint.find(Path(pretrained))) if is_run(pretrained) else read_weights(pretrained)


def _empty_vit(config: ViTConfig, settings: Settings) -> ViT:
    """A ViT whose position embeddings cover a square of the images' height; it resamples them to their shape."""
    height, width = settings.image_shape
    if width % config.patch and not height % config.patch:
        raise UserError(
            f"image size {height}: images are {width} pixels wide, which is not a multiple of the patch size "
            f"{config.patch}"
        )
    return ViT(config, height)


def store_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen weights of products in the type that they are multiplied in: half the memory, and no copy per
    step. What is trained stays fp32, and so do norms and position embeddings."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.requires_grad:
            for parameter in (module.weight, module.bias):
                if parameter is not None:
                    parameter.data = parameter.data.to(dtype)


def _adapt(vit: Backbone, settings: Settings, classes: Classes) -> MultiTaskViT:
    """Adds LoRA, experts and heads to ``vit``, whose own parameters stay frozen or trained as they are."""
    moe, rank, routing = settings.moe_config, settings.lora_rank, None
    if moe or rank:
        layers = [pattern for name in settings.lora_layers for pattern in vit.lora_layers[name]]
        if rank and not layers:
            raise UserError(
                f"{settings.model} has no layer for lora_targets {settings.lora_targets}: give --set lora_rank=0 or "
                "--set lora_targets=fc1,fc2"
            )
        lora: dict[str, Any] = {"lora_rank": rank, "lora_where": layers}
        tasks, where = len(settings.task_names), vit.sites[settings.site]
        routing = adapt(vit, moe, tasks, where, **lora, kernel=settings.kernel, freeze=False)
        routing.deterministic = settings.deterministic
    return MultiTaskViT(vit, output_channels(settings.task_names, classes), settings.head, routing if moe else None)


DECODERS: dict[str, Callable[[Settings, Any, Frame], Decoder]] = {
    "fgmoe": lambda s, config, frame: FGMoE(frame, config, s.fg_mixer, s.fg_global, s.kernel),
    "plain": lambda s, config, frame: Plain(frame, config, s.fg_mixer, s.fg_global),
    "mlore": lambda s, config, frame: MLoRE(frame, config),
}


def _build_decoder(settings: Settings, classes: Classes, counted: bool = False) -> EncoderDecoder:
    """A fresh decoder on the encoder in ``pretrained``: weights, or a run, whose adapters and task embeddings it keeps
    where it has any."""
    source = Path(settings.pretrained)
    if not (settings.pretrained or counted):
        raise UserError(
            f"--decoder {settings.decoder} needs a trained encoder: give --pretrained FILE, or the folder of a run"
        )
    if not (source.exists() or is_repository(settings.pretrained)):
        raise UserError(f"the encoder's weights are not at {source}: bring them there, a decoder does not contain them")
    adapted = bool(settings.pretrained) and is_run(source) and not is_plain(checkpoint.find(source))
    encoder, normalisation = (_encoder_of_run(settings), "") if adapted else _build_backbone(settings)
    channels = output_channels(settings.task_names, classes)
    rows, columns = (side // encoder.patch for side in settings.image_shape)
    make = partial(DECODERS[settings.decoder], settings, settings.decoder_config)
    model = EncoderDecoder(encoder, channels, (rows, columns), make)
    if normalisation:
        model.set_normalisation(*NORMALISATIONS[normalisation])
    return model


def _encoder_of_run(settings: Settings) -> MultiTaskViT:
    folder = checkpoint.find(Path(settings.pretrained))
    theirs, model, _ = load_on_cpu(folder, settings.kernel)
    if not isinstance(model, MultiTaskViT):
        raise UserError(f"{folder} holds a decoder: give --pretrained a run without --decoder")
    if theirs.model != settings.model:
        raise UserError(f"the encoder in {folder} is a {theirs.model}: give --model {theirs.model}")
    return model
