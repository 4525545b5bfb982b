"""The page of a network: its files, the door, and what it computes in Chromium, opened from the disk."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from mnv2_jax.config import build
from mnv2_jax.data.images import evaluation_view
from mnv2_jax.errors import UserError
from mnv2_jax.export import check, onnx_file, runtimes, web
from mnv2_jax.weights.file import WeightsInfo
from tests import browser, cli
from tests.export.conftest import exportable, swap_channels

LABELS = ("cat", "</script><b>dog", "<!-- newt", 'a "bird" & co', "naïve ☃", "f", "g")
EMPTY = web.Runtime(b"", b"")


def labelled(**options):
    """A network of seven classes whose names are no HTML."""
    small = exportable(width=0.35, depth=0.3, **options)
    info = WeightsInfo(labels=LABELS, preprocessing=small.weights.info.preprocessing)
    return small._replace(weights=small.weights._replace(info=info))


def write(path, exported, runtime):
    """Writes the page of a network."""
    web.write(path, exported, onnx_file.to_bytes(exported.graph(), exported.facts()), runtime)


@pytest.fixture
def unpacked(tmp_path):
    """A folder with the names of onnxruntime-web's files."""
    folder = tmp_path / "package"
    (folder / "dist").mkdir(parents=True)
    for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm", "ort.webgpu.bundle.min.mjs"):
        (folder / "dist" / name).write_text(name)
    return folder


# --- the files ----------------------------------------------------------------------------------------------


def test_the_folder_is_complete_and_loads_nothing_else(tmp_path):
    write(tmp_path / "small-web", labelled(), web.Runtime(b"module", b"wasm"))
    names = {path.name for path in (tmp_path / "small-web").iterdir()}
    assert names == {"index.html", "network.js", "runtime.js", "runtime-wasm.js", "LICENSE-onnxruntime-web.txt"}
    page = (tmp_path / "small-web" / "index.html").read_text()
    assert not re.search(r"https?:|@import|url\(", page)
    facts = json.loads(re.search(r"id=facts>(.*?)</script>", page).group(1))
    assert facts["labels"] == list(LABELS)
    assert facts["preprocessing"]["mean"] == [0.3, 0.4, 0.5]
    assert (facts["name"], facts["resolution"], facts["top"]) == ("small", 64, 5)


def test_the_same_network_is_the_same_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "x-web", labelled(), EMPTY)
    assert cli.contents(tmp_path / "a") == cli.contents(tmp_path / "b")


def test_classes_without_names_have_numbers(tmp_path):
    small = labelled()
    nameless = small._replace(weights=small.weights._replace(info=WeightsInfo()))
    write(tmp_path / "x-web", nameless, EMPTY)
    assert '"labels": ["0", "1", "2"' in (tmp_path / "x-web" / "index.html").read_text()


def test_other_answers_than_classes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(web, "TopClasses", type(None))
    with pytest.raises(UserError, match="most probable classes"):
        write(tmp_path / "x-web", labelled(), EMPTY)


# --- the door -----------------------------------------------------------------------------------------------


def test_a_run_becomes_a_page_and_is_checked(trained, tmp_path, unpacked):
    result = cli.here(
        "export.__main__", trained[0], f"--out={tmp_path}", "--format=web", f"--runtime={unpacked}", "--json"
    )
    (row,) = cli.answer(result)["files"]
    assert (row["format"], row["path"]) == ("web", str(tmp_path / "trained-web"))
    assert row["difference"] <= check.BOUNDS["float32"].difference
    files = list((tmp_path / "trained-web").iterdir())
    assert row["size_mb"] == sum(path.stat().st_size for path in files) / 1e6


def test_a_page_that_computes_something_else_is_rejected(trained, tmp_path, unpacked, tampered):
    tampered(swap_channels)
    for _ in range(2):  # the second takes the place of the first
        result = cli.here(
            "export.__main__", trained[0], f"--out={tmp_path}", "--format=web", f"--runtime={unpacked / 'dist'}"
        )
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert not (tmp_path / "trained-web").exists()
        assert (tmp_path / "trained-web.rejected" / "index.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runtime=x", "--format=onnx"], "--format=web"),
        (["--format=web", "--pixels=float32"], "--pixels"),
        (["--format=web", "--outputs=answers"], "--outputs"),
        (["--format=web", "--runtime=nowhere"], "ort.wasm.bundle.min.mjs"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, tmp_path):
    result = cli.here("export.__main__", "x.safetensors", f"--out={tmp_path}", *arguments)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_a_machine_without_npm_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"no npm; .*--runtime=DIR"):
        web.read_runtime(None)


