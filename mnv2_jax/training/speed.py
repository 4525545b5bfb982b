"""How fast training goes, and how much of its time it waits for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Pace(NamedTuple):
    """Over some steps."""

    images_per_second: float | None
    """None over no step."""
    images_per_second_per_device: float | None
    """Likewise, over the devices of all processes."""
    data_wait_share: float
    """Share of the time that was spent waiting for data, 0 to 1."""


class Speed:
    """A stopwatch over steps. Compilation, evaluation and saving don't count."""

    def __init__(self, devices: int = 1, clock: Callable[[], float] = time.monotonic):
        self._devices, self._clock = devices, clock
        self.restart()

    def restart(self) -> None:
        """Forgets what came since the last lap."""
        self._since, self._images, self._waited = self._clock(), 0, 0.0

    def step_done(self, images: int) -> None:
        """Counts a step over so many images."""
        self._images += images

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time inside is time waited for data."""
        begun = self._clock()
        yield
        self._waited += self._clock() - begun

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The time inside doesn't count."""
        begun = self._clock()
        yield
        self._since += self._clock() - begun

    def lap(self) -> Pace:
        """The pace since the lap before."""
        seconds = max(self._clock() - self._since, 1e-9)
        speed = self._images / seconds if self._images else None
        pace = Pace(speed, speed and speed / self._devices, min(self._waited / seconds, 1.0))
        self.restart()
        return pace
