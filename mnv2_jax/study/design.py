"""The design of a study: which settings are trained with which seeds, and what is claimed of them.

base config × axes ──► cells (one setting each) × seeds ──► runs, each a command of `mnv2_jax.main`
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from mnv2_jax.config.files import reason_in_file, run_file
from mnv2_jax.errors import UserError, nearest
from mnv2_jax.presets import ARGUMENT_KEYS

Settings: TypeAlias = Mapping[str, Any]
"""Values by key. A key is one of the config, ``model.width``; one of a config's argument, such as ``res`` or
``recipe``; or ``config``, for another config than the base."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """What is said of the mean score of a cell."""

    cell: Settings
    """Values on axes that select one cell."""
    published: float
    """The published score, as a share of 1."""
    tolerance: float
    """Largest difference from it that counts as the same, as a share of 1."""
    side: Literal["equal", "at_least"] = "equal"
    """equal: the mean is the published score; at_least: it is that or higher. Both within the tolerance."""
    metric: str = "top1"
    """Name of a scalar of evaluations."""
    when: Literal["final", "best"] = "final"
    """Which evaluation counts: that of the last step, or the best of all. ``best`` is of the task's score only."""
    same_images: bool = True
    """Whether the published score was measured on the images that the runs are evaluated on."""
    source: str = ""
    """Where the score was published."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relation:
    """A claim that one cell has a higher score than another, by pairs of runs of the same seed."""

    better: Settings
    worse: Settings
    """Values on axes that select one cell each."""
    margin: float = 0.0
    """Least difference of the means, as a share of 1."""
    metric: str = "top1"
    when: Literal["final", "best"] = "final"
    source: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A study. Its file has a function ``get_study()`` that returns it."""

    base: str
    """Config of every run, as ``--config`` takes it: ``w1_0:data=digits``."""
    axes: Mapping[str, Sequence[Any] | Mapping[str, Settings]]
    """Values by axis: of one key, or named groups of settings, such as the networks of a table."""
    seeds: Sequence[int] = (0, 1, 2)
    settings: Settings = dataclasses.field(default_factory=dict)
    """Settings of every run."""
    claims: Sequence[Claim] = ()
    relations: Sequence[Relation] = ()
    spread: float = 0.003
    """Standard deviation over seeds that `plan` assumes, as a share of 1."""
    train_images: int | None = None
    """Number of training images, for the plan on a machine without the data."""


class Cell(NamedTuple):
    """One setting of a study."""

    name: str
    point: Settings
    """Values on the axes."""
    settings: Settings
    """All settings that differ from the base."""


class Run(NamedTuple):
    """One training of a study."""

    name: str
    """Name of the run folder within the study's."""
    cell: Cell
    seed: int
    config: str
    """Value of ``--config``."""
    overrides: tuple[str, ...]
    """Changes of config keys, as ``model.width=0.5``."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Flags of `mnv2_jax.main`, without the run folder."""
        return (f"--config={self.config}", *(f"--config.{override}" for override in self.overrides))


def load_study(path: str) -> Study:
    """Reads the study of a file, or of one of the project's studies by its name.

    Raises:
      UserError: if there is no such file, or it defines no study.
    """
    studies = study_files()
    file = studies.get(path, pathlib.Path(path).expanduser())
    if not file.is_file():
        raise UserError(f"{path}: there is no such study{nearest(path, studies)}; give one of these or a .py file")
    try:
        study = run_file(file, f"_study_{file.stem}").get_study()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        raise UserError(f"{path}: {reason_in_file(error)}") from error
    if not isinstance(study, Study):
        raise UserError(f"{path}: get_study returned {study!r:.60}; let it return a Study")
    check_study(study)
    return study


def study_files() -> dict[str, pathlib.Path]:
    """Returns the project's studies by name; they are in an installed package, or beside it in a checkout."""
    package = pathlib.Path(__file__).parents[1]
    folders = (package / "configs" / "studies", package.parent / "configs" / "studies")
    files = next((found for folder in folders if (found := sorted(folder.glob("*.py")))), [])
    return {file.stem: file for file in files}


def check_study(study: Study) -> None:
    """Refuses a study that can't be planned.

    Raises:
      UserError: naming what is wrong: an empty axis, a seed twice, or a claim that selects no cell or several.
    """
    for name, values in study.axes.items():
        if not values:
            raise UserError(f"axes[{name!r}] is empty; give it a value or leave it out")
    if not study.seeds or len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"seeds={tuple(study.seeds)} must be different numbers, at least one")
    names = [run.name for run in runs_of(study)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"axes: two cells have one name, {min(twice)!r}; give the values of an axis names of their own")
    for claim in study.claims:
        find_cell(study, claim.cell)
    for relation in study.relations:
        find_cell(study, relation.better)
        find_cell(study, relation.worse)


def cells_of(study: Study) -> list[Cell]:
    """Returns the cells, in the order of the axes."""
    axes = []
    for name, values in study.axes.items():
        if isinstance(values, Mapping):
            axes.append([(name, label, dict(settings)) for label, settings in values.items()])
        else:
            axes.append([(name, value, {name: value}) for value in values])
    cells = []
    for choice in itertools.product(*axes):
        settings = dict(study.settings)
        for _, _, own in choice:
            settings |= own
        point = {name: value for name, value, _ in choice}
        cells.append(Cell(_slug(point) or "all", point, settings))
    return cells


def runs_of(study: Study) -> list[Run]:
    """Returns the runs: all cells with the first seed, then with the second, so that every cell has a score early."""
    return [_run(study, cell, seed) for seed in study.seeds for cell in cells_of(study)]


def find_cell(study: Study, values: Settings) -> Cell:
    """Returns the one cell that has these values.

    Raises:
      UserError: if none or several have them.
    """
    found = [cell for cell in cells_of(study) if all(cell.point.get(name) == value for name, value in values.items())]
    unknown = [name for name in values if name not in study.axes]
    if unknown or len(found) != 1:
        why = f"{unknown[0]!r} is no axis" if unknown else f"{len(found)} cells have these values"
        raise UserError(f"a claim's cell {dict(values)}: {why}; give values that select one cell")
    return found[0]


def _run(study: Study, cell: Cell, seed: int) -> Run:
    settings = {**cell.settings, "seed": seed}
    base, _, argument = str(settings.pop("config", study.base)).partition(":")
    items = dict(item.split("=", 1) for item in argument.split(",") if item)
    items |= {key: str(settings.pop(key)) for key in list(settings) if key in ARGUMENT_KEYS}
    spec = ":".join(filter(None, (base, ",".join(f"{key}={value}" for key, value in items.items()))))
    overrides = tuple(f"{key}={value}" for key, value in settings.items())
    return Run(f"{cell.name}-seed_{seed}", cell, seed, spec, overrides)


def _slug(point: Settings) -> str:
    """Writes values on axes as a part of a file's name: ``width_0.35-resolution_32``."""
    parts = (f"{name.rpartition('.')[2]}_{value}" for name, value in point.items())
    return re.sub(r"[^\w.+-]", "_", "-".join(parts))
