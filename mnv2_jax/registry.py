"""Names of registered tasks, models and data sets, and the modules that register them.

A module outside the package registers its tasks, models and data sets when it is imported. The config of a run records
the name of the module (`modules`), so that every command which opens the run imports it again.
"""

from __future__ import annotations

import functools
import importlib
import pathlib
import sys
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

from mnv2_jax.errors import UserError, nearest

OR_MODULE = "; or name the module that registers it, as in --config.modules=my_module (predict: --modules)"
"""Advice for a name that nothing has registered."""


class Registry:
    """Values by name. The package's own are imported when they are first needed."""

    def __init__(self, key: str, own_modules: Mapping[str, str]):
        """Creates a registry.

        Args:
          key: key of the config that holds such a name, for errors.
          own_modules: for each name of the package's own, the module that registers it.
        """
        self._key, self._own_modules = key, dict(own_modules)
        self._registered: dict[str, tuple[Any, str]] = {}

    def add(self, name: str, value: Any, module: str) -> None:
        """Registers a value under a name. The same module may do so again, which replaces its value.

        Raises:
          UserError: if another module has registered the name.
        """
        owner = self._own_modules.get(name) or (self._registered[name][1] if name in self._registered else module)
        if owner != module:
            raise UserError(f"{self._key}={name!r} is registered by {owner}; give the one in {module} another name")
        self._registered[name] = value, module

    def find(self, name: str, modules: Iterable[str] = ()) -> Any:
        """Returns the value that is registered under a name.

        Args:
          name: the name, as a config has it.
          modules: modules to import first.

        Raises:
          UserError: if a module can't be imported, or no module has registered the name.
        """
        import_modules(modules)
        if name in self._own_modules and name not in self._registered:
            importlib.import_module(self._own_modules[name])
        if name not in self._registered:
            raise UserError(f"{self._key}={name!r} is not registered{nearest(name, self.names())}{OR_MODULE}")
        return self._registered[name][0]

    def names(self) -> list[str]:
        """Returns all names that are registered by now or are the package's own, sorted."""
        return sorted({*self._own_modules, *self._registered})

    def modules_of(self, name: str) -> tuple[str, ...]:
        """Returns the modules that a run must import for a name: none for the package's own, and for unknown names."""
        if name not in self._registered or name in self._own_modules:
            return ()
        return (self._registered[name][1],)


def import_modules(modules: Iterable[str]) -> None:
    """Imports modules, which register their tasks, models and data sets.

    Raises:
      UserError: naming the first module that can't be imported.
    """
    for module in modules:
        _import(module)


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:  # a user's module may raise anything
        reason = " ".join(str(error).split())[:160]
        mend = f"mend that{line_of(error)}"
        if "," in module:
            mend = f"write several modules in brackets, --config.modules=[{module}]"
        elif module.endswith(".py"):
            mend = f"write it without .py, --config.modules={module.removesuffix('.py')}"
        elif isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            mend = "start in the folder of the module, or put that folder on PYTHONPATH"
        raise UserError(f"modules: {module!r} can't be imported ({type(error).__name__}: {reason}); {mend}") from error


def line_of(error: BaseException) -> str:
    """Returns `` (FILE:LINE)`` of the innermost line of the user's own code that raised an error; "" if none did."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({error.filename}:{error.lineno})"
    others = ("importlib", "site-packages", str(pathlib.Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(other in frame.filename for other in others)]
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def module_of(function: Any) -> str:
    """Returns the name of the module that defines a function or class, or the function of a `functools.partial`.

    Raises:
      UserError: if other processes couldn't import that module: it is a script, a notebook or a config file.
    """
    while isinstance(function, functools.partial):
        function = function.func
    module: str = function.__module__
    if module == "__main__" or module not in sys.modules:
        raise UserError(
            f"{getattr(function, '__name__', function)!r} is defined in a script, a notebook or a config file, which"
            " other processes can't import; put it into a file of its own and import that (in a notebook: a"
            " %%writefile cell)"
        )
    return module


TASKS = Registry(
    "task",
    {
        "classification": "mnv2_jax.tasks.builtin",
        "segmentation": "mnv2_jax.tasks.segmentation",
        "detection": "mnv2_jax.tasks.detection",
    },
)
"""Tasks by the name in `config.Config.task`; each is a `tasks.base.Kind`."""
MODELS = Registry("model.name", {})
"""Models outside the package by the name in `config.ModelConfig.name`; each is a `models.registry.Architecture`."""
DATASETS = Registry("data.name", {})
"""Data sets outside the package by the name in `config.DataConfig.name`; each is a `data.sources.Source`."""


def modules_for(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the modules outside the package that register the task, model and data set of a config's tree, sorted."""
    names = (
        (TASKS, tree.get("task")),
        (MODELS, tree.get("model", {}).get("name")),
        (DATASETS, tree.get("data", {}).get("name")),
    )
    return tuple(sorted({module for registry, name in names for module in registry.modules_of(str(name))}))
