"""Names under which tasks, models and data sets are registered, and the modules that register them.

A module outside the package registers what it brings when it is imported. A config remembers its name (`modules`), so
that whoever opens the run imports it again.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from mnv2_jax.errors import UserError, nearest


class Registry:
    """Values by name; those of the package are imported when they are first asked for."""

    def __init__(self, what: str, own: Mapping[str, str]):
        """Knows where the package's own are.

        Args:
          what: they are, for errors: the key of the config.
          own: modules of the package by the names that they register.
        """
        self._what, self._own = what, dict(own)
        self._found: dict[str, tuple[Any, str]] = {}

    def add(self, name: str, value: Any, module: str) -> None:
        """Registers a value under a name; again from the same module, it takes the place of the one before.

        Raises:
          UserError: if the name is another module's.
        """
        known = self._own.get(name) or (self._found[name][1] if name in self._found else module)
        if known != module:
            raise UserError(f"{self._what}={name!r} is registered by {known}; give that of {module} another name")
        self._found[name] = value, module

    def find(self, name: str, modules: Iterable[str] = ()) -> Any:
        """The value of a name.

        Args:
          name: what a config says.
          modules: to import first.

        Raises:
          UserError: if a module can't be imported, or nobody has registered the name.
        """
        import_modules(modules)
        if name in self._own and name not in self._found:
            importlib.import_module(self._own[name])
        if name not in self._found:
            raise UserError(
                f"{self._what}={name!r} is not registered{nearest(name, self.names())}; or name its module, as in"
                " --config.modules=my_package.my_task (predict: --modules)"
            )
        return self._found[name][0]

    def names(self) -> list[str]:
        """All that are known by now, sorted."""
        return sorted({*self._own, *self._found})

    def modules_of(self, name: str) -> tuple[str, ...]:
        """The modules that a run must import for this name: none for the package's own, and for what nobody knows."""
        return (self._found[name][1],) if name in self._found and name not in self._own else ()


def import_modules(modules: Iterable[str]) -> None:
    """Imports modules, which then have registered what they bring.

    Raises:
      UserError: naming one that can't be imported.
    """
    for module in modules:
        _import(module)


def _import(module: str) -> None:
    try:
        importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever a user's module does
        reason = " ".join(str(error).split())[:160]
        mend = "start where it can be found, or put its folder on PYTHONPATH"
        if "," in module:
            mend = f"several are written in brackets, --config.modules=[{module}]"
        raise UserError(f"modules: {module!r} can't be imported ({type(error).__name__}: {reason}); {mend}") from error


def module_of(function: Any) -> str:
    """Name of the module in which a function or class is defined, or that of a `functools.partial`.

    Raises:
      UserError: if nobody could import it again: a script, a notebook, a config file.
    """
    while isinstance(function, functools.partial):
        function = function.func
    module: str = function.__module__
    if module == "__main__" or module not in sys.modules:
        raise UserError(
            f"{getattr(function, '__name__', function)!r} can't be registered where it is defined, since others can't"
            " import that again; put it into a file of its own and import that (in a notebook: a %%writefile cell)"
        )
    return module


TASKS = Registry("task", {"classification": "mnv2_jax.tasks.builtin"})
"""Tasks by `config.Config.task`; a `tasks.base.Kind` each."""
MODELS = Registry("model.name", {})
"""Models outside the package by `config.ModelConfig.name`; a `models.registry.Architecture` each."""
DATASETS = Registry("data.name", {})
"""Data sets outside the package by `config.DataConfig.name`; a `data.sources.Source` each."""


def modules_for(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules outside the package that register what a config's tree names, sorted."""
    named = (
        (TASKS, tree.get("task")),
        (MODELS, tree.get("model", {}).get("name")),
        (DATASETS, tree.get("data", {}).get("name")),
    )
    return tuple(sorted({module for registry, name in named for module in registry.modules_of(str(name))}))
