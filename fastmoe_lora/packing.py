"""Packing: copies of frozen weights and adapters in the layout and type that the kernels read.

An eager pass repacks its layers itself. A compiled or captured pass reads what was packed last, so its weights must be
packed first, after every change of theirs:

    packing = Packing(model)            # once, after adapt()
    packing.pack()                      # before every compiled or captured pass

Nothing tells whether adapters have changed (fused optimisers and ``.data`` writes leave a tensor's version as it is),
so they are copied once per pass; the frozen weights are copied only when they change.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels.packed import Packed, columns_pay, fill_all
from kernels.tiles import stacks_weights

# Names of an FFN's first linear layer, activation and second linear layer: timm's, and Hugging Face's two.
FFN_NAMES = (("fc1", "act", "fc2"), ("fc1", "activation_fn", "fc2"), ("up_proj", "act_fn", "down_proj"))


def fusible(module: nn.Module) -> tuple[nn.Linear, ...]:
    """The linear layers of a module that the fused kernels can compute, in order; empty for any other module.

    Such a module is an FFN with one of FFN_NAMES, an exact GELU between two linear layers, in which nothing else has an
    effect, or a linear layer that is wider than its input.
    """
    if type(module) is nn.Linear:
        return (module,) if columns_pay(module.in_features, module.out_features) else ()
    # Not named_children(), which takes the host four times as long, in every pass.
    children = {name: child for name, child in module._modules.items() if child is not None}
    names = next((names for names in FFN_NAMES if children.keys() >= set(names)), None)
    if names is None:
        return ()
    inert = [child for name, child in children.items() if name not in names]
    fc1, act, fc2 = (children[name] for name in names)
    if (
        type(fc1) is nn.Linear
        and type(fc2) is nn.Linear
        and all(parameter is None for parameter in module._parameters.values())
        and _is_exact_gelu(act)
        and all(isinstance(child, nn.Identity) or isinstance(child, nn.Dropout) and child.p == 0 for child in inert)
    ):
        return fc1, fc2
    return ()


def _is_exact_gelu(act: nn.Module) -> bool:
    """Whether ``act`` is torch's GELU, or that of Hugging Face, which calls the function kept in ``act``."""
    if isinstance(act, nn.GELU):
        return act.approximate == "none"
    return type(act).__name__ == "GELUActivation" and getattr(act, "act", None) is nn.functional.gelu


Parts = tuple[Sequence[nn.Linear], tuple[Tensor, ...]]  # frozen linear layers; adapters (A, B) or (A, B, routers)


def weights_of(linears: Sequence[nn.Linear]) -> list[Tensor]:
    """Weights and biases."""
    return [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]


class PackedLayer:
    """The packed weights of one layer."""

    def __init__(self) -> None:
        self.packed: Packed | None = None
        self._frozen: tuple = ()
        self._ahead: tuple = ()  # state that was packed for the next pass

    def for_pass(self, linears: Sequence[nn.Linear], adapters: tuple[Tensor, ...]) -> Packed:
        """The packed weights of a pass that begins now. ValueError in a compiled pass if nothing was packed."""
        if torch.compiler.is_compiling():
            if self.packed is None:
                raise ValueError("weights are not packed: call Packing(model).pack() before a compiled pass")
            return self.packed
        if self._ahead != _state(linears, adapters):
            _pack([(self, (linears, adapters))])
        self._ahead = ()
        assert self.packed is not None
        return self.packed

    def copy_frozen(self, linears: Sequence[nn.Linear], adapters: tuple[Tensor, ...], state: tuple) -> Packed:
        """The packed weights, whose frozen part is copied if it changed."""
        packed = self.packed
        if packed is None or state[0] != self._frozen:
            shape = linears[0].in_features, *(linear.out_features for linear in linears)
            stacked = len(linears) == 2 and stacks_weights(adapters[0].device)
            packed = self.packed = Packed.empty(shape, adapters, state[0][0], stacked)
            packed.fill_frozen(*((linear.weight, linear.bias) for linear in linears))
        self._frozen, self._ahead = state[0], state
        return packed

    def __deepcopy__(self, memo: dict) -> "PackedLayer":
        """An empty one: the state describes the tensors of the original, not those of the copy."""
        return PackedLayer()


class Packing:
    """The packed weights of every adapted layer of ``model``, for passes that do not repack them."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "packing", None), PackedLayer)]

    def pack(self) -> None:
        """Copy all adapters, and the frozen weights that changed, for the next pass, in a few calls.

        Call it before every compiled pass and before every replay of a captured one. An eager pass that follows uses
        the copies too.
        """
        parts = ((layer.packing, layer.parts) for layer in self.layers)
        _pack([(packing, given) for packing, given in parts if given])


def _pack(layers: Sequence[tuple[PackedLayer, Parts]]) -> None:
    # Tensors made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False), torch.no_grad():
        packed = [packing.copy_frozen(*parts, _state(*parts)) for packing, parts in layers]
        fill_all(packed, [adapters for _, (_, adapters) in layers])


def _state(linears: Sequence[nn.Linear], adapters: tuple[Tensor, ...]) -> tuple:
    """((compute type, stamps of the frozen weights), stamps of the adapters)."""
    first = linears[0].weight
    autocast = torch.is_autocast_enabled(first.device.type)
    dtype = torch.get_autocast_dtype(first.device.type) if autocast else first.dtype
    return (dtype, *map(_stamp, weights_of(linears))), *map(_stamp, adapters)


def _stamp(tensor: Tensor) -> tuple:
    """Address and version; fused optimisers and ``.data`` writes do not change it."""
    return tensor.data_ptr(), tensor._version
