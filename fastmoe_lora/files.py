"""Files of adapters: what :func:`fastmoe_lora.adapt` added to a model, without the model.

A file is safetensors: for each adapted layer ``NAME.lora_A``, ``NAME.lora_B`` and, if it has experts, ``NAME.routers``,
and the parameters and buffers of ``modules_to_save``. Names are those of the model, without what torch.compile or
DistributedDataParallel put before them. The metadata, text all of it:

    format      "fastmoe_lora adapters 2"
    base        the model's class and, if known, its name on the Hub, as JSON; files are for that model alone
    moe         "N/k/S/r", or "" without experts                    gating      as in kernels.gating
    tasks       how many                                            lora_rank   of plain LoRA, 0 without
    where       names of the layers with experts, a JSON list       lora_where  those with plain LoRA
    saved       those of modules_to_save                            alpha, dropout     as JSON
    layout      "expert-major": rows e r .. e r + r - 1 of A, and those columns of B, belong to expert e
"""

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastmoe_lora.adapt import adapt, is_probability, is_scale, routing_of
from fastmoe_lora.config import MoEConfig
from fastmoe_lora.hub import fetch, is_repository
from fastmoe_lora.layers import PARTS, LoRAMoE
from fastmoe_lora.routing import Routing
from fastmoe_lora.sites import adapted_layers, linears, plain_name, site_shape
from kernels import UserError

FORMATS, LAYOUT = ("fastmoe_lora adapters 2", "fastmoe_lora adapters 1"), "expert-major"
HUB_FILE = "adapters.safetensors"


@dataclass(frozen=True)
class Recipe:
    """The arguments of :func:`adapt` that a file stands for; the layers are named one by one, without patterns."""

    config: MoEConfig | None
    tasks: int
    where: list[str]
    lora_rank: int
    lora_where: list[str]
    saved: list[str]
    alpha: float | None
    dropout: float

    @classmethod
    def of(cls, model: nn.Module, name: str) -> "Recipe":
        layers: dict[str, Any] = _layers(model, name)
        if not layers:
            raise UserError("the model has no adapters to save: call fastmoe_lora.adapt(model, ...) first")
        experts = [site for site, layer in layers.items() if isinstance(layer, LoRAMoE)]
        loras = [site for site in layers if site not in experts]
        first = next(iter(layers.values())).adapters
        config, tasks = None, 1
        if experts:
            adapter = layers[experts[0]].adapters.sets[name]
            config, tasks = adapter.config, adapter.routing.tasks
        rank = len(_parameter(layers[loras[0]], name, "lora_A")) if loras else 0
        adapter = first.sets[name]
        saved = list(first.selection.saved.get(name, ()))
        return cls(config, tasks, experts, rank, loras, saved, adapter.alpha, adapter.dropout)

    @property
    def metadata(self) -> dict[str, str]:
        return {
            "format": FORMATS[0],
            "moe": str(self.config or ""),
            "gating": self.config.gating_name if self.config else "",
            "tasks": str(self.tasks),
            "where": json.dumps(self.where),
            "lora_rank": str(self.lora_rank),
            "lora_where": json.dumps(self.lora_where),
            "saved": json.dumps(self.saved),
            "alpha": json.dumps(self.alpha),
            "dropout": json.dumps(self.dropout),
            "layout": LAYOUT,
        }

    @classmethod
    def parse(cls, metadata: dict[str, str]) -> "Recipe":
        """The inverse of :attr:`metadata`; KeyError or ValueError if it is not such."""
        if metadata["format"] not in FORMATS or metadata["layout"] != LAYOUT:
            raise ValueError(f"format {metadata['format']!r} with layout {metadata['layout']!r}")
        config = MoEConfig.parse(metadata["moe"], metadata["gating"]) if metadata["moe"] else None
        where, lora_where, saved = (json.loads(metadata.get(key, "[]")) for key in ("where", "lora_where", "saved"))
        lists = [names for names in (where, lora_where, saved) if isinstance(names, list)]
        if len(lists) < 3 or not all(isinstance(each, str) for names in lists for each in names):
            raise ValueError("names of layers that are no lists of names")
        if both := set(where) & set(lora_where):
            raise ValueError(f"{both.pop()} has both experts and plain LoRA, which version 0.1 alone could read")
        tasks, rank = int(metadata["tasks"]), int(metadata["lora_rank"])
        alpha, dropout = json.loads(metadata.get("alpha", "null")), json.loads(metadata.get("dropout", "0"))
        if tasks < 1 or rank < 0 or not is_scale(alpha) or not is_probability(dropout):
            raise ValueError(f"tasks {tasks}, lora_rank {rank}, alpha {alpha!r}, dropout {dropout!r}")
        return cls(config, tasks, where, rank, lora_where, saved, alpha, dropout)


def save_adapters(model: nn.Module, path: str | os.PathLike, name: str = "") -> None:
    """Write a set of adapters of ``model``, and nothing else of it, to ``path``; the file is complete or absent, also
    where several processes write it. A link stays one, its target is written."""
    metadata = Recipe.of(model, name).metadata | {"base": json.dumps(_base(model))}
    tensors = {key: _whole(tensor).contiguous() for key, tensor in _tensors(model, name).items()}
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name[:100]}.{os.getpid()}.{secrets.token_hex(4)}.partial")
    try:
        save_file(tensors, partial, metadata)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {target}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _whole(tensor: Any) -> Tensor:
    """A copy on the CPU; of what fully_shard divided among processes, all of it, for which all of them must call."""
    return (tensor.full_tensor() if _is_sharded(tensor) else tensor).detach().to("cpu", copy=True)


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # to import the class takes seconds


