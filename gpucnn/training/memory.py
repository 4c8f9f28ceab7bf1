"""Memory that ran out: one line that says where, and what can be given back then."""
from __future__ import annotations

import math
import re
import traceback
from typing import Any

from gpucnn.errors import BackendError
from gpucnn.layers import Layer

SMALLER_NETWORK = "try a smaller network or smaller images"
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def explain(error: MemoryError, model: Layer, others: tuple[Any, ...], images: int,
            micro_batch: int = 0, remedy: str = "") -> BackendError:
    """The error to raise from this one, with describe()'s message; what can be freed is freed."""
    message = describe(error, model, others, images, micro_batch)
    if not remedy:
        remedy = f"try batches of {images // 2}" if images > 1 else SMALLER_NETWORK
    release(error, model)
    return BackendError(f"{message}; {remedy}")


def describe(error: MemoryError, model: Layer, others: tuple[Any, ...], images: int,
             micro_batch: int = 0) -> str:
    """Which layer asked for how much, or which of `others`, such as the loss; what was in use.

    images: of the batch. micro_batch: images of its parts, where it had any.
    """
    backend = model.backend
    kind = "GPU memory" if backend.name == "cupy" else "memory"
    place = _place(error, others)
    asked, use = _asked(error), backend.memory_in_use()
    numbers = [] if asked is None else [f"asked {_amount(asked)}"]
    if use is not None:
        unit, name = _unit(use[1])
        numbers.append(f"{use[0] / unit:.1f} of {use[1] / unit:.1f} {name} in use")
    parts = [f"out of {kind}", f"in {place}" if place else "",
             f"({'; '.join(numbers)})" if numbers else "", f"at batch {images}",
             f"in micro-batches of {micro_batch}" if 0 < micro_batch < images else ""]
    return " ".join(part for part in parts if part)


def release(error: MemoryError, model: Layer) -> None:
    """Give up all that the calls which it has ended still hold, and the model for its backward."""
    traceback.clear_frames(error.__traceback__)
    model.forget()
    model.backend.free_unused()


def _place(error: MemoryError, others: tuple[Any, ...]) -> str:
    """The innermost layer, or one of `others`, in whose methods the error was raised."""
    place = ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_varnames[:1] != ("self",):
            continue
        names = frame.f_locals
        owner = names.get("self")
        if type(names) is dict:  # before Python 3.13 a copy, which would keep arrays alive
            names.clear()
        if isinstance(owner, Layer):
            place = owner.where
        elif any(owner is other for other in others if other is not None):
            place = type(owner).__name__
    return place


def _asked(error: MemoryError) -> int | None:
    """Bytes: NumPy's error has them as attributes, CuPy's in its message."""
    shape, dtype = getattr(error, "shape", None), getattr(error, "dtype", None)
    if shape is not None and dtype is not None:
        return math.prod(shape) * dtype.itemsize
    said = re.search(r"allocating ([\d,]+) bytes", str(error))
    return int(said[1].replace(",", "")) if said else None


def _unit(nbytes: float) -> tuple[float, str]:
    return next((unit for unit in _UNITS if nbytes >= unit[0] / 10), (1.0, "bytes"))


def _amount(nbytes: float) -> str:
    unit, name = _unit(nbytes)
    return f"{nbytes / unit:.1f} {name}"
