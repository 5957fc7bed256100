"""All commands on a NYUD-v2 tree, as a user types them."""

import json

import numpy as np
import pytest
from PIL import Image

from train.check import main as check
from train.cli import main as train
from train.compare import main as compare
from train.datasets.base import open_tree
from train.datasets.nyud.labels import NYUD_CLASSES
from train.datasets.scenes.dataset import Scenes
from train.evaluate import main as evaluate
from train.evaluation.baselines import published_rows
from train.export import main as export
from train.predict import main as predict
from train.run.record import read_record

pytestmark = pytest.mark.integration
SMALL = ["--model", "vit_micro", "--head", "light", "--batch-size", "2", "--set", "lora_rank=0", "--workers", "0"]
TASKS = ["--tasks", "seg,depth,normals,edge"]


@pytest.fixture(scope="module")
def run(nyud_trees, tmp_path_factory):
    """Two steps with the protocol that a tree of NYUD-v2 gets where none is named."""
    out = tmp_path_factory.mktemp("runs") / "nyud"
    data = ["--data", str(nyud_trees["npy"].parent), "--image-size", "56"]
    assert train([*data, *TASKS, *SMALL, "--steps", "2", "--out", str(out)]) == 0
    return out


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_says_what_it_was(run):
    told = results(run)
    assert told["protocol"] == "nyud_invpt@56" and told["evaluation"]["compared_at"] == "72 x 56"
    assert told["dataset"]["name"] == "NYUD" and (told["dataset"]["train"], told["dataset"]["val"]) == (4, 2)
    assert list(told["metrics"]) == ["seg", "normals", "edge", "depth"]
    assert list(read_record(run).losses) == [1, 2]


def test_a_checkpoint_and_its_saved_predictions_score_alike(run, nyud_trees, tmp_path, capsys):
    kept, ours, theirs = tmp_path / "kept", tmp_path / "ours", tmp_path / "theirs"
    quick = ["--workers", "0", "--odsf", "full"]
    assert evaluate([str(run), *quick, "--save-predictions", str(kept), "--out", str(ours)]) == 0
    with_files = ["--predictions", str(kept), "--data", str(nyud_trees["png"]), *quick, "--out", str(theirs)]
    assert evaluate(with_files) == 0  # the other release, with the same labels but for the rounding of normals
    ours, theirs = (results(folder)["metrics"] for folder in (ours, theirs))
    assert ours["edge"]["odsF"] == theirs["edge"]["odsF"] > 0
    for task, score, tolerance in (("seg", "mIoU", 1e-9), ("normals", "mErr", 0.05), ("depth", "rmse", 1e-3)):
        assert theirs[task][score] == pytest.approx(ours[task][score], abs=tolerance)
    assert compare([str(tmp_path / "ours"), str(tmp_path / "theirs"), "--out", str(tmp_path / "compared")]) == 2
    assert "seg of 2 images (ids " in capsys.readouterr().err  # other files, of which nothing tells that they agree
    assert compare([str(tmp_path / "ours"), "--out", str(tmp_path / "compared")]) == 0
    assert "depth rmse" in capsys.readouterr().out


def test_family_a_trains_on_its_rectangle(nyud_trees, tmp_path):
    out = tmp_path / "out"
    data = ["--data", str(nyud_trees["png"]), "--protocol", "nyud_mtinet", "--image-size", "48"]
    assert train([*data, *TASKS, *SMALL, "--steps", "1", "--out", str(out)]) == 0
    assert results(out)["evaluation"]["compared_at"] == "64 x 48"


def test_a_run_of_family_b_is_scored_by_family_a(run, tmp_path):
    """Both sides are whole numbers of patches of 8: for 3:4 the next height after 56 is 72."""
    assert evaluate([str(run), "--protocol", "nyud_mtinet", "--workers", "0", "--out", str(tmp_path)]) == 0
    assert results(tmp_path)["protocol"] == "nyud_mtinet@72"


def test_a_program_of_a_rectangular_run_takes_its_photos(run, tmp_path):
    assert export([str(run), "--to", str(tmp_path / "run.pt2")]) == 0
    Image.effect_noise((90, 50), 90).convert("RGB").save(tmp_path / "photo.png")
    for name, source in (("run", [str(run)]), ("pt2", ["--exported", str(tmp_path / "run.pt2")])):
        assert predict([*source, str(tmp_path / "photo.png"), "--out", str(tmp_path / name)]) == 0
    ours, theirs = (np.load(tmp_path / name / "raw/photo.npz") for name in ("run", "pt2"))
    for task in ours:
        np.testing.assert_allclose(theirs[task], ours[task], rtol=0, atol=2e-3)  # float16


def test_the_card_of_a_rectangular_run_has_both_sides(run, tmp_path):
    assert export([str(run), "--to", str(tmp_path / "folder")]) == 0
    assert "vit_micro at 72 x 56 pixels" in (tmp_path / "folder/README.md").read_text()


def test_photos_are_predicted_at_their_size(run, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), np.uint8)).save(tmp_path / "photo.png")
    assert predict([str(run), str(tmp_path / "photo.png"), "--out", str(tmp_path / "out")]) == 0
    for folder, mode in (("semseg", "P"), ("normals", "RGB"), ("edge", "L"), ("depth", "I;16")):
        with Image.open(tmp_path / "out" / folder / "photo.png") as picture:
            assert picture.size == (90, 50) and picture.mode == mode


