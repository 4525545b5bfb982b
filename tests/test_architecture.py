"""Imports go down, and only those who should know of linen, devices and TensorFlow do."""

import ast
import pathlib

import pytest

import mnv2_jax
from tests.conftest import SHAPED

ROOT = pathlib.Path(mnv2_jax.__file__).parent
ROOMS = (
    {"types", "errors", "interrupts", "json_files", "outputs"},
    {"config", "recipes", "presets", "flags"},
    {"nn", "ops", "processes"},
    {"models"},
    {"data"},
    {"weights"},
    {"runs"},
    {"report"},
    {"tasks"},
    {"training"},
    {"bench"},
    {"verbs"},
    {"main", "predict", "convert", "__init__"},
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
    assert others <= {"weights/state_dicts.py": {"torch"}, "bench/torch_rival.py": {"torch", "timm"}}.get(
        str(path.relative_to(ROOT)), set()
    )
    if any(name.startswith("flax.linen") for name in names):
        assert room(path) in ("nn", "models")
    if room(path) == "data":
        assert not packages & {"flax", "jax", "optax"}
    if any("sharding" in name or "partitioning" in name for name in names):
        assert path in (ROOT / "training" / "mesh.py", ROOT / "nn" / "partition.py")


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
