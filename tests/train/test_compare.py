"""``python -m train.compare``: tables of what may be compared, and nothing else."""

import io
import json
import subprocess
import sys
from argparse import Namespace
from functools import reduce
from math import sqrt

import pytest
from PIL import Image

from kernels import UserError
from train.compare import caption, load_models, main, rows_of, shown_images
from train.evaluate import main as evaluate
from train.evaluation.baselines import published_rows
from train.evaluation.results import read_results, require_comparable
from train.evaluation.seeds import arms_of
from train.output.scores import score_table

ROWS = published_rows()


def scored(run, out, *options):
    assert evaluate([str(run), "--workers", "0", *map(str, options), "--out", str(out)]) == 0
    return out


def compare(capsys, tmp_path, *argv):
    capsys.readouterr()
    status = main([*map(str, argv), "--out", str(tmp_path / "compared")])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def altered(tiny_run, tmp_path):
    """alter(name, ...) -> a copy of tiny_run's results with some entries changed."""

    def alter(name, **entries):
        results = json.loads((tiny_run / "results.json").read_text())
        for key, value in entries.items():
            results[key] = results[key] | value if isinstance(value, dict) and results.get(key) else value
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        return tmp_path / name

    return alter


def test_two_runs_stand_in_one_table_and_one_picture(tiny_run, pascal_tree, tmp_path, capsys):
    from train.cli import main as train

    argv = ["--data", str(pascal_tree), "--model", "vit_micro", "--head", "light", "--steps", "1", "--batch-size", "4"]
    options = ["--tasks", "seg,edge", "--protocol", "mtinet", "--image-size", "64", "--moe", "none", "--workers", "0"]
    assert train([*argv, *options, "--out", str(tmp_path / "other")]) == 0
    runs = [str(tiny_run), str(tmp_path / "other")]
    command = [sys.executable, "-m", "train.compare", *runs, "--baseline", str(tiny_run)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    heads, first, second = [line.split("  ") for line in done.stdout.splitlines()[:3]]
    assert heads[0].strip() == "run" and first[0].strip() == "tiny" and second[0].strip() == "other"
    assert first[-1].strip() == "+0.00" and second[-1].strip() == "n/a"
    assert "protocol mtinet@64, labels at 64 x 64, 4 images of val" in done.stdout
    out = tmp_path / "runs/compare"
    assert (out / "table.txt").read_text() in done.stdout
    assert Image.open(out / "predictions.png").width > 1200 and Image.open(out / "curves.png").width > 1200


def test_evaluations_of_one_protocol_are_compared_in_markdown(tiny_run, tmp_path, capsys):
    first, second = (scored(tiny_run, tmp_path / name, "--odsf", "fast") for name in ("a", "b"))
    status, text, _ = compare(capsys, tmp_path, first, second, "--format", "markdown")
    lines = text.splitlines()
    assert (
        status == 0
        and lines[0].startswith("| run | trainable M | all M | seg mIoU ↑ |")
        and "| edge odsF ↑ | edge loss ↓ |" in lines[0]
    )
    assert lines[1].count("---:") == lines[2].count("|") - 2 and lines[2][3:] == lines[3][3:].replace("| b |", "| a |")
    assert "odsF over 4 images, variant seism" in text
    assert (tmp_path / "compared/table.md").read_text() in text
    assert (tmp_path / "compared/predictions.png").exists()
    assert not (tmp_path / "compared/curves.png").exists(), "evaluations have no course"


def test_seeds_are_one_row_in_every_format_and_one_pdf_of_chosen_images(tiny_run, altered, tmp_path, capsys):
    results = read_results(tiny_run)
    score, millions = results["metrics"]["seg"]["mIoU"], f"{results['parameters']['total'] / 1e6:.2f}"
    other = altered("tiny-1", settings={"seed": 1}, metrics={"seg": {"mIoU": score + 1}})
    chosen = ["--images", "2009_000002,2009_000000", "--picture", "figure.pdf", "--format", "latex"]
    status, text, _ = compare(capsys, tmp_path, tiny_run, other, *chosen)
    out = tmp_path / "compared"
    assert status == 0 and (out / "table.tex").read_text() in text
    assert f"tiny (2 seeds) & {millions} & {millions} & {score + 0.5:.2f} $\\pm$ {sqrt(0.5):.2f} &" in text
    assert "tiny (2 seeds)" in (out / "table.csv").read_text() and " ± " in (out / "table.md").read_text()
    assert (out / "figure.pdf").read_bytes().startswith(b"%PDF") and not (out / "predictions.png").exists()


def test_the_picture_has_the_chosen_images_in_their_order(tiny_run):
    """Of an id that is not there, one line, before anything is written."""
    results = read_results(tiny_run)
    models = load_models(arms_of({"tiny": results}), {"tiny": tiny_run})
    dataset, indices = shown_images(results, models, Namespace(cache="", images="2009_000002,2009_000000"))
    assert [dataset.ids[index] for index in indices] == ["2009_000002", "2009_000000"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--images", "2009_000000,nothing"], "--images nothing: val has no image of this id: give ids such as 2009_"),
        (["--picture", "figure.svg"], "--picture figure.svg: give the name of a file in OUT that ends in .png or .pdf"),
        (["--picture", "sub/figure.png"], "give the name of a file in OUT"),
    ],
)
def test_a_picture_that_cannot_be_is_one_line_and_nothing_is_written(argv, message, tiny_run, tmp_path, error_of):
    assert message in error_of(main, tiny_run, *argv, "--out", tmp_path / "compared")
    assert not (tmp_path / "compared").exists()


