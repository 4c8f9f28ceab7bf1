"""Arrays as small PNG pictures inside the page."""
from __future__ import annotations

import base64
import io

import numpy as np

from gpucnn.report.html import Markup, tag

# Blue, nothing and orange, which colour-blind readers can tell apart; and from dark to light.
_DIVERGING = np.array([(0, 90, 156), (120, 178, 219), (247, 246, 243), (240, 160, 105),
                       (194, 80, 0)], float)
_SEQUENTIAL = np.array([(12, 20, 32), (10, 72, 120), (40, 132, 192), (146, 205, 236),
                        (255, 255, 250)], float)


def require_pillow() -> None:
    """Raise ImportError with the remedy where Pillow is missing: call it before a long run."""
    try:
        import PIL  # noqa: F401
    except ImportError as e:
        raise ImportError("reports need Pillow; pip install 'gpucnn[images]'") from e


def picture(pixels: np.ndarray, alt: str, *, class_: str | None = None, title: str | None = None,
            most: int = 96) -> Markup:
    """An <img> of uint8 pixels: (h, w), (h, w, 1), (h, w, 3) or (h, w, 4) with opacity.

    most: pixels on a side; larger pictures are averaged down to it.
    """
    from PIL import Image
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)
    if max(image.size) > most:
        image.thumbnail((most, most), Image.Resampling.BOX)
    png = io.BytesIO()
    image.save(png, "PNG", optimize=True)
    return tag("img", src=f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}",
               alt=alt, title=title, class_=class_, width=image.width, height=image.height)


def diverging(values: np.ndarray) -> np.ndarray:
    """(h, w) as colours, uint8 (h, w, 3): blue below 0, orange above, to the largest magnitude."""
    return _colours(0.5 + 0.5 * _to_one(values), _DIVERGING)


def sequential(values: np.ndarray) -> np.ndarray:
    """(h, w) as colours, uint8 (h, w, 3): the least dark, the largest bright; one value is dark."""
    values = np.nan_to_num(np.asarray(values, float), posinf=0, neginf=0)
    low, high = values.min(), values.max()
    return _colours((values - low) / ((high - low) or 1), _SEQUENTIAL)


def about_grey(values: np.ndarray) -> np.ndarray:
    """(h, w, 3) of either sign as colours about a middle grey, uint8."""
    return np.rint(127.5 + 127.5 * _to_one(values)).astype(np.uint8)


def tinted(share: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(h, w) from 0 to 1 as the opacity of a colour, uint8 (h, w, 4)."""
    opacity = np.rint(255 * share).astype(np.uint8)[..., None]
    return np.concatenate([np.broadcast_to(np.array(colour, np.uint8), (*share.shape, 3)),
                           opacity], axis=2)


def _to_one(values: np.ndarray) -> np.ndarray:
    """Divided by their largest magnitude; what is not finite is 0."""
    values = np.nan_to_num(np.asarray(values, float), posinf=0, neginf=0)
    return values / (np.abs(values).max() or 1)


def _colours(share: np.ndarray, stops: np.ndarray) -> np.ndarray:
    at = np.linspace(0, 1, len(stops))
    return np.rint(np.stack([np.interp(share, at, channel) for channel in stops.T],
                            axis=-1)).astype(np.uint8)
