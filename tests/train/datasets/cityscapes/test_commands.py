"""All commands on a tree whose ids have folders, as a user types them."""

import json

import pytest
from PIL import Image

from train.check import main as check
from train.cli import main as train
from train.compare import main as compare
from train.evaluate import main as evaluate
from train.predict import main as predict

pytestmark = pytest.mark.integration
SMALL = ["--model", "vit_micro", "--head", "light", "--batch-size", "2", "--set", "lora_rank=0", "--workers", "0"]
FRANKFURT = "frankfurt/frankfurt_000000_00000"


@pytest.fixture(scope="module")
def run(city_tree, tmp_path_factory):
    """Two steps with the protocol that a tree of Cityscapes gets where none is named."""
    out = tmp_path_factory.mktemp("runs") / "city"
    data = ["--data", str(city_tree), "--image-size", "32", "--tasks", "seg,depth"]
    assert train([*data, *SMALL, "--steps", "2", "--out", str(out)]) == 0
    return out


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_a_run_says_what_it_was(run):
    told = results(run)
    assert told["protocol"] == "cityscapes@32" and told["dataset"]["name"] == "Cityscapes"
    assert (told["dataset"]["train"], told["dataset"]["val"]) == (4, 2)
    assert list(told["metrics"]) == ["seg", "depth"]


def test_predictions_are_saved_in_the_folders_of_their_ids_and_score_alike(run, city_tree, tmp_path, capsys):
    kept, ours, theirs = tmp_path / "kept", tmp_path / "ours", tmp_path / "theirs"
    quick = ["--data", str(city_tree), "--workers", "0"]
    assert evaluate([str(run), *quick, "--save-predictions", str(kept), "--out", str(ours)]) == 0
    written = {path.relative_to(kept).as_posix() for path in kept.rglob("*.png")}
    assert written == {f"{task}/{FRANKFURT}{n}.png" for task in ("semseg", "depth") for n in (0, 1)}
    assert evaluate(["--predictions", str(kept), *quick, "--out", str(theirs)]) == 0
    assert results(ours)["metrics"] == results(theirs)["metrics"]
    assert compare([str(ours), str(theirs), "--out", str(tmp_path / "compared")]) == 0
    (kept / f"depth/{FRANKFURT}1.png").unlink()
    assert evaluate(["--predictions", str(kept), *quick, "--out", str(theirs)]) == 2
    assert f"lacks 1 of 2 predictions of split 'val', {FRANKFURT}1" in capsys.readouterr().err


def test_images_are_chosen_by_ids_with_folders(run, tmp_path, capsys):
    (tmp_path / "ids.txt").write_text(f"{FRANKFURT}1\n")
    assert evaluate([str(run), "--ids", str(tmp_path / "ids.txt"), "--workers", "0", "--out", str(tmp_path / "a")]) == 0
    assert results(tmp_path / "a")["evaluation"]["images"] == 1
    (tmp_path / "ids.txt").write_text(f"../{FRANKFURT}1\n")
    assert evaluate([str(run), "--ids", str(tmp_path / "ids.txt"), "--workers", "0", "--out", str(tmp_path / "b")]) == 2
    assert "names 1 of 1 images that split 'val' does not list" in capsys.readouterr().err


def test_photos_in_sub_folders_are_predicted_into_sub_folders(run, city_tree, tmp_path):
    out = tmp_path / "out"
    assert predict([str(run), str(city_tree / "leftImg8bit/val"), "--out", str(out)]) == 0
    for place, suffix in (("semseg", "png"), ("overlays/depth", "png"), ("raw", "npz")):
        assert (out / place / f"{FRANKFURT}1_leftImg8bit.{suffix}").is_file()
    with Image.open(out / "depth" / f"{FRANKFURT}0_leftImg8bit.png") as picture:
        assert picture.size == (64, 32) and picture.mode == "I;16"


def test_a_run_is_scored_on_images_divided_anew(run, city_tree, tmp_path):
    argv = [str(run), "--data", str(city_tree), "--val-images", "0.5", "--workers", "0", "--out", str(tmp_path)]
    assert evaluate(argv) == 0
    assert results(tmp_path)["evaluation"]["images"] == 3 and results(tmp_path)["dataset"]["val_images"] == "0.5"


def test_a_protocol_of_another_data_set_trains_and_predicts_the_classes_of_the_data(city_tree, tmp_path):
    """With label caches and images divided by a file of ids."""
    (tmp_path / "val.txt").write_text("bochum/bochum_000000_000000\n")
    argv = ["--data", str(city_tree), "--tasks", "seg,depth", "--protocol", "mini", "--image-size", "32", *SMALL]
    argv += ["--val-images", str(tmp_path / "val.txt"), "--cache", str(tmp_path / "cache"), "--steps", "1"]
    assert train([*argv, "--out", str(tmp_path / "run")]) == 0
    told = results(tmp_path / "run")
    assert told["protocol"] == "mini@32" and (told["dataset"]["train"], told["dataset"]["val"]) == (5, 1)
    assert told["settings"]["dataset"] == "Cityscapes"
    assert evaluate([str(tmp_path / "run"), "--workers", "0", "--out", str(tmp_path / "scored")]) == 0
    assert results(tmp_path / "scored")["evaluation"]["images"] == 1
    assert compare([str(tmp_path / "run"), "--out", str(tmp_path / "compared")]) == 0


def test_a_tree_is_checked_and_is_not_written_to(city_tree, tmp_path, capsys):
    argv = ["--data", str(city_tree), "--workers", "0", "--out", str(tmp_path / "out")]
    assert check(argv) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "train 4 2975 0 64/64/64 32/32/32" in printed and "val 2 500 0" in printed and "motorcycle" in printed
    assert check([*argv, "--val-images", "0.5"]) == 0
    assert "train 3 - 0" in " ".join(capsys.readouterr().out.split())
    assert check([*argv[:-1], str(city_tree / "out")]) == 2
    assert "lies inside the data set" in capsys.readouterr().err and not (city_tree / "out").exists()


def test_published_rows_of_another_data_set_are_no_baseline(run, tmp_path, capsys):
    told = results(run) | {"protocol": "invpt"}
    (tmp_path / "results.json").write_text(json.dumps(told))
    assert compare([str(tmp_path), "--baseline", "MLoRE ViT-L", "--out", str(tmp_path / "out")]) == 2
    assert "is of PASCAL_MT, the scores are of Cityscapes: choose another" in capsys.readouterr().err
