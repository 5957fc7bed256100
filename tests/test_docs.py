"""README and the guides keep their word: every block of code runs, every number stands in a committed result, and the
site builds without a warning."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image

import fastmoe_lora
import kernels
import model
from train.check import main as check
from train.cli import main
from train.compare import main as compare
from train.convert import main as convert
from train.datasets.scenes.dataset import LABELS
from train.evaluate import main as evaluate
from train.evaluation.study import Comparison, Summary, paired, table
from train.export import main as export
from train.lossdiff import main as lossdiff
from train.output.scores import score_table
from train.parameters import main as count
from train.predict import main as predict
from train.prune import main as prune
from train.routing import main as routing
from train.study import main as study
from train.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
GUIDES = {path.name: path.read_text() for path in sorted((ROOT / "docs" / "pages").glob("*.md"))}
PAGES = {"README.md": README, "CONTRIBUTING.md": (ROOT / "CONTRIBUTING.md").read_text()} | GUIDES
NEEDS_GPU = "# needs a GPU\n"  # the first line of a block that is parsed and not run
A_FILE = "#!"  # how a block begins that is a whole file: tests/test_slurm.py runs the one there is


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands_of(*pages: str) -> list[str]:
    """What blocks of these pages run, each command once."""
    found = [
        command.strip()
        for page in pages
        for block in blocks(PAGES[page], "bash")
        if not block.startswith((NEEDS_GPU, A_FILE))
        for line in block.replace("\\\n", " ").splitlines()
        for command in line.split("#")[0].split("&&")
        if command.strip()
    ]
    return list(dict.fromkeys(found))


SCRIPTED = [command for command in commands_of(*PAGES) if "--import" in command]
COMMANDS = [command for command in commands_of(*PAGES) if command not in SCRIPTED]
# .ci/run runs these two installations, this test command and the benchmark; a test below builds the site.
TORCHRUN = "torchrun --nproc-per-node=2 -m train --tasks seg,parts,sal,normals,edge"
IN_CI = {
    "pip install -e .",
    "pip install -e '.[test]'",
    "pip install -e '.[test,dev]'",
    "pytest -n auto",
    "pytest bench/ --benchmark-only",
    "mkdocs build --strict -f docs/mkdocs.yml",
    f"{TORCHRUN} --out RUN-2",
}
BY_HAND = {"pre-commit install"}  # it would change the repository


def test_every_command_is_tried_somewhere():
    for command in COMMANDS:
        assert command in IN_CI | BY_HAND or "python -m train" in command, command
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install --quiet -e .\n" in script and f"\n{TORCHRUN} " in script
    assert "pip install --quiet -e '.[test]'" in script and "\npytest -n auto\n" in script and "pytest bench/" in script


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_a_program(page):
    """Those that need a GPU too. A language that no test knows would not be run."""
    languages = re.findall(r"^```(\w*)\n.*?^```$", PAGES[page], re.DOTALL | re.MULTILINE)
    assert {*languages} <= {"bash", "python", ""}
    for block in blocks(PAGES[page], "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
        for module in re.findall(r"python -m ([\w.]+)", block):
            assert importlib.util.find_spec(module), module
        for script in re.findall(r"bash (\S+)", block):
            assert (ROOT / script).is_file()
    for block in blocks(PAGES[page], "python"):
        compile(block, page, "exec")


@pytest.mark.parametrize("page", PAGES)
def test_every_module_that_is_named_exists(page):
    for module in re.findall(r"`(?:python -m )?((?:train|bench)\.(?!py`)[a-z]+)`", PAGES[page]):
        assert importlib.util.find_spec(module), module


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


@pytest.fixture(scope="module")
def micro_run(tmp_path_factory):
    """A run of one step with a backbone of its own."""
    out = tmp_path_factory.mktemp("micro") / "run"
    small = ["--steps", "1", "--batch-size", "2", "--set", "scenes=4", "--set", "val_scenes=2", "--tracker", "none"]
    assert main(["--recipe", "scenes_pretrain", *small, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python -m train " in c])
@pytest.mark.slow
def test_training_commands_run(command, tmp_path, request):
    argv = shlex.split(command.removeprefix("TRITON_INTERPRET=1 "))[3:]
    given = {"PASCAL_MT": "few_photos", "WEIGHTS.safetensors": "vit_tiny_weights", "RUN": "micro_run"}
    for placeholder, fixture in given.items():
        if placeholder in argv:
            argv[argv.index(placeholder)] = str(request.getfixturevalue(fixture))
    quick = ["--steps", "2", "--set", "scenes=32", "--set", "val_scenes=4"]
    if "triton" in argv:  # interpreted: as short as the command itself
        quick = ["--set", "scenes=2", "--set", "val_scenes=1"]
    if "--data" in argv:
        quick += ["--image-size", "64", "--model", "vit_tiny", "--partial-labels"]
    if "--resume" in argv:
        quick += ["--steps", "1", "--batch-size", "2"]
    assert main([*argv, *quick, "--out", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_commands_of_the_study_run(tmp_path, monkeypatch):
    """In their order, on a backbone of two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.run.arms.WEIGHTINGS", ("fixed", "uncertainty", "pcgrad"))
    Image.new("RGB", (40, 30)).save("PHOTO.jpg")
    tools = {"train.study": study, "train.routing": routing, "train.prune": prune}
    tiny = ["--set", "scenes=8", "--set", "val_scenes=2", "--set", "image_size=16", "--set", "batch_size=4"]
    assert main(["--recipe", "scenes_pretrain", "--steps", "2", *tiny, "--tracker", "none", "--out", "BACKBONE"]) == 0
    quick = {"train.study": ["--seeds", "1", "--steps", "2", "--pretrained", "BACKBONE", "--workers", "0", *tiny]}
    quick |= {"train.prune": ["--steps", "1"]}
    commands = [shlex.split(command) for command in COMMANDS]
    commands = [words for words in commands if words[2:] and words[2] in tools]
    assert len(commands) == 6
    for words in commands:
        assert tools[words[2]]([*words[3:], *quick.get(words[2], [])]) == 0, words


