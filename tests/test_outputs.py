"""Tests commands whose standard output or standard error is closed, full, or has no reader."""

import os
import subprocess
import sys

import pytest

VERB = """
import sys
from mnv2_jax import outputs
from mnv2_jax.errors import UserError, exit_on_user_error

def verb():
    if "optional" in sys.argv:
        outputs.drop_errors(sys.stdout)
    opened = open(sys.argv[1], "w")
    for _ in range(3):
        print("s\\udce9", flush=True)  # as of a file's name that isn't Unicode
    print("warned", file=sys.stderr, flush=True)
    opened.write("done")
    opened.close()
    if "fails" in sys.argv:
        raise UserError("a is b")

exit_on_user_error(verb)
"""


@pytest.mark.parametrize(
    ("words", "redirected", "code", "done", "stderr"),
    [
        ("", "", 0, True, "warned\n"),
        # The answer is what is printed, so failing to print is an error, unless the reader has left, as `head` does.
        ("", ">&-", 2, False, "error: standard output: "),
        ("", ">/dev/full", 2, False, "error: standard output: "),
        ("", "| true", 0, False, ""),
        ("", ">&- 2>&-", 2, False, ""),
        # The answer is a file, so failing to print is no error.
        ("optional", ">&-", 0, True, "warned\n"),
        ("optional", ">/dev/full", 0, True, "warned\n"),
        ("optional", "| true", 0, True, "warned\n"),
        ("optional", "<&- >&- 2>&-", 0, True, ""),
        ("optional", ">/dev/full 2>/dev/full", 0, True, ""),
        ("optional fails", ">&-", 2, True, "warned\nerror: a is b\n"),
        ("optional fails", "| true", 2, True, "warned\nerror: a is b\n"),
    ],
)
def test_what_nobody_takes_ends_only_who_had_nothing_else_to_give(tmp_path, words, redirected, code, done, stderr):
    (tmp_path / "verb.py").write_text(VERB)
    # The pause is for `true` to have ended.
    command = f"{{ sleep 0.05; {sys.executable} verb.py done {words}; echo $? >code; }} {redirected}"
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert int((tmp_path / "code").read_text()) == code, result.stderr
    assert ((tmp_path / "done").read_text() == "done") == done  # and nothing that was printed
    assert result.stderr.startswith(stderr)
    assert result.stderr.count("\n") <= 2
