"""Published weights by name: fetched once, checked, kept.

timm/mobilenetv2_140.ra_in1k    Hugging Face, kept in huggingface_hub's own cache; without .TAG: timm's default one
torchvision/mobilenet_v2.v2     download.pytorch.org, kept in $MNV2_JAX_CACHE or ~/.cache/mnv2_jax/weights
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import http.client
import json
import math
import os
import pathlib
import reprlib
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Literal

import tqdm

from mnv2_jax.errors import UserError, nearest
from mnv2_jax.json_files import read_json

Source = Literal["timm", "timm_tf", "torchvision"]
TIMEOUT_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Fetched:
    """Weights on this machine, and what to do with them."""

    path: pathlib.Path
    source: Source
    """Library whose layer names and padding they have; timm_tf: timm's names, TensorFlow's padding and epsilon."""
    model: Mapping[str, Any]
    """Arguments of `models.registry.create_model`, `name` among them; defaults are left out."""
    preprocessing: Mapping[str, Any] | None
    """Fields of `config.DataConfig` of the published evaluation; None where the publisher doesn't say."""
    labels: tuple[str, ...] = ()
    """Names of the classes, as in `weights.file.WeightsInfo`, and so the next; empty: not stated."""
    class_ids: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Timm:
    tag: str | None
    """Tag of the weights that timm takes by default; None: it has the network but no weights."""
    model: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class _Torchvision:
    file: str
    """Ends in the first 8 hex digits of its SHA-256."""
    model: Mapping[str, Any]
    resize: int = 256
    """Short side, in pixels, before the central 224 are cut out."""


_FILE = pathlib.Path(__file__).with_name("published_weights.json")
_LIST = json.loads(_FILE.read_text(encoding="utf-8"))
"""Weights that existed on its date. Below 0.75 timm doesn't scale V3's stem (fixed_stem_head); TF-slim would."""
DATE: str = _LIST["date"]
TIMM = {name: _Timm(**entry) for name, entry in _LIST["timm"].items()}
TORCHVISION_URL = "https://download.pytorch.org/models/"
TORCHVISION = {name: _Torchvision(**entry) for name, entry in _LIST["torchvision"].items()}
"""v1, v2: torchvision's IMAGENET1K_V1 and _V2."""


def is_name(text: str) -> bool:
    """Whether this names published weights, rather than a file or folder, which has precedence."""
    return text.startswith(("timm/", "torchvision/")) and not os.path.exists(text)


def known_names() -> list[str]:
    """Names that `fetch` takes, sorted; timm's without tags, of which there are several each."""
    timm = [f"timm/{name}" for name, entry in TIMM.items() if entry.tag]
    return sorted(timm + [f"torchvision/{name}" for name in TORCHVISION])


def list_weights(pattern: str = "*") -> list[str]:
    """Names of published weights that match a shell pattern, sorted; timm's with the tag of its default."""
    timm = [f"timm/{name}.{entry.tag}" for name, entry in TIMM.items() if entry.tag]
    return sorted(fnmatch.filter([*timm, *(f"torchvision/{name}" for name in TORCHVISION)], pattern))


def model_of(name: str) -> Mapping[str, Any]:
    """Arguments of `models.registry.create_model` for one of `list_weights`."""
    publisher, _, rest = name.partition("/")
    found: Mapping[str, Any] = TIMM[rest.partition(".")[0]].model if publisher == "timm" else TORCHVISION[rest].model
    return found


def is_tensorflow(architecture: str) -> bool:
    """Whether it begins as the name of one of timm's models with TensorFlow's padding and epsilon."""
    return _base_name(architecture).startswith(tuple(name for name in TIMM if name.startswith("tf_")))


def named(architecture: str, source: str, path: pathlib.Path) -> Fetched | None:
    """Model and options that the name of its architecture gives a file.

    Args:
      architecture: as people write it: ``tf_mobilenetv3_small_100``, ``hf-hub:timm/mobilenetv2_140.ra_in1k``.
      source: whose names its tensors have.
      path: of the file.

    Returns:
      None where it names none that we know of that library.
    """
    base = _base_name(architecture)
    is_resnet = base == "resnet50" and base != architecture  # with a tag or an owner: timm's, which has the same names
    if base in TIMM and (source == "timm" or is_resnet):
        return _of_timm(path, base, {}, "")
    if source == "torchvision" and base in {entry.model["name"] for entry in TORCHVISION.values()}:
        return Fetched(path=path, source="torchvision", model={"name": base}, preprocessing=None)
    return None


def _base_name(architecture: str) -> str:
    return architecture.strip().rpartition("/")[2].partition(".")[0]


