"""gpucnn.fit: any form of data, the same bits as the parts it is made of."""
from __future__ import annotations

import numpy as np
import pytest

import gpucnn
from gpucnn import losses, optim, schedules
from gpucnn.data import ArrayLoader, Augmentation, Dataset, Loader
from gpucnn.layers import Conv2D, Dense, Flatten, Sequential
from gpucnn.training import Training, TrainStep

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (20, 5, 4, 1), np.uint8)
LABELS = RNG.integers(0, 3, 20)
DATA = Dataset(IMAGES, LABELS, ("a", "b", "c"), "random")


def net(outputs=3):
    return Sequential([Conv2D(3, activation="relu"), Flatten(), Dense(outputs)])


def weights(model):
    return model.backend.to_numpy(model.flat_data).tobytes()


def test_it_is_what_its_parts_do(backend):
    model = net()
    model.build((5, 4, 1), seed=7)
    optimizer = optim.AdamW(model, 0.01)
    loader = Loader(DATA, 8, seed=7, augmentation=Augmentation(flip=True))
    run = Training(TrainStep(model, losses.SoftmaxCrossEntropy(), optimizer),
                   loader, 3, schedule=schedules.cosine(0.01, 9), validation=Loader(DATA, 500))
    run.run()
    fitted = net()
    history = gpucnn.fit(fitted, DATA, epochs=3, batch_size=8, optimizer="adamw", seed=7,
                         learning_rate=0.01, schedule="cosine", validation=DATA,
                         augmentation=Augmentation(flip=True))
    assert history == run.history
    assert weights(fitted) == weights(model)


def test_all_forms_of_the_same_data_give_the_same_bits(backend):
    as_floats = (IMAGES / np.float32(255)).astype(np.float32)
    results = []
    for data in (DATA, (IMAGES, LABELS), (as_floats, LABELS),
                 [backend.asarray(as_floats), LABELS], Loader(DATA, 8, seed=0),
                 ArrayLoader(as_floats, LABELS.astype(np.uint8), 8, seed=0)):
        model = net()
        gpucnn.fit(model, data, epochs=2, batch_size=8)
        results.append(weights(model))
    assert set(results) == {results[0]}


def test_targets_of_another_loss(backend):
    x = RNG.standard_normal((30, 5, 4, 1))
    t = x.mean(axis=(1, 2, 3), keepdims=True)[:, 0, 0]
    model = net(1)
    history = gpucnn.fit(model, (x, t), epochs=30, batch_size=10, loss=losses.MeanSquaredError(),
                         learning_rate=0.01, precision="float64")
    assert model.dtype == np.float64
    assert history["train_loss"][-1] < history["train_loss"][0] / 10


def test_functions_are_called_and_may_end_it(backend):
    seen = []
    history = gpucnn.fit(net(), DATA, epochs=9, on_step=lambda record: seen.append(record.step),
                         on_epoch=[lambda record: record.epoch == 2,
                                   lambda record: seen.append(-record.epoch)])
    assert history["epoch"] == [1, 2]
    assert sorted(seen) == [-2, -1, 1, 2]


def test_patience_gives_the_best_epoch_back(backend):
    model, kept = net(), []
    history = gpucnn.fit(model, DATA, epochs=60, validation=DATA, patience=2, learning_rate=0.2,
                         on_epoch=lambda record: kept.append(weights(model)))
    best = int(np.argmin(history["validation_loss"]))
    assert len(history["epoch"]) == best + 3 < 60
    assert weights(model) == kept[best] != kept[-1]


@pytest.mark.parametrize("patience", [None, 2])
def test_an_average_of_the_parameters_is_what_it_ends_with(backend, patience):
    plain, averaged, kept = net(), net(), []

    def look(record):
        kept.append(losses.SoftmaxCrossEntropy()(averaged.forward(x), t)[0])

    x, t = next(Loader(DATA, 20).epoch())
    history = gpucnn.fit(averaged, DATA, epochs=4, average=0.9, validation=DATA, seed=1,
                         learning_rate=0.05, patience=patience, on_epoch=look)
    gpucnn.fit(plain, DATA, epochs=4, seed=1, learning_rate=0.05)
    assert weights(averaged) != weights(plain)
    loss, _ = losses.SoftmaxCrossEntropy()(averaged.forward(x), t)
    expected = history["validation_loss"]
    assert float(loss) == pytest.approx(min(expected) if patience else expected[-1], rel=1e-5)
    assert float(kept[-1]) != pytest.approx(float(loss), rel=1e-5)  # training goes on without it


def test_an_optimizer_of_ones_own(backend):
    model, made = net(), []

    def make(model):
        made.append(optim.Momentum(model, 0.1, nesterov=True))
        return made[0]

    gpucnn.fit(model, DATA, epochs=1, optimizer=make, schedule=lambda step: 0.5)
    assert made[0].learning_rate == 0.5


@pytest.mark.parametrize(("data", "options", "error", "message"), [
    (DATA, {"optimizer": "adem"}, ValueError, "fit: optimizer must be a function or one of sgd, "),
    (DATA, {"optimizer": 3}, TypeError, "fit: optimizer must be a name or a function, got 3"),
    (DATA, {"schedule": "linear"}, ValueError, "fit: schedule must be a function or one of const"),
    (DATA, {"on_epoch": 3}, TypeError, "fit: on_epoch must be a function or several, got 3"),
    (DATA, {"on_step": ["print"]}, TypeError, "fit: on_step must be a function or several"),
    (DATA, {"optimizer": optim.Adam, "learning_rate": 1.0}, ValueError, "fit: learning_rate goes "),
    (DATA, {"patience": 2}, ValueError, "Training: patience needs a validation set"),
    (IMAGES, {}, TypeError, "fit: data must be a data.Dataset, a Loader or .images, labels., got "),
    ((IMAGES[:0], LABELS[:0]), {}, ValueError, "Training: the training set has 0 images"),
    ((IMAGES, LABELS[:3]), {}, ValueError, "20 images but 3 labels"),
    ((IMAGES / 255, LABELS[:3]), {}, ValueError, "ArrayLoader: 20 images but 3 targets"),
    ((IMAGES[0] / 255, LABELS), {}, (TypeError, ValueError), "shape|dimensions"),
    ((IMAGES / 255, LABELS / 2), {}, TypeError, "ArrayLoader: t must be"),
    ((IMAGES / 255, LABELS), {"augmentation": Augmentation(flip=True)}, TypeError,
     "fit: an augmentation needs uint8 images .0..255., got float64"),
    (Loader(DATA, 8), {"augmentation": Augmentation()}, ValueError, "fit: a Loader has an augm"),
])
def test_arguments_are_checked(data, options, error, message):
    with pytest.raises(error, match=message):
        gpucnn.fit(net(), data, **options)


def test_a_built_model_keeps_its_precision():
    model = net()
    model.build((5, 4, 1))
    with pytest.raises(ValueError, match="fit: the model was built in float32; leave out prec"):
        gpucnn.fit(model, DATA, precision="float64")
