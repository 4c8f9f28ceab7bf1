"""What the scripts share: errors on one line, exit codes, the backend, and finding a run.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130, 141 and 143 for SIGINT, SIGPIPE and
SIGTERM.
"""
from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from gpucnn.backend import Backend, get_backend
from gpucnn.data import Augmentation, Dataset, open_dataset
from gpucnn.data.folder import ImageFolder
from gpucnn.data.packed import is_packed
from gpucnn.data.sources import NAMED, list_parts
from gpucnn.errors import BackendError, DataError, GpucnnError, ModelFormatError
from gpucnn.files import one_line
from gpucnn.layers import Layer
from gpucnn.models import load_model
from gpucnn.precision import make_precision

MODEL_FILE = "model.safetensors"
DATA = (f"one of {', '.join(NAMED)}; or the path of a folder of images (one folder a class, "
        "perhaps in train/ and test/), of an .npz file, or of a folder that scripts/pack.py made")
AUGMENTATIONS = ("crop", "flip", "rotate", "colour", "mixup", "cutout")
Number = TypeVar("Number", int, float)


class UsageError(Exception):
    """What was asked for cannot be done as asked: exit code 2."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong on one line, as all other errors are said."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpucnn: error: {one_line(message)}; see {self.prog} --help\n")


class Unfinished(BrokenPipeError):
    """The reader of our output has gone before the work was done: exit code 141, as of SIGPIPE."""


def run(main: Callable[[argparse.Namespace], int | None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line, call main, and exit.

    Failures are one line on standard error, and so are warnings; --debug shows the traceback of an
    error and the place of a warning instead.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for good)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _terminate)
    if not arguments.debug:
        warnings.formatwarning = lambda message, *place, **line: f"warning: {one_line(message)}\n"
    try:
        code = main(arguments) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError as e:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141 if isinstance(e, Unfinished) else 0
    except (GpucnnError, UsageError, ValueError, TypeError, OSError, ImportError,
            MemoryError) as e:
        if arguments.debug:
            raise
        print(f"gpucnn: error: {_message(e)}", file=sys.stderr)
        code = 2 if isinstance(e, UsageError) else 1
    for number in (signal.SIGINT, signal.SIGTERM):  # no traceback while Python ends
        signal.signal(number, signal.SIG_DFL)
    sys.exit(code)


def _message(e: Exception) -> str:
    """On one line; errors of the system without their number and the quotes of Python."""
    if isinstance(e, OSError) and e.filename is not None and e.strerror:
        return one_line(f"{e.filename}: {e.strerror}")
    return one_line(e) or type(e).__name__


def choose_backend() -> Backend:
    """The backend that GPUCNN_BACKEND asks for, said on standard error. Raises UsageError."""
    chosen = os.environ.get("GPUCNN_BACKEND", "auto")
    try:
        backend = get_backend()
    except (BackendError, ValueError) as e:
        raise UsageError(str(e)) from e
    if chosen != "auto":  # which says so itself
        print(f"gpucnn: backend {backend.name} (GPUCNN_BACKEND={chosen})", file=sys.stderr)
    return backend


def require_precision(name: str, backend: Backend) -> None:
    """Raise UsageError where a model on this backend cannot have the precision."""
    try:
        make_precision("--precision", name, backend.name)
    except (ValueError, ImportError) as e:
        raise UsageError(str(e)) from e


def add_data_arguments(parser: argparse.ArgumentParser, of_run: bool = False) -> None:
    """of_run: without --data it is None, for config.take_data_of_run to fill in."""
    group = parser.add_argument_group("data")
    subset = "fashion-mnist-subset"
    default = f"{subset}, 10,000 + 2,000 images that ship with gpucnn"
    if of_run:
        default = f"those of the run, or {default}"
    group.add_argument("--data", metavar="NAME|PATH",
                       default=None if of_run else subset, help=f"{DATA} (default: {default})")
    group.add_argument("--decode-ahead", action=argparse.BooleanOptionalAction, default=False,
                       help="leave the images of a folder on the disk, and decode each batch while "
                            "those before it are computed: for more than memory holds")
    add_data_options(group)


def add_data_options(group: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Those of add_data_arguments that say how the data is read."""
    group.add_argument("--data-dir", metavar="DIR",
                       help="the folder that holds a named data set; otherwise its sub-folder of "
                            "GPUCNN_DATA_DIR, the user's cache, or a download")
    group.add_argument("--image-size", type=image_size, metavar="HxW",
                       help="stretch the images of a folder to so many pixels (default: 64x64)")
    group.add_argument("--channels", type=int, choices=(1, 3),
                       help="read the images of a folder as grey or RGB (default: RGB unless all "
                            "are grey)")
    group.add_argument("--test-share", type=share, metavar="S",
                       help="of images without a test part, how many of each class to test on "
                            "(default: 0.2)")
    group.add_argument("--workers", type=positive_int, metavar="N",
                       help="decode images in so many processes (default: one a core)")
    add_max_pixels(group)
    group.add_argument("--max-unpacked", type=positive_float, metavar="MB",
                       help="refuse an .npz file whose arrays come to more (default: 100 times "
                            "the file, at least 100)")


def add_max_pixels(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--max-pixels", type=positive_float, metavar="MPX",
                        help="refuse images of more million pixels (default: Pillow's 89)")


def load_data(arguments: argparse.Namespace, input_shape: tuple[int, ...] | None = None
              ) -> tuple[Dataset, Dataset]:
    """The training and the test set that the arguments name.

    input_shape: the (h, w, c) of a model, which folders of images are then read as where the
    arguments do not say otherwise.
    """
    load = partial(open_dataset, decode_ahead=arguments.decode_ahead)
    return _load(load, arguments, input_shape)


