"""Test-time augmentation: what is done to an image is undone in its predictions, by the rules of labels."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from model import ExportedModel, MultiTaskModel
from train.evaluate import main as evaluate
from train.evaluation.augmented import augment, resized_to
from train.files.images import read_photo
from train.predict import main as predict
from train.run.build import load_checkpoint
from train.tasks import TASKS, output_channels

CLASSES = {"seg": ("a", "b", "c"), "parts": ("a", "b"), "cls": ("void", "a", "b")}
SHAPE = (16, 24)


class PerPixel(MultiTaskModel):
    """Outputs depend on the colour of their pixel alone: they are mirrored and resized as the image is. In a mirrored
    image, which is darker in its left half, normals point the other way and, in a larger one, depth is less."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tasks, self.patch = tuple(TASKS), 8
        channels = output_channels(self.tasks, CLASSES)
        self.heads = nn.ModuleDict({task: nn.Conv2d(3, n, 1) for task, n in channels.items()})
        self.set_normalisation((0.5,) * 3, (0.5,) * 3)

    def forward(self, images, index=None):
        x = self.normalise(images.float())
        outputs = {task: head(x) for task, head in self.heads.items()}
        mirrored = x[..., : x.shape[-1] // 2].mean() > x[..., x.shape[-1] // 2 :].mean()
        outputs["normals"] = outputs["normals"] * torch.tensor([-1 if mirrored else 1, 1, 1]).view(3, 1, 1)
        outputs["depth"] = 0 * outputs["depth"] - np.log(x.shape[-1] / SHAPE[1])
        return {
            task: y if index is None else y[index[task]]
            for task, y in outputs.items()
            if index is None or task in index
        }


@pytest.fixture(scope="module")
def model():
    return PerPixel().eval().requires_grad_(False)


def images(smooth=False):
    """Dark at the left, bright at the right."""
    noise = torch.rand(2, 3, *SHAPE, generator=torch.Generator().manual_seed(1))
    ramp = torch.linspace(0, 255, SHAPE[1]).expand(2, 3, *SHAPE)
    return ramp if smooth else (0.5 * ramp + 127 * noise).to(torch.uint8)


def test_a_model_that_mirrors_with_its_image_predicts_the_same(model):
    plain, mean = model(images()), augment(model, "flip", SHAPE)(images())
    assert [*mean] == [*TASKS]
    for name, task in TASKS.items():
        torch.testing.assert_close(task.postprocess(mean[name]), task.postprocess(plain[name]), rtol=0, atol=1e-5)
    for name in ("seg", "parts", "cls"):
        assert torch.equal(TASKS[name].postprocess(mean[name]), TASKS[name].postprocess(plain[name]))


def test_without_turning_normals_back_they_would_differ(model, monkeypatch):
    """The same model, if the sign of x were forgotten: the mean has no x at all."""
    monkeypatch.setattr(type(TASKS["normals"]), "flip", lambda self, label: label[:, ::-1].copy())
    mean = augment(model, "flip", SHAPE)(images())["normals"]
    assert mean[:, 0].abs().max() < 1e-6 < model(images())["normals"][:, 0].abs().min()


def test_resized_copies_are_brought_back(model):
    """Per-pixel outputs of a smooth image, inside its border; depth, which is 1 m at any size, is exact."""
    plain, mean = model(images(smooth=True)), augment(model, "2,3", SHAPE)(images(smooth=True))
    torch.testing.assert_close(TASKS["depth"].postprocess(mean["depth"]), torch.ones(2, *SHAPE), rtol=1e-6, atol=0)
    for name in ("sal", "edge", "seg"):
        ours, theirs = (TASKS[name].soft_label(output)[..., 4:-4] for output in (mean[name], plain[name]))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


def test_the_mean_is_one_of_probabilities_unit_vectors_and_metres():
    def mean(task, *outputs):
        soft = [TASKS[task].soft_label(torch.tensor(output).view(1, -1, 1, 1)) for output in outputs]
        return TASKS[task].from_soft_label(sum(soft) / len(soft)).flatten()

    # By logits class 0 would win 9 to 6; by probability each of two votes for class 1 counts as much as the one.
    assert mean("seg", [9.0, 0.0], [0.0, 3.0], [0.0, 3.0]).argmax() == 1
    assert mean("edge", [0.0], [200.0])[0].sigmoid().item() == pytest.approx(0.75)
    assert mean("edge", [12.0], [12.0])[0].item() == pytest.approx(12, rel=1e-6)
    assert mean("depth", [0.0], [np.log(3.0)])[0].exp().item() == pytest.approx(2)
    assert mean("normals", [5.0, 0.0, 0.0], [0.0, 1.0, 0.0]).tolist() == pytest.approx([0.5, 0.5, 0])
    assert mean("sal", [300.0, 0.0], [300.0, 0.0]).isfinite().all()


def test_sizes_are_whole_patches_and_no_size_is_taken_twice(model):
    assert resized_to((448, 576), 0.75, 16) == (336, 432) and resized_to((224, 224), 1.1, 16) == (240, 240)
    assert resized_to((16, 24), 0.25, 16) == (16, 16)
    copies = augment(model, "flip,1,2", SHAPE).copies
    assert [(copy.resized, copy.mirrored) for copy in copies] == [
        ((16, 24), False), ((16, 24), True), ((32, 48), False), ((32, 48), True),
    ]  # fmt: skip
    assert augment(model, "", SHAPE) is model


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flop", "'flop' is neither flip nor a scale in 0.25..4.0, such as flip,0.75,1.25"),
        ("flip,", "'' is neither"),
        ("nan", "'nan' is neither"),
        ("8", "'8' is neither"),
        ("flip,2,flip", "flip is given twice"),
        ("1.01", "in whole patches two sizes are equal (64 x 64, 64 x 64): choose scales further apart"),
    ],
)
def test_a_wrong_text_is_one_line(text, message, tiny_scenes_run, tmp_path, error_of):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30)).save(photo)
    for command, given in ((evaluate, ()), (predict, (photo,))):
        assert f"--tta {text}: {message}" in error_of(command, tiny_scenes_run, *given, "--tta", text)


