"""Measures the speed of training, and the share of the time that it waits for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Pace(NamedTuple):
    """Speed over some steps."""

    images_per_second: float | None
    """Images per second on all devices together; None if no step was taken."""
    images_per_second_per_device: float | None
    """The same divided by the number of devices of all processes; None if no step was taken."""
    data_wait_share: float
    """Share of the time that was spent waiting for data, 0 to 1."""


class Speed:
    """A stopwatch over steps. Time inside `stopped` (compilation, evaluation, saving) doesn't count."""

    def __init__(self, devices: int = 1, clock: Callable[[], float] = time.monotonic):
        self._devices, self._clock = devices, clock
        self.restart()

    def restart(self) -> None:
        """Forgets the time and the images since the last lap."""
        self._since, self._images, self._waited = self._clock(), 0, 0.0

    def step_done(self, images: int) -> None:
        """Counts a step that trained on ``images`` images."""
        self._images += images

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as time waited for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Leaves the time inside out of the count."""
        start = self._clock()
        yield
        self._since += self._clock() - start

    def lap(self) -> Pace:
        """Returns the pace since the last lap, and begins a new lap."""
        seconds = max(self._clock() - self._since, 1e-9)
        speed = self._images / seconds if self._images else None
        pace = Pace(speed, speed and speed / self._devices, min(self._waited / seconds, 1.0))
        self.restart()
        return pace