@pytest.mark.parametrize("decoder", ["mlore", "fgmoe"])
def test_decoders_train_on_rectangles(decoder, nyud_trees, vit_tiny_weights, tmp_path):
    argv = ["--data", str(nyud_trees["npy"]), *TASKS, "--model", "vit_tiny", "--pretrained", str(vit_tiny_weights)]
    argv += ["--decoder", decoder, "--steps", "1", "--batch-size", "2", "--workers", "0", "--image-size", "112"]
    assert train([*argv, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("recipe", ["nyud_tiny", "nyud_base"])
def test_recipes_run(recipe, nyud_trees, vit_tiny_weights, tmp_path):
    argv = ["--data", str(nyud_trees["png"]), "--recipe", recipe, "--pretrained", str(vit_tiny_weights)]
    size = {"nyud_tiny": "48", "nyud_base": "112"}[recipe]
    argv += ["--model", "vit_tiny", "--image-size", size, "--steps", "1", "--batch-size", "2", "--workers", "0"]
    assert train([*argv, "--out", str(tmp_path / "run")]) == 0


def test_delta_m_against_the_published_row(run, tmp_path, capsys):
    """Only at the protocol's own size; seg and edge twice as good, normals and depth twice as bad: 0 %."""
    name = "MLoRE ViT-L (NYUD)"
    assert compare([str(run), "--baseline", name, "--out", str(tmp_path / "a")]) == 2
    assert "is of protocol NYUD B, the scores are of nyud_invpt@56" in capsys.readouterr().err
    scores = {task: {cell["metric"]: 2 * cell["value"]} for task, cell in published_rows()[name]["scores"].items()}
    told = results(run) | {"protocol": "nyud_invpt", "metrics": scores}
    told["evaluation"]["compared_at"] = "the photo's size"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/results.json").write_text(json.dumps(told))
    assert compare([str(tmp_path / "run"), "--baseline", name, "--out", str(tmp_path / "b")]) == 0
    assert "+0.00" in capsys.readouterr().out


def test_a_tree_is_checked_and_is_not_written_to(nyud_tree, tmp_path, capsys):
    argv = ["--data", str(nyud_tree), "--workers", "0", "--out", str(tmp_path / "out")]
    assert check(argv) == 0
    printed = capsys.readouterr().out
    assert f"tree  {open_tree(nyud_tree)}" in printed and "nothing is wrong" in printed
    assert "train 4 795 0 " in " ".join(printed.split()) and all(name in printed for name in NYUD_CLASSES)
    assert (tmp_path / "out/sheet.png").exists()
    assert check([*argv[:-1], str(nyud_tree / "out")]) == 2
    assert "lies inside the data set" in capsys.readouterr().err and not (nyud_tree / "out").exists()


@pytest.mark.parametrize("hand", [(1, 1, 1), (-1, 1, 1), (1, -1, 1)])
def test_the_axes_of_normals_are_told_from_objects(hand, tmp_path, capsys):
    """Rendered rooms in the format of NYUD-v2: wall and floor are no objects, all others are."""
    root, stored = tmp_path / "NYUD_MT", np.array([1, 31, 29, 29, 35, 35], np.uint8)  # wall, person, box, lamp
    for folder in ("gt_sets", "images", "segmentation", "normals"):
        (root / folder).mkdir(parents=True)
    scenes = Scenes("val", 96, 24, 0, ("seg", "normals"))
    ids = [f"{n:04d}" for n in range(len(scenes))]
    for index, image_id in enumerate(ids):
        sample = scenes[index, 0]
        Image.fromarray(sample["image"]).save(root / f"images/{image_id}.jpg")
        Image.fromarray(stored[sample["seg"]]).save(root / f"segmentation/{image_id}.png")
        np.save(root / f"normals/{image_id}.npy", sample["normals"].transpose(1, 2, 0) * np.float32(hand))
    for split, part in {"train": ids[:16], "val": ids[16:]}.items():
        (root / f"gt_sets/{split}.txt").write_text("".join(f"{image_id}\n" for image_id in part))
    argv = ["--data", str(root), "--tasks", "seg,normals", "--workers", "0", "--out", str(tmp_path / "out")]
    assert check(argv) == 0
    axes = f"{'+x left' if hand[0] > 0 else '+x right'}, {'+y up' if hand[1] > 0 else '+y down'}"
    printed = capsys.readouterr().out
    assert axes in printed and ("a warning" in printed) == (hand != (1, 1, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "seg,parts"], "NYUD-v2 has no labels for 'parts': choose --tasks among seg, normals, edge, depth"),
        (["--protocol", "mini"], "mini derives edges from label maps, which NYUD-v2 does not have: choose another"),
        (["--image-size", "50"], "50 is no height of protocol nyud_invpt, whose images are 7:9"),
        (["--image-size", "28"], "image size 28 is not a multiple of the patch size 8"),
        (["--image-size", "56", "--skip-bad", "--data", "/no/such"], "/no/such is not a folder"),
    ],
)
def test_a_mistake_is_one_line(options, message, nyud_tree, tmp_path, capsys):
    argv = ["--data", str(nyud_tree), *TASKS, *SMALL, "--steps", "1", "--out", str(tmp_path / "run")]
    assert train([*argv, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_model_of_other_classes_is_refused(tiny_run, nyud_tree, capsys):
    argv = [str(tiny_run), "--data", str(nyud_tree), "--protocol", "nyud_invpt", "--workers", "0"]
    assert evaluate([*argv, "--tasks", "seg,normals"]) == 2
    assert "was trained on the classes of PASCAL_MT for seg, which NYUD does not have" in capsys.readouterr().err
