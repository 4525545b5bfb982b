"""Checkpoints and damaged state dicts: every error is one line, and none fills the memory."""

import argparse
import collections
import datetime
import decimal
import functools
import io
import json
import os
import pathlib
import sys
import types
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from mnv2_jax.errors import UserError
from mnv2_jax.weights import state_dicts
from mnv2_jax.weights.layers import LARGEST
from mnv2_jax.weights.state_dicts import read_state_dict

STEM = "conv_stem.weight"
"""Name of the tensor by which a network of timm is recognised."""


def refused(path, pattern, take=None):
    with pytest.raises(UserError, match=pattern) as error:
        read_state_dict(path, take)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 300


# --- without torch ------------------------------------------------------------------------------------------


def write(path, state, **metadata):
    path.write_bytes(safetensors.numpy.save(state, metadata or None))
    return path


def test_safetensors_become_float32(tmp_path):
    state = {
        f"module.{STEM}": np.ones(3, np.float64),
        "_orig_mod.b": np.ones((), np.float16),
        "c.num_batches_tracked": np.ones((), np.int64),
    }
    read = read_state_dict(write(tmp_path / "w.safetensors", state, format="pt", arch="x", run="y"))
    assert {name: (array.dtype, array.shape) for name, array in read.tensors.items()} == {
        STEM: (np.float32, (3,)),
        "b": (np.float32, ()),
    }
    assert (read.source, read.architectures, read.notes) == ("timm", ("x",), ())


def test_a_header_of_any_length_is_one_of_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    begins = set()
    for pad in range(0, 256, 8):
        path = write(tmp_path / "w.bin", {STEM: np.ones(1, np.float32)}, pad="x" * pad)
        begins.add(path.read_bytes()[:1])
        assert set(read_state_dict(path).tensors) == {STEM}
    assert b"\x80" in begins  # as a pickle begins


def network(value, stem=STEM, prefix=""):
    """Tensors by which a network is recognised: timm's, or another library's for another ``stem``."""
    return {f"{prefix}{name}": np.full(2, value, np.float32) for name in (stem, "a.bias")}


@pytest.mark.parametrize(
    "prefix",
    [
        "module.", "_orig_mod.module.", "model._orig_mod.", "net.", "state_dict.model.backbone.", "timm_model.",
        "_forward_module.anything.", "model._fsdp_wrapped_module.",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("stem", "source"),
    [
        (STEM, "timm"),
        ("features.0.0.weight", "torchvision"),
        ("layer1.0.conv1.weight", "torchvision"),
        ("conv_1.block.conv.weight", "corenet"),
    ],
)
def test_wrappers_in_any_nesting(prefix, stem, source, tmp_path):
    inside = {f"{prefix}blocks._orig_mod.0._checkpoint_wrapped_module.bias": np.zeros(1, np.float32)}
    read = read_state_dict(write(tmp_path / "w.safetensors", network(1, stem, prefix) | inside))
    assert (set(read.tensors), read.source) == ({stem, "a.bias", "blocks.0.bias"}, source)
    assert read.notes == ()


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (
            ("1.conv.0.0.weight", "0.0.weight", "18.0.weight", "19.1.weight"),
            "features.1.conv.0.0.weight features.0.0.weight features.18.0.weight",
        ),
        (("0.1.block.0.0.weight", "0.0.0.weight", "1.1.bias"), "features.1.block.0.0.weight features.0.0.weight"),
        (("4.0.conv1.weight", "0.weight", "7.2.a", "9.b"), "layer1.0.conv1.weight conv1.weight layer4.2.a"),
    ],
    ids=["net.features", "children()[:-1]", "ResNet's children"],
)  # fmt: skip
def test_backbones_cut_out_of_a_network_have_its_names(theirs, expected, tmp_path):
    state = {f"backbone.{name}": np.ones(1, np.float32) for name in theirs}
    assert set(read_state_dict(write(tmp_path / "w.safetensors", state)).tensors) == set(expected.split())