def test_what_cannot_be_augmented_is_one_line(tmp_path, error_of):
    assert "--tta needs a model" in error_of(evaluate, "--predictions", tmp_path, "--tta", "flip")
    exported = ExportedModel(lambda x: {"sal": x[:, :2]}, ("sal",))
    assert augment(exported, "flip", SHAPE)(images())["sal"].shape == (2, 2, *SHAPE)
    with pytest.raises(ValueError, match="takes images of one size: use --tta flip"):
        augment(exported, "2", SHAPE)


def test_an_output_that_is_not_finite_stays_so(model, monkeypatch):
    forward = PerPixel.forward
    monkeypatch.setattr(
        PerPixel, "forward", lambda *given: forward(*given) | {"depth": torch.full((2, 1, *SHAPE), torch.inf)}
    )
    assert not augment(model, "flip", SHAPE)(images())["depth"].isfinite().any()


def test_results_tables_and_saved_predictions_name_it(tiny_scenes_run, tmp_path, capsys):
    out, kept = tmp_path / "out", tmp_path / "kept"
    options = ["--workers", "0", "--out", str(out)]
    assert evaluate([str(tiny_scenes_run), "--tta", "flip,0.5", "--save-predictions", str(kept), *options]) == 0
    printed = capsys.readouterr().out
    assert "tta       flip,0.5: predictions are means over copies" in printed
    assert any(line.split() == ["task", "metric", "tta", "flip,0.5"] for line in printed.splitlines())
    scored = json.loads((out / "results.json").read_text())
    assert evaluate(["--predictions", str(kept), *options]) == 0
    again = json.loads((out / "results.json").read_text())
    assert again["tta"] == scored["tta"] == "flip,0.5" and again["metrics"]["seg"] == scored["metrics"]["seg"]


def test_photos_are_predicted_with_it(tiny_scenes_run, tmp_path, capsys, error_of):
    """The raw output is the mean of both predictions; the folder holds photos of one augmentation."""
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    Image.fromarray(np.kron(colours, np.ones((16, 16, 1), np.uint8))).save(photo)
    argv = [str(tiny_scenes_run), str(photo), "--out", str(out)]
    assert predict([*argv, "--tta", "flip"]) == 0
    assert "protocol scenes with --tta flip" in capsys.readouterr().out
    assert Image.open(out / "sal/photo.png").size == Image.open(out / "semseg/photo.png").size == (96, 64)
    settings, model, _ = load_checkpoint((tiny_scenes_run / "last").resolve())
    image = torch.tensor(settings.source.protocol.fit_photo(read_photo(photo))[0]).permute(2, 0, 1)
    with torch.no_grad():
        one, other = model(torch.stack([image, image.flip(-1)]))["sal"].softmax(1)
    raw = torch.tensor(np.load(out / "raw/photo.npz")["sal"].astype(np.float32))
    torch.testing.assert_close(raw.softmax(0), (one + other.flip(-1)) / 2, rtol=0, atol=1e-3)  # files are float16
    assert "was written by train.predict of step 2" in error_of(predict, *argv)