def list_data(arguments: argparse.Namespace) -> Sequence[Dataset | ImageFolder]:
    """What load_data gives, but for images that are to be decoded."""
    return _load(list_parts, arguments)


def _load(load: Callable[..., Any], arguments: argparse.Namespace,
          input_shape: tuple[int, ...] | None = None) -> Any:
    options = {name: getattr(arguments, name) for name in (
        "data_dir", "image_size", "channels", "test_share", "workers")}
    if arguments.image_size:
        options["image_size"] = tuple(int(side) for side in arguments.image_size.split("x"))
    if input_shape and Path(arguments.data).is_dir() and not is_packed(arguments.data):
        options["image_size"] = options["image_size"] or input_shape[:2]
        options["channels"] = options["channels"] or input_shape[2]
    try:
        return load(arguments.data, **options, max_pixels=millions(arguments.max_pixels),
                    max_unpacked=millions(arguments.max_unpacked))
    except ValueError as e:
        raise UsageError(str(e)) from e


def millions(value: float | None) -> int | None:
    """So many millions, or None for None."""
    return None if value is None else round(value * 10**6)


def add_augmentation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("augmentation, of training images, at random")
    group.add_argument("--crop", type=nonnegative_int, metavar="P", default=0,
                       help="shift each image by up to P pixels (default: do not)")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False,
                       help="mirror half of the images")
    group.add_argument("--rotate", type=nonnegative_float, metavar="DEG", default=0.0,
                       help="turn each image by up to DEG degrees, at most 45 (default: do not)")
    group.add_argument("--colour", type=share, metavar="S", default=0.0,
                       help="change brightness, contrast and saturation by up to this share "
                            "(default: do not)")
    group.add_argument("--mixup", type=nonnegative_float, metavar="ALPHA", default=0.0,
                       help="blend each image, and its label, with another, by shares of "
                            "Beta(ALPHA, ALPHA); 0.2 is common, 10 the most (default: do not)")
    group.add_argument("--cutout", type=nonnegative_int, metavar="K", default=0,
                       help="blacken a square of K x K pixels in each image (default: do not)")


def augmentation_of(arguments: argparse.Namespace) -> Augmentation:
    """What the arguments ask for. Raises UsageError for values out of range."""
    try:
        return Augmentation(**{name: getattr(arguments, name) for name in AUGMENTATIONS})
    except ValueError as e:
        raise UsageError(str(e)) from e


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="PATH", type=Path,
                        help="a run folder or a .safetensors file (default: the newest of runs/)")


def find_model(path: Path | None) -> Path:
    """The .safetensors file of --run. Raises DataError where there is none."""
    if path is None:
        runs = sorted(Path("runs").glob(f"*/{MODEL_FILE}"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise DataError("no trained model under runs/; train one with scripts/train.py, or "
                            "give one with --run")
        path = runs[-1]
    elif path.suffix != ".safetensors":
        path = path / MODEL_FILE
    if not path.exists():
        raise DataError(f"{one_line(path)}: no such model; give a run folder or a .safetensors "
                        "file with --run")
    return path


def load_run(path: Path | None) -> tuple[Layer, list[str]]:
    """The model of a run, and the names of its classes or else their numbers.

    Says on standard error which run. Raises DataError where there is none, ModelFormatError where
    the names are none.
    """
    path = find_model(path)
    print(f"gpucnn: model {one_line(path)}", file=sys.stderr)
    model, metadata = load_model(path)
    n = model.output_shape[0]
    names = metadata.get("class_names", [str(i) for i in range(n)])
    if not (isinstance(names, list) and len(names) == n and all(isinstance(s, str) for s in names)):
        raise ModelFormatError(f"{one_line(path.with_suffix('.json'))}: class_names must be {n} "
                               f"strings, got {names!r}")
    return model, names


def require_folder_of(option: str, path: Path | None) -> None:
    """Raise UsageError where the file of an option has no folder to lie in: before a long run."""
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{option}: {one_line(path.parent)} is not a folder")


def positive_int(text: str) -> int:
    """An argparse type."""
    value = _number(int, text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return value


def nonnegative_int(text: str) -> int:
    """An argparse type."""
    value = _number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be >= 0, got {text}")
    return value


def image_size(text: str) -> str:
    """An argparse type: HxW, or one number for both; as HxW, which TOML can hold."""
    sides = [positive_int(side) for side in text.lower().split("x")]
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"must be HxW, such as 64x64, got {text}")
    return f"{sides[0]}x{sides[-1]}"


def positive_float(text: str) -> float:
    """An argparse type."""
    value = _number(float, text)
    if not (value > 0 and np.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be > 0 and finite, got {text}")
    return value


def nonnegative_float(text: str) -> float:
    """An argparse type."""
    value = _number(float, text)
    if not (value >= 0 and np.isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be >= 0 and finite, got {text}")
    return value


def share(text: str) -> float:
    """An argparse type."""
    value = _number(float, text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 0 and < 1, got {text}")
    return value


def seed(text: str) -> int:
    """An argparse type."""
    value = _number(int, text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**32 - 1, got {text}")
    return value


def _number(kind: type[Number], text: str) -> Number:
    try:
        return kind(text)
    except ValueError as e:
        what = "an int" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what}, got {text}") from e


def _terminate(number: int, frame: Any) -> None:
    sys.exit(128 + number)
