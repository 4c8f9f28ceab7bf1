"""Where a sliding window lands: the one output-size formula of convolution and pooling.

The article's formula is n_out = floor((n + 2p - f) / s) + 1. Here the two sides may be padded
differently, and a dilated window of f taps, d apart, covers e = (f - 1) d + 1 pixels:

    n_out = floor((n + p_before + p_after - e) / s) + 1
"""
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IntOrPair = int | Sequence[int]
Padding = str | int | Sequence[int] | Sequence[Sequence[int]]


class Window(NamedTuple):
    """A window over the H and W axes of an NHWC tensor, its padding resolved to pixels."""

    kh: int
    kw: int
    sh: int
    sw: int
    top: int
    bottom: int
    left: int
    right: int
    dh: int
    dw: int

    @property
    def effective(self) -> tuple[int, int]:
        """The height and width in pixels that the window covers, its dilation included."""
        return (self.kh - 1) * self.dh + 1, (self.kw - 1) * self.dw + 1

    @property
    def places(self) -> int:
        """How many pixels one window looks at."""
        return self.kh * self.kw

    @property
    def mask_dtype(self) -> type[np.generic]:
        """What holds a place in the window: one byte where it has at most 255 of them."""
        return np.uint8 if self.places <= 255 else np.int32

    def out_size(self, h: int, w: int) -> tuple[int, int]:
        """The height and width of the output for an input of h x w, by the formula above."""
        eh, ew = self.effective
        return ((h + self.top + self.bottom - eh) // self.sh + 1,
                (w + self.left + self.right - ew) // self.sw + 1)


def make_window(where: str, size: IntOrPair, stride: IntOrPair, padding: Padding,
                dilation: IntOrPair, input_size: tuple[int, int], *,
                size_name: str = "size") -> Window:
    """Check what the user gave and resolve it for an input of (h, w) pixels.

    where: how messages begin, such as "Conv2D 'c1'".
    size, stride, dilation: an int or (vertical, horizontal), each at least 1.
    padding: "valid" (none), "same" (out = ceil(n / stride), the odd pixel at the bottom and
        right), an int, (ph, pw), or ((top, bottom), (left, right)).

    Raises TypeError for what is not an int, ValueError for what is out of range or does not fit.
    """
    kh, kw = pair(where, size_name, size)
    sh, sw = pair(where, "stride", stride)
    dh, dw = pair(where, "dilation", dilation)
    h, w = input_size
    for side, n in (("height", h), ("width", w)):
        if n < 1:
            raise ValueError(f"{where}: input {side} is {n}: {h}x{w}; it must be at least 1")
    (top, bottom), (left, right) = _resolve_padding(
        where, padding, ((h, kh, sh, dh), (w, kw, sw, dw)))
    window = Window(kh, kw, sh, sw, top, bottom, left, right, dh, dw)
    padded_h, padded_w = h + top + bottom, w + left + right
    if min(window.out_size(h, w)) < 1:
        eh, ew = window.effective
        effective = f" (effective {eh}x{ew} with dilation {dilation})" if max(dh, dw) > 1 else ""
        raise ValueError(
            f"{where}: kernel {kh}x{kw}{effective} is larger than the padded input "
            f"{padded_h}x{padded_w}; use a smaller kernel or padding='same'")
    # Past the padded input, a larger step comes to the same, but may not fit a kernel's int.
    return window._replace(sh=min(sh, padded_h), sw=min(sw, padded_w),
                           dh=min(dh, padded_h), dw=min(dw, padded_w))


def check_pool_window(where: str, window: Window, h: int, w: int) -> None:
    """Refuse padding of more than half the window, or a window that sees no pixel at all.

    The maximum or the average of nothing has no value. With dilation a window can straddle a
    small image and lie wholly in the padding even where the first rule holds.
    """
    (eh, ew), (kh, kw, sh, sw, top, bottom, left, right, dh, dw) = window.effective, window
    for n, sides, taps, covered, stride, dilation in ((h, (top, bottom), kh, eh, sh, dh),
                                                      (w, (left, right), kw, ew, sw, dw)):
        effective = f" (effective {covered} with dilation {dilation})" if dilation > 1 else ""
        if 2 * max(sides) > covered:
            raise ValueError(f"{where}: padding {max(sides)} is more than half of kernel {taps}"
                             f"{effective}; a window would lie wholly in padding")
        if not _every_window_sees_a_pixel(n, sides, taps, stride, dilation):
            raise ValueError(f"{where}: kernel {taps}{effective} with padding {sides} skips over "
                             f"an input of {n} pixels; a window would lie wholly in padding")


def pair(where: str, name: str, value: object, least: int = 1) -> tuple[int, int]:
    """value as (vertical, horizontal) ints, each at least `least`."""
    items = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(items) != 2 or not all(is_int(v) for v in items):
        raise TypeError(f"{where}: {name} must be an int or two ints, got {value!r}")
    if min(items) < least:
        raise ValueError(f"{where}: {name} must be >= {least}, got {value!r}")
    return int(items[0]), int(items[1])


def integer(where: str, name: str, value: object) -> int:
    """value as an int, at least 1."""
    if not is_int(value):
        raise TypeError(f"{where}: {name} must be an int, got {value!r}")
    return pair(where, name, value)[0]


def is_int(value: object) -> bool:
    """Whether value is an int of Python or NumPy, and no bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_groups(where: str, groups: int, c_in: int, c_out: int) -> None:
    """Raise unless `groups` is an int >= 1 that divides both numbers of channels."""
    if not is_int(groups):
        raise TypeError(f"{where}: groups must be an int, got {groups!r}")
    if groups < 1 or c_in % groups or c_out % groups:
        raise ValueError(f"{where}: groups must be >= 1 and divide the {c_in} input and {c_out} "
                         f"output channels, got {groups}")


def _resolve_padding(where, padding, axes):
    """((top, bottom), (left, right)); axes holds (n, taps, stride, dilation) of H and of W."""
    if isinstance(padding, str):
        if padding == "valid":
            return (0, 0), (0, 0)
        if padding == "same":
            return tuple(_same(*axis) for axis in axes)
    elif is_int(padding):
        return (pair(where, "padding", padding, least=0),) * 2
    elif isinstance(padding, (tuple, list)) and len(padding) == 2:
        if all(is_int(p) for p in padding):
            ph, pw = pair(where, "padding", padding, least=0)
            return (ph, ph), (pw, pw)
        if all(isinstance(p, (tuple, list)) for p in padding):
            top_bottom, left_right = (pair(where, "padding", p, least=0) for p in padding)
            return top_bottom, left_right
    raise (ValueError if isinstance(padding, str) else TypeError)(
        f"{where}: padding must be 'valid', 'same', an int, (ph, pw) or "
        f"((top, bottom), (left, right)), got {padding!r}")


def _same(n: int, taps: int, stride: int, dilation: int) -> tuple[int, int]:
    """The padding that makes out = ceil(n / stride); for stride 1 and odd f, p = (f - 1) / 2."""
    out = -(-n // stride)
    total = max(0, (out - 1) * stride + (taps - 1) * dilation + 1 - n)
    return total // 2, total - total // 2


@functools.lru_cache(maxsize=1024)
def _every_window_sees_a_pixel(n: int, sides: tuple[int, int], taps: int, stride: int,
                               dilation: int) -> bool:
    before, after = sides
    last = n + before + after - (taps - 1) * dilation - 1
    starts = range(-before, last - before + 1, stride)
    return all(any(0 <= start + t * dilation < n for t in range(taps)) for start in starts)
