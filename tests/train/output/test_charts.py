"""Charts over steps: what is drawn, and how it is smoothed."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from train.output import charts
from train.output.charts import Panel, running_mean, save_curves
from train.run.record import Record
from train.run.scores import draw_curves


@pytest.fixture
def drawn(monkeypatch):
    """{title: [(run, steps, values) of each line]} of what is written."""
    panels = {}

    def keep(figure: Figure, path, dpi):
        for axis in figure.axes:
            lines = [(line.get_label(), *map(list, line.get_data())) for line in axis.get_lines()]
            panels[axis.get_title(loc="left")] = lines
        panels["legend"] = [text.get_text() for legend in figure.legends for text in legend.get_texts()]

    monkeypatch.setattr(charts, "write_figure", keep)
    return panels


def record_of(losses, scores):
    record = Record(None, ("seg", "edge"))
    for step, row in losses.items():
        record.add_step(step, torch.tensor(row), {}, lr=0.1)
    for step, value in scores.items():
        record.add_scores(step, value, {"seg": {"mIoU": value}, "edge": {"loss": None}})
    record.flush()
    return record


def test_a_run_is_drawn_with_its_losses_scores_and_delta_m(drawn, tmp_path):
    """A loss of 0 is that of a batch without labels of the task."""
    record = record_of({1: (4.0, 0.5), 2: (3.0, 0.0), 3: (2.0, 0.25)}, {2: 10.0, 3: 20.0})
    draw_curves(tmp_path / "curves.png", {"run": record}, "scenes")
    assert drawn["seg"] == [("run", [1, 2, 3], [4.0, 3.0, 2.0])] and drawn["edge"] == [("run", [1, 3], [0.5, 0.25])]
    assert drawn["seg mIoU % ↑"] == [("run", [2, 3], [10.0, 20.0])] == drawn["Delta_m % ↑"] and not drawn["legend"]


def test_a_score_of_one_step_is_no_curve(drawn, tmp_path):
    draw_curves(tmp_path / "curves.png", {"run": record_of({1: (4.0, 0.5), 2: (3.0, 0.4)}, {2: 10.0})}, "scenes")
    assert {"seg", "edge"} <= set(drawn) and "seg mIoU % ↑" not in drawn


def test_several_runs_are_lines_with_a_legend_and_without_delta_m(drawn, tmp_path):
    runs = {name: record_of({1: (loss, 1.0)}, {1: loss, 2: 1.0}) for name, loss in (("one", 2.0), ("other", 3.0))}
    draw_curves(tmp_path / "curves.png", runs, "scenes")
    assert drawn["seg mIoU % ↑"] == [("one", [1, 2], [2.0, 1.0]), ("other", [1, 2], [3.0, 1.0])]
    assert drawn["legend"] == ["one", "other"] and "Delta_m % ↑" not in drawn


def test_many_points_are_smoothed(drawn, tmp_path):
    values = np.random.default_rng(0).random(120)
    save_curves(tmp_path / "curves.png", [[Panel("seg", "loss", {"run": dict(enumerate(values, 1))})]])
    (_, _, raw), (_, _, smooth) = drawn["seg"]
    assert raw == values.tolist() and smooth[5] == pytest.approx(values[3:6].mean()) and np.std(smooth) < np.std(raw)
    assert running_mean([1.0, 3.0, 8.0], 2).tolist() == [1.0, 2.0, 5.5]
