"""The optimisers of --optimizer, each over the same parameter groups, which are data.

A group is a dict of ``params``, ``weight_decay`` and ``lr_scale``, which multiplies its learning rate. The rate is set
before every step (:mod:`train.run.schedule`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastmoe_lora import parameter_groups
from kernels import UserError
from model import MultiTaskViT
from train.config.settings import Settings
from train.run.backbone import is_adapter

Groups = list[dict[str, Any]]
TIMM = "timm:"  # before the name of an optimiser of timm


def build_optimizer(settings: Settings, model: nn.Module, weighting: nn.Module) -> Optimizer:
    """The optimiser of --optimizer over the trainable parameters of the model and, without weight decay, those of the
    weighting."""
    name, groups = settings.optimizer, groups_of(settings, model)
    if learned := list(weighting.parameters()):
        groups.append({"params": learned, "weight_decay": 0.0, "lr_scale": 1.0})
    if name.startswith(TIMM):
        return _of_timm(name.removeprefix(TIMM), groups, settings.lr)
    return OPTIMIZERS[name](groups, settings.lr)


def require_known(name: str) -> None:
    """UserError for a name of no optimiser."""
    if name not in OPTIMIZERS and not (name.startswith(TIMM) and name != TIMM):
        raise UserError(f"unknown optimizer {name!r}: choose among {', '.join(OPTIMIZERS)}, {TIMM}NAME")


def groups_of(settings: Settings, model: nn.Module) -> Groups:
    """Weight decay on matrices, none on biases, norms, class token and positions; a pretrained backbone that is trained
    has ``backbone_lr`` times the learning rate."""
    pretrained: set[int] = set()
    if settings.train_backbone and isinstance(model, MultiTaskViT):
        pretrained = {id(p) for name, p in model.vit.named_parameters() if not is_adapter(name)}
    return [
        group | {"params": params, "lr_scale": scale}
        for group in parameter_groups(model, settings.weight_decay)
        for inside, scale in ((True, settings.backbone_lr), (False, 1.0))
        if (params := [p for p in group["params"] if (id(p) in pretrained) == inside])
    ]


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """A block in which the model's weights are those to score and to save. A schedule-free optimiser averages them, and
    computes gradients elsewhere; of every other optimiser they are those that it trains."""
    modes = [mode for name in ("eval", "train") if (mode := getattr(optimizer, name, None))]
    for mode in modes[:1]:
        mode()
    try:
        yield
    finally:
        for mode in modes[1:]:
            mode()


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for matrices with weight decay, AdamW for all other parameters, in one state_dict.

    Muon's update is scaled to the root mean square of AdamW's, so that both share one learning rate."""

    def __init__(self, groups: Groups, lr: float) -> None:
        parts = [group | {"params": params, "muon": muon} for group in groups for muon, params in _by_shape(group)]
        of_muon, of_adamw = ([part for part in parts if part["muon"] == which] for which in (True, False))
        self.algorithms: list[tuple[bool, Optimizer]] = []
        if of_muon:
            self.algorithms += [(True, torch.optim.Muon(of_muon, lr, adjust_lr_fn="match_rms_adamw"))]
        if of_adamw:
            self.algorithms += [(False, torch.optim.AdamW(of_adamw, lr, fused=True))]
        super().__init__([group for _, part in self.algorithms for group in part.param_groups], {"lr": lr})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Both algorithms on this optimiser's groups and state, which load_state_dict replaces."""
        for muon, algorithm in self.algorithms:
            algorithm.param_groups = [group for group in self.param_groups if group["muon"] == muon]
            algorithm.state = self.state
            algorithm.step()


def _by_shape(group: dict[str, Any]) -> Iterator[tuple[bool, list[nn.Parameter]]]:
    """(whether they are Muon's, the parameters)."""
    for muon in (True, False):
        if params := [p for p in group["params"] if (p.ndim == 2 and group["weight_decay"] > 0) == muon]:
            yield muon, params


def _schedule_free(groups: Groups, lr: float) -> Optimizer:
    try:
        from train.run.schedule_free import ScheduleFree
    except ImportError:
        raise UserError("--optimizer schedule-free needs the package schedulefree: pip install schedulefree") from None
    return ScheduleFree(groups, lr)


def _of_timm(name: str, groups: Groups, lr: float) -> Optimizer:
    """``timm.optim`` by name, which is imported here since few users have it."""
    try:
        from timm.optim import create_optimizer_v2
    except Exception as error:  # a torchvision of another torch raises RuntimeError
        reason = " ".join(str(error).split())
        raise UserError(
            f"--optimizer {TIMM}{name} needs the package timm with a torchvision that fits torch: pip install timm "
            f"({reason[:200]})"
        ) from None
    try:
        return create_optimizer_v2(groups, opt=name, lr=lr)
    except (ValueError, AssertionError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--optimizer {TIMM}{name}: timm does not make it ({reason[:200]})") from None


# An optimiser is a line here: from groups and a first learning rate to an object of torch.optim.Optimizer.
OPTIMIZERS: dict[str, Callable[[Groups, float], Optimizer]] = {
    "adamw": lambda groups, lr: torch.optim.AdamW(groups, lr, fused=True),
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9),
    "muon": Muon,
    "schedule-free": _schedule_free,
}
