"""Adapting a model in place: LoRA experts in every layer that a pattern names, plain LoRA in others."""

import copy
import math
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fastmoe_lora.config import MoEConfig
from fastmoe_lora.layers import Adapter, Adapters, LoRALinear, LoRAMoE, add_adapter, drop_adapters, lora_of
from fastmoe_lora.routing import Routing, Selection
from fastmoe_lora.sites import Patterns, adapted_layers, find_inner, find_linears, find_sites, plain_name, site_shape
from fastmoe_lora.swap import check_restorable, freeze_model, restore, swap, thaw
from kernels import KERNELS, UserError

POSITION_AUGMENTATION = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
# Parameters without weight decay although they are matrices: tokens and positions.
UNDECAYED = ("cls_token", "reg_token", "mask_token", "dist_token", "pos_embed", "position_embeddings")


def adapt(
    model: nn.Module,
    config: MoEConfig | str | None,
    tasks: int = 1,
    where: Patterns | None = None,
    *,
    lora_rank: int = 0,
    lora_where: Patterns | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    name: str = "",
    modules_to_save: Patterns = (),
    kernel: str = "auto",
    freeze: bool = True,
) -> Routing:
    """Put LoRA experts for ``tasks`` tasks into the modules of ``model`` that ``where`` matches, in place.

    ``config`` is a :class:`MoEConfig` or its text, such as ``"16/3/1/4"``; with None there are no experts. ``where`` is
    one or several patterns of module names (:func:`fastmoe_lora.sites.find_sites`): FFNs, or linear layers, as in
    ``"*.down_proj"``; by default the FFN of every block. With ``lora_rank``, the linear layers that ``lora_where``
    matches, by default those of attention, get plain LoRA. Every adapted layer starts as it was. Adapters are scaled by
    ``alpha`` / r if it is given, and ``dropout`` acts on their input in training.

    ``freeze`` freezes all parameters that were there before and the statistics of batch norms, except in the modules
    that ``modules_to_save`` matches, which files of adapters then contain. It also switches off the position
    augmentation that DINOv3 has in training mode, with a warning: the frozen layers would see positions that the
    adapters could not learn.

    With one task, a pass needs nothing else. With several, ``with routing.batch([8, 8, ...])`` around it says how many
    images of the task-major batch belong to each task; ``batch.mi_loss()`` is the regulariser to add, times 0.005.

    Called again with another ``name``, it adds a set of adapters, which :func:`use_adapters` selects. UserError if
    something cannot be adapted, or is already; the model is then unchanged.
    """
    layers = adapted_layers(model)
    if any(name in layer.adapters.sets for layer in layers.values()):
        known = f"has adapters {name!r}" if name else "is adapted"
        raise UserError(f"the model {known} already: call fastmoe_lora.remove(model) first, or give another name")
    config = MoEConfig.parse(config) if isinstance(config, str) else config
    _check(config, tasks, kernel, lora_rank)
    _check_options(alpha, dropout, name)
    # All names are looked up before anything changes.
    linears = find_linears(model, lora_where, "lora_where") if lora_rank else {}
    sites = find_sites(model, where) if config else {}
    kept = find_saved(model, modules_to_save)
    for site, module in {**linears, **sites}.items():
        other = LoRAMoE if site in linears else LoRALinear
        if site in linears and site in sites or isinstance(module, other):
            raise UserError(f"{site} would have both experts and plain LoRA: name it in where or in lora_where")
        saved = next((each for each in kept if f"{site}.".startswith(f"{each}.")), None)
        if saved is not None:
            raise UserError(f"{site} would be adapted and {saved} be trained as a whole: leave one of them out")
    if kept and layers:
        raise UserError(
            f"modules_to_save={modules_to_save!r} for a further set of adapters: modules have one value for all sets, "
            "and only the first set can train them"
        )
    selection = next((layer.adapters.selection for layer in layers.values()), Selection(name))
    if freeze and not layers:
        freeze_model(model, kept.values())
        _switch_off_position_augmentation(model)
    selection.saved[name] = tuple(plain_name(each) for each in kept)
    routing = Routing(tasks, kernel, selection=selection)
    options: dict[str, Any] = {"name": name, "alpha": alpha, "dropout": dropout, "routing": routing}
    for linear in linears.values():
        _add(linear, LoRALinear, selection, Adapter(**options), lora_rank)
    for layer, module in enumerate(sites.values()):
        assert config is not None
        adapter = Adapter(**options, config=config, layer=layer)
        _add(module, LoRAMoE, selection, adapter, config.experts * config.rank)
    _switch_off_fast_paths(model)
    return routing


def _check(config: MoEConfig | None, tasks: int, kernel: str, lora_rank: int) -> None:
    if tasks < 1:
        raise UserError(f"tasks={tasks}: a model has at least one task")
    if kernel not in KERNELS:
        raise UserError(f"unknown kernel {kernel!r}: choose among {', '.join(KERNELS)}")
    if lora_rank < 0 or not (config or lora_rank):
        raise UserError(f"config={config} and lora_rank={lora_rank} adapt nothing: give experts or a rank above 0")


def _check_options(alpha: float | None, dropout: float, name: str) -> None:
    if not is_scale(alpha):
        raise UserError(f"alpha={alpha!r}: adapters are scaled by alpha / r, a number")
    if not is_probability(dropout):
        raise UserError(f"dropout={dropout!r}: it is a probability, at least 0 and below 1")
    if name and not name.isidentifier():
        raise UserError(f"name={name!r}: a set of adapters has a name like that of a variable")


def is_scale(alpha: Any) -> bool:
    return alpha is None or type(alpha) in (int, float) and math.isfinite(alpha)


