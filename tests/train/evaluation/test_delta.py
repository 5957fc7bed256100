"""Delta_m against hand arithmetic and the tables that print it."""

import pytest

from train.evaluation.baselines import delta_m, published_rows
from train.tasks import DEFAULT_TASKS

ROWS = published_rows()


def scores_of(row: str) -> dict[str, dict[str, float]]:
    return {task: {cell["metric"]: cell["value"]} for task, cell in ROWS[row]["scores"].items()}


@pytest.mark.parametrize(
    "method, size, gain",
    [
        ("TaskPrompter ViT-B (PRISM)", "B", -1.24),
        ("TaskExpert ViT-B (PRISM)", "B", -1.73),
        ("MLoRE ViT-B", "B", -0.83),
        ("SAK ViT-B", "B", 0.83),
        ("PRISM ViT-B", "B", 2.52),  # its table says 2.29, which its scores do not give
        ("SAK ViT-L", "L", 2.30),
        ("PRISM ViT-L", "L", 3.16),
    ],
)
def test_rows_of_the_fields_table_have_the_delta_m_published_with_them(method, size, gain):
    baseline = ROWS[f"Single task ViT-{size} (PRISM)"]["scores"]
    assert delta_m(scores_of(method), baseline) == pytest.approx(gain, abs=0.006)


def test_by_hand():
    baseline = {
        "seg": {"metric": "mIoU", "value": 50.0, "higher": True},
        "normals": {"metric": "mErr", "value": 20.0, "higher": False},
    }
    scores = {"seg": {"mIoU": 60.0, "mIoU_field": 1.0}, "normals": {"mErr": 21.0}, "edge": {"loss": 9.0}}
    assert delta_m(scores, baseline) == pytest.approx((20 - 5) / 2)


@pytest.mark.parametrize("scores", [{}, {"seg": {}}, {"seg": {"mIoU": None}}])
def test_a_score_that_is_not_there_leaves_none(scores):
    assert delta_m(scores, {"seg": {"metric": "mIoU", "value": 50.0, "higher": True}}) is None


@pytest.mark.parametrize(
    "row, printed",
    [
        ("STL ResNet-18 (ASE)", 0.0),
        ("MTL ResNet-18 (ASE)", -1.29),
        ("MTAN ResNet-18 (ASE)", -1.74),
        ("NDDR-CNN ResNet-18 (ASE)", 0.13),
        ("Cross-Stitch ResNet-18 (ASE)", 0.66),
        ("MTL-ViT ViT-B (ASE)", 2.68),
        ("LoRA-MoE 16/4/0/4 ViT-B (ASE)", 6.06),
        ("LoRA-MoE 32/8/0/2 ViT-B (ASE)", 6.11),
        ("ASE 16/3/1/4 ViT-B", 7.49),
        ("ASE 32/6/2/2 ViT-B", 7.58),
    ],
)
def test_the_table_of_ase(row, printed):
    assert delta_m(scores_of(row), ROWS["STL ResNet-18 (ASE)"]["scores"]) == pytest.approx(printed, abs=0.01)


def test_the_table_of_astmt():
    baseline = ROWS["STL ResNet-101 (ASTMT)"]["scores"]
    assert delta_m(scores_of("MTL ResNet-101 (ASTMT)"), baseline) == pytest.approx(-6.81, abs=0.01)
    assert delta_m(scores_of("ASTMT ResNet-101"), baseline) == pytest.approx(-0.04, abs=0.01)


@pytest.mark.parametrize("row", ROWS)
def test_rows_say_where_they_come_from(row):
    assert list(ROWS[row]) == ["method", "backbone", "protocol", "source", "scores"]
    assert ROWS[row]["protocol"] in ("A", "B", "ASE", "NYUD B")
    nyud, scores = ROWS[row]["protocol"] == "NYUD B", ROWS[row]["scores"]
    tasks = ("seg", "normals", "edge", "depth") if nyud else DEFAULT_TASKS[: len(scores)]
    assert list(scores) == list(tasks) and len(scores) >= 4
    lower = ["normals", "depth"] if nyud else ["normals"]
    assert [task for task, cell in scores.items() if not cell["higher"]] == lower