def test_what_stands_beside_the_network_is_left_out_and_named(tmp_path):
    state = network(1, prefix="model.") | {"loss.weight": np.ones(9, np.float32), "train_acc.tp": np.ones(3, np.int64)}
    state |= network(2, prefix="teacher.") | network(3, "layer1.0.conv1.weight", "expert_teacher.")
    read = read_state_dict(write(tmp_path / "w.safetensors", state))
    assert {name: array[0] for name, array in read.tensors.items()} == {STEM: 1, "a.bias": 1}
    notes = " ".join(read.notes)
    assert all(name in notes for name in ("loss", "train_acc", "teacher", "expert_teacher"))
    teacher = read_state_dict(tmp_path / "w.safetensors", "teacher")
    assert {array[0] for array in teacher.tensors.values()} == {2}


@pytest.mark.parametrize("ema", ["ema.", "model_ema.module.", "ema_model.", "swa_model.module.", "modelEMA."])
@pytest.mark.parametrize("raw", ["", "model.", "online_model.", "module."])
def test_an_average_beside_the_weights_is_taken(ema, raw, tmp_path):
    path = write(tmp_path / "w.safetensors", network(1, prefix=raw) | network(2, prefix=ema))
    for take, value in ((None, 2), ("ema", 2), ("raw", 1)):
        read = read_state_dict(path, take)
        assert {array[0] for array in read.tensors.values()} == {value}
        assert any(ema.partition(".")[0] in note for note in read.notes)


@pytest.mark.parametrize("steps", [0, 3])
def test_an_average_of_parameters_has_the_other_statistics(steps, tmp_path):
    raw = network(1, prefix="model.") | {"model.bn1.running_mean": np.ones(2, np.float32)}
    counts = {"model.bn1.num_batches_tracked": np.array(3), "ema.n_averaged": np.array(steps)}
    read = read_state_dict(write(tmp_path / "w.safetensors", raw | network(2, prefix="ema.") | counts))
    assert {name: array[0] for name, array in read.tensors.items()} == {STEM: 2, "a.bias": 2, "bn1.running_mean": 1}
    assert any("1 tensors that the average lacks" in note for note in read.notes)
    assert any("no step" in note for note in read.notes) == (steps == 0)


def test_what_to_take_must_be_there_and_one(tmp_path):
    refused(write(tmp_path / "a.safetensors", network(1)), "ema", "ema")
    refused(write(tmp_path / "b.safetensors", network(1, prefix="ema.")), "ema", "raw")
    path = write(tmp_path / "c.safetensors", network(1, prefix="one.") | network(2, prefix="two.x."))
    refused(path, "one, two.x")
    refused(path, "one, two.x", "three")
    assert {array[0] for array in read_state_dict(path, "two").tensors.values()} == {2}
    refused(write(tmp_path / "d.safetensors", network(1) | network(2, prefix="module.")), "wrapper")
    averages = network(2, prefix="state_dict_ema.") | network(3, prefix="model_ema.")  # in timm's order
    read = read_state_dict(write(tmp_path / "e.safetensors", network(1, prefix="model.") | averages))
    assert {array[0] for array in read.tensors.values()} == {2}


