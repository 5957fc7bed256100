"""Which rows of a pass belong to which task, and what the routers chose: the mutual-information loss, statistics.

with routing.batch([8, 8]) as batch:        # 8 images of the first task, then 8 of the second
    outputs = model(images)
    loss = ... + 0.005 * batch.mi_loss()
"""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.module_tracker import ModuleTracker

from fastmoe_lora.ranks import over_ranks
from kernels import TaskSegments, UserError
from kernels.segments import offsets_of


def mutual_information_loss(mean_probs: Tensor, share: Tensor | None = None) -> Tensor:
    """Mod-Squad's loss, minus the mutual information of task and expert, one value per layer.

    ``mean_probs`` (.., tasks, C) is p(expert given task), ``share`` (tasks,) the probability of each task, equal by
    default. The loss lies in [-log(tasks), 0] and is lowest if no two tasks share an expert:

        L = -sum_te p(t,e) log(p(t,e) / (p(t) p(e)))
    """
    tasks = mean_probs.shape[-2]
    share = mean_probs.new_full((tasks,), 1 / tasks) if share is None else share
    joint = mean_probs * share[:, None]
    tiny = torch.finfo(mean_probs.dtype).tiny
    log_expert = joint.sum(-2, keepdim=True).clamp_min(tiny).log()
    return -(joint * (mean_probs.clamp_min(tiny).log() - log_expert)).sum((-1, -2))


class RoutingStatistics:
    """Gate mass and selection frequency per layer, task and expert, accumulated over batches."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._tokens = torch.zeros(())

    def add(self, layer: int, gates: Tensor, counts: Sequence[int]) -> None:
        """Add the gates (T, N) of one layer's forward pass, with ``counts`` rows of every task."""
        gates = gates.detach()
        both = torch.stack([gates, (gates > 0).to(gates.dtype)])
        sums = torch.stack([run.sum(1) for run in both.split(list(counts), dim=1)], dim=1).double().cpu()
        self._sums[layer] = self._sums.get(layer, 0) + sums
        if layer == 0:
            self._tokens = self._tokens + torch.tensor(counts, dtype=torch.float64)

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


class Batch:
    """How the images of one pass divide among the tasks, and what the routers chose in it.

    ``size`` is the length of the first axis of every input: images, or one row of packed tokens.
    """

    def __init__(self, routing: "Routing", counts: tuple[int, ...], size: int) -> None:
        self.routing, self.counts = routing, counts
        self._axis = torch.empty(size, device="meta")  # in a compiled pass its length is a symbol, an int a constant
        self.offsets = offsets_of(counts, routing.device)
        self.real: Tensor | None = None  # indices of the tokens that are no padding
        self.images: tuple[int, ...] = counts  # of a batch with padding, whose counts are tokens
        self.tokens = 0  # of such a batch, or of packed sequences, with the padding
        self._probs: dict[int, Tensor] = {}
        self._recording, self._fault = True, "saw no pass"

    @property
    def size(self) -> int:
        return self._axis.shape[0]

    def segments(self, x: Tensor) -> tuple[TaskSegments, Tensor | None]:
        """(the segments of the rows of x (.., d), the indices of those rows if some others are padding)."""
        rows = x.shape[:-1].numel()
        if x.shape[0] != self.size and (x.ndim > 2 or rows != self.tokens):
            raise UserError(
                f"an input of shape {tuple(x.shape)} in a batch of {self.size}: its first axis must be the images of "
                "routing.batch(), or one batch follows another that is still open"
            )
        if self.tokens == rows:
            return _segments(x, self.offsets, self.counts, 1), self.real
        length = rows // self.size
        if self.tokens and length != 1:  # a step of generate() adds one token that is no padding
            raise UserError(f"{rows} tokens, but the batch was opened for {self.tokens}")
        offsets = offsets_of(self.images, x.device) if self.tokens else self.offsets
        return _segments(x, offsets, self.images, length), None

    def record(self, layer: int, mean_probs: Tensor) -> None:
        """Keep P (tasks, C) of one layer."""
        if self._recording:
            if layer in self._probs:
                self._fault = "saw two passes in this batch"
            elif not self._probs:
                self._fault = ""
            self._probs[layer] = mean_probs

    def mi_loss(self) -> Tensor:
        """The mutual-information loss of the batch's pass, summed over layers; call it once.

        In a data-parallel run it is that of all processes' tokens, and every process must call it. 0 for a batch of
        padding. UserError without a pass, after two, or if the pass ran without a gradient where this loss needs one.
        """
        if self._fault:
            raise UserError(f"mi_loss() {self._fault}: open routing.batch() for each pass")
        layers = torch.stack([self._probs[layer] for layer in sorted(self._probs)])
        self._probs, self._recording, self._fault = {}, False, "was called already"
        if torch.is_grad_enabled() and not layers.requires_grad and self.routing.trains:
            raise UserError(
                "mi_loss() has no gradient: the pass ran under no_grad, or under reentrant checkpointing; use "
                "checkpoint(.., use_reentrant=False)"
            )
        own = self.offsets.to(layers.device).diff().to(layers.dtype)
        totals = over_ranks(own)
        layers = over_ranks(layers * (own / totals.clamp_min(1))[:, None])  # each process has the mean of its own
        present = (totals > 0).to(layers.dtype)
        return mutual_information_loss(layers, present / present.sum().clamp_min(1)).sum()

    def close(self) -> None:
        """What checkpointing runs again after this is not recorded."""
        self._recording = False


