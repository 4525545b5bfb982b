"""State dicts that aren't what they should be: every one is one line, none fills the memory."""

import io
import json
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from mnv2_jax.convert import state_dicts
from mnv2_jax.convert.layers import LARGEST
from mnv2_jax.convert.state_dicts import read_state_dict
from mnv2_jax.errors import UserError


def refused(path, said):
    with pytest.raises(UserError, match=said) as error:
        read_state_dict(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300


# --- without torch ------------------------------------------------------------------------------------------


def write(path, state):
    path.write_bytes(safetensors.numpy.save(state))
    return path


def test_safetensors_become_float32(tmp_path):
    state = {
        "module.a": np.ones(3, np.float64),
        "_orig_mod.b": np.ones((), np.float16),
        "c.num_batches_tracked": np.ones((), np.int64),
    }
    read = read_state_dict(write(tmp_path / "w.safetensors", state))
    assert {name: (array.dtype, array.shape) for name, array in read.items()} == {
        "a": (np.float32, (3,)),
        "b": (np.float32, ()),
    }


@pytest.mark.parametrize(
    "array",
    [np.full(2, 1e300), np.full(2, np.nan, np.float32), np.full(2, np.inf, np.float16), np.ones(2, np.int8)],
    ids=["overflow", "nan", "inf", "int"],
)
def test_numbers_that_cannot_be(array, tmp_path):
    refused(write(tmp_path / "w.safetensors", {"a": array}), "a isn't of finite floating-point numbers")


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E8M0", "C64", "BOOL"])
def test_types_that_weights_do_not_have(kind, tmp_path):
    header = json.dumps({"a": {"dtype": kind, "shape": [8 if kind != "C64" else 1], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(tmp_path / "w.safetensors", "not a whole safetensors file|a isn't of finite floating-point numbers")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J" + "b" * 5000])
def test_names_that_are_not_one_line(name, tmp_path):
    refused(write(tmp_path / "w.safetensors", {name: np.ones(2, np.float32)}), "is no name of a tensor")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_too_large_is_not_read(name, tmp_path):
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)  # takes no room
    refused(path, r"1\.0 GiB, where 1 GiB is the most")


def test_an_archive_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(state_dicts, "LARGEST", 1 << 20)
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data/0", bytes(2 << 20))
    assert (tmp_path / "w.pth").stat().st_size < 1 << 14
    refused(tmp_path / "w.pth", "is the most that is read")


def test_no_file(tmp_path):
    for name in ("w.safetensors", "w.pth"):
        refused(tmp_path / name, "can't be read")


# --- with torch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="pip install .[parity]")


PLAIN = "'a' isn't of finite floating-point numbers in a plain tensor"
HOSTILE = {
    "sparse": (lambda t: t.eye(3).to_sparse(), PLAIN),
    "sparse huge": (lambda t: t.sparse_coo_tensor(t.zeros(1, 1).long(), t.ones(1), (10**15,)), PLAIN),
    "sparse rows": (lambda t: t.eye(3).to_sparse_csr(), PLAIN),
    "quantised": (lambda t: t.quantize_per_tensor(t.ones(3), 0.1, 0, t.qint8), PLAIN),
    "quantised by channel": (
        lambda t: t.quantize_per_channel(t.ones(3, 2), t.ones(3), t.zeros(3), 0, t.quint8),
        PLAIN,
    ),
    "float8": (lambda t: t.ones(3).to(t.float8_e4m3fn), PLAIN),
    "complex": (lambda t: t.ones(3, dtype=t.complex64), PLAIN),
    "conjugate": (lambda t: t.ones(3, dtype=t.complex64).conj(), PLAIN),
    "nested": (lambda t: t.nested.nested_tensor([t.ones(2), t.ones(3)]), PLAIN),
    "meta": (lambda t: t.ones(3, device="meta"), PLAIN),
    "meta huge": (lambda t: t.ones(10**13, device="meta"), PLAIN),
    "int": (lambda t: t.ones(3).int(), PLAIN),
    "expanded": (lambda t: t.zeros(1).expand(10**13), r"37,252\.9 GiB, where 1 GiB is the most"),
    "expanded half": (lambda t: t.zeros(1).bfloat16().expand(10**13), "where 1 GiB is the most"),
    "just too large": (lambda t: t.zeros(1).bfloat16().expand(LARGEST // 4 + 1), "where 1 GiB is the most"),
    "infinite": (lambda t: t.full((3,), t.inf), "a isn't of finite floating-point numbers;"),
    "overflow": (lambda t: t.full((3,), 1e300, dtype=t.float64), "a isn't of finite floating-point numbers;"),
    "list": (lambda t: [1.0], "'a' in it isn't a tensor"),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch's, of writing such tensors
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tensors_are_one_line(kind, torch, tmp_path):
    make, said = HOSTILE[kind]
    torch.save({"a": make(torch)}, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_size < 1 << 13
    refused(tmp_path / "w.pth", said)


@pytest.mark.parity
def test_many_small_tensors_count_together(torch, tmp_path):
    part = torch.zeros(1).expand(LARGEST // 16)
    torch.save({str(i): part for i in range(5)}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"1\.2 GiB, where 1 GiB is the most")


@pytest.mark.parity
def test_tensors_of_models_are_read(torch, tmp_path):
    state = {
        "module.a": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)),
        "b": torch.full((2,), 0.5, dtype=torch.bfloat16),
        "c": torch.ones(2, dtype=torch.float64),
        "d": torch.ones(2, dtype=torch.complex64).conj().imag,  # negated when it is looked at
        "e": torch.arange(6.0).reshape(2, 3).T,
        "bn.num_batches_tracked": torch.ones((), device="meta").long(),
    }
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth")
    expected = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.full(2, 0.5),
        "c": np.ones(2),
        "d": np.zeros(2),
        "e": np.arange(6.0).reshape(2, 3).T,
    }
    assert set(read) == set(expected)
    for name, array in expected.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parity
@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("seed", range(30))
def test_damaged_bytes_give_an_error_or_a_result(seed, archive, torch, tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(4, 3), "b.bias": torch.ones(5)}, buffer, _use_new_zipfile_serialization=archive)
    rng, content = np.random.default_rng(seed), bytearray(buffer.getvalue())
    if seed % 3 == 2:
        content = content[: rng.integers(len(content))]
    else:
        for place in rng.integers(len(content), size=1 + 4 * (seed % 3)):
            content[place] = rng.integers(256)
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    told, read = "", {}
    try:
        read = read_state_dict(path)
    except UserError as error:
        told = str(error)
    assert not told or told.startswith(f"{path}: ")
    assert "\n" not in told
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in read.values())
