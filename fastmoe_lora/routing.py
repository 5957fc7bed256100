"""What the routers of one model chose: the mutual-information loss and routing statistics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoe_lora.ranks import gathered, over_ranks, world_size
from kernels import TaskSegments


def mutual_information_loss(mean_probs: Tensor) -> Tensor:
    """Mod-Squad's loss, minus the mutual information of task and expert, one value per layer.

    ``mean_probs`` (.., tasks, C) is p(expert given task) of the tasks present; each task has probability 1/tasks. The
    loss lies in [-log(tasks), 0] and is lowest if no two tasks share an expert:

        L = -sum_te p(t,e) log(p(t,e) / (p(t) p(e)))
    """
    tiny = torch.finfo(mean_probs.dtype).tiny
    log_expert_given_task = mean_probs.clamp_min(tiny).log()
    log_expert = mean_probs.mean(-2, keepdim=True).clamp_min(tiny).log()
    return -(mean_probs * (log_expert_given_task - log_expert)).sum(-1).mean(-1)


class RoutingStatistics:
    """Gate mass and selection frequency per layer, task and expert, accumulated over batches."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._tokens = torch.zeros(())

    def add(self, layer: int, gates: Tensor, segments: TaskSegments) -> None:
        """Add the gates (T, N) of one layer's forward pass."""
        gates = gates.detach()
        both = torch.stack([gates, (gates > 0).to(gates.dtype)])
        sums = torch.stack([run.sum(1) for run in both.split(segments.counts, dim=1)], dim=1).double().cpu()
        self._sums[layer] = self._sums.get(layer, 0) + sums
        if layer == 0:
            self._tokens = self._tokens + torch.tensor(segments.counts, dtype=torch.float64)

    def merge(self, other: "RoutingStatistics") -> None:
        """Add what ``other`` has accumulated."""
        for layer, sums in other._sums.items():
            self._sums[layer] = self._sums.get(layer, 0) + sums
        self._tokens = self._tokens + other._tokens

    def compute(self) -> tuple[Tensor, Tensor]:
        """(gate mass, selection frequency), both (layers, tasks, N): means over a task's tokens, NaN for a task
        without tokens. An always-on expert has frequency 1; its gate mass says how much it is used."""
        sums = torch.stack([self._sums[layer] for layer in sorted(self._sums)])
        mass, frequency = (sums / self._tokens[:, None]).unbind(1)
        return mass, frequency


class Routing:
    """State shared by the LoRAMoE layers of one model: how a batch divides among the tasks, and what routers chose.

    The layers read it, so that the blocks of the ViT pass tokens only. ``deterministic`` makes the bits of a token in
    the forward pass of our kernels independent of the batch around it (:func:`kernels.lora_moe_packed`).
    """

    def __init__(self, tasks: int, kernel: str = "auto", deterministic: bool = False) -> None:
        self.tasks, self.kernel, self.deterministic = tasks, kernel, deterministic
        self.statistics: RoutingStatistics | None = None
        self._images: tuple[int, ...] = ()
        self._mean_probs: dict[int, Tensor] = {}

    def assign(self, images: Sequence[int]) -> None:
        """Say, before a forward pass, how many images of the batch belong to each task; the batch is task-major."""
        if len(images) != self.tasks:
            raise ValueError(f"{len(images)} counts for {self.tasks} tasks")
        self._images = tuple(images)

    def segments(self, tokens: int, device: torch.device) -> TaskSegments:
        """The tasks' segments of a matrix of ``tokens`` tokens; every image has equally many.

        Under torch.export the number of images may be a symbol, so it must be the same for every task.
        """
        if torch.compiler.is_exporting():
            if any(n != self._images[0] for n in self._images):
                raise ValueError(f"torch.export needs equally many images of every task, not {self._images}")
            offsets = torch.empty(0, dtype=torch.int32, device=device)  # the reference reads counts alone
            return TaskSegments((tokens // self.tasks,) * self.tasks, offsets)
        images = sum(self._images)
        if images == 0 or tokens % images:
            raise ValueError(f"{tokens} tokens do not divide among the assigned {images} images: call assign() first")
        return TaskSegments.of(tuple(n * (tokens // images) for n in self._images), device)

    def record(self, layer: int, gates: Tensor, mean_probs: Tensor, segments: TaskSegments) -> None:
        """Called by the adapted layers in their forward pass."""
        self._mean_probs[layer] = mean_probs
        if self.statistics is not None:
            self.statistics.add(layer, gates, segments)

    def __getstate__(self) -> dict:
        """Copies do not take the tensors of a pass along, whose graph belongs to the original."""
        return self.__dict__ | {"_mean_probs": {}}

    def mi_loss(self) -> Tensor:
        """The mutual-information loss of the last forward pass, summed over layers; call it once per pass.

        In a data-parallel run it is that of all processes' tokens, and every process must call it.
        """
        if not self._mean_probs:
            raise ValueError("no forward pass since the last mi_loss()")
        layers = torch.stack([self._mean_probs[layer] for layer in sorted(self._mean_probs)])
        self._mean_probs.clear()
        images = [sum(counts) for counts in zip(*gathered(self._images), strict=True)]
        if world_size() > 1:  # each process has the mean over its own tokens
            shares = [own / max(total, 1) for own, total in zip(self._images, images, strict=True)]
            layers = over_ranks(layers * layers.new_tensor(shares)[:, None])
        present = [t for t, n in enumerate(images) if n]
        if len(present) < self.tasks:  # a list as index is copied to the device, which the host would wait for
            layers = layers[:, present]
        return mutual_information_loss(layers).sum()
