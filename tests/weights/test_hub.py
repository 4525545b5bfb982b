"""Weights by name, from a local server instead of the real host."""

import dataclasses
import hashlib
import http.server
import json
import math
import pathlib
import re
import sys
import threading
import time

import jax
import pytest

from mnv2_jax.errors import UserError
from mnv2_jax.models.registry import create_model
from mnv2_jax.weights import hub
from tests import cli

CONTENT = b"weights" * 1000
FILE = f"mobilenet_v2-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"
NAME = "torchvision/mobilenet_v2.v1"
CONFIG = {
    "architecture": "mobilenetv2_140",
    "pretrained_cfg": {
        "input_size": [3, 224, 224], "test_input_size": [3, 256, 256], "crop_pct": 0.95, "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25],
    },
}  # fmt: skip


class Host(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path in self.server.moved:
            self.send_response(302)
            self.send_header("Location", self.server.moved[self.path])
            self.end_headers()
            return
        body = self.server.files.get(self.path)
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"") + self.server.promised_more))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *args):
        pass


@pytest.fixture
def host(monkeypatch, tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host) as server:
        server.daemon_threads = False  # so that leaving the block waits for them
        server.over = threading.Event()
        server.files, server.moved, server.asked, server.promised_more = {f"/{FILE}": CONTENT}, {}, [], 0
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(hub, "TORCHVISION_URL", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setitem(hub.TORCHVISION, "mobilenet_v2.v1", hub._Torchvision(FILE, {"name": "mobilenet_v2"}))
        monkeypatch.setenv("MNV2_JAX_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").rglob("*"))


# --- torchvision --------------------------------------------------------------------------------------------


