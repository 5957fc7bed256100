"""Pruning by gate mass: what stays, what it computes, and that the result is a run like any other."""

import json

import pytest
import torch

from fastmoe_lora import MoEConfig, adapt
from model import VITS, MultiTaskViT, ViT
from train.cli import main as train
from train.evaluate import main as evaluate
from train.prune import main, most_used, pruned_config, without_experts
from train.run import checkpoint
from train.run.build import load_on_cpu

TINY = ["--set", "scenes=16", "--set", "val_scenes=2", "--image-size", "16", "--batch-size", "4", "--workers", "0"]
TINY += ["--tracker", "none", "--tasks", "seg,sal"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("prune") / "run"
    assert train([*TINY, "--moe", "6/2/1/2", "--steps", "3", "--out", str(out)]) == 0
    return out


def test_the_most_used_sparse_experts_stay_in_their_order():
    mass = torch.tensor([[[0.1, 0.4, 0.0, 0.3, 0.2], [0.1, 0.0, 0.3, 0.3, 0.3]], [[0.0, 0.0, 0.5, 0.1, 0.4]] * 2])
    assert most_used(mass, keep=3, shared=1) == [[1, 3, 4], [2, 3, 4]]
    mass[0, 0] = torch.nan  # a task without tokens
    assert most_used(mass, keep=3, shared=1) == [[2, 3, 4], [2, 3, 4]]
    assert most_used(mass, keep=2, shared=0) == [[2, 3], [2, 4]]


@pytest.mark.parametrize(
    ("moe", "gating"), [("6/2/1/3", "ase"), ("6/2/0/3", "topk-renorm"), ("6/2/1/3", "naive-shared")]
)
def test_experts_that_are_never_selected_can_go(moe, gating):
    """Outputs stay the same where gates do not depend on them: under naive-shared they are a softmax over all."""
    torch.manual_seed(0)
    config = MoEConfig.parse(moe, gating)

    def build(config):
        vit = ViT(VITS["vit_micro"], 16)
        return MultiTaskViT(vit, {"seg": 3, "sal": 2}, "light", adapt(vit, config, 2)).double().eval()

    model = build(config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    kept = [[0, 2, 3, 5], [1, 2, 4, 5], [0, 1, 2, 5], [2, 3, 4, 5]]
    gone = 60.0 if gating != "naive-shared" else 800.0  # below every other logit; exp(-800) is 0
    for layer, experts in zip(model.vit.blocks, kept, strict=True):
        # A constant column: the layer norm before the router gets a weight of 0 and a bias of 1 there.
        layer.norm2.weight.data[0], layer.norm2.bias.data[0] = 0, 1
        dropped = [e for e in range(layer.mlp.routers.shape[1]) if e not in experts]
        layer.mlp.routers.data[:, dropped, 0] = -gone
    smaller = build(pruned_config(config, 4, "run"))
    smaller.load_state_dict(without_experts(model.state_dict(), kept, config.rank))
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64) * 255
    for task, ours in smaller(images).items():
        torch.testing.assert_close(ours, model(images)[task], rtol=1e-6, atol=1e-9)


def test_the_result_is_a_run(run, tmp_path, capsys):
    out = tmp_path / "pruned"
    assert main([str(run), "--keep", "4", "--out", str(out)]) == 0
    assert "6/2/1/2 -> 4/2/1/2" in capsys.readouterr().out
    written = json.loads((out / "prune.json").read_text())
    assert [len(kept) for kept in written["kept"]] == [4] * 4 and all(kept[-1] == 5 for kept in written["kept"])
    before = checkpoint.read_weights(checkpoint.find(run))
    settings, model, state = load_on_cpu(checkpoint.find(out), "auto")
    assert settings.moe == "4/2/1/2" and state.step == 3
    for layer, kept in enumerate(written["kept"]):
        rows = [2 * expert + i for expert in kept for i in range(2)]
        assert torch.equal(model.vit.blocks[layer].mlp.lora_A, before[f"vit.blocks.{layer}.mlp.lora_A"][rows])
    assert evaluate([str(out), "--workers", "0", "--out", str(tmp_path / "scored")]) == 0
    scored = json.loads((tmp_path / "scored" / "results.json").read_text())
    assert scored["metrics"]["seg"]["mIoU"] == pytest.approx(written["scores"]["pruned"]["seg"]["mIoU"], rel=1e-5)
    assert train(["--resume", str(out), "--steps", "5"]) == 0
    assert checkpoint.read_state(checkpoint.find(out)).step == 5


def test_it_is_fine_tuned_where_asked(run, tmp_path):
    assert main([str(run), "--keep", "3", "--steps", "2", "--out", str(tmp_path / "tuned")]) == 0
    scores = json.loads((tmp_path / "tuned" / "prune.json").read_text())["scores"]
    results = json.loads((tmp_path / "tuned" / "results.json").read_text())
    assert [*scores] == ["before", "pruned", "fine-tuned"] and scores["fine-tuned"] == results["metrics"]
    assert results["steps"] == 5 and results["moe"] == "3/2/1/2"


def test_mistakes_are_one_line(run, tmp_path, capsys, error_of):
    for keep in (2, 6):
        assert f"--keep {keep}: 6/2/1/2 can keep 3 to 5 experts" in error_of(
            main, run, "--keep", keep, "--out", tmp_path / "x"
        )
    for steps in (-1, 10**12):
        assert str(steps)[:9] in error_of(main, run, "--keep", 4, "--steps", steps, "--out", tmp_path / "x")
    assert "exists already" in error_of(main, run, "--keep", 4, "--out", run)
    assert train([*TINY, "--moe", "none", "--steps", "1", "--out", str(tmp_path / "plain")]) == 0
    assert "has no experts" in error_of(main, tmp_path / "plain", "--keep", 4, "--out", tmp_path / "x")
    assert not (tmp_path / "x").exists()
