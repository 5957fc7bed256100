"""What is said of a file that cannot be read: "restore it" where its content is wrong, and only there."""

import errno
import os

import pytest

from kernels import UserError
from train.files.reading import read_json, reading, require_file


def said(block) -> str:
    with pytest.raises(UserError) as caught:
        block()
    return str(caught.value)


def test_a_mistyped_path_is_not_to_be_restored(tmp_path):
    assert said(lambda: require_file(tmp_path / "typo")) == f"no such file: {tmp_path}/typo"
    assert said(lambda: require_file(tmp_path)) == f"{tmp_path} is not a file"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOENT])
def test_what_the_system_refuses_is_no_damage(number, tmp_path):
    def refused():
        with reading(tmp_path):
            raise OSError(number, os.strerror(number), "somewhere")

    assert said(refused) == f"{tmp_path} cannot be read: {os.strerror(number)}"


def test_what_a_decoder_refuses_is_damage(tmp_path):
    def refused():
        with reading(tmp_path):
            raise error

    for error in (OSError("image file is truncated"), OSError(errno.EINVAL, "Invalid argument")):  # it seeks before 0
        assert said(refused) == f"{tmp_path} cannot be read (OSError: {error}): restore it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"x": "1"}}', "has '1' as a x: restore it, or write it again"),
        ('{"a": {"x": true}}', "has True as a x"),
        ('{"a": [1]}', "has [1] as a, which is no object"),
        ('{"a": null}', "has None as a, which is no object"),
        ('{"b": "text"}', "has no 'a' in the content"),
        ('{"a": {}, "b": 1}', "has 1 as b"),
        ("[]", "has [] as the content, which is no object"),
        ('{"a": ', "cannot be read (JSONDecodeError"),
        ("[" * 100_000, "cannot be read (RecursionError"),
        ("\udcff", "cannot be read (UnicodeDecodeError"),
    ],
)
def test_json_of_another_schema_is_one_line(text, message, tmp_path):
    path = tmp_path / "value.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    line = said(lambda: read_json(path, {"a": {"*": int}, "b?": str}))
    assert line.startswith(f"{path} {message}") and "\n" not in line


def test_json_of_the_schema_comes_whole(tmp_path):
    path = tmp_path / "value.json"
    for text in ('{"a": {"x": 1, "y": 2}, "c": null}', '{"a": {}, "b": null}', '{"a": {}, "b": "text"}'):
        path.write_text(text)
        assert read_json(path, {"a": {"*": int}, "b?": str})["a"] in ({}, {"x": 1, "y": 2})
