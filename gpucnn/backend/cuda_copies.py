"""Copies between the host and the GPU that go on beside its computing, on streams of their own:
one each way, so that neither waits for what the other waits for."""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import cupy
import cupyx
import numpy as np


@functools.cache
def _copy_stream(device: int, direction: str) -> Any:
    return cupy.cuda.Stream(non_blocking=True)


def _stream(direction: str) -> Any:
    return _copy_stream(cupy.cuda.Device().id, direction)


class _Copied:
    """Memory of the host that is copied, and does not go before that is done: CuPy would give it
    out again at once, to be filled with something else."""

    copied: Any = None  # the event of its last copy

    def __del__(self) -> None:
        if self.copied is not None:
            with contextlib.suppress(Exception):  # CUDA may end before Python does
                self.copied.synchronize()


class Fetch(_Copied):
    """A copy to the host of what an array holds after all that was launched before."""

    def __init__(self, array: Any):
        copies = _stream("to the host")
        copies.wait_event(cupy.cuda.get_current_stream().record())
        self._host = cupyx.empty_pinned(array.shape, array.dtype)
        self._array = array  # is not to be freed before it was read
        array.get(stream=copies, out=self._host, blocking=False)
        self.copied = copies.record()

    @property
    def done(self) -> bool:
        return bool(self.copied.done)

    def result(self) -> np.ndarray:
        """Waits for the copy."""
        self.copied.synchronize()
        return self._host


class Upload:
    """Host arrays on their way to arrays of the GPU; two sets of them, so that one can be filled
    while the other is copied, and both while the GPU computes."""

    def __init__(self, targets: Sequence[Any]):
        self._targets = targets
        self._slots = [_Slot(targets) for _ in range(2)]

    def arrays(self) -> list[np.ndarray]:
        """What send() will copy: to be filled. Waits until the copy before the last is done."""
        slot = self._slots[0]
        if slot.copied is not None:
            slot.copied.synchronize()
        return slot.host

    def send(self) -> None:
        """Copy them; what is launched from now on finds them in the targets."""
        slot, copies = self._slots[0], _stream("to the GPU")
        current = cupy.cuda.get_current_stream()
        copies.wait_event(slot.read)
        for device, host in zip(slot.device, slot.host):
            device.set(host, stream=copies)
        slot.copied = copies.record()
        current.wait_event(slot.copied)
        for target, device in zip(self._targets, slot.device):
            target[...] = device
        slot.read = current.record()
        self._slots.reverse()


class _Slot(_Copied):
    def __init__(self, targets: Sequence[Any]):
        self.host = [cupyx.empty_pinned(t.shape, t.dtype) for t in targets]
        self.device = [cupy.empty_like(t) for t in targets]
        # Nobody reads the arrays yet, but their memory may be that of others, who have not ended.
        self.read = cupy.cuda.get_current_stream().record()
