"""Ranges for profilers: named and nested when on, nothing when off."""

import sys
import types
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from kernels import nvtx
from train.run.pace import waiting

ROOT = Path(__file__).parents[2]


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
    monkeypatch.setattr(nvtx, "span", nullcontext)
    return seen


def test_off_it_does_not_record(recorded):
    with nvtx.span("a"):
        pass
    assert recorded == []


def test_every_caller_asks_the_module_which_range_is_meant():
    """A name that was imported once would stay without effect."""
    packages = "kernels", "fastmoe_lora", "model", "train", "bench"
    sources = {path: path.read_text() for package in packages for path in (ROOT / package).rglob("*.py")}
    assert any("nvtx.span(" in source for source in sources.values())
    assert [path for path, source in sources.items() if "nvtx import span" in source] == []


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
