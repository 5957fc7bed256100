"""Where a setting's value comes from, and what happens to a wrong one."""

from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import get_type_hints

import pytest

from kernels import UserError
from train.config.settings import (
    BOUNDS,
    Settings,
    layer,
    parse_loss_weights,
    read_recipe,
    recipe_names,
    resolve_settings,
)


def test_without_data_the_scenes_recipe_applies():
    settings = resolve_settings({})
    assert (settings.recipe, settings.model, settings.image_size, settings.head) == ("scenes", "vit_micro", 64, "light")


def test_with_data_the_papers_setting_applies():
    settings = resolve_settings({"data": "somewhere"})
    assert (settings.recipe, settings.model, settings.image_size, settings.head) == ("", "vit_base", 224, "up")
    assert settings.task_weights == {"seg": 1, "parts": 2, "sal": 5, "normals": 10, "edge": 50, "depth": 1, "cls": 1}


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ({}, 224),
        ({"protocol": "invpt"}, 512),
        ({"protocol": "mtinet", "image_size": 448}, 448),
        ({"recipe": "mini"}, 224),
    ],
)
def test_images_have_the_size_of_their_protocol_unless_said_otherwise(flags, size):
    assert resolve_settings({"data": "somewhere"} | flags).image_size == size


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        ({"protocol": "nyud_invpt"}, (448, 576)),
        ({"protocol": "nyud_mtinet"}, (480, 640)),
        ({"protocol": "nyud_mtinet", "image_size": 48}, (48, 64)),
        ({"protocol": "mtinet"}, (512, 512)),
    ],
)
def test_the_image_size_is_the_height_and_the_protocol_gives_the_width(flags, shape):
    assert resolve_settings({"data": "somewhere"} | flags).image_shape == shape


@pytest.mark.parametrize(
    ("recipe", "protocol"),
    [
        ("paper", "ase"),
        ("mini", "mini"),
        ("nyud_base", "nyud_invpt"),
        ("nyud_tiny", "nyud_mtinet"),
        ("cityscapes_tiny", "cityscapes"),
    ],
)
def test_a_recipe_names_its_protocol(recipe, protocol):
    assert resolve_settings({"recipe": recipe, "data": "somewhere"}).protocol == protocol


def test_a_resumed_run_keeps_its_protocol_and_size():
    before = asdict(resolve_settings({"data": "somewhere", "protocol": "invpt"}))
    assert resolve_settings({"image_size": 512}, before).image_size == resolve_settings({}, before).image_size == 512
    with pytest.raises(UserError, match="protocol was 'invpt' and cannot become 'mtinet' when a run is resumed"):
        resolve_settings({"protocol": "mtinet"}, before)


def test_flags_override_a_recipe():
    assert resolve_settings({"recipe": "mini", "batch_size": 4}).batch_size == 4
    assert resolve_settings({"recipe": "mini"}).batch_size == 8


def test_the_length_said_last_wins():
    assert resolve_settings({"epochs": 3}).steps == 0  # over the recipe's steps
    settings = resolve_settings({"recipe": "paper", "steps": 7})
    assert (settings.steps, settings.epochs) == (7, 0)  # over the recipe's epochs


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_names_its_command(name):
    settings = resolve_settings({"recipe": name, "data": "" if name.startswith("scenes") else "somewhere"})
    assert settings.recipe == name
    header = (resources.files("train.config") / "recipes" / f"{name}.yaml").read_text().split("\n\n")[0]
    tasks = "seg,normals,edge,depth" if name.startswith("nyud") else "seg,parts,sal,normals,edge"
    tasks = {"cityscapes_tiny": "seg,depth", "stl": "seg", "scenes_pretrain": "seg", "scenes_pretrain_cls": "cls"}.get(
        name, tasks
    )
    assert f"#   python -m train --tasks {tasks}" in header and settings.tasks == tasks
    assert name == "scenes" or f"--recipe {name}" in header


@pytest.mark.parametrize("name", ["invpt_base", "invpt_large"])
def test_the_fields_recipes_have_the_fields_setting(name):
    s = resolve_settings({"recipe": name, "data": "somewhere", "pretrained": "weights.safetensors"})
    assert (s.steps, s.batch_size, s.lr, s.clip_norm, s.head) == (40_000, 4, 2e-5, 10, "pyramid")
    assert s.source.protocol.reported == "invpt" and s.image_shape == (512, 512) and not s.frozen_backbone
    assert [s.task_weights[task] for task in s.task_names] == [1, 2, 5, 10, 50]
    assert s.model == f"vit_{name.removeprefix('invpt_')}"


