"""The statistics of a study, against SciPy's and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.stats import ttest_rel

from model import VITS, ViT
from train.config.arms import DECODERS, FIGURES, LIKE, PRETRAINING, ROUTED, SINGLE
from train.config.settings import resolve_settings
from train.evaluation.study import compare, paired, table
from train.run.arms import WEIGHTED, Runs, arms_of
from train.run.build import build_model
from train.run.weighting import WEIGHTINGS

finite = st.floats(-100, 100)


def results(seg, edge, trainable=1000):
    metrics = {"seg": {"mIoU": seg}, "edge": {"loss": edge, "odsF": None}}
    return {"protocol": "scenes", "metrics": metrics, "parameters": {"trainable": trainable, "total": 9 * trainable}}


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=9))
def test_paired_differences_are_scipys(pairs):
    ours, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    difference = paired(list(ours), list(theirs))
    if np.ptp(ours - theirs) > 1e-3:  # of equal differences SciPy's interval is nan
        low, high = ttest_rel(ours, theirs).confidence_interval(0.95)
        assert difference == pytest.approx((np.mean(ours - theirs), low, high), rel=1e-6, abs=1e-9)
        assert difference.verdict == ("better" if low > 0 else "worse" if high < 0 else "inconclusive")


def test_one_seed_decides_nothing():
    assert paired([5.0], [1.0]) == (4.0, None, None)
    assert paired([5.0], [1.0]).verdict == "inconclusive"


def test_delta_is_against_the_single_task_models_of_the_same_seed():
    singles = {"seg": [results(50, 0.9), results(40, 0.9)], "edge": [results(1, 0.2), results(1, 0.1)]}
    arms = {"first": [results(55, 0.2), results(40, 0.1)], "second": [results(60, 0.1, 2000), results(44, 0.05, 2000)]}
    comparison = compare(arms, singles)
    assert comparison.singles == {"seg": [50, 40], "edge": [0.2, 0.1]}
    first, second = comparison.arms["first"], comparison.arms["second"]
    assert first.delta == pytest.approx([5, 0]) and second.delta == pytest.approx([(20 + 50) / 2, (10 + 50) / 2])
    assert first.against is None and second.against.mean == pytest.approx(30) and second.trainable == 2000
    assert second.scores == {"seg": [60, 44], "edge": [0.1, 0.05]}
    rows = table(comparison).splitlines()
    assert "seg mIoU ↑ | edge loss ↓" in " ".join(rows[0].split()) and "against first" in rows[0]
    assert "+32.50 ± 3.54" in rows[4] and "better" not in rows[3]


@pytest.mark.parametrize("figure", FIGURES)
def test_every_arm_has_a_recipe_over_the_papers(figure):
    for arm in (*SINGLE, *arms_of(figure)):
        settings = resolve_settings({"recipe": arm.recipe, "data": "somewhere"})
        shared = resolve_settings({"recipe": "paper", "data": "somewhere"} | arm.values)
        assert settings.model == "vit_base" and settings.epochs == 40
        for name in ("moe", "gating", "site", "lora_rank", "decoder", "train_backbone"):
            assert getattr(settings, name) == getattr(shared, name)


def test_weightings_are_compared_on_the_arm_of_the_other_studies(tmp_path):
    """So that its runs with the fixed weighting, which come first, are shared."""
    arms, runs = arms_of(WEIGHTED), Runs(tmp_path, {"recipe": "scenes_adapt"})
    assert arms[0] == LIKE and len({arm.name for arm in arms}) == len(arms) == len(WEIGHTINGS)
    assert [resolve_settings(runs.flags(arm, 0)).weighting for arm in arms] == [*WEIGHTINGS]
    assert "weighting" not in runs.flags(LIKE, 0)


def test_decoders_get_as_many_trainable_parameters(tmp_path):
    torch.manual_seed(0)
    save_file(ViT(VITS["vit_micro"], 64).state_dict(), tmp_path / "micro.safetensors")
    runs = Runs(tmp_path, {"recipe": "scenes_adapt", "pretrained": str(tmp_path / "micro.safetensors")})
    wanted = runs._trainable(LIKE.values)
    assert runs.widths.keys() == set(DECODERS)
    for arm, width in runs.widths.items():
        assert runs._at_width(arm, width) == pytest.approx(wanted, rel=0.05)
        assert runs.flags(arm, 0)["decoder_width"] == width


@pytest.mark.parametrize(
    "arm", sorted({arm for figure in FIGURES for arm in arms_of(figure)} | {*SINGLE, PRETRAINING, ROUTED}, key=str)
)
def test_every_arm_builds(arm):
    shared = {"recipe": "scenes_adapt", "image_size": 16}
    settings = resolve_settings(shared | arm.values)
    model = build_model(settings, settings.source.classes, counted=True)
    assert model.tasks == arm.tasks
    assert (model.routing is not None) == (settings.moe != "none")
    assert (arm in DECODERS) == (settings.decoder != "none") and LIKE not in DECODERS
