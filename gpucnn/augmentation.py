"""What a batch of images goes through on its way from bytes to the numbers that a network sees."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpucnn.geometry import is_int

CUT, NO_IMAGE, ENTRIES = 256, 257, 258  # as in kernels/gather.cuh
CHOICES, ONE = 1024, 1 << 14              # as in kernels/augment.cu
MAX_ROTATED_SIDE = 1 << 14                # of which the kernel's 32 bits hold the products


@dataclass(frozen=True)
class Augmentation:
    """What is done to an image at random, in this order: crop, flip, rotation, colour, mixup and
    cutout; then (pixel / 255 - mean) / std. By default pixel / 255 alone.

    crop: pad each side by so many pixels and take a window of the image's own size, at one of the
        (2 crop + 1)^2 places. Less than the height and the width.
    padding: "zero" pads with black pixels, "reflect" with the image mirrored at its border pixels,
        which are not repeated, as in numpy.pad.
    flip: mirror left and right in half of all cases.
    rotate: turn the image around its middle, by up to so many degrees either way, at most 45:
        bilinear, with what `padding` says beyond its borders. One of 1024 angles.
    colour: multiply all pixels by a factor from 1 - colour to 1 + colour; then their distance from
        128 by another (contrast); then that of each pixel of an RGB image from its luma by a third
        (saturation). From 0 to less than 1, in steps of 1 / 256.
    mixup: blend share * image + (1 - share) * other, and the labels alike, with the image that
        comes next in the epoch (the first after the last); the share is one of 1024 equally likely
        quantiles of Beta(mixup, mixup), in steps of 1 / 256 (Zhang, Cisse, Dauphin and Lopez-Paz
        2018). At most 10. A batch's labels are float32 (n, classes) then.
    cutout: set a square of so many pixels a side to the mean (0 after normalising) around a pixel
        of the output chosen at random; what lies outside is not cut (DeVries and Taylor 2017). An
        even side reaches one pixel further up and left. At most the height and the width.
    mean, std: of each channel, or one number for all, on the scale from 0 to 1. What a model was
        trained with belongs to its evaluation too; the scripts use none.

    All places, angles and factors are equally likely. Pixels are rounded to bytes after rotation,
    colour and mixup. Raises TypeError and ValueError.
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    padding: str = "zero"
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    rotate: float = 0.0
    colour: float = 0.0
    mixup: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop", "cutout"):
            value = getattr(self, name)
            if not is_int(value):
                raise TypeError(f"Augmentation: {name} must be an int, got {value!r}")
            if value < 0:
                raise ValueError(f"Augmentation: {name} must be >= 0, got {value}")
        for name, most, below in (("rotate", 45, False), ("colour", 1, True),
                                  ("mixup", 10, False)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
                raise TypeError(f"Augmentation: {name} must be a number, got {value!r}")
            if not 0 <= value <= most or (below and value == most):
                raise ValueError(f"Augmentation: {name} must be >= 0 and {'<' if below else '<='} "
                                 f"{most}, got {value}")
        if not isinstance(self.flip, bool):
            raise TypeError(f"Augmentation: flip must be a bool, got {self.flip!r}")
        if self.padding not in ("zero", "reflect"):
            raise ValueError("Augmentation: padding must be 'zero' or 'reflect', got "
                             f"{self.padding!r}")
        for name in ("mean", "std"):
            value = getattr(self, name)
            try:
                given = np.asarray(value)
            except ValueError:  # lists of several lengths
                given = np.empty((0, 0))
            if given.dtype.kind not in "iuf" or given.ndim > 1 or not given.size:
                raise TypeError(f"Augmentation: {name} must be a number or one for each channel, "
                                f"got {value!r}")
            with np.errstate(over="ignore"):
                numbers = given.astype(np.float32)  # in which it may be computed
            if not np.isfinite(numbers).all() or (name == "std" and (numbers <= 0).any()):
                raise ValueError(f"Augmentation: {name} must be finite"
                                 f"{' and > 0' if name == 'std' else ''}, got {value!r}")

    @property
    def draws(self) -> bool:
        """Whether any of it is random."""
        return bool(self.crop or self.flip or self.cutout or self.blends)

    @property
    def blends(self) -> bool:
        """Whether pixels are computed from others, which kernels/augment.cu does."""
        return bool(self.rotate or self.colour or self.mixup)

    @property
    def colour_steps(self) -> int:
        """Of 1 / 256, from 1 to the largest factor."""
        return round(256 * self.colour)

    def check_fits(self, h: int, w: int, c: int) -> None:
        """Raise ValueError where images of (h, w, c) are too small, or have other channels."""
        if not h * w * c:
            raise ValueError(f"images of {h}x{w} with {c} channels have no pixels")
        if self.crop >= min(h, w) and self.crop:
            raise ValueError(f"Augmentation: crop must be less than the height and the width of "
                             f"the images, {h}x{w}; got {self.crop}")
        if self.cutout > min(h, w):
            raise ValueError(f"Augmentation: cutout must be at most the height and the width of "
                             f"the images, {h}x{w}; got {self.cutout}")
        if self.rotate and max(h, w) > MAX_ROTATED_SIDE:
            raise ValueError(f"Augmentation: rotate takes images of up to {MAX_ROTATED_SIDE} "
                             f"pixels a side, got {h}x{w}")
        if self.colour and c not in (1, 3):
            raise ValueError(f"Augmentation: colour takes images of 1 or 3 channels, got {c}")
        for name in ("mean", "std"):
            given = np.size(getattr(self, name))
            if given not in (1, c):
                raise ValueError(f"Augmentation: {name} has {given} values, the images have {c} "
                                 f"channel{'s' if c > 1 else ''}")

    def normalise(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Write (pixels / 255 - mean) / std to out: uint8 (m, h, w, c) -> floats (m, h, w, c).

        Computed in float64 for float64, else in float32, and then rounded to the dtype of out.
        """
        short = out.dtype.itemsize < 4
        x = np.empty(out.shape, np.float32) if short else out
        np.divide(pixels, 255, out=x, dtype=x.dtype)
        *_, h, w, c = x.shape
        if np.any(self.mean):
            x -= _spread(self.mean, h, w, c, x.dtype)
        if not np.all(np.equal(self.std, 1)):
            x /= _spread(self.std, h, w, c, x.dtype)
        if short:
            out[...] = x

    def table(self, c: int, dtype: Any) -> np.ndarray:
        """What becomes of each byte of each of c channels: (c, ENTRIES).

        The last two entries are 0, for what is cut out, and NaN, for an image that is not there.
        """
        table = np.zeros((c, ENTRIES), dtype)
        of_bytes = np.empty((1, 1, 256, c), dtype)
        self.normalise(np.repeat(np.arange(256, dtype=np.uint8), c).reshape(of_bytes.shape),
                       out=of_bytes)
        table[:, :256] = of_bytes[0, 0].T
        table[:, NO_IMAGE] = np.nan
        return table

    def choices(self) -> np.ndarray:
        """What is drawn from, with equal chances: int32 (3, CHOICES), the cosines and the sines of
        angles, times ONE, and the shares of mixup, times 256."""
        angles = np.radians(self.rotate * ((2 * np.arange(CHOICES) + 1) / CHOICES - 1))
        shares = _beta_quantiles(self.mixup) if self.mixup else np.ones(CHOICES)
        return np.rint([ONE * np.cos(angles), ONE * np.sin(angles), 256 * shares]).astype(np.int32)


def _beta_quantiles(alpha: float) -> np.ndarray:
    """CHOICES equally likely numbers in the middle of each other's, of Beta(alpha, alpha).

    Its density is x^(a-1) (1-x)^(a-1). With v = (2 x)^a, that of v from 0 to 1, for x up to 1/2,
    is (1 - v^(1/a) / 2)^(a-1), which is bounded. The other half is the mirror image of this one.
    """
    v = np.linspace(0, 1, 2**17 + 1)
    density = (1 - v ** (1 / alpha) / 2) ** (alpha - 1)
    share = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    wanted = (2 * np.arange(CHOICES // 2) + 1) / CHOICES
    half = np.interp(wanted * share[-1], share, v) ** (1 / alpha) / 2
    return np.concatenate([half, 1 - half[::-1]])


def _spread(value: float | Sequence[float], h: int, w: int, c: int, dtype: Any) -> np.ndarray:
    """value for each element of an image: NumPy is slow along an axis of three."""
    return np.tile(np.broadcast_to(np.asarray(value, dtype), c), h * w).reshape(h, w, c)
