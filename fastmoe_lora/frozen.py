"""The frozen base under the experts, packed for the fused kernels."""

import copy

import torch
from torch import Tensor, nn

from kernels.packed import Packed, columns_pay


def fusible(module: nn.Module) -> tuple[nn.Linear, ...]:
    """The linear layers of what the fused kernels compute, in order: fc1 and fc2, under timm's names, around an exact
    GELU and nothing that acts besides; or a linear layer by itself that is wider than its input. Else none."""
    if type(module) is nn.Linear:
        return (module,) if columns_pay(module.in_features, module.out_features) else ()
    if not {"fc1", "act", "fc2"} <= {name for name, _ in module.named_children()}:
        return ()
    inert = [child for name, child in module.named_children() if name not in ("fc1", "act", "fc2")]
    plain = (
        type(module.fc1) is type(module.fc2) is nn.Linear
        and isinstance(module.act, nn.GELU)
        and module.act.approximate == "none"
        and all(isinstance(child, nn.Identity) or isinstance(child, nn.Dropout) and child.p == 0 for child in inert)
    )
    return (module.fc1, module.fc2) if plain else ()


class FrozenBase:
    """Keeps the base's linear layers beside A, B and the routers in the type they compute in.

    The adapters are copied once for every forward pass: nothing tells whether they have changed, since fused
    optimisers and changes by way of ``.data`` do not move a tensor's version.
    """

    def __init__(self, base: nn.Module) -> None:
        self.base = base
        self.packed: Packed | None = None
        self._frozen: tuple = ()
        self._ahead: tuple = ()  # what was packed for a pass that has not come yet

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """Those of :func:`fusible`, as the base now is; none where a gradient of its own weights is wanted, which the
        fused kernels do not compute."""
        trained = any(parameter.requires_grad for parameter in self.base.parameters())
        return () if trained else fusible(self.base)

    def pack_ahead(self, adapters: tuple[Tensor, Tensor, Tensor]) -> None:
        """Packs for the next pass, which then need not."""
        self._pack(adapters)
        self._ahead = self._state(adapters)

    def for_pass(self, adapters: tuple[Tensor, Tensor, Tensor]) -> Packed:
        """The packed weights for a pass that begins now."""
        if self._ahead != self._state(adapters):
            self._pack(adapters)
        self._ahead = ()
        return self.packed

    def _state(self, adapters: tuple[Tensor, Tensor, Tensor]) -> tuple:
        first = self.linears[0].weight
        autocast = torch.is_autocast_enabled(first.device.type)
        dtype = torch.get_autocast_dtype(first.device.type) if autocast else first.dtype
        return (dtype, *map(_stamp, self.base.parameters())), *map(_stamp, adapters)

    def _pack(self, adapters: tuple[Tensor, Tensor, Tensor]) -> None:
        frozen, linears = self._state(adapters)[0], self.linears
        # Tensors that are made while evaluating could not be saved for a backward pass later.
        with torch.inference_mode(False), torch.no_grad():
            if frozen != self._frozen:
                shape = linears[0].in_features, *(linear.out_features for linear in linears)
                self.packed = Packed.empty(shape, adapters, dtype=frozen[0])
                self.packed.fill_frozen(*((linear.weight, linear.bias) for linear in linears))
            self.packed.fill(*adapters)
        self._frozen = frozen

    def __deepcopy__(self, memo: dict) -> "FrozenBase":
        """Packs anew: versions of the original's tensors say nothing of the copy's."""
        return FrozenBase(copy.deepcopy(self.base, memo))


def _stamp(tensor: Tensor) -> tuple:
    """Changes with most changes of the values."""
    return tensor.device, tensor.data_ptr(), tensor._version