@pytest.mark.parametrize(
    "array",
    [np.full(2, 1e300), np.full(2, np.nan, np.float32), np.full(2, np.inf, np.float16), np.ones(2, np.int8)],
    ids=["overflow", "nan", "inf", "int"],
)
def test_numbers_that_cannot_be(array, tmp_path):
    refused(
        write(tmp_path / "w.safetensors", {STEM: np.ones(1, np.float32), "a": array}),
        ": a .*finite",
    )


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E8M0", "C64", "BOOL"])
def test_types_that_weights_do_not_have(kind, tmp_path):
    header = json.dumps({STEM: {"dtype": kind, "shape": [8 if kind != "C64" else 1], "data_offsets": [0, 8]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(tmp_path / "w.safetensors", f"complete safetensors|{STEM} .*finite")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J" + "b" * 5000])
def test_names_that_are_not_one_line(name, tmp_path):
    state = {STEM: np.ones(2, np.float32), name: np.ones(2, np.float32)}
    refused(write(tmp_path / "w.safetensors", state), "name of a tensor")
    refused(write(tmp_path / "w.safetensors", {name: np.ones(2, np.float32)}), "known library")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_too_large_is_not_read(name, tmp_path):
    path = tmp_path / name
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)  # takes no room
    refused(path, r"1\.0 GiB.* 1 GiB")


def test_an_archive_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(state_dicts, "LARGEST", 1 << 20)
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data/0", bytes(2 << 20))
    assert (tmp_path / "w.pth").stat().st_size < 1 << 14
    refused(tmp_path / "w.pth", "GiB")


def test_no_file(tmp_path):
    (tmp_path / "page.pth").write_bytes(b"<html>log in</html>")
    (tmp_path / "empty.pt").touch()
    for name in ("page.pth", "empty.pt"):
        refused(tmp_path / name, "complete PyTorch")
    for name in ("w.safetensors", "w.pth"):
        refused(tmp_path / name, "can't be read")


# --- with torch ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="pip install .[parity]")


PLAIN = "'a' .*plain tensor"
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
    "expanded": (lambda t: t.zeros(1).expand(10**13), r"37,252\.9 GiB.* 1 GiB"),
    "expanded half": (lambda t: t.zeros(1).bfloat16().expand(10**13), " 1 GiB"),
    "just too large": (lambda t: t.zeros(1).bfloat16().expand(LARGEST // 4 + 1), " 1 GiB"),
    "infinite": (lambda t: t.full((3,), t.inf), ": a .*finite"),
    "overflow": (lambda t: t.full((3,), 1e300, dtype=t.float64), ": a .*finite"),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch's, of writing such tensors
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tensors_are_one_line(kind, torch, tmp_path):
    make, pattern = HOSTILE[kind]
    torch.save({STEM: torch.ones(1), "a": make(torch)}, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_size < 1 << 13
    refused(tmp_path / "w.pth", pattern)


@pytest.mark.parity
def test_many_small_tensors_count_together(torch, tmp_path):
    part = torch.zeros(1).expand(LARGEST // 16)
    torch.save({STEM: part, **{str(i): part for i in range(4)}}, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", r"1\.2 GiB.* 1 GiB")


@pytest.mark.parity
def test_tensors_of_models_are_read(torch, tmp_path):
    state = {
        f"module.{STEM}": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)),
        "b": torch.full((2,), 0.5, dtype=torch.bfloat16),
        "c": torch.ones(2, dtype=torch.float64),
        "d": torch.ones(2, dtype=torch.complex64).conj().imag,  # negated when it is looked at
        "e": torch.arange(6.0).reshape(2, 3).T,
        "bn.num_batches_tracked": torch.ones((), device="meta").long(),
    }
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    read = read_state_dict(tmp_path / "w.pth").tensors
    expected = {
        STEM: np.arange(6.0).reshape(2, 3),
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
    torch.save({STEM: torch.ones(4, 3), "b.bias": torch.ones(5)}, buffer, _use_new_zipfile_serialization=archive)
    rng, content = np.random.default_rng(seed), bytearray(buffer.getvalue())
    if seed % 3 == 2:
        content = content[: rng.integers(len(content))]
    else:
        for place in rng.integers(len(content), size=1 + 4 * (seed % 3)):
            content[place] = rng.integers(256)
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    error_text, read = "", {}
    try:
        read = read_state_dict(path).tensors
    except UserError as error:
        error_text = str(error)
    assert not error_text or error_text.startswith(f"{path}: ")
    assert "\n" not in error_text
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in read.values())


def tensors(torch, value, prefix="", **more):
    return {name: torch.from_numpy(array) for name, array in network(value, prefix=prefix).items()} | more


def forms(torch):
    """Checkpoints (1: the weights, 2: their average), each with the value that is taken by default."""
    raw, ema = tensors(torch, 1), tensors(torch, 2)
    wrapped = tensors(torch, 2, "module.", n_averaged=torch.tensor(3))
    return {
        "timm": ({"arch": "x", "state_dict": raw, "state_dict_ema": ema, "optimizer": {"state": {0: raw}}}, 2),
        "torchvision": ({"model": raw, "model_ema": wrapped, "optimizer": {}, "lr_scheduler": {}, "epoch": 3}, 2),
        "torchvision, not begun": ({"model": raw, "model_ema": wrapped | {"n_averaged": torch.tensor(0)}}, 2),
        "AveragedModel": (wrapped, 2),
        "CoreNet": ({"model_state_dict": raw, "ema_state_dict": ema, "optim_state_dict": {}}, 2),
        "Lightning": ({"state_dict": tensors(torch, 1, "net.") | tensors(torch, 2, "net_ema.module.")}, 2),
        "Lightning's WeightAveraging": (
            {"state_dict": ema, "current_model_state": raw, "averaging_state": {"n_averaged": torch.tensor(3)}}, 2,
        ),
        "callback": ({"state_dict": raw, "callbacks": {"EMACallback": {"ema_state_dict": ema}}}, 2),
        "shadow": ({"model": raw, "ema": {"decay": 0.99, "shadow": ema}}, 2),
        "two in timm's order": ({"model": raw, "state_dict_ema": ema, "model_ema": tensors(torch, 3)}, 2),
        "shadow without names": ({"model": raw, "ema": {"decay": 0.99, "shadow_params": [*ema.values()]}}, 1),
        "a flag, not an average": ({"model": raw, "use_ema": True, "ema": None, "hparams": {"ema": {"decay": 1.0}}}, 1),
        "several raw": ({"state_dict": raw, "best_state_dict": ema}, 1),
        "distillation": ({"student": raw, "teacher": ema}, 1),
        "nested": ({"state": {"model": {"module": raw}}, "config": {"model": {"name": "x"}}}, 1),
    }  # fmt: skip


@pytest.mark.parity
def test_checkpoints_as_people_save_them(torch, tmp_path):
    for form, (content, value) in forms(torch).items():
        path = tmp_path / "w.ckpt"
        torch.save(content, path, _use_new_zipfile_serialization=value == 2)  # else as before torch 1.6
        read = read_state_dict(path)
        assert {name: array[0] for name, array in read.tensors.items()} == {STEM: value, "a.bias": value}, form
        has_more = form not in ("AveragedModel", "a flag, not an average", "nested")
        assert bool(read.notes) == has_more, (form, read.notes)
        assert any("no step" in note for note in read.notes) == ("not begun" in form)
        if value == 2 and form != "AveragedModel":
            assert {array[0] for array in read_state_dict(path, "raw").tensors.values()} == {1}, form
    assert read_state_dict(path).architectures == ("x",)


def plain_objects(torch):
    return {
        "args": argparse.Namespace(model="tf_mobilenetv3_small_100", path=pathlib.Path("x"), teacher_model="y"),
        "hyper_parameters": {"backbone": "z", "lr": np.float32(0.1), "grid": np.arange(3.0), "kind": np.dtype("int8")},
        "counts": collections.defaultdict(list, a=[1]),
        "order": collections.OrderedDict(b=2),
        "version": torch.__version__,
        "device": torch.device("cpu"),
        "when": datetime.datetime(2026, 1, 1),
        "space": types.SimpleNamespace(a=pathlib.PurePosixPath("y")),
        "price": decimal.Decimal("0.1"),
    }


@pytest.mark.parity
@pytest.mark.parametrize("archive", [True, False])
def test_plain_objects_beside_the_tensors_are_read_and_not_made(archive, torch, tmp_path, monkeypatch):
    torch.save(
        {"model": tensors(torch, 1)} | plain_objects(torch), tmp_path / "w", _use_new_zipfile_serialization=archive
    )
    monkeypatch.delattr(argparse, "Namespace")  # nothing of the class is needed, nor of its module
    read = read_state_dict(tmp_path / "w")
    assert {array[0] for array in read.tensors.values()} == {1}
    assert read.architectures == ("tf_mobilenetv3_small_100", "z")


class Own:
    """A class of a user."""

    value = 3


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # torch's, of another protocol and of TorchScript
def test_what_could_run_code_is_refused_by_its_name(torch, tmp_path):
    path = tmp_path / "w.pth"
    for content, pattern in (
        (torch.nn.Linear(1, 1), "class torch.nn.modules.linear.Linear"),
        ({"model": tensors(torch, 1), "args": Own()}, r"class \S*test_state_dicts\.Own"),
        ({"model": tensors(torch, 1), "args": functools.partial(print)}, "class functools.partial"),
        ({"model": tensors(torch, 1), "call": os.system}, "class posix.system"),
        ({"model": tensors(torch, 1), "call": eval}, "class eval"),
    ):
        torch.save(content, path)
        refused(path, pattern)
    torch.save(tensors(torch, 1), path, pickle_protocol=4)
    refused(path, "pickle")
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    refused(path, "TorchScript")
    for content in ([torch.ones(1)], {"epoch": 3}, {"a": torch.ones(2)}, {}):
        torch.save(content, path)
        refused(path, "type list|known library")
