"""Routing over a training: recorded without a trace in the losses, kept through kills, drawn; gradients' cosines."""

import json
import shutil

import pytest
import torch
from PIL import Image

from fastmoe_lora import RoutingStatistics
from train.cli import main as train
from train.datasets.batches import train_loader
from train.evaluation.conflict import gradient_cosines
from train.routing import main
from train.run import checkpoint
from train.run.build import build_data, load_checkpoint
from train.run.course import mutual_information
from train.run.record import NAME, read_lines, read_record
from train.run.routes import read_routing
from train.tasks import TASKS

TINY = ["--set", "scenes=16", "--set", "val_scenes=2", "--image-size", "16", "--batch-size", "4", "--workers", "0"]
TINY += ["--tracker", "none", "--moe", "6/2/1/2", "--tasks", "seg,sal,edge"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Seven steps, recorded at the first, every third, and the last."""
    out = tmp_path_factory.mktemp("recorded") / "run"
    assert (
        train(
            [
                *TINY,
                "--steps",
                "7",
                "--set",
                "routing_every=3",
                "--checkpoint-every",
                "4",
                "--keep",
                "2",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    return out


def routing_lines(run):
    return [line for line in read_lines(run / NAME) if line["kind"] == "routing"]


def test_every_third_step_is_recorded_and_the_losses_do_not_change(recorded, tmp_path):
    tasks, moments = read_routing(recorded)
    assert tasks == ("seg", "sal", "edge") and [*moments] == [1, 3, 6, 7]
    for mass, frequency in moments.values():
        assert mass.shape == frequency.shape == (4, 3, 6)
        torch.testing.assert_close(mass.sum(-1), torch.ones(4, 3, dtype=torch.float64), rtol=0, atol=1e-5)  # six digits
        torch.testing.assert_close(frequency.sum(-1), torch.full((4, 3), 3.0, dtype=torch.float64), rtol=0, atol=1e-5)
        assert (frequency[..., -1] == 1).all()  # the shared expert
    assert train([*TINY, "--steps", "7", "--out", str(tmp_path / "run")]) == 0
    assert read_record(tmp_path / "run").losses == read_record(recorded).losses
    assert not routing_lines(tmp_path / "run")


def test_what_is_recorded_is_the_routing_of_the_training_batch(recorded, tmp_path):
    """At step 1, before which nothing was trained."""
    assert train([*TINY, "--steps", "1", "--lr", "0", "--out", str(tmp_path / "run")]) == 0
    settings, model, _ = load_checkpoint(checkpoint.find(tmp_path / "run"))
    (batch,) = train_loader(build_data(settings)[0], model.tasks, 4, range(1), settings.seed, 0)
    model.routing.statistics = RoutingStatistics()
    model(batch.images, batch.index)
    mass, frequency = read_routing(recorded)[1][1]
    for ours, theirs in zip((mass, frequency), model.routing.statistics.compute(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-9)  # six digits


def test_a_resumed_run_records_what_one_does_that_was_not(recorded, tmp_path):
    """It was killed after step 6 was recorded, with the checkpoint of step 4."""
    out = shutil.copytree(recorded, tmp_path / "run", symlinks=True)
    (out / "last").unlink()
    (out / "last").symlink_to("step-4")
    (out / "results.json").unlink()
    text = (out / NAME).read_text()
    (out / NAME).write_text(text[: text.rindex('"frequency"')])  # cut short
    assert train([*TINY, "--steps", "7", "--set", "routing_every=3", "--resume", "--out", str(out)]) == 0
    assert routing_lines(out) == routing_lines(recorded)
    for path in (out / "last", out / "results.json", *out.glob("step-*")):
        path.rename(tmp_path / path.name)
    assert train([*TINY, "--steps", "2", "--resume", "--out", str(out)]) == 0  # from step 0
    assert not routing_lines(out) and [*read_record(out).losses] == [1, 2]


def test_a_record_that_a_kill_cut_short_leaves_the_others_readable(recorded, tmp_path):
    text = (recorded / NAME).read_text()
    (tmp_path / NAME).write_text(text[: text.rindex('"frequency"')])
    assert [*read_routing(tmp_path)[1]] == [1, 3, 6]


def test_it_is_drawn_and_written_down(recorded, tmp_path, capsys):
    assert main([str(recorded), "--conflict", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "mutual information" in printed and "gradients in shared experts" in printed
    numbers = json.loads((tmp_path / "routing.json").read_text())
    assert [*numbers["steps"]] == ["1", "3", "6", "7"]
    assert torch.tensor(numbers["steps"]["7"]["mass"]).shape == (4, 3, 6)
    cosines = json.loads((tmp_path / "conflict.json").read_text())
    assert torch.tensor(cosines["shared experts"]).shape == (4, 3, 3)
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("fig4.png", "gate_mass.png", "conflict.png"))


def test_experts_are_drawn_over_a_photo(tiny_scenes_run, recorded, tmp_path, capsys, error_of):
    """Of any run with experts, recorded or not; a PDF where the name says so."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (90, 60), "red").save(photo)
    assert main([str(tiny_scenes_run), "--image", str(photo), "--out", str(tmp_path / "out")]) == 0
    assert Image.open(tmp_path / "out/experts.png").width > 500
    assert f"{tmp_path}/out/experts.png: experts 16/3/1/4 of step 2, layers 0, 1, 3" in capsys.readouterr().out
    argv = [recorded, "--image", photo, "--layers", "3,1", "--tasks", "edge", "--to", tmp_path / "maps.pdf"]
    assert main([*map(str, argv)]) == 0
    assert "layers 3, 1" in capsys.readouterr().out and (tmp_path / "maps.pdf").read_bytes().startswith(b"%PDF")
    assert "maps.pdf exists already" in error_of(main, *argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--image", "/no/such.png"], "no such file: /no/such.png"),
        (["--image", "PHOTO", "--layers", "0,4"], "--layers 0,4: give different numbers of 0 to 3, such as 0,3"),
        (["--image", "PHOTO", "--layers", "1,1"], "give different numbers of 0 to 3"),
        (["--image", "PHOTO", "--layers", "all"], "give different numbers of 0 to 3"),
        (["--image", "PHOTO", "--tasks", "normals"], "has no task normals: choose --tasks among seg, sal, edge"),
        (["--image", "PHOTO", "--to", "maps.svg"], "--to maps.svg must end in .png or .pdf"),
        (["--image", "PHOTO", "--to", "maps.png", "--out", "x"], "--to maps.png names the file: leave out --out"),
        (["--image", "PHOTO", "--conflict"], "--image draws no gradients"),
        (["--layers", "0"], "--layers says what --image draws: give a photo"),
    ],
)
def test_a_mistake_about_a_photo_is_one_line(argv, message, recorded, tmp_path, error_of):
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    given = [tmp_path / "photo.png" if word == "PHOTO" else word for word in argv]
    assert message in error_of(main, recorded, *given)
    assert not (recorded / "experts.png").exists()


