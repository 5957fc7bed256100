"""The two kinds of adapted layers: plain LoRA on a linear layer, and a LoRA mixture-of-experts beside any module.

A layer is adapted in place (:mod:`fastmoe_lora.swap`): it keeps its class as a base class, its parameters and their
names, and gets ``lora_A``, ``lora_B`` and, with experts, ``routers`` beside them. A further set of adapters, called
NAME, is ``lora_A_NAME`` and so on. A pass reads the parameters, nothing else.
"""

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastmoe_lora.config import MoEConfig
from fastmoe_lora.routing import Routing, Selection
from kernels import TaskSegments, lora_moe, nvtx
from kernels.lora_linear import lora_linear
from kernels.reference import Linear

PARTS = ("lora_A", "lora_B", "routers")


@dataclass(frozen=True)
class Adapter:
    """What one set of adapters needs to know in one layer, beside its parameters."""

    name: str
    routing: Routing
    alpha: float | None = None  # the experts' sum is scaled by alpha / r; None is 1
    dropout: float = 0.0  # of the adapters' input in training
    config: MoEConfig | None = None  # of experts
    layer: int = 0  # among those of the routing
    names: dict[str, str] = field(init=False, compare=False)  # of its parts in the layer

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", {part: f"{part}_{self.name}" if self.name else part for part in PARTS})


@dataclass
class Adapters:
    """The sets of one layer by name, and the names of the FFN's parts that the kernels can compute: two linear layers
    with GELU between them; () if the layer is a linear layer itself, None if it must always be called. No set is called
    None, by which a selection switches all off."""

    selection: Selection
    inner: tuple[str, ...] | None = None
    sets: dict[str | None, Adapter] = field(default_factory=dict)


