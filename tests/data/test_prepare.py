"""ImageNet prepared from each of its forms: the same bytes even after a kill, and errors that name each problem."""

import concurrent.futures
import csv
import hashlib
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import psutil
import pytest
from PIL import Image
from scipy.io import savemat

from mnv2_jax.config import DataConfig
from mnv2_jax.data import imagenet, shards
from mnv2_jax.data.prepare import originals, run
from mnv2_jax.data.prepare.verify import verify
from mnv2_jax.data.sources import open_dataset
from mnv2_jax.errors import UserError
from tests import cli
from tests.data.conftest import smooth_image

IDS = imagenet.class_ids()
TRAIN = {0: 3, 1: 2, 7: 2, 231: 2, 500: 2, 999: 3}
VAL = [7, 0, 999, 1, 231, 500, 0, 999]  # of image 1, 2, …
PNG = "n02105855_2933.JPEG"  # ImageNet has one PNG of that name


def encoded(seed: int, form: str = "JPEG", mode: str = "RGB") -> bytes:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 60, 2)
    file = io.BytesIO()
    Image.fromarray(smooth_image(rng, height, width)).convert(mode).save(file, form)
    return file.getvalue()


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    return original_files()


def original_files() -> dict[str, bytes]:
    """Some images by SPLIT/WNID/NAME; among them a PNG and a JPEG in CMYK, as in the original, and a grey one."""
    files = {}
    for label, count in TRAIN.items():
        for i in range(count):
            files[f"train/{IDS[label]}/{IDS[label]}_{9 + i}.JPEG"] = encoded(100 * label + i)
    assert IDS[230] == "n02105855"
    files[f"train/{IDS[230]}/{PNG}"] = encoded(1, "PNG")
    files[f"train/{IDS[0]}/{IDS[0]}_9.JPEG"] = encoded(2, mode="CMYK")
    files[f"train/{IDS[7]}/{IDS[7]}_9.JPEG"] = encoded(3, mode="L")
    for number, label in enumerate(VAL, 1):
        files[f"val/{IDS[label]}/ILSVRC2012_val_{number:08d}.JPEG"] = encoded(10**6 + number)
    return files


def write_files(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


@pytest.fixture
def tree(images, tmp_path) -> pathlib.Path:
    return write_files(tmp_path / "tree", images)


def add(archive: tarfile.TarFile, name: str, content: bytes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def tar_of(files: dict[str, bytes], mode="w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            add(archive, name, content)
    return out.getvalue()


def devkit() -> dict[str, bytes]:
    """A development kit; its meta.mat has the original form: structures, n×1, the 1000 classes first and shuffled."""
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    names.append("num_train_images")
    rows = np.zeros((1003, 1), [(name, object) for name in names])
    order = np.random.default_rng(5).permutation(1000)
    for i, label in enumerate(order):
        count = TRAIN.get(int(label), 0) + (label == 230)
        rows[i, 0] = (float(i + 1), IDS[label], "a word, another", "a gloss", 0.0, np.zeros((1, 0)), 0.0, float(count))
    for i in range(1000, 1003):
        rows[i, 0] = (float(i + 1), f"n0000000{i % 7}", "entity", "inner", 2.0, np.array([[3.0, 4.0]]), 5.0, 0.0)
    file = io.BytesIO()
    savemat(file, {"synsets": rows})
    place = {int(label): i + 1 for i, label in enumerate(order)}
    return {
        "data/meta.mat": file.getvalue(),
        "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{place[label]}\n" for label in VAL).encode(),
    }


def write_tars(root: pathlib.Path, images: dict[str, bytes]) -> pathlib.Path:
    """The files as they are published; nothing in them is sorted."""
    root.mkdir()
    inner = {}
    for wnid in sorted({name.split("/")[1] for name in images if name.startswith("train")}, reverse=True):
        some = {name.split("/")[2]: content for name, content in images.items() if name.startswith(f"train/{wnid}/")}
        inner[f"{wnid}.tar"] = tar_of(dict(reversed(some.items())))
    flat = {name.split("/")[2]: content for name, content in images.items() if name.startswith("val/")}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(flat))
    kit = {f"ILSVRC2012_devkit_t12/{name}": content for name, content in devkit().items()}
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(kit, "w:gz"))
    return root


