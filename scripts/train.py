"""Train a network, and leave the model, its curves, its metrics and a report in a folder.

Settings come from a TOML file, if one is given, and from flags, which override it. A run that was
killed goes on with --resume, and ends with the same bits as one that never was.
"""
from __future__ import annotations

import argparse
import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/train.py

from gpucnn import cli, optim, schedules
from gpucnn.config import Parser
from gpucnn.files import one_line
from gpucnn.models import MODELS
from gpucnn.precision import PRECISIONS
from gpucnn.report import require_pillow
from gpucnn.training.run_folder import CONFIG_FILE, new_folder, run_folder
from gpucnn.viz import require_matplotlib
from scripts.train_run import Run, settings_of


class TrainParser(Parser):
    """A run that goes on has the settings that it wrote down, where no file is given."""

    def config_of(self, arguments: argparse.Namespace) -> Path | None:
        if arguments.config is None and arguments.resume and arguments.out:
            written = arguments.out / CONFIG_FILE
            return written if written.is_file() else None
        return arguments.config


def parser() -> TrainParser:
    p = TrainParser(prog="train.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_data_arguments(p)
    p.add_argument("--train-images", type=cli.positive_int, metavar="N",
                   help="train on the first N images only")
    p.add_argument("--test-images", type=cli.positive_int, metavar="N",
                   help="test on the first N images only")
    p.add_argument("--validation", type=cli.share, metavar="SHARE", default=0.0,
                   help="keep this share of the training images back, chosen at random, and look "
                        "at them after each epoch in the place of the test set, which is then seen "
                        "once, at the end (default: do not)")

    group = p.add_argument_group("training")
    group.add_argument("--model", choices=MODELS, default="article",
                       help="the network (default: %(default)s)")
    group.add_argument("--epochs", type=cli.positive_int, default=3, help="(default: %(default)s)")
    group.add_argument("--batch-size", type=cli.positive_int, default=64,
                       help="(default: %(default)s)")
    group.add_argument("--optimizer", choices=optim.BY_NAME, default="adam",
                       help="(default: %(default)s)")
    group.add_argument("--learning-rate", type=cli.positive_float, metavar="ETA",
                       help="(default: the optimizer's own)")
    group.add_argument("--weight-decay", type=cli.nonnegative_float, metavar="L",
                       help="shrink the weights by this share of the learning rate in each step, "
                            "sparing biases and norms (default: 0.01 for adamw, else 0)")
    group.add_argument("--schedule", choices=schedules.BY_NAME, default="constant",
                       help="of the learning rate, step by step: as it is, a tenth of it after "
                            "each third of the epochs, down to 0 along a cosine, or up and down in "
                            "one cycle (default: %(default)s)")
    group.add_argument("--warm-up", type=cli.positive_float, metavar="EPOCHS",
                       help="begin with small learning rates for so long; 0.5 is half an epoch "
                            "(default: do not)")
    group.add_argument("--label-smoothing", type=cli.share, default=0.0, metavar="S",
                       help="share of each label given to all classes (default: %(default)s)")
    group.add_argument("--clip-norm", type=cli.positive_float, metavar="NORM",
                       help="scale gradients down to this joint norm (default: do not)")
    group.add_argument("--ema", type=cli.share, metavar="DECAY",
                       help="average the weights over the steps, with this decay, and test and "
                            "keep the average; 0.999 for example (default: do not)")
    group.add_argument("--accumulate", type=cli.positive_int, default=1, metavar="N",
                       help="make one update from the gradients of N batches, one after the other "
                            "(default: %(default)s)")
    group.add_argument("--auto-batch", action=argparse.BooleanOptionalAction, default=False,
                       help="where a batch does not fit into memory, halve the micro-batches that "
                            "it is made in, until it does: the same step, but for batch norm, "
                            "which sees a micro-batch at a time")
    group.add_argument("--patience", type=cli.positive_int, metavar="EPOCHS",
                       help="stop when the validation loss has not got better for so many epochs, "
                            "and keep the model of the best one; needs --validation (default: "
                            "make all epochs)")
    group.add_argument("--precision", choices=PRECISIONS, default="float32",
                       help="of activations and products; the mixed ones need a GPU, and tf32 is "
                            "float32 where there are no tensor cores (default: %(default)s)")
    group.add_argument("--eager", action=argparse.BooleanOptionalAction, default=False,
                       help="launch each kernel of a step by itself; by default a step is one CUDA "
                            "graph on a GPU")
    group.add_argument("--seed", type=cli.seed, default=0, help="of initial weights, shuffling, "
                       "augmentation and dropout (default: %(default)s)")

    cli.add_augmentation_arguments(p)

    group = p.add_argument_group("the run")
    group.add_argument("--out", type=Path, metavar="DIR",
                       help="its folder (default: a new one under runs/)")
    group.add_argument("--resume", action="store_true",
                       help="go on from the last checkpoint in --out, or begin where there is none")
    group.add_argument("--override", action="append", default=[], metavar="SETTING",
                       help="when going on, accept that this setting has changed; may be repeated")
    group.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True,
                       help="a run that goes on ends with the same bits, so it is refused where "
                            "device or versions are not the same; --no-deterministic accepts that. "
                            "A run's own steps are deterministic always")
    group.add_argument("--save-every", type=cli.nonnegative_float, default=600.0, metavar="SECONDS",
                       help="write a checkpoint so often, beside those after each epoch (default: "
                            "%(default)g)")
    group.add_argument("--keep", type=cli.positive_int, default=2, metavar="N",
                       help="how many checkpoints stay, beside the best one (default: %(default)s)")
    return p


