"""What steps have found, on its way from the device to the host."""
from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpucnn.backend import Array, Backend, Fetch


class StepResult(NamedTuple):
    """What one step found before its update: the mean loss of so many images, and how many of
    them were classified right."""

    loss: float
    hits: int
    images: int


class ResultLog:
    """The results of steps on the device: two halves of a ring. While one is copied to the host,
    steps write to the other."""

    def __init__(self, backend: Backend, half: int):
        self.backend, self.half = backend, half
        self.ring = backend.asarray(np.zeros((2 * half, 2)))
        self.count = backend.asarray(np.zeros(1, np.int64))
        self.copied: tuple[Fetch, list[int]] | None = None  # and the images of those steps
        self.images: list[int] = []  # of the steps in the half that is being written
        self.asked = 0               # how many of their results were asked for already
        self.second = False          # which half that is
        self.waiting: deque[StepResult] = deque()

    def record(self, loss: Array, hits: Array) -> None:
        """Launched with a step."""
        self.backend.record_step(loss, self.backend.asarray(hits, np.int32), self.ring, self.count)

    def wrote(self, images: int) -> None:
        """Called after a step of so many images was launched."""
        self.images.append(images)
        self.turn_over()

    def turn_over(self) -> None:
        """Where a half is full, begin to copy it and go on in the other, which waits for the copy
        before. Called before each step too: who is interrupted in that waiting may go on."""
        if len(self.images) == self.half:
            self._collect()
            self.copied = self._fetch(), self.images[self.asked:]
            self.images, self.asked, self.second = [], 0, not self.second

    def arrived(self) -> Iterator[StepResult]:
        """The results that have come to the host. Those that nobody takes stay."""
        if not self.backend.captures:
            self.wait()
        elif self.copied and self.copied[0].done:
            self._collect()
        while self.waiting:
            yield self.waiting.popleft()

    def wait(self) -> None:
        """For the results of all steps."""
        self._collect()
        if len(self.images) > self.asked:
            self.copied = self._fetch(), self.images[self.asked:]
            self.asked = len(self.images)
            self._collect()

    def _fetch(self) -> Fetch:
        start = self.half * self.second
        return self.backend.fetch(self.ring[start + self.asked:start + len(self.images)])

    def _collect(self) -> None:
        if self.copied:
            fetch, images = self.copied
            found = fetch.result()  # who interrupts the waiting finds it later
            self.copied = None
            self.waiting += [StepResult(float(loss), int(hits), n)
                             for (loss, hits), n in zip(found, images)]
