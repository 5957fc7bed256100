"""Batches: what one holds, and the loaders."""

import os
import sys
import time
from itertools import islice
from multiprocessing import get_start_method

import numpy as np
import pytest
import torch

from kernels.errors import UserError
from train.datasets.batches import _end_with_parent, collate, eval_loader, train_loader
from train.datasets.sampler import BatchSampler
from train.tasks import TASKS

GROUPED_TASKS = [("seg", "sal"), ("normals",), ("sal", "edge")]
SIDE = 4


class Toy:
    """7 + 2 + 4 images in shuffled order; an image holds its index in one channel and its epoch in the next."""

    groups = tuple(np.split(np.random.default_rng(1).permutation(13), [7, 9]))

    def __init__(self, broken=None):
        self.broken = broken

    def __len__(self):
        return 13

    def __getitem__(self, key):
        index, epoch = key
        if index == self.broken:
            raise UserError("a.jpg cannot be read (OSError: truncated): restore the file")
        image = np.zeros((SIDE, SIDE, 3), np.uint8)
        image[..., 0], image[..., 1] = index, epoch
        tasks = next(tasks for group, tasks in zip(self.groups, GROUPED_TASKS, strict=True) if index in group)
        return {"image": image} | {task: label(task, index) for task in tasks}


def label(task, index):
    if task == "normals":
        return np.full((3, SIDE, SIDE), index, np.float32)
    return np.full((SIDE, SIDE), index, np.uint8)


def keys_of(batch):
    return [(int(image[0, 0, 0]), int(image[1, 0, 0])) for image in batch.images]


# Batch


def test_collate_stacks_the_labels_there_are_in_the_order_of_tasks():
    seg, normals, edge = (int(group[0]) for group in Toy.groups)
    toy = Toy()
    batch = collate([toy[i, 0] for i in (edge, normals, seg, normals)], ["edge", "normals", "sal", "seg"])
    assert list(batch.labels) == list(batch.index) == ["seg", "sal", "normals", "edge"]
    assert {task: index.tolist() for task, index in batch.index.items()} == {
        "seg": [2],
        "sal": [0, 2],
        "normals": [1, 3],
        "edge": [0],
    }
    assert batch.counts == {"seg": 1, "sal": 2, "normals": 2, "edge": 1}
    assert keys_of(batch) == [(edge, 0), (normals, 0), (seg, 0), (normals, 0)]
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (4, 3, SIDE, SIDE)
    assert batch.images.is_contiguous()
    assert batch.labels["sal"].dtype == torch.uint8 and batch.labels["sal"][:, 0, 0].tolist() == [edge, seg]
    assert batch.labels["normals"].dtype == torch.float32 and batch.labels["normals"].shape == (2, 3, SIDE, SIDE)
    assert all(index.dtype == torch.int64 for index in batch.index.values())


def test_collate_ignores_tasks_that_are_not_asked_for():
    batch = collate([Toy()[int(Toy.groups[0][0]), 0]], ["sal"])
    assert list(batch.labels) == ["sal"]


def test_a_batch_moves_to_a_device_as_a_whole():
    batch = collate([Toy()[0, 0]], TASKS).to("meta")
    assert {tensor.device.type for tensor in [batch.images, *batch.labels.values(), *batch.index.values()]} == {"meta"}


# Loaders


@pytest.mark.parametrize("workers", [0, 2])
def test_train_loader_yields_the_batches_of_the_sampler(workers):
    loader = train_loader(Toy(), TASKS, batch_size=6, steps=range(3, 9), seed=5, workers=workers)
    batches = list(loader)
    assert len(loader) == 6
    assert [keys_of(batch) for batch in batches] == list(BatchSampler(Toy.groups, 6, range(3, 9), seed=5))
    for batch in batches:
        for task, index in batch.index.items():
            for i, own in zip(index.tolist(), batch.labels[task].numpy(), strict=True):
                np.testing.assert_array_equal(own, label(task, keys_of(batch)[i][0]))


