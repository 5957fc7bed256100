"""What every decoder promises: predictions by task from the rows that a task reads, and gradients everywhere."""

import pytest
import torch

from model.decoders import Features

NAMES = ("fgmoe", "fgmoe, ase", "plain", "mlore")
CHANNELS = {"seg": 5, "sal": 2, "edge": 1}
SOME = {"seg": torch.tensor([0, 2]), "edge": torch.tensor([1, 2])}
every_decoder = pytest.mark.parametrize("name", NAMES)


@every_decoder
def test_a_task_reads_its_rows_alone(make, features, name):
    decoder = make(name).eval()
    whole, some = decoder(features), decoder(Features(features.maps, SOME))
    assert {task: y.shape[:2] for task, y in whole.items()} == {task: (3, n) for task, n in CHANNELS.items()}
    assert list(some) == ["seg", "edge"]
    for task, rows in SOME.items():
        torch.testing.assert_close(some[task], whole[task][rows], rtol=1e-11, atol=1e-11)


@every_decoder
def test_a_task_without_rows_gets_none(make, features, name):
    """A batch may have no image of a task."""
    decoder = make(name).eval()
    none = torch.tensor([], dtype=torch.int64)
    some = decoder(Features(features.maps, {"seg": SOME["seg"], "sal": none, "edge": SOME["edge"]}))
    whole = decoder(Features(features.maps, SOME))
    assert some["sal"].shape[:2] == (0, 2) and some["sal"].shape[2:] == some["seg"].shape[2:]
    assert all(torch.equal(some[task], whole[task]) for task in SOME)


@every_decoder
def test_regularisers_are_over_the_tasks_that_have_rows(make, features, name):
    decoder = make(name).eval()  # batch norm has moved between two passes in training
    none = torch.tensor([], dtype=torch.int64)
    values = []
    for rows in (SOME, {"seg": SOME["seg"], "sal": none, "edge": SOME["edge"]}):
        decoder(Features(features.maps, rows))
        values.append(decoder.regularisers())
    torch.testing.assert_close(values[1], values[0], rtol=1e-11, atol=1e-11)


@every_decoder
def test_features_per_task_are_those_of_the_task(make, features, name):
    """With the same features for every task nothing changes, in whatever order the rows stand."""
    decoder = make(name).eval()
    rows = {"edge": torch.arange(2), "seg": torch.arange(2, 4)}
    maps = tuple(tap[torch.cat([SOME["edge"], SOME["seg"]])] for tap in features.maps)
    per_task, shared = decoder(Features(maps, rows, per_task=True)), decoder(Features(features.maps, SOME))
    for task in SOME:
        torch.testing.assert_close(per_task[task], shared[task], rtol=1e-11, atol=1e-11)


@every_decoder
def test_gradients_reach_every_parameter(make, features, name):
    decoder = make(name)
    outputs = list(decoder(features).values())
    loss = sum((y * torch.randn_like(y)).sum() for y in outputs) + sum(decoder.regularisers().values())
    loss.backward()
    lacking = [key for key, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert lacking == []
