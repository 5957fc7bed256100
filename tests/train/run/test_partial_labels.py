"""Partially labelled sets: few images that lack a label, and MTPSL's setting, a random subset of labels per image."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from kernels import UserError
from train.cli import main, parse
from train.config.settings import resolve_settings
from train.datasets.base import Source, open_dataset
from train.datasets.files import Access
from train.datasets.sampler import BatchSampler
from train.run.build import build_data, build_model
from train.run.record import read_record
from train.tasks import DEFAULT_TASKS

IMAGES = 120
LABELS = {
    "seg": "semseg/VOC12/{}.png",
    "parts": "human_parts/{}.mat",
    "sal": "sal_distill/{}.png",
    "normals": "normals_distill/{}.png",
    "edge": "pascal-context/trainval/{}.mat",
}
QUICK = ["--partial-labels", "--protocol", "mini", "--model", "vit_micro", "--image-size", "32", "--workers", "0"]


def name(n):
    return f"2008_{n:06d}"


@pytest.fixture
def tree(pascal_copy):
    """A tree of 120 training images, which are one image under many names, with all labels."""
    shutil.rmtree(pascal_copy / "semseg/pascal-context")  # a segmentation that stands in for a missing one
    for pattern in ("JPEGImages/{}.jpg", *LABELS.values()):
        for n in range(1, IMAGES):
            path = pascal_copy / pattern.format(name(n))
            path.unlink(missing_ok=True)
            path.hardlink_to(pascal_copy / pattern.format(name(0)))
    (pascal_copy / "ImageSets/Context/train.txt").write_text("\n".join(map(name, range(IMAGES))))
    return pascal_copy


@pytest.fixture
def random_labels(tree):
    """The same, where each image has a random subset of the labels, as in MTPSL."""
    for n in range(IMAGES):
        dropped = np.random.default_rng(n).integers(2, size=len(LABELS))
        for k, pattern in enumerate(LABELS.values()):
            if k != n % len(LABELS) and dropped[k]:
                (tree / pattern.format(name(n))).unlink()
    return tree


def settings_of(tree, *flags):
    return resolve_settings(parse(["--data", str(tree), *QUICK, *flags])[0])


def test_images_that_alone_lack_a_label_are_shown_as_often_as_others(tree):
    """3 of 120 images were shown 600 times in 40 epochs."""
    for task, n in (("sal", 17), ("normals", 101), ("parts", 50)):
        (tree / LABELS[task].format(name(n))).unlink()
    data = open_dataset(Source(str(tree), DEFAULT_TASKS, "mini", 32, access=Access(partial_labels=True)), "train")
    assert sorted(map(len, data.groups)) == [1, 1, 1, 117]
    batches = BatchSampler(data.groups, 8, range(40 * IMAGES // 8), 0)
    assert Counter(index for batch in batches for index, _ in batch) == dict.fromkeys(range(IMAGES), 40)


def test_random_labels_train_in_small_batches(random_labels, tmp_path):
    out = tmp_path / "run"
    assert main(["--data", str(random_labels), *QUICK, "--batch-size", "8", "--steps", "1", "--out", str(out)]) == 0
    losses = read_record(out).losses
    assert len(build_data(settings_of(random_labels))[0].groups) > 24
    assert list(losses) == [1] and np.isfinite(losses[1]).all()


def test_cuda_graphs_are_refused_where_compositions_vary(random_labels):
    with pytest.raises(
        UserError, match=r"^--cuda-graphs needs batches of one composition, and \d+ groups .*leave it out$"
    ):
        build_data(settings_of(random_labels, "--cuda-graphs"))


@pytest.mark.slow
def test_compiled_steps_take_batches_of_any_composition(monkeypatch):
    """Heads have at most four graphs: of no image, of one, of the first number, of any other. More compositions come
    than the eight graphs that torch allows a function."""
    compiled, counters = torch.compile, []

    def compile(function, **options):
        counters.append(CompileCounterWithBackend("eager"))
        return compiled(function, backend=counters[-1], **options)

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    settings = resolve_settings(parse(["--tasks", "seg,sal", "--model", "vit_micro", "--head", "light"])[0])
    model = build_model(settings, settings.source.classes).train()
    model.compile_training()
    images = torch.zeros(9, 3, 32, 32, dtype=torch.uint8)
    for seg, sal in [(4, 2), (2, 5), (1, 7), (0, 8), (9, 0), (6, 4), (5, 6), (4, 8), (7, 6), (5, 9), (6, 9)]:
        predictions = model(images, {"seg": torch.arange(seg), "sal": torch.arange(sal)})
        assert [len(prediction) for prediction in predictions.values()] == [seg, sal]
    _, *heads = (counter.frame_count for counter in counters)
    assert len(heads) == 2 and max(heads) <= 4
