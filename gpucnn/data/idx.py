"""The IDX format of MNIST and Fashion-MNIST, plain or gzipped.

Layout: two zero bytes, a type code (8 is the unsigned byte, the only one read here), the number of
dimensions, each dimension as a big-endian 32-bit integer, then the elements in C order.
Source: http://yann.lecun.com/exdb/mnist/
"""
from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpucnn.data.dataset import Dataset
from gpucnn.data.official import find_file
from gpucnn.errors import DataError
from gpucnn.files import PathLike, one_line, open_file

_UNSIGNED_BYTE = 0x08
_TYPE_NAMES = {0x09: "int8", 0x0B: "int16", 0x0C: "int32", 0x0D: "float32", 0x0E: "float64"}
# Deflate spends at least 2 bits on a copy of at most 258 bytes (RFC 1951).
_DEFLATE_MAX_RATIO = 1032
_CHUNK = 1 << 20


def read_idx(path: PathLike, ndim: int | None = None) -> np.ndarray:
    """The uint8 array in an IDX file; gzip is recognised by content, not by name.

    ndim: the number of dimensions that the file must have; None takes 1 to 4.

    Nothing is allocated on the word of a damaged header: memory grows with the bytes that are
    really there, and no more than the header promises, and one byte, is ever unpacked.

    Raises FileNotFoundError, and DataError for whatever is not a complete IDX file.
    """
    name = one_line(path)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not gzipped:
            return _parse(name, file, ndim, size)
        try:
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _parse(name, unpacked, ndim, size * _DEFLATE_MAX_RATIO)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise DataError(f"{name}: damaged gzip file ({one_line(e)}); fetch it again") from e


def read_part(folder: Path, prefix: str, class_names: tuple[str, ...], name: str, *,
              first_label: int = 0, transposed: bool = False) -> Dataset:
    """The images and labels of the two IDX files, gzipped or not, that are named as MNIST's are.

    first_label: that of the first class. transposed: whether images lie on their sides, mirrored.

    Raises FileNotFoundError, and DataError where they are damaged or do not fit each other.
    """
    images = read_idx(find_file(folder, f"{prefix}-images-idx3-ubyte.gz"), ndim=3)
    labels = read_idx(find_file(folder, f"{prefix}-labels-idx1-ubyte.gz"), ndim=1)
    if transposed:
        images = np.ascontiguousarray(images.transpose(0, 2, 1))
    if first_label:
        labels = labels.astype(np.int64) - first_label
    try:
        return Dataset(images[..., None], labels, class_names, name)
    except ValueError as e:
        raise DataError(f"{one_line(folder)}: {prefix}: {e}") from e


def _parse(name: str, stream: BinaryIO | gzip.GzipFile, ndim: int | None,
           most: int) -> np.ndarray:
    """Read one array; `most` is how many bytes the stream can possibly hold."""
    magic = stream.read(4)
    if not magic:
        raise DataError(f"{name}: empty file; expected an IDX file")
    expected = f"0x0000080{'N' if ndim is None else ndim}"
    if len(magic) < 4 or magic[:2] != b"\0\0":
        hint = "; is it still gzipped?" if magic[:2] == b"\x1f\x8b" else ""
        raise DataError(
            f"{name}: not an IDX file (magic 0x{magic.hex()}, expected {expected}){hint}")
    if magic[2] != _UNSIGNED_BYTE:
        type_name = _TYPE_NAMES.get(magic[2], "unknown")
        raise DataError(f"{name}: IDX type code 0x{magic[2]:02x} ({type_name}) is not supported; "
                        "use 0x08 (unsigned byte)")
    if not 1 <= magic[3] <= 4 or ndim not in (None, magic[3]):
        raise DataError(f"{name}: {magic[3]} dimensions (magic 0x{magic.hex()}), expected "
                        f"{'1 to 4' if ndim is None else ndim}")

    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{name}: truncated: the file ends inside its header")
    shape = struct.unpack(f">{magic[3]}I", header)
    if 0 in shape:
        raise DataError(f"{name}: a dimension of {shape} is 0")
    count = math.prod(shape)
    if count > most:
        raise DataError(f"{name}: truncated: the header promises {shape}, {count} bytes, "
                        f"more than the file can hold")

    data = bytearray()
    while len(data) < count and (chunk := stream.read(min(_CHUNK, count - len(data)))):
        data += chunk
    if len(data) < count:
        raise DataError(f"{name}: truncated: the header promises {shape}, {count} bytes, "
                        f"but {len(data)} follow")
    if stream.read(1):
        raise DataError(f"{name}: more bytes follow than the header's {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)
