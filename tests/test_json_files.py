import json
import os

import numpy as np
import pytest

from mnv2_jax.errors import UserError
from mnv2_jax.json_files import write_json


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
    with pytest.raises(UserError, match="No space left"):
        write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.json"]
