"""Reads and writes PyTorch state dicts. Only torch itself unpickles anything, with ``weights_only``."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import pathlib
import re
import reprlib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import safetensors.numpy

from mnv2_jax.errors import UserError
from mnv2_jax.weights.checkpoints import Fields, architectures_said, choose, nameless_averages, networks_in
from mnv2_jax.weights.conventions import Source
from mnv2_jax.weights.file import read_safetensors, write_file
from mnv2_jax.weights.layers import LARGEST, as_float32

_METADATA = "__metadata__"
"""Key of the metadata in a safetensors header."""


def form_of(head: bytes) -> Literal["safetensors", "torch"] | None:
    """Detects the format of a file from its first bytes, at least nine.

    PyTorch writes a zip archive; before version 1.6, and on request still today, a sequence of pickles.
    """
    if head[8:9] == b"{":  # follows the length of the header, which may begin with any byte
        return "safetensors"
    return "torch" if head.startswith((b"PK", b"\x80")) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateDict:
    """The tensors of a network, and what else their file says."""

    source: Source
    """Library whose tensor names the file uses; "timm" for timm's ``tf_`` models, too, which have the same names."""
    tensors: Mapping[str, np.ndarray]
    """Arrays by tensor name, float32 and finite."""
    architectures: tuple[str, ...]
    """Names of the architecture in the file; most files have none, and some several."""
    notes: tuple[str, ...]
    """Notes on what was chosen and what was left out."""
    head: str = "classifier"
    """What follows the features, as in `config.ModelConfig.head`."""


def read_state_dict(path: pathlib.Path, take: str | None = None) -> StateDict:
    """Reads a network from a safetensors or PyTorch file, which may be a state dict or a training checkpoint.

    Args:
      path: the file.
      take: which of several networks to read, see `checkpoints.choose`.

    Raises:
      UserError: naming the file, if it can't be read, is damaged or too large, holds objects that could run code, holds
        no network of a known library, or has tensors that aren't finite floats; or if torch is needed but not
        installed.
    """
    _check_size(path)
    with path.open("rb") as file:
        head = file.read(9)
    form = form_of(head)
    if form == "safetensors" or (path.suffix == ".safetensors" and form is None):
        return _read_safetensors(path, take)
    if form is None:
        raise UserError(f"{path}: isn't a complete PyTorch file (it begins with {head!r}); get it again")
    return _read_torch(path, take)


def _read_safetensors(path: pathlib.Path, take: str | None) -> StateDict:
    tensors, metadata = read_safetensors(path)
    return _state_dict(path, {**tensors, _METADATA: metadata}, take, np.ndarray, lambda arrays: arrays)


def _state_dict(
    path: pathlib.Path,
    loaded: Mapping[Any, Any],
    take: str | None,
    tensor: type[Any],
    as_arrays: Callable[[Mapping[str, Any]], Mapping[str, np.ndarray]],
) -> StateDict:
    networks = networks_in(path, loaded, tensor)
    if not networks:
        keys = (reprlib.repr(key).strip("'") for key in loaded if key != _METADATA)
        first = ", ".join(itertools.islice(keys, 3))
        raise UserError(
            f"{path}: its tensors don't have the names of a known library ({first}, …); give weights of torchvision,"
            " timm or CoreNet"
        )
    chosen, notes = choose(path, networks, take)
    lost = nameless_averages(loaded, networks, tensor)
    if lost and chosen.role != "ema":
        notes.append(f"averaged weights without the names of a network were left out: {', '.join(lost)}")
    arrays = {}
    for name, array in as_arrays(chosen.tensors).items():
        if not name.isprintable():  # an error with such a name could have several lines
            raise UserError(f"{path}: {reprlib.repr(name)} isn't a valid name of a tensor; give other weights")
        if array.dtype.kind == "f":
            array = as_float32(array).reshape(array.shape)  # keeps a shape without axes
        if array.dtype != np.float32 or not np.isfinite(array).all():
            raise UserError(f"{path}: {name} doesn't hold finite floating-point numbers; give other weights")
        arrays[name] = array
    return StateDict(
        source=chosen.anchor.source,
        tensors=arrays,
        architectures=architectures_said(loaded),
        notes=tuple(notes),
        head=chosen.anchor.head,
    )


