"""Adapting a model in place: a LoRA-MoE around every layer that a pattern names, plain LoRA on others."""

import copy
import warnings
from typing import Any

from torch import nn

from fastmoe_lora.config import MoEConfig
from fastmoe_lora.layers import LoRALinear, LoRAMoE
from fastmoe_lora.routing import Routing
from fastmoe_lora.sites import Patterns, adapted_layers, find_linears, find_sites, site_shape
from kernels import UserError

# The FFN of every block: timm's and our blocks.N.mlp, Hugging Face's layers.N.mlp, encoder.layer.N.mlp and so on.
FFN = "*.mlp"
# The linear layers of attention, by timm's names and by those of Hugging Face.
ATTENTION = ("*.attn.qkv", "*.attn.proj", "*.attention.?_proj", "*.self_attn.?_proj")
POSITION_AUGMENTATION = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")


def adapt(
    model: nn.Module,
    config: MoEConfig | str | None,
    tasks: int = 1,
    where: Patterns = FFN,
    *,
    lora_rank: int = 0,
    lora_where: Patterns = ATTENTION,
    kernel: str = "auto",
    freeze: bool = True,
) -> Routing:
    """Put a LoRA-MoE for ``tasks`` tasks around the modules of ``model`` that ``where`` matches, in place.

    ``config`` is a :class:`MoEConfig` or its text, such as ``"16/3/1/4"``; with None there are no experts. ``where`` is
    one or several patterns of module names (:func:`fastmoe_lora.sites.find_sites`): FFNs, or linear layers, as in
    ``"*.down_proj"``. With ``lora_rank``, the linear layers that ``lora_where`` matches get plain LoRA. Every adapted
    layer starts as the layer that it replaces.

    ``freeze`` freezes all parameters that were there before, so that only the adapters are trainable. It also switches
    off the position augmentation that DINOv3 has in training mode, with a warning: the frozen layers would see
    positions that the adapters could not learn.

    With one task, a pass needs nothing else. With several, ``routing.assign([8, 8, ...])`` says before it how many
    images of the task-major batch belong to each task. After it ``routing.mi_loss()`` is the regulariser to add, times
    0.005. UserError if nothing matches or the model is adapted already; the model is then unchanged.
    """
    if adapted_layers(model):
        raise UserError("the model is adapted already: call fastmoe_lora.remove(model) first")
    if isinstance(config, str):
        config = MoEConfig.parse(config)
    # All names are looked up before anything changes.
    linears = find_linears(model, lora_where, "lora_where") if lora_rank else {}
    sites = find_sites(model, where) if config else {}
    if freeze:
        model.requires_grad_(False)
        _switch_off_position_augmentation(model)
    for name, linear in linears.items():
        model.set_submodule(name, LoRALinear(linear, lora_rank))
    routing = Routing(tasks, kernel)
    if config:
        for layer, name in enumerate(sites):
            site = model.get_submodule(name)  # it may be one of the LoRALinears
            model.set_submodule(name, LoRAMoE(site, site_shape(site), config, routing, layer))
    return routing


def remove(model: nn.Module) -> None:
    """Undo :func:`adapt`: the modules, names and values of before. Frozen parameters stay frozen."""
    for kind in (LoRALinear, LoRAMoE):  # a LoRALinear may be inside a LoRAMoE, whose removal changes its name
        for name, layer in adapted_layers(model).items():
            if isinstance(layer, kind):
                model.set_submodule(name, layer.plain() if isinstance(layer, LoRALinear) else layer.base)
    for module in model.modules():
        if "config_before_adapt" in module.__dict__:
            module.config = module.__dict__.pop("config_before_adapt")


def merge(model: nn.Module) -> None:
    """Always a UserError: a mixture of experts has no merged weights."""
    raise UserError(
        "a LoRA mixture of experts cannot be merged into the frozen weights, since its gates depend on the token: "
        "ship the model with save_adapters(model, path)"
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters for an optimiser of torch: weight decay on matrices, none on biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def _switch_off_position_augmentation(model: nn.Module) -> None:
    """Give each rotary embedding that augments positions a copy of its configuration, in which it does not.

    The configuration itself belongs to the caller, who may build other models of it.
    """
    found: dict[str, float] = {}
    for module in model.modules():
        if hasattr(module, "inv_freq") and hasattr(module, "config"):  # the rotary embedding is what reads the settings
            config: Any = module.config
            given = {name: getattr(config, name, None) for name in POSITION_AUGMENTATION}
            used = {name: value for name, value in given.items() if value is not None}
            if used:
                module.__dict__["config_before_adapt"] = config
                module.config = copy.copy(config)
                for name in used:
                    setattr(module.config, name, None)
                found |= used
    if found:
        settings = ", ".join(f"{name}={value}" for name, value in found.items())
        message = f"adapt() switched off the position augmentation of the frozen backbone ({settings})"
        warnings.warn(message, stacklevel=3)
