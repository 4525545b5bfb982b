"""Imports go down, and only those who should know of linen, shardings and TensorFlow do; what is promised is there."""

import ast
import collections
import itertools
import pathlib
import re
import symtable
import tomllib

import pytest

import mnv2_jax
from mnv2_jax import config
from tests.conftest import SHAPED

ROOT = pathlib.Path(mnv2_jax.__file__).parent
ROOMS = (
    {"types", "errors", "interrupts", "json_files", "outputs", "registry"},
    {"config", "recipes", "presets", "flags"},
    {"nn", "ops", "processes"},
    {"graph"},
    {"models"},
    {"data"},
    {"weights"},
    {"runs"},
    {"report"},
    {"tasks"},
    {"training"},
    {"bench", "export", "study", "testing"},
    {"verbs"},
    {"main", "predict", "convert", "inspect", "lr_find", "__init__", "__main__"},
)
"""From the ground up. A room imports those above its own line here; on the first two lines its neighbours, too."""
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path):
    """The dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    """The file or folder of the top level that it lies in; the door of a room, `__main__`, is on the top floor."""
    return "main" if path.name == "__main__.py" else path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    for name in imports(path):
        if not name.startswith("mnv2_jax."):
            continue
        other = name.split(".")[1]
        same_room = other == room(path)
        assert same_room or FLOOR[other] < FLOOR[room(path)] or FLOOR[other] == FLOOR[room(path)] <= 1, name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_stay_in_their_rooms(path):
    names = set(imports(path))
    packages = {name.split(".")[0] for name in names}
    others = {"tensorflow", "timm", "torch", "torchvision", "keras"} & packages
    assert others <= {
        "weights/state_dicts.py": {"torch"},
        "bench/torch_rival.py": {"torch", "timm", "torchvision"},
    }.get(str(path.relative_to(ROOT)), set())
    if any(name.startswith("flax.linen") for name in names):
        assert room(path) in ("nn", "models")
    if room(path) == "data":
        assert not packages & {"flax", "jax", "optax"}
    if any("sharding" in name or "partitioning" in name for name in names):
        assert path in (ROOT / "training" / "mesh.py", ROOT / "nn" / "partition.py")


OF_NO_TASK = [
    *(ROOT / "data" / f"{name}.py" for name in ("streams", "workers", "shared", "views/base")),
    *(
        ROOT / "training" / f"{name}.py"
        for name in (
            "begin",
            "evaluate",
            "experiment",
            "feeds",
            "length",
            "loop",
            "mesh",
            "plan",
            "programs",
            "range_test",
            "run",
            "speed",
        )
    ),
    *(ROOT / "training" / f"{name}.py" for name in ("results", "state", "step", "writer")),
    *(path for name in ("runs", "processes") for path in sorted((ROOT / name).glob("*.py"))),
    ROOT / "tasks" / "base.py",
    ROOT / "registry.py",
    ROOT / "verbs.py",
    ROOT / "report" / "page.py",
    ROOT / "report" / "__main__.py",
]
"""What a task that isn't shipped goes through as classification does."""


@pytest.mark.parametrize("path", OF_NO_TASK, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_trunk_knows_no_task(path):
    tree = ast.parse(path.read_text())
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        keys = node.keys if isinstance(node, ast.Dict) else []
        keys = [node.slice] if isinstance(node, ast.Subscript) else keys
        if isinstance(node, ast.Call):
            keys = node.args[:1]
            is_test = isinstance(node.func, ast.Name) and node.func.id == "isinstance"
            assert not (is_test and getattr(node.args[0], "id", getattr(node.args[0], "attr", "")) == "task"), path
        names |= {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    assert not names & {"label", "top1", "top5", "confusion", "teacher_logits", "class_map", "miou"}
    of_tasks = {"mnv2_jax.data.views", "mnv2_jax.tasks", "mnv2_jax.report.sections", "mnv2_jax.report.segmentation"}
    allowed = ("mnv2_jax.data.views.base.", "mnv2_jax.tasks.base.")
    assert not [n for n in imports(path) if n.startswith(tuple(of_tasks)) and not n.startswith(allowed)]


def test_shapes_in_signatures_are_checked():
    for path in FILES:
        shapes = {name for name in imports(path) if name.startswith("jaxtyping.")} - {"jaxtyping.DTypeLike"}
        if room(path) in ("nn", "ops") and shapes:
            assert ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).startswith(SHAPED), path


def test_every_room_has_its_place():
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert rooms == set(FLOOR)


def test_main_is_short():
    assert len((ROOT / "main.py").read_text().splitlines()) <= 60


def test_configs_import_only_presets():
    for path in sorted((ROOT.parent / "configs").glob("*.py")):
        ours = {name for name in imports(path) if name.startswith(("mnv2_jax", "configs"))}
        assert ours <= {"mnv2_jax.presets"}, path


def test_names_in_docstrings_and_comments_exist():
    """Those of ours with a dot: `module.function`, `Class.method`, `optim.peak_lr`."""
    bound = collections.defaultdict(set)
    for path in FILES:
        source, place = path.read_text(), path.parent if path.name == "__init__.py" else path
        module = symtable.symtable(source, str(path), "exec")
        bound[place.parent.name].add(place.stem)
        bound[place.stem].update(module.get_identifiers())
        for inner in module.get_children():
            if inner.get_type() == "class":
                bound[inner.get_name()].update(inner.get_identifiers(), re.findall(r"\bself\.(\w+)", source))
    keys = config.flatten(config.to_dict(config.Config()))
    for path in FILES:
        for name in re.findall(r"(?<!`)`([A-Za-z_]\w*(?:\.\w+)+)`(?!`)", path.read_text()):
            for owner, owned in itertools.pairwise(name.split(".")):
                assert name in keys or owner not in bound or owned in bound[owner], f"{path}: `{name}`"


def test_every_file_is_in_the_wheel():
    """setuptools takes packages, and of other files what it is told."""
    setuptools = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    told = setuptools["package-data"]["mnv2_jax"]
    folders = {".".join(path.parent.relative_to(ROOT.parent).parts) for path in FILES}
    assert set(setuptools["packages"]) == folders | set(setuptools["package-dir"])
    others = {path for path in ROOT.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == {path for pattern in told for path in ROOT.glob(pattern)}
    assert ROOT / "py.typed" in others
    assert all((path.parent / "__init__.py").exists() for path in {*FILES, *others})


def test_type_checkers_see_what_is_exported():
    seen = {name.rpartition(".")[2] for name in imports(ROOT / "__init__.py") if name.startswith("mnv2_jax.")}
    assert seen == set(mnv2_jax.__all__)
