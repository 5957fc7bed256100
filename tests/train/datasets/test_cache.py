"""The cache holds what would be derived, for any number of processes, whatever becomes of its files."""

import hashlib
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.io import loadmat, savemat

from kernels import UserError
from train.datasets.base import open_tree
from train.datasets.cache import Cache, open_cache
from train.datasets.files import Access, TreeDataSet
from train.datasets.pascal.labels import Reader, read_edges
from train.datasets.pascal.mat import read_parts
from train.datasets.tree import list_images
from train.protocols import build_protocol
from train.tasks import DEFAULT_TASKS

EDGE = "pascal-context/trainval/2008_000000.mat"


def digest(sample):
    return [(name, hashlib.sha256(np.ascontiguousarray(array)).hexdigest()) for name, array in sorted(sample.items())]


def read_all(root, folder):
    """Digests of every raw sample; a function that travels to other processes."""
    reader = Reader(open_cache(str(folder) if folder else ""))
    return [digest(reader.sample(image)) for image in list_images(open_tree(root), "all", DEFAULT_TASKS)]


def state(root):
    """Everything below a folder: names, sizes, times and contents."""
    paths = [root, *sorted(root.rglob("*"))]
    contents = {path: path.read_bytes() for path in paths if path.is_file()}
    return [(path, path.stat().st_size, path.stat().st_mtime_ns, contents.get(path)) for path in paths]


def test_samples_are_the_same_with_and_without_and_the_tree_is_not_touched(pascal_tree, tmp_path):
    before = state(pascal_tree)
    plain, cold, warm = read_all(pascal_tree, ""), *(read_all(pascal_tree, tmp_path / "cache") for _ in range(2))
    assert plain == cold == warm
    assert len(list((tmp_path / "cache").iterdir())) == 2 * 12  # edges and parts, and nothing that is unfinished
    assert state(pascal_tree) == before


def test_what_is_kept_is_not_derived_again(pascal_tree, tmp_path):
    cache, calls = open_cache(str(tmp_path)), []

    def derive(path):
        calls.append(path)
        return read_edges(path)

    first, second = (cache.get(pascal_tree / EDGE, "edges 1", derive) for _ in range(2))
    assert len(calls) == 1 and second.dtype == np.uint8
    np.testing.assert_array_equal(first, second)
    cache.get(pascal_tree / EDGE, "edges 2", derive)  # another version of the rule
    assert len(calls) == 2


def test_another_content_is_another_entry(pascal_copy, tmp_path):
    cache = open_cache(str(tmp_path / "cache"))
    before = cache.get(pascal_copy / EDGE, "edges 1", read_edges)
    times = os.stat(pascal_copy / EDGE)
    savemat(pascal_copy / EDGE, {"LabelMap": loadmat(pascal_copy / EDGE)["LabelMap"][::-1]}, do_compression=True)
    os.utime(pascal_copy / EDGE, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if nothing had happened
    after = cache.get(pascal_copy / EDGE, "edges 1", read_edges)
    np.testing.assert_array_equal(after, read_edges(pascal_copy / EDGE))
    assert not np.array_equal(before, after)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)


def change(path):
    """The pixels 0 and 1 swapped, in a PNG that is whole and keeps its texts."""
    with Image.open(path) as image:
        texts = PngInfo()
        for name, text in image.text.items():
            texts.add_text(name, text)
        Image.fromarray(1 - np.asarray(image)).save(path, "PNG", pnginfo=texts)


def exchange(path):
    """For an entry of another source."""
    other = Cache(path.parent / "other")
    other.folder.mkdir()
    other.get(path, "any", lambda _: np.zeros((37, 50), np.uint8))
    (entry,) = other.folder.iterdir()
    path.write_bytes(entry.read_bytes())


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip_a_bit,
        change,
        exchange,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no picture"),
        lambda path: Image.new("RGB", (50, 37)).save(path),
        lambda path: Image.new("L", (25, 18)).save(path),
    ],
    ids=["cut", "a bit flipped", "changed", "exchanged", "empty", "text", "colours", "another size"],
)
def test_a_damaged_entry_is_derived_again_and_replaced(damage, pascal_tree, tmp_path):
    cache = open_cache(str(tmp_path))
    expected = cache.get(pascal_tree / EDGE, "edges 1", read_edges)
    (entry,) = tmp_path.glob("*.png")
    whole = entry.read_bytes()
    damage(entry)
    np.testing.assert_array_equal(cache.get(pascal_tree / EDGE, "edges 1", read_edges), expected)
    assert entry.read_bytes() == whole


