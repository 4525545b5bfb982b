"""A folder with a page that computes the network in a browser, from the files beside it and without a server.

    index.html  ──►  network.js       the ONNX file
                     runtime.js       onnxruntime-web's module
                     runtime-wasm.js  the code that it runs

A browser lets a page that is opened from a disk load scripts and nothing else, so each file is a script that holds its
bytes, zipped, as text.
"""

from __future__ import annotations

import base64
import gzip
import json
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from typing import Any, NamedTuple

from mnv2_jax.errors import UserError
from mnv2_jax.export.function import INPUT, Exportable
from mnv2_jax.json_files import reading, write_text, writing
from mnv2_jax.registry import TASKS
from mnv2_jax.tasks.answers import TopClasses
from mnv2_jax.weights.file import describe

VERSION = "1.30.0"
"""Version of onnxruntime-web that is fetched."""
_MODULE, _WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
"""The build that computes on the CPU, whose module imports no other; from a disk, that would be refused."""
_TEMPLATE = pathlib.Path(__file__).with_name("page.html")


class Runtime(NamedTuple):
    """The files of onnxruntime-web that a page needs."""

    module: bytes
    wasm: bytes


def read_runtime(folder: pathlib.Path | None) -> Runtime:
    """Reads onnxruntime-web from a folder, the package or its dist/; without one, npm fetches the package.

    Raises:
      UserError: if the folder lacks a file, or if npm is missing or fails.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as fetched:
            return read_runtime(_fetched(pathlib.Path(fetched)))
    for place in (folder, folder / "dist"):
        if all((place / name).is_file() for name in (_MODULE, _WASM)):
            with reading(place):
                return Runtime((place / _MODULE).read_bytes(), (place / _WASM).read_bytes())
    raise UserError(
        f"--runtime={folder}: neither it nor its dist/ has {_MODULE} and {_WASM}; give an unpacked onnxruntime-web,"
        f" such as version {VERSION}"
    )


def _fetched(folder: pathlib.Path) -> pathlib.Path:
    """Fetches and unpacks the package into a folder."""
    package = f"onnxruntime-web@{VERSION}"
    mend = f"or get {package} by npm pack elsewhere, unpack it, and give --runtime=DIR"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"--format=web: needs onnxruntime-web, which npm fetches, and there is no npm; install it, {mend}"
        )
    command = [npm, "pack", package, "--loglevel=error", "--fetch-retries=1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[0].strip()[:200] if lines else f"exit code {done.returncode}"
        raise UserError(f"--format=web: npm can't fetch {package} ({reason}); mend that, {mend}")
    with tarfile.open(archives[0]) as archive:
        wanted = {f"package/dist/{name}" for name in (_MODULE, _WASM)}
        archive.extractall(folder, [one for one in archive if one.name in wanted], filter="data")
    return folder / "package"


def write(path: pathlib.Path, exportable: Exportable, network: bytes, runtime: Runtime) -> None:
    """Writes the folder.

    Args:
      path: the folder, whose name ends in -web.
      exportable: takes uint8 and gives raw outputs.
      network: its ONNX file.
      runtime: files of onnxruntime-web.

    Raises:
      UserError: if the answers aren't the most probable classes, or if a file can't be written.
    """
    facts = _facts(exportable, path.name.removesuffix("-web"))
    page = _TEMPLATE.read_text(encoding="utf-8").replace("@FACTS@", _in_html(facts))
    with writing(path):
        path.mkdir(exist_ok=True)
    for name, content in {"network": network, "runtime": runtime.module, "runtime-wasm": runtime.wasm}.items():
        write_text(path / f"{name}.js", _script(name, content))
    write_text(path / "LICENSE-onnxruntime-web.txt", _LICENCE)
    write_text(path / "index.html", page)


def _facts(exportable: Exportable, name: str) -> dict[str, Any]:
    weights = exportable.weights
    answers = TASKS.find(weights.info.task).answers(weights, None)
    if not isinstance(answers, TopClasses):
        raise UserError(
            f"--format=web: a page shows the most probable classes, and the answers of the task {weights.info.task!r}"
            " are others; export it with --format=onnx"
        )
    facts = exportable.facts()
    return {
        "name": name,
        "model": describe(weights.model),
        "source": facts["source"],
        "resolution": exportable.size[0],
        "preprocessing": json.loads(facts["preprocessing"]),
        "input": INPUT,
        "labels": answers.labels,
        "top": answers.top,
    }


def _in_html(facts: dict[str, Any]) -> str:
    """JSON that can stand in a script element: a label may hold ``</script>`` or ``<!--``."""
    return json.dumps(facts).replace("<", "\\u003c")


def _script(name: str, content: bytes) -> str:
    zipped = gzip.compress(content, mtime=0)  # no time, so that the same network is the same file
    return f'files["{name}"] =\n"{base64.b64encode(zipped).decode()}"\n'


_LICENCE = """\
runtime.js and runtime-wasm.js hold files of onnxruntime-web, unchanged but for their encoding. Its licence:

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