def test_mutual_information_of_known_tables():
    apart, alike = torch.eye(2, dtype=torch.float64)[None], torch.full((1, 2, 2), 0.25, dtype=torch.float64)
    assert mutual_information(apart).item() == pytest.approx(torch.tensor(2.0).log().item())
    assert mutual_information(alike).item() == pytest.approx(0, abs=1e-12)
    absent = torch.cat([apart, torch.full((1, 1, 2), torch.nan, dtype=torch.float64)], dim=1)
    assert mutual_information(absent).item() == pytest.approx(torch.tensor(2.0).log().item())


def test_cosines_are_those_of_each_tasks_gradient_alone(recorded):
    settings, model, _ = load_checkpoint(checkpoint.find(recorded))
    model = model.double()
    batches = [*train_loader(build_data(settings)[0], model.tasks, 4, range(2), settings.seed, 0)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shared, sparse = gradient_cosines(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    layer, expected = model.vit.blocks[1].mlp, []
    for batch in batches:
        gradients = []
        for task in ("seg", "edge"):
            model.zero_grad()
            TASKS[task].loss(model(batch.images, batch.index)[task], batch.labels[task]).backward()
            gradients.append(torch.cat([layer.lora_A.grad[-2:].flatten(), layer.lora_B.grad[:, -2:].flatten()]))
        expected.append(torch.cosine_similarity(*gradients, dim=0))
    assert shared[1, 0, 2].item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-9)
    torch.testing.assert_close(shared.diagonal(dim1=1, dim2=2), torch.ones(4, 3).double())
    torch.testing.assert_close(sparse, sparse.transpose(1, 2))


def test_mistakes_are_one_line(recorded, tiny_scenes_run, tmp_path, capsys, error_of):
    assert "metrics.jsonl has no routing: train with --set routing_every=N" in error_of(main, tiny_scenes_run)
    assert "is not a checkpoint" in error_of(main, tmp_path / "typo") and not (tmp_path / "typo").exists()
    assert train([*TINY, "--moe", "none", "--steps", "1", "--out", str(tmp_path / "plain")]) == 0
    assert "has no experts in its backbone" in error_of(main, tmp_path / "plain")
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.png")
    assert "has no experts in its backbone" in error_of(main, tmp_path / "plain", "--image", tmp_path / "photo.png")
    assert "typo is not a checkpoint" in error_of(main, tmp_path / "typo") and not (tmp_path / "typo").exists()
    run = shutil.copytree(recorded, tmp_path / "run", symlinks=True)
    (run / "gate_mass.png").write_text("mine")
    assert f"{run}/gate_mass.png was not written by train.routing" in error_of(main, run)
    capsys.readouterr()
    assert train([*TINY, "--compile", "--set", "routing_every=1", "--out", str(tmp_path / "x")]) == 2
    assert "routing_every records what a compiled or graphed step hides" in capsys.readouterr().err
