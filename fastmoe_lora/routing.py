"""What the routers of one model chose: the mutual-information loss and routing statistics."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoe_lora.ranks import over_ranks, world_size
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
        self.real: Tensor | None = None  # the rows of the batch that are no padding, if some are
        self._images: tuple[int, ...] = ()
        self._counts: tuple[int, ...] = ()  # tokens per task, where they do not follow from the images
        self._batch_tokens = 0  # of such a batch, with its padding
        self._mean_probs: dict[int, Tensor] = {}

    def assign(self, images: Sequence[int], mask: Tensor | None = None) -> None:
        """Say, before a forward pass, how many images of the batch belong to each task; the batch is task-major.

        An image may be any sequence of tokens. With ``mask`` (images, L), tokens whose element is 0 or False are
        padding: no expert sees them, and neither the mutual-information loss nor the routing statistics count them.
        """
        self._assign(images, (), 0, None)
        if mask is None:
            return
        if mask.ndim != 2 or len(mask) != sum(images):
            raise ValueError(f"a mask of shape {tuple(mask.shape)} for {sum(images)} images: it is (images, tokens)")
        counts = [int(part.sum()) for part in mask.ne(0).cpu().split(list(images))]
        self._assign(images, counts, mask.numel(), mask.flatten().nonzero().flatten())

    def assign_tokens(self, counts: Sequence[int]) -> None:
        """As :meth:`assign`, for sequences of different lengths without padding: the tokens of the batch per task."""
        self._assign((), counts, sum(counts), None)

    def _assign(self, images: Sequence[int], counts: Sequence[int], batch: int, real: Tensor | None) -> None:
        given = counts or images
        if len(given) != self.tasks:
            raise ValueError(f"{len(given)} counts for {self.tasks} tasks")
        self._images, self._counts, self._batch_tokens, self.real = tuple(images), tuple(counts), batch, real

    def segments(self, tokens: int, device: torch.device) -> TaskSegments:
        """The tasks' segments of a matrix of ``tokens`` tokens, of which those that are no padding count. After
        :meth:`assign` without a mask every image has equally many; one task needs no assignment.

        Under torch.export the number of images may be a symbol, so it must be the same for every task.
        """
        if torch.compiler.is_exporting():
            if any(n != self._images[0] for n in self._images):
                raise ValueError(f"torch.export needs equally many images of every task, not {self._images}")
            offsets = torch.empty(0, dtype=torch.int32, device=device)  # the reference reads counts alone
            return TaskSegments((tokens // self.tasks,) * self.tasks, offsets)
        if self._counts:
            if tokens != self._batch_tokens:
                raise ValueError(f"{tokens} tokens, but {self._batch_tokens} are assigned: call assign() first")
            return TaskSegments.of(self._counts, device)
        if self.tasks == 1:
            return TaskSegments.of((tokens,), device)
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
        if self.tasks == 1:
            return mutual_information_loss(layers).sum()  # 0: the task says nothing about the expert
        counts = self._counts or self._images
        totals = over_ranks(torch.tensor(counts)).tolist()
        if world_size() > 1:  # each process has the mean over its own tokens
            shares = [own / max(total, 1) for own, total in zip(counts, totals, strict=True)]
            layers = over_ranks(layers * layers.new_tensor(shares)[:, None])
        present = [t for t, n in enumerate(totals) if n]
        if len(present) < self.tasks:  # a list as index is copied to the device, which the host would wait for
            layers = layers[:, present]
        return mutual_information_loss(layers).sum()
