"""Progress shows a bar on a terminal, and plain lines elsewhere."""

import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

from mnv2_jax.runs.progress import Progress


def fake_clock(times):
    ticks = iter(times)
    return lambda: next(ticks)


def test_plain_lines():
    out = io.StringIO()
    progress = Progress(1000, 100, out, clock=fake_clock([60.0, 70.2227, 80.0]))
    progress.update(110, 2.34567, 12345.6, 1543.2, 0.031)
    progress.update(120, 2.0, 999.4, 999.4, 0.0)
    progress.line("saved")
    progress.update(1000, float("nan"), 0.0, 0.0, 1.0)
    progress.close()
    assert out.getvalue().splitlines() == [
        "step  110/1000  loss 2.3457  12,346 (1,543 a device) images/s  data wait 3%  ? left",
        "step  120/1000  loss 2.0000  999 images/s  data wait 0%  15:00 left",
        "saved",
        "step 1000/1000  loss nan  0 images/s  data wait 100%  0:00 left",
    ]


def test_time_left_leaves_out_what_came_before_the_first_update():
    out = io.StringIO()
    progress = Progress(11000, 0, out, clock=fake_clock([500.0, 501.0]))
    progress.update(1000, 1.0, 1.0, 1.0, 0.0)
    progress.update(1001, 1.0, 1.0, 1.0, 0.0)
    assert out.getvalue().splitlines()[-1].endswith("2:46:39 left")


def test_lines_go_to_standard_output_and_nothing_to_standard_error(capsys):
    progress = Progress(10)
    progress.update(1, 1.0, 1.0, 1.0, 0.0)
    progress.close()
    out, err = capsys.readouterr()
    assert out.startswith("step  1/10  loss 1.0000")
    assert err == ""


BAR = """
from mnv2_jax.runs.progress import Progress
progress = Progress(1000, 100)
for step in range(200, 1001, 100):
    progress.update(step, 2.5, 1234.5, 1234.5, 0.03)
    if step == 500:
        progress.line("evaluated")
progress.close()
"""


def test_bar_on_a_terminal():
    """Lines appear above the bar, which ends full; standard output may be a pipe."""
    terminal, process_side = pty.openpty()
    fcntl.ioctl(process_side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    command = [sys.executable, "-W", "error", "-c", BAR]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=process_side, check=True, text=True)
    os.close(process_side)
    shown = os.read(terminal, 65536).decode()
    os.close(terminal)
    assert result.stdout == "evaluated\n"
    assert "100/1000" in shown.split("\r")[1]
    last = shown.strip().split("\r")[-1]
    assert last.startswith("1000/1000")
    assert last.endswith("loss 2.5000  1,234 images/s  data wait 3%  0:00 left")
    assert all(len(drawn) <= 100 for drawn in shown.split("\r"))
