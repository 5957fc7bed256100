"""The class of whole images: its label in the scenes, padding, files, and a backbone that a study can freeze."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from train.cli import main as train
from train.datasets.scenes.compose import SEG_NAMES
from train.datasets.scenes.dataset import Scenes
from train.evaluate import main as evaluate
from train.predict import main as predict
from train.protocols import build_protocol
from train.tasks import TASKS, VOID
from train.tasks.cls import ImageAccuracy, image_loss

CLS = TASKS["cls"]


def test_the_class_of_a_scene_is_that_of_its_salient_object():
    scenes = Scenes("train", 64, 40, tasks=("seg", "sal", "cls"))
    seen = set()
    for index in range(len(scenes)):
        sample = scenes[index, 0]
        (number,) = np.unique(sample["cls"])
        assert set(sample["seg"][sample["sal"] == 1]) == {number}
        seen.add(SEG_NAMES[number])
    assert len(seen) > 2 and "background" not in seen


@pytest.mark.parametrize("name", ["mini", "invpt", "mtinet"])
def test_no_transform_changes_the_class(name):
    raw = {"image": np.zeros((40, 50, 3), np.uint8), "cls": np.full((40, 50), 3, np.uint8)}
    for seed in range(20):
        label = build_protocol(name, 64).apply(raw, True, np.random.default_rng(seed))["cls"]
        assert set(label.flat) <= {3, VOID}


def test_padding_has_no_say():
    label = torch.tensor([[[1, 1], [VOID, VOID]]], dtype=torch.uint8)
    output = torch.zeros(1, 3, 2, 2)
    output[0, 1, 0] = 2.0
    output[0, 2, 1] = 9.0  # in the padding
    accuracy = ImageAccuracy()
    accuracy.update(output, label)
    assert accuracy.compute() == {"accuracy": 100}
    expected = -torch.tensor([0.0, 2.0, 0.0]).log_softmax(0)[1]
    torch.testing.assert_close(image_loss(output, label), expected)


def test_a_photo_gets_one_class():
    output = np.zeros((3, 4, 4), np.float32)
    output[2, 0] = 1
    output[1, 1] = 0.9
    assert np.array_equal(CLS.at_photo(output, (7, 9)), np.full((7, 9), 2))


def test_a_backbone_of_whole_images_is_scored_saved_and_adapted(tmp_path):
    run, sizes = tmp_path / "run", ["--set", "scenes=8", "--set", "val_scenes=4", "--workers", "0", "--batch-size", "2"]
    assert train(["--recipe", "scenes_pretrain_cls", "--steps", "3", *sizes, "--out", str(run)]) == 0
    accuracy = json.loads((run / "results.json").read_text())["metrics"]["cls"]["accuracy"]
    assert accuracy in (0, 25, 50, 75, 100)
    kept, again = tmp_path / "kept", tmp_path / "again"
    assert evaluate([str(run), "--workers", "0", "--save-predictions", str(kept), "--out", str(tmp_path / "s")]) == 0
    assert evaluate(["--predictions", str(kept), "--workers", "0", "--out", str(again)]) == 0
    assert json.loads((again / "results.json").read_text())["metrics"]["cls"]["accuracy"] == accuracy
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(tmp_path / "photo.png")
    assert predict([str(run), str(tmp_path / "photo.png"), "--out", str(tmp_path / "predicted")]) == 0
    assert len(np.unique(np.asarray(Image.open(tmp_path / "predicted" / "cls" / "photo.png")))) == 1
    argv = ["--recipe", "scenes_adapt", "--pretrained", str(run), "--steps", "1", *sizes]
    assert train([*argv, "--out", str(tmp_path / "adapted")]) == 0