def test_a_training_batch_has_every_task_where_need_be_without_a_label():
    batches = list(train_loader(Toy(), TASKS, batch_size=2, steps=range(7), seed=0, workers=0))
    assert {tuple(batch.labels) for batch in batches} == {tuple(TASKS)}
    assert {batch.counts["normals"] for batch in batches} == {0, 1}
    without = next(batch for batch in batches if not batch.counts["normals"])
    assert without.labels["normals"].shape == (0, 3, SIDE, SIDE) and without.index["normals"].dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_loader_visits_every_image_in_order_and_again(workers):
    loader = eval_loader(Toy(), TASKS, batch_size=5, workers=workers)
    for _ in range(2):
        batches = [keys_of(batch) for batch in loader]
        assert [len(batch) for batch in batches] == [5, 5, 3] and len(loader) == 3
        assert sum(batches, []) == [(index, 0) for index in range(13)]


def test_tasks_without_label_in_a_batch_are_absent():
    for index, batch in enumerate(eval_loader(Toy(), TASKS, batch_size=1, workers=0)):
        expected = next(tasks for group, tasks in zip(Toy.groups, GROUPED_TASKS, strict=True) if index in group)
        assert tuple(batch.labels) == tuple(batch.index) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_left_in_the_middle_starts_afresh(workers):
    loader = eval_loader(Toy(), TASKS, batch_size=2, workers=workers)
    for _ in range(2):
        assert [keys_of(batch)[0][0] for batch in islice(loader, 2)] == [0, 2]
    assert len(list(loader)) == 7


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_surfaces_with_its_one_line(workers):
    batches = iter(eval_loader(Toy(broken=4), TASKS, batch_size=3, workers=workers))
    assert len(next(batches).images) == 3
    with pytest.raises(UserError) as error:
        next(batches)
    assert type(error.value) is UserError
    assert str(error.value) == "a.jpg cannot be read (OSError: truncated): restore the file"


class Process(Toy):
    """Labels tell which process loads them, and with how many threads."""

    def __getitem__(self, key):
        process = {"seg": torch.get_num_threads(), "normals": os.getpid()}
        return super().__getitem__(key) | {task: label(task, value) for task, value in process.items()}


def test_a_worker_lives_as_long_as_its_loader_and_has_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        loader = eval_loader(Process(), ["seg", "normals"], batch_size=13, workers=1)
        batches = [next(iter(loader)) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    assert {batch.labels["seg"].unique().item() for batch in batches} == {1}
    processes = {batch.labels["normals"].unique().item() for batch in batches}
    assert len(processes) == 1 and os.getpid() not in processes


def test_loading_leaves_the_random_state_of_torch_alone():
    before = torch.get_rng_state()
    list(eval_loader(Toy(), TASKS, batch_size=5, workers=0))
    list(train_loader(Toy(), TASKS, batch_size=5, steps=range(2), seed=0, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(sys.platform != "linux" or get_start_method() != "fork", reason="workers are forked on Linux alone")
def test_a_worker_whose_parent_ended_before_it_began_ends_too():
    """Of a process that is killed just after it forked; such a worker waited for ever."""
    read, write = os.pipe()
    if os.fork() == 0:
        parent = os.getpid()
        if os.fork() == 0:
            while os.getppid() == parent:
                time.sleep(0.01)
            _end_with_parent(parent, 0)
            os.write(write, b"alive")
        os._exit(0)
    os.close(write)
    os.wait()
    assert os.read(read, 5) == b""  # the worker has closed it
    os.close(read)


@pytest.mark.skipif(get_start_method() != "fork", reason="a patch reaches forked workers alone")
def test_a_small_shared_memory_is_said_and_the_batches_are_those_of_no_workers(monkeypatch, capfd):
    """Docker gives /dev/shm 64 MB. Torch loses a batch that does not fit, and waits for it."""
    share, shared = torch.Tensor.share_memory_, iter(range(100))

    def refuse(tensor):
        if next(shared) < 2 * len(TASKS):
            return share(tensor)
        raise RuntimeError("unable to allocate shared memory(shm) for file </x>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    steps = {"batch_size": 5, "steps": range(6), "seed": 0}
    alone, loader = train_loader(Toy(), TASKS, **steps, workers=0), train_loader(Toy(), TASKS, **steps, workers=1)
    for _ in range(2):
        assert [keys_of(batch) for batch in loader] == [keys_of(batch) for batch in alone]
    said = capfd.readouterr().err
    assert said.startswith("warning: /dev/shm is too small") and "--shm-size=1g" in said and said.count("\n") == 1