def _check_size(path: pathlib.Path) -> None:
    """Refuses a file that is too large, or whose archive states that it would be when unpacked.

    Raises:
      UserError: if it is larger than any network here can be, or can't be read.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); correct the path") from error
    try:
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(member.file_size for member in archive.infolist()))
    except Exception:  # not an archive, or a damaged one, for which the reader will raise a better error
        pass
    _refuse_large(path, size)


def _refuse_large(path: pathlib.Path, size: int) -> None:
    if size > LARGEST:
        raise UserError(
            f"{path}: has {size / (1 << 30):,.1f} GiB, but at most {LARGEST >> 30} GiB are read; save only the state"
            " dict of the model"
        )


def write_state_dict(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict to a .safetensors file, or with torch to any other name, such as .pth.

    Raises:
      UserError: if the file can't be written, or torch is needed but not installed.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in state.items()}
    if path.suffix == ".safetensors":
        write_file(path, safetensors.numpy.save(arrays, {"format": "pt"}))
        return
    torch = _torch(path, "writing")
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, buffer)
    write_file(path, buffer.getvalue())


def _torch(path: pathlib.Path, verb: str) -> Any:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{path}: {verb} PyTorch's own format needs torch; install torch, or use a .safetensors file"
        ) from error
    if not hasattr(torch.serialization, "safe_globals"):
        raise UserError(
            f"{path}: {verb} PyTorch's own format needs torch 2.5 or newer, but torch is {torch.__version__}; update it"
        )
    return torch


_CLASSES_WITH_FIELDS = (
    "argparse.Namespace", "types.SimpleNamespace", "typing.Any",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")), "decimal.Decimal",
    *(f"pathlib.{kind}Path" for kind in ("", "Posix", "Pure", "PurePosix", "PureWindows", "Windows")),
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype", "numpy.ndarray",
    "torch.torch_version.TorchVersion", "torchvision.transforms.functional.InterpolationMode",
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata")),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Boolean", "Enum", "Float", "Integer", "Path", "String")),
    "omegaconf.base.Metadata", "ml_collections.config_dict.config_dict.ConfigDict",
    *(f"{top}.callbacks.{name}" for top in ("pytorch_lightning", "lightning.pytorch")
      for name in ("model_checkpoint.ModelCheckpoint", "early_stopping.EarlyStopping")),
)  # fmt: skip
_CLASSES_OF_MAPPINGS = (
    "collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict", "munch.Munch",
    "yacs.config.CfgNode", "fvcore.common.config.CfgNode",
    *(f"{top}.utilities.parsing.AttributeDict" for top in ("pytorch_lightning", "lightning.pytorch")),
    *(f"{top}.utilities.data.AttributeDict" for top in ("lightning_fabric", "lightning.fabric")),
)  # fmt: skip
"""Classes of objects that checkpoints hold beside the tensors. None of them is imported or called. A stand-in keeps the
content of each object, so that reading it runs no code."""


class _Mapping:
    """Stand-in for a class of mappings."""

    def __new__(cls, *args: Any) -> Any:
        """Returns an OrderedDict, the only class of mappings on which torch also sets fields."""
        return collections.OrderedDict()


def _stand_in(name: str, base: type) -> type:
    module, _, last = name.rpartition(".")
    return type(last, (base,), {"__module__": module})


_STAND_INS = (
    *(_stand_in(name, Fields) for name in _CLASSES_WITH_FIELDS),
    *(_stand_in(name, _Mapping) for name in _CLASSES_OF_MAPPINGS),
)


def _read_torch(path: pathlib.Path, take: str | None) -> StateDict:
    torch = _torch(path, "reading")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(list(_STAND_INS)):
            warnings.simplefilter("ignore")  # about kinds of tensors that are refused below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(loaded, Mapping):
                kind = type(loaded).__name__
                raise UserError(f"{path}: holds an object of type {kind}, not a state dict; save model.state_dict()")
            return _state_dict(path, loaded, take, torch.Tensor, lambda tensors: _arrays(torch, path, tensors))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error}); fix that and start again") from error
    except Exception as error:  # torch raises any kind of error on a damaged file
        raise UserError(f"{path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Explains in one line why torch can't read a file."""
    message = str(error)
    if match := re.search(r"GLOBAL (\S+)", message):
        return (
            f"isn't read, because it holds an object of the class {match[1][:100]}, which could run code when it is"
            " created; save only the model's state dict, or give a .safetensors file"
        )
    if "TorchScript" in message:
        return "isn't read, because it is a TorchScript archive, which holds code; save the state dict of the model"
    if operand := re.search(r"Unsupported operand (\d+)", message):
        return (
            f"has a pickle format that torch doesn't read (instruction {operand[1]}); save it again by torch.save with"
            " the default protocol"
        )
    if "weights_only" in message:
        return (
            "isn't read, because it holds Python objects that could run code; save only the model's state dict, or give"
            " a .safetensors file"
        )
    lines = [line for line in message.splitlines() if line.strip()] or [type(error).__name__]
    return f"isn't a complete PyTorch file ({lines[0].strip()[:200]}); get it again"


def _arrays(torch: Any, path: pathlib.Path, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts tensors to arrays, after a check of their kinds and their total size."""
    for name, tensor in tensors.items():
        is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_nested
        if not is_plain or tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            kind = f"{tensor.dtype}, {tensor.layout}, {tensor.device}".replace("torch.", "")
            raise UserError(
                f"{path}: {reprlib.repr(name)} isn't a plain tensor of floating-point numbers ({kind}); give other"
                " weights"
            )
    _refuse_large(path, sum(tensor.numel() * max(tensor.element_size(), 4) for tensor in tensors.values()))
    return {
        name: (tensor.float() if tensor.element_size() < 4 else tensor).detach().resolve_neg().numpy()
        for name, tensor in tensors.items()
    }
