"""What the experts add is counted the same on any machine; the committed counts are those of the code that ships."""

import json
from pathlib import Path

import pytest
import triton

from bench import counted, layers
from bench.peers import PEERS
from bench.peers.base import Peer, base_of

RESULTS = Path(counted.__file__).parent / "results" / "counted.json"
pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="counts in Triton's interpreter")


@pytest.fixture(scope="module")
def committed():
    return json.loads(RESULTS.read_text())


@pytest.mark.slow
@pytest.mark.long
def test_the_committed_count_is_of_this_code(committed):
    recorded = next(row for row in committed["rows"] if (row["config"], row["subject"]) == ("16/3/1/4", "ours"))
    measured = counted.measure("16/3/1/4", counted.OURS)
    assert measured["launches"] == recorded["launches"]
    assert measured["bytes_per_token"] == pytest.approx(recorded["bytes_per_token"], rel=1e-3)


def test_peers_add_many_times_as_many_bytes(committed):
    """A promise that needs no clock, for each of the paper's granularities."""
    for config in counted.CONFIGS:
        bytes_of = {row["subject"]: sum(row["bytes_per_token"]) for row in committed["rows"] if row["config"] == config}
        for peer in ("grouped-mm", "scattermoe"):
            assert bytes_of[peer] > 15 * bytes_of["ours"], (config, peer)
        assert bytes_of["expert-loop"] > 50 * bytes_of["ours"]
        assert bytes_of["dense"] > 5 * bytes_of["ours"]


def test_of_large_pools_our_sorted_path_adds_fewer_bytes_than_the_sorted_peers(committed):
    for config in counted.LARGE_CONFIGS:
        rows = [row for row in committed["rows"] if row["config"] == config]
        forward, backward = ({row["subject"]: row["bytes_per_token"][i] for row in rows} for i in (0, 1))
        for peer in ("grouped-mm", "scattermoe"):
            assert forward["ours-grouped"] < 0.75 * forward[peer], (config, peer)
            assert backward["ours-grouped"] < 0.5 * backward[peer], (config, peer)


def test_the_frozen_ffn_itself_adds_nothing(monkeypatch):
    monkeypatch.setattr(counted, "WIDTH", 32)
    monkeypatch.setattr(counted, "TOKENS", (20, 40))
    frozen = Peer("frozen", base_of, reference=base_of)
    assert counted.measure("16/3/1/4", frozen) == {
        "config": "16/3/1/4",
        "subject": "frozen",
        "launches": [0, 0],
        "bytes_per_token": [0.0, 0.0],
    }


def test_a_copy_of_the_tokens_is_seen(monkeypatch):
    monkeypatch.setattr(counted, "WIDTH", 32)
    monkeypatch.setattr(counted, "TOKENS", (20, 40))
    copying = Peer("copying", lambda layer: lambda x: base_of(layer)(x.clone()), reference=base_of)
    row = counted.measure("16/3/1/4", copying)
    assert row["launches"] == [1, 0] and row["bytes_per_token"] == [2 * 32 * 2, 0.0]  # read and written, in fp16


def test_every_peer_that_is_here_and_visible_is_counted(committed):
    here = {name for name, peer in PEERS.items() if not peer.compiled}
    small = {row["subject"] for row in committed["rows"] if row["config"] in counted.CONFIGS}
    large = {row["subject"] for row in committed["rows"] if row["config"] in counted.LARGE_CONFIGS}
    assert small == {"ours", *here}
    assert large == {"ours", "ours-grouped", *counted.LARGE_PEERS}
    assert layers.TASKS == 5


def test_the_guide_shows_the_committed_counts(committed):
    guide = (Path(counted.__file__).parents[1] / "docs" / "pages" / "your-gpu.md").read_text()
    assert counted.table([row for row in committed["rows"] if row["config"] == "16/3/1/4"]) in guide