@pytest.fixture
def in_process(monkeypatch):
    """Replaces the worker processes by threads, which start faster."""
    monkeypatch.setattr(run, "_pool", concurrent.futures.ThreadPoolExecutor)


def prepare(source, out, form="arrayrecord", workers=1, allow_incomplete=True, skip_corrupt=False):
    return run.prepare(source, out, form, workers, allow_incomplete, skip_corrupt, lambda *_: None, lambda _: None)


def hashes(out: pathlib.Path) -> dict[str, str]:
    """SHA-256 of every file, the manifest excepted, and what the manifest says of the shards."""
    found = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob("*")
        if path.is_file() and path.name not in (".lock", "manifest.json")
    }
    plan = json.loads((out / "manifest.json").read_text())
    return found | {row["name"] + "!": json.dumps(row | {"plan": 0}) for row in plan["shards"]}


def records(out: pathlib.Path) -> dict[str, bytes]:
    """The images in the shards, by SPLIT/WNID/NAME."""
    from array_record.python.array_record_module import ArrayRecordReader

    found = {}
    for path in sorted(out.glob("*.arrayrecord")):
        reader = ArrayRecordReader(str(path))
        assert reader.writer_options_string().startswith("group_size:1,")
        for label, name, content in map(shards.unpack, reader.read_all()):
            found[f"{path.name.split('-')[0]}/{IDS[label]}/{name}"] = content
        reader.close()
    return found


# --- the same from every form -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(images, tmp_path_factory) -> pathlib.Path:
    """A folder that two worker processes prepared from a tree of files."""
    top = tmp_path_factory.mktemp("prepared")
    manifest, damaged = prepare(write_files(top / "tree", images), top / "out", workers=2)
    assert manifest.complete
    assert damaged == {}
    return top / "out"


def test_the_bytes_are_kept_in_order(images, prepared):
    kept = records(prepared)
    assert kept == images
    assert list(kept) == sorted(images)
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert manifest["splits"]["train"]["images"] == 15
    assert manifest["splits"]["val"]["classes"][IDS[999]] == 2
    first = manifest["shards"][0]
    assert (first["name"], first["classes"]) == ("train-00000-of-00200.arrayrecord", {IDS[0]: 3, IDS[1]: 2})
    assert first["sha256"] == hashlib.sha256((prepared / first["name"]).read_bytes()).hexdigest()
    assert not (prepared / ".partial").exists()


def flat_val(root, images):
    files = {("val/" + name.split("/")[2] if name[:3] == "val" else name): data for name, data in images.items()}
    return write_files(root, files)


def with_devkit(root, images):
    return write_files(flat_val(root, images), {f"ILSVRC2012_devkit_t12/{name}": d for name, d in devkit().items()})


def with_wnids(root, images):
    text = "".join(f"{IDS[label]}\n" for label in VAL).encode()
    return write_files(flat_val(root, images), {"imagenet_2012_validation_synset_labels.txt": text})


def with_indices(root, images):
    text = "".join(f"ILSVRC2012_val_{i:08d}.JPEG {label}\n" for i, label in enumerate(VAL, 1)).encode()
    return write_files(flat_val(root, images), {"val.txt": text})


def of_kaggle(root, images):
    flat_val(root / "ILSVRC/Data/CLS-LOC", images)
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = [(f"ILSVRC2012_val_{i:08d}", f"{IDS[k]} 1 2 3 4 {IDS[k]} 5 6 7 8 ") for i, k in enumerate(VAL, 1)]
        csv.writer(file).writerows([("ImageId", "PredictionString"), *rows[::-1]])
    return root


def inside_kaggle(root, images):
    return of_kaggle(root, images) / "ILSVRC/Data/CLS-LOC"