def load_adapters(model: nn.Module, path: str | os.PathLike, kernel: str = "auto", name: str = "") -> Routing:
    """Adapt ``model`` with the adapters in the file at ``path``, or in the repository ``owner/name`` of the Hub.

    If it has a set of adapters ``name`` already, made by the same recipe, that set gets the values. UserError if the
    file is not one of :func:`save_adapters`, is of another model, or does not fit; the model is then as it was.
    """
    if is_repository(str(path)):
        found = fetch(str(path), HUB_FILE)
        if found is None:
            raise UserError(f"{path} on the Hugging Face Hub has no {HUB_FILE}")
        path = found
    recipe, base, tensors = _read(Path(path))
    own = _base(model)
    for key, meaning in (("class", "class"), ("hub", "weights")):
        if base.get(key, own.get(key)) != own.get(key, base.get(key)):
            raise UserError(f"{path} is for a model of {meaning} {base[key]}, not {own[key]}")
    _check_fit(tensors, _shapes(model, recipe, path), path)
    if not _layers(model, name):
        routing = adapt(
            model, recipe.config, recipe.tasks, recipe.where, lora_rank=recipe.lora_rank, lora_where=recipe.lora_where,
            alpha=recipe.alpha, dropout=recipe.dropout, modules_to_save=recipe.saved, name=name, kernel=kernel,
        )  # fmt: skip
    elif Recipe.of(model, name) != recipe:
        raise UserError(f"{path} was made by another recipe than the model's adapters: remove() them first")
    else:
        routing = routing_of(model, name)
    targets = _tensors(model, name)
    if any(map(_is_sharded, targets.values())):
        raise UserError(f"{path} cannot be loaded into a model after fully_shard: load it before")
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(tensors[key])
    return routing


def _base(model: nn.Module) -> dict[str, str]:
    """What a file says of its model; wrappers do not count."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    kind = type(model)
    if kind.__name__ == f"FSDP{kind.__bases__[-1].__name__}":  # what fully_shard makes of a class
        kind = kind.__bases__[-1]
    found = {"class": kind.__name__}
    hub = getattr(getattr(model, "config", None), "_name_or_path", "")
    return found | ({"hub": hub} if isinstance(hub, str) and is_repository(hub) else {})


def _read(path: Path) -> tuple[Recipe, dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            recipe, base = Recipe.parse(metadata), dict(json.loads(metadata.get("base", "{}")))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, it is no dict
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file of save_adapters: {error}") from None
    for key, tensor in tensors.items():
        counts = not tensor.is_floating_point() and key.rpartition(".")[2] not in PARTS  # as batch norms do
        if not (counts or tensor.is_floating_point() and tensor.isfinite().all()):
            raise UserError(f"{path} holds {key} of type {tensor.dtype} with values that are no finite numbers")
    for outer in recipe.where:  # names of version 0.1
        tensors = {
            outer + key.removeprefix(f"{outer}.base") if key.startswith(f"{outer}.base.") else key: tensor
            for key, tensor in tensors.items()
        }
    return recipe, base, tensors


def _shapes(model: nn.Module, recipe: Recipe, path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Those that a file of ``recipe`` has for ``model``, which need not be adapted. UserError if it lacks a module."""
    modules = {plain_name(site): module for site, module in model.named_modules()}
    wanted = [*recipe.where, *recipe.lora_where, *recipe.saved]
    absent = [site for site in wanted if site not in modules or site not in recipe.saved and not linears(modules[site])]
    if absent:
        raise UserError(f"{path} does not fit the model, which has no {_first(absent)}")
    shapes: dict[str, tuple[int, ...]] = {}
    for site, module in modules.items():
        if site in recipe.saved:
            shapes |= {f"{site}.{key}": tuple(tensor.shape) for key, tensor in module.state_dict().items()}
        if site not in recipe.where and site not in recipe.lora_where:
            continue
        (d_in, d_out), rank = site_shape(module), recipe.lora_rank
        if site in recipe.where and recipe.config:
            rank = recipe.config.experts * recipe.config.rank
            columns = recipe.config.gating.router_columns(recipe.config.experts)
            shapes[f"{site}.routers"] = recipe.tasks, columns, d_in
        shapes |= {f"{site}.lora_A": (rank, d_in), f"{site}.lora_B": (d_out, rank)}
    return shapes


def _check_fit(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], path: str | os.PathLike) -> None:
    """UserError if the tensors of the file at ``path`` have other names or shapes than those of the model."""
    read = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    faults = [
        f"{name}, {read.get(name, 'absent')} in the file and {shapes.get(name, 'absent')} in the model"
        for name in shapes | read  # in the order of the model
        if read.get(name) != shapes.get(name)
    ]
    if faults:
        raise UserError(f"{path} does not fit the model: {_first(faults)}")


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _layers(model: nn.Module, name: str) -> dict[str, Any]:
    """The layers with that set of adapters, by their plain names."""
    layers: dict[str, Any] = adapted_layers(model)
    return {plain_name(site): layer for site, layer in layers.items() if name in layer.adapters.sets}


def _parameter(layer: Any, name: str, part: str) -> Tensor:
    return getattr(layer, layer.adapters.sets[name].names[part])


def _tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Everything that a file of this set holds, by the names in the file."""
    layers = _layers(model, name)
    found = {
        f"{site}.{part}": _parameter(layer, name, part)
        for site, layer in layers.items()
        for part in PARTS
        if hasattr(layer, layer.adapters.sets[name].names[part])
    }
    saved = next((layer.adapters.selection.saved.get(name, ()) for layer in layers.values()), ())
    for site, module in model.named_modules():
        if plain_name(site) in saved:
            found |= {f"{plain_name(site)}.{key}": tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    return found
