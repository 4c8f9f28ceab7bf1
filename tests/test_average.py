"""The moving average of the parameters: its numbers, how it is applied, saved and captured."""
from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gpucnn import losses, optim, use_backend
from gpucnn.layers import Dense, Sequential
from gpucnn.training import Average, TrainStep, evaluate
from gpucnn.update import SKIP
from tests.conftest import needs_simulator
from tests.gpusim.mutation import caught
from tests.trainings import Training, assert_same


def averaged(backend, decay=0.9, *, warm_up=True, capture=True, name="small", **options):
    """A Training whose step keeps an average."""
    training = Training(backend, name, **options)
    average = Average(training.model, decay, warm_up=warm_up)
    training.step = TrainStep(training.model, training.loss, training.optimizer, average=average,
                              capture=capture)
    return training, average


def flat_average(backend, size, dtype, offset=0, **options):
    """Of as much of a model as it sees; the arrays begin so many elements off an aligned address.
    """
    rng = np.random.default_rng(size)
    data = backend.asarray(rng.standard_normal(size + offset), dtype)[offset:]
    average = Average(SimpleNamespace(backend=backend, built=True, flat_data=data), **options)
    optimizer = SimpleNamespace(control=backend.asarray(np.zeros(7)))
    return average, optimizer, rng


def check_numbers(backend, sizes=(0, 1, 3, 1025), dtype=np.float64, offset=0):
    """Against the formula, in doubles; the third update is skipped."""
    for size in sizes:
        for warm_up in (True, False):
            average, optimizer, rng = flat_average(backend, size, dtype, offset, decay=0.3,
                                                   warm_up=warm_up)
            expected, updates = np.array(backend.to_numpy(average.array), np.float64), 0
            for step in range(6):
                theta = rng.standard_normal(size).astype(dtype)
                average.model.flat_data[...] = backend.asarray(theta)
                optimizer.control[SKIP] = float(step == 2)
                average.update(optimizer)
                if step != 2:
                    decay = min(0.3, (1 + updates) / (10 + updates)) if warm_up else 0.3
                    expected, updates = decay * expected + (1 - decay) * theta, updates + 1
                np.testing.assert_allclose(backend.to_numpy(average.array), expected,
                                           rtol=0, atol=40 * np.finfo(dtype).eps)
            assert average.updates == updates == 5
            assert average.array.dtype == dtype


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0, 1])
def test_numbers(backend, dtype, offset):
    check_numbers(backend, dtype=dtype, offset=offset)


def test_blocks_on_the_cpu_give_the_same(monkeypatch):
    with use_backend("numpy") as backend:
        monkeypatch.setattr(backend, "block_bytes", 1000)
        check_numbers(backend, sizes=(1025,))


BUGS = {
    "decay is not held down": ("optimizer.cu", "warm_up ? min(decay, (1 + t) / (10 + t)) : decay",
                               "decay"),
    "it is held down always": ("optimizer.cu", "warm_up ? min(decay", "true ? min(decay"),
    "a skipped step is taken in": ("optimizer.cu", "skip ? 0 : 1 - kept", "1 - kept"),
    "a skipped step is counted": ("optimizer.cu", "if (!skip) averaging", "averaging"),
    "what is kept and what is new change places": ("optimizer.cu", "0 : 1 - kept", "0 : kept"),
    "the last few are left out": (
        "optimizer.cu", "(size + VEC - 1) / VEC)) {\n        const int count = left_of_group(i, "
        "size);\n        const Values t", "size / VEC)) {\n        const int count = "
        "left_of_group(i, size);\n        const Values t"),
}


@needs_simulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    with caught(*bug):
        check_numbers(cupy_backend, sizes=(1027,))


