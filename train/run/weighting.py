"""The weightings of --weighting: how the losses of the tasks become one update.

Every one acts on the losses times --loss-weights. Its factors and what it learns from losses and gradients are equal in
all processes, since it sees those of the whole batch. Its parameters are in the optimiser, its state in checkpoints.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fastmoe_lora.ranks import over_ranks, world_size
from kernels import UserError
from train.config.settings import Settings

WINDOW = 50  # steps over which DWA averages losses


class Weighting(nn.Module):
    """The fixed weighting, and what another one overrides. T is the number of tasks.

    ``sees_gradients`` makes a step compute the gradient of every task on its own, for :meth:`combine`.
    """

    sees_gradients = False
    ones: Tensor
    loss_weights: Tensor

    def __init__(self, loss_weights: Sequence[float], seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer(
            "loss_weights", torch.tensor(loss_weights, dtype=torch.get_default_dtype()), persistent=False
        )
        self.register_buffer("ones", torch.ones(len(loss_weights)), persistent=False)

    def forward(self, step: int) -> Tensor:
        """(T,), by which the tasks' losses are multiplied at ``step``."""
        return self.factors(step) * self.loss_weights

    def factors(self, step: int) -> Tensor:
        """(T,), by which the losses times --loss-weights are multiplied at ``step``."""
        return self.ones

    def penalty(self, totals: Sequence[Tensor]) -> Tensor:
        """What is added to the weighted losses. ``totals``, one per task, count its labels in the whole batch."""
        return self.ones.new_zeros(())

    def combine(self, gramian: Tensor, losses: Tensor, step: int) -> Tensor:
        """(T,), by which the tasks' gradients in what they share are multiplied. ``gramian`` (T, T) holds the inner
        products of these gradients, which are those of the weighted losses; ``losses`` (T,) are not weighted."""
        return self.ones

    def observe(self, losses: Tensor, step: int) -> None:
        """Sees the losses (T,) of the whole batch, not weighted, after ``step``."""


class Uncertainty(Weighting):
    """exp(-s) loss + s with a learned log-variance s per task (Kendall et al. 2018)."""

    def __init__(self, loss_weights: Sequence[float], seed: int) -> None:
        super().__init__(loss_weights, seed)
        self.log_variances = nn.Parameter(torch.zeros(len(loss_weights)))

    def factors(self, step: int) -> Tensor:
        return (-self.log_variances).exp()

    def penalty(self, totals: Sequence[Tensor]) -> Tensor:
        labelled = torch.stack([total.sum() > 0 for total in totals])
        return (self.log_variances * labelled).sum()


class DWA(Weighting):
    """Dynamic weight average (Liu et al. 2019): T softmax(r / 2), where r is the mean loss of the last whole window
    over that of the window before. A window is WINDOW steps, where the paper has an epoch."""

    total: Tensor
    count: Tensor
    means: Tensor

    def __init__(self, loss_weights: Sequence[float], seed: int) -> None:
        super().__init__(loss_weights, seed)
        self.register_buffer("total", torch.zeros_like(self.ones))
        self.register_buffer("count", torch.zeros_like(self.ones))
        self.register_buffer("means", torch.zeros(2, len(self.ones)))  # of the last two windows

    def factors(self, step: int) -> Tensor:
        if step < 2 * WINDOW:
            return self.ones
        before, last = self.means
        ratios = torch.where((before > 0) & (last > 0), last / before, 1)  # 1 where a window had no label
        return len(ratios) * (ratios / 2).softmax(0)

    def observe(self, losses: Tensor, step: int) -> None:
        seen = losses.isfinite() & (losses != 0)
        self.total += torch.where(seen, losses, 0)
        self.count += seen
        if (step + 1) % WINDOW == 0:
            self.means.copy_(torch.stack([self.means[1], self.total / self.count.clamp(min=1)]))
            self.total.zero_()
            self.count.zero_()


class RandomLoss(Weighting):
    """Random loss weighting (Lin et al. 2022): T softmax(z), with z from a normal distribution at every step."""

    def factors(self, step: int) -> Tensor:
        z = np.random.default_rng([self.seed, step]).standard_normal(len(self.ones))
        return len(z) * torch.from_numpy(z).to(self.ones).softmax(0)


class GradNorm(Weighting):
    """GradNorm (Chen et al. 2018): learned factors w = T softmax(v), driven to where the norms of the tasks' gradients
    are alike, but larger for a task whose loss has fallen less since the start. The norms are over all that tasks
    share, where the paper takes its last layer."""

    sees_gradients = True
    alpha = 1.5
    initial: Tensor

    def __init__(self, loss_weights: Sequence[float], seed: int) -> None:
        super().__init__(loss_weights, seed)
        self.logits = nn.Parameter(torch.zeros(len(loss_weights)))
        self.register_buffer("initial", torch.zeros(len(loss_weights)))  # losses of the first step with a label

    def factors(self, step: int) -> Tensor:
        return len(self.ones) * self.logits.softmax(0)

    def combine(self, gramian: Tensor, losses: Tensor, step: int) -> Tensor:
        self.initial.copy_(torch.where((self.initial == 0) & losses.isfinite(), losses, self.initial))
        norms, known = gramian.diagonal().sqrt(), (gramian.diagonal() > 0).to(losses)
        rates = losses / torch.where(self.initial > 0, self.initial, 1)
        rates = rates * known.sum() / (rates * known).sum()
        target = (norms * known).sum() / known.sum() * rates**self.alpha
        with torch.enable_grad():
            factors = self.factors(step)
            gaps = (norms / factors.detach() * factors - target).abs() * known
        (self.logits.grad,) = torch.autograd.grad(gaps.sum(), [self.logits])
        return self.ones