def test_the_tables_of_the_study_are_the_committed_ones():
    """Built anew from the scores of every seed."""
    for path in sorted((ROOT / "bench" / "results").glob("study-*.json")):
        results = json.loads(path.read_text())
        if "arms" in results:
            assert table_of(results) in GUIDES["study.md"], path


@pytest.mark.parametrize(("images", "ase"), [("scenes", "ASE 16/3/1/4"), ("mini", "**Photos, 3 seeds:** ASE")])
def test_the_decoders_of_the_readme_are_the_committed_ones(images, ase):
    arms = json.loads((ROOT / "bench" / "results" / f"study-{images}-decoders.json").read_text())["arms"]
    for name, shown in {"ase_16_3_1_4": ase, "plain": "`plain`", "fgmoe": "`fgmoe`", "mlore": "`mlore`"}.items():
        arm = arms[name]
        means = {task: mean(values) for task, values in arm["scores"].items()}
        cells = [f"{means.pop(task):.2f}" for task in ("seg", "parts", "sal", "normals")] + [f"{means['edge']:.4f}"]
        cells.append(f"{arm['delta_m_mean']:+.2f}±{arm['delta_m_spread']:.2f}")
        assert f"| {' | '.join(cells)} |" in README
        assert f"| {shown} | {arm['trainable'] / 1e6:.2f}/" in README


def table_of(results: dict[str, Any]) -> str:
    scores = {task: {"metric": s["key"], "value": 0.0, "higher": s["higher"]} for task, s in results["scores"].items()}
    first = next(iter(results["arms"].values()))["delta_m"]
    arms = {
        name: Summary(
            arm["trainable"],
            arm["scores"],
            arm["delta_m"],
            paired(arm["delta_m"], first) if arm["against_first"] else None,
        )
        for name, arm in results["arms"].items()
    }
    return table(Comparison(arms, results["single_task_models"], scores))


