"""Image files: found in folders, and read as the arrays that a model wants, or as bytes to train
on."""
from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpucnn.data.loader import to_float
from gpucnn.errors import DataError
from gpucnn.files import PathLike, one_line, open_file

if TYPE_CHECKING:
    from PIL import Image

_SMALLER = "make the image smaller first, or raise --max-pixels (max_pixels)"
_STUBS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # which Pillow knows by name, and cannot decode


def find_images(folder: PathLike, on_error: Callable[[OSError], object] | None = None
                ) -> list[Path]:
    """The images in a folder and below, sorted: files whose names end as Pillow's formats do.

    Symbolic links are followed, and each folder is visited once, however many links lead to it.
    Names that begin with a dot are left out.

    on_error: called for each folder that cannot be listed; without it the OSError is raised.
    """
    endings = image_extensions(one_line(folder))

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


def image_extensions(name: str = "image folders") -> frozenset[str]:
    """Of the files that Pillow reads, such as ".jpg". Raises DataError, with the name, without it.
    """
    _require_pillow(name)
    from PIL import Image
    return frozenset(ending for ending, kind in Image.registered_extensions().items()
                     if kind in Image.OPEN and kind not in _STUBS)


def read_image(source: PathLike | bytes, size: tuple[int, int] | None, channels: int = 1, *,
               name: str | None = None, max_pixels: int | None = None) -> np.ndarray:
    """Read an image of any kind that Pillow knows as float32 (h, w, channels) from 0 to 1.

    source: the path of a file, or what stands in one.
    size: (h, w) in pixels; the image is stretched to it, averaging where it shrinks. None leaves
        it as it is.
    channels: 1 for grey (luma, ITU-R 601), 3 for RGB.
    name: what messages call it (default: the path).
    max_pixels: None for Pillow's limit (PIL.Image.MAX_IMAGE_PIXELS, 89 million by default).

    The EXIF orientation is applied, transparent pixels are laid on white, and an animation gives
    its first frame. 16-bit grey is divided by 65535. Pixels stored as floating-point numbers must
    be from 0 to 1 already; NaN is passed on, for the caller to refuse.

    Raises FileNotFoundError, and DataError for what is not a readable image or has more pixels.
    """
    if channels not in (1, 3):
        raise ValueError(f"read_image: channels must be 1 (grey) or 3 (RGB), got {channels!r}")
    x = _read(source, _called(source, name), size, channels, max_pixels)
    x = to_float(x) if x.dtype == np.uint8 else x
    return np.repeat(x, channels // x.shape[2], axis=2)


def read_bytes(path: PathLike, size: tuple[int, int], channels: int, *,
               max_pixels: int | None = None) -> np.ndarray:
    """What read_image gives, times 255, as uint8 (h, w, channels): to train on.

    Images of 8 bits give the same numbers in both; those of more are rounded to the nearest byte
    here. Raises what read_image raises, and DataError for NaN pixels.
    """
    x = _read(path, one_line(path), size, channels, max_pixels)
    if x.dtype != np.uint8:
        if np.isnan(x).any():
            raise DataError(f"{one_line(path)}: holds {np.isnan(x).sum()} NaN pixels at "
                            f"{size[0]}x{size[1]}; repair it or take it out")
        x = np.rint(255 * x).astype(np.uint8)
    return np.repeat(x, channels // x.shape[2], axis=2)


def is_grey(path: PathLike, *, max_pixels: int | None = None) -> bool:
    """Whether the file says that its pixels have one channel, and perhaps an alpha channel.

    Reads its head alone. Raises FileNotFoundError, and DataError for no image.
    """
    with _opened(path, one_line(path), max_pixels) as image:
        mode = image.mode
    return mode in ("1", "L", "LA", "La", "F") or mode.startswith("I")


def _called(source: PathLike | bytes, name: str | None) -> str:
    if name is not None:
        return name
    return "image" if isinstance(source, bytes) else one_line(source)


def _read(source: PathLike | bytes, name: str, size: tuple[int, int] | None, channels: int,
          max_pixels: int | None) -> np.ndarray:
    """uint8 (h, w, channels), or of an image of more than 8 bits float32 (h, w, 1), 0 to 1."""
    image = _decode(source, name, "L" if channels == 1 else "RGB", max_pixels)
    h, w = size or (image.height, image.width)
    if image.mode not in ("L", "RGB"):
        image = _unit_range(name, image)
    return _resize(image, h, w).reshape(h, w, -1)


def _decode(source: PathLike | bytes, name: str, mode: str, max_pixels: int | None) -> Image.Image:
    """The upright first frame in the given mode, or in its own if that has more than 8 bits."""
    with _opened(source, name, max_pixels) as image:
        from PIL import Image, ImageOps
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return image
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(mode)


@contextmanager
def _opened(source: PathLike | bytes, name: str, max_pixels: int | None) -> Iterator[Image.Image]:
    """The image, not decoded yet. Whatever Pillow raises becomes a DataError."""
    _require_pillow(name)
    from PIL import Image, UnidentifiedImageError
    usual = Image.MAX_IMAGE_PIXELS
    limit = usual if max_pixels is None else max_pixels
    file = io.BytesIO(source) if isinstance(source, bytes) else open_file(source)
    with file, warnings.catch_warnings():
        # Pillow warns of damage that it got over, and of size, which is checked here.
        warnings.simplefilter("ignore")
        try:
            Image.MAX_IMAGE_PIXELS = limit
            image = Image.open(file)
            width, height = image.size
            if limit is not None and width * height > limit:
                raise DataError(f"{name}: {width}x{height} pixels exceeds the limit of "
                                f"{_mpx(limit)}; {_SMALLER}")
            yield image
        except DataError:
            raise
        except Image.DecompressionBombError as e:
            most = limit or 0
            raise DataError(f"{name}: more than {_mpx(2 * most)} exceeds the limit of "
                            f"{_mpx(most)}; {_SMALLER}") from e
        except UnidentifiedImageError as e:
            cause = "no known format" if file.seek(0, os.SEEK_END) else "empty file"
            raise DataError(f"{name}: not a readable image ({cause})") from e
        # Pillow's decoders raise almost anything on damaged bytes: OSError, ValueError,
        # SyntaxError, RuntimeError, ...
        except Exception as e:
            cause = one_line(e) or type(e).__name__
            raise DataError(f"{name}: not a readable image ({cause})") from e
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def _require_pillow(name: str) -> None:
    try:
        import PIL  # noqa: F401
    except ImportError as e:
        raise DataError(
            f"{name}: reading images needs Pillow; pip install 'gpucnn[images]'") from e


def _mpx(pixels: int) -> str:
    return f"{pixels // 10**6} Mpx" if pixels >= 10**6 else f"{pixels / 1e6:g} Mpx"


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