def test_numbers_are_kept_to_the_last_bit(tmp_path):
    cache, value = Cache(tmp_path), {"seg": {"mIoU": 100 / 3, "none": None}}
    assert cache.read("a") is None
    cache.write("a", value)
    cache.write("", value)
    assert cache.read("a") == value and cache.read("") is None and cache.read("b") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    Cache().write("a", value)
    assert Cache().read("a") is None


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        flip_a_bit,
        lambda path: path.write_text("[]"),
        lambda path: path.write_text("{}"),
        lambda path: path.write_text(path.read_text().replace("33.3", "66.6")),
        lambda path: path.write_text((path.parent / "b.json").read_text()),
        lambda path: path.unlink() or path.mkdir(),
    ],
    ids=["cut", "a bit flipped", "a list", "empty", "changed", "exchanged", "a folder"],
)
def test_numbers_that_something_has_changed_are_not_read(damage, tmp_path):
    cache = Cache(tmp_path)
    for key, value in (("a", [100 / 3]), ("b", [0])):
        cache.write(key, value)
    damage(tmp_path / "a.json")
    assert cache.read("a") is None and cache.read("b") == [0]


def test_a_damaged_source_is_a_fault_and_leaves_no_entry(pascal_copy, tmp_path):
    path = pascal_copy / "human_parts/2008_000000.mat"
    path.write_bytes(b"no struct")
    with pytest.raises(UserError, match="2008_000000.mat cannot be read"):
        open_cache(str(tmp_path / "cache")).get(path, "parts 1", read_parts)
    assert not list((tmp_path / "cache").iterdir())


def test_processes_race_for_the_same_entries(pascal_tree, tmp_path, own_processes):
    expected = read_all(pascal_tree, "")
    with ProcessPoolExecutor(3, get_context("forkserver")) as pool:
        for _ in range(3):
            for entry in tmp_path.glob("*.png"):
                entry.unlink()
            results = [pool.submit(read_all, pascal_tree, tmp_path) for _ in range(3)]
            assert [result.result(timeout=120) for result in results] == [expected] * 3
    assert len(list(tmp_path.iterdir())) == 2 * 12


def test_a_cache_inside_the_tree_is_refused(pascal_copy, tmp_path):
    (tmp_path / "link").symlink_to(pascal_copy)
    for folder in (pascal_copy, pascal_copy / "cache", tmp_path / "link/cache"):
        with pytest.raises(UserError, match=f"^{folder} lies inside the data set {pascal_copy}, which"):
            open_cache(str(folder))
    assert not (pascal_copy / "cache").exists()


def test_a_cache_that_cannot_be_written_is_one_line_at_the_start(pascal_tree, tmp_path):
    (tmp_path / "file").write_text("")
    access = Access(cache=str(tmp_path / "file/cache"))
    with pytest.raises(UserError, match="^cannot write to cache .*/file/cache .Not a directory.: choose another"):
        TreeDataSet(open_tree(pascal_tree), "train", DEFAULT_TASKS, build_protocol("ase"), 0, access)


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not hold for root")
def test_a_cache_without_permission(pascal_tree, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        open_cache(str(tmp_path))


def test_a_full_disk_is_one_line_and_leaves_nothing_unfinished(pascal_tree, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.files.atomic.os.replace", full)
    with pytest.raises(UserError, match="No space left on device.: free some space"):
        Cache(tmp_path).get(pascal_tree / EDGE, "edges 1", read_edges)
    assert not list(tmp_path.iterdir())