@pytest.mark.parametrize("bases", [["0"], ["1", "0"], ["1", "2", "1"]])
def test_a_recipe_that_is_based_on_itself_is_one_line(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, base in enumerate(bases):
        (tmp_path / f"{number}.yaml").write_text(f"base: {base}.yaml\n")
    with pytest.raises(
        UserError, match=rf"^recipe {bases[-1]}.yaml is based on itself: .* 0.yaml -> .*{bases[-1]}.yaml$"
    ):
        read_recipe("0.yaml")


def test_a_recipe_of_the_user_may_lie_anywhere(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: vit_small\nlr: 1.0e-4\n")
    settings = resolve_settings({"recipe": str(tmp_path / "mine.yaml"), "data": "somewhere"})
    assert (settings.model, settings.lr) == ("vit_small", 1e-4)


@pytest.mark.parametrize(
    ("name", "yaml", "text"),
    [
        ("tasks", "[seg, edge]", "seg,edge"),
        ("tasks", "[semseg]", "semseg"),
        ("lora_targets", "[qkv, fc1]", "qkv,fc1"),
        ("loss_weights", "{seg: 1, edge: 50}", "seg=1,edge=50"),
        ("loss_weights", "{seg: 1.0e-5, edge: 5e-4}", "seg=1e-05,edge=5e-4"),
        ("loss_weights", "{}", ""),
    ],
)
def test_lists_and_mappings_stand_for_texts_in_recipes_and_on_the_command_line(name, yaml, text, tmp_path):
    (tmp_path / "mine.yaml").write_text(f"{name}: {yaml}\n")
    assert read_recipe(str(tmp_path / "mine.yaml")) == layer({name: yaml}, "command line") == {name: text}


def test_a_list_of_a_block_is_a_list_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("tasks:\n- seg\n- edge\nloss_weights:\n  seg: 2\n  edge: 50\n")
    settings = resolve_settings({"recipe": str(tmp_path / "mine.yaml")})
    assert settings.task_names == ("seg", "edge") and settings.task_weights["seg"] == 2
    assert settings == resolve_settings({"recipe": str(tmp_path / "mine.yaml"), "tasks": "seg,edge"})


def test_weights_that_are_none_or_no_numbers_are_one_line():
    for given in ("{seg: yes}", "{seg: }", "{seg: heavy}", "{flow: 1}", "{seg: -1}"):
        with pytest.raises(UserError, match=r"loss weight 'seg=|unknown task 'flow'"):
            resolve_settings({"loss_weights": given})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: vit_tiny", "unknown key 'modle'; did you mean 'model'?"),
        ("batch_size: many", "batch_size is 'many', which is not a whole number"),
        ("partial_labels: perhaps", "partial_labels is 'perhaps', which is not true or false"),
        ("model: [", "is not valid yaml"),
        ("just words", "holds no 'key: value' lines"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nlr: [*b, *b]", "or holds a yaml alias"),
        ("a: &a {lr: 1}\nb: {<<: [*a, *a]}", "or holds a yaml alias"),
        ("[" * 10_000, "is not valid yaml"),
        ("# " + "x" * 20_000, "is longer than 20000 characters"),
        ("7", "holds no 'key: value' lines"),
        ("7: 8", "unknown key 7"),
        ("image_size: 64.7", "image_size is 64.7, which is not a whole number"),
        ("steps: 1.9", "steps is 1.9, which is not a whole number"),
        ("eval_every: .inf", "eval_every is inf, which is not a whole number"),
        ("batch_size: true", "batch_size is True, which is not a whole number"),
        ("lr: false", "lr is False, which is not a number"),
        ("data:", "data is None, which is not a text"),
        ("model: [vit_tiny]", "model is ['vit_tiny'], which is not a text"),
        ("tasks: [[seg], edge]", "tasks is [['seg'], 'edge'], which is not a text, such as [a, b]"),
        ("tasks: {seg: 1}", "tasks is {'seg': 1}, which is not a text, such as [a, b]"),
        ("tasks: '[seg'", "tasks is not valid yaml"),
        ("tasks: '[&a seg, *a]'", "tasks is longer than 20000 characters, or holds a yaml alias"),
        ("loss_weights: [seg, 1]", "loss_weights is ['seg', 1], which is not a text, or a mapping {a: 1, b: 2}"),
        ("loss_weights: {seg: [1]}", "loss_weights is {'seg': [1]}, which is not a text, or a mapping {a: 1, b: 2}"),
    ],
)
def test_a_wrong_recipe_is_one_line_with_its_path(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_recipe(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"recipe": "mimi"}, f"no recipe 'mimi': give the path of a .yaml file or one of {', '.join(recipe_names())}"),
        ({"decoder": "fcn"}, "unknown decoder 'fcn': choose among none, fgmoe, plain, mlore"),
        ({"decoder": "fgmoe", "fg": "4/5/4/1"}, "fg 4/5/4/1: the active experts K must be between 1 and N = 4"),
        ({"decoder": "fgmoe", "gating": "topk"}, "knows no shared experts but S = 1"),
        ({"decoder": "mlore", "gating": "ase"}, "choose topk or topk-renorm"),
        ({"decoder": "fgmoe", "moe": "16/3/1/4"}, "--moe 16/3/1/4 adapts the backbone, which --decoder fgmoe freezes"),
        ({"tasks": "seg,flow"}, "unknown task 'flow'"),
        ({"tasks": "seg,semseg"}, "task 'seg' is given twice"),
        ({"moe": "16/16/1/4"}, "the active sparse experts k must be between 1 and N - S = 15"),
        ({"moe": "16/4/0/4", "gating": "ase"}, "use 'topk'"),
        ({"moe": "16/3/1/4", "gating": "topk"}, "use 'ase'"),
        ({"moe": "16-3-1-4"}, "is not of the form N/k/S/r"),
        ({"loss_weights": "seg=much"}, "'seg=much' is not of the form task=number"),
        ({"loss_weights": "flow=1"}, "unknown task 'flow'"),
        ({"steps": -1}, "steps is -1"),
        ({"steps": 0, "epochs": 0}, "say how long to train"),
        ({"steps": 0}, "say how long to train"),
        ({"recipe": "paper", "steps": 0}, "say how long to train"),
        ({"epochs": 0}, "say how long to train"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"normalisation": "none"}, "unknown normalisation 'none'"),
        ({"lr": "nan"}, "lr is nan"),
        ({"image_size": -8}, "image_size is -8"),
        ({"loss_weights": "seg=-1"}, "loss weight 'seg=-1': it must be between 0 and 1e+06"),
        ({"loss_weights": "seg=nan"}, "loss weight 'seg=nan': it must be"),
        ({"clip_norm": "-1"}, "clip_norm is -1.0: it must be between 1e-09 and 1e+09"),
        ({"clip_norm": "0"}, "clip_norm is 0.0"),
        ({"weight_decay": "-0.1"}, "weight_decay is -0.1"),
        ({"warmup": "5"}, "warmup is 5.0: it must be between 0 and 1"),
        ({"warmup": "inf"}, "warmup is inf"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"scenes": "99999999999999"}, "scenes is 99999999999999: it must be between 1 and 1e+07"),
        ({"device": "mps"}, "unknown device 'mps': choose among cpu, cuda"),
        ({"protocol": "pad"}, "unknown protocol 'pad': choose among invpt, mtinet, ase, mini, nyud"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_the_remedy(flags, message):
    with pytest.raises(UserError) as caught:
        resolve_settings(flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_number_has_bounds():
    """nan and inf are outside of all of them."""
    kinds = get_type_hints(Settings)
    assert {name for name, kind in kinds.items() if kind in (int, float)} == BOUNDS.keys()


def test_a_decoder_replaces_the_experts_of_the_backbone():
    settings = resolve_settings({"decoder": "fgmoe", "gating": "ase", "pretrained": "weights.npz"})
    assert settings.moe == "none" and settings.moe_config is None
    assert str(settings.decoder_config) == "4/2/4/1" and settings.decoder_config.gating_name == "ase"
    assert Path(settings.pretrained).is_absolute()
    assert str(resolve_settings({"decoder": "fgmoe", "pretrained": "weights.npz", "moe": "none"}).moe) == "none"


def test_a_resumed_run_keeps_its_decoder():
    before = asdict(resolve_settings({"decoder": "fgmoe", "pretrained": "weights.npz"}))
    assert resolve_settings({}, before).decoder == "fgmoe"
    with pytest.raises(UserError, match="fg was '4/2/4/1' and cannot become '4/2/1/1' when a run is resumed"):
        resolve_settings({"fg": "4/2/1/1"}, before)


def test_loss_weights_that_are_not_named_keep_their_default():
    assert parse_loss_weights("semseg=2") == {"seg": 2.0}
    weights = resolve_settings({"loss_weights": "edge=1"}).task_weights
    assert weights == {"seg": 1, "parts": 2, "sal": 5, "normals": 10, "edge": 1, "depth": 1, "cls": 1}


def test_a_resumed_run_keeps_its_settings_and_may_be_prolonged():
    before = asdict(resolve_settings({"seed": 3, "steps": 10}))
    after = resolve_settings({"steps": 20}, before)
    assert asdict(after) == before | {"steps": 20}
    assert after.recipe == "scenes"


def test_a_resumed_run_cannot_change_its_model():
    with pytest.raises(UserError, match="moe was '16/3/1/4' and cannot become '8/2/1/4' when a run is resumed"):
        resolve_settings({"moe": "8/2/1/4"}, asdict(Settings()))
