"""Say what images show: the probability of each class, for any images that Pillow reads.

Images that cannot be read are named on standard error and left out; the exit code is 1 then.
"""
from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/predict.py

import numpy as np

from gpucnn import cli
from gpucnn.data import find_images, read_image
from gpucnn.errors import DataError
from gpucnn.explain import grad_cam
from gpucnn.files import one_line, write_atomically
from gpucnn.layers import Layer
from gpucnn.training import predict
from gpucnn.viz import plot_overlay, require_matplotlib

STANDARD_INPUT = "-"
Say = Callable[[str], object]


class Source(NamedTuple):
    """An image to be read: what results call it, its path or else its bytes."""

    name: str
    file: str | bytes

    def read(self, size: tuple[int, int] | None, channels: int, max_pixels: int | None = None
             ) -> np.ndarray:
        """As read_image(), and refuses NaN, which is no colour."""
        called = "standard input" if self.name == STANDARD_INPUT else one_line(self.name)
        image = read_image(self.file, size, channels, name=called, max_pixels=max_pixels)
        if wrong := int(np.isnan(image).sum()):
            raise DataError(f"{called}: not a readable image (it holds {wrong} NaN values)")
        return image


class Prediction(NamedTuple):
    """What an image shows: the most probable classes, the first of all at the front.

    overlay: the path of the picture that --explain wrote, if it did.
    """

    path: str
    top: list[tuple[str, float]]
    overlay: str | None = None

    def record(self) -> dict[str, Any]:
        """For JSON."""
        pairs = [{"class": name, "probability": round(p, 6)} for name, p in self.top]
        overlay = {} if self.overlay is None else {"overlay": self.overlay}
        return {"path": self.path, **pairs[0], "top": pairs, **overlay}


Batches = Iterable[list[Prediction]]


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="predict.py", description=__doc__)
    p.add_argument("images", nargs="+", metavar="IMAGE",
                   help="a file, a folder (with all images below it), or - for an image on "
                        "standard input")
    cli.add_run_argument(p)
    p.add_argument("--top", type=cli.positive_int, default=3, metavar="K",
                   help="how many classes to show (default: %(default)s)")
    cli.add_max_pixels(p)
    p.add_argument("--invert", action="store_true",
                   help="exchange black and white: Fashion-MNIST shows light things on black")
    p.add_argument("--format", choices=FORMATS, default="table",
                   help="jsonl is one JSON object a line (default: %(default)s)")
    p.add_argument("--out", type=Path, metavar="FILE",
                   help="write there, all or nothing (default: standard output)")
    p.add_argument("--explain", type=Path, metavar="DIR",
                   help="write each image there once more, with the places that speak for its "
                        "class in colour, by Grad-CAM")
    p.add_argument("--batch-size", type=cli.positive_int, default=64, metavar="N",
                   help="how many images are in memory at once (default: %(default)s)")
    return p


def main(arguments: argparse.Namespace) -> int:
    cli.require_folder_of("--out", arguments.out)
    if arguments.explain:
        require_matplotlib()
    failures: list[Exception] = []

    def skip(say: Say, e: Exception) -> None:
        failures.append(e)
        if isinstance(e, OSError) and e.filename is not None:
            say("warning: " + one_line(f"{e.filename}: {e.strerror}"))
        else:
            say("warning: " + one_line(e))

    sources = find_sources(arguments.images, partial(skip, partial(print, file=sys.stderr)))
    cli.choose_backend()
    model, classes = cli.load_run(arguments.run)
    with output(arguments.out) as stream, progress(len(sources), arguments.out) as (advance, say):
        batches = predictions(model, classes, sources, arguments, partial(skip, say), advance)
        FORMATS[arguments.format](batches, stream)
    return 1 if failures else 0


def find_sources(arguments: list[str], skip: Callable[[OSError], None]) -> list[Source]:
    """What the command line names. Raises DataError for a folder without images, UsageError for
    standard input that is asked for twice or comes from the keyboard."""
    if arguments.count(STANDARD_INPUT) > 1:
        raise cli.UsageError("- stands for one image on standard input and can be given once")
    sources = []
    for name in arguments:
        if name == STANDARD_INPUT:
            if sys.stdin.isatty():
                raise cli.UsageError("- reads an image from standard input, which is a terminal; "
                                     "give a file, as in predict.py - < shoe.png")
            sources.append(Source(name, sys.stdin.buffer.read()))
        elif Path(name).is_dir():
            found = [str(path) for path in find_images(name, skip)]
            if not found:
                raise DataError(f"{one_line(name)}: no images in this folder or below it; give one "
                                "that has some, or files by name")
            sources += [Source(path, path) for path in found]
        else:
            sources.append(Source(name, name))
    return sources