def _segments(x: Tensor, offsets: Tensor, counts: tuple[int, ...], length: int) -> TaskSegments:
    """``counts`` are in units of ``length`` rows; a compiled pass must not depend on them, an exported one does."""
    exporting = torch.compiler.is_exporting()
    if exporting and any(count != counts[0] for count in counts):
        raise UserError(f"torch.export needs equally many images of every task, not {counts}")
    rows = None if torch.compiler.is_compiling() and not exporting else counts
    on_device = offsets if offsets.device == x.device else offsets.to(x.device, non_blocking=True)
    return TaskSegments(on_device, len(offsets) - 1, rows and tuple(n * length for n in rows), length)


def _total(counts: tuple[int, ...]) -> int:
    """Their sum. Under torch.export they may be symbols, of which a program cannot hold a sum."""
    equal = all(count == counts[0] for count in counts)
    return counts[0] * len(counts) if equal else sum(counts)


_tracker = ModuleTracker()  # says whether a backward pass runs


def recomputing() -> bool:
    """Whether this thread runs a backward pass, in which checkpointing runs layers again; maybe, in a compiled one."""
    return torch.compiler.is_compiling() or _tracker.is_bw


class Selection:
    """Which set of adapters the passes of a thread use; shared by the layers of one model. None switches all off."""

    def __init__(self, default: str = "", saved: dict[str, tuple[str, ...]] | None = None) -> None:
        self.default, self._local = default, threading.local()
        self.saved = saved or {}  # for every set the names of the modules that are trained and saved with it

    @property
    def name(self) -> str | None:
        """UserError in a layer that runs again without its set, if there are several."""
        used = getattr(self._local, "used", None)
        if used is not None:
            return used[0]
        if len(self.saved) > 1 and not torch.compiler.is_compiling() and recomputing():
            raise UserError(
                "a layer with several sets of adapters runs again outside `with use_adapters(model, ..):`, as "
                "checkpointing does: call backward() inside, or give checkpoint() context_fn=routing.checkpoint"
            )
        return self.default

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        before = getattr(self._local, "used", None)
        self._local.used = (name,)
        try:
            yield
        finally:
            self._local.used = before

    def __getstate__(self) -> tuple:
        return self.default, self.saved

    def __setstate__(self, state: tuple) -> None:
        self.__init__(*state)  # type: ignore[misc]


class Again:
    """A context that checkpointing enters for every backward pass: made anew of ``managers`` each time."""

    def __init__(self, *managers: Callable[[], AbstractContextManager]) -> None:
        self._managers, self._entered = managers, ExitStack()

    def __enter__(self) -> None:
        for manager in self._managers:
            self._entered.enter_context(manager())

    def __exit__(self, *_: object) -> None:
        self._entered.close()