def is_probability(dropout: Any) -> bool:
    return type(dropout) in (int, float) and 0 <= dropout < 1


def _add(module: nn.Module, mixin: type, selection: Selection, adapter: Adapter, rank: int) -> None:
    if not isinstance(module, mixin):
        inner = find_inner(module, mixin is LoRAMoE)
        swap(module, mixin)
        module.adapters = Adapters(selection, inner)  # type: ignore[assignment]
    add_adapter(module, adapter, rank, site_shape(module))


def find_saved(model: nn.Module, patterns: Patterns) -> dict[str, nn.Module]:
    """The modules that are trained as a whole and belong to the files of adapters."""
    return find_sites(model, patterns, "modules_to_save", whole=True) if patterns else {}


def remove(model: nn.Module) -> None:
    """Undo :func:`adapt`: the classes, names and values of before. Frozen parameters stay frozen.

    UserError if a layer was changed since then, as parametrize and fully_shard do; nothing is undone then.
    """
    check_restorable(model)
    layers: dict[str, Any] = adapted_layers(model)
    for layer in layers.values():
        restore(layer)
        drop_adapters(layer)
    thaw(model)
    for module in model.modules():
        for attribute, value in module.__dict__.pop("before_adapt", {}).items():
            setattr(module, attribute, value)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add plain LoRA to the frozen weights, W + (alpha / r) B A, and :func:`remove` it.

    UserError for experts, whose gates depend on the token, and for weights that are not plain matrices.
    """
    layers: dict[str, Any] = adapted_layers(model)
    for name, layer in layers.items():
        if isinstance(layer, LoRAMoE):
            raise UserError(
                "a LoRA mixture of experts cannot be merged into the frozen weights, since its gates depend on the "
                "token: ship the model with save_adapters(model, path)"
            )
        if layer.adapters.inner is None or "weight" not in layer._parameters:
            kind = type(layer).__name__
            raise UserError(f"{name} is a {kind} whose weight is no plain parameter: LoRA cannot be merged into it")
    check_restorable(model)
    for layer in layers.values():
        adapter = layer.adapters.sets.get(layer.adapters.selection.name)
        if adapter is not None:
            a, b = lora_of(layer, adapter)
            layer.weight.add_((b.double() @ a.double()).to(layer.weight.dtype))
    remove(model)


def routing_of(model: nn.Module, name: str = "") -> Routing:
    """The routing of a set of adapters, of a copy of the model too. UserError if there is none."""
    for layer in adapted_layers(model).values():
        adapter = layer.adapters.sets.get(name)
        if adapter is not None:
            return adapter.routing
    raise UserError(f"the model has no adapters{f' {name!r}' if name else ''}: call fastmoe_lora.adapt first")


def use_adapters(model: nn.Module, name: str | None) -> AbstractContextManager[None]:
    """In this thread, passes within it use the set of adapters ``name``; None uses none of them."""
    layers: list[Any] = list(adapted_layers(model).values())
    if name is not None and not any(name in layer.adapters.sets for layer in layers):
        known = sorted({known for layer in layers for known in layer.adapters.sets})
        raise UserError(f"the model has no adapters {name!r}, but {', '.join(map(repr, known)) or 'none'}")
    selection = layers[0].adapters.selection if layers else Selection()
    return selection.use(name)


def adapters_off(model: nn.Module) -> AbstractContextManager[None]:
    """``with adapters_off(model):`` passes of this thread are those of the frozen model."""
    return use_adapters(model, None)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters for an optimiser of torch: weight decay on matrices, none on biases, norms, tokens,
    positions and what the model's ``no_weight_decay()`` names."""
    own: set[str] = getattr(model, "no_weight_decay", set)()
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name in own or any(part in UNDECAYED for part in name.split("."))
            (others if plain else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def print_trainable_parameters(model: nn.Module) -> None:
    """One line: how many parameters are trained, of how many."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains)
    print(f"trainable: {trained:,} of {total:,} parameters ({100 * trained / max(total, 1):.2f} %)")


def _set_aside(module: nn.Module, attribute: str, value: Any) -> None:
    """Set an attribute until :func:`remove`."""
    module.__dict__.setdefault("before_adapt", {}).setdefault(attribute, getattr(module, attribute))
    setattr(module, attribute, value)


def _switch_off_fast_paths(model: nn.Module) -> None:
    """PyTorch's transformer encoder reads the weights of its layers in evaluation, without calling them."""
    for module in model.modules():
        if adapted_layers(module):
            if isinstance(module, nn.TransformerEncoderLayer):
                _set_aside(module, "activation_relu_or_gelu", 0)
            if isinstance(module, nn.TransformerEncoder):
                _set_aside(module, "use_nested_tensor", False)


def _switch_off_position_augmentation(model: nn.Module) -> None:
    """Give each rotary embedding that augments positions a copy of its configuration, in which it does not.

    The configuration itself belongs to the caller, who may build other models of it.
    """
    found: dict[str, float] = {}
    for module in model.modules():
        if hasattr(module, "inv_freq") and hasattr(module, "config"):  # the rotary embedding is what reads the settings
            given = {name: getattr(module.config, name, None) for name in POSITION_AUGMENTATION}
            used = {name: value for name, value in given.items() if value is not None}
            if used:
                config: Any = copy.copy(module.config)
                for name in used:
                    setattr(config, name, None)
                _set_aside(module, "config", config)
                found |= used
    if found:
        settings = ", ".join(f"{name}={value}" for name, value in found.items())
        message = f"adapt() switched off the position augmentation of the frozen backbone ({settings})"
        warnings.warn(message, stacklevel=3)
