import errno
import json
import os
import pathlib

import numpy as np
import pytest

from mnv2_jax.errors import UserError
from mnv2_jax.json_files import read_json, write_json


def test_write_json_holds_arrays_and_no_nan(tmp_path):
    path = tmp_path / "x.json"
    tree = {"a": np.arange(3), "b": (np.float32("nan"), np.float64("inf"), 0.5), "c": {"d": np.int64(7), "e": None}}
    write_json(path, tree)
    expected = {"a": [0, 1, 2], "b": [None, None, 0.5], "c": {"d": 7, "e": None}}
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == expected
    assert os.listdir(tmp_path) == ["x.json"]


def test_write_json_leaves_the_old_file_where_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"\(No space left on device\)"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_read_json_tells_what_the_machine_says_from_what_the_file_holds(tmp_path):
    path = tmp_path / "x.json"
    for content in (b"", b'{"a": ', b"\xff", b"[]"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}: .*restore it"):
            read_json(path)
    with pytest.raises(UserError, match=rf"/proc/self/mem: can't be read \({os.strerror(errno.EIO)}\)"):
        read_json(pathlib.Path("/proc/self/mem"))