def test_markdown_on_an_ascii_terminal_has_entities(altered, tmp_path, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main([str(altered("run")), "--format", "markdown", "--out", str(tmp_path / "compared")]) == 0
    assert stdout.buffer.getvalue().startswith(b"| run | trainable M | all M | seg mIoU &#8593; |")
    assert (
        (tmp_path / "compared/table.md")
        .read_text(encoding="utf-8")
        .startswith("| run | trainable M | all M | seg mIoU ↑ |")
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--protocol", "ase"], "protocol mtinet@64 and ase@64"),
        (["--protocol", "mini"], "protocol mtinet@64 and mini@64"),
        (["--ids", "ONE"], "seg of 4 images ("),
        (["--split", "all"], "seg of 4 images ("),
        (["--odsf-variant", "none"], "odsF fast seism and fast none"),
        (["--odsf", "full"], "odsF fast seism and full seism"),
    ],
)
def test_mixed_results_are_refused(options, message, tiny_run, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("2009_000001\n")
    options = [str(tmp_path / "one.txt") if option == "ONE" else option for option in options]
    first, second = scored(tiny_run, tmp_path / "a"), scored(tiny_run, tmp_path / "b", *options)
    status, _, error = compare(capsys, tmp_path, first, second)
    assert status == 2 and error.startswith("error: a and b cannot be compared: ") and error.count("\n") == 1
    assert message in error and not (tmp_path / "compared").exists()


def test_trees_with_the_same_ids_and_other_labels_are_refused(tiny_run, pascal_copy, tmp_path, capsys):
    first, same = scored(tiny_run, tmp_path / "a"), scored(tiny_run, tmp_path / "b", "--data", pascal_copy)
    assert compare(capsys, tmp_path, first, same)[0] == 0
    label = pascal_copy / "semseg/VOC12/2009_000000.png"
    Image.open(label).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(label)
    status, _, error = compare(capsys, tmp_path, first, scored(tiny_run, tmp_path / "c", "--data", pascal_copy))
    assert status == 2 and "a and c cannot be compared: seg of 4 images (ids " in error and ", files " in error


def test_scenes_to_train_on_and_to_validate_on_are_other_images(tiny_scenes_run, tmp_path, capsys):
    """Also where there are as many, and for predictions that were saved."""
    first = scored(tiny_scenes_run, tmp_path / "a")
    second = scored(tiny_scenes_run, tmp_path / "b", "--split", "train", "--save-predictions", tmp_path / "kept")
    told = json.loads((second / "results.json").read_text())
    for images in told["evaluation"]["labelled"].values():
        images["images"] = 3
    (second / "results.json").write_text(json.dumps(told))
    status, _, error = compare(capsys, tmp_path, first, second)
    assert status == 2 and "a and b cannot be compared: seg of 3 images (ids " in error
    argv = ["--predictions", str(tmp_path / "kept"), "--workers", "0", "--out", str(tmp_path / "again")]
    assert evaluate(argv) == 2 and "of split 'train': pass --split train" in capsys.readouterr().err
    assert evaluate([*argv, "--split", "train"]) == 0
    assert json.loads((tmp_path / "again/results.json").read_text())["metrics"]["seg"] == told["metrics"]["seg"]


def test_training_at_the_square_is_not_evaluation_at_the_photos_size(tiny_run, tmp_path, capsys):
    status, _, error = compare(capsys, tmp_path, tiny_run, scored(tiny_run, tmp_path / "a"))
    assert status == 2 and "labels at 64 x 64 and the photo's size" in error


def test_a_run_of_parts_alone_is_compared_over_the_images_with_persons(pascal_tree, tmp_path, capsys):
    """Training on parts alone leaves out the others, which are void for parts in any run."""
    from train.cli import main as train

    argv = ["--data", str(pascal_tree), "--model", "vit_micro", "--head", "light", "--steps", "1", "--batch-size", "4"]
    for tasks in ("parts", "seg,parts"):
        options = ["--tasks", tasks, "--protocol", "mtinet", "--image-size", "64", "--workers", "0"]
        assert train([*argv, *options, "--out", str(tmp_path / tasks)]) == 0
        scored(tmp_path / tasks, tmp_path / f"{tasks} all", "--split", "all")
    status, text, _ = compare(capsys, tmp_path, tmp_path / "parts all", tmp_path / "seg,parts all")
    assert status == 0 and "n/a" in text.splitlines()[1]


def test_where_a_checkpoint_is_gone_there_is_no_picture(tiny_run, altered, tmp_path, capsys):
    status, text, _ = compare(capsys, tmp_path, tiny_run, altered("copied"))
    assert status == 0 and "no picture, as there is no checkpoint of copied" in text
    assert not (tmp_path / "compared/predictions.png").exists()


@pytest.mark.parametrize(
    "row, protocol", [("STL ResNet-18 (ASE)", "ase"), ("stl resnet-101 (astmt)", "mtinet"), ("InvPT ViT-L", "invpt")]
)
def test_published_rows_are_baselines_of_their_own_protocol(row, protocol, altered, tmp_path, capsys):
    name = next(name for name in ROWS if name.casefold() == row.casefold())
    scores = {task: {cell["metric"]: 2 * cell["value"]} for task, cell in ROWS[name]["scores"].items()}
    run = altered("run", protocol=protocol, evaluation={"compared_at": "the photo's size"}, metrics=scores)
    status, text, _ = compare(capsys, tmp_path, run, "--baseline", row)
    assert status == 0 and f"{100 * 3 / 5:+.2f}" in text  # four are twice as good, the normals twice as bad
    assert (
        f"Delta_m against {name!r}, {ROWS[name]['source']}, over seg {ROWS[name]['scores']['seg']['metric']}, " in text
    )
    other = altered("other", protocol=f"{protocol}@64", evaluation={"compared_at": "the photo's size"})
    assert "they cannot be compared" in compare(capsys, tmp_path, other, "--baseline", row)[2]
    square = altered("square", protocol=protocol)
    assert "was scored at the photo's size" in compare(capsys, tmp_path, square, "--baseline", row)[2]


def test_edges_count_by_their_loss_where_odsf_was_not_computed(tiny_run, altered, tmp_path, capsys):
    """As in training. A task that a baseline has leaves Delta_m only with a word."""
    scores = json.loads((tiny_run / "results.json").read_text())["metrics"]
    worse = altered("worse", metrics={"edge": scores["edge"] | {"loss": 5 * scores["edge"]["loss"]}})
    status, text, _ = compare(capsys, tmp_path, worse, "--baseline", tiny_run)
    assert status == 0 and f"{-400 / 5:.2f}" in text.splitlines()[1]
    assert "over seg mIoU, parts mIoU, sal mIoU, normals mErr, edge loss" in text
    alone = altered("alone")
    file = alone / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"metrics": {"edge": scores["edge"]}}))
    assert "+0.00" in compare(capsys, tmp_path, alone, "--baseline", alone)[1]


