"""How a run shows that it is alive: a bar on a terminal, a plain line per log step anywhere else."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TextIO

import tqdm

_BAR = "{n_fmt}/{total_fmt} |{bar}| {desc}"


class Progress:
    """Shows step, loss, images/s, time left, and the share of the time in which the step waited for data."""

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens the bar if standard error is a terminal.

        Args:
          total_steps: at which the run ends.
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
        """Shows where the run is.

        Args:
          step: steps taken.
          loss: of that step.
          images_per_second: since the last update.
          images_per_second_per_device: likewise; shown where it is another number.
          data_wait_share: waiting for data, as a fraction of the time since the last update.
        """
        left = duration(self._seconds_left(step))
        speed = "?" if images_per_second is None else f"{images_per_second:,.0f}"
        if images_per_second_per_device != images_per_second and images_per_second_per_device is not None:
            speed += f" ({images_per_second_per_device:,.0f} a device)"
        text = f"loss {loss:.4f}  {speed} images/s  data wait {data_wait_share:.0%}  {left} left"
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.n = step
            with contextlib.suppress(OSError):
                self._bar.refresh()
        else:
            self.line(f"step {step:>{len(str(self._total))}}/{self._total}  {text}")

    def line(self, text: str) -> None:
        """Prints a line, above the bar where there is one. What nobody takes is dropped: a run goes on without."""
        with contextlib.suppress(OSError):
            if self._bar is not None:
                # tqdm takes the bar away and draws it again, but only if both streams are the standard ones.
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
        """From the pace since the first update: compilation comes before that, evaluations and saving don't."""
        now = self._clock()
        if self._first is None:
            self._first = step, now
        first_step, then = self._first
        return (self._total - step) * (now - then) / (step - first_step) if step > first_step else None


def duration(seconds: float | None) -> str:
    """Seconds written as ``1:02:03`` or ``2:03``; ``?`` before they are known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