def main(arguments: argparse.Namespace) -> int:
    backend = cli.choose_backend()
    cli.require_precision(arguments.precision, backend)
    check_arguments(arguments)
    resolve(arguments)
    cli.augmentation_of(arguments)  # what is wrong with it, before the data is read
    require_tqdm()
    require_matplotlib()
    require_pillow()
    train_set, test_set = cli.load_data(arguments)
    train_set = train_set.first(arguments.train_images)
    test_set = test_set.first(arguments.test_images)
    with run_folder(arguments.out or new_folder(arguments.model), arguments.resume) as folder:
        code = Run(arguments, backend, train_set, test_set, folder).go()
    print(folder)
    return code


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise UsageError for flags that do not go together."""
    settings = settings_of(arguments)
    for name in arguments.override:
        if name.replace("-", "_") not in (*settings, "train_set", "test_set"):
            raise cli.UsageError(f"--override: {one_line(name)} is not a setting; it takes one of "
                                 f"{', '.join(settings)}, train_set, test_set")
    if arguments.resume and arguments.out is None:
        raise cli.UsageError("--resume needs --out, the folder of the run that is to go on")
    if arguments.warm_up and arguments.warm_up > arguments.epochs:
        raise cli.UsageError(f"--warm-up: {arguments.warm_up:g} epochs are more than the "
                             f"{arguments.epochs} of --epochs, so that it would never end")
    if arguments.patience and not arguments.validation:
        raise cli.UsageError("--patience needs --validation: stopping by the test set would fit "
                             "the model to it")


def resolve(arguments: argparse.Namespace) -> None:
    """Where no learning rate or weight decay is given, write down the optimizer's own."""
    own = inspect.signature(optim.BY_NAME[arguments.optimizer]).parameters
    if arguments.learning_rate is None:
        arguments.learning_rate = own["learning_rate"].default
    if arguments.weight_decay is None:
        arguments.weight_decay = own["weight_decay"].default if "weight_decay" in own else 0.0


def require_tqdm() -> None:
    """Raise ImportError with the remedy where tqdm is missing."""
    try:
        import tqdm  # noqa: F401
    except ImportError as e:
        raise ImportError("training needs tqdm; pip install 'gpucnn[train]'") from e


if __name__ == "__main__":
    cli.run(main, parser())
