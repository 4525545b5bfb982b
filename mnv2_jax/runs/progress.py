"""Progress of a run: a bar on a terminal, otherwise one plain line per log step."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TextIO

import tqdm

_BAR = "{n_fmt}/{total_fmt} |{bar}| {desc}"


class Progress:
    """Shows step, loss, images/s, time left, and the share of the time spent waiting for data."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens the bar if standard error is a terminal.

        Args:
          total_steps: step at which the run ends.
          start_step: steps taken by earlier sessions.
          stream: where plain lines go; standard output if unset. Pass standard error where the output is JSON.
          clock: seconds from any origin.
        """
        self._total = total_steps
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._bar: tqdm.tqdm | None = None
        if sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=start_step,
                desc="starting",
                bar_format=_BAR,
                file=sys.stderr,
                dynamic_ncols=True,
                mininterval=0,
            )

    def update(
        self,
        step: int,
        loss: float,
        images_per_second: float | None,
        images_per_second_per_device: float | None,
        data_wait_share: float,
    ) -> None:
        """Shows the progress of the run.

        Args:
          step: steps taken.
          loss: loss of that step.
          images_per_second: speed since the last update.
          images_per_second_per_device: speed per device since the last update; shown only if it differs.
          data_wait_share: share of the time since the last update that was spent waiting for data.
        """
        remaining = duration(self._seconds_left(step))
        speed = "?" if images_per_second is None else f"{images_per_second:,.0f}"
        if images_per_second_per_device != images_per_second and images_per_second_per_device is not None:
            speed += f" ({images_per_second_per_device:,.0f} a device)"
        text = f"loss {loss:.4f}  {speed} images/s  data wait {data_wait_share:.0%}  {remaining} left"
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.n = step
            with contextlib.suppress(OSError):
                self._bar.refresh()
        else:
            self.line(f"step {step:>{len(str(self._total))}}/{self._total}  {text}")

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one. Ignores errors: a run goes on if nobody reads its output."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                # tqdm clears the bar and draws it again, but only if both streams are the standard ones.
                tqdm.tqdm.write(text, file=self._stream)
                self._stream.flush()
            else:
                print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                self._bar.close()

    def _seconds_left(self, step: int) -> float | None:
        """Estimates the seconds left from the pace since the first update, evaluations and saving included.

        Compilation comes before the first update, so it doesn't count.
        """
        now = self._clock()
        if self._first is None:
            self._first = step, now
        first_step, then = self._first
        return (self._total - step) * (now - then) / (step - first_step) if step > first_step else None


def duration(seconds: float | None) -> str:
    """Formats seconds as ``1:02:03`` or ``2:03``, and None, an unknown duration, as ``?``."""
    if seconds is None:
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