def fetch(name: str) -> Fetched:
    """Downloads published weights, or finds those that were downloaded before, for which it needs no network.

    Args:
      name: ``timm/ARCHITECTURE.TAG``, ``timm/ARCHITECTURE`` or ``torchvision/NAME``; see `known_names`.

    Raises:
      UserError: for a name that isn't one, or weights that can't be had or are damaged.
    """
    publisher, _, rest = name.partition("/")
    if publisher == "torchvision" and rest in TORCHVISION:
        return _fetch_torchvision(name, TORCHVISION[rest])
    architecture, _, tag = rest.partition(".")
    if publisher == "timm" and architecture in TIMM:
        return _fetch_timm(name, architecture, tag)
    stem = f"timm/{architecture}" if publisher == "timm" else name
    raise UserError(f"no weights are known by the name {name!r}{nearest(stem, known_names())}")


# --- Hugging Face -------------------------------------------------------------------------------------------


def _fetch_timm(name: str, architecture: str, tag: str) -> Fetched:
    tag = tag or TIMM[architecture].tag or ""
    if not tag:
        raise UserError(f"{name}: timm publishes no weights of {architecture}; one of: {', '.join(known_names())}")
    repository = f"timm/{architecture}.{tag}"
    config, weights = _hugging_face_files(repository, ("config.json", "model.safetensors"))
    return _of_timm(weights, architecture, _read_config(config), str(config))


def beside(path: pathlib.Path) -> Fetched | None:
    """Facts of a file of timm's weights from the ``config.json`` beside it, as `fetch` gives by name.

    Which network it is, whether with TensorFlow's padding, and its preprocessing: the weights don't say it themselves.

    Returns:
      None where there is no such file, or it isn't one of timm's for a network that we have.

    Raises:
      UserError: if it is, but describes a preprocessing that can't be.
    """
    config = path.with_name("config.json")
    if path.suffix not in (".safetensors", ".bin") or not os.path.isfile(config):
        return None
    try:
        told = _read_config(config)
    except UserError:
        return None  # whatever it is
    architecture = told.get("architecture")
    if not isinstance(architecture, str) or architecture not in TIMM or not isinstance(told.get(_CONFIG), Mapping):
        return None
    return _of_timm(path, architecture, told, str(config))


def _of_timm(path: pathlib.Path, architecture: str, config: Mapping[str, Any], where: str) -> Fetched:
    return Fetched(
        path=path,
        source="timm_tf" if architecture.startswith("tf_") else "timm",
        model=TIMM[architecture].model,
        preprocessing=timm_preprocessing(config, where),
        **_timm_classes(config, where),
    )


def _timm_classes(config: Mapping[str, Any], where: str) -> dict[str, tuple[str, ...]]:
    """Names of the classes in a timm ``config.json``, as fields of `Fetched`; empty if it has none.

    Its ``label_names`` are a list, or a mapping from indices, which may leave some out; ``label_descriptions`` say each
    as people do.

    Raises:
      UserError: beginning with ``where``, for names that can't be.
    """
    theirs = config.get(_CONFIG)
    parts = [config, theirs if isinstance(theirs, Mapping) else {}]  # timm, too, prefers the former

    def said(*keys: str) -> Any:
        return next((part[key] for key in keys for part in parts if part.get(key)), None)

    names, told, count = said("label_names", "labels"), said("label_descriptions") or {}, said("num_classes")
    if names is None:
        return {}
    by_index = dict(enumerate(names)) if isinstance(names, list) else names
    if not _is_texts(by_index) or not all(str(index).isdecimal() for index in by_index):
        raise UserError(f"{where}: label_names={reprlib.repr(names)} must be a list of names, or names by index")
    if not _is_texts(told):
        raise UserError(f"{where}: label_descriptions={reprlib.repr(told)} must be a text for each of label_names")
    indices = {int(index): name for index, name in by_index.items()}
    count = count if isinstance(count, int) else max(indices) + 1
    if not max(indices) < count < 1 << 20 or len(indices) < len(by_index):
        raise UserError(f"{where}: label_names={reprlib.repr(names)} must be one each of {count} classes at the most")
    class_ids = tuple(indices.get(index, f"class {index}") for index in range(count))
    labels = tuple(told.get(name, name) for name in class_ids)
    return {"labels": labels, "class_ids": () if labels == class_ids else class_ids}


def _is_texts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(text, str) and text for text in value.values())


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets in brackets
        raise UserError(f"{path}: not readable as JSON ({type(error).__name__}); get it again") from error


def timm_preprocessing(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any] | None:
    """The evaluation that a timm ``config.json`` describes; None if it has no (whole) ``pretrained_cfg``.

    Raises:
      UserError: beginning with ``where``, for a value that can't be.
    """
    theirs = config.get(_CONFIG)
    if not isinstance(theirs, Mapping) or any(theirs.get(key) is None for key in _IS_VALID):
        return None
    for key, (is_valid, expected) in _IS_VALID.items():
        if not is_valid(theirs[key]):
            raise UserError(
                f"{where}: {_CONFIG}.{key}={reprlib.repr(theirs[key])} must be {expected}; get the file again"
            )
    resolution = theirs["input_size"][-1]
    return _preprocessing(
        resolution,
        # timm rounds the short side down, `data.images.evaluation_view` to the nearest: this is the share for which
        # both have the same.
        resize=math.floor(resolution / theirs["crop_pct"]),
        interpolation=theirs["interpolation"],
        mean=tuple(theirs["mean"]),
        std=tuple(theirs["std"]),
    )