def test_a_download_is_kept_and_not_asked_for_again(host, tmp_path):
    fetched = hub.fetch(NAME)
    assert fetched.path.read_bytes() == CONTENT
    assert fetched.path == tmp_path / "cache" / FILE
    assert (fetched.source, fetched.model) == ("torchvision", {"name": "mobilenet_v2"})
    assert fetched.preprocessing == {
        "resolution": 224, "eval_crop": "resize_crop", "eval_crop_fraction": 0.875, "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    }  # fmt: skip
    assert hub.fetch(NAME) == fetched
    assert host.asked == [f"/{FILE}"]
    assert kept(tmp_path) == [FILE]


def test_a_damaged_file_in_the_cache_is_fetched_again(host):
    path = hub.fetch(NAME).path
    path.write_bytes(CONTENT[:-1])
    assert hub.fetch(NAME).path.read_bytes() == CONTENT


def test_the_wrong_file_is_not_kept(host, tmp_path):
    host.files[f"/{FILE}"] = b"<html>log in first</html>"
    with pytest.raises(UserError, match="SHA-256"):
        hub.fetch(NAME)
    assert kept(tmp_path) == []


def test_a_file_cut_short_is_not_kept(host, tmp_path):
    host.promised_more = 1
    host.files[f"/{FILE}"] = CONTENT[:-1]
    with pytest.raises(UserError, match="SHA-256"):
        hub.fetch(NAME)
    assert kept(tmp_path) == []


def test_redirects_are_followed_but_not_to_files(host, tmp_path):
    host.files["/elsewhere"] = host.files.pop(f"/{FILE}")
    host.moved[f"/{FILE}"] = "/elsewhere"
    assert hub.fetch(NAME).path.read_bytes() == CONTENT
    (tmp_path / "secret").write_bytes(CONTENT)
    (tmp_path / "cache" / FILE).unlink()
    for address in (f"file://{tmp_path}/secret", "ftp://127.0.0.1/secret"):
        host.moved[f"/{FILE}"] = address
        with pytest.raises(UserError, match=NAME):
            hub.fetch(NAME)


def test_only_http(host, tmp_path, monkeypatch):
    (tmp_path / FILE).write_bytes(CONTENT)
    monkeypatch.setattr(hub, "TORCHVISION_URL", f"file://{tmp_path}/")
    with pytest.raises(UserError, match="url type: file"):
        hub.fetch(NAME)


def test_a_missing_file_and_no_host_are_one_line_each(host, monkeypatch):
    host.files.clear()
    with pytest.raises(UserError, match=r"^torchvision/mobilenet_v2\.v1: .*404.* http.*\.pth") as e:
        hub.fetch(NAME)
    assert "\n" not in str(e.value)
    monkeypatch.setattr(hub, "TORCHVISION_URL", "http://127.0.0.1:1/")
    with pytest.raises(UserError, match="refused"):
        hub.fetch(NAME)


def test_a_host_that_says_nothing_is_given_up(host, monkeypatch):
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(Host, "do_GET", lambda self: self.server.over.wait(10))
    with pytest.raises(UserError, match="timed out"):
        hub.fetch(NAME)


def test_a_cache_that_cannot_be_written(host, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MNV2_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="MNV2_JAX_CACHE"):
        hub.fetch(NAME)


# --- timm ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hugging_face(monkeypatch, tmp_path):
    """A Hugging Face whose cache has config.json and model.safetensors for every name."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    asked = []

    def download(repo_id, filename, **options):
        asked.append(repo_id)
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


@pytest.mark.parametrize(
    ("name", "repository", "source", "model"),
    [
        ("timm/mobilenetv2_140.ra_in1k", "", "timm", {"name": "mobilenet_v2", "width": 1.4}),
        ("timm/mobilenetv2_100.any_tag", "", "timm", {"name": "mobilenet_v2"}),
        ("timm/mobilenetv4_conv_small", ".e2400_r224_in1k", "timm", {"name": "mobilenet_v4_conv_small"}),
        ("timm/tf_mobilenetv3_small_minimal_100.in1k", "", "timm_tf", {"name": "mobilenet_v3_small_minimalistic"}),
    ],
)
def test_timm_names(hugging_face, tmp_path, name, repository, source, model):
    fetched = hub.fetch(name)
    assert set(hugging_face) == {name + repository}
    assert (fetched.path, fetched.source, fetched.model) == (tmp_path / "model.safetensors", source, model)
    assert fetched.preprocessing["mean"] == (0.5, 0.5, 0.5)
    assert fetched.preprocessing["std"] == (0.25, 0.25, 0.25)
    assert (fetched.preprocessing["resolution"], fetched.preprocessing["interpolation"]) == (224, "bicubic")
    assert 224 / fetched.preprocessing["eval_crop_fraction"] == pytest.approx(235)  # 235.8 rounded down, as timm does


def test_a_config_without_preprocessing(hugging_face, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert hub.fetch("timm/mobilenetv2_100.ra_in1k").preprocessing is None


BAD = {
    "input_size": (
        [],
        [3],
        [3, 224, 0],
        [3, 224, 224.0],
        [3, 224, math.nan],
        ["3", "224", "224"],
        224,
        "224",
        {},
        [None],
    ),
    "crop_pct": (0, 0.0, -1, 1.5, 1e-320, math.nan, math.inf, 10**400, "0.9", "", [], {}, True, False),
    "interpolation": ("cubic", "", 3, [], {}, ["bicubic"]),
    "mean": ([], 0.5, "abc", "0.5", [0.5, 0.5], [0.5, 0.5, math.nan], [0.5, 0.5, None], [0.5, 0.5, "0.5"], {}, True),
    "std": ([], 0.5, "abc", [1, 1, 0], [1, 1, -1], [1, 1, math.inf], [1, 1, math.nan], [[1], [1], [1]], 10**400),
}
"""Invalid values in a timm config."""


@pytest.mark.parametrize("key", BAD)
def test_a_damaged_preprocessing_is_one_line(key, tmp_path):
    for value in BAD[key]:
        config = CONFIG | {"pretrained_cfg": CONFIG["pretrained_cfg"] | {key: value}}
        with pytest.raises(UserError, match=rf"^here: .*\.{key}=") as error:
            hub.timm_preprocessing(config, "here")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 200
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=rf"config\.json: .*\.{key}="):
            hub.read_config_beside(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "pretrained_cfg", [None, 3, [], "", {}, {"crop_pct": 0.9}, CONFIG["pretrained_cfg"] | {"mean": None}]
)
def test_a_preprocessing_that_is_not_whole_is_none(pretrained_cfg):
    assert hub.timm_preprocessing({"pretrained_cfg": pretrained_cfg}) is None
    assert hub.timm_preprocessing({}) is None


# --- timm's files, elsewhere --------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "mine.safetensors"])
@pytest.mark.parametrize("architecture", ["mobilenetv2_140", "tf_mobilenetv3_small_075", "mobilenetv3_small_050"])
def test_the_config_beside_says_what_the_name_would(hugging_face, tmp_path, architecture, file):
    named = hub.fetch(f"timm/{architecture}.any")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"architecture": architecture}))
    read = hub.read_config_beside(tmp_path / file)
    assert read == dataclasses.replace(named, path=tmp_path / file)
    assert read.source == ("timm_tf" if architecture.startswith("tf_") else "timm")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"1" * 5000, b"[]", b"null", b"{}", b'{"architecture": []}',
        json.dumps({"architecture": "mobilenetv2_140"}).encode(),
        json.dumps(CONFIG | {"architecture": "vit_base"}).encode(),
        json.dumps(CONFIG | {"architecture": ["mobilenetv2_140"]}).encode(),
        json.dumps(CONFIG | {"pretrained_cfg": "mobilenetv2_140"}).encode(),
        b'{"architectures": ["MobileNetV2ForImageClassification"], "model_type": "mobilenet_v2"}',
    ],
    ids=lambda content: content[:40].decode(errors="replace"),
)  # fmt: skip
def test_a_config_beside_that_is_not_timms(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    assert hub.read_config_beside(tmp_path / "model.safetensors") is None


def test_nothing_beside(tmp_path, monkeypatch):
    assert hub.read_config_beside(tmp_path / "model.safetensors") is None
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for other in ("model.h5", "model.tflite", "model.keras", "model.pth", "config.json"):
        assert hub.read_config_beside(tmp_path / other) is None
    monkeypatch.chdir(tmp_path)
    assert hub.read_config_beside(pathlib.Path("model.safetensors")).model == {"name": "mobilenet_v2", "width": 1.4}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert hub.read_config_beside(tmp_path / "model.safetensors") is None


def test_weights_that_hugging_face_does_not_have(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    error = errors.RepositoryNotFoundError.__new__(errors.RepositoryNotFoundError)  # wants an HTTP response
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: (_ for _ in ()).throw(error))
    with pytest.raises(UserError, match="correct the tag"):
        hub.fetch("timm/mobilenetv2_100.ra_in2k")


def test_no_network_is_said_within_seconds(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{filename}")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"^timm/mobilenetv2_100\.ra_in1k: .*refused") as e:
        hub.fetch("timm/mobilenetv2_100.ra_in1k")
    assert "\n" not in str(e.value)
    assert re.search(r"/main/model\.safetensors and http\S+/main/config\.json", str(e.value))
    assert time.monotonic() - start < 5


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"mnv2_jax\[convert\]"):
        hub.fetch("timm/mobilenetv2_100.ra_in1k")


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("timm/mobilenetv2_10.ra_in1k", "timm/mobilenetv2_1"),
        ("timm/mobilenetv3_larg_100.ra_in1k", "timm/mobilenetv3_large_100'"),
        ("torchvision/mobilenet_v2", "torchvision/mobilenet_v2.v"),
        ("torchvision/resnet50.v3", "torchvision/resnet50.v"),
        ("keras/mobilenet_v2", "torchvision/mobilenet_v2.v"),
    ],
)
def test_unknown_names(name, nearest):
    with pytest.raises(UserError, match=re.escape(f"did you mean '{nearest}")):
        hub.fetch(name)


def test_architectures_without_weights():
    with pytest.raises(UserError, match=r"timm .*mobilenetv2_035"):
        hub.fetch("timm/mobilenetv2_035")


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(hub.is_published_name(name) for name in hub.known_names())
    assert not hub.is_published_name("weights.safetensors")
    assert not hub.is_published_name("./timm/mobilenetv2_100")
    assert hub.is_published_name("timm/mine")
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "mine").touch()
    assert not hub.is_published_name("timm/mine")


def test_files_are_named_after_their_hash():
    for entry in hub.TORCHVISION.values():
        assert re.fullmatch(r"\w+-[0-9a-f]{8}\.pth", entry.file)


@pytest.mark.parametrize("model", [e.model for table in (hub.TIMM, hub.TORCHVISION) for e in table.values()], ids=str)
def test_our_models_have_these_arguments(model):
    create_model(num_classes=1000, **model)


# --- against the libraries ----------------------------------------------------------------------------------


@pytest.fixture
def timm(operators):
    return pytest.importorskip("timm")


@pytest.mark.parity
@pytest.mark.parametrize("architecture", hub.TIMM)
def test_timm_has_this_network_of_this_size(timm, architecture):
    torch = pytest.importorskip("torch")
    assert architecture in timm.list_models()
    with torch.device("meta"):
        theirs = timm.create_model(architecture)
    model = create_model(num_classes=1000, **hub.TIMM[architecture].model)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), "float32"))
    ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
    assert ours == sum(leaf.numel() for leaf in theirs.parameters())


@pytest.mark.parity
@pytest.mark.parametrize("architecture", hub.TIMM)
def test_timm_preprocesses_as_we_read(timm, architecture):
    from timm.data import create_transform, resolve_data_config
    from timm.models import get_pretrained_cfg, list_pretrained

    tag = hub.TIMM[architecture].tag
    default = get_pretrained_cfg(architecture)
    assert default.tag == tag or (tag is None and not default.has_weights)
    for name in [name for name in list_pretrained() if name.split(".")[0] == architecture]:
        theirs = get_pretrained_cfg(name).to_dict()
        ours = hub.timm_preprocessing({"pretrained_cfg": json.loads(json.dumps(theirs))})
        resize, crop, *_, normalise = create_transform(**resolve_data_config(pretrained_cfg=theirs)).transforms
        resolution = ours["resolution"]
        assert resize.size == round(resolution / ours["eval_crop_fraction"])
        assert tuple(crop.size) == (resolution, resolution)
        assert resize.interpolation.value == ours["interpolation"]
        assert tuple(normalise.mean.tolist()) == pytest.approx(ours["mean"])
        assert tuple(normalise.std.tolist()) == pytest.approx(ours["std"])


@pytest.mark.parity
@pytest.mark.parametrize("name", hub.TORCHVISION)
def test_torchvision_publishes_this(timm, name):
    models = pytest.importorskip("torchvision.models")
    model, version = name.split(".")
    weights = models.get_model_weights(model)[f"IMAGENET1K_{version.upper()}"]
    entry = hub.TORCHVISION[name]
    transforms = weights.transforms()
    assert weights.url == hub.TORCHVISION_URL + entry.file
    assert transforms.resize_size == [entry.resize]
    assert transforms.crop_size == [224]
    ours = hub._preprocessing(224, entry.resize)
    assert transforms.interpolation.value == ours["interpolation"]
    assert (tuple(transforms.mean), tuple(transforms.std)) == (ours["mean"], ours["std"])


def test_the_list_is_of_networks_that_we_have():
    names = hub.list_weights()
    assert {name.partition("/")[0] for name in names} == {"timm", "torchvision"}
    assert hub.list_weights("*mobilenet_v2*") == ["torchvision/mobilenet_v2.v1", "torchvision/mobilenet_v2.v2"]
    for name in names:
        assert hub.is_published_name(name)
        assert create_model(num_classes=1000, **hub.model_of(name)).num_classes == 1000
    printed = cli.here("convert", "--list").stdout
    assert all(name in printed for name in names)
    assert hub.DATE in printed
