"""The files of well-known data sets: the folder that holds them, or their download into the cache.
"""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gpucnn.errors import DataError
from gpucnn.files import PathLike, one_line

VARIABLE = "GPUCNN_DATA_DIR"


def asked_folder(data_dir: PathLike | None, names: Sequence[str], *, shared: bool = False
                 ) -> tuple[Path, str] | None:
    """The folder that was asked for and what asked for it; None where nobody did.

    names: the sub-folders that the data set may have. data_dir itself holds it where it has none
    of them. The folder that GPUCNN_DATA_DIR names is that of all data sets, whose files may have
    the same names: it must have the sub-folder, unless shared says that its own files count.
    """
    if data_dir is not None:
        asked, source, shared = Path(data_dir), f"data_dir={one_line(data_dir)}", True
    elif variable := os.environ.get(VARIABLE):
        asked, source = Path(variable), f"{VARIABLE}={one_line(variable)}"
    else:
        return None
    found = [asked / name for name in names if (asked / name).is_dir()]
    return (found or [asked if shared else asked / names[0]])[0], source


def find_file(folder: Path, name: str) -> Path:
    """Where the file is, or else where the official one would be, gzipped if its name says so."""
    plain = folder / name.removesuffix(".gz")
    return plain if plain.exists() and not (folder / name).exists() else folder / name


def require_files(folder: Path, source: str, names: Iterable[str], hint: str = "") -> None:
    """Raise DataError where one of the files is missing, with or without .gz."""
    missing = [name for name in names if not find_file(folder, name).exists()]
    if missing:
        either = " (with or without .gz)" if missing[0].endswith(".gz") else ""
        raise DataError(f"{source}: {', '.join(missing)} not found there; expected "
                        f"{', '.join(names)}{either}{hint}")


def download(name: str, title: str, base_url: str, sha256: Mapping[str, str]) -> Path:
    """The cache folder, with those of the files fetched that were not there or damaged.

    Raises DataError where pooch is missing or a file cannot be had.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "gpucnn" / name
    wanted = [file for file in sha256 if not _is_official(folder / file, sha256[file])]
    if not wanted:
        return folder
    otherwise = "give the folder that holds it with --data-dir"
    try:
        import pooch
    except ImportError as e:
        raise DataError(
            f"{title} is not on this machine, and downloading it needs pooch; "
            f"pip install 'gpucnn[download]', or {otherwise} or {VARIABLE}, or use the packaged "
            "subset") from e
    cache = pooch.create(folder, base_url, registry=dict(sha256))
    for file in wanted:
        try:
            cache.fetch(file)
        # requests' errors are OSErrors, as a cache that cannot be written; a wrong checksum is a
        # ValueError.
        except (OSError, ValueError) as e:
            raise DataError(f"cannot download {base_url}{file} ({one_line(e)}); try again, or "
                            f"{otherwise}, or use the packaged subset") from e
    return folder


def _is_official(file: Path, sha256: str) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == sha256