def test_a_baseline_of_nothing_is_one_line_and_one_of_zero_is_not_available(tiny_run, altered, tmp_path, capsys):
    empty = altered("empty") / "results.json"
    empty.write_text(json.dumps(json.loads(empty.read_text()) | {"metrics": {}}))
    status, _, error = compare(capsys, tmp_path, tiny_run, "--baseline", empty)
    assert status == 2 and "has no score that enters Delta_m" in error and error.count("\n") == 1
    zero = altered("zero", metrics={"seg": {"mIoU": 0.0}})
    status, text, _ = compare(capsys, tmp_path, tiny_run, "--baseline", zero)
    assert status == 0 and text.splitlines()[1].endswith("n/a")


def test_a_file_is_a_baseline(altered, tmp_path, capsys):
    file = tmp_path / "base.json"
    cell = {"metric": "mIoU", "value": 40, "higher": True}
    file.write_text(json.dumps({"protocol": "mtinet@64", "source": "my notebook", "scores": {"seg": cell}}))
    run = altered("run", metrics={"seg": {"mIoU": 50.0}})
    status, text, _ = compare(capsys, tmp_path, run, "--baseline", file)
    assert status == 0 and "+25.00" in text and "my notebook" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["/no/such/run"], "/no/such/run does not exist"),
        (["OLD"], "has no 'protocol' in the content: restore it, or write it again"),
        (["TORN"], "cannot be read"),
        (["RUN", "RUN"], "a run is given twice"),
        (["RUN", "--baseline", "resnet-18 stl"], "no baseline 'resnet-18 stl': give a JSON file"),
        (["RUN", "--baseline", "BAD"], "is no baseline (KeyError: 'scores')"),
        (["RUN", "--baseline", "TORN/results.json"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, tiny_run, tmp_path, capsys):
    for name, text in {"old": '{"metrics": {}}', "torn": '{"metrics": {', "bad": '{"protocol": "ase"}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    places = {
        "RUN": tiny_run,
        "OLD": tmp_path / "old",
        "TORN": tmp_path / "torn",
        "BAD": tmp_path / "bad/results.json",
        "TORN/results.json": tmp_path / "torn/results.json",
    }
    status, _, error = compare(capsys, tmp_path, *(places.get(word, word) for word in argv))
    assert status == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_score_that_one_column_lacks_is_not_available():
    text = score_table({"a": {"seg": {"mIoU": 50.0}}, "b": {"edge": {"loss": 0.1, "odsF": None}}})
    rows = [line.split() for line in text.splitlines()]
    assert rows[1] == ["seg", "mIoU", "%", "^", "50.00", "n/a"] and rows[2] == ["edge", "loss", "v", "n/a", "0.1000"]
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "has None as metrics"),
        ("good", "has 'good' as metrics"),
        ({"seg": None}, "has None as metrics seg"),
        ({"seg": {"mIoU": "high"}}, "has 'high' as metrics seg mIoU"),
        ({"seg": {"mIoU": True}}, "has True as metrics seg mIoU"),
    ],
)
def test_metrics_that_are_no_numbers_are_one_line(metrics, message, tiny_run, altered, tmp_path, capsys):
    path = altered("odd") / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"metrics": metrics}))
    status, _, error = compare(capsys, tmp_path, tiny_run, path.parent)
    assert status == 2 and f"{path} {message}" in error and error.count("\n") == 1


def keys_of(value, above=()):
    """The path of every key in nested objects."""
    if not isinstance(value, dict):
        return []
    return [path for key in value for path in ((*above, key), *keys_of(value[key], (*above, key)))]


def test_results_that_lost_any_key_or_hold_another_type_are_at_most_one_line(tiny_run, tmp_path):
    whole, path, refused = json.loads((tiny_run / "results.json").read_text()), tmp_path / "results.json", set()
    for *above, key in keys_of(whole):
        for replace in (dict.pop, lambda place, key: place.update({key: "2 apples" if key != "name" else 2})):
            results = json.loads(json.dumps(whole))
            replace(reduce(dict.__getitem__, above, results), key)
            path.write_text(json.dumps(results))
            try:
                runs = {"whole": whole, "odd": read_results(path)}
                require_comparable(runs)
                assert rows_of(arms_of(runs)) and caption(runs)
            except UserError as error:
                refused.add(key)
                assert "\n" not in str(error) and ("restore it" in str(error) or "cannot be compared" in str(error))
    assert {"protocol", "compared_at", "labelled", "images", "ids", "mIoU", "image_size"} <= refused
