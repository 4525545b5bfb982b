"""Every command of README.md and docs/ exists: its flags, its config and its options are read as if it ran."""

import importlib
import re
import tomllib

import pytest

from mnv2_jax import config, flags
from mnv2_jax.__main__ import DOORS
from mnv2_jax.config.options import OPTIONS
from tests import docs

OTHERS = {".", "docker", "export", "tensorboard", "sed", "python3.11", "pytest"}
"""Programs of others that the pages name, whose flags aren't looked at."""
MODULES = {module.removesuffix(".__main__") for module, _ in DOORS.values()}


class Parsed(Exception):  # noqa: N818
    """Raised instead of running a command: its flags and its overrides."""


@pytest.fixture
def only_parsed(monkeypatch):
    """Makes every command end once its flags are parsed."""
    parse = flags.Parser.parse

    def parse_and_end(self, argv):
        raise Parsed(*parse(self, argv))

    monkeypatch.setattr(flags.Parser, "parse", parse_and_end)


def every_command():
    """All different commands of the pages, by their page and their words."""
    found = {}
    for page in docs.PAGES:
        for words in [*docs.commands(page), *docs.quoted_commands(page)]:
            found.setdefault(tuple(words), page)
    return [pytest.param(page, words, id=" ".join(words)[:100]) for words, page in found.items()]


def door(words):
    """The module of a command of ours and its arguments; None for another program."""
    while words and re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
        words = words[1:]
    if words[0] == "mnv2":
        return (DOORS[words[1]][0], words[2:]) if words[1] != "--help" else ("__main__", words[1:])
    if words[:2] == ("python", "-m") and words[2].startswith("mnv2_jax"):
        name = words[2].removeprefix("mnv2_jax").removeprefix(".")
        assert name in MODULES
        return next(module for module, _ in DOORS.values() if module.removesuffix(".__main__") == name), words[3:]
    if "launch/" in " ".join(words[:4]):
        script = next(word for word in words if word.startswith("launch/"))
        assert (docs.ROOT / script).is_file()
        return ("main", [word for word in words if word.startswith("--config")])
    return None


@pytest.mark.parametrize(("page", "words"), every_command())
def test_a_command_of_the_pages_can_be_given(page, words, only_parsed, monkeypatch, tmp_path):
    opened = door(words)
    if opened is None:
        return check_another_program(page, words)
    module, arguments = opened
    docs.write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mnv2", *arguments])
    try:
        importlib.import_module(f"mnv2_jax.{module}").main()
    except SystemExit as end:
        answered = end.code == 0
    except Parsed as parsed:
        answered, (args, overrides) = False, parsed.args
    else:
        answered = True
    if {"--help", "--list"} & {*arguments}:
        assert answered
        return None
    keys = {override.partition("=")[0] for override in overrides}
    assert keys <= set(OPTIONS)
    spec = getattr(args, "config", None)
    if spec and spec.partition(":")[0] in config.named():
        assert config.load(spec, overrides)
    return None


def check_another_program(page, words):
    """A target of the Makefile, an extra of the package, a file of the page or of the repository."""
    program, *rest = [word for word in words if not re.match(r"[A-Z_]+=", word)]
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (docs.ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program in ("pip", ".venv/bin/pip"):
        project = tomllib.loads((docs.ROOT / "pyproject.toml").read_text())["project"]
        extras = {name for word in rest for name in re.findall(r"^\.\[([\w,]+)\]$", word)}
        assert extras <= set(project["optional-dependencies"])
    elif program == "python":
        name = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
        assert name in docs.files(page) or (docs.ROOT / name).is_file()
    else:
        assert program in OTHERS