class LoRALinear:
    """y = W x + b + B A x on x (.., d_in); with W and b frozen by :func:`kernels.lora_linear.lora_linear`."""

    prefix = "LoRA"
    adapters: Adapters
    training: bool

    def forward(self, x: Tensor) -> Tensor:
        adapter = self.adapters.sets.get(self.adapters.selection.name)  # None names no set
        if adapter is None:
            return super().forward(x)  # type: ignore[misc]
        lora, drops = lora_of(self, adapter), adapter.dropout > 0 and self.training
        weights = None if drops else frozen_weights(self)
        if weights is not None:
            return lora_linear(x.reshape(-1, x.shape[-1]), weights[0], lora).view(*x.shape[:-1], len(weights[0][0]))
        y = super().forward(x)  # type: ignore[misc]
        a, b = (weight.to(y.dtype) for weight in lora)
        return y + F.linear(F.linear(F.dropout(x.to(y.dtype), adapter.dropout, drops), a), b)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        read_old_names(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    def extra_repr(self) -> str:
        ranks = [len(getattr(self, adapter.names["lora_A"])) for adapter in self.adapters.sets.values()]
        return f"{super().extra_repr()}, lora_rank={'/'.join(map(str, ranks))}"  # type: ignore[misc]


class LoRAMoE:
    """y = base(x) + sum_e g_e(x) B_e A_e x, with one linear router per task: equation (10) without the residual.

    ``base`` is the layer's own forward pass, from (.., d_in) to (.., d_out): a whole FFN, or one linear layer of it.
    The tasks share the experts; the open batch of the routing says which rows of x belong to which task. Base and
    experts are one operation if the base is a frozen FFN with GELU or a linear layer wider than its input, without
    hooks inside, and no token is padding. Else the base runs first and the experts beside it. For a padding token
    y = base(x).
    """

    prefix = "LoRAMoE"
    adapters: Adapters
    training: bool
    one_task: Tensor  # [0, 1]: the offsets of a pass of one task

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        adapter = self.adapters.sets.get(self.adapters.selection.name)  # None names no set
        if adapter is None:
            return super().forward(x, *rest, **named)  # type: ignore[misc]
        routing, config, rows = adapter.routing, adapter.config, x.shape[:-1].numel()
        assert config is not None
        batch, real = routing.current(), None
        segments = TaskSegments(self.one_task, 1, (rows,), rows)
        if batch is not None:
            segments, real = batch.segments(x)
        drops = adapter.dropout > 0 and self.training
        tokens = x.reshape(-1, x.shape[-1])
        weights = None if rest or named or drops or real is not None else frozen_weights(self)
        if weights is None:
            with nvtx.span("ffn"):
                output = super().forward(x, *rest, **named)  # type: ignore[misc]
            output = output.reshape(-1, output.shape[-1])
            tokens = F.dropout(tokens.to(output.dtype), adapter.dropout, drops)
        base = weights or (output if real is None else output[real])
        with nvtx.span("experts"):
            y, gates, mean_probs = lora_moe(
                tokens if real is None else tokens[real], base, lora_of(self, adapter),
                getattr(self, adapter.names["routers"]), segments, config.gating, routing.kernel, routing.deterministic,
            )  # fmt: skip
        if batch is not None or routing.statistics is not None:
            routing.record(batch, adapter.layer, mean_probs, gates, segments)
        return (y if real is None else output.index_copy(0, real, y)).view(*x.shape[:-1], y.shape[-1])

    def __setstate__(self, state: dict) -> None:
        """A copy belongs to the copy of its routing."""
        super().__setstate__(state)  # type: ignore[misc]
        for adapter in self.adapters.sets.values():
            adapter.routing.add_layer(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        read_old_names(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc]

    def extra_repr(self) -> str:
        sets = [(each.config, each.routing) for each in self.adapters.sets.values() if each.config]
        own = "; ".join(f"{config}, gating={config.gating_name}, tasks={routing.tasks}" for config, routing in sets)
        return f"{super().extra_repr()} experts={own}".strip()  # type: ignore[misc]


def add_adapter(layer: Any, adapter: Adapter, rank: int, shape: tuple[int, int]) -> None:
    """Register A (rank, d_in), kaiming-uniform, B (d_out, rank), zero, so that the layer starts as it was, and routers.

    All are fp32, whatever the type of the frozen weights and of the session.
    """
    layer.adapters.sets[adapter.name] = adapter
    make: dict[str, Any] = {"dtype": torch.float32, "device": next(chain(layer.parameters(), layer.buffers())).device}
    with torch.inference_mode(False):  # else they could never be trained
        values = {}
        if adapter.config is not None:
            columns = adapter.config.gating.router_columns(adapter.config.experts)
            values["routers"] = torch.empty(adapter.routing.tasks, columns, shape[0], **make).normal_(std=0.01)
            one_task = torch.tensor([0, 1], dtype=torch.int32, device=make["device"])
            layer.register_buffer("one_task", one_task, persistent=False)
            adapter.routing.add_layer(layer)
        values["lora_A"] = nn.init.kaiming_uniform_(torch.empty(rank, shape[0], **make), a=math.sqrt(5))
        values["lora_B"] = torch.zeros(shape[1], rank, **make)
        for part, value in values.items():
            layer.register_parameter(adapter.names[part], nn.Parameter(value))


def drop_adapters(layer: Any) -> None:
    """Forget all sets."""
    for adapter in layer.adapters.sets.values():
        for name in adapter.names.values():
            layer._parameters.pop(name, None)
    layer._buffers.pop("one_task", None)
    layer._non_persistent_buffers_set.discard("one_task")
    del layer.adapters


def lora_of(layer: Any, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """(A, B), B with the scale."""
    a, b = getattr(layer, adapter.names["lora_A"]), getattr(layer, adapter.names["lora_B"])
    if adapter.alpha is None:
        return a, b
    return a, b * (adapter.alpha / (adapter.config.rank if adapter.config else a.shape[0]))


def frozen_weights(layer: Any) -> tuple[Linear, ...] | None:
    """(weight, bias) of a linear layer or of the two of an FFN; None if one must be called or is trained."""
    inner = layer.adapters.inner
    if inner is None or inner and not plain_ffn(layer, inner):
        return None
    linears = (layer._modules[inner[0]], layer._modules[inner[2]]) if inner else (layer,)
    weights = tuple((linear.weight, linear.bias) for linear in linears)
    return None if any(w.requires_grad or b is not None and b.requires_grad for w, b in weights) else weights


def plain_ffn(ffn: nn.Module, inner: tuple[str, ...], drops: bool = True) -> bool:
    """Whether the parts of ``ffn`` are two linear layers and an exact GELU, by the names ``inner``, and others without
    effect, none with a hook. Asked for each pass, since parts may be replaced. Dropout has an effect if it ``drops``.
    """
    for name, part in ffn._modules.items():
        if part is None:
            continue
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return False
        if "forward" in part.__dict__:
            return False
        if isinstance(part, nn.GELU):
            known = name == inner[1] and part.approximate == "none"
        elif type(part).__name__ == "GELUActivation":  # of Hugging Face, which calls the function kept in `act`
            known = name == inner[1] and getattr(part, "act", None) is F.gelu
        elif name in inner:
            known = name != inner[1] and type(part) is nn.Linear
        else:
            inactive = isinstance(part, nn.Dropout) and not (drops and part.p and part.training)
            known = inactive or isinstance(part, nn.Identity)
        if not known:
            return False
    return True


def read_old_names(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename what version 0.1 wrote, where an adapted layer was ``base`` of a module around it."""
    old = f"{prefix}base."
    if "base" in layer._modules:
        return
    for name in [name for name in state_dict if name.startswith(old)]:
        state_dict[prefix + name.removeprefix(old)] = state_dict.pop(name)
