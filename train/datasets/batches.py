"""Batches: what they hold, and the processes that load them."""

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_start_method
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from fastmoe_lora.ranks import rank, world_size
from kernels.errors import UserError
from train.datasets.base import DataSet, Key
from train.datasets.sampler import BatchSampler, Slices
from train.files.processes import end_with_parent, stop_for_parent_alone
from train.protocols import Sample
from train.tasks import TASKS


@dataclass(frozen=True, eq=False)
class Batch:
    """``images`` uint8 (B, 3, H, W). Per task that has labels in the batch, in the order of TASKS:
    ``labels[task]`` (n_t, ...) with the dtypes of :mod:`train.tasks`, and ``index[task]`` int64 (n_t,), the
    ascending positions in the batch of the images they belong to.
    """

    images: Tensor
    labels: dict[str, Tensor]
    index: dict[str, Tensor]

    @property
    def counts(self) -> dict[str, int]:
        """Labelled images per task."""
        return {task: len(index) for task, index in self.index.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in an order that depends on the tasks alone."""
        return [self.images, *self.labels.values(), *self.index.values()]

    def parts(self, count: int) -> list["Batch"]:
        """``count`` batches of every ``count``-th image each, all with every task, where need be without a label."""
        if count == 1:
            return [self]
        return [self._part(first, count) for first in range(count)]

    def _part(self, first: int, count: int) -> "Batch":
        mine = {task: (index % count == first).nonzero().squeeze(1) for task, index in self.index.items()}
        return Batch(
            self.images[first::count],
            {task: label[mine[task]] for task, label in self.labels.items()},
            {task: index[mine[task]] // count for task, index in self.index.items()},
        )

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a GPU reads by itself; DataLoader calls it."""
        pinned = [{task: t.pin_memory() for task, t in tensors.items()} for tensors in (self.labels, self.index)]
        return Batch(self.images.pin_memory(), *pinned)

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on ``device``; the host does not wait for a copy to a GPU."""
        non_blocking = torch.device(device).type == "cuda"
        return Batch(
            self.images.to(device, non_blocking=non_blocking),
            {task: label.to(device, non_blocking=non_blocking) for task, label in self.labels.items()},
            {task: index.to(device, non_blocking=non_blocking) for task, index in self.index.items()},
        )


def collate(samples: Sequence[Sample], tasks: Sequence[str]) -> Batch:
    """Stacks the images of ``samples`` and, per task, the labels that the samples have."""
    return collate_all(samples, [task for task in tasks if any(task in sample for sample in samples)])


def collate_all(samples: Sequence[Sample], tasks: Sequence[str]) -> Batch:
    """The same with every task, where need be with no label: training adds up the losses of all tasks, and those of
    all processes."""
    images = torch.from_numpy(np.stack([sample["image"] for sample in samples]))
    present = {task: [i for i, sample in enumerate(samples) if task in sample] for task in TASKS if task in tasks}
    return Batch(
        images.permute(0, 3, 1, 2).contiguous(),
        {task: _labels(task, [samples[i][task] for i in at], images.shape[1:3]) for task, at in present.items()},
        {task: torch.tensor(at, dtype=torch.int64) for task, at in present.items()},
    )


def _labels(task: str, labels: list[NDArray], size: Sequence[int]) -> Tensor:
    dtype, axes = TASKS[task].label_type
    return torch.from_numpy(np.stack(labels) if labels else np.empty((0, *axes, *size), dtype))


class Loader:
    """Batches, loaded by ``workers`` processes (0: by this one). It can be iterated any number of times.

    The processes live as long as the loader, each with one thread. A UserError in a process is raised here
    with the same message. torch's global random state does not change. ``gather`` makes a batch of a list of samples.
    Where /dev/shm is too small to hand batches over, one line says so, and this process loads the rest.
    """

    def __init__(
        self, dataset: DataSet, batches: Iterable[list[Key]], workers: int, gather: Callable[[list[Sample]], Any]
    ) -> None:
        self._batches = batches
        self._open = partial(
            DataLoader,
            _Reporting(dataset),
            collate_fn=partial(_gather_or_report, gather=gather),
            worker_init_fn=partial(_end_with_parent, os.getpid()),
            pin_memory=torch.cuda.is_available(),  # copies to a GPU do not wait
            generator=torch.Generator(),  # DataLoader draws a seed per iteration, by default from the global state
        )
        self._loader = self._open(batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        done = 0
        try:
            for batch in _read(self._loader):
                done += 1
                yield batch
            return
        except SharedMemoryError as error:
            print(f"warning: {error}", file=sys.stderr)
        self._loader = self._open(batch_sampler=self._batches)
        yield from _read(self._open(batch_sampler=islice(iter(self._batches), done, None)))


class SharedMemoryError(UserError):
    """A worker has no memory to hand a batch over. Torch would lose that batch, and wait for it without end."""


SMALL_MEMORY = (
    "/dev/shm is too small for the batches of --workers, so that this process prepares them, which is slower: give "
    "the container more (docker run --shm-size=1g), or pass --workers 0"
)


def _read(loader: DataLoader) -> Iterator[Any]:
    """The batches; raises the UserErrors among them."""
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _end_with_parent(parent: int, worker: int) -> None:
    """On Linux a worker ends with the process that started it, and prints nothing of the connections it then lacks."""
    end_with_parent(signal.SIGKILL)
    stop_for_parent_alone(parent)
    if sys.platform == "linux":
        if os.getppid() != parent and get_start_method() == "fork":  # it ended before it could be waited for
            os._exit(1)
        sys.stderr = _Patient(sys.stderr)


class _Patient(io.TextIOBase):
    """Waits a moment before it first writes. Of a process that is killed, connections break before others are told."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.waited = stream, False

    def write(self, text: str) -> int:
        if not self.waited:
            self.waited = True
            time.sleep(0.2)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


class _Reporting(Dataset[Sample | UserError]):
    """Returns a user's mistake instead of raising it, since torch would append a traceback to its message."""

    def __init__(self, dataset: DataSet) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Sample | UserError:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def _gather_or_report(samples: list[Sample | UserError], gather: Callable[[list[Sample]], Any]) -> Any:
    faults = [sample for sample in samples if isinstance(sample, UserError)]
    if faults:
        return faults[0]
    batch = gather([sample for sample in samples if not isinstance(sample, UserError)])
    if get_worker_info() and isinstance(batch, Batch):
        try:  # torch would do it in a thread of the worker, whose errors nobody hears
            for tensor in batch.tensors:
                tensor.share_memory_()
        except RuntimeError:
            return SharedMemoryError(SMALL_MEMORY)
    return batch


def train_loader(
    dataset: DataSet, tasks: Sequence[str], batch_size: int, steps: range, seed: int, workers: int
) -> Loader:
    """The batches of ``steps``, or in a data-parallel run this process's slices of them, with every task."""
    batches = Slices(BatchSampler(dataset.groups, batch_size, steps, seed))
    return Loader(dataset, batches, workers, partial(collate_all, tasks=tasks))


def batch_ids(dataset: DataSet, batch_size: int, step: int, seed: int) -> list[str]:
    """The ids of the images in the training batch of ``step``."""
    (keys,) = BatchSampler(dataset.groups, batch_size, range(step, step + 1), seed)
    return [dataset.ids[index] for index, _ in keys]


def eval_loader(dataset: DataSet, tasks: Sequence[str], batch_size: int, workers: int) -> Loader:
    """Every image once, in order, at epoch 0; the last batch may be smaller. In a data-parallel run each process has
    every ``world_size()``-th batch."""
    batches = _in_order(dataset, batch_size)[rank() :: world_size()]
    return Loader(dataset, batches, workers, partial(collate, tasks=tasks))


def sample_loader(dataset: DataSet, batch_size: int, workers: int) -> Loader:
    """The same images as lists of samples, whose labels may differ in size."""
    return Loader(dataset, _in_order(dataset, batch_size), workers, list)


def _in_order(dataset: DataSet, batch_size: int) -> list[list[Key]]:
    keys = [(index, 0) for index in range(len(dataset))]
    return [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
