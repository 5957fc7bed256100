"""Which images a training batch takes.

In a partially labelled data set a random batch has many labels of a task or none, and tensors of ever other shapes.
Here every batch takes a share of each group of images that are labelled for the same tasks: a group of a quarter of the
images has a quarter of the places, and one too small for a place in every batch has one in every n-th. So an epoch is
a pass over the images, and the tensors have few shapes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from fastmoe_lora.ranks import rank, world_size
from train.datasets.base import Key

GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples spread most evenly over a circle

Counts = NDArray[np.int64]  # of images per group


def compositions(sizes: Sequence[int], batch_size: int, epoch: int) -> tuple[Counts, Counts]:
    """What an epoch takes from groups of these ``sizes``: (images of each group before it, int64 (groups,); images of
    each group in each of its batches, int64 (steps, groups)).

    An epoch is ceil(images / batch_size) batches. Its places are shared among the groups in proportion, rounded so that
    after any number of epochs each is less than one image from its share. Written group after group, the places are a
    list of which each of the ``steps`` batches takes every ``steps``-th. So a group's count in two batches of an epoch
    differs by at most 1, and an epoch has at most one composition per group. The order of the batches spreads those
    with a place for a small group.
    """
    ends = np.cumsum([0, *sizes])
    steps = math.ceil(ends[-1] / batch_size)
    taken, then = (n * steps * batch_size * ends // ends[-1] for n in (epoch, epoch + 1))
    first = np.argsort(np.arange(steps) * GOLDEN % 1)[:, None]  # neighbours in the list come far apart
    return np.diff(taken), np.diff((then - taken - first + steps - 1) // steps)


def one_composition(sizes: Sequence[int], batch_size: int) -> bool:
    """Whether all batches are composed alike: every group's share of a batch is a whole number of images."""
    return all(batch_size * size % sum(sizes) == 0 for size in sizes)


class BatchSampler(Sampler[list[Key]]):
    """The (index, epoch) keys of each batch, a function of (seed, step) alone: a resumed run sees the same batches.

    Each group has an endless stream of permutations of its images. Every batch takes as many images of each stream as
    its composition says. The epoch of a key is the number of its permutation.
    """

    def __init__(self, groups: Sequence[NDArray[np.int64]], batch_size: int, steps: range, seed: int) -> None:
        self.groups, self.batch_size, self.steps, self.seed = groups, batch_size, steps, seed

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Key]]:
        streams = [self._stream(group) for group in range(len(self.groups))]
        for taken, counts in islice(self._counts(), len(self.steps)):
            yield [
                entry(position)
                for entry, begin, n in zip(streams, taken.tolist(), counts.tolist(), strict=True)
                for position in range(begin, begin + n)
            ]

    def _counts(self) -> Iterator[tuple[Counts, Counts]]:
        """(images taken before, images taken) per group of the batches from the first step on, without end."""
        sizes = [len(group) for group in self.groups]
        first, skipped = divmod(self.steps.start, math.ceil(sum(sizes) / self.batch_size))
        for epoch in count(first):
            taken, counts = compositions(sizes, self.batch_size, epoch)
            yield from islice(zip(taken + counts.cumsum(0) - counts, counts, strict=True), skipped, None)
            skipped = 0

    def _stream(self, group: int) -> Callable[[int], Key]:
        """The group's stream as a function of position; it caches the current permutation."""
        members = self.groups[group]
        current, order = -1, members

        def entry(position: int) -> Key:
            nonlocal current, order
            epoch, place = divmod(position, len(members))
            if epoch != current:
                current, order = epoch, np.random.default_rng([self.seed, group, epoch]).permutation(members)
            return int(order[place]), epoch

        return entry


class Slices:
    """Of each batch the keys of this process: every ``world_size()``-th, from ``rank()`` on."""

    def __init__(self, batches: Iterable[list[Key]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[Key]]:
        for keys in self.batches:
            yield keys[rank() :: world_size()]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]
