"""Training, evaluation and prediction of a built model."""
from gpucnn.training.loop import Evaluation, check_finite, evaluate, predict, train_step

__all__ = ["Evaluation", "check_finite", "evaluate", "predict", "train_step"]
