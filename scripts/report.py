"""Write the page about a training run again, or one page that compares several."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/report.py

from gpucnn import cli
from gpucnn.config import take_data_of_run
from gpucnn.data import Dataset
from gpucnn.files import one_line
from gpucnn.report import RunRecord, read_record, require_pillow, write_comparison, write_report


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="report.py", description=__doc__)
    p.add_argument("runs", nargs="+", metavar="RUN", type=Path,
                   help="a run folder; one gives its report.html, several a comparison of what "
                        "their history.json and metrics.json say")
    p.add_argument("--out", type=Path, metavar="FILE",
                   help="of the comparison (default: compare.html)")
    cli.add_data_arguments(p, of_run=True)
    return p


def main(arguments: argparse.Namespace) -> None:
    records = [read_record(run) for run in arguments.runs]
    if len(records) > 1:
        out = arguments.out or Path("compare.html")
        if not out.parent.is_dir():
            raise cli.UsageError(f"--out: {one_line(out.parent)} is not a folder")
        print(write_comparison(records, out))
        return
    if arguments.out:
        raise cli.UsageError("--out is for the comparison of several runs; the report of one "
                             "is written into its folder")
    require_pillow()
    (record,) = records
    cli.choose_backend()
    model, _ = cli.load_run(record.folder)
    print(write_report(record.folder, model, test_images(arguments, record, model.input_shape),
                       history=record.history, metrics=record.metrics))


def test_images(arguments: argparse.Namespace, record: RunRecord,
                input_shape: tuple[int, ...]) -> Dataset:
    """As many as the run was tested on, of the data that it was trained on."""
    take_data_of_run(arguments, record.folder)
    train_set, test_set = cli.load_data(arguments, input_shape)
    trained_on = record.metrics.get("train_set", train_set.name)
    if trained_on != train_set.name:
        raise cli.UsageError(f"{one_line(record.folder)}: trained on {one_line(trained_on)}, but "
                             f"the data are {train_set.name}; give those of the run with --data")
    return test_set.first(record.metrics.get("test_images"))


if __name__ == "__main__":
    cli.run(main, parser())
