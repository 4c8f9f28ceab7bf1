"""Say what an image shows: the probability of each class, for any image that Pillow reads."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/predict.py

import numpy as np

from gpucnn import cli
from gpucnn.data import read_image
from gpucnn.errors import DataError
from gpucnn.files import one_line
from gpucnn.training import predict


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="predict.py", description=__doc__)
    p.add_argument("images", nargs="+", metavar="IMAGE", type=Path)
    cli.add_run_argument(p)
    p.add_argument("--top", type=cli.positive_int, default=3, metavar="K",
                   help="how many classes to show (default: %(default)s)")
    p.add_argument("--invert", action="store_true",
                   help="exchange black and white: Fashion-MNIST shows light things on black")
    return p


def main(arguments: argparse.Namespace) -> int:
    cli.choose_backend()
    model, classes = cli.load_run(arguments.run)
    h, w, c = model.input_shape
    images, readable = [], []
    for path in arguments.images:
        try:
            images.append(read_image(path, (h, w), c))
            readable.append(one_line(path))
        except (DataError, OSError) as e:  # the message names the image
            print(f"warning: {one_line(e)}", file=sys.stderr)
    if images:
        x = np.stack(images)
        probabilities = predict(model, 1 - x if arguments.invert else x, readable)
        for name, row in zip(readable, probabilities):
            best = np.argsort(-row)[:arguments.top]
            print(f"{name}: " + ", ".join(f"{classes[k]} {row[k]:.1%}" for k in best))
    return 1 if len(images) < len(arguments.images) else 0


if __name__ == "__main__":
    cli.run(main, parser())
