"""``python -m train.export``: a folder that others can use, and that names everything its scores depend on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from model import VITS, ViT
from train.cli import main as train
from train.evaluate import main as evaluate
from train.export import main as export
from train.export import public_settings, public_state
from train.output.card import without_paths, write_card
from train.predict import main as predict
from train.run import checkpoint
from train.run.backbone import settings_of
from train.run.build import load_checkpoint


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "hub" / "folder"
    assert export([str(tiny_run), "--to", str(folder)]) == 0
    return folder


def test_the_folder_holds_the_weights_of_the_run(exported, tiny_run):
    assert {path.name for path in exported.iterdir()} == {"model.safetensors", "config.json", "SHA256SUMS", "README.md"}
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (exported, tiny_run / "last"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_card_names_what_the_scores_depend_on(exported, tiny_run):
    card, results = (exported / "README.md").read_text(), json.loads((tiny_run / "results.json").read_text())
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "fastmoe_lora" and "base_model" not in front
    normals = results["metrics"]["normals"]["mErr"]
    over = results["evaluation"]["labelled"]["normals"]
    for text in (
        f"Protocol `{results['protocol']}`, 4 images of {results['dataset']['name']} val.",
        f"{over['images']} ({over['ids']}) | {normals:>8.2f} |".replace("|  ", "| "),
        "+x left, +y up, +z towards the camera",
        "experts 16/3/1/4 (gating ase) at ffn",
        f"torch {torch.__version__}",
        "vit_micro at 64 x 64 pixels, patches of 8",
        "Step 3 of",
    ):
        assert " ".join(text.split()) in " ".join(card.split()), text


def test_nothing_names_a_folder_of_this_machine(exported, tiny_run, pascal_tree):
    for name in ("README.md", "config.json"):
        text = (exported / name).read_text()
        assert str(tiny_run.parent) not in text and str(pascal_tree.parent) not in text, name
    settings = json.loads((exported / "config.json").read_text())["settings"]
    assert settings["data"] == "PASCAL_MT" and settings["out"] == settings["cache"] == ""


@pytest.mark.parametrize("folder, given", [("", "."), ("JPEGImages", ".."), ("", "../PASCAL_MT/")])
def test_data_that_is_given_by_dots_keeps_its_name(folder, given, tiny_run, pascal_tree, monkeypatch):
    """An empty name would mean rendered scenes, whose preprocessing is another."""
    monkeypatch.chdir(pascal_tree / folder)
    settings = replace(settings_of(tiny_run / "last"), data=given)
    public = public_settings(settings)
    assert public.data == "PASCAL_MT" and public.source.protocol == settings.source.protocol
    assert public_settings(replace(settings, data="/")).data and not public_settings(replace(settings, data="")).data


def test_every_command_of_a_resumed_run_is_named_without_its_folders(tiny_run, tmp_path):
    state = checkpoint.read_state(tiny_run / "last")
    moved = {
        "from_step": 3,
        "command": "python -m train --data /home/me/tree",
        "changed": ["data /a -> /b", "lr 1 -> 2"],
    }
    state.commands.append(moved)
    public = public_state(state, public_settings(settings_of(tiny_run / "last")))
    assert public.commands[1] == {"from_step": 3, "command": "python -m train --data tree", "changed": ["lr 1 -> 2"]}
    results = json.loads((tiny_run / "results.json").read_text())
    card = write_card(settings_of(tiny_run / "last"), results, 3, 8, public.commands)
    assert "\n".join(entry["command"] for entry in public.commands) in card


def test_commands_keep_their_words_without_paths():
    command = "python -m train --data /home/me/PASCAL_MT --set cache=/tmp/c --pretrained timm/vit --out runs/a"
    shortened = "python -m train --data PASCAL_MT --set cache=c --pretrained timm/vit --out runs/a"
    assert without_paths(command) == shortened


def test_the_folder_predicts_what_the_run_predicts(exported, tiny_run, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "downloaded")
    Image.new("RGB", (40, 24), "red").save(tmp_path / "photo.png")
    for name, source in (("run", tiny_run), ("hub", folder)):
        assert predict([str(source), str(tmp_path / "photo.png"), "--out", str(tmp_path / name)]) == 0
    files = [path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("*.png")]
    assert len(files) > 5
    assert all((tmp_path / "run" / file).read_bytes() == (tmp_path / "hub" / file).read_bytes() for file in files)


def test_the_scores_of_train_evaluate_are_taken(tiny_run, pascal_tree, tmp_path):
    scores = ["--data", str(pascal_tree), "--odsf", "full", "--workers", "0", "--out", str(tmp_path / "scores")]
    assert evaluate([str(tiny_run), "--tasks", "seg,edge", *scores]) == 0
    assert export([str(tiny_run), "--results", str(tmp_path / "scores"), "--to", str(tmp_path / "hub")]) == 0
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "odsF: 4 images (full), variant seism." in card
    trained_by = json.loads((tiny_run / "results.json").read_text())["command"]
    assert without_paths(trained_by) in card and "python -m train.evaluate" not in card


def test_a_decoder_names_the_encoder_it_needs(tmp_path, monkeypatch, error_of):
    monkeypatch.chdir(tmp_path)
    save_file(ViT(VITS["vit_micro"], 16).state_dict(), tmp_path / "micro.safetensors")
    scenes = ["--set", "scenes=4", "--set", "val_scenes=2", "--batch-size", "2", "--image-size", "16", "--workers", "0"]
    argv = ["--decoder", "plain", "--pretrained", "micro.safetensors", "--tasks", "seg", "--steps", "1", *scenes]
    assert train([*argv, "--out", "run"]) == 0 and export(["run", "--to", "hub"]) == 0
    assert "the weights `micro.safetensors` of its encoder are needed too" in (tmp_path / "hub/README.md").read_text()
    load_checkpoint(tmp_path / "hub")
    (tmp_path / "micro.safetensors").unlink()
    assert "the encoder's weights are not at micro.safetensors" in error_of(evaluate, "hub")


def test_mistakes_are_one_line(exported, tiny_run, pascal_copy, tmp_path, error_of):
    assert "exists already and is not overwritten" in error_of(export, tiny_run, "--to", exported)
    assert "which is only read" in error_of(export, tiny_run, "--to", pascal_copy / "hub")
    assert "is not a checkpoint" in error_of(export, tmp_path, "--to", tmp_path / "hub")
    resumed = ["--resume", exported, "--data", pascal_copy, "--steps", "4", "--out", tmp_path / "run"]
    assert "exported without the optimiser's state: resume from the run" in error_of(train, *resumed)
    assert not (tmp_path / "hub").exists()


def test_scores_of_another_step_are_refused(tiny_run, tmp_path, error_of):
    results = json.loads((tiny_run / "results.json").read_text()) | {"steps": 2}
    (tmp_path / "results.json").write_text(json.dumps(results))
    error = error_of(export, tiny_run, "--results", tmp_path, "--to", tmp_path / "hub")
    assert "has scores of step 2" in error and "is at step 3: score it with python -m train.evaluate" in error


def test_a_damaged_export_is_refused(exported, tmp_path, error_of):
    folder = shutil.copytree(exported, tmp_path / "hub")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"step": 3', '"step": 4'))
    assert checkpoint.STATES[1] in error_of(evaluate, folder)
