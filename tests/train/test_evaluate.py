"""``python -m train.evaluate``: a checkpoint and files of predictions under every protocol."""

import json
import resource
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import loadmat

from model import MultiTaskViT
from train.cli import main as train
from train.datasets.pascal.labels import valid_classes
from train.datasets.pascal.mat import read_parts
from train.evaluate import main
from train.evaluation.score import Scoring, choose_boundaries, score_predictions
from train.metrics.boundary import boundaries
from train.metrics.odsf import quantise
from train.metrics.thinning import thin
from train.predict import main as predict
from train.protocols import AlignedPrediction, build_protocol
from train.run.build import load_checkpoint
from train.tasks import DEFAULT_TASKS, PART_NAMES, TASKS, VOID, build_metrics
from train.tasks.edge import edges_from_label_map

FOLDERS = {name: task.folder for name, task in TASKS.items() if name in DEFAULT_TASKS}

VAL = [f"2009_{n:06d}" for n in range(4)]
QUICK = ["--workers", "0"]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def assert_same_scores(ours, theirs):
    """To float32's rounding, which depends on the batch."""
    for task in DEFAULT_TASKS:
        for name, score in theirs["metrics"][task].items():
            assert ours["metrics"][task][name] == (score and pytest.approx(score, rel=1e-5)), (task, name)


def evaluate(tmp_path, *argv):
    assert main([*map(str, argv), *QUICK, "--out", str(tmp_path / "out")]) == 0
    return results_of(tmp_path / "out")


