"""Training: an epoch after the other, stopped anywhere and gone on with to the same bits."""
from __future__ import annotations

import numpy as np
import pytest

from gpucnn import losses, optim, schedules
from gpucnn.data import Augmentation, Dataset, Loader
from gpucnn.errors import CheckpointError, TrainingError
from gpucnn.layers import BatchNorm, Conv2D, Dense, Dropout, Flatten, Sequential
from gpucnn.training import Average, Evaluation, Stopped, Training, TrainStep

EPOCHS, BATCH = 3, 4
RNG = np.random.default_rng(0)
IMAGES = Dataset(RNG.integers(0, 256, (10, 5, 4, 2), np.uint8), RNG.integers(0, 3, 10),
                 ("a", "b", "c"), "random")  # batches of 4, 4 and 2
HELD_OUT = Dataset(RNG.integers(0, 256, (6, 5, 4, 2), np.uint8), RNG.integers(0, 3, 6),
                   ("a", "b", "c"), "others")


def training(precision="float32", optimizer=optim.Adam, rate=0.01, average=True, **options):
    model = Sequential([Conv2D(3, activation="relu"), BatchNorm(), Dropout(0.3), Flatten(),
                        Dense(3)])
    model.build((5, 4, 2), seed=1, precision=precision)
    scale = optim.LossScale(model) if precision == "mixed_float16" else None
    chosen = optimizer(model, rate, loss_scale=scale)
    step = TrainStep(model, losses.SoftmaxCrossEntropy(loss_scale=scale), chosen, read_every=2,
                     average=Average(model, 0.9) if average else None)
    loader = Loader(IMAGES, BATCH, seed=2, augmentation=Augmentation(flip=True), dtype=model.dtype)
    settings = {"validation": Loader(HELD_OUT, 4, dtype=model.dtype),
                "schedule": schedules.one_cycle(rate, EPOCHS * len(loader)), **options}
    return Training(step, loader, settings.pop("epochs", EPOCHS), **settings)


def bits(run):
    arrays, numbers = run.state()
    return {name: a.tobytes() for name, a in arrays.items()} | {
        k: v for k, v in numbers.items() if "seconds" not in k}


@pytest.mark.parametrize("optimizer", [optim.Adam, optim.Momentum])
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_stopped_after_any_step_it_goes_on_to_the_same_bits(backend, precision, optimizer):
    if precision == "mixed_float16" and backend.name == "numpy":
        pytest.skip("mixed precision needs a GPU")
    whole = training(precision, optimizer)
    whole.run()
    for stop_at in (1, 2, 3, 5):
        run, saved = training(precision, optimizer), []
        with pytest.raises(Stopped):
            run.run(on_step=lambda record, run=run, at=stop_at: record.step == at and run.stop(),
                    save=lambda run=run, saved=saved: saved.append(run.state()))
        steps = len(saved[-1][0]["history/step"])
        assert stop_at <= steps <= stop_at + 4  # results come up to 2 * read_every steps late
        # An epoch's end is one of the places.
        assert saved[-1][1]["position"] in (0, 4, 8, 10)
        again = training(precision, optimizer)
        again.restore(*saved[-1])
        assert bits(again) == {name: a.tobytes() for name, a in saved[-1][0].items()} | {
            k: v for k, v in saved[-1][1].items() if "seconds" not in k}
        again.run()
        assert bits(again) == bits(whole)
        assert again.history == whole.history


def test_stopped_in_the_validation_it_is_saved_at_the_end_of_the_steps(backend):
    whole = training()
    whole.run()
    run = training()
    looked, inner = [], run.validation.epoch

    def epoch():
        looked.append(run.stop())
        return inner()

    run.validation.epoch = epoch
    with pytest.raises(Stopped):
        run.run()
    assert looked == [None]
    arrays, numbers = run.state()
    assert (run.epoch, numbers["position"], run.steps) == (0, len(IMAGES), 3)
    again = training()
    again.restore(arrays, numbers)
    again.run()
    assert again.history == whole.history


def test_stopped_before_it_runs_it_makes_no_step():
    """A signal may come between its handler and run()."""
    run, places = training(), []
    run.stop()
    with pytest.raises(Stopped):
        run.run(save=lambda: places.append(run.steps))
    assert places == [0]
    run.run()
    assert run.complete