_CONFIG = "pretrained_cfg"


def _is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high  # NaN isn't


def _is_three(value: Any, low: float, high: float, kind: type = object) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 3:
        return False
    return all(isinstance(v, kind) and _is_number(v, low, high) for v in value)


_IS_VALID: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (lambda v: _is_three(v, 1, 4096, int), "three whole numbers, channels, height and width"),
    "crop_pct": (lambda v: _is_number(v, 0.01, 1), "a number from 0.01 to 1"),
    "interpolation": (lambda v: v in ("bilinear", "bicubic"), "bilinear or bicubic"),
    "mean": (lambda v: _is_three(v, -255, 255), "three numbers"),
    "std": (lambda v: _is_three(v, 1e-3, 255), "three numbers of at least 0.001"),
}
"""Checks of the values of a ``pretrained_cfg``, with their words. The bounds are those of `config.checks`."""


def _preprocessing(
    resolution: int,
    resize: int,
    interpolation: str = "bilinear",
    mean: tuple[float, ...] = (0.485, 0.456, 0.406),
    std: tuple[float, ...] = (0.229, 0.224, 0.225),
) -> dict[str, Any]:
    return {
        "resolution": resolution,
        "eval_crop": "resize_crop",
        "eval_crop_fraction": resolution / resize,
        "interpolation": interpolation,
        "mean": mean,
        "std": std,
    }


def _hugging_face_files(repository: str, files: tuple[str, ...]) -> list[pathlib.Path]:
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise UserError(
            f"{repository}: needs the package huggingface_hub, which can't be imported ({error}); pip install"
            " 'mnv2_jax[convert]'"
        ) from error
    try:
        try:
            return [
                pathlib.Path(huggingface_hub.hf_hub_download(repository, file, local_files_only=True)) for file in files
            ]
        except LocalEntryNotFoundError:
            # Without a network hf_hub_download would go on trying for half a minute; this asks once.
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repository, files[0]), timeout=TIMEOUT_SECONDS
            )
            return [
                pathlib.Path(huggingface_hub.hf_hub_download(repository, file, etag_timeout=TIMEOUT_SECONDS))
                for file in files
            ]
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repository}: Hugging Face has no weights of this name; correct the tag (https://huggingface.co/timm"
            " lists them), or leave it away for timm's default"
        ) from error
    except Exception as error:  # requests', httpx's and its own have no parent in common
        url = f"https://huggingface.co/{repository}/resolve/main"
        both = " and ".join(f"{url}/{file}" for file in reversed(files))
        remedy = f"download {both} elsewhere, keep them together in one folder, and convert the former"
        raise UserError(_unreachable(repository, error, remedy)) from error


def _unreachable(name: str, error: Exception, remedy: str) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{name}: can't be downloaded ({reason}); connect to the internet and start again, or {remedy}"


# --- torchvision --------------------------------------------------------------------------------------------


def _fetch_torchvision(name: str, entry: _Torchvision) -> Fetched:
    path = _cache_folder() / entry.file
    url = TORCHVISION_URL + entry.file
    try:
        if not (path.is_file() and _is_whole(path)):
            _download(name, url, path)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it is also the response
        raise UserError(_unreachable(name, error, f"download {url} elsewhere and convert that file")) from error
    except OSError as error:
        raise UserError(
            f"{path}: can't be read or written ({error.strerror}); mend that, or set MNV2_JAX_CACHE to a folder that"
            " can be written"
        ) from error
    return Fetched(path=path, source="torchvision", model=entry.model, preprocessing=_preprocessing(224, entry.resize))


def _cache_folder() -> pathlib.Path:
    return pathlib.Path(os.path.expanduser(os.environ.get("MNV2_JAX_CACHE") or "~/.cache/mnv2_jax/weights"))


def _is_whole(path: pathlib.Path) -> bool:
    """Whether a file has the SHA-256 whose first digits its name ends in."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(path.stem.rsplit("-", 1)[1])


def _download(name: str, url: str, path: pathlib.Path) -> None:
    """Puts a file into its place once it is whole; whatever happens, no part of it stays behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download_", dir=path.parent) as folder:
        part = pathlib.Path(folder, path.name)
        with _opener().open(url, timeout=TIMEOUT_SECONDS) as response, open(part, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0) or None
            # On a terminal only.
            with tqdm.tqdm(desc=name, total=size, unit="B", unit_scale=True, leave=False, disable=None) as bar:
                while chunk := response.read(1 << 20):
                    file.write(chunk)
                    bar.update(len(chunk))
        if not _is_whole(part):
            raise UserError(
                f"{name}: what came from {url} ({part.stat().st_size} bytes) doesn't have the SHA-256 that the file's"
                " name ends in: it was cut short or changed on its way, and isn't kept; start again"
            )
        os.replace(part, path)


def _opener() -> urllib.request.OpenerDirector:
    """Speaks HTTP and HTTPS, redirects included; urllib's own would open files and FTP as well."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener
