"""README keeps its word: every command in it runs, every number in it stands in a committed result."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from train.check import main as check
from train.cli import main
from train.compare import main as compare
from train.convert import main as convert
from train.evaluate import main as evaluate
from train.export import main as export
from train.lossdiff import main as lossdiff
from train.output.scores import score_table
from train.parameters import main as count
from train.predict import main as predict

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    command.strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    for command in line.split("#")[0].split("&&")
    if command.strip()
]
# These two installations, and this test command, are what .ci/run runs; so is the benchmark.
TORCHRUN = "torchrun --nproc-per-node=2 -m train --tasks seg,parts,sal,normals,edge"
IN_CI = {
    "pip install -e .",
    "pip install -e '.[test]'",
    "pytest -n auto",
    "pytest bench/ --benchmark-only",
    f"{TORCHRUN} --out RUN-2",
}


def test_every_command_is_tried_somewhere():
    for command in COMMANDS:
        assert command in IN_CI or "python -m train" in command, command
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install --quiet -e .\n" in script and f"\n{TORCHRUN} " in script
    assert "pip install --quiet -e '.[test]'" in script and "\npytest -n auto\n" in script and "pytest bench/" in script


@pytest.fixture(scope="module")
def few_photos(pascal_mini, tmp_path_factory):
    """The real tree with a tenth of its images in each split: :func:`test_checking_commands_run` reads all of them."""
    root = tmp_path_factory.mktemp("few") / "PASCAL_MT"
    shutil.copytree(pascal_mini / "ImageSets", root / "ImageSets")
    for folder in pascal_mini.iterdir():
        if folder.name != "ImageSets":
            (root / folder.name).symlink_to(folder)
    for split in (root / "ImageSets" / "Context").iterdir():
        split.write_text("".join(split.read_text().splitlines(keepends=True)[::10]))
    return root


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python -m train " in c])
@pytest.mark.slow
def test_training_commands_run(command, tmp_path, request):
    argv = shlex.split(command.removeprefix("TRITON_INTERPRET=1 "))[3:]
    for placeholder, fixture in (("PASCAL_MT", "few_photos"), ("WEIGHTS.safetensors", "vit_tiny_weights")):
        if placeholder in argv:
            argv[argv.index(placeholder)] = str(request.getfixturevalue(fixture))
    quick = ["--steps", "5", "--set", "scenes=64", "--set", "val_scenes=8"]
    if "triton" in argv:  # interpreted: as short as the command itself
        quick = ["--set", "scenes=2", "--set", "val_scenes=1"]
    if "--data" in argv:
        quick += ["--image-size", "64", "--model", "vit_tiny", "--partial-labels"]
    assert main([*argv, *quick, "--out", str(tmp_path / "run")]) == 0


def test_every_promise_names_a_test():
    promised = re.findall(r"\| `([\w/]+\.py)::(\w+)` \|", README)
    assert len(promised) > 10
    for path, name in promised:
        assert f"\ndef {name}(" in (ROOT / "tests" / "train" / path).read_text(), f"{path}::{name}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python -m train.check " in c])
def test_checking_commands_run(command, tmp_path, pascal_mini):
    argv = shlex.split(command.replace("PASCAL_MT", str(pascal_mini)))[3:]
    assert check([*argv, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python -m train.parameters " in c])
def test_counting_commands_run(command):
    assert count(shlex.split(command)[3:]) == 0


@pytest.fixture(scope="module")
def runs(few_photos, tmp_path_factory):
    """A folder with the RUN, RUN-2 and PHOTOS of the commands, and a few ids."""
    folder = tmp_path_factory.mktemp("readme")
    small = ["--image-size", "64", "--model", "vit_micro", "--head", "light", "--set", "lora_rank=0", "--steps", "1"]
    data = ["--data", str(few_photos), "--partial-labels", "--protocol", "mini"]
    assert main([*data, *small, "--out", str(folder / "RUN")]) == 0
    shutil.copytree(folder / "RUN", folder / "RUN-2", symlinks=True)
    ids = [(few_photos / "ImageSets/Context/val.txt").read_text().split()[i] for i in (0, 20, 40)]
    (folder / "ids").write_text("\n".join(ids))
    (folder / "PHOTOS").mkdir()
    for image_id in ids:
        shutil.copy(few_photos / f"JPEGImages/{image_id}.jpg", folder / "PHOTOS")
    return folder


@pytest.mark.slow
def test_commands_about_checkpoints_run(runs, few_photos, monkeypatch):
    """In their order: what one writes the next may read."""
    monkeypatch.chdir(runs)
    tools = {
        "train.evaluate": evaluate,
        "train.predict": predict,
        "train.compare": compare,
        "train.export": export,
        "train.convert": convert,
        "train.lossdiff": lossdiff,
    }
    quick = {"train.evaluate": ["--ids", "ids", "--partial-labels", "--workers", "0"]}
    commands = [shlex.split(command.replace("PASCAL_MT", str(few_photos))) for command in COMMANDS]
    commands = [words for words in commands if words[2:] and words[2] in tools]
    assert len(commands) == 7
    for words in commands:
        assert tools[words[2]]([*words[3:], *quick.get(words[2], [])]) == 0, words


def test_the_python_example_learns_both_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), names)
    accuracy = (names["logits"].argmax(-1) == names["labels"]).float().mean(1)  # a third by chance
    assert accuracy.min() > 0.9
    assert 10_000 < (tmp_path / "adapters.safetensors").stat().st_size < 30_000


def test_the_table_is_the_committed_result():
    results = json.loads((ROOT / "bench" / "results" / "scenes.json").read_text())
    baselines = {name: results[f"metrics_{name}"] for name in ("untrained", "constant")}
    assert score_table({**baselines, "trained": results["metrics"]}) in README


def test_pictures_and_links_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_modelled_ratios_are_the_committed_ones():
    ratios = json.loads((ROOT / "bench" / "results" / "static.json").read_text())["ratios"]
    known = {
        (row["pool"], row["algorithm"], row["gpu"]): f"{row['forward']['ratio']:.2f} / {row['both']['ratio']:.2f}"
        for row in ratios
        if (row["dtype"], row["tokens"]) == ("bf16", 40_960)
    }
    for pool in ("16/3/1/4", "64/12/4/1"):
        for algorithm in ("columns", "fused"):
            cells = [known[pool, algorithm, gpu] for gpu in ("H100", "H200")]
            assert f"| {pool} | {algorithm} | {' | '.join(cells)} |" in README
