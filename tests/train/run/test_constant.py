"""The constant's scores are kept: what they follow from names their entry, and nothing else does."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from train.cli import main
from train.compare import main as compare
from train.config.settings import Settings, resolve_settings
from train.datasets.base import fingerprint
from train.datasets.cache import Cache, default_folder
from train.run import constant
from train.run.build import build_data
from train.tasks import TASKS
from train.tasks.seg import Segmentation

QUICK = ["--steps", "1", "--batch-size", "2", "--set", "scenes=4", "--set", "val_scenes=2", "--workers", "0"]


def entry_of(settings: Settings) -> str:
    data = build_data(settings)
    return constant.entry_of(settings, data, dict(zip(("train", "val"), map(fingerprint, data), strict=True)))


@pytest.fixture
def settings(pascal_copy):
    return resolve_settings({"data": str(pascal_copy), "tasks": "seg,normals", "partial_labels": True})


def repaint(path):
    """Another value in one corner of a label, or a photo."""
    with Image.open(path) as image:
        pixels = np.array(image)
        palette = image.getpalette()
    pixels[:9, :9] = pixels[:9, :9] // 2 + 1
    changed = Image.fromarray(pixels, "P" if palette else None)
    if palette:
        changed.putpalette(palette)
    changed.save(path)


def shorten(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("semseg/VOC12/2008_000000.png", repaint),
        ("normals_distill/2009_000001.png", repaint),
        ("JPEGImages/2008_000003.jpg", repaint),
        ("semseg/VOC12/2008_000002.png", lambda path: path.unlink()),
        ("ImageSets/Context/train.txt", shorten),
        ("ImageSets/Context/val.txt", shorten),
    ],
)
def test_another_file_is_another_entry(name, change, settings, pascal_copy):
    before = entry_of(settings)
    assert entry_of(settings) == before
    change(pascal_copy / name)
    assert entry_of(settings) != before


@pytest.mark.parametrize(
    "values", [{"protocol": "mini"}, {"image_size": 64}, {"tasks": "seg"}, {"seed": 1}, {"batch_size": 4}], ids=str
)
def test_another_setting_is_another_entry(values, settings):
    assert entry_of(replace(settings, **values)) != entry_of(settings)


@pytest.mark.parametrize("values", [{"scenes": 5}, {"val_scenes": 3}, {"image_size": 32}, {"seed": 1}], ids=str)
def test_other_scenes_are_another_entry(values):
    scenes = resolve_settings({"scenes": 4, "val_scenes": 2})
    assert entry_of(replace(scenes, **values)) != entry_of(scenes) == entry_of(replace(scenes, workers=3, lr=1.0))


def test_images_that_are_skipped_are_another_entry(settings, pascal_copy):
    before = entry_of(settings)
    bad = pascal_copy / "JPEGImages/2008_000001.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    damaged = entry_of(settings)
    assert len({before, damaged, entry_of(replace(settings, skip_bad=True, workers=0))}) == 3


def test_another_program_and_other_versions_are_another_entry(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "seg.py").write_text("VOID = 255\n")
    monkeypatch.setattr(constant, "SOURCE", tmp_path)
    first = constant.program.__wrapped__()
    assert constant.program.__wrapped__() == first
    (tmp_path / "tasks" / "seg.py").write_text("VOID = 254\n")
    second = constant.program.__wrapped__()
    (tmp_path / "tasks" / "seg.py").rename(tmp_path / "seg.py")
    third = constant.program.__wrapped__()
    monkeypatch.setattr(constant, "versions", lambda: {"torch": "1"})
    assert len({first, second, third, constant.program.__wrapped__()}) == 4


def test_scores_of_a_task_that_a_script_defines_are_not_kept(settings, monkeypatch):
    class Other(Segmentation):
        pass

    monkeypatch.setitem(TASKS, "seg", Other())
    assert entry_of(settings) == ""


def test_kept_scores_are_not_computed_again_but_damaged_ones_are(tmp_path, monkeypatch):
    settings = resolve_settings({"scenes": 4, "val_scenes": 2, "image_size": 16, "workers": 0})
    run = SimpleNamespace(settings=settings, data=build_data(settings), images={})
    computed, score = [], constant.score_constant
    monkeypatch.setattr(constant, "score_constant", lambda *given: computed.append(1) or score(*given))
    without = constant.constant_scores(run)
    monkeypatch.setenv("FASTMOE_LORA_CACHE", str(tmp_path / "kept"))
    for _ in range(2):
        assert constant.constant_scores(run) == without and len(computed) == 2
    (entry,) = (tmp_path / "kept").iterdir()
    entry.write_text(entry.read_text().replace("mIoU", "mErr"))
    assert constant.constant_scores(run) == without and len(computed) == 3
    run.settings = replace(settings, cache=str(tmp_path / "named"))
    assert constant.constant_scores(run) == without and len(list((tmp_path / "named").iterdir())) == 1


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HOME": "/home/me"}, "/home/me/.cache/fastmoe_lora"),
        ({"HOME": "/home/me", "XDG_CACHE_HOME": "/scratch"}, "/scratch/fastmoe_lora"),
        ({"XDG_CACHE_HOME": "relative"}, ""),
        ({"XDG_CACHE_HOME": "/scratch", "FASTMOE_LORA_CACHE": ""}, ""),
        ({"FASTMOE_LORA_CACHE": "/elsewhere"}, "/elsewhere"),
    ],
)
def test_the_users_own_cache(variables, expected, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "FASTMOE_LORA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert default_folder() == expected


def test_a_users_cache_that_cannot_be_written_keeps_nothing(pascal_copy, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "cache", pascal_copy / "cache"):
        monkeypatch.setenv("FASTMOE_LORA_CACHE", str(folder))
        assert constant.open_kept("") == Cache()
    assert not (pascal_copy / "cache").exists()


def test_a_cache_that_cannot_be_written_is_one_line_for_rendered_scenes_too(tmp_path, error_of):
    (tmp_path / "file").write_text("")
    error = error_of(main, *QUICK, "--cache", tmp_path / "file" / "cache", "--out", tmp_path / "run")
    assert "cannot write to cache" in error and not (tmp_path / "run").exists()


def test_a_run_without_baselines_trains_the_same_and_compares(tmp_path, capsys, error_of):
    """And is killed and continued: what a checkpoint holds cannot be had later."""
    for name, given in (("with", []), ("without", ["--set", "baselines=false"])):
        assert main([*QUICK, *given, "--out", str(tmp_path / name)]) == 0
        head = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("task"))
        assert head.split()[2:] == (["untrained", "constant", "trained"] if name == "with" else ["trained"])
    runs = [str(tmp_path / name) for name in ("with", "without")]
    ours, theirs = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("with", "without"))
    assert ours["metrics"] == theirs["metrics"] and ours["metrics_constant"]
    assert theirs["metrics_constant"] is None and theirs["metrics_untrained"] is None
    assert compare([*runs, "--baseline", runs[1], "--out", str(tmp_path / "table")]) == 0
    again = ["--resume", "--out", runs[1], "--steps", "2"]
    assert "baselines was False and cannot become True" in error_of(main, *again, "--set", "baselines=true")
    assert main(again) == 0