def test_a_failure_of_npm_is_one_line_with_its_reason(monkeypatch, tmp_path):
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho npm error code ENOTFOUND >&2\necho npm error a log >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(npm))
    with pytest.raises(UserError, match=r"\(npm error code ENOTFOUND\).*--runtime=DIR"):
        web.read_runtime(None)


# --- the page in a browser ----------------------------------------------------------------------------------
#
# These are slow for the package that npm fetches: 33 MB. Else they take 10 s together.


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A page that is ready, with its folder and its network."""
    if browser.CHROMIUM is None:
        pytest.skip("there is no Chromium")
    try:
        runtime = web.read_runtime(None)
    except UserError as error:
        pytest.skip(str(error))
    folder, small = tmp_path_factory.mktemp("web") / "small-web", labelled()
    write(folder, small, runtime)
    with browser.opened() as page:
        page.open(folder / "index.html")
        page.until("element('status').textContent === 'Ready.' || !element('error').hidden")
        assert page.value("element('error').textContent") == ""
        yield page, folder, small


def png(pixels):
    """The content of a picture."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def predicted(page, pixels):
    """What the page's function makes of a picture."""
    url = f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"
    source = (
        f"(async () => {{ const image = new Image(); image.src = '{url}'; await image.decode(); return image; }})()"
    )
    return page.value(f"{source}.then(predict).then(x => ({{...x, logits: [...x.logits], pixels: [...x.pixels]}}))")


def choose(page, path):
    """Chooses a file as a user does; returns the answers' rows and the error."""
    page.value("element('answers').replaceChildren(), fail('')")
    page.choose("#chooser", path)
    page.until("element('answers').children.length || !element('error').hidden")
    rows = page.value("[...element('answers').children].map(row => [...row.children].map(cell => cell.textContent))")
    return rows, page.value("element('error').textContent")


@pytest.mark.slow
def test_the_page_computes_what_the_model_does(shown, tmp_path):
    page, _, small = shown
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    expected = check.expected_outputs(small, pixels[None])["logits"][0]
    answer = predicted(page, pixels)
    largest = max(1, abs(expected).max())
    assert abs(np.array(answer["logits"]) - expected).max() <= check.BOUNDS["float32"].difference * largest
    probabilities = np.exp(expected) / np.exp(expected).sum()
    best = np.argsort(-probabilities)[:5]
    assert [row["index"] for row in answer["top"]] == best.tolist()
    np.testing.assert_allclose([row["probability"] for row in answer["top"]], probabilities[best], atol=1e-4)

    (tmp_path / "x.png").write_bytes(png(pixels))
    rows, error = choose(page, tmp_path / "x.png")
    assert error == ""
    assert [row[0] for row in rows] == [LABELS[index] for index in best]  # markup in a name is text
    np.testing.assert_allclose([float(row[1].split()[0]) for row in rows], 100 * probabilities[best], atol=0.051)
    assert re.search(r"\d ms", page.value("element('status').textContent"))


@pytest.mark.slow
def test_the_page_computes_integers(shown, v2, tmp_path):
    page, _, _ = shown
    network = onnx_file.to_bytes(v2.quantised, v2.exported.facts())
    web.write(tmp_path / "int8-web", v2.exported, network, web.read_runtime(None))
    page.open(tmp_path / "int8-web" / "index.html")
    page.until("element('status').textContent === 'Ready.' || !element('error').hidden")
    step = float(v2.quantised.grids[v2.quantised.graph.outputs["logits"]].scale)
    (tmp_path / "x.onnx").write_bytes(network)
    expected = runtimes.RUNTIMES["onnx"](str(tmp_path / "x.onnx"), 1)(v2.images[:1])["logits"][0]
    assert abs(np.array(predicted(page, v2.images[0])["logits"]) - expected).max() <= step * 1.01


