"""A user's mistake: one clear line on stderr, status 2, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser

from kernels.dispatch import known_family
from model import VITS, ViT
from train.check import main as check
from train.cli import build_parser, main
from train.config.settings import Settings, own_values, resolve_settings
from train.files.folders import claim
from train.output.versions import versions
from train.run.build import build_model
from train.study import main as study

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--steps", "1", "--set", "scenes=16", "--set", "val_scenes=4"]


@pytest.fixture
def small_weights(tmp_path):
    path = tmp_path / "micro.safetensors"
    save_file(ViT(VITS["vit_micro"], 64).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--tasks", "seg,flow"], "unknown task 'flow'"),
        (["--pretrained", "/no/such/file"], "no such weights file: /no/such/file"),
        (["--moe", "16/16/1/4"], "N - S = 15"),
        (["--moe", "16/3/1/4", "--gating", "topk"], "use 'ase'"),
        (["--recipe", "nonesuch"], "no recipe 'nonesuch'"),
        (["--set", "colour=red"], "unknown key 'colour'"),
        (["--set", "colour"], "not of the form key=value"),
        (["--image-size", "63"], "not a multiple of the patch size 8"),
        (["--resume", "/no/such/run"], "/no/such/run is not a checkpoint"),
        (["--resume"], "--resume alone does not say which run"),
        (["--batch-size", "0"], "batch_size is 0"),
        (["--cuda-graphs", "--device", "cpu"], "--cuda-graphs needs a GPU: leave it out"),
        (["--batch-size", "4", "--accumulate", "5"], "needs a batch of 5 images at least, not 4"),
        (["--set", "lora_targets=qvk"], "unknown LoRA target 'qvk'"),
        (["--recipe", "two\nlines"], "no recipe 'two\\nlines'"),
        (["--resume", "two\nlines"], "two\\nlines is not a checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys, tmp_path):
    out = tmp_path / "run"
    argv = [*argv, "--out", str(out)] if argv != ["--resume"] else argv
    if message.startswith("unknown LoRA"):
        argv += ["--set", "lora_rank=4"]
    assert main([*argv, *([] if "--steps" in argv else ["--steps", "1"])]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


def test_a_folder_whose_weights_could_not_be_read_again_is_refused(error_of, tmp_path):
    """safetensors writes to any path and reads from one in UTF-8 alone."""
    out = tmp_path / os.fsdecode(b"caf\xe9")
    assert r"caf\udce9 is not UTF-8, so that its weights cannot be read" in error_of(main, *QUICK, "--out", out)
    assert not out.exists()


def test_an_input_of_one_patch_trains_where_batch_norm_has_two_values(error_of, tmp_path):
    patch = ["--image-size", "8", "--tasks", "seg,normals", "--head", "up", "--workers", "0", *QUICK]
    alone = error_of(main, *patch, "--batch-size", 1, "--out", tmp_path / "alone")
    assert "batch norm needs two values, a task has one image of one patch: raise --batch-size" in alone
    assert main([*patch, "--batch-size", "2", "--out", str(tmp_path / "run")]) == 0


def test_a_protocol_without_data_is_said_to_have_no_effect(capsys, tmp_path):
    for given, said in ((["--protocol", "mini"], 1), ([], 0)):
        assert main([*QUICK, *given, "--workers", "0", "--out", str(tmp_path / f"run-{said}")]) == 0
        note = "--protocol mini has no effect without --data: rendered scenes have their own\n"
        assert capsys.readouterr().out.count(note) == said


def test_triton_without_gpu_or_interpreter_does_not_fall_back(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    known_family.cache_clear()
    assert main(["--kernel", "triton", "--device", "cpu", "--out", str(tmp_path / "run"), *QUICK]) == 2
    error = capsys.readouterr().err
    assert "no GPU in use (device cpu); set TRITON_INTERPRET=1" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("argv", [["--modle", "vit_tiny"], ["--head", "huge"], ["--steps", "few"], ["--tasks"]])
def test_a_flag_that_does_not_parse_is_one_line_too(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--bath-size", "4"], "--batch-size"),
        (["--batch_size=4"], "--batch-size"),
        (["--steps", "3", "--modle", "vit_tiny"], "--model"),
        (["--mi-weight", "0.1"], "--set mi_weight=..."),
        (["--set", "bath_size=4"], "'batch_size'"),
    ],
)
def test_a_mistyped_name_is_recognised(given, meant, capsys):
    with pytest.raises(SystemExit, match="2"):
        sys.exit(main(given))
    error = capsys.readouterr().err
    assert f"did you mean {meant}?" in error and error.count("\n") == 1


def test_other_commands_recognise_theirs_and_nothing_is_made_up(capsys):
    for command, given, meant in (
        (check, ["--dta", "x"], "; did you mean --data? ("),
        (study, ["fig2", "--lr", "1"], "; did you mean --set lr=...? ("),
        (check, ["--data", "x", "--gpus", "2"], "unrecognized arguments: --gpus 2 ("),
        (check, ["--data", "x", "--workers", "few"], "invalid int value: 'few' ("),
    ):
        with pytest.raises(SystemExit, match="2"):
            command(given)
        assert meant in capsys.readouterr().err


def test_weights_of_another_width_are_refused(small_weights, capsys, tmp_path):
    argv = ["--model", "vit_tiny", "--pretrained", str(small_weights), "--out", str(tmp_path / "run"), *QUICK]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "holds another architecture" in error and "(1, 1, 96)" in error and "(1, 1, 192)" in error


def test_weights_with_missing_parameters_are_refused(small_weights, capsys, tmp_path):
    """A frozen backbone with random parts would be silently wrong."""
    weights = ViT(VITS["vit_micro"], 64).state_dict()
    del weights["norm.bias"]
    save_file(weights, small_weights)
    assert main(["--pretrained", str(small_weights), "--out", str(tmp_path / "run"), *QUICK]) == 2
    assert "lacks parameters of vit_micro: norm.bias" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused(small_weights, capsys, tmp_path):
    weights = ViT(VITS["vit_micro"], 64).state_dict()
    weights["blocks.1.mlp.fc1.weight"][3, 4] = torch.nan
    save_file(weights, small_weights)
    assert main(["--pretrained", str(small_weights), "--out", str(tmp_path / "run"), *QUICK]) == 2
    error = capsys.readouterr().err
    assert (
        error
        == f"error: {small_weights} has a value in blocks.1.mlp.fc1.weight that is not finite: download it again\n"
    )


@pytest.mark.parametrize("module", ["train", "train.evaluate", "train.predict", "train.compare", "train.check"])
def test_an_interrupt_while_libraries_are_imported_is_quiet(module, tmp_path):
    """A library that never finishes its import stands for one that takes a second."""
    (tmp_path / "torch.py").write_text("import os, pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    options = {"cwd": tmp_path, "env": environment, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-m", module], **options)
    while not (tmp_path / "begun").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error == "\ninterrupted\n" and process.returncode in (-signal.SIGINT, 130)


@pytest.mark.parametrize(
    ("name", "override", "mean"),
    [("micro.safetensors", "", 0.5), ("deit_micro.safetensors", "", 0.485), ("micro.safetensors", "imagenet", 0.485)],
)
def test_the_input_normalisation_is_the_weights_family_or_what_is_said(name, override, mean, small_weights, tmp_path):
    path = small_weights.rename(tmp_path / name)
    model = build_model(
        resolve_settings({"pretrained": str(path), "normalisation": override}),
        {"seg": ("background",), "parts": ("background",)},
    )
    assert model.image_mean.flatten()[0].item() == pytest.approx(mean)


def test_pretrained_takes_a_folder_that_the_hub_left(small_weights, tmp_path):
    """Of `hf download --local-dir` or git clone, which is no run."""
    folder = tmp_path / "vit"
    folder.mkdir()
    small_weights.rename(folder / "model.safetensors")
    (folder / "config.json").write_text(
        '{"pretrained_cfg": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}'
    )
    model = build_model(
        resolve_settings({"pretrained": str(folder)}), {"seg": ("background",), "parts": ("background",)}
    )
    assert model.image_mean.flatten()[0].item() == pytest.approx(0.485)


def test_a_folder_that_holds_a_run_is_not_overwritten(capsys, tmp_path):
    (tmp_path / "results.json").write_text("{}")
    assert main(["--out", str(tmp_path), *QUICK]) == 2
    assert f"{tmp_path}/results.json was not written by train: move it away" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "{}"
    claim(tmp_path / "run", "train", ["results.json"])
    (tmp_path / "run" / "results.json").write_text("{}")
    assert main(["--out", str(tmp_path / "run"), *QUICK]) == 2
    assert "already holds a run: continue it with --resume" in capsys.readouterr().err


def test_a_module_run_as_a_user_does_exits_2(tmp_path):
    command = [sys.executable, "-m", "train", "--tasks", "flow"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown task 'flow'") and done.stderr.count("\n") == 1


def test_help_groups_the_flags_and_says_what_lists_the_recipes():
    text = build_parser().format_help()
    assert all(group in text for group in ("tasks and data:", "model:", "training:", "settings without a flag"))
    assert "a recipe of --list-recipes" in " ".join(text.replace("-\n", "- ").split()).replace("- ", "-")
    assert "mi_weight=0.005" in text


def test_help_ends_with_the_commands_in_their_own_words():
    *_, lines = build_parser().format_help().partition("commands, each with --help:\n")
    files = {path.stem: path.read_text() for path in (ROOT / "train").glob("*.py")}
    commands = [name for name, text in files.items() if "\ndef main(" in text and name != "cli"]
    assert [line.split()[0] for line in lines.splitlines()] == [f"train.{name}" for name in sorted(commands)]
    for line in lines.splitlines():
        name, words = line.split(maxsplit=1)
        assert f": {words}" in files[name.removeprefix("train.")].splitlines()[0]


def test_help_shows_the_default_of_every_flag():
    parser, defaults, scenes = build_parser(), asdict(Settings()), own_values("scenes")
    parser.format_help()
    said = {"image_size", "gating", "device", "out", "data", "protocol", "recipe", "tasks"}  # in words or another form
    for action in parser._actions:
        if action.option_strings and action.nargs != 0:
            assert action.help.endswith(")"), action.option_strings
            if action.dest in defaults and action.dest not in said:
                shown = action.help.rpartition(" (")[2]
                assert shown.startswith(str(defaults[action.dest]) or "none")
                if action.dest in scenes and scenes[action.dest] != defaults[action.dest]:
                    assert shown.endswith(f"; scenes: {scenes[action.dest]})")


def test_the_version_is_that_of_the_package_and_of_what_results_depend_on(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    found = versions()
    assert capsys.readouterr().out.startswith(f"fastmoe_lora {found['fastmoe_lora']}, python {found['python']}, torch ")


def test_torchrun_passes_every_flag_on():
    """Its parser refuses a flag after -m train that abbreviates several of its own, as --log does --log-dir."""
    for flag in (flag for action in build_parser()._actions for flag in action.option_strings):
        parsed = get_args_parser().parse_args(["--nproc-per-node=2", "-m", "train", "--tasks", "seg", flag, "x"])
        assert parsed.training_script_args == ["--tasks", "seg", flag, "x"]
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--nproc-per-node=2", "-m", "train", "--log", "none"])
