"""Image files: found in folders, and read as the arrays that a model wants."""
from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from gpucnn.data.loader import to_float
from gpucnn.errors import DataError
from gpucnn.files import PathLike, one_line, open_file

if TYPE_CHECKING:
    from PIL import Image

_STUBS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # which Pillow knows by name, and cannot decode


def find_images(folder: PathLike, on_error: Callable[[OSError], object] | None = None
                ) -> list[Path]:
    """The images in a folder and below, sorted: files whose names end as Pillow's formats do.

    Symbolic links are followed, and each folder is visited once, however many links lead to it.
    Names that begin with a dot are left out.

    on_error: called for each folder that cannot be listed; without it the OSError is raised.
    """
    _require_pillow(one_line(folder))
    from PIL import Image
    endings = {ending for ending, kind in Image.registered_extensions().items()
               if kind in Image.OPEN and kind not in _STUBS}

    def refuse(e: OSError) -> None:
        if on_error is None:
            raise e
        on_error(e)

    found: list[Path] = []
    visited: set[tuple[int, int]] = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        found += [Path(root, name) for name in files
                  if name[0] != "." and os.path.splitext(name)[1].lower() in endings]
    return sorted(found)


def read_image(source: PathLike | bytes, size: tuple[int, int] | None, channels: int = 1, *,
               name: str | None = None) -> np.ndarray:
    """Read an image of any kind that Pillow knows as float32 (h, w, channels) from 0 to 1.

    source: the path of a file, or what stands in one.
    size: (h, w) in pixels; the image is stretched to it, averaging where it shrinks. None leaves
        it as it is.
    channels: 1 for grey (luma, ITU-R 601), 3 for RGB.
    name: what messages call it (default: the path).

    The EXIF orientation is applied, transparent pixels are laid on white, and an animation gives
    its first frame. 16-bit grey is divided by 65535. Pixels stored as floating-point numbers must
    be from 0 to 1 already; NaN is passed on, for the caller to refuse.

    Raises FileNotFoundError, and DataError for what is not a readable image or has more pixels than
    Pillow's limit (PIL.Image.MAX_IMAGE_PIXELS, 89 million by default).
    """
    if channels not in (1, 3):
        raise ValueError(f"read_image: channels must be 1 (grey) or 3 (RGB), got {channels!r}")
    if name is None:
        name = "image" if isinstance(source, bytes) else one_line(source)
    image = _decode(source, name, "L" if channels == 1 else "RGB")
    h, w = size or (image.height, image.width)
    if image.mode in ("L", "RGB"):
        return to_float(_resize(image, h, w).reshape(h, w, channels))
    grey = _resize(_unit_range(name, image), h, w)
    return np.repeat(grey[..., None], channels, axis=2)


def _decode(source: PathLike | bytes, name: str, mode: str) -> Image.Image:
    """The upright first frame in the given mode, or in its own if that has more than 8 bits."""
    _require_pillow(name)
    from PIL import Image, ImageOps, UnidentifiedImageError
    with _opened(source) as file, warnings.catch_warnings():
        # Pillow warns of damage that it got over, and of size, which is checked below.
        warnings.simplefilter("ignore")
        try:
            image: Image.Image = Image.open(file)
            _check_pixels(name, image.size, Image.MAX_IMAGE_PIXELS)
            image = ImageOps.exif_transpose(image)
            if image.mode == "F" or image.mode.startswith("I"):
                return image
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(mode)
        except DataError:
            raise
        except Image.DecompressionBombError as e:
            limit = Image.MAX_IMAGE_PIXELS or 0
            raise DataError(f"{name}: more than {2 * limit // 10**6} Mpx exceeds the limit of "
                            f"{limit // 10**6} Mpx; make the image smaller first") from e
        except UnidentifiedImageError as e:
            cause = "no known format" if file.seek(0, os.SEEK_END) else "empty file"
            raise DataError(f"{name}: not a readable image ({cause})") from e
        # Pillow's decoders raise almost anything on damaged bytes: OSError, ValueError,
        # SyntaxError, RuntimeError, ...
        except Exception as e:
            cause = one_line(e) or type(e).__name__
            raise DataError(f"{name}: not a readable image ({cause})") from e


def _require_pillow(name: str) -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as e:
        raise DataError(
            f"{name}: reading images needs Pillow; pip install 'gpucnn[images]'") from e


def _opened(source: PathLike | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open_file(source)


def _check_pixels(name: str, size: tuple[int, int], limit: int | None) -> None:
    width, height = size
    if limit is not None and width * height > limit:
        raise DataError(f"{name}: {width}x{height} pixels exceeds the limit of "
                        f"{limit // 10**6} Mpx; make the image smaller first")


def _unit_range(name: str, image: Image.Image) -> Image.Image:
    """16-bit, 32-bit or float grey as Pillow's mode F, from 0 to 1."""
    from PIL import Image
    pixels = np.asarray(image).astype(np.float32)
    if image.mode != "F":
        pixels /= 65535
    if ((pixels < 0) | (pixels > 1)).any():
        accepted = "0 to 1" if image.mode == "F" else "0 to 65535"
        raise DataError(f"{name}: pixels of mode {image.mode} lie outside {accepted}; rescale them "
                        "or save the image with 8 bits")
    return Image.fromarray(pixels)


def _resize(image: Image.Image, h: int, w: int) -> np.ndarray:
    # Bilinear in Pillow averages over all that a pixel shrinks from, and cannot overshoot 0 or 1.
    from PIL import Image
    return np.asarray(image.resize((w, h), Image.Resampling.BILINEAR))
