"""The backbone of a finished run, as weights for other runs."""

from pathlib import Path

from torch import Tensor

from kernels import UserError
from model import NORMALISATIONS, Weights, holds_weights
from train.config.settings import Settings, layer
from train.run import checkpoint

ADAPTERS = ("lora_A", "lora_B", "routers")


def is_run(given: str | Path) -> bool:
    """Whether ``given`` is a folder, and not a copy of a repository of the Hugging Face Hub: that of a run, one of its
    checkpoints, or one of :mod:`train.export`."""
    folder = Path(given)
    own = any((folder / name).exists() for name in (checkpoint.SUMS, *checkpoint.STATES[:1]))
    return folder.is_dir() and (own or not holds_weights(folder))


def is_plain(folder: Path) -> bool:
    """Whether the run has a single task and no adapters, so that its backbone sees no tasks."""
    settings = settings_of(folder)
    return settings.moe == settings.decoder == "none" and not settings.lora_rank and len(settings.task_names) == 1


def weights_of_run(folder: Path) -> Weights:
    """The backbone of the checkpoint in ``folder``, by timm's names, without experts and LoRA.

    A backbone that was trained on one task alone was trained with that task's embedding, which every token has added
    to its position; here it is part of the position. Other embeddings are left out, as the adapters are.
    """
    settings = settings_of(folder)
    if settings.decoder != "none":
        raise UserError(f"{folder} holds a decoder and not its encoder: take {settings.pretrained} instead")
    if settings.of_timm:
        raise UserError(f"{folder} has a backbone of timm, which is not taken out of a run: give its weights instead")
    tensors = checkpoint.read_weights(folder)
    backbone = {
        name.removeprefix("vit.").replace(".base.", "."): tensor
        for name, tensor in tensors.items()
        if name.startswith("vit.") and not is_adapter(name)
    }
    family = "DINOv3" if "rope.periods" in backbone else "finished run's"
    with checkpoint.readable(folder):
        embedding = tensors["task_embed"]
        if len(embedding) == 1 and not settings.frozen_backbone and "pos_embed" in backbone:
            backbone["pos_embed"] = backbone["pos_embed"] + embedding[0]
        return Weights(folder, family, _normalisation(tensors["image_mean"]), backbone)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to LoRA or experts."""
    return name.endswith(ADAPTERS)


def settings_of(folder: Path) -> Settings:
    """Those that the checkpoint in ``folder`` was trained with."""
    return Settings(**layer(checkpoint.read_state(folder).settings, f"checkpoint {folder}"))


def _normalisation(mean: Tensor) -> str:
    """The key of NORMALISATIONS; each has another mean."""
    for key, (known, _) in NORMALISATIONS.items():
        if mean.flatten().allclose(mean.new_tensor(known)):
            return key
    raise ValueError(f"image_mean is {mean.flatten().tolist()}, of no known normalisation")
