"""``train.export --to FILE.pt2``: one program for PyTorch alone, with the outputs of the model."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch.fx import GraphModule

from fastmoe_lora import LoRAMoE, MoEConfig, adapt
from model import MultiTaskViT, ViT, ViTConfig, export_program
from train.cli import main as train
from train.export import main as export
from train.predict import main as predict
from train.run import checkpoint
from train.run.build import load_on_cpu

CONFIG = {"width": 24, "depth": 2, "heads": 3, "patch": 4}


def adapted(**changes) -> MultiTaskViT:
    """A model whose experts and LoRA change its outputs."""
    torch.manual_seed(0)
    vit = ViT(ViTConfig(**CONFIG, **changes), 16)
    routing = adapt(vit, MoEConfig.parse("4/2/1/2"), tasks=2, kernel="reference")
    for name, parameter in vit.named_parameters():
        if "lora_B" in name or "routers" in name:
            torch.nn.init.normal_(parameter)
    return MultiTaskViT(vit, {"seg": 5, "normals": 3}, "light", routing).eval()


@pytest.mark.parametrize("changes", [{}, {"registers": 4, "rope": True}], ids=["learned positions", "rotary positions"])
def test_any_batch_has_the_outputs_of_the_model(changes):
    model = adapted(**changes)
    program = export_program(model, (16, 16)).module()
    for batch in (1, 2, 5):
        images = torch.rand(batch, 3, 16, 16) * 255
        with torch.inference_mode():
            ours, theirs = model(images), program(images)
        assert ours.keys() == theirs.keys()
        for task in ours:
            torch.testing.assert_close(theirs[task], ours[task], rtol=0, atol=1e-5)


def test_the_program_has_operators_of_pytorch_only_and_leaves_the_model_as_it_is():
    model = adapted()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    graphs = [m.graph for m in export_program(model, (16, 16)).graph_module.modules() if isinstance(m, GraphModule)]
    targets = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    own = {target for target in targets if not target.startswith(("aten.", "<built-in"))}
    assert "aten.linear.default" in targets and own <= {"wrap_with_autocast", "wrap_with_set_grad_enabled"}, own
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
    with torch.inference_mode():
        model(torch.zeros(1, 3, 16, 16))
    assert any(isinstance(module, LoRAMoE) for module in model.modules())


def test_tasks_with_different_numbers_of_images_are_refused():
    """Their counts would be lost: in the program they follow from the number of tokens."""
    model = adapted().requires_grad_(True)
    index = {"seg": torch.arange(2), "normals": torch.arange(1)}
    with pytest.raises(ValueError, match=r"torch.export needs equally many images of every task, not \(2, 1\)"):
        torch.export.export(model, (torch.zeros(2, 3, 16, 16), index), strict=False)


@pytest.fixture(scope="module")
def program(tiny_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "new" / "model.pt2"
    assert export([str(tiny_run), "--to", str(path)]) == 0
    return path


def test_it_runs_without_this_package(program, tiny_run, tmp_path):
    _, model, _ = load_on_cpu(checkpoint.find(tiny_run), "reference")
    images = torch.rand(3, 3, 64, 64) * 255
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys, torch\n"
        f"y = torch.export.load({str(program)!r}).module()(torch.load('images.pt'))\n"
        "assert not {'fastmoe_lora', 'kernels', 'model', 'train'} & set(sys.modules)\n"
        "torch.save(y, 'y.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.inference_mode():
        ours, theirs = model(images), torch.load(tmp_path / "y.pt")
    for task in ours:
        torch.testing.assert_close(theirs[task], ours[task], rtol=0, atol=1e-5)


def test_photos_are_predicted_as_by_the_run(program, tiny_run, tmp_path):
    Image.effect_noise((40, 24), 90).convert("RGB").save(tmp_path / "photo.png")
    assert predict([str(tiny_run), str(tmp_path / "photo.png"), "--out", str(tmp_path / "run")]) == 0
    assert predict(["--exported", str(program), str(tmp_path / "photo.png"), "--out", str(tmp_path / "pt2")]) == 0
    files = [path.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("photo.png")]
    assert len(files) > 5
    for file in files:  # a level may fall to the other side of a rounding
        ours, theirs = (torch.tensor(list(Image.open(tmp_path / run / file).tobytes())) for run in ("run", "pt2"))
        assert ((ours - theirs).abs() > 0).float().mean() < 0.01, file


def test_mistakes_are_one_line(program, tiny_run, tmp_path, capsys):
    def error(command, *argv) -> str:
        capsys.readouterr()
        assert command([*map(str, argv)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1, message
        return message

    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    (tmp_path / "damaged.pt2").write_bytes(program.read_bytes()[:1000])
    assert "exists already and is not overwritten" in error(export, tiny_run, "--to", program)
    assert "no such exported model" in error(predict, "--exported", tmp_path / "none.pt2", tmp_path / "photo.png")
    damaged = error(predict, "--exported", tmp_path / "damaged.pt2", tmp_path / "photo.png")
    assert "damaged.pt2 is not a readable .pt2 file" in damaged
    assert "give photos after" in error(predict, tiny_run)


def test_a_decoder_is_refused_in_one_line(tiny_scenes_run, tmp_path, capsys):
    scenes = ["--set", "scenes=4", "--set", "val_scenes=2", "--batch-size", "2", "--workers", "0", "--steps", "1"]
    argv = ["--decoder", "plain", "--pretrained", str(tiny_scenes_run), "--tasks", "seg", *scenes]
    assert train([*argv, "--out", str(tmp_path / "run")]) == 0
    assert export([str(tmp_path / "run"), "--to", str(tmp_path / "model.pt2")]) == 2
    assert "holds a decoder, and --to FILE.pt2 takes an adapted ViT" in capsys.readouterr().err
    assert not (tmp_path / "model.pt2").exists()