class Routing:
    """What the experts of one model share: the tasks, the kernel, and the batch that is open in a thread.

    ``deterministic`` makes the bits of a token in the forward pass of our kernels independent of the batch around it
    (:func:`kernels.lora_moe`).
    """

    def __init__(
        self, tasks: int, kernel: str = "auto", deterministic: bool = False, selection: Selection | None = None
    ) -> None:
        self.tasks, self.kernel, self.deterministic = tasks, kernel, deterministic
        self.selection = selection or Selection()
        self.statistics: RoutingStatistics | None = None
        self._start()

    def _start(self) -> None:
        self._layers: list[weakref.ref] = []
        self._local = threading.local()  # .entered: (the batch open in this thread,); .newest: that or the last one
        self._open: list[Batch | None] = []

    def __getstate__(self) -> dict:
        """A copy starts without a batch; the copied layers add themselves."""
        return {name: getattr(self, name) for name in ("tasks", "kernel", "deterministic", "selection")}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def add_layer(self, layer: Any) -> None:
        self._layers.append(weakref.ref(layer))

    @property
    def layers(self) -> list[Any]:
        """The adapted layers that read this routing."""
        return [layer for layer in [reference() for reference in self._layers] if layer is not None]

    @property
    def device(self) -> torch.device:
        for layer in self.layers:
            return layer.one_task.device
        return torch.device("cpu")

    @property
    def trains(self) -> bool:
        return any(layer.routers.requires_grad for layer in self.layers)

    def batch(self, images: Sequence[int], mask: Tensor | None = None) -> AbstractContextManager[Batch]:
        """``with routing.batch([8, 8]):`` says how many images of a pass belong to each task; it is task-major.

        An image may be any sequence of tokens. With ``mask`` (images, L), tokens whose element is 0 or False are
        padding: no expert sees them, and neither the mutual-information loss nor the routing statistics count them. A
        model of one task needs no batch unless it has padding. Gradient checkpointing runs layers again in the backward
        pass: call backward() in the batch, or give checkpoint() ``context_fn=routing.checkpoint``.
        """
        images = self._checked(images)
        if mask is None:
            return self._opened(Batch(self, images, _total(images)))
        if mask.ndim != 2 or len(mask) != _total(images):
            raise UserError(f"a mask of shape {tuple(mask.shape)} for {sum(images)} images: it is (images, tokens)")
        counts = tuple(int(part.sum()) for part in mask.ne(0).cpu().split(list(images)))
        batch = Batch(self, counts, len(mask))
        batch.images, batch.tokens = images, mask.numel()
        batch.real = mask.flatten().nonzero().flatten().to(self.device)
        return self._opened(batch)

    def batch_tokens(self, counts: Sequence[int]) -> AbstractContextManager[Batch]:
        """As :meth:`batch`, for packed sequences of different lengths: the tokens of the pass per task."""
        batch = Batch(self, self._checked(counts), 1)
        batch.tokens = sum(counts)
        return self._opened(batch)

    def _checked(self, counts: Sequence[int]) -> tuple[int, ...]:
        if len(counts) != self.tasks:
            raise UserError(f"{len(counts)} counts for {self.tasks} tasks")
        return tuple(counts)

    @contextmanager
    def _opened(self, batch: Batch) -> Iterator[Batch]:
        with self._entered(batch):
            self._local.newest = batch
            try:
                yield batch
            finally:
                batch.close()

    @contextmanager
    def _entered(self, batch: Batch | None) -> Iterator[None]:
        before = getattr(self._local, "entered", None)
        self._local.entered = (batch,)
        self._open.append(batch)
        try:
            yield
        finally:
            self._local.entered = before
            self._open.remove(batch)

    def current(self) -> Batch | None:
        """The batch of a pass: the one open in this thread or, in a backward pass, the only one open in the process.

        A backward pass of CUDA recomputes checkpointed layers in a thread of its own. UserError without a batch if
        there are several tasks.
        """
        entered = getattr(self._local, "entered", None)
        if entered is None and self._open and recomputing():
            opened = list(self._open)
            entered = tuple(opened) if len(opened) == 1 else None
        batch = None if entered is None else entered[0]
        if batch is None and self.tasks > 1:
            raise UserError(
                f"a pass of {self.tasks} tasks outside `with routing.batch([..]):`, which says whose tokens are whose; "
                "a layer that checkpointing runs again needs it too: call backward() inside, or give checkpoint() "
                "context_fn=routing.checkpoint"
            )
        return batch

    def record(
        self, batch: Batch | None, layer: int, mean_probs: Tensor, gates: Tensor, segments: TaskSegments
    ) -> None:
        """Called by the adapted layers in their forward pass."""
        if batch is not None:
            batch.record(layer, mean_probs)
        if self.statistics is not None:
            if segments.counts is None:
                raise UserError("routing statistics are of eager passes, which know the counts of every task")
            self.statistics.add(layer, gates, segments.counts)

    def checkpoint(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """``context_fn`` of :func:`torch.utils.checkpoint.checkpoint`: the pass that runs again sees its own batch and
        set of adapters."""
        batch, name = self.current(), self.selection.name
        return nullcontext(), Again(lambda: self._entered(batch), lambda: self.selection.use(name))

    def mi_loss(self) -> Tensor:
        """:meth:`Batch.mi_loss` of this thread's newest batch; 0 for one task, which says nothing about the expert."""
        if self.tasks == 1:
            return torch.zeros((), device=self.device)
        batch = getattr(self._local, "newest", None)
        if batch is None:
            raise UserError("mi_loss() without a pass: open routing.batch() for each pass")
        return batch.mi_loss()