def mistake(capsys, tmp_path, *argv):
    """The one line of a user's mistake."""
    capsys.readouterr()
    assert main([*map(str, argv), *QUICK, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert not (tmp_path / "out" / "results.json").exists()
    return error


@pytest.fixture(scope="module")
def saved(tiny_run, tmp_path_factory):
    """(results, predictions) of the checkpoint under mtinet, as a user types it."""
    folder = tmp_path_factory.mktemp("saved")
    command = [sys.executable, "-m", "train.evaluate", str(tiny_run), "--save-predictions", "kept", "--workers", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "protocol  mtinet@64, predictions are scored at the photo's size" in done.stdout
    return results_of(folder / "runs/evaluate/tiny-mtinet@64"), folder / "kept"


def test_results_name_what_they_are_of(saved, tiny_run, pascal_tree):
    results, _ = saved
    assert results["protocol"] == "mtinet@64" and results["step"] == 3
    assert results["checkpoint"] == str((tiny_run / "last").resolve())
    dataset = {"name": "PASCAL_MT", "root": str(pascal_tree), "val_images": "", "image_size": 64}
    assert results["dataset"] == dataset
    trained = results_of(tiny_run)
    assert results["commands"] == trained["commands"] and results["settings"] == trained["settings"] | {"out": ""}
    assert (results["kernel"], results["device"], results["precision"]) == (trained["kernel"], "cpu", "fp32")
    labelled = results["evaluation"].pop("labelled")
    assert results["evaluation"] == {
        "split": "val",
        "set": None,
        "images": 4,
        "skipped": 0,
        "compared_at": "the photo's size",
    }
    assert list(labelled) == list(DEFAULT_TASKS) and len({images["ids"] for images in labelled.values()}) == 1
    assert labelled["seg"]["images"] == 4
    assert results["odsF"] == {"mode": "fast", "variant": "seism", "thresholds": 101, "images": 4}
    assert set(results["metrics"]["edge"]) == {"loss", "odsF", "oisF", "AP", "threshold"}
    keys = [(task, headline.key) for task in DEFAULT_TASKS for headline in TASKS[task].headlines]
    assert all(isinstance(results["metrics"][task][key], float) for task, key in keys)


def test_saved_predictions_read_back_give_the_same_numbers_under_mtinet(saved, pascal_tree, tmp_path):
    again = evaluate(tmp_path, "--predictions", saved[1], "--data", pascal_tree)
    assert again["protocol"] == "mtinet@64"  # noted beside the predictions
    assert again["metrics"] == saved[0]["metrics"]


@pytest.mark.parametrize(("run", "protocol"), [("padded_run", "invpt"), ("tiny_run", "mini"), ("tiny_run", "ase")])
def test_under_the_others_they_agree_within_a_twentieth(run, protocol, request, pascal_tree, tmp_path):
    folder, kept = request.getfixturevalue(run), tmp_path / "kept"
    scored = evaluate(tmp_path, folder, "--protocol", protocol, "--save-predictions", kept)
    again = evaluate(tmp_path, "--predictions", kept, "--data", pascal_tree)
    assert again["protocol"] == scored["protocol"] == f"{protocol}@{128 if protocol == 'invpt' else 64}"
    for task, name in ((t, headline.key) for t in scored["metrics"] for headline in TASKS[t].headlines):
        assert again["metrics"][task][name] == pytest.approx(scored["metrics"][task][name], abs=0.05), (task, name)
    assert again["metrics"]["edge"]["odsF"] == scored["metrics"]["edge"]["odsF"]  # a PNG in memory too


def test_a_small_checkpoint_is_brought_to_the_canvas_of_invpt(tiny_run, tmp_path):
    ids = tmp_path / "one.txt"
    ids.write_text(f"{VAL[0]}\n\n")
    results = evaluate(tmp_path, tiny_run, "--protocol", "invpt", "--ids", ids, "--odsf", "off")
    assert results["protocol"] == "invpt" and results["dataset"]["image_size"] == 512
    assert results["evaluation"]["images"] == 1 and results["evaluation"]["set"] == "one.txt"
    assert results["odsF"] is None and "odsF" in results["metrics"]["edge"]


def test_training_and_evaluation_agree_where_both_compare_at_the_square(pascal_tree, tmp_path, capsys):
    argv = ["--model", "vit_micro", "--head", "light", "--steps", "2", "--batch-size", "4", "--set", "lora_rank=0"]
    options = ["--data", str(pascal_tree), "--protocol", "mini", "--image-size", "48", "--workers", "0"]
    assert train([*argv, *options, "--out", str(tmp_path / "run")]) == 0
    trained, scored = results_of(tmp_path / "run"), evaluate(tmp_path, tmp_path / "run", "--odsf", "off")
    assert scored["evaluation"] == trained["evaluation"]
    assert_same_scores(scored, trained)


# Family A, computed the straight way


def straight_predictions(run, tree, image_id):
    """(the field's PNGs at the photo's size, edges before they are cut off)."""
    _, model, _ = load_checkpoint((run / "last").resolve())
    photo = np.asarray(Image.open(tree / f"JPEGImages/{image_id}.jpg"))
    side = photo.shape[1::-1]
    square = cv2.resize(photo.astype(np.float32), (64, 64), interpolation=cv2.INTER_CUBIC)
    image = torch.tensor(np.rint(square.clip(0, 255)).astype(np.uint8))
    with torch.no_grad():
        outputs = {task: output[0].numpy() for task, output in model(image.permute(2, 0, 1)[None]).items()}
    pictures = {
        task: cv2.resize(outputs[task].argmax(0).astype(np.uint8), side, interpolation=cv2.INTER_NEAREST)
        for task in ("seg", "parts")
    }
    exponentials = np.exp(outputs["sal"] - outputs["sal"].max(0))
    vectors = outputs["normals"] / np.linalg.norm(outputs["normals"], axis=0)
    maps = {
        "sal": 255 * exponentials[1] / exponentials.sum(0),
        "normals": 255 * (vectors.transpose(1, 2, 0) + 1) / 2,
        "edge": 255 / (1 + np.exp(-outputs["edge"][0])),
    }
    for task, levels in maps.items():
        pictures[task] = cv2.resize(levels, side, interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    return pictures


def mean_iou(pairs, classes):
    confusion = np.zeros((classes, classes))
    for predicted, label in pairs:
        valid = label != 255
        np.add.at(confusion, (label[valid].astype(int), predicted[valid].astype(int)), 1)
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    shown = confusion.sum(1) > 0
    return 100 * (confusion.diagonal()[shown] / union[shown]).mean()


def test_family_a_equals_a_straightforward_computation(saved, tiny_run, pascal_tree):
    seg, parts, ious, angles = [], [], [], []
    for image_id in VAL:
        found = straight_predictions(tiny_run, pascal_tree, image_id)
        for task, folder in FOLDERS.items():
            kept = np.asarray(Image.open(saved[1] / folder / f"{image_id}.png")).astype(int)
            assert (kept != found[task]).mean() < 0.002  # a float at the edge of a level, or two equal logits
            assert np.abs(kept - found[task]).max() <= 1 or task in ("seg", "parts")
        seg.append((found["seg"], np.asarray(Image.open(pascal_tree / f"semseg/VOC12/{image_id}.png"))))
        label = read_parts(pascal_tree / f"human_parts/{image_id}.mat")
        if label.any():
            parts.append((found["parts"], label))
        salient = np.asarray(Image.open(pascal_tree / f"sal_distill/{image_id}.png")) / 255 > 0.5
        masks = [found["sal"] / 255 > t for t in np.linspace(0.2, 0.9, 15)]
        ious.append([(m & salient).sum() / (m | salient).sum() for m in masks])

        stored = np.asarray(Image.open(pascal_tree / f"normals_distill/{image_id}.png"))
        label_map = loadmat(pascal_tree / f"pascal-context/trainval/{image_id}.mat")["LabelMap"]
        valid = stored.any(-1) & np.isin(label_map, valid_classes())
        true, guess = (2.0 * picture[valid] / 255 - 1 for picture in (stored, found["normals"]))
        cosine = (true * guess).sum(1) / np.linalg.norm(true, axis=1) / np.linalg.norm(guess, axis=1)
        angles.append(np.degrees(np.arccos(cosine.clip(-1, 1))))
    metrics = saved[0]["metrics"]
    assert metrics["seg"]["mIoU"] == pytest.approx(mean_iou(seg, 21), abs=0.01)
    assert metrics["parts"]["mIoU"] == pytest.approx(mean_iou(parts, 7), abs=0.01)
    assert metrics["sal"]["mIoU"] == pytest.approx(100 * np.mean(ious, axis=0).max(), abs=0.01)
    assert metrics["normals"]["mErr"] == pytest.approx(np.concatenate(angles).mean(), abs=0.01)


def test_edges_at_the_photos_size_are_the_fields_png():
    logits = torch.randn(1, 9, 7)
    answer = build_protocol("invpt", 16).align("edge", torch.nn.functional.pad(logits, (4, 5, 3, 4)), (9, 7))
    assert np.array_equal(answer.picture, quantise(logits)[0]) and torch.equal(answer.postprocessed, logits)


# Predictions of any program


@pytest.fixture(scope="module")
def labels_as_predictions(pascal_tree, tmp_path_factory):
    """The labels themselves in the field's formats, for all images; where they are void, anything."""
    folder = tmp_path_factory.mktemp("labels")
    for image_id in [*VAL, *(f"2008_{n:06d}" for n in range(8))]:
        paths = (pascal_tree / f"semseg/{kind}/{image_id}.png" for kind in ("VOC12", "pascal-context"))
        seg = next(path for path in paths if path.exists())
        label_map = loadmat(pascal_tree / f"pascal-context/trainval/{image_id}.mat")["LabelMap"]
        pictures = {
            "seg": np.asarray(Image.open(seg)) % VOID,
            "parts": read_parts(pascal_tree / f"human_parts/{image_id}.mat"),
            "sal": 255 * (np.asarray(Image.open(pascal_tree / f"sal_distill/{image_id}.png")) >= 128).astype(np.uint8),
            "normals": np.asarray(Image.open(pascal_tree / f"normals_distill/{image_id}.png")),
            "edge": 255 * thin(boundaries(label_map)).astype(np.uint8),
        }
        if not pictures["parts"].any():
            pictures["parts"] = np.zeros(label_map.shape, np.uint8)
        for task, picture in pictures.items():
            (folder / FOLDERS[task]).mkdir(exist_ok=True)
            Image.fromarray(picture).save(folder / FOLDERS[task] / f"{image_id}.png")
    return folder


@pytest.fixture
def predictions(labels_as_predictions, tmp_path):
    """A copy to damage."""
    return shutil.copytree(labels_as_predictions, tmp_path / "predictions")


@pytest.mark.parametrize("protocol", ["mtinet", "invpt", "ase"])
@pytest.mark.parametrize("split", ["val", "all"])
def test_the_labels_themselves_are_perfect(protocol, split, labels_as_predictions, pascal_tree, tmp_path):
    options = ["--protocol", protocol, "--odsf", "full", "--odsf-variant", "none", "--split", split]
    results = evaluate(tmp_path, "--predictions", labels_as_predictions, "--data", pascal_tree, *options)
    assert results["protocol"] == protocol
    metrics = results["metrics"]
    assert (metrics["seg"]["mIoU"], metrics["parts"]["mIoU"], metrics["sal"]["mIoU"]) == (100, 100, 100)
    assert metrics["sal"]["maxF"] == pytest.approx(100) and metrics["normals"]["mErr"] < 1e-3
    assert metrics["edge"]["odsF"] == pytest.approx(100)
    assert results["odsF"]["images"] == results["evaluation"]["images"] == {"val": 4, "all": 12}[split]


def test_mini_shrinks_predictions_of_the_photos_size(labels_as_predictions, pascal_tree, tmp_path):
    options = ["--protocol", "mini", "--odsf", "off"]
    metrics = evaluate(tmp_path, "--predictions", labels_as_predictions, "--data", pascal_tree, *options)["metrics"]
    assert (metrics["seg"]["mIoU"], metrics["parts"]["mIoU"], metrics["sal"]["mIoU"]) == (100, 100, 100)


def test_only_the_tasks_that_are_there_are_scored(predictions, pascal_tree, tmp_path):
    for folder in set(FOLDERS.values()) - {"semseg", "sal"}:
        shutil.rmtree(predictions / folder)
    results = evaluate(tmp_path, "--predictions", predictions, "--data", pascal_tree, "--protocol", "mtinet")
    assert list(results["metrics"]) == ["seg", "sal"] and results["odsF"] is None


def damage(path, kind):
    picture = np.array(Image.open(path))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "text":
        path.write_text("no picture")
    elif kind == "colour":
        Image.fromarray(np.stack([picture] * 3, -1)).save(path)
    elif kind == "16 bits":
        Image.fromarray(picture.astype(np.uint16)).save(path)
    elif kind == "smaller":
        Image.fromarray(picture[:-1]).save(path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        picture[0, 0] = kind
        Image.fromarray(picture).save(path)


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("semseg", "truncated", "cannot be read"),
        ("normals", "text", "cannot be read"),
        ("sal", "colour", "Pillow's mode RGB, not 8 bits of L"),
        ("edge", "16 bits", "not 8 bits of L"),
        ("normals", "smaller", "neither its photo's"),
        ("edge", "folder", "is not a file"),
        ("semseg", 21, "holds 21, which is no class 0..20"),
        ("human_parts", VOID, "holds 255, which is no class 0..6"),
    ],
)
def test_a_file_that_is_no_prediction_is_named(task, kind, message, predictions, pascal_tree, tmp_path, capsys):
    for image_id in VAL[1:3]:
        damage(predictions / task / f"{image_id}.png", kind)
    options = ["--data", pascal_tree, "--protocol", "mtinet", "--odsf", "off"]
    error = mistake(capsys, tmp_path, "--predictions", predictions, *options)
    assert error.startswith(f"error: 2 of 20 predictions cannot be scored: {predictions / task / VAL[1]}.png ")
    assert message in error and f"{predictions / task / VAL[2]}.png" in error


def test_missing_predictions_and_those_of_another_split_are_counted(predictions, pascal_tree, tmp_path, capsys):
    options = ["--predictions", predictions, "--data", pascal_tree, "--protocol", "invpt", "--odsf", "off"]
    (predictions / f"sal/{VAL[2]}.png").unlink()
    error = mistake(capsys, tmp_path, *options)
    assert f"{predictions}/sal lacks 1 of 4 predictions of split 'val', {VAL[2]};" in error
    for image_id in VAL:
        (predictions / f"semseg/{image_id}.png").unlink()
    error = mistake(capsys, tmp_path, *options)
    assert f"semseg lacks 4 of 4 predictions of split 'val', {', '.join(VAL[:3])}, ...; it has 8 other files" in error
    assert "perhaps of another split" in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give either a CHECKPOINT or --predictions"),
        (["RUN", "--predictions", "PREDICTIONS"], "give either a CHECKPOINT or --predictions"),
        (["/no/such/run"], "/no/such/run is not a checkpoint"),
        (["RUN", "--data", "/no/such/tree"], "/no/such/tree is not a folder"),
        (["RUN", "--split", "test"], "ImageSets/Context/test.txt does not exist"),
        (["RUN", "--ids", "ALIEN"], "names 2 of 3 images that split 'val' does not list, 2008_000000, 2011_000001"),
        (["RUN", "--ids", "/no/such/file"], "no such file: /no/such/file"),
        (["RUN", "--baseline", "resnet"], "no baseline 'resnet': give a JSON file"),
        (["RUN", "--baseline", "ASTMT ResNet-101"], "is of protocol A, the scores are of mtinet@64"),
        (["RUN", "--save-predictions", "PREDICTIONS"], "exists and is not an empty folder"),
        (["--predictions", "PREDICTIONS"], "--predictions are scored with the labels of a tree: give --data"),
        (["--predictions", "PREDICTIONS", "--data", "DATA"], "say by which protocol these predictions are scored"),
        (["--predictions", "DATA", "--data", "DATA", "--protocol", "ase", "--split", "train"], "lacks"),
        (["--predictions", "/no/such", "--data", "DATA", "--protocol", "ase"], "/no/such is not a folder"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    argv, message, tiny_run, labels_as_predictions, pascal_tree, tmp_path, capsys
):
    alien = tmp_path / "alien.txt"
    alien.write_text(f"{VAL[0]}\n2008_000000\n2011_000001\n")
    places = {"RUN": tiny_run, "PREDICTIONS": labels_as_predictions, "DATA": pascal_tree, "ALIEN": alien}
    assert message in mistake(capsys, tmp_path, *(places.get(word, word) for word in argv))


def test_a_checkpoint_of_scenes_is_scored_on_scenes_and_on_nothing_else(pascal_tree, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(["--steps", "1", "--set", "scenes=4", "--set", "val_scenes=3", "--out", str(run)]) == 0
    scored = evaluate(tmp_path, run, "--save-predictions", tmp_path / "kept")
    assert scored["protocol"] == "scenes" and scored["odsF"] is None
    trained = results_of(run)
    assert scored["evaluation"] == trained["evaluation"]
    assert_same_scores(scored, trained)
    assert len(list((tmp_path / "kept").glob("*/*.png"))) == 15
    (tmp_path / "out/results.json").unlink()
    for options in (["--data", pascal_tree], ["--protocol", "mini"], ["--odsf", "full"]):
        assert "rendered scenes" in mistake(capsys, tmp_path, run, *options)


def test_a_killed_evaluation_leaves_no_predictions(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("train.evaluate.score_predictions", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    argv = [str(tiny_run), "--save-predictions", str(tmp_path / "kept"), "--out", str(tmp_path / "out"), *QUICK]
    assert main(argv) == 130
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".lock", ".written", "out"]


def test_a_run_is_a_baseline_of_another(tiny_run, tmp_path, capsys):
    first = evaluate(tmp_path, tiny_run, "--odsf", "off")
    (tmp_path / "out").rename(tmp_path / "first")
    results = evaluate(tmp_path, tiny_run, "--odsf", "off", "--baseline", tmp_path / "first")
    assert results["metrics"] == first["metrics"] and results["delta_m"] == 0
    assert results["baseline"]["protocol"] == "mtinet@64"
    assert "Delta_m   +0.00 % against" in capsys.readouterr().out


def test_some_of_the_tasks_are_scored_on_a_tree_that_has_no_labels_of_the_others(tmp_path, tiny_run, pascal_copy):
    whole = evaluate(tmp_path, tiny_run, "--odsf", "off")
    for folder in ("human_parts", "normals_distill", "pascal-context"):
        shutil.rmtree(pascal_copy / folder)
    kept = tmp_path / "two"
    options = ("--tasks", "semseg,sal", "--data", pascal_copy, "--save-predictions", kept)
    some = evaluate(tmp_path, tiny_run, *options)
    assert some["metrics"] == {task: whole["metrics"][task] for task in ("seg", "sal")}
    assert sorted(path.name for path in kept.iterdir() if path.is_dir()) == ["sal", "semseg"]
    again = evaluate(tmp_path, "--predictions", kept, "--data", pascal_copy, "--tasks", "sal")
    assert again["metrics"] == {"sal": some["metrics"]["sal"]}


def test_a_task_that_was_not_predicted_cannot_be_scored(tiny_scenes_run, capsys):
    assert main([str(tiny_scenes_run), "--tasks", "seg,normals", "--out", "unused"]) == 2
    assert "has no predictions of normals: choose --tasks among seg, sal" in capsys.readouterr().err


def test_predictions_of_scenes_are_scored_on_the_scenes_that_their_folder_names(tmp_path, tiny_scenes_run):
    kept = tmp_path / "kept"
    scored = evaluate(tmp_path, tiny_scenes_run, "--save-predictions", kept)
    again = evaluate(tmp_path, "--predictions", kept)
    assert again["evaluation"] == scored["evaluation"] and again["protocol"] == "scenes"
    assert again["metrics"]["seg"] == scored["metrics"]["seg"]
    assert again["metrics"]["sal"]["maxF"] == pytest.approx(scored["metrics"]["sal"]["maxF"], abs=1)  # of 8 bits


def test_a_cache_is_filled_and_used(tmp_path, tiny_run):
    first = evaluate(tmp_path, tiny_run, "--cache", tmp_path / "cache", "--odsf", "off")
    entries = {path.name for path in (tmp_path / "cache").iterdir()}
    assert entries
    assert evaluate(tmp_path, tiny_run, "--cache", tmp_path / "cache", "--odsf", "off")["metrics"] == first["metrics"]
    assert {path.name for path in (tmp_path / "cache").iterdir()} == entries


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_neither_scored_nor_drawn(value, tiny_run, tmp_path, error_of, monkeypatch):
    """They would get the scores and the colours of class 0. A head overflows, say, though its weights are finite."""
    forward, photo = MultiTaskViT.forward, tmp_path / "photo.png"
    spoil = lambda outputs: outputs | {"seg": outputs["seg"].index_fill(0, torch.tensor([0]), value)}  # noqa: E731
    monkeypatch.setattr(MultiTaskViT, "forward", lambda *arguments: spoil(forward(*arguments)))
    Image.new("RGB", (40, 30)).save(photo)
    message = "the model's output for seg is not finite: take an earlier checkpoint"
    on_photo = message.replace(" is", f" on {photo} is")
    assert message in error_of(main, tiny_run, *QUICK, "--out", tmp_path / "out")
    assert on_photo in error_of(predict, tiny_run, photo, "--out", tmp_path / "pictures")
    data = ["--set", "scenes=4", "--set", "val_scenes=2", "--tasks", "seg", "--steps", "1", *QUICK]
    assert message in error_of(train, *data, "--out", tmp_path / "run")
    assert not any((tmp_path / name).exists() for name in ("out/results.json", "pictures/semseg", "run/results.json"))


def test_fast_takes_a_hundred_images_evenly_spread():
    dataset = type("Set", (), {"boundary_maps": staticmethod(lambda: dict.fromkeys(range(250)))})
    assert list(choose_boundaries(dataset, "fast")) == [5 * n // 2 for n in range(100)]
    assert len(choose_boundaries(dataset, "full")) == 250 and not choose_boundaries(dataset, "off")


def test_images_do_not_pile_up():
    """Peak memory after 30 images of 500 x 500 is that after 100: nothing of an image outlives its turn."""
    rng, shape, peaks = np.random.default_rng(0), (500, 500), []
    labels = {task: rng.integers(0, 2, shape, np.uint8) for task in DEFAULT_TASKS}
    labels["normals"] = rng.random((3, *shape), np.float32)

    def answered():
        for n in range(100):
            if n in (30, 99):
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            pictures = {task: labels[task] + np.uint8(n % 3) for task in DEFAULT_TASKS if task != "normals"}
            pictures["normals"] = np.full((*shape, 3), n, np.uint8)
            yield (
                labels,
                {
                    task: AlignedPrediction(TASKS[task].from_picture(picture), picture)
                    for task, picture in pictures.items()
                },
            )

    metrics = build_metrics(DEFAULT_TASKS, {"seg": tuple(map(str, range(21))), "parts": PART_NAMES})
    score_predictions(Scoring(answered(), range(100), metrics, {}), "seism", 0)
    assert peaks[1] - peaks[0] < 40 * 1024  # KiB: 70 images of 4 MB in PNG's arrays alone would be 280 MB


def test_edge_labels_are_untouched(saved, pascal_tree):
    """The loss is that of the PNG's probabilities, at the middle of each level."""
    total = pixels = 0
    for image_id in VAL:
        label = edges_from_label_map(loadmat(pascal_tree / f"pascal-context/trainval/{image_id}.mat")["LabelMap"])
        p = (np.asarray(Image.open(saved[1] / f"edge/{image_id}.png")) + 0.5) / 256
        total -= (0.95 * label * np.log(p) + 0.05 * (1 - label) * np.log(1 - p)).sum()
        pixels += label.size
    assert saved[0]["metrics"]["edge"]["loss"] == pytest.approx(total / pixels, rel=1e-5)


@pytest.mark.parametrize("note", ['{"protocol": "mtinet", "image_size": "32"}', '{"protocol": 5}', "[]", '["ab"]', "{"])
def test_a_note_that_makes_no_sense_is_one_line(note, predictions, pascal_tree, tmp_path, capsys):
    (predictions / "predictions.json").write_text(note)
    argv = ["--predictions", predictions, "--data", pascal_tree]
    assert f"{predictions}/predictions.json" in mistake(capsys, tmp_path, *argv)
