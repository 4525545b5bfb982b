"""What the pages of docs/ have people run, taken out of them and run; what `mnv2_jax` is said to have is there."""

import contextlib
import importlib
import io
import json
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from PIL import Image

import mnv2_jax
from mnv2_jax import UserError, open_data
from mnv2_jax.models.plan import Block, Plan
from mnv2_jax.nn.blocks import InvertedResidual
from mnv2_jax.registry import DATASETS, MODELS, TASKS
from tests import cli, docs

SMALLER = {"STEPS = 200": "STEPS = 2", '"mobilenet_v2"': '"tiny"', "width=0.35, ": ""}
"""What makes a page's loop short."""
SHORT = (
    "--config.train.epochs=0.05",
    "--config.finetune.train_from=('classifier',)",
    "--config.model.name=squeezed_v2",
    "--config.model.width=0.1",
    "--config.model.depth=0.1",
    "--config.data.resolution=16",
    "--config.modules=(my_loss,my_network)",
    "--json",
)
"""What makes a page's training short, and one of its network as well."""


def tiny(model):
    """The fewest blocks that a network can have."""
    del model
    block = Block(module=InvertedResidual, options=FrozenDict(features=8, hidden=None, act="relu6"), stride=2, stage=0)
    return Plan(stem=8, blocks=(block,) * 4, act="relu6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader of the page works: its files lie there, and nothing of the tests is registered."""
    folder = tmp_path_factory.mktemp("page")
    docs.write_files(docs.LIBRARY, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        for registry in (DATASETS, MODELS):
            patch.setattr(registry, "_registered", {})
        patch.setattr(TASKS, "_registered", {k: v for k, v in TASKS._registered.items() if k == "classification"})
        for name in docs.files(docs.LIBRARY):
            patch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
        mnv2_jax.register_model("tiny", tiny)
        yield folder


def run(words, *more):
    """Runs a command of a page, ``python …``, in this process: what it prints."""
    program, *arguments = words
    assert program == "python"
    if arguments[0] == "-m":
        result = cli.here(arguments[1].removeprefix("mnv2_jax."), *arguments[2:], *more)
        assert result.returncode == 0, result.stderr
        return result.stdout
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(arguments[0], run_name="__main__")
    return out.getvalue()


def commands(word):
    """Those of the page in which something is named."""
    return [words for words in docs.commands(docs.LIBRARY) if any(word in given for given in words)]


def test_the_notebook_is_the_page():
    """Otherwise: python -m tests.docs"""
    assert docs.LIBRARY.with_suffix(".ipynb").read_text() == docs.notebook(docs.LIBRARY)


def test_the_loop(folder):
    source = (folder / "loop.py").read_text()
    for whole, small in SMALLER.items():
        assert whole in source
        source = source.replace(whole, small)
    (folder / "loop.py").write_text(source)
    assert re.fullmatch(r"\d+ of 360 right\n", run(commands("loop.py")[0]))
    model, variables, info = mnv2_jax.load_weights("digits.safetensors")
    assert (model.name, info.labels, info.preprocessing.resolution) == ("tiny", tuple("0123456789"), 16)
    seen = mnv2_jax.normalise(jnp.zeros((1, 16, 16, 3), jnp.uint8), info.preprocessing.mean, info.preprocessing.std)
    assert "block_4" in model.endpoints(jax.device_put(variables), seen)


def test_data_loss_and_network_are_trained_evaluated_and_predict(folder, monkeypatch):
    train, evaluate, convert = commands("runs/focal")
    summary = json.loads(run(train, *SHORT))
    assert (summary["model"], summary["data"], summary["eval"]["count"]) == ("squeezed_v2", "parity", 360)
    held = json.loads((folder / "runs/focal/config.json").read_text())
    assert (held["task"], held["modules"]) == ("focal", ["my_loss", "my_network", "my_data"])
    for registry, module in ((TASKS, "my_loss"), (MODELS, "my_network"), (DATASETS, "my_data")):
        monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(registry, "_registered", {k: v for k, v in registry._registered.items() if v[1] != module})
    assert json.loads(run(evaluate, "--json"))["eval"]["top1"] == summary["eval"]["top1"]  # who opens it imports them
    run(convert)
    monkeypatch.delitem(TASKS._registered, "focal")
    Image.new("RGB", (20, 24), (200, 200, 200)).save("photo.png")
    predict = "python -m mnv2_jax.predict --weights=focal.safetensors --modules=my_network --json photo.png"
    assert {row["label"] for row in json.loads(run(predict.split()))[0]["top"]} == {"even", "odd"}


def test_the_loss_is_the_published_one(folder):
    """Lin et al., equation 4; with gamma 0 it is the cross-entropy, also of smoothed labels."""
    import my_loss

    logits, labels = jax.random.normal(jax.random.key(0), (5, 3)), jnp.array([0, 2, 1, 1, 0])
    plain = mnv2_jax.Classification(**dict.fromkeys(("model", "data", "augment", "class_names"), None), **ZEROS)
    focal = my_loss.Focal(**{**vars(plain), "label_smoothing": 0.0})
    p = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(5), labels]
    np.testing.assert_allclose(focal.label_loss(logits, labels), -((1 - p) ** 2) * np.log(p), rtol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(my_loss, "GAMMA", 0.0)
        smoothed = my_loss.Focal(**vars(plain))
        np.testing.assert_allclose(smoothed.label_loss(logits, labels), plain.label_loss(logits, labels), rtol=1e-5)


ZEROS = dict(label_smoothing=0.1, seed=0, group_size=1)


def test_what_is_exported_is_there_completes_and_costs_nothing_before():
    for name in mnv2_jax.__all__:
        assert getattr(mnv2_jax, name).__doc__, name
    code = "import sys, mnv2_jax as m; assert {*m.__all__} <= {*dir(m)}; print(*{'jax', 'numpy'} & {*sys.modules})"
    told = subprocess.run([sys.executable, "-c", code], cwd=cli.ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "\n"
    assert {name for name in dir(mnv2_jax) if not name.startswith("_")} >= {*mnv2_jax.__all__}
    assert not {"importlib", "Any"} & {*dir(mnv2_jax)}


def test_the_console_script_finds_modules_where_it_is_started(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    monkeypatch.setattr(sys, "argv", ["mnv2"])
    importlib.import_module("mnv2_jax.__main__").run()
    assert sys.path[0] == ""
    assert "usage: mnv2" in capsys.readouterr().out


def test_a_config_whose_module_is_elsewhere_is_one_line(tmp_path):
    (tmp_path / "experiment.py").write_text("import no_such_module\n")
    result = cli.here("main", f"--config={tmp_path / 'experiment.py'}")
    assert result.returncode == 2
    assert "no_such_module" in result.stderr
    assert "PYTHONPATH" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(flip=False), "in the step"),
        (dict(crop="shift"), "random_shift"),
        (dict(resolutoin=16), "did you mean 'data.resolution'"),
        (dict(resolution=4), "data.resolution=4"),
        (dict(path=pathlib.Path("nowhere"), name="folder"), "nowhere"),
    ],
)
def test_data_that_a_loop_cannot_have_are_one_line(options, said):
    with pytest.raises(UserError, match=said):
        open_data(**{"name": "digits", **options})


def test_a_loop_has_every_image_once_and_hears_of_damaged_ones(tmp_path):
    for split in ("train", "val"):
        for number in range(4):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 8), (number, 0, 0)).save(path)
    options = dict(path=tmp_path, resolution=8, batch_size=2, eval_batch_size=3, num_workers=0)
    data = open_data("folder", **options)
    batches = list(data.eval_batches())
    assert np.concatenate([batch["index"][batch["mask"]] for batch in batches]).tolist() == [0, 1, 2, 3]
    first, again = next(data.train_batches(seed=3, start_step=5)), next(data.train_batches(seed=3, start_step=5))
    assert first["image"].shape == (2, 8, 8, 3)
    np.testing.assert_array_equal(first["image"], again["image"])
    (tmp_path / "val" / "b" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"3\.png"):
        list(open_data("folder", **options).eval_batches())
    whole = open_data("folder", **options, skip_corrupt=True).eval_batches()
    assert sum(int(batch["mask"].sum()) for batch in whole) == 3


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_whole_notebook_from_its_first_cell_to_its_last(tmp_path, monkeypatch, optimized):
    """As a notebook does: one namespace that is __main__, files by %%writefile, commands behind an exclamation mark."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(cli.ROOT))
    out, namespace = io.StringIO(), {"__name__": "__main__"}
    for cell in json.loads(docs.LIBRARY.with_suffix(".ipynb").read_text())["cells"]:
        source = "".join(cell["source"]).replace("epochs = 10", "epochs = 1")
        if cell["cell_type"] == "markdown":
            continue
        if source.startswith("%%writefile "):
            first, _, content = source.partition("\n")
            pathlib.Path(first.split()[1]).write_text(content)
        elif source.startswith("!"):
            for line in source.splitlines():
                result = subprocess.run(
                    [sys.executable, *shlex.split(line)[1:]],
                    env=cli.environment(),
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert result.returncode == 0, result.stderr
                out.write(result.stdout)
        else:
            with contextlib.redirect_stdout(out):
                exec(compile(source, "cell", "exec"), namespace)
    assert int(re.search(r"(\d+) of 360 right", out.getvalue())[1]) > 300
    assert sorted(path.parent.name for path in tmp_path.glob("runs/*/report.html")) == ["focal", "parity", "squeezed"]
    assert len(list(tmp_path.glob("runs/*/evaluation-test.json"))) == 2
