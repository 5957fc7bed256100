"""Blocks of tasks that kernels find from the offsets on the device: every token once, whatever the composition."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

import triton.language as tl  # noqa: E402

from kernels import Gating, TaskSegments, custom_ops, reference  # noqa: E402
from kernels.jit_helpers import block_of_task  # noqa: E402
from kernels.segments import offsets_of  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not triton.knobs.runtime.interpret else "cpu")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not triton.knobs.runtime.interpret, reason="no GPU and no interpreter"
)
BLOCK = 4
few = settings(max_examples=15, deadline=None, derandomize=True)
fewer = settings(few, max_examples=5)  # of a dozen launches each


@triton.jit
def blocks_kernel(offsets, length, out, block, TASKS: tl.constexpr):
    """(task, first row, end row, tokens of the task) of every program."""
    values = block_of_task(offsets, length, tl.program_id(0), TASKS, block)
    for place in tl.static_range(4):
        tl.store(out + 4 * tl.program_id(0) + place, values[place])


def found(segments, rows, block=BLOCK):
    """What the programs of a grid for ``rows`` rows find."""
    out = torch.full((segments.blocks(rows, block), 4), -1, dtype=torch.int32, device=DEVICE)
    blocks_kernel[(len(out),)](segments.offsets, segments.length, out, block, segments.tasks)
    return out.tolist()


compositions = st.lists(st.integers(0, 9), min_size=1, max_size=6)


@few
@given(counts=compositions, length=st.integers(1, 3), block=st.integers(1, 7))
def test_blocks_cover_every_row_once_in_order_and_never_span_two_tasks(counts, length, block):
    offsets, rows = offsets_of(tuple(counts), DEVICE), sum(counts) * length
    blocks = found(TaskSegments(offsets, len(offsets) - 1, None, length), rows, block)
    used = sum(math.ceil(count * length / block) for count in counts)
    expected, begin = [], 0
    for task, count in enumerate(counts):
        end = begin + count * length
        expected += [[task, first, end, count * length] for first in range(begin, end, block)]
        begin = end
    assert blocks[:used] == expected
    # The grid depends on the number of rows alone: the blocks that are left have no rows.
    assert all(first >= end for _, first, end, _ in blocks[used:])
    assert len(blocks) - used <= len(counts)


@fewer
@given(data=st.data(), counts=compositions)
def test_the_grid_of_a_batch_fits_every_composition(data, counts):
    """12 compositions of as many rows use one grid: a compiled pass has one."""
    rows, tasks = sum(counts), len(counts)
    sizes = {TaskSegments.of(tuple(counts), DEVICE).blocks(rows, BLOCK)}
    for _ in range(12):
        cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=tasks - 1, max_size=tasks - 1)))
        other = [b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True)]
        segments = TaskSegments.of(tuple(other), DEVICE)
        sizes.add(segments.blocks(rows, BLOCK))
        assert sum(max(0, min(BLOCK, end - first)) for _, first, end, _ in found(segments, rows)) == rows
    assert len(sizes) == 1


@few
@given(counts=compositions.filter(any), length=st.integers(1, 3))
def test_the_task_of_each_row(counts, length):
    segments = TaskSegments(offsets_of(tuple(counts), DEVICE), len(counts), None, length)
    expected = [task for task, count in enumerate(counts) for _ in range(count * length)]
    assert segments.task_of_rows(len(expected)).tolist() == expected


def test_offsets_are_on_the_device_in_32_bits():
    segments = TaskSegments.of((2, 0, 5), DEVICE)
    assert segments.offsets.tolist() == [0, 2, 2, 7] and segments.offsets.dtype == torch.int32
    assert segments.offsets.device.type == DEVICE.type and segments.tasks == 3 and segments.counts == (2, 0, 5)


def test_offsets_made_in_inference_mode_can_be_saved_for_a_backward_pass():
    with torch.inference_mode():
        segments = TaskSegments.of((2, 1), DEVICE)
    assert not segments.offsets.is_inference()


# ---- the operation ----

SHAPES = (36, 24), (36, 40), (32, 24), (40, 32), (3, 8, 24)  # x, base, A, B, routers of 8 experts and three tasks
GATING = Gating("ase", 2, 1)
ORDER = 4e-6  # two fp32 sums in different orders, each within 2e-6 as in test_triton.py


@pytest.fixture(scope="module")
def leaves():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=rng).to(DEVICE).requires_grad_() for shape in SHAPES]


def results(operation, leaves, segments):
    x, base, a, b, routers = leaves
    y, g, p = operation(x, base, (a, b), routers, segments, GATING)
    rows = torch.arange(1.0, len(x) + 1, device=DEVICE)[:, None].sin()
    return y.detach(), g.detach(), p.detach(), *torch.autograd.grad(((y * rows).sum() + p.square().sum()), leaves)


@pytest.mark.parametrize("operation", [custom_ops.lora_moe, reference.lora_moe])
@pytest.mark.parametrize("images", [(1, 0, 2), (3, 0, 0), (1, 1, 1), (0, 0, 3)])
@pytest.mark.parametrize("known", [True, False], ids=["counts on the host", "compiled"])
def test_offsets_of_images_are_those_of_their_tokens(operation, images, known, leaves):
    """``length`` rows for each image; without counts the offsets alone say what is whose, as in a compiled pass."""
    length = len(leaves[0]) // sum(images)
    tokens = tuple(n * length for n in images)
    segments = TaskSegments(offsets_of(images, DEVICE), len(images), tokens if known else None, length)
    expected = results(operation, leaves, TaskSegments.of(tokens, DEVICE))
    for actual, right in zip(results(operation, leaves, segments), expected, strict=True):
        if operation is custom_ops.lora_moe or known:
            assert torch.equal(actual, right)
        else:
            assert (actual - right).norm() <= ORDER * right.norm()


@fewer
@given(data=st.data())
def test_unequal_and_empty_tasks_are_the_reference_s(data, leaves):
    rows = len(leaves[0])
    cuts = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2)))
    counts = tuple(b - a for a, b in zip([0, *cuts], [*cuts, rows], strict=True))
    segments = TaskSegments.of(counts, DEVICE)
    expected = results(reference.lora_moe, leaves, segments)
    for actual, right in zip(results(custom_ops.lora_moe, leaves, segments), expected, strict=True):
        assert (actual - right).norm() <= ORDER * right.norm()
