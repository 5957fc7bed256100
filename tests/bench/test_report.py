"""Reports on made-up results whose every number is known."""

import copy
import json
from pathlib import Path

import pytest

from bench import bench_layer, plots, report, rows
from bench.peers.base import Peer

RESULTS = Path(report.__file__).parent / "results"


def row(subject, median, direction="forward", config="16/3/1/4", tokens=7_880):
    times = {"median": median, "p20": 0.9 * median, "p80": 1.1 * median}
    return {
        "suite": "layer",
        "subject": subject,
        "width": 768,
        "tokens": tokens,
        "config": config,
        "direction": direction,
        "seconds": {"subject": times},
        "ratio": median / 1e-4,
        "added_seconds": median - 1e-4,
        "floor_ratio": 1.05,
        "of_floor": 1.05e-4 / median,
        "bytes_per_second": 2e12,
        "flops_per_second": 5e14,
        "saved_bytes": 2**21,
        "error": {"y": 1e-3, "dx": 2e-3},
        "bitwise": subject == "ours",
        "ceilings": {"bytes_per_second": 4e12, "flops_per_second": 8e14},
        "graph": {"ratio": 1.07, "seconds": {"subject": {"median": 0.95 * median}}},
        "gelu_share": 0.17,
        "peak_bytes": {"subject": 3 * 2**20},
    }


ROWS = [
    row("ours", 1.1e-4),
    row("ours-fused", 1.05e-4),
    row("dense", 1.5e-4),
    row("expert-loop", 4e-4),
    row("lorafusion", 1.01e-4),
    row("ours", 3e-4, "forward+backward"),
    row("ours", 5e-4, tokens=40_960),
]


@pytest.fixture
def results(tmp_path):
    path = tmp_path / "results.json"
    entries = [{"name": f"row {i}", "extra_info": entry} for i, entry in enumerate(ROWS)]
    path.write_text(
        json.dumps(
            {
                "datetime": "2026-01-02T03:04:05",
                "commit_info": {"id": "abcdef0123456789"},
                "benchmarks": entries,
                "machine_info": {
                    "cpu": {"brand_raw": "a CPU"},
                    "summary": {"gpu": "a GPU", "torch": "2.11"},
                    "absent": {"quack": "not installed (pip install it)"},
                },
            }
        )
    )
    return path


def test_the_table_shows_ratio_floor_and_the_best_peer_that_computes_as_much(results):
    text = report.text(results, markdown=False)
    ours = next(line for line in text.splitlines() if "16/3/1/4 ours" in line)
    # 10 us added, by dense 50 us; lorafusion, which computes less, is no peer to beat
    assert ours.split()[:2] == ["768,", "7,880"]
    assert "110 (99..121)" in ours and "1.100" in ours and "1.070" in ours and "1.050" in ours and "0.20" in ours
    assert ours.split()[-2:] == ["2e-03", "yes"]


def test_graphs_come_before_eager_times_and_the_share_of_gelu_is_shown(results):
    cells = next(line for line in report.text(results, markdown=True).splitlines() if "16/3/1/4 ours " in line)
    values = [cell.strip() for cell in cells.split("|")[3:8]]
    assert values == ["104", "1.070", "110 (99..121)", "1.100", "17 %"]


def test_an_algorithm_of_ours_is_compared_with_peers_and_is_none(results):
    found = rows.read(results)[1]
    fused = next(row for row in found if row["subject"] == "ours-fused")
    assert rows.best_peer(found, fused)["subject"] == rows.best_peer(found, found[0])["subject"] == "dense"
    line = next(line for line in report.text(results, markdown=False).splitlines() if "ours-fused" in line)
    assert "0.10" in line.split()  # 5 us of 50


def test_products_are_told_beside_cublas(results):
    data = json.loads(results.read_text())
    times = {name: {"median": n, "p20": n, "p80": n} for name, n in (("subject", 4e-4), ("cublas", 3.4e-4))}
    entry = {"suite": "product", "subject": "matmul_gelu", "tokens": 40_960, "seconds": times}
    entry |= {"of_cublas": 0.85, "flops_per_second": 4.8e14}
    data["benchmarks"].append({"name": "product", "extra_info": entry})
    results.write_text(json.dumps(data))
    line = next(line for line in report.text(results, False).splitlines() if line.startswith("matmul_gelu"))
    assert line.split() == ["matmul_gelu", "40,960", "400", "(400..400)", "340", "85", "%", "480"]


def test_peers_that_are_absent_are_named_once(results):
    assert report.text(results, markdown=False).count("absent  quack: not installed (pip install it)") == 1


def test_machine_versions_and_commit_stand_above(results):
    head = report.text(results, markdown=False).splitlines()[0]
    for fact in ("abcdef0123", "a CPU", "a GPU", "2.11", "2026-01-02"):
        assert fact in head


def test_markdown_has_one_cell_for_every_column(results):
    lines = [line for line in report.text(results, markdown=True).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {len(report.HEAD) + 1}


def test_all_plots_are_drawn(results, tmp_path, capsys):
    assert report.main([str(results), "--plots", str(tmp_path / "plots")]) == 0
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {f"results-{kind}.png" for kind in ("roofline", "peers", "experts", "tokens")}


def test_results_without_layers_have_no_plots(tmp_path):
    assert plots.draw("x", [], tmp_path) == []


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": 3}'])
def test_another_file_ends_in_one_line(tmp_path, capsys, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and str(path) in error[0]


def test_a_training_row_is_told_beside_plain_lora(results):
    data = json.loads(results.read_text())
    base = {
        "suite": "train",
        "model": "vit_base",
        "heads_share": 0.25,
        "loader_images_per_second": 300.0,
        "paper_minutes": 12.0,
        "peak_bytes": 2**30,
    }
    for subject, speed in (("ours", 80.0), ("plain-lora", 100.0)):
        entry = copy.deepcopy(base) | {"subject": subject, "images_per_second": speed}
        data["benchmarks"].append({"name": subject, "extra_info": entry})
    results.write_text(json.dumps(data))
    ours = next(line for line in report.text(results, False).splitlines() if line.startswith("vit_base  ours"))
    assert ours.split()[2:] == ["80.0", "1.250", "1,024", "25", "%", "300", "12.0", "min"]


def test_the_committed_results_of_a_cpu_can_be_told():
    path = RESULTS / "cpu.json"
    text = report.text(path, markdown=True)
    assert all(f"16/3/1/4 {subject}" in text for subject in ("ours", "dense", "expert-loop", "grouped-mm"))
    assert "absent  scattermoe" in text and "plain-lora" in text


def test_an_absent_peer_has_no_row():
    """One that took no time would be the first of pytest-benchmark's own table."""
    peer = Peer("quack", lambda layer: layer, package="no_such_package", install="pip install it")
    with pytest.raises(pytest.skip.Exception, match="quack not installed .pip install it."):
        bench_layer.bench(None, "reference", peer, None, "forward")
    assert all("ratio" in row for row in rows.layer_rows(rows.read(RESULTS / "cpu.json")[1]))