class GradientMethod(Weighting):
    """A method of TorchJD, which weighs the tasks' gradients in what they share by their inner products; heads get the
    gradient of their own loss. Weights that average are multiplied by T, so that equal gradients add up as fixed."""

    sees_gradients = True

    def __init__(self, method: str, loss_weights: Sequence[float], seed: int) -> None:
        super().__init__(loss_weights, seed)
        self.method = method
        try:
            _of_torchjd(method, len(loss_weights))
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"the weighting {method} needs pip install 'torchjd[full]': {reason}") from None

    def combine(self, gramian: Tensor, losses: Tensor, step: int) -> Tensor:
        """Without the tasks that have no label in the batch, whose gradients are 0."""
        known = gramian.diagonal() > 0
        inner = gramian[known][:, known].double().cpu()
        if len(inner) < 2 or not inner.isfinite().all():  # one task alone, or a step that ends the run or is skipped
            return self.ones
        if self.method != "NashMTL":  # which bounds the update's norm; TorchJD takes small gradients for none
            inner /= inner.diagonal().mean()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # PCGrad draws an order of the tasks
            warnings.simplefilter("ignore")  # cvxpy's, on its speed
            drawn = np.random.SeedSequence([self.seed, step]).generate_state(1)
            torch.default_generator.manual_seed(int(drawn[0]))
            weights = _of_torchjd(self.method, len(inner))(inner)
        scale = 1 if self.method in ("PCGrad", "NashMTL") else len(inner)
        return torch.zeros_like(self.ones).masked_scatter(known, (scale * weights).to(self.ones))


def _of_torchjd(method: str, tasks: int) -> Callable[[Tensor], Tensor]:
    """From a Gram matrix (tasks, tasks) to weights.

    Nash-MTL begins anew at every step, so that a resumed run is exact. It asks for the gradients, and gets a square
    root of their Gram matrix, which has the same inner products.
    """
    from torchjd import aggregation

    if method == "NashMTL":
        nash = aggregation.NashMTL(tasks)
        return lambda gramian: nash.weighting(_root(gramian))
    options = {"c": 0.5} if method == "CAGrad" else {}
    return getattr(aggregation, f"{method}Weighting")(**options)


def _root(gramian: Tensor) -> Tensor:
    """M with M M^T = ``gramian``, which may be singular."""
    values, vectors = torch.linalg.eigh(gramian)
    return vectors * values.clamp(min=0).sqrt()


METHODS = {
    "pcgrad": "PCGrad",
    "mgda": "MGDA",
    "cagrad": "CAGrad",
    "nash-mtl": "NashMTL",
    "imtl-g": "IMTLG",
    "aligned-mtl": "AlignedMTL",
    "upgrad": "UPGrad",
}  # by TorchJD's name
WEIGHTINGS: dict[str, Callable[[Sequence[float], int], Weighting]] = {
    "fixed": Weighting,
    "uncertainty": Uncertainty,
    "dwa": DWA,
    "random": RandomLoss,
    "gradnorm": GradNorm,
    **{name: partial(GradientMethod, method) for name, method in METHODS.items()},
}


def build_weighting(settings: Settings) -> Weighting:
    """That of --weighting, on the CPU. UserError for an unknown one."""
    if settings.weighting not in WEIGHTINGS:
        raise UserError(f"unknown weighting {settings.weighting!r}: choose among {', '.join(WEIGHTINGS)}")
    loss_weights = [settings.task_weights[task] for task in settings.task_names]
    weighting = WEIGHTINGS[settings.weighting](loss_weights, settings.seed)
    given = f"--weighting {settings.weighting}"
    if settings.cuda_graphs and settings.weighting != "fixed":
        raise UserError(f"{given} decides anew at every step, which --cuda-graphs cannot record: leave out one of them")
    if weighting.sees_gradients and len(loss_weights) == 1:
        raise UserError(f"{given} compares gradients of several tasks: give --tasks two at least, or leave it out")
    if weighting.sees_gradients and settings.precision == "fp16":
        raise UserError(f"{given} compares gradients, which fp16 scales and may overflow: use --precision bf16 or fp32")
    if weighting.sees_gradients and settings.compile:
        raise UserError(f"{given} goes backward once per task, which --compile does not allow: leave out one of them")
    return weighting


def average_gradients(module: nn.Module) -> None:
    """Make the gradients of a module's parameters their mean over processes, as DistributedDataParallel does."""
    for parameter in module.parameters():
        if parameter.grad is not None and world_size() > 1:
            parameter.grad = over_ranks(parameter.grad) / world_size()
