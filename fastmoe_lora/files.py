"""Files of adapters: what :func:`fastmoe_lora.adapt` added to a model, without the model.

A file is safetensors: for each adapted layer ``NAME.lora_A``, ``NAME.lora_B`` and, if it has experts, ``NAME.routers``,
with the names of the model in memory. Its metadata, text all of it:

    format      "fastmoe_lora adapters 1"
    moe         "N/k/S/r", or "" without experts                    gating      as in kernels.gating
    tasks       how many                                            lora_rank   of plain LoRA, 0 without
    where       names of the layers with experts, a JSON list       lora_where  those with plain LoRA
    layout      "expert-major": rows e r .. e r + r - 1 of A, and those columns of B, belong to expert e
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastmoe_lora.adapt import adapt, remove
from fastmoe_lora.config import MoEConfig
from fastmoe_lora.layers import LoRALinear, LoRAMoE
from fastmoe_lora.routing import Routing
from fastmoe_lora.sites import adapted_layers
from kernels import UserError

FORMAT, LAYOUT = "fastmoe_lora adapters 1", "expert-major"


@dataclass(frozen=True)
class Recipe:
    """The arguments of :func:`adapt` that a file stands for; the layers are named one by one, without patterns."""

    config: MoEConfig | None
    tasks: int
    where: list[str]
    lora_rank: int
    lora_where: list[str]

    @classmethod
    def of(cls, model: nn.Module) -> "Recipe":
        layers = adapted_layers(model)
        experts = {name: layer for name, layer in layers.items() if isinstance(layer, LoRAMoE)}
        loras = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALinear)}
        if not layers:
            raise UserError("the model has no adapters to save: call fastmoe_lora.adapt(model, ...) first")
        config, tasks = next(((layer.config, layer.routing.tasks) for layer in experts.values()), (None, 1))
        rank = len(next(iter(loras.values())).lora_A) if loras else 0
        names = [_before(name, experts) for name in loras]
        return cls(config, tasks, list(experts), rank, names)

    @property
    def metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "moe": str(self.config or ""),
            "gating": self.config.gating_name if self.config else "",
            "tasks": str(self.tasks),
            "where": json.dumps(self.where),
            "lora_rank": str(self.lora_rank),
            "lora_where": json.dumps(self.lora_where),
            "layout": LAYOUT,
        }

    @classmethod
    def parse(cls, metadata: dict[str, str]) -> "Recipe":
        """The inverse of :attr:`metadata`; KeyError or ValueError if it is not such."""
        if (metadata["format"], metadata["layout"]) != (FORMAT, LAYOUT):
            raise ValueError(f"format {metadata['format']!r} with layout {metadata['layout']!r}")
        config = MoEConfig.parse(metadata["moe"], metadata["gating"]) if metadata["moe"] else None
        where, lora_where = json.loads(metadata["where"]), json.loads(metadata["lora_where"])
        return cls(config, int(metadata["tasks"]), where, int(metadata["lora_rank"]), lora_where)


def save_adapters(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapters of ``model``, and nothing else of it, to ``path``; the file is complete or absent."""
    metadata = Recipe.of(model).metadata
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _adapters(model).items()}
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    try:
        save_file(tensors, partial, metadata)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def load_adapters(model: nn.Module, path: str | os.PathLike, kernel: str = "auto") -> Routing:
    """Adapt ``model``, which is as it was before :func:`adapt`, with the adapters in the file at ``path``.

    UserError if the file is not one of :func:`save_adapters`, or does not fit; the model then has no adapters.
    """
    recipe, tensors = _read(Path(path))
    names = {name for name, _ in model.named_modules()}
    absent = [name for name in [*recipe.where, *recipe.lora_where] if name not in names]
    if absent and not adapted_layers(model):  # of an adapted model, adapt() says so
        raise UserError(f"{path} does not fit the model, which has no {_first(absent)}")
    lora: dict[str, Any] = {"lora_rank": recipe.lora_rank, "lora_where": recipe.lora_where}
    routing = adapt(model, recipe.config, recipe.tasks, recipe.where, **lora, kernel=kernel)
    try:
        _copy(tensors, _adapters(model), path)
    except UserError:
        remove(model)
        raise
    return routing


def _read(path: Path) -> tuple[Recipe, dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            recipe = Recipe.parse(file.metadata() or {})
            return recipe, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is not a file of save_adapters: {error}") from None


@torch.no_grad()
def _copy(tensors: dict[str, Tensor], adapters: dict[str, nn.Parameter], path: str | os.PathLike) -> None:
    """Copy ``tensors`` to the parameters of the same names. UserError if names or shapes differ."""
    read = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    made = {name: tuple(parameter.shape) for name, parameter in adapters.items()}
    faults = [
        f"{name}, {read.get(name, 'absent')} in the file and {made.get(name, 'absent')} in the model"
        for name in made | read  # in the order of the model
        if read.get(name) != made.get(name)
    ]
    if faults:
        raise UserError(f"{path} does not fit the model: {_first(faults)}")
    for name, parameter in adapters.items():
        parameter.copy_(tensors[name])


def _first(faults: list[str]) -> str:
    rest = f"; {len(faults) - 3} more" if len(faults) > 3 else ""
    return "; ".join(faults[:3]) + rest


def _adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that :func:`adapt` added, by name."""
    return {
        f"{name}.{part}": getattr(layer, part)
        for name, layer in adapted_layers(model).items()
        for part in ("lora_A", "lora_B", "routers")
        if hasattr(layer, part)
    }


def _before(name: str, experts: Iterable[str]) -> str:
    """The name that a module had before the layers ``experts`` became LoRAMoEs, whose ``base`` it may be in."""
    for outer in experts:
        if f"{name}.".startswith(f"{outer}.base."):
            return outer + name.removeprefix(f"{outer}.base")
    return name