def test_it_is_torchs_with_a_constant_decay(backend):
    torch = pytest.importorskip("torch")
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    training, average = averaged(backend.name, 0.8, warm_up=False, precision="float64",
                                 name="plain")
    shapes = {name.replace("/", "_"): p for name, p in training.model.parameters().items()}

    def load(module):
        with torch.no_grad():
            for name, p in shapes.items():
                getattr(module, name)[...] = torch.tensor(backend.to_numpy(p.data))
        return module

    module = torch.nn.Module()
    for name, p in shapes.items():
        module.register_parameter(name, torch.nn.Parameter(torch.empty(p.shape, dtype=float)))
    theirs = AveragedModel(load(module), multi_avg_fn=get_ema_multi_avg_fn(0.8))
    theirs.update_parameters(module)  # its first one is the copy that ours begins with
    for x, t in training.loader.epoch():
        training.step(x, t)
        theirs.update_parameters(load(module))
    with average.applied():
        for name, p in shapes.items():
            np.testing.assert_allclose(backend.to_numpy(p.data),
                                       getattr(theirs.module, name).detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_captured_and_plain_give_the_same_bits(cupy_backend, precision):
    (captured, one), (plain, other) = (averaged("cupy", precision=precision, capture=capture)
                                       for capture in (True, False))
    assert captured.run(0, 1) == plain.run(0, 1)
    assert_same(one.state_dict(), other.state_dict())
    assert one.updates == 6
    assert len(captured.step._graphs) == 2
    one.decay = other.decay = 0.5  # a setting that the graphs hold
    assert captured.run(2) == plain.run(2)
    assert_same(one.state_dict(), other.state_dict())


def test_training_is_the_same_with_it(backend):
    (training, _), without = averaged(backend.name), Training(backend.name)
    assert training.run(0, 1) == without.run(0, 1)
    assert_same(training.state(), without.state())


def test_an_update_that_is_left_out_leaves_it(backend):
    training, average = averaged(backend.name)
    x, t = training.data.images[:4].astype(np.float32), training.data.labels[:4]
    for _ in range(3):
        training.step(x, t)
    before = average.state_dict()
    x[1, 2, 2, 0] = np.inf
    training.step(x, t)
    assert_same(average.state_dict(), before)
    assert before["updates"] == 3


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_applied_and_the_same_bits_again(cupy_backend, precision):
    check_applied("cupy", precision)


def test_applied_on_the_cpu():
    check_applied("numpy", "float32")


def check_applied(backend, precision):
    training, average = averaged(backend, precision=precision)
    other, _ = averaged(backend, precision=precision)
    for each in (training, other):
        each.run(0, 1)
    own, to_numpy = training.state(), training.model.backend.to_numpy
    with average.applied():
        inside = training.state()
        np.testing.assert_array_equal(inside["data"], average.state_dict()["average"])
        if "cast" in inside:
            np.testing.assert_array_equal(inside["cast"], inside["data"].astype(np.float16))
        for path, (layer, name) in training.model.buffers().items():  # its own
            np.testing.assert_array_equal(to_numpy(layer.own_buffers[name]), own[path])
        assert (inside["data"] != own["data"]).any()
        loss = evaluate(training.model, training.loader.epoch()).loss
    assert_same(training.state(), own)
    assert loss != evaluate(training.model, training.loader.epoch()).loss
    assert training.run(2) == other.run(2), "captured graphs go on where they were"


def test_an_error_inside_restores_too(backend):
    training, average = averaged(backend.name)
    training.run(0)
    before = training.state()
    with pytest.raises(ZeroDivisionError), average.applied():
        1 / 0  # noqa: B018
    assert_same(training.state(), before)
    with average.applied():
        pass


def test_training_goes_on_with_the_same_average(backend):
    expected, average = averaged(backend.name)
    resumed, again = averaged(backend.name)
    expected.run(0)
    resumed.run(0)
    again.load_state_dict({"average": 0 * average.state_dict()["average"], "updates": np.array(0)})
    again.load_state_dict(average.state_dict())
    assert resumed.run(1) == expected.run(1)
    assert_same(again.state_dict(), average.state_dict())


def test_what_is_wrong_is_refused(backend):
    training, average = averaged(backend.name)
    with average.applied():
        x, t = training.data.images[:4].astype(np.float32), training.data.labels[:4]
        with pytest.raises(RuntimeError, match=r"^TrainStep: a step inside average.applied\(\)"):
            training.step(x, t)
        with pytest.raises(RuntimeError, match=r"^Average: applied\(\) stands inside another"), \
                average.applied():
            pass
    size = training.model.flat_data.size
    with pytest.raises(ValueError, match=rf"^the state of this Average is .*\({size},\).*, got "):
        average.load_state_dict({"average": np.zeros(3), "updates": np.array(1)})
    with pytest.raises(ValueError, match="^decay must be >= 0 and < 1, got 1$"):
        Average(training.model, 1)
    with pytest.raises(TypeError, match="^decay must be a number, got None$"):
        Average(training.model, None)
    with pytest.raises(TypeError, match="^warm_up must be True or False, got 1$"):
        Average(training.model, warm_up=1)
    with pytest.raises(RuntimeError, match="^Average needs a built model"):
        Average(Sequential([Dense(3)]))
    other = Training(backend.name)
    loss, adam = losses.SoftmaxCrossEntropy(), optim.Adam(other.model)
    with pytest.raises(ValueError, match="^TrainStep: the average is that of another model$"):
        TrainStep(other.model, loss, adam, average=average)
    with pytest.raises(TypeError, match="^TrainStep: average must be a training.Average or None, "
                                        "got 0.999$"):
        TrainStep(other.model, loss, adam, average=0.999)
