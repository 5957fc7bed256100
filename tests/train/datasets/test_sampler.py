"""Which images a training batch takes: in proportion, in few compositions, a function of (seed, step)."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.datasets import sampler
from train.datasets.sampler import BatchSampler, Slices, compositions, one_composition

sizes = st.lists(st.integers(1, 60), min_size=1, max_size=31)
batch_sizes = st.integers(1, 40)


def groups_of(sizes):
    """Groups of so many images, whose indices are mixed."""
    mixed = np.random.default_rng(0).permutation(sum(sizes))
    return np.split(mixed, np.cumsum(sizes)[:-1])


def counts_of(batch, groups):
    return tuple(sum(index in set(group.tolist()) for index, _ in batch) for group in groups)


@settings(deadline=None)
@given(sizes, batch_sizes, st.integers(1, 4), st.integers(0, 9))
def test_after_each_epoch_every_image_was_seen_equally_often_up_to_one(sizes, batch_size, epochs, seed):
    steps = -(-sum(sizes) // batch_size)
    batches = list(BatchSampler(groups_of(sizes), batch_size, range(epochs * steps), seed))
    for epoch in range(1, epochs + 1):
        seen = Counter(index for batch in batches[: epoch * steps] for index, _ in batch)
        assert len(seen) == sum(sizes) and epoch <= min(seen.values()) and max(seen.values()) <= min(seen.values()) + 1


@settings(deadline=None)
@given(sizes, st.integers(1, 40), st.integers(0, 3))
def test_an_epoch_of_whole_batches_shows_every_image_once(sizes, steps, epoch):
    total = sum(sizes)
    batch_size = next(n for n in range(-(-total // steps), total + 1) if total % n == 0)
    begin, end = epoch * total // batch_size, (epoch + 1) * total // batch_size
    keys = [key for batch in BatchSampler(groups_of(sizes), batch_size, range(begin, end), 0) for key in batch]
    assert sorted(keys) == [(index, epoch) for index in range(total)]


@settings(deadline=None)
@given(sizes, batch_sizes, st.integers(0, 1000))
def test_the_batches_of_an_epoch_are_full_alike_and_have_few_compositions(sizes, batch_size, epoch):
    _, counts = compositions(sizes, batch_size, epoch)
    assert (counts.sum(1) == batch_size).all() and (counts >= 0).all()
    assert np.ptp(counts, axis=0).max() <= 1
    assert len(np.unique(counts, axis=0)) <= len(sizes)


@settings(deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), batch_sizes)
def test_one_composition_is_told_before_any_batch(sizes, batch_size):
    some = np.concatenate([compositions(sizes, batch_size, epoch)[1] for epoch in range(sum(sizes))])
    assert one_composition(sizes, batch_size) == (len(np.unique(some, axis=0)) == 1)


def test_compositions_by_hand():
    assert compositions([750, 300, 75, 300], 19, 7)[1].tolist() == [[10, 4, 1, 4]] * 75
    _, counts = compositions([12, 3, 1], 4, 0)
    assert sorted(counts.tolist()) == [[3, 0, 1], [3, 1, 0], [3, 1, 0], [3, 1, 0]]
    assert compositions([5], 8, 3)[1].tolist() == [[8]]


@settings(deadline=None)
@given(st.integers(1, 99), st.integers(200, 500))
def test_the_places_of_a_small_group_are_spread_over_the_epoch(small, steps):
    """No two that follow each other are twice as far apart as equal distances would be."""
    _, counts = compositions([8 * steps - small, small], 8, 0)
    places = np.flatnonzero(counts[:, 1])
    assert len(places) == small
    assert np.diff([*places, places[0] + steps]).max() <= 2 * steps / small


@settings(deadline=None)
@given(sizes, batch_sizes, st.integers(0, 60), st.integers(0, 20), st.integers(0, 9))
def test_a_batch_is_a_function_of_seed_and_step(sizes, batch_size, start, length, seed):
    groups = groups_of(sizes)
    whole = list(BatchSampler(groups, batch_size, range(80), seed))
    part = BatchSampler(groups, batch_size, range(start, start + length), seed)
    assert list(part) == list(part) == whole[start : start + length] and len(part) == length


@settings(deadline=None)
@given(sizes, batch_sizes, st.integers(1, 5))
def test_ranks_partition_every_batch(sizes, batch_size, world):
    batches = BatchSampler(groups_of(sizes), batch_size, range(20), 0)
    slices = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "world_size", lambda: world)
        for rank in range(world):
            patch.setattr(sampler, "rank", lambda rank=rank: rank)
            slices.append(list(Slices(batches)))
    for whole, *parts in zip(batches, *slices, strict=True):
        assert sorted(sum(parts, [])) == sorted(whole) and len(max(parts, key=len)) - len(min(parts, key=len)) <= 1


def test_an_epoch_of_a_group_is_a_permutation_of_it():
    groups = groups_of([7, 2, 4])
    keys = [key for batch in BatchSampler(groups, 6, range(26), 0) for key in batch]  # 12 epochs, 156 places
    for group in groups:
        own = [key for key in keys if key[0] in group]
        assert sorted(own, key=lambda key: key[::-1]) == [(i, n) for n, i in product(range(12), sorted(group))]


def test_order_depends_on_seed_epoch_and_group():
    groups = [np.arange(10), np.arange(10)]  # alike, to compare their orders
    orders = set()
    for seed in range(3):
        for batch in BatchSampler(groups, 20, range(3), seed):
            orders |= {tuple(index for index, _ in batch[:10]), tuple(index for index, _ in batch[10:])}
    assert len(orders) == 3 * 3 * 2
