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

from kernels.packed import Packed, columns_pay


def fusible(module: nn.Module) -> tuple[nn.Linear, ...]:
    """The linear layers of a module that the fused kernels can compute, in order; empty for any other module.

    Such a module is an FFN with timm's names, fc1, an exact GELU and fc2, in which nothing else has an effect, or a
    linear layer that is wider than its input.
    """
    if type(module) is nn.Linear:
        return (module,) if columns_pay(module.in_features, module.out_features) else ()
    if not {"fc1", "act", "fc2"} <= {name for name, _ in module.named_children()}:
        return ()
    inert = [child for name, child in module.named_children() if name not in ("fc1", "act", "fc2")]
    fc1, act, fc2 = module.fc1, module.act, module.fc2
    if (
        type(fc1) is nn.Linear
        and type(fc2) is nn.Linear
        and isinstance(act, nn.GELU)
        and act.approximate == "none"
        and all(isinstance(child, nn.Identity) or isinstance(child, nn.Dropout) and child.p == 0 for child in inert)
    ):
        return fc1, fc2
    return ()


class PackedLayer:
    """The packed weights of one layer: ``linears`` frozen, ``adapters`` (A, B) or (A, B, routers)."""

    def __init__(self) -> None:
        self.packed: Packed | None = None
        self._frozen: tuple = ()
        self._ahead: tuple = ()  # state that was packed for the next pass

    def pack(self, linears: Sequence[nn.Linear], adapters: tuple[Tensor, ...]) -> None:
        """Pack for the next pass, which then copies nothing."""
        self._pack(linears, adapters)
        self._ahead = _state(linears, adapters)

    def for_pass(self, linears: Sequence[nn.Linear], adapters: tuple[Tensor, ...]) -> Packed:
        """The packed weights of a pass that begins now. ValueError in a compiled pass if nothing was packed."""
        if torch.compiler.is_compiling():
            if self.packed is None:
                raise ValueError("weights are not packed: call Packing(model).pack() before a compiled pass")
            return self.packed
        packed = self.packed
        if packed is None or self._ahead != _state(linears, adapters):
            packed = self._pack(linears, adapters)
        self._ahead = ()
        return packed

    def _pack(self, linears: Sequence[nn.Linear], adapters: tuple[Tensor, ...]) -> Packed:
        frozen = _state(linears, adapters)[0]
        # Tensors made in inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            packed = self.packed
            if packed is None or frozen != self._frozen:
                shape = linears[0].in_features, *(linear.out_features for linear in linears)
                packed = self.packed = Packed.empty(shape, adapters, dtype=frozen[0])
                packed.fill_frozen(*((linear.weight, linear.bias) for linear in linears))
            packed.fill(*adapters)
        self._frozen = frozen
        return packed

    def __deepcopy__(self, memo: dict) -> "PackedLayer":
        """An empty one: the state describes the tensors of the original, not those of the copy."""
        return PackedLayer()


class Packing:
    """The packed weights of every adapted layer of ``model``, for passes that do not repack them."""

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "packing", None), PackedLayer)]

    def pack(self) -> None:
        """Copy all adapters, and the frozen weights that changed, for the next pass.

        Call it before every compiled pass and before every replay of a captured one. An eager pass that follows uses
        the copies too.
        """
        for layer in self.layers:
            layer.pack_ahead()


def _state(linears: Sequence[nn.Linear], adapters: tuple[Tensor, ...]) -> tuple:
    """((compute type, stamps of the frozen weights), stamps of the adapters)."""
    first = linears[0].weight
    autocast = torch.is_autocast_enabled(first.device.type)
    dtype = torch.get_autocast_dtype(first.device.type) if autocast else first.dtype
    frozen = [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]
    return (dtype, *map(_stamp, frozen)), *map(_stamp, adapters)


def _stamp(tensor: Tensor) -> tuple:
    """Identity and version; fused optimisers and ``.data`` writes do not change it."""
    return tensor.device, tensor.data_ptr(), tensor._version
