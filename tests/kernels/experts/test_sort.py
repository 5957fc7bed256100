"""The sort of rows by expert: the same order as a stable sort, whatever the selection."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton", reason="Triton's wheels are for Linux")

from kernels import TaskSegments  # noqa: E402
from kernels.experts import sort  # noqa: E402

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="tensors are on the CPU")
KINDS = ("k", "ragged", "too many", "one expert", "first experts")


def assert_sorted(g, segments, slots, sets):
    order, expected = (f(g, segments, slots, sets) for f in (sort.sort, sort.sort_reference))
    for name in ("rows", "places", "ends"):
        assert torch.equal(getattr(order, name), getattr(expected, name)), name
    return order


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_order_is_that_of_a_stable_sort(select, data):
    counts = tuple(data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3).filter(any), "tokens"))
    experts, gates = data.draw(st.integers(1, 9), "experts"), data.draw(st.integers(1, 3), "gates")
    slots, sets = data.draw(st.integers(1, experts), "slots"), data.draw(st.sampled_from([1, len(counts)]), "sets")
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    selected = select(data.draw(st.sampled_from(KINDS), "kind"), gates * sum(counts), experts, slots, rng)
    assert_sorted(selected.float().unflatten(0, (gates, -1)), TaskSegments.of(counts, torch.device("cpu")), slots, sets)


def test_chunks_beyond_one_step_of_the_prefix_keep_their_order(select, monkeypatch):
    monkeypatch.setattr(sort, "PART", 2)
    segments = TaskSegments.of((150, 90), torch.device("cpu"))
    selected = select("ragged", 480, 5, 3, torch.Generator().manual_seed(0))
    for sets in (1, 2):
        assert_sorted(selected.float().unflatten(0, (2, 240)), segments, 3, sets)


def test_a_block_holds_rows_of_one_expert_in_ascending_order(make_problem):
    p = make_problem(kind="ragged", sets=2, gates=2)
    g, order = p.g.flatten(0, 1), sort.sort(p.g, p.segments, p.slots, 2)
    rows, ids, used = order.pairs()
    used = used[:, 0]
    task = (rows % 51 >= 30).long()
    assert g[rows[used], ids[used] % 4].all() and torch.equal(ids[used] // 4, task[used])
    assert used.sum() == g.count_nonzero()
    for start in range(0, len(rows), sort.BLOCK):
        block = slice(start, start + int(used[start : start + sort.BLOCK].sum()))
        assert len(set(ids[block].tolist())) <= 1 and rows[block].diff().gt(0).all()


def test_every_pair_knows_its_place(make_problem):
    p = make_problem(kind="ragged", gates=3)
    g, order = p.g.flatten(0, 1), sort.sort(p.g, p.segments, p.slots, 1)
    row, slot = (order.places >= 0).nonzero(as_tuple=True)
    place = order.places[row, slot]
    assert torch.equal(order.rows[place.long()], row.int())
    assert len(place.unique()) == g.count_nonzero()


def test_of_too_many_experts_those_of_the_lowest_index_stay():
    gates = torch.tensor([[[0, 0.5, torch.nan, -1]]])
    order = assert_sorted(gates, TaskSegments.of((1,), torch.device("cpu")), 2, 1)
    assert order.ends.tolist() == [0, 1, 2, 2]
    assert order.places.tolist() == [[0, sort.BLOCK]]


def test_without_a_token_no_block_is_in_use():
    order = sort.sort(torch.zeros(1, 0, 4), TaskSegments.of((0, 0), torch.device("cpu")), 2, 2)
    assert order.ends.tolist() == [0] * 8 and order.blocks == 0
