"""No command replaces what it did not write, and none writes into a data set. The rule: tests/train/files."""

import shutil

import pytest

from train.check import main as check
from train.compare import main as compare
from train.convert import main as convert
from train.evaluate import main as evaluate
from train.export import main as export
from train.lossdiff import main as lossdiff
from train.predict import main as predict
from train.prune import main as prune
from train.study import main as study

# Every command with RUN, DATA and PHOTOS for its inputs, without what says where it writes; what it writes first.
COMMANDS = {
    "evaluate": (evaluate, "RUN --workers 0 --odsf off", "results.json"),
    "compare": (compare, "RUN", "table.txt"),
    "lossdiff": (lossdiff, "RUN RUN", "lossdiff.json"),
    "predict": (predict, "RUN PHOTOS", "semseg"),
    "check": (check, "--data DATA --workers 0", "faults.txt"),
    "study": (study, "fig2", "runs"),
}


@pytest.fixture
def inputs(tiny_run, pascal_tree, pascal_copy):
    return {"RUN": tiny_run, "DATA": pascal_tree, "PHOTOS": pascal_tree / "JPEGImages", "COPY": pascal_copy}


def argv(text, inputs):
    return [inputs.get(word, word) for word in text.split()]


def content(folder):
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_did_not_write_is_refused_by_name(command, inputs, tmp_path, error_of):
    main, text, name = COMMANDS[command]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    error = error_of(main, *argv(text, inputs), "--out", tmp_path / "out")
    assert f"{tmp_path}/out/{name} was not written by train.{command}" in error
    assert content(tmp_path / "out") == {tmp_path / "out" / name: b"mine"}


@pytest.mark.parametrize("name", ["evaluate", "compare"])
def test_a_run_is_not_written_over(name, inputs, tmp_path, error_of):
    run = shutil.copytree(inputs["RUN"], tmp_path / "run", symlinks=True)
    before = content(run)
    main, text, _ = COMMANDS[name]
    assert f"was written by train, not by train.{name}: move it away" in error_of(
        main, *argv(text, inputs | {"RUN": run}), "--out", run
    )
    assert content(run) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_writes_into_a_data_set(command, inputs, error_of):
    main, text, _ = COMMANDS[command]
    before = content(inputs["COPY"])
    for folder in (inputs["COPY"], inputs["COPY"] / "JPEGImages" / "out"):
        assert f"{folder} lies inside the data set" in error_of(main, *argv(text, inputs), "--out", folder)
    assert content(inputs["COPY"]) == before


@pytest.mark.parametrize(
    ("main", "text"),
    [
        (export, "RUN --to"),
        (convert, "RUN --to"),
        (prune, "RUN --keep 4 --out"),
        (evaluate, "RUN --workers 0 --odsf off --out elsewhere --save-predictions"),
    ],
    ids=["export", "convert", "prune", "save-predictions"],
)
def test_what_must_be_new_is_not_written_over_nor_into_a_data_set(main, text, inputs, tmp_path, error_of, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = tmp_path / "model.safetensors"
    there.write_text("mine")
    assert f"{there} exists" in error_of(main, *argv(text, inputs), there) and there.read_text() == "mine"
    before, flag = content(inputs["COPY"]), text.split()[-1]
    error = error_of(main, *argv(text, inputs), inputs["COPY"] / "new.safetensors")
    assert "lies inside the data set" in error and f"choose another {flag}" in error
    assert content(inputs["COPY"]) == before and not (tmp_path / "elsewhere").exists()


def test_a_folder_of_predictions_is_of_one_checkpoint(inputs, padded_run, tmp_path, error_of):
    """Two would be mixed, and predictions.json would name the wrong one."""
    kept, photo = tmp_path / "kept", inputs["DATA"] / "JPEGImages" / "2009_000000.jpg"
    saving = ["--workers", "0", "--odsf", "off", "--save-predictions", str(kept), "--out", str(tmp_path / "scores")]
    assert evaluate([str(inputs["RUN"]), *saving]) == 0
    before = content(kept)
    assert f"{kept}/semseg was not written by train.predict of step 3 of" in error_of(
        predict, inputs["RUN"], photo, "--out", kept
    )
    assert content(kept) == before
    for _ in range(2):  # the same command may be given again
        assert predict([str(inputs["RUN"]), str(photo), "--out", str(tmp_path / "mine")]) == 0
    error = error_of(predict, padded_run, photo, "--out", tmp_path / "mine")
    assert f"written by train.predict of step 3 of {inputs['RUN']}, not by train.predict of step 1 of" in error


def test_folders_that_are_not_named_are_new(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("compare", "lossdiff", "evaluate"):
        main, text, name = COMMANDS[command]
        for _ in range(2):
            assert main([*map(str, argv(text, inputs))]) == 0
    made = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(".written"))
    twice = ["runs/compare", "runs/evaluate/tiny-mtinet@64", "runs/lossdiff"]
    assert made == sorted([*twice, *(f"{name}-2" for name in twice)])
