"""The benchmark runs, and says what it says it does."""

import pytest

from tests import cli


@pytest.mark.slow
def test_step_is_timed_in_both_forms():
    found = cli.answer(cli.run("bench", "step", cli.SHRUNK[0], "--repeats=3", "--json"))
    assert set(found) == {"train", "inference"}
    for row in found.values():
        assert min(row.values()) > 0
        assert row["ratio"] == pytest.approx(row["xla_ms"] / row["ours_ms"], rel=0.5)


def test_mistakes_are_one_line():
    for arguments in (["steps", cli.SHRUNK[0]], ["step"], ["step", cli.SHRUNK[0], "--repeats=0"]):
        result = cli.run("bench", *arguments)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
