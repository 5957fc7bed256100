"""Who waits for whom: the model for the loader, or the loader for the model."""

import pytest

from train.run import pace
from train.run.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(pace, "time", made)
    return made


def run(clock, loading, computing, between=0.0):
    watched = Pace(8)

    def batches():
        for i in range(5):
            clock.now += 100 if i == 0 else loading
            yield i

    for _ in watched.watch(batches()):
        clock.now += computing
        watched.step()
        clock.now += between
    return watched


def test_a_model_that_sets_the_pace(clock):
    watched = run(clock, loading=0.0, computing=0.5)
    assert (watched.speed, watched.appetite, watched.hint) == (16, 16, "")


def test_a_loader_that_sets_the_pace(clock):
    watched = run(clock, loading=1.5, computing=0.5)
    assert (watched.speed, watched.appetite) == (4, 16)
    assert watched.hint.startswith("the loader gave 4 images/s, and the model could take 16: more --workers")


def test_what_is_between_steps_is_nobodys_time(clock):
    """An evaluation, for example; the first batch, which starts the workers, does not count either."""
    watched = run(clock, loading=0.1, computing=0.4, between=50)
    assert watched.speed == pytest.approx(16)


def test_a_run_of_one_step_has_no_speed():
    watched = Pace(8)
    for _ in watched.watch([0]):
        watched.step()
    assert (watched.speed, watched.appetite, watched.hint) == (0, 0, "")
