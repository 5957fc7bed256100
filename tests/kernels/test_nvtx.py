"""Ranges for profilers: named and nested when on, nothing when off."""

import sys
import types
from contextlib import contextmanager

import pytest

from kernels import nvtx
from train.run.pace import waiting


@pytest.fixture
def recorded(monkeypatch):
    """The names that a profiler would see, opened as "+" and closed as "-"."""
    seen = []

    @contextmanager
    def annotate(name, domain):
        seen.append(f"+{name}")
        yield
        seen.append(f"-{name}")

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    monkeypatch.setattr(nvtx, "_on", False)
    return seen


def test_off_it_neither_records_nor_makes_an_object(recorded):
    assert nvtx.span("a") is nvtx.span("b")
    with nvtx.span("a"):
        pass
    assert recorded == []


def test_on_it_names_what_runs_inside(recorded):
    nvtx.enable()
    with nvtx.span("outer"), nvtx.span("inner"):
        pass
    assert recorded == ["+outer", "+inner", "-inner", "-outer"]


def test_the_wait_for_an_item_is_a_range_and_its_use_is_not(recorded):
    nvtx.enable()
    for item in waiting([1, 2]):
        recorded.append(item)
    assert recorded == ["+data", "-data", 1, "+data", "-data", 2, "+data", "-data"]
