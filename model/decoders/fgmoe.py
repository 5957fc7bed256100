"""A reconstruction of the decoder of FGMoE (arXiv 2507.19077), whose details are not public, and a plain one beside it.

    F    = LayerNorm(Linear(concat(taps)))          C channels per token, one row per image
    X_t  = Mixer_t(F)
    U_t  = X_t + sum_i g_ti E_ti(X_t)               experts of one task, cut into slices; shared slices always on
    G_t  = sum_j softmax(W F + c_t)_j E^g_j(F)      one set of experts, one gate per task
    yhat = Head_t(U_t + G_t)

The global gate is linear in [F ; e_t] with a task embedding e_t, and a linear map of e_t is a bias c_t. The global
experts are not cut. Without a mixer X_t = F, without global experts G_t = 0.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kernels import Gating, TaskSegments, expert_mixture, nvtx
from kernels.reference import router_logits
from model.decoders.base import Decoder, Features, Frame, in_compute_type, maps_of, tokens_of
from model.decoders.config import FGConfig
from model.decoders.deformable import DeformableMixer
from model.decoders.pool import ExpertPool
from model.norm import BatchNorm2d

GLOBAL_EXPERTS = 4


class Trunk(Decoder):
    """Aggregator, mixers and heads; :meth:`own` and :meth:`common` say what lies between them."""

    def __init__(self, frame: Frame, width: int, mixer: bool = True) -> None:
        super().__init__()
        self.tasks = tuple(frame.channels)
        self.reduce = nn.Linear(4 * frame.width, width)
        self.norm = nn.LayerNorm(width)
        self.mixers = nn.ModuleDict({task: DeformableMixer(width) if mixer else nn.Identity() for task in self.tasks})
        self.heads = nn.ModuleDict({task: _head(width, channels) for task, channels in frame.channels.items()})

    def forward(self, features: Features) -> dict[str, Tensor]:
        """Predictions at the resolution of the features."""
        tasks = [task for task in self.tasks if task in features.index]
        grid = features.maps[0].shape[-2:]
        with nvtx.span("aggregate"):
            f = self.norm(self.reduce(torch.cat([tokens_of(tap) for tap in features.maps], dim=-1)))
            f_maps = maps_of(f, grid)
        with nvtx.span("mixers"):
            x = [self.mixers[task](f_maps[features.index[task]]) for task in tasks]
        cells = grid.numel()
        counts = tuple(len(features.index[t]) * cells if t in features.index else 0 for t in self.tasks)
        with nvtx.span("experts"):
            sums = self.own(torch.cat([tokens_of(each) for each in x]), TaskSegments.of(counts, f.device))
            common = self.common(f, features, cells)
            sums = sums if common is None else sums + common
        with nvtx.span("heads"):
            runs = sums.split([len(features.index[task]) * cells for task in tasks])
            return {task: self.heads[task](maps_of(run, grid)) for task, run in zip(tasks, runs, strict=True)}

    def own(self, x: Tensor, segments: TaskSegments) -> Tensor:
        """U of the tokens X (T, C) of all tasks, task-major."""
        raise NotImplementedError

    def common(self, f: Tensor, features: Features, cells: int) -> Tensor | None:
        """G (T, C) from the tokens F, ``cells`` per row of the features; the rows are those of U. None means 0."""
        raise NotImplementedError

    def rows_of(self, each: Sequence[Tensor] | Tensor, index: Mapping[str, Tensor], cells: int) -> Tensor:
        """Of the tokens (rows * cells, C) for each task those in the rows that it reads, task-major."""
        tasks = zip(self.tasks, each, strict=True)
        return torch.cat([y.unflatten(0, (-1, cells))[index[t]].flatten(0, 1) for t, y in tasks if t in index])


class FGMoE(Trunk):
    """All tasks' own experts are one call of :func:`kernels.expert_mixture`, the global ones another."""

    def __init__(
        self, frame: Frame, config: FGConfig, mixer: bool = True, common: bool = True, kernel: str = "auto"
    ) -> None:
        width = config.width
        super().__init__(frame, width, mixer)
        self.config, self.kernel, tasks = config, kernel, len(self.tasks)
        self.pool = ExpertPool(width, 4 * width, config.experts, config.slices, sets=tasks)
        columns = config.gating.router_columns(config.pool)
        self.routers = nn.Parameter(torch.empty(tasks, columns, width).normal_(std=0.01))
        self.global_pool = ExpertPool(width, 4 * width, GLOBAL_EXPERTS) if common else None
        if common:
            self.global_router = nn.Parameter(torch.empty(GLOBAL_EXPERTS, width).normal_(std=0.01))
            self.global_bias = nn.Parameter(torch.empty(tasks, GLOBAL_EXPERTS).normal_(std=0.01))

    def own(self, x: Tensor, segments: TaskSegments) -> Tensor:
        tokens = in_compute_type(x)
        with torch.autocast(x.device.type, enabled=False):
            z = router_logits(x, self.routers, segments)
            return expert_mixture(tokens, tokens, self.pool.experts, z, segments, self.config.gating, self.kernel)[0]

    def common(self, f: Tensor, features: Features, cells: int) -> Tensor | None:
        if self.global_pool is None:
            return None
        index = features.index
        if not features.per_task:
            return self.rows_of(self._all_global(f, self.global_bias[:, None]), index, cells)
        # A token belongs to one task and has one gate.
        biases = zip(self.tasks, self.global_bias, strict=True)
        c = torch.cat([c_t.expand(len(index[task]) * cells, -1) for task, c_t in biases if task in index])
        return self._all_global(self.rows_of([f] * len(self.tasks), index, cells), c)

    def _all_global(self, f: Tensor, c: Tensor) -> Tensor:
        """The global experts on f (T, C) with the bias c (T, experts) of its gates, or (tasks, 1, experts) for one gate
        per task: (T, C), or (tasks, T, C)."""
        assert self.global_pool is not None
        tokens, segments = in_compute_type(f), TaskSegments.of((len(f),), f.device)
        gating = Gating("topk", GLOBAL_EXPERTS, 0)  # the whole softmax
        with torch.autocast(f.device.type, enabled=False):
            z = nn.functional.linear(f.to(self.global_router.dtype), self.global_router) + c
            return expert_mixture(tokens, None, self.global_pool.experts, z, segments, gating, self.kernel)[0]


class Plain(Trunk):
    """FGMoE without gates: as many parameters but for its routers, all of them active for every token."""

    def __init__(self, frame: Frame, config: FGConfig, mixer: bool = True, common: bool = True) -> None:
        width = config.width
        super().__init__(frame, width, mixer)
        self.pool = ExpertPool(width, 4 * width, config.experts, sets=len(self.tasks))
        self.global_pool = ExpertPool(width, 4 * width, GLOBAL_EXPERTS) if common else None

    def own(self, x: Tensor, segments: TaskSegments) -> Tensor:
        runs = x.split(segments.counts)
        return x + torch.cat([self.pool.dense(run, t) for t, run in enumerate(runs)])

    def common(self, f: Tensor, features: Features, cells: int) -> Tensor | None:
        if self.global_pool is None:
            return None
        return self.rows_of([self.global_pool.dense(f)] * len(self.tasks), features.index, cells)


def _head(width: int, channels: int) -> nn.Sequential:
    half = width // 2
    return nn.Sequential(
        nn.Conv2d(width, half, 3, padding=1, bias=False), BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, channels, 1)
    )
