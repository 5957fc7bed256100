"""MATLAB's files: what MATLAB and scipy write is read as scipy reads it, and no damage ends the process or keeps it."""

import random
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from scipy.io import loadmat, savemat, whosmat

from train.files.matlab import load_variable

MATLABS = Path(scipy.io.__file__).parent / "matlab/tests/data"
WRITTEN_BY_MATLAB = [path for path in sorted(MATLABS.glob("test*_[67]*.mat")) if "hdf5" not in path.name]
NESTED = {
    "anno": {
        "imname": "2008_000008",
        "objects": np.array([[(np.eye(3, 4), "head", 15)]], [("mask", object), ("name", object), ("id", object)]),
        "empty": np.zeros((0, 0)),
        "list": np.array([["a", np.int16([[1, -2]])]], object),
    }
}


def assert_same(ours, theirs):
    """``theirs`` is scipy's: structured arrays for structs, object arrays for cells, str arrays for text."""
    if theirs.dtype.names is not None:
        assert isinstance(ours, list)
        for record, other in zip(ours, theirs.ravel(order="F"), strict=True):
            assert tuple(record) == theirs.dtype.names
            for name, value in record.items():
                assert_same(value, other[name])
    elif theirs.dtype == object:
        assert isinstance(ours, tuple)
        for value, other in zip(ours, theirs.ravel(order="F"), strict=True):
            assert_same(value, other)
    elif theirs.dtype.kind == "U":
        assert isinstance(ours, str)
        rows = [row.ljust(theirs.dtype.itemsize // 4) for row in theirs.ravel()]  # MATLAB stores text down its columns
        assert ours == "".join(map("".join, zip(*rows, strict=True)))
    else:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.skipif(not WRITTEN_BY_MATLAB, reason="this scipy comes without its test files")
def test_files_that_matlab_wrote_are_read_as_scipy_reads_them():
    """Of MATLAB 6 (not compressed) and 7 (compressed), by little and big endian machines."""
    compared, foreign = 0, []
    for path in WRITTEN_BY_MATLAB:
        for name, _, _kind in whosmat(path):
            theirs = loadmat(path)[name]
            try:
                ours = load_variable(path, name)
            except ValueError as error:
                foreign.append(f"{path.name}: {error}")
            else:
                assert_same(ours, theirs)
                compared += 1
    assert compared > 40
    assert all("which no label has" in line for line in foreign), foreign  # complex, sparse, objects, functions


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8", "?"])
def test_numbers_of_every_type(dtype, compressed, tmp_path):
    values = np.random.default_rng(0).integers(0, 2 if dtype == "?" else 120, (5, 7)).astype(dtype)
    savemat(tmp_path / "a.mat", {"other": 1, "x": values, "more": "text"}, do_compression=compressed)
    read = load_variable(tmp_path / "a.mat", "x")
    np.testing.assert_array_equal(read, values)
    assert read.dtype == (np.uint8 if dtype == "?" else dtype)


@pytest.mark.parametrize("compressed", [False, True])
def test_structs_cells_and_text_may_hold_each_other(compressed, tmp_path):
    savemat(tmp_path / "a.mat", NESTED, do_compression=compressed)
    assert_same(load_variable(tmp_path / "a.mat", "anno"), loadmat(tmp_path / "a.mat")["anno"])


def test_a_variable_that_is_not_there(tmp_path):
    savemat(tmp_path / "a.mat", {"x": 1})
    with pytest.raises(KeyError, match="y"):
        load_variable(tmp_path / "a.mat", "y")


@pytest.mark.parametrize("compressed", [False, True])
def test_no_byte_that_is_wrong_does_more_than_raise(compressed, tmp_path):
    """scipy.io.loadmat ends the process for some of these, and hangs for others."""
    path, rng = tmp_path / "a.mat", random.Random(0)
    savemat(path, NESTED, do_compression=compressed)
    whole, raised = path.read_bytes(), 0
    for _ in range(1500):
        content = bytearray(whole)
        content[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([len(whole), rng.randrange(len(whole))])])
        started = time.process_time()
        try:
            load_variable(path, "anno")
        except Exception:
            raised += 1
        assert time.process_time() - started < 1
    assert raised > 700


def test_a_variable_that_is_too_much_is_refused_before_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr("train.files.matlab.LIMIT", 10_000)
    savemat(tmp_path / "a.mat", {"x": np.zeros((200, 200))}, do_compression=True)
    with pytest.raises(ValueError, match="ends too early, or is too large"):
        load_variable(tmp_path / "a.mat", "x")
    savemat(tmp_path / "b.mat", {name: np.zeros((25, 25)) for name in "abc"}, do_compression=True)
    assert not load_variable(tmp_path / "b.mat", "a").any()
    with pytest.raises(ValueError, match="ends too early, or is too large"):
        load_variable(tmp_path / "b.mat", "c")  # those before it count


def element(kind, content):
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(kind, count, body, name=b""):
    head = element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<ii", 1, count)) + element(1, name)
    return element(14, head + body)


def test_millions_of_matrices_in_a_small_file_are_refused(tmp_path):
    """Four million took 11 s; also where no cell has many."""
    inner = matrix(1, 300, element(14, b"") * 300)
    packed = zlib.compress(matrix(1, 300, inner * 300, b"x"))
    path = tmp_path / "a.mat"
    path.write_bytes(bytes(124) + b"\0\1IM" + struct.pack("<II", 15, len(packed)) + packed)
    assert path.stat().st_size < 10_000
    with pytest.raises(ValueError, match="it has more than 65536 matrices"):
        load_variable(path, "x")
