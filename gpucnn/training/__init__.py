"""Training, evaluation and prediction of a model."""
from gpucnn.training.average import Average
from gpucnn.training.evaluation import (
    Evaluation,
    check_finite,
    evaluate,
    log_probabilities,
    predict,
)
from gpucnn.training.fit import fit
from gpucnn.training.loop import EpochRecord, StepRecord, Stopped, Training
from gpucnn.training.plain import train_step
from gpucnn.training.results import StepResult
from gpucnn.training.step import TrainStep

__all__ = ["Average", "EpochRecord", "Evaluation", "StepRecord", "StepResult", "Stopped",
           "TrainStep", "Training", "check_finite", "evaluate", "fit", "log_probabilities",
           "predict", "train_step"]