@pytest.mark.slow
def test_a_picture_can_be_dropped(shown):
    page, _, _ = shown
    content = list(png(np.zeros((64, 64, 3), np.uint8)))
    page.value("element('answers').replaceChildren(), fail('')")
    page.value(
        "const dropped = new DataTransfer();"
        f"dropped.items.add(new File([new Uint8Array({content})], 'x.png'));"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: dropped, bubbles: true, cancelable: true}))"
    )
    page.until("element('answers').children.length === 5")
    assert page.value("element('error').textContent") == ""


@pytest.mark.slow
def test_the_page_asks_for_its_own_files_only(shown):
    page, folder, _ = shown
    schemes = {url.partition(":")[0] for url in page.loaded}
    assert schemes <= {"file", "blob", "data"}
    names = {url.rpartition("/")[2] for url in page.loaded if url.startswith("file:")}
    assert names == {path.name for path in folder.iterdir()} - {"LICENSE-onnxruntime-web.txt"}
    assert page.complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("eval_crop", ["resize_crop", "central"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [True, False])
def test_pictures_are_prepared_as_in_evaluation(shown, eval_crop, interpolation, antialias):
    page, _, _ = shown
    rng = np.random.default_rng(0)
    photo = load_sample_images().images[0]
    wide, tall, tiny = photo, photo[:, 100:301], rng.integers(0, 256, (20, 33, 3), np.uint8)
    for fraction in (0.875, 1.0):
        facts = dict(eval_crop=eval_crop, interpolation=interpolation, antialias=antialias, eval_crop_fraction=fraction)
        page.value(f"void Object.assign(preprocessing, {json.dumps(facts)})")
        for image in (wide, tall, tiny):
            expected = evaluation_view(image, build({"data": facts}).data, 64)
            seen = np.array(predicted(page, image)["pixels"]).reshape(64, 64, 3)
            differences = abs(seen - expected)
            if image is tall and antialias:  # some versions of Pillow begin with the columns here
                assert differences.max() <= 2
            else:
                assert differences.max() <= 1
                assert (differences > 0).mean() < (1e-9 if antialias else 2e-3)


@pytest.mark.slow
def test_a_photo_is_turned_upright_and_what_is_transparent_is_white(shown, tmp_path):
    page, _, _ = shown
    colours = np.zeros((64, 128, 3), np.uint8)
    colours[:, :64, 0] = colours[:, 64:, 2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the left becomes the top
    Image.fromarray(colours).save(tmp_path / "x.jpg", exif=exif, quality=95)
    assert choose(page, tmp_path / "x.jpg")[1] == ""
    top, bottom = page.value(
        "[8, 56].map(y => [...element('seen').getContext('2d').getImageData(32, y, 1, 1).data.slice(0, 3)])"
    )
    assert top[0] > 200 > 50 > top[2]
    assert bottom[2] > 200 > 50 > bottom[0]
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert choose(page, tmp_path / "clear.png")[1] == ""
    assert page.value("[...element('seen').getContext('2d').getImageData(32, 32, 1, 1).data]") == [255] * 4


@pytest.mark.slow
def test_what_is_no_picture_is_one_line_and_the_next_picture_is_answered(shown, tmp_path):
    page, _, _ = shown
    (tmp_path / "notes.txt").write_text("no picture")
    rows, error = choose(page, tmp_path / "notes.txt")
    assert (rows, "notes.txt" in error, "\n" in error) == ([], True, False)
    (tmp_path / "x.png").write_bytes(png(np.zeros((9, 200, 3), np.uint8)))
    rows, error = choose(page, tmp_path / "x.png")
    assert (len(rows), error) == (5, "")


@pytest.mark.slow
def test_the_camera_starts_and_stops(shown):
    page, _, _ = shown
    page.value("element('answers').replaceChildren(), fail('')")
    page.value("element('camera').click()")
    page.until("element('answers').children.length || !element('error').hidden")
    assert page.value("element('error').textContent") == ""
    assert page.value("element('camera').textContent") == "Stop the camera"
    page.value("element('camera').click()")
    page.until("element('camera').textContent === 'Start the camera'")
    assert page.value("element('video').srcObject.getTracks().every(track => track.readyState === 'ended')")


@pytest.mark.slow
def test_a_lost_file_is_named(shown, tmp_path):
    page, folder, _ = shown
    shutil.copytree(folder, tmp_path / "page")
    (tmp_path / "page" / "network.js").unlink()
    page.open(tmp_path / "page" / "index.html")
    page.until("!element('error').hidden")
    assert "network.js" in page.value("element('error').textContent")
