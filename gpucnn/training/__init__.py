"""Training, evaluation and prediction of a built model."""
from gpucnn.training.evaluation import Evaluation, check_finite, evaluate, predict
from gpucnn.training.step import StepResult, TrainStep, train_step

__all__ = ["Evaluation", "StepResult", "TrainStep", "check_finite", "evaluate", "predict",
           "train_step"]