def test_what_functions_are_told(backend):
    run, steps, epochs = training(), [], []
    run.run(on_step=steps.append, on_epoch=epochs.append)
    assert [(r.epoch, r.step, r.images) for r in steps] == [
        (e + 1, 3 * e + s + 1, n) for e in range(3) for s, n in enumerate((4, 4, 2))]
    assert [r.learning_rate for r in steps] == [run.schedule(s) for s in range(9)]
    assert [r.loss for r in steps] == run.history["step_loss"]
    for number, record in enumerate(epochs, 1):
        own = [r for r in steps if r.epoch == number]
        mean = sum(r.loss * r.images for r in own) / 10
        assert record.train_loss == pytest.approx(mean) == own[-1].mean_loss
        assert record.train_accuracy == own[-1].accuracy
        assert record.validation.loss == run.history["validation_loss"][number - 1]
        assert (record.epoch, record.epochs, record.step, record.images) == (
            number, 3, 3 * number, 10)
        assert record.best == (record.validation.loss < min(
            [np.inf, *run.history["validation_loss"][:number - 1]]))
        assert record.seconds > 0
    assert str(epochs[0]).startswith(f"epoch 1/3: loss {epochs[0].train_loss:.4f}, accuracy ")
    assert ", validation loss " in str(epochs[0])
    assert "validation" not in str(epochs[0]._replace(validation=None))


def test_it_ends_early_where_a_function_or_patience_says_so():
    run, places = training(epochs=50), []
    run.run(on_epoch=lambda record: record.epoch == 2, save=lambda: places.append(run.epoch))
    assert places == [1, 2]
    assert run.epoch == 2
    assert not run.complete
    run = training(epochs=50, patience=2)
    run.run()
    losses = run.history["validation_loss"]
    assert run.complete
    assert run.epoch == len(losses) < 50
    assert run.best_epoch == len(losses) - 2 == 1 + int(np.argmin(losses))
    assert run.best_step == 3 * run.best_epoch
    other = training(epochs=50, patience=2)
    other.loader.batch_size = 5  # of which an epoch has two
    other.restore(*run.state())
    assert other.best_step == run.best_step


def test_a_save_is_due_after_each_epoch_and_when_seconds_have_passed():
    run, places = training(), []
    run.run(save=lambda: places.append((run.epoch, run.position)))
    assert places == [(1, 0), (2, 0), (3, 0)]
    run, places = training(), []
    run.run(save=lambda: places.append((run.epoch, run.position)), save_seconds=0)
    assert places == [place for e in range(3)
                      for place in ((e, 4), (e, 8), (e, 10), (e + 1, 0))]


def test_losses_that_are_not_finite_end_it():
    run = training(optimizer=optim.GradientDescent, rate=1e30, schedule=None)
    run.last_good = "runs/a/checkpoints/step-8.safetensors"
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at epoch \d step \d \(lr 1e\+30\); "
                       r"last good checkpoint: runs/a/checkpoints/step-8.safetensors; lower"):
        run.run()


def test_a_validation_that_is_not_finite_ends_it_before_the_epoch_counts(monkeypatch):
    run = training()
    monkeypatch.setattr("gpucnn.training.loop.evaluate",
                        lambda model, batches: Evaluation(np.nan, 0, *map(np.zeros, (1, 1)), 0))
    with pytest.raises(TrainingError, match="the validation loss is nan after epoch 1; lower"):
        run.run()
    assert (run.epoch, run.best_epoch, run.steps) == (0, None, 3)


@pytest.mark.parametrize(("auto_batch", "micro_batches"), [(False, 1), (True, 4)])
def test_only_auto_batch_goes_on_with_other_micro_batches_than_those_given(auto_batch,
                                                                           micro_batches):
    run = training()
    arrays, numbers = run.state()
    run.step.auto_batch = auto_batch
    run.restore(arrays, numbers | {"micro_batches": 4})
    assert run.step.micro_batches == micro_batches


@pytest.mark.parametrize(("options", "message"), [
    ({"epochs": 0}, "Training: epochs must be an int >= 1, got 0"),
    ({"patience": 1.5}, "Training: patience must be an int >= 1, got 1.5"),
    ({"patience": 1, "validation": None}, "Training: patience needs a validation set"),
])
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        training(**options)


def test_a_state_stays_as_it_was_when_training_goes_on(backend):
    run = training()
    arrays, numbers = run.state()
    before = bits(run)
    run.run()
    assert bits(run) != before
    again = training()
    again.restore(arrays, numbers)
    assert bits(again) == before


def test_the_state_of_another_run_is_refused():
    arrays, numbers = training().state()
    other = training()
    changed = {k: v for k, v in arrays.items() if k != "model/dense1/b"}
    with pytest.raises(CheckpointError, match="missing dense1/b; unexpected dense1/c"):
        other.restore(changed | {"model/dense1/c": arrays["model/dense1/b"]}, numbers)
    with pytest.raises(ValueError, match="with an average of the weights, or without one"):
        training(average=False).restore(arrays, numbers)
    with pytest.raises(ValueError, match="the state of this Momentum is"):
        training(optimizer=optim.Momentum).restore(arrays, numbers)
