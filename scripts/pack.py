"""Pack a data set that is larger than memory into files that training reads from the disk."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/pack.py

from gpucnn import cli
from gpucnn.data.packed import pack, verify
from gpucnn.files import one_line

STEP = 10_000  # images, after which the progress is told


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="pack.py", description=__doc__)
    p.add_argument("data", metavar="SRC", help=cli.DATA)
    p.add_argument("out", metavar="OUT", type=Path, nargs="?",
                   help="the new folder; give it to train.py with --data")
    p.add_argument("--check", action="store_true",
                   help="compare the checksums of the packed folder SRC, and write nothing")
    cli.add_data_options(p)
    return p


def main(arguments: argparse.Namespace) -> None:
    if arguments.check == bool(arguments.out):
        raise cli.UsageError("give either OUT or --check")
    if arguments.check:
        verify(arguments.data)
        print(f"{one_line(arguments.data)}: all files are as they were packed")
        return
    parts = cli.list_data(arguments)
    train, test = (len(part.labels) for part in parts)
    done = 0

    def progress(images: int) -> None:
        nonlocal done
        done += images
        if done // STEP > (done - images) // STEP:
            print(f"{done:,} of {train + test:,} images", file=sys.stderr)

    pack(parts, arguments.out, progress=progress)
    print(f"{one_line(arguments.out)}: {train:,} training and {test:,} test images")


if __name__ == "__main__":
    cli.run(main, parser())