def predictions(model: Layer, classes: list[str], sources: list[Source],
                arguments: argparse.Namespace, skip: Callable[[Exception], None],
                advance: Callable[[int], object]) -> Iterator[list[Prediction]]:
    """Those of a batch at a time."""
    h, w, c = model.input_shape
    limit = cli.millions(arguments.max_pixels)
    overlays = Overlays(arguments.explain, limit) if arguments.explain else None
    for start in range(0, len(sources), arguments.batch_size):
        batch = sources[start:start + arguments.batch_size]
        images, readable = [], []
        for source in batch:
            try:
                images.append(source.read((h, w), c, limit))
                readable.append(source)
            except (DataError, OSError) as e:
                skip(explained(source, e))
        if readable:
            x = 1 - np.stack(images) if arguments.invert else np.stack(images)
            probabilities = predict(model, x, [one_line(source.name) for source in readable])
            best = np.argsort(-probabilities, axis=1, kind="stable")[:, :arguments.top]
            found = [Prediction(source.name, [(classes[k], float(row[k])) for k in ks])
                     for source, row, ks in zip(readable, probabilities, best)]
            if overlays:
                maps = grad_cam(model, x, best[:, 0])
                found = [overlays.write(*each) for each in zip(readable, found, maps)]
            yield found
        advance(len(batch))


def explained(source: Source, e: Exception) -> Exception:
    """The error, with a word for those who expect - to read names of files."""
    if isinstance(source.file, bytes) and "no known format" in str(e):
        return DataError(f"{e}; - reads one image, not the names of files: for those use "
                         "xargs -d '\\n' predict.py")
    return e


class Overlays:
    """Writes pictures into a folder: cat.jpg's is cat.gradcam.png, the next of that name
    cat-2.gradcam.png."""

    def __init__(self, folder: Path, max_pixels: int | None = None):
        self.folder, self.max_pixels = folder, max_pixels
        self.numbers: Counter[str] = Counter()
        self.written: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, source: Source, prediction: Prediction, heat: np.ndarray) -> Prediction:
        """The prediction, with the path of the map over the image in its own size."""
        name, probability = prediction.top[0]
        path = self.folder / self.name_for(source.name)
        plot_overlay(source.read(None, 3, self.max_pixels), heat,
                     f"{one_line(name)} {probability:.1%}", path)
        return prediction._replace(overlay=str(path))

    def name_for(self, path: str) -> str:
        """One that this run has not given yet, also where upper and lower case are the same."""
        stem = "stdin" if path == STANDARD_INPUT else Path(path).stem[:100]
        while True:
            self.numbers[stem] += 1
            number = f"-{self.numbers[stem]}" if self.numbers[stem] > 1 else ""
            name = f"{stem}{number}.gradcam.png"
            if name.casefold() not in self.written:
                self.written.add(name.casefold())
                return name


def write_table(batches: Batches, stream: TextIO) -> None:
    """A line for each image, its columns as wide as the longest entries so far."""
    path_width = class_width = 0
    for batch in batches:
        rows = [(one_line(path), [(one_line(name), p) for name, p in top])
                for path, top, _ in batch]
        path_width = max([path_width, *(len(path) for path, _ in rows)])
        class_width = max([class_width, *(len(name) for _, top in rows for name, _ in top)])
        for path, top in rows:
            cells = [f"{name:<{class_width}} {p:>6.1%}" for name, p in top]
            print(f"{path:<{path_width}}", *cells, sep="  ", file=stream)
        stream.flush()


def write_csv(batches: Batches, stream: TextIO) -> None:
    """A header, and a row for each image: path,class,probability,class_2,probability_2, ..."""
    writer: csv.DictWriter | None = None
    for batch in batches:
        for path, top, overlay in batch:
            row: dict[str, Any] = {"path": path}
            for k, (name, p) in enumerate(top, 1):
                end = f"_{k}" if k > 1 else ""
                row |= {f"class{end}": name, f"probability{end}": round(p, 6)}
            if overlay is not None:
                row["overlay"] = overlay
            if writer is None:
                writer = csv.DictWriter(stream, row, lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
        stream.flush()


def write_json(batches: Batches, stream: TextIO) -> None:
    """A list of objects with path, class, probability, and top: all that --top asks for."""
    separator = "[\n"
    for batch in batches:
        for prediction in batch:
            stream.write(separator + json.dumps(prediction.record()))
            separator = ",\n"
    stream.write("\n]\n" if separator == ",\n" else "[]\n")


def write_jsonl(batches: Batches, stream: TextIO) -> None:
    """The same objects, one a line."""
    for batch in batches:
        for prediction in batch:
            print(json.dumps(prediction.record()), file=stream)
        stream.flush()


FORMATS: dict[str, Callable[[Batches, TextIO], None]] = {
    "table": write_table, "csv": write_csv, "json": write_json, "jsonl": write_jsonl}


@contextmanager
def output(path: Path | None) -> Iterator[TextIO]:
    """Standard output, or what becomes the file in the end. Names that are no UTF-8 keep their
    bytes."""
    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout
    else:
        text = io.StringIO()
        yield text
        write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


@contextmanager
def progress(total: int, out: Path | None) -> Iterator[tuple[Callable[[int], object], Say]]:
    """How to count what is done, and how to say something meanwhile.

    There is a bar where standard error is a terminal that the results are not written to.
    """
    if not sys.stderr.isatty() or (out is None and sys.stdout.isatty()):
        yield lambda n: None, partial(print, file=sys.stderr)
        return
    try:
        from tqdm import tqdm
    except ImportError as e:
        raise ImportError("a progress bar needs tqdm; pip install 'gpucnn[train]'") from e
    with tqdm(total=total, unit=" images", leave=False) as bar:
        yield bar.update, partial(bar.write, file=sys.stderr)


if __name__ == "__main__":
    cli.run(main, parser())
