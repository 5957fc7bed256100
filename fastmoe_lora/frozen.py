"""The frozen FFN under the experts, packed for the fused kernels."""

import copy

import torch
from torch import Tensor, nn

from kernels.packed import Packed


def is_plain_ffn(module: nn.Module) -> bool:
    """fc1, exact GELU, fc2 and nothing that acts besides: what the fused kernels compute, under timm's names."""
    if not {"fc1", "act", "fc2"} <= {name for name, _ in module.named_children()}:
        return False
    inert = [child for name, child in module.named_children() if name not in ("fc1", "act", "fc2")]
    return (
        type(module.fc1) is type(module.fc2) is nn.Linear
        and isinstance(module.act, nn.GELU) and module.act.approximate == "none"
        and all(isinstance(child, nn.Identity) or isinstance(child, nn.Dropout) and child.p == 0 for child in inert)
    )


class FrozenFFN:
    """Keeps fc1 and fc2 beside A, B and the routers in the type they compute in, as new as the parameters are."""

    def __init__(self, ffn: nn.Module) -> None:
        self.ffn = ffn
        self.packed: Packed | None = None
        self._frozen: tuple = ()
        self._adapters: tuple = ()

    @property
    def frozen(self) -> bool:
        """Whether the FFN is still plain and no gradient of its own weights is wanted, which the fused kernels do not
        compute."""
        return is_plain_ffn(self.ffn) and not any(parameter.requires_grad for parameter in self.ffn.parameters())

    def refresh(self, adapters: tuple[Tensor, Tensor, Tensor]) -> None:
        """Copies what has changed since the last call: after an optimiser's step (A, B, routers), nothing else."""
        fc1, fc2 = self.ffn.fc1, self.ffn.fc2
        device = fc1.weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else fc1.weight.dtype
        frozen, new = (dtype, *map(_stamp, self.ffn.parameters())), tuple(map(_stamp, adapters))
        if (frozen, new) == (self._frozen, self._adapters):
            return
        # Tensors that are made while evaluating could not be saved for a backward pass later.
        with torch.inference_mode(False), torch.no_grad():
            if frozen != self._frozen:
                shape = fc1.in_features, fc1.out_features, fc2.out_features
                self.packed = Packed.empty(shape, adapters, dtype)
                self.packed.fill_frozen((fc1.weight, fc1.bias), (fc2.weight, fc2.bias))
            self.packed.fill(*adapters)
        self._frozen, self._adapters = frozen, new

    def __deepcopy__(self, memo: dict) -> "FrozenFFN":
        """Packs anew: versions of the original's tensors say nothing of the copy's."""
        return FrozenFFN(copy.deepcopy(self.ffn, memo))


def _stamp(tensor: Tensor) -> tuple:
    """Changes whenever the values may have."""
    return tensor.device, tensor.data_ptr(), tensor._version