def test_every_promise_names_a_test():
    promised = re.findall(r"\| `([\w/]+\.py)::(\w+)` \|", README + GUIDES["runs.md"])
    assert len(promised) > 10
    for path, name in promised:
        assert f"\ndef {name}(" in (ROOT / "tests" / "train" / path).read_text(), f"{path}::{name}"


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python -m train.check " in c])
def test_checking_commands_run(command, tmp_path, pascal_mini):
    argv = shlex.split(command.replace("PASCAL_MT", str(pascal_mini)))[3:]
    assert check([*argv, "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("command", [c for c in COMMANDS if "python -m train.parameters " in c])
def test_counting_commands_run(command, request):
    argv = [str(request.getfixturevalue("micro_run")) if w == "RUN" else w for w in shlex.split(command)[3:]]
    assert count(argv) == 0


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
def test_commands_about_checkpoints_run(runs, few_photos, vit_tiny_weights, monkeypatch):
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
    given = {"PASCAL_MT": few_photos, "WEIGHTS.safetensors": vit_tiny_weights}
    commands = [shlex.split(command) for command in COMMANDS]
    commands = [words for words in commands if words[2:] and words[2] in tools]
    assert len(commands) == 12
    for words in commands:
        argv = [str(given.get(word, word)) for word in words[3:]]
        assert tools[words[2]]([*argv, *quick.get(words[2], [])]) == 0, words
    run_python("evaluation.md")  # it loads what train.export wrote
    assert run_python("runs.md")["seg"].keys() >= {1}


def run_python(page: str) -> dict[str, Any]:
    """The blocks of a page in their order, as one program; the names it defined."""
    names: dict[str, Any] = {}
    for block in blocks(PAGES[page], "python"):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.parametrize("page", ["your-own-layer.md", "your-task.md"])
@pytest.mark.slow
def test_the_python_of_a_guide_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with patch.dict(TASKS), patch.dict(LABELS):  # a task that the guide adds is gone after it
        run_python(page)


@pytest.mark.slow
def test_a_script_is_imported_as_the_guide_says(tmp_path, monkeypatch, capsys):
    """Once it is forgotten, it is named."""
    monkeypatch.chdir(tmp_path)
    Path("shading.py").write_text("".join(blocks(PAGES["your-task.md"], "python")[:-1]))
    quick = ["--steps", "2", "--batch-size", "2", "--set", "scenes=4", "--set", "val_scenes=2", "--workers", "0"]
    run, score = (shlex.split(command)[3:] for command in SCRIPTED)
    with patch.dict(TASKS), patch.dict(LABELS):
        assert main([*run, *quick]) == 0 and evaluate([*score, "--workers", "0"]) == 0
    assert evaluate(score[:1]) == 2
    assert "has the task 'shading', which a script defines: add --import shading.py\n" in capsys.readouterr().err


def test_no_guide_has_python_that_is_not_run():
    assert {page for page in GUIDES if blocks(GUIDES[page], "python")} == {
        "evaluation.md", "runs.md", "your-own-layer.md", "your-task.md",
    }  # fmt: skip


def test_the_python_example_learns_both_tasks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run_python("README.md")
    accuracy = (names["logits"].argmax(-1) == names["labels"]).float().mean(1)  # a third by chance
    assert accuracy.min() > 0.9
    assert 10_000 < (tmp_path / "adapters.safetensors").stat().st_size < 30_000


def test_the_table_is_the_committed_result():
    results = json.loads((ROOT / "bench" / "results" / "scenes.json").read_text())
    baselines = {name: results[f"metrics_{name}"] for name in ("untrained", "constant")}
    assert score_table({**baselines, "trained": results["metrics"]}) in README


@pytest.mark.parametrize("page", PAGES)
def test_pictures_and_links_exist(page):
    folder = ROOT / "docs" / "pages" if page in GUIDES else ROOT
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[)#]", PAGES[page]):
        assert (folder / target).exists(), target


def test_readme_is_read_in_five_minutes():
    """At 280 words a minute, without blocks of code."""
    words = re.sub(r"```.*?```", "", README, flags=re.DOTALL).replace("|", " ").split()
    assert len(words) <= 1400


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
            row = f"| {pool} | {algorithm} | {' | '.join(cells)} |"
            assert row in README and row in GUIDES["your-gpu.md"]


def test_the_modelled_times_of_large_pools_are_the_committed_ones():
    rows = json.loads((ROOT / "bench" / "results" / "static.json").read_text())["large"]
    chosen = [row for row in rows if (row["dtype"], row["gpu"], row["tokens"]) == ("bf16", "H200", 40_960)]
    for row in chosen:
        cells = (f"{row[way]['forward']:,.0f} / {row[way]['backward']:,.0f}" for way in ("dense", "grouped"))
        assert f"| {row['pool']} | {' | '.join(cells)} |" in GUIDES["your-gpu.md"]
    dense, grouped = (sum(chosen[1][way].values()) for way in ("dense", "grouped"))
    assert f"takes {grouped / dense:.2f} of its time\nfor {chosen[1]['pool']}" in GUIDES["your-gpu.md"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; a warning is an error."""
    to = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(ROOT / "docs" / "mkdocs.yml"),
        "-d",
        str(to),
    ]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # an announcement of its makers
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return to


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site):
    pages = {path.name: path.read_text() for path in site.glob("*.html")}
    assert {name.replace(".md", ".html") for name in PAGES if name != "README.md"} | {"index.html"} <= pages.keys()
    assert "One image in" in pages["index.html"] and "bench/results/scenes.png" in pages["index.html"]
    for name, page in pages.items():
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\W*(?:https?:)?//[^>]*", page), name
        assert not re.findall(r":\w+:<code>", page), f"{name} shows a role of Sphinx"


@pytest.mark.parametrize("package", [fastmoe_lora, kernels, model])
def test_the_reference_documents_what_a_package_exports(package, site):
    page = (site / f"{package.__name__}.html").read_text()
    documented = {name.rsplit(".", 1)[-1] for name in re.findall(r'<h\d id="([\w.]+)"', page)}
    exported = {name for name in package.__all__ if callable(getattr(package, name))}
    assert exported and exported <= documented, exported - documented