FORMS = (write_tars, with_devkit, with_wnids, with_indices, of_kaggle, inside_kaggle)


@pytest.mark.parametrize("write", FORMS)
def test_every_form_gives_the_same(images, prepared, tmp_path, in_process, write):
    prepare(write(tmp_path / "source", images), tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(prepared)


def test_a_copy_of_tfds_gives_the_same(images, prepared, tmp_path, in_process):
    import tensorflow_datasets as tfds

    wnids = [IDS[label] for label in sorted([*TRAIN, 230])]

    class Copy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "imagenet2012"
        VERSION = tfds.core.Version("5.1.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=wnids),
                "file_name": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("train/"), "validation": self._generate_examples("val/")}

        def _generate_examples(self, split):
            for name, content in images.items():
                if name.startswith(split):
                    _, wnid, file = name.split("/")
                    yield name, {"image": io.BytesIO(content), "label": wnid, "file_name": file}

    tfds.disable_progress_bar()
    Copy(data_dir=tmp_path / "source", file_format="array_record").download_and_prepare()
    prepare(tmp_path / "source", tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(prepared)


def test_folders(images, tmp_path, in_process):
    out = tmp_path / "out"
    prepare(write_tars(tmp_path / "source", images), out, "folder")
    for name, content in images.items():
        assert (out / name).read_bytes() == content
    assert {path.name for path in out.iterdir()} == {".lock", "checksums", "manifest.json", "train", "val"}
    listed = "".join(path.read_text() for path in sorted((out / "checksums").iterdir()))
    assert listed == "".join(f"{hashlib.sha256(images[name]).hexdigest()}  {name}\n" for name in sorted(images))
    before = (out / "manifest.json").read_bytes()
    prepare(tmp_path / "source", out, "folder")
    assert (out / "manifest.json").read_bytes() == before
    # A file too few or too many has its classes written again.
    (out / f"train/{IDS[1]}/{IDS[1]}_9.JPEG").unlink()
    (out / f"val/{IDS[0]}/more.JPEG").write_bytes(b"")
    found = verify(out, 2, lambda _: None)
    assert [line.split(": ")[1] for line in found] == ["missing", "not in checksums/val-00000-of-00020.sha256"]
    prepare(tmp_path / "source", out, "folder")
    assert verify(out, 2, lambda _: None) == []
    assert (out / "manifest.json").read_bytes() == before


# --- killed, and not alone ----------------------------------------------------------------------------------


def command(source, out, *flags, workers=1):
    flags = ("imagenet", f"--source={source}", f"--out={out}", f"--workers={workers}", "--allow-incomplete", *flags)
    return cli.command("data.prepare", *flags)


def test_killed_and_resumed(tree, prepared, tmp_path, in_process):
    out, blocks = tmp_path / "out", tree / f"train/{IDS[7]}/{IDS[7]}_9.JPEG"
    content = blocks.read_bytes()
    blocks.unlink()
    os.mkfifo(blocks)  # whoever reads it waits
    with subprocess.Popen(command(tree, out, workers=2), stdout=subprocess.PIPE, text=True, cwd=cli.ROOT) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(8)]
            assert lines[-1].endswith("(8/9)\n"), lines
            assert not any("train-00001" in line for line in lines)
            children = psutil.Process(process.pid).children(recursive=True)
            with pytest.raises(UserError, match=r"--out=.*another process") as caught:
                prepare(tree, out)
            assert "\n" not in str(caught.value)
        finally:
            process.kill()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []
    with pytest.raises(UserError, match=r"mnv2_jax\.data\.prepare"):
        shards.open_splits(str(out), None)
    blocks.unlink()
    blocks.write_bytes(content)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.arrayrecord")}
    assert len(kept) == 8
    prepare(tree, out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # not written again
    assert hashes(out) == hashes(prepared)
    assert not (out / ".partial").exists()


@pytest.mark.parametrize("victim", ["main process", "worker"])
def test_interrupted(tree, tmp_path, victim):
    blocks = tree / f"train/{IDS[0]}/{IDS[0]}_9.JPEG"
    blocks.unlink()
    os.mkfifo(blocks)
    # A shell's background jobs ignore Ctrl-C, and hand that down.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        command(tree, tmp_path / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=cli.ROOT
    )
    signal.signal(signal.SIGINT, before)
    while not list((tmp_path / "out").glob(".partial/*")):
        assert process.poll() is None
        time.sleep(0.02)
    if victim == "main process":
        process.send_signal(signal.SIGINT)
        expected = (130, "interrupted")
    else:
        (worker,) = [p for p in psutil.Process(process.pid).children() if "spawn_main" in " ".join(p.cmdline())]
        worker.kill()
        expected = (2, "error: a worker process was killed")
    try:
        _, said = process.communicate(timeout=60)
    finally:
        for child in (*psutil.Process(process.pid).children(), process) if process.poll() is None else ():
            child.kill()
    assert (process.returncode, said[: len(expected[1])], said.count("\n")) == (*expected, 1)


def test_full_disk(tree, tmp_path):
    limited = ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *command(tree, tmp_path / "out")]  # blocks of 1 KiB
    result = subprocess.run(limited, capture_output=True, text=True, cwd=cli.ROOT, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "(write() failed: File too large" in result.stderr
    assert result.stderr.count("\n") == 1


def test_shards_that_are_cut_off_are_written_again(tree, prepared, tmp_path, in_process):
    out = tmp_path / "out"
    prepare(tree, out)
    cut = out / "train-00046-of-00200.arrayrecord"
    with cut.open("r+b") as file:
        file.truncate(100)
    (out / "val-00000-of-00020.arrayrecord").unlink()
    prepare(tree, out)
    assert hashes(out) == hashes(prepared)


# --- what is amiss ------------------------------------------------------------------------------------------


def spoil(tree: pathlib.Path) -> list[str]:
    """Three damaged images of two shards, one of which is not an image at all; their names."""
    cut, empty, text = f"train/{IDS[0]}/{IDS[0]}_10.JPEG", f"train/{IDS[1]}/{IDS[1]}_9.JPEG", f"train/{IDS[231]}/x.JPEG"
    (tree / cut).write_bytes((tree / cut).read_bytes()[:300])
    (tree / empty).write_bytes(b"")
    (tree / text).write_text("<html>not found</html>")
    return [cut, empty, text]


def test_damaged_images_are_all_named(tree, tmp_path):
    names = spoil(tree)
    result = subprocess.run(
        command(tree, tmp_path / "out", workers=2), capture_output=True, text=True, cwd=cli.ROOT, check=False
    )
    assert result.returncode == 2
    *damaged, last = result.stderr.splitlines()
    assert [line.split(": ")[1] for line in damaged] == names
    assert last.startswith("error: 3 damaged images in --source; ")


def test_damaged_images_may_be_skipped(tree, images, prepared, tmp_path, in_process):
    names, out = spoil(tree), tmp_path / "out"
    assert not prepare(tree, out)[0].complete
    manifest, damaged = prepare(tree, out, skip_corrupt=True)
    assert manifest.complete
    assert list(damaged) == names
    listed = json.loads((out / "manifest.json").read_text())["shards"]
    assert [name for row in listed for name in row["damaged"]] == names
    assert records(out) == {name: content for name, content in images.items() if name not in names}
    # Restored, they are taken up when the command is given without the flag.
    write_files(tree, images)
    (tree / names[-1]).unlink()
    with pytest.raises(UserError, match=r"train-00046-of-00200\.arrayrecord .*--source="):
        prepare(tree, out)
    (tree / names[-1]).write_bytes(encoded(9))
    assert prepare(tree, out)[0].complete
    assert records(out).items() > images.items()


def test_damage_inside_a_tar(images, tmp_path, in_process):
    source = write_tars(tmp_path / "source", images | {f"train/{IDS[7]}/{IDS[7]}_77.JPEG": b"no"})
    _, damaged = prepare(source, tmp_path / "out")
    assert list(damaged) == [f"train/{IDS[7]}/{IDS[7]}_77.JPEG"]


@pytest.mark.parametrize("form", shards.FORMATS)
def test_damaged_tars_of_classes_are_all_named(images, tmp_path, in_process, form):
    source, out = write_tars(tmp_path / "source", images), tmp_path / "out"
    whole = source / "ILSVRC2012_img_train.tar"
    with tarfile.open(whole) as archive:
        first, second = (archive.getmember(f"{IDS[label]}.tar").offset_data for label in (1, 500))
    content = bytearray(whole.read_bytes())
    content[first] ^= 1  # of the header of the first image
    content[content.index(f"{IDS[500]}_9.JPEG".encode(), second)] ^= 1  # of that of the second
    whole.write_bytes(content)
    manifest, damaged = prepare(source, out, form)
    assert not manifest.complete
    assert list(damaged) == [f"train/{IDS[1]}/*", f"train/{IDS[500]}/*"]
    assert all("can't be read as a tar" in reason for reason in damaged.values())
    manifest, _ = prepare(source, out, form, skip_corrupt=True)
    assert sum(manifest.counts("train").values()) == 15 - 4
    assert verify(out, 1, lambda _: None) == []


def test_unreadable_images_are_named_too(tree, tmp_path, in_process):
    broken = tree / f"val/{IDS[0]}/ILSVRC2012_val_00000099.JPEG"
    broken.symlink_to("nowhere")
    _, damaged = prepare(tree, tmp_path / "out")
    (reason,) = damaged.values()
    assert reason.startswith(f"{broken}: can't be read (No such file")


def refusal(*arguments, **keywords) -> str:
    with pytest.raises(UserError) as caught:
        prepare(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files_are_named(images, tmp_path, in_process):
    source, out = write_tars(tmp_path / "source", images), tmp_path / "out"
    assert "missing: train/n01484850, train/n01491361" in refusal(source, out, allow_incomplete=False)
    without = {name: content for name, content in images.items() if "00000003" not in name}
    less = write_tars(tmp_path / "less", without)
    assert "ILSVRC2012_val_00000003.JPEG" in " ".join(originals.missing(originals.find(less, map, lambda _: None)))
    (source / "ILSVRC2012_img_train.tar").unlink()
    assert "missing: ILSVRC2012_img_train.tar or a folder train/, " in refusal(source, out, allow_incomplete=False)
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert "classes of the validation images" in (message := refusal(source, out))
    assert "ILSVRC2012_devkit_t12.tar.gz" in message
    (source / "ILSVRC2012_img_val.tar").unlink()
    message = refusal(source, out)
    assert message.startswith(f"--source={source}: ")
    assert "ILSVRC2012_img_train.tar" in message


def missing(source) -> list[str]:
    return originals.missing(originals.find(source, map, lambda _: None))


def test_missing_files_come_first(images, tmp_path, in_process):
    """A missing tar or development kit is listed first, then classes, then images."""
    source = write_tars(tmp_path / "source", images)
    train, val, kit = (source / f"ILSVRC2012_{name}" for name in ("img_train.tar", "img_val.tar", "devkit_t12.tar.gz"))
    content = kit.read_bytes()
    kit.unlink()
    first, *rest = missing(source)
    assert first == "ILSVRC2012_devkit_t12.tar.gz (the classes of the validation images)"
    assert rest == [f"train/{wnid}" for label, wnid in enumerate(IDS) if label not in {*TRAIN, 230}]
    train.unlink()
    assert missing(source) == ["ILSVRC2012_img_train.tar or a folder train/", first]
    write_files(source, images)  # folders say what their images are
    assert len(missing(source)) == 993 + 994 + 49_992
    val.unlink()
    (source / "val").rename(source / "elsewhere")
    assert missing(source)[0] == "ILSVRC2012_img_val.tar (with ILSVRC2012_devkit_t12.tar.gz) or a folder val/"
    kit.write_bytes(content)
    first, *rest = missing(source)
    assert first == "ILSVRC2012_img_val.tar or a folder val/"
    assert len(rest) == 993


def test_a_class_folder_comes_before_images(tree):
    for image in (tree / "val" / IDS[500]).iterdir():
        image.unlink()
    lacking = missing(tree)
    assert lacking.index(f"val/{IDS[500]}") < lacking.index("ILSVRC2012_val_00000006.JPEG")
    assert f"val/{IDS[999]}" not in lacking
    assert "ILSVRC2012_val_00000005.JPEG" not in lacking


def test_all_that_is_missing_is_listed(images, prepared, tmp_path, in_process):
    source, out = write_tars(tmp_path / "source", images), tmp_path / "out"
    (source / "ILSVRC2012_img_val.tar").unlink()
    said = refusal(source, out, allow_incomplete=False)
    lacking = (out / "missing.txt").read_text().splitlines()
    assert f"missing: ILSVRC2012_img_val.tar or a folder val/, {', '.join(lacking[1:5])} and 989 more" in said
    assert f"all of them in {out / 'missing.txt'}. Add it" in said
    assert lacking == missing(source)
    assert not shards.is_prepared(str(out))
    # Of few the message says all.
    (source / "ILSVRC2012_img_train.tar").unlink()
    write_files(source, {f"train/{wnid}/{wnid}_1.JPEG": b"" for wnid in IDS})
    (source / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert "missing.txt" not in refusal(source, out, allow_incomplete=False)
    assert len((out / "missing.txt").read_text().splitlines()) == 2
    # No longer asked for, it is gone, and never was a part of what is prepared.
    (out / ".missing.txt.7.tmp").touch()  # of a kill while it was written
    prepare(write_tars(tmp_path / "other", images), out)
    (out / ".missing.txt.7.tmp").unlink()
    assert hashes(out) == hashes(prepared)


@pytest.mark.parametrize("form", shards.FORMATS)
def test_the_list_of_what_is_missing_is_no_data(images, tmp_path, in_process, form):
    source, out = write_tars(tmp_path / "source", images), tmp_path / "out"
    prepare(source, out, form)
    manifest = (out / "manifest.json").read_bytes()
    data = DataConfig(name="imagenet", path=str(out))
    before = open_dataset(data)
    refusal(source, out, form, allow_incomplete=False)
    assert (out / "missing.txt").exists()
    assert (out / "manifest.json").read_bytes() == manifest
    assert verify(out, 1, lambda _: None) == []
    after = open_dataset(data)
    assert after.class_names == before.class_names
    assert np.array_equal(after.eval.labels, before.eval.labels)
    prepare(source, out, form)
    assert not (out / "missing.txt").exists()


def test_the_whole_is_whole(images, tmp_path, in_process, monkeypatch):
    """A whole ImageNet of few images: they are counted, of train by class, when the tars have been read."""
    monkeypatch.setattr(originals, "TOTALS", {"train": 15, "val": len(VAL)})
    real = originals.missing
    monkeypatch.setattr(originals, "missing", lambda found: [m for m in real(found) if m not in empty])
    empty = {f"train/{wnid}" for label, wnid in enumerate(IDS) if label not in {*TRAIN, 230}}
    manifest, _ = prepare(write_tars(tmp_path / "source", images), tmp_path / "out", allow_incomplete=False)
    assert manifest.complete
    lost = f"train/{IDS[999]}/{IDS[999]}_11.JPEG"
    less = write_tars(tmp_path / "less", {name: content for name, content in images.items() if name != lost})
    said = refusal(less, tmp_path / "less_out", allow_incomplete=False)
    assert f"missing: train/{IDS[999]}: 3 images, found 2. Add it" in said
    assert (tmp_path / "less_out" / "missing.txt").read_text() == f"train/{IDS[999]}: 3 images, found 2\n"
    assert not shards.read_manifest(str(tmp_path / "less_out")).complete


def cut_tar(source, out):
    (source / "ILSVRC2012_img_train.tar").write_bytes((source / "ILSVRC2012_img_train.tar").read_bytes()[:9000])


def damaged_val(source, out):
    content = bytearray((source / "ILSVRC2012_img_val.tar").read_bytes())
    content[content.index(b"ILSVRC2012_val_00000005")] ^= 1
    (source / "ILSVRC2012_img_val.tar").write_bytes(content)


def cut_kit(source, out):
    kit = source / "ILSVRC2012_devkit_t12.tar.gz"
    kit.write_bytes(kit.read_bytes()[:400])


def foreign_tar(source, out):
    (source / "ILSVRC2012_img_train.tar").write_bytes(tar_of({"n99999999.tar": b""}))


def foreign_class(source, out):
    (source / "ILSVRC2012_img_train.tar").unlink()
    (source / "train" / "cats").mkdir(parents=True)


def own_files(source, out):
    out.mkdir()
    (out / "thesis.tex").touch()


def other_format(source, out):
    prepare(source, out, "folder")


def other_images(source, out):
    prepare(source, out)
    (source / "ILSVRC2012_img_train.tar").write_bytes(tar_of({f"{IDS[0]}.tar": tar_of({"a.JPEG": encoded(1)})}))


def broken_manifest(source, out):
    out.mkdir()
    (out / "manifest.json").write_text('{"format_version": 1, "format": "arrayrecord", "shards": [{}]}')


def later_manifest(source, out):
    out.mkdir()
    (out / "manifest.json").write_text('{"format_version": 2, "format": "arrayrecord"}')


@pytest.mark.parametrize(
    ("spoils", "says"),
    [
        (cut_tar, r"ILSVRC2012_img_train\.tar: .*as a tar"),
        (damaged_val, r"ILSVRC2012_img_val\.tar: .*as a tar \(.*byte [\d,]+\)"),
        (cut_kit, r"devkit_t12\.tar\.gz: .* can't be read"),
        (foreign_tar, "'n99999999' .*1000 classes"),
        (foreign_class, "'cats' .*1000 classes"),
        (own_files, r"'thesis\.tex' .*manifest\.json"),
        (other_format, "--format=folder"),
        (other_images, r"train-00000-of-00200\.arrayrecord .*--source="),
        (broken_manifest, r"manifest\.json: .*complete manifest"),
        (later_manifest, "format_version=2"),
    ],
)
def test_refusals(images, tmp_path, in_process, spoils, says):
    source, out = write_tars(tmp_path / "source", images), tmp_path / "out"
    spoils(source, out)
    with pytest.raises(UserError, match=says) as caught:
        prepare(source, out)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_source(tmp_path, in_process):
    assert "nothing: not a folder; " in refusal(tmp_path / "nothing", tmp_path / "out")


# --- verify -------------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_bit(tree, tmp_path, in_process):
    out = tmp_path / "out"
    prepare(tree, out)
    assert verify(out, 2, lambda _: None) == []
    flipped, gone = out / "train-00001-of-00200.arrayrecord", out / "val-00019-of-00020.arrayrecord"
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    gone.unlink()
    result = cli.run("data.prepare", "verify", out)
    assert result.returncode == 2
    *found, last = result.stderr.splitlines()
    assert found == [f"{flipped}: damaged (its SHA-256 has changed)", f"{gone}: missing"]
    assert last.startswith(f"error: {out}: 2 files ")
    flipped.unlink()
    prepare(tree, out)
    assert verify(out, 2, lambda _: None) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("imagenet", "--source=."), "--source=DIR and --out=DIR"),
        (("verify",), "verify DIR"),
        (("imagenet", "--source=.", "--out=x", "--workers=0"), "--workers=0 .* 1"),
        (("imagenet", "--sauce=."), "'--sauce=.'; .*'--source'"),
    ],
)
def test_flags(flags, says, monkeypatch):
    from mnv2_jax.data.prepare import __main__

    monkeypatch.setattr(sys, "argv", ["prepare", *flags])
    with pytest.raises(UserError, match=says):
        __main__.main()
