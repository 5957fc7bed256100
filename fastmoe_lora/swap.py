"""Adapting a module in place: its class becomes a generated subclass, so that it stays the object it is.

Names of parameters, hooks, references from elsewhere and what ``isinstance`` says stay as they were. :func:`restore`
puts the class back.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from kernels import UserError

FORWARD_ON_INSTANCE = "has a forward of its own on the instance, as accelerate's hooks put there"
_GENERATED: dict[tuple[type, type], type] = {}


def generated(mixin: Any, base: type) -> type:
    """The subclass of ``base`` whose methods are those of ``mixin`` first; the same one every time. Its name begins
    with ``mixin.prefix``."""
    if (mixin, base) not in _GENERATED:
        # Not base.__module__: of a module of torch.nn, torch.compile takes all sizes that it sees for constants.
        members = {"__module__": mixin.__module__, "__reduce_ex__": _reduce, "adapts": (mixin, base)}
        _GENERATED[mixin, base] = type(f"{mixin.prefix}{base.__name__}", (mixin, base), members)
    return _GENERATED[mixin, base]


def _reduce(module: nn.Module, protocol: int) -> tuple:
    """How deepcopy and pickle rebuild a module, whose class no import finds."""
    return _rebuild, type(module).adapts, object.__reduce_ex__(module, 2)[2]  # type: ignore[attr-defined]


def _rebuild(mixin: type, base: type) -> Any:
    kind: Any = generated(mixin, base)
    return kind.__new__(kind)


def swap(module: nn.Module, mixin: type) -> None:
    """Give ``module`` the methods of ``mixin``."""
    module.__class__ = generated(mixin, type(module))


def restore(module: nn.Module) -> None:
    """Undo :func:`swap`."""
    kind: Any = type(module)
    module.__class__ = kind.adapts[1]


def check_restorable(model: nn.Module) -> None:
    """UserError if a module of ``model`` was swapped and then changed once more."""
    for name, module in model.named_modules():
        kind = type(module)
        if hasattr(kind, "adapts") and "adapts" not in kind.__dict__:
            raise UserError(
                f"{name} became a {kind.__name__} after it was adapted, as parametrize and fully_shard do: undo that "
                "first"
            )
        if hasattr(kind, "adapts") and "forward" in module.__dict__:
            raise UserError(f"{name} {FORWARD_ON_INSTANCE}: remove that first")


class Frozen:
    """A batch norm of a frozen model: it normalises by its running statistics and does not count, in training too."""

    prefix = "Frozen"

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]


def freeze_model(model: nn.Module, kept: Iterable[nn.Module]) -> None:
    """Freeze all parameters of ``model`` and the statistics of its batch norms, except in the modules ``kept``."""
    model.requires_grad_(False)
    spared = {module for outer in kept for module in outer.requires_grad_(True).modules()}
    for module in model.modules():
        if module in spared:
            continue
        counts = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        if counts and not isinstance(module, Frozen):
            swap(module, Frozen)
            module.train(False)


def thaw(model: nn.Module) -> None:
    """Let batch norms count again; parameters stay frozen."""
    for module in model.modules():
        if issubclass(type(module), Frozen):
            restore(module)
            module.train(model.training)
