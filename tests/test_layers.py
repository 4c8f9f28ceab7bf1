"""What every layer promises, from one table: a new layer is one new row."""
from __future__ import annotations

import re

import numpy as np
import pytest

from gpucnn import layers, models, optim
from gpucnn import rng as rng_module
from gpucnn.backend import use_backend
from gpucnn.layers import (
    GELU,
    AvgPool2D,
    BatchNorm,
    Concat,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool2D,
    LeakyReLU,
    MaxPool2D,
    ReLU,
    Residual,
    Scale,
    Sequential,
    Sigmoid,
    Softmax,
    SpaceToDepth,
    Tanh,
    Whiten2D,
    from_config,
)
from tests.conftest import needs_cupy, needs_simulator
from tests.gradcheck import gradcheck

IMAGE = (7, 6, 4)  # (h, w, c)
LAYERS = {
    "Conv2D": (lambda: Conv2D(5, 3), IMAGE),
    "Conv2D same": (lambda: Conv2D(4, 3, padding="same", activation="tanh"), IMAGE),
    "Conv2D even, strided": (lambda: Conv2D(3, (2, 4), stride=(2, 3), padding=1), IMAGE),
    "Conv2D asymmetric": (lambda: Conv2D(3, 3, padding=((2, 0), (0, 1)), dilation=(1, 2)), IMAGE),
    "Conv2D groups": (lambda: Conv2D(6, 3, groups=2, activation="sigmoid", bias=False), IMAGE),
    "Conv2D depthwise": (lambda: Conv2D(4, 3, groups=4, padding="same"), IMAGE),
    "Conv2D 1x1": (lambda: Conv2D(3, 1), IMAGE),
    "Conv2D 1x1 strided": (lambda: Conv2D(3, 1, stride=2), IMAGE),
    "Conv2D relu": (lambda: Conv2D(3, 3, activation="relu"), IMAGE),
    "Conv2D dirac": (lambda: Conv2D(6, 3, groups=2, padding="same", initializer="dirac"), IMAGE),
    "Conv2D leaky": (lambda: Conv2D(3, 3, activation="leaky_relu"), IMAGE),
    "MaxPool2D": (lambda: MaxPool2D(2), IMAGE),
    "MaxPool2D overlap": (lambda: MaxPool2D(3, stride=2, padding=1), IMAGE),
    "MaxPool2D dilated": (lambda: MaxPool2D(2, stride=1, dilation=2), IMAGE),
    "MaxPool2D relu": (lambda: MaxPool2D(2, activation="relu"), IMAGE),
    "AvgPool2D": (lambda: AvgPool2D(2), IMAGE),
    "AvgPool2D overlap": (lambda: AvgPool2D((3, 2), stride=(2, 1), padding="same"), IMAGE),
    "GlobalAvgPool2D": (lambda: GlobalAvgPool2D(), IMAGE),
    "Dense": (lambda: Dense(5), (6,)),
    "Dense sigmoid": (lambda: Dense(5, activation="sigmoid", bias=False), (6,)),
    "Flatten": (lambda: Flatten(), IMAGE),
    "Dropout": (lambda: Dropout(0.4), IMAGE),
    "Dropout 0": (lambda: Dropout(0), (6,)),
    "BatchNorm images": (lambda: BatchNorm(), IMAGE),
    "BatchNorm rows": (lambda: BatchNorm(momentum=0.3, epsilon=1e-3), (6,)),
    "BatchNorm without scale": (lambda: BatchNorm(scale=False), IMAGE),
    "BatchNorm relu": (lambda: BatchNorm(activation="relu"), IMAGE),
    "ReLU": (lambda: ReLU(), IMAGE),
    "LeakyReLU": (lambda: LeakyReLU(0.3), IMAGE),
    "Sigmoid": (lambda: Sigmoid(), IMAGE),
    "Tanh": (lambda: Tanh(), IMAGE),
    "GELU": (lambda: GELU(), IMAGE),
    "Scale": (lambda: Scale(-1 / 9), IMAGE),
    "SpaceToDepth": (lambda: SpaceToDepth(), (4, 6, 3)),
    "SpaceToDepth padded": (lambda: SpaceToDepth(3, channels=20), (6, 9, 2)),
    "Whiten2D": (lambda: Whiten2D((2, 3)), IMAGE),
    "Softmax": (lambda: Softmax(), (6,)),
    "Sequential": (lambda: Sequential([Conv2D(3, 3, activation="relu"), MaxPool2D(2), Flatten(),
                                       Dropout(0.2), Dense(4)]), IMAGE),
    "Residual": (lambda: Residual(Sequential([Conv2D(4, 3, padding="same"), Tanh()])), IMAGE),
    "Residual projected": (lambda: Residual(Conv2D(5, 3, stride=2, padding=1),
                                            Conv2D(5, 1, stride=2)), IMAGE),
    "Residual relu": (lambda: Residual(Conv2D(4, 3, padding=1), activation="relu"), IMAGE),
    "Residual fused": (lambda: Residual(Sequential([Conv2D(4, 1), BatchNorm()]),
                                        activation="relu"), IMAGE),
    "Residual without scale": (lambda: Residual(Sequential([
        Conv2D(4, 1), BatchNorm(scale=False)]), activation="relu"), IMAGE),
    "Residual of norms": (lambda: Residual(BatchNorm(), BatchNorm(activation="relu")), IMAGE),
    "Concat": (lambda: Concat([Conv2D(3, 1), Conv2D(2, 3, padding="same"), Tanh()]), IMAGE),
}
TABLE = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def test_the_table_holds_every_layer():
    made = {type(layer).__name__ for make, _ in LAYERS.values() for layer in make().walk()}
    assert made == set(layers.__all__) - {"Layer", "Parameter", "from_config"}


@TABLE
def test_backward_is_the_gradient(make, shape, backend, rng):
    layer = make()
    layer.build(shape, seed=1, dtype=np.float64)
    gradcheck(layer, rng.standard_normal((3, *shape)), rng)


@TABLE
def test_float32_stays_float32_and_shapes_are_as_declared(make, shape, backend, rng):
    layer = make()
    output_shape = layer.build(shape)
    x = backend.asarray(rng.standard_normal((2, *shape)), np.float32)
    y = layer.forward(x, training=True)
    assert y.shape == (2, *output_shape)
    dx = layer.backward(backend.xp.ones_like(y))
    assert dx.shape == x.shape
    assert y.dtype == dx.dtype == layer.flat_grad.dtype == np.float32
    assert y.flags.c_contiguous


@TABLE
def test_each_forward_serves_one_backward(make, shape, backend, rng):
    layer = make()
    layer.build(shape)
    x = backend.asarray(rng.standard_normal((2, *shape)), np.float32)
    y = layer.forward(x)
    with pytest.raises(RuntimeError, match="before forward"):
        layer.backward(y)
    layer.forward(x, training=True)
    layer.backward(y)
    with pytest.raises(RuntimeError, match="before forward"):
        layer.backward(y)
    layer.forward(x, training=True)
    layer.forward(x)  # inference lets go of what training saved
    with pytest.raises(RuntimeError, match="before forward"):
        layer.backward(y)


@TABLE
def test_a_gradient_of_the_wrong_shape_is_refused(make, shape, backend, rng):
    layer = make()
    layer.build(shape)
    y = layer.forward(backend.asarray(rng.standard_normal((2, *shape)), np.float32), training=True)
    with pytest.raises(ValueError, match="shape"):
        layer.backward(backend.xp.ones((3, *y.shape[1:]), np.float32))


@TABLE
def test_config_makes_the_same_layer(make, shape, backend, rng):
    first = make()
    second = from_config(first.config())
    assert repr(second) == repr(first)
    x = backend.asarray(rng.standard_normal((2, *shape)), np.float32)
    outputs = []
    for layer in (first, second):
        layer.build(shape, seed=3)
        outputs.append(backend.to_numpy(layer.forward(x, training=True)))
    np.testing.assert_array_equal(*outputs)


@TABLE
def test_an_empty_batch_gives_an_empty_result(make, shape, backend):
    layer = make()
    output_shape = layer.build(shape)
    empty = backend.xp.zeros((0, *shape), np.float32)
    assert layer.forward(empty).shape == (0, *output_shape)
    for p in layer.parameters().values():
        p.grad[...] = 7
    before = {name: part.own_buffers[key].copy()
              for name, (part, key) in layer.buffers().items()}
    dx = layer.backward(layer.forward(empty, training=True))
    assert dx.shape == empty.shape
    assert not layer.flat_grad.any()
    for name, (part, key) in layer.buffers().items():
        assert (part.own_buffers[key] == before[name]).all()  # no mean of nothing


@TABLE
def test_input_is_never_written(make, shape, backend, rng):
    layer = make()
    layer.build(shape)
    x = backend.asarray(rng.standard_normal((2, *shape)), np.float32)
    before = x.copy()
    y = layer.forward(x, training=True)
    dy = backend.xp.ones_like(y)
    layer.backward(dy)
    assert (x == before).all()
    assert (dy == 1).all()


@needs_cupy
@TABLE
def test_both_backends_agree(make, shape, rng):
    x, results = rng.standard_normal((3, *shape)).astype(np.float32), []
    for name in ("numpy", "cupy"):
        with use_backend(name) as backend:
            layer = make()
            layer.build(shape, seed=5)
            parameters = backend.to_numpy(layer.flat_data)
            y = layer.forward(backend.asarray(x), training=True)
            dx = layer.backward(backend.xp.ones_like(y))
            results.append([parameters, *map(backend.to_numpy, (y, dx, layer.flat_grad))])
    np.testing.assert_array_equal(results[0][0], results[1][0])
    for here, there in zip(*results):
        np.testing.assert_allclose(here, there, rtol=1e-4, atol=1e-5)


def test_sigmoid_keeps_its_digits_far_from_0(backend):
    z = np.linspace(-80, 80, 321)
    layer = Sigmoid()
    layer.build((321,))
    y = backend.to_numpy(layer.forward(backend.asarray(z[None], np.float32)))
    np.testing.assert_allclose(y[0], 1 / (1 + np.exp(-z)), rtol=1e-6)
    far = layer.forward(backend.asarray([[-np.inf, -1e30, 1e30, np.inf, np.nan]], np.float32))
    np.testing.assert_array_equal(backend.to_numpy(far)[0], [0, 0, 1, 1, np.nan])


def test_dropout_draws_the_mask_of_its_key_and_step(backend):
    layer = Dropout(0.3)
    layer.build((1001,), seed=7)
    for step in range(2):
        y = backend.to_numpy(layer.forward(backend.xp.ones((2, 1001), np.float32), training=True))
        drawn = rng_module.random_words(2002, layer.key, step).reshape(2, 1001)
        np.testing.assert_array_equal(y != 0, drawn >= rng_module.drop_threshold(0.3))


def test_what_dropout_drops_is_0_whatever_it_was(backend):  # faults row 11
    layer = Dropout(0.5)
    layer.build((1000,))
    nan = backend.xp.full((1, 1000), np.nan, np.float32)
    y = backend.to_numpy(layer.forward(nan, training=True))
    dropped = rng_module.random_words(1000, layer.key) < rng_module.drop_threshold(0.5)
    np.testing.assert_array_equal(y[0], np.where(dropped, 0, np.nan))


def test_dropout_masks_are_new_each_step_and_the_same_in_backward(backend):
    layer = Dropout(0.3)
    layer.build((1000,), seed=7)
    ones = backend.xp.ones((50, 1000), np.float32)
    first, second = (backend.to_numpy(layer.forward(ones, training=True)) for _ in range(2))
    assert (first != second).any()
    assert set(np.unique(first)) == {np.float32(0), np.float32(1 / 0.7)}
    # 50,000 draws: a share of 0.3 to within five standard deviations.
    assert abs((first == 0).mean() - 0.3) < 5 * (0.3 * 0.7 / 50000) ** 0.5
    gradient = backend.to_numpy(layer.backward(ones))
    np.testing.assert_array_equal(gradient, second)
    assert (layer.forward(ones) == 1).all()


def test_batch_norm_follows_the_statistics(backend, rng):
    layer = BatchNorm(momentum=0.5)
    layer.build((4,))
    x = rng.standard_normal((64, 4)).astype(np.float32) * 3 + 2
    for _ in range(30):
        layer.forward(backend.asarray(x), training=True)
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, atol=0.02)


@pytest.mark.parametrize("kind", [BatchNorm, GlobalAvgPool2D])
def test_float32_stays_float32_for_a_mean_of_many(kind):
    """NumPy 1.26 divides float32 by an int beyond 65535 as float64."""
    layer = kind()
    layer.build((256, 257, 1))
    y = layer.forward(np.ones((1, 256, 257, 1), np.float32), training=True)
    assert y.dtype == layer.backward(y).dtype == np.float32


def test_weights_come_first_in_the_flat_array_and_each_is_aligned(backend):
    layer = Sequential([Conv2D(2, 1), BatchNorm(), Flatten(), Dense(3)])
    layer.build((2, 2, 3))
    assert layer.decayed_size == 8 + 8 * 3  # the 6 weights of the convolution, and a gap
    start = layer.flat_data.__array_interface__["data"][0] if backend.name == "numpy" else \
        layer.flat_data.data.ptr
    taken = 0
    for name, p in layer.parameters().items():
        address = p.data.__array_interface__["data"][0] if backend.name == "numpy" else \
            p.data.data.ptr
        assert (address - start) % (8 * 4) == 0
        assert ((address - start) // 4 < layer.decayed_size) == name.endswith("/w")
        p.data[...] = 9
        taken += p.size
    rest = backend.to_numpy(layer.flat_data)
    assert sorted(rest) == [0] * (rest.size - taken) + [9] * taken


def test_models_draw_other_numbers_for_each_parameter_layer_and_seed():
    def build(seed):
        model = Sequential([Conv2D(2, 1), Conv2D(2, 1), Dropout(), Dropout()])
        model.build((3, 3, 2), seed=seed)
        return model

    one, two = build(1), build(2)
    first, second = (one.parameters()[f"conv{i}/w"].data for i in (1, 2))
    assert (first != second).any()
    assert (first != two.parameters()["conv1/w"].data).any()
    assert len({layer.key for model in (one, two) for layer in model.layers[2:]}) == 4


def test_names_and_paths():
    model = Sequential([Conv2D(2), Conv2D(2, name="last"),
                        Residual(Sequential([Conv2D(2, padding="same")]))])
    model.build((9, 9, 1))
    assert list(model.parameters()) == ["conv1/w", "conv1/b", "last/w", "last/b",
                                        "residual1/body/conv1/w", "residual1/body/conv1/b"]
    with pytest.raises(ValueError, match="two layers are called 'a'"):
        Sequential([ReLU(name="a"), Tanh(name="a")])
    layer = ReLU()
    with pytest.raises(ValueError, match="twice"):
        Sequential([layer, layer])


def test_containers_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="they are added and must be equal"):
        Residual(Conv2D(3)).build((5, 5, 3))
    for last in (lambda: BatchNorm(), lambda: ReLU()):  # even images fit, odd ones do not
        layer = Residual(Sequential([Conv2D(3, 2, stride=2), last()]), Conv2D(3, 1, stride=2))
        layer.build((4, 4, 3))
        with pytest.raises(ValueError, match="they must be equal"):
            layer.forward(np.ones((2, 5, 5, 3), np.float32), training=True)
    with pytest.raises(ValueError, match="all but the last"):
        Concat([Conv2D(3, 1), Conv2D(3, 3)]).build((5, 5, 3))
    with pytest.raises(ValueError, match="at least one"):
        Concat([])
    for make in (lambda: Sequential([ReLU(), 3]), lambda: Residual(3),
                 lambda: Residual(ReLU(), 3), lambda: Concat([3])):
        with pytest.raises(TypeError, match=": 3 is not a layer"):
            make()


def test_branches_that_come_apart_for_images_of_another_size_are_refused(backend):
    """Where one of them gives a single pixel, that is not repeated."""
    model = Concat([Conv2D(2, 3, padding=1, stride=2), MaxPool2D(2)])
    model.build((4, 4, 1))
    with pytest.raises(ValueError, match=r"^Concat: the branches give \[\(1, 2, 2, 2\), "
                                         r"\(1, 1, 1, 1\)\]; all but the last number must be"):
        model.forward(backend.asarray(np.ones((1, 3, 3, 1), np.float32)))


@pytest.mark.parametrize("shape", [(0, 5, 3), (6, 5, 0), (6.0, 5, 3), ("6", 5, 3)])
def test_build_refuses_sizes_that_are_none(shape):
    with pytest.raises(ValueError, match="^Conv2D: input_shape must be ints >= 1 without"):
        Conv2D(4).build(shape)


@pytest.mark.parametrize("options", [{}, {"plan": True}])
def test_summary_refuses_them_too(options):
    with pytest.raises(ValueError, match="^Conv2D: input_shape must be ints >= 1 without"):
        Conv2D(4).summary((6, 5, 0), **options)
    with pytest.raises(TypeError, match="^Conv2D: input_shape must be ints >= 1 without.*; got 8"):
        Conv2D(4).summary(8, **options)


@pytest.mark.parametrize("make", [
    lambda layer: Sequential([Sequential([layer]), Sequential([layer])]),
    lambda layer: Residual(Sequential([layer]), layer)])
def test_a_layer_cannot_stand_in_two_places_however_deep(make):
    """One set of parameters would be left without an array, and a backward pass without x."""
    with pytest.raises(ValueError, match=r": ReLU stands in it twice; make a second one$"):
        make(ReLU())


def test_a_layer_of_another_model_leaves_no_moments_for_the_norm_it_had(backend):
    conv, norm = Conv2D(4, 3, bias=False), BatchNorm()
    Sequential([conv, norm]).build((5, 5, 3))
    assert conv.feeds_norm
    assert norm.source is conv
    conv.forward(backend.asarray(np.ones((2, 5, 5, 3), np.float32)), training=True)
    Sequential([conv, ReLU()]).build((5, 5, 3))
    Sequential([norm]).build((3, 3, 4))
    assert not conv.feeds_norm
    assert conv.output_moments is None
    assert norm.source is None


def test_summary_of_the_articles_network(capsys):
    model = models.article()
    model.summary((28, 28, 1))
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[2:] for line in printed.splitlines() if line.strip("-")}
    assert rows["conv1"] == ["28x28x32", "320", "225,792", "19,668,992"]
    assert rows["conv4"] == ["14x14x64", "36,928", "7,225,344", "157,351,936"]
    assert rows["dense1"] == ["256", "803,072", "802,816", "802,816"]
    assert printed.splitlines()[-1].split() == ["total", "876,618", "19,100,480", "885,915,968"]
    model.build((28, 28, 1))
    with pytest.raises(ValueError, match="built for input"):
        model.summary((32, 32, 1))


@pytest.mark.parametrize(("size", "options"), [
    (2, {}), (3, {"stride": 2, "padding": 1}), ((2, 3), {"stride": 1, "dilation": (2, 1)}),
    ((16, 17), {"padding": ((8, 8), (7, 8)), "stride": (3, 2)})])  # a mask of int32
def test_pooling_with_relu_is_pooling_after_relu(size, options, backend, rng):
    """Bit for bit, forward and backward: zeros, ties, negative windows, NaN and infinities."""
    values = np.array([-np.inf, -2, -1, -0.0, 0, 1, 2, np.inf, np.nan], np.float32)
    x = backend.asarray(rng.choice(values, (3, 9, 8, 5), p=[.05, .3, .2, .1, .1, .1, .1, .03, .02]))
    apart = Sequential([ReLU(), MaxPool2D(size, **options)])
    fused = MaxPool2D(size, **options, activation="relu")
    results = []
    for layer in (apart, fused):
        layer.build(x.shape[1:])
        inference = layer.forward(x)
        y = layer.forward(x, training=True)
        dy = backend.asarray(np.random.default_rng(1).standard_normal(y.shape).astype(np.float32))
        results.append([backend.to_numpy(a) + 0 for a in (inference, y, layer.backward(dy))])
    for want, got in zip(*results):  # + 0: -0 and 0 are alike
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_pooling_takes_no_other_activation(activation):
    with pytest.raises(ValueError, match=f"MaxPool2D: activation '{activation}' is not known; use "
                                         "None, 'relu'"):
        MaxPool2D(2, activation=activation)


@needs_simulator
@pytest.mark.parametrize("precision", ["float32", "float64", "tf32", "mixed_float16"])
def test_batch_norm_takes_its_moments_from_the_convolution_before_it(precision, rng):
    """Then no kernel reads the images for them; and only for the very array that it gave."""
    from tests.gpusim import fake_cupy
    with use_backend("cupy") as backend:
        model = Sequential([Conv2D(40, 3, padding=1, activation="relu"), BatchNorm()])
        model.build((9, 11, 8), precision=precision)
        conv, norm = model.layers
        x = backend.asarray((3 + rng.standard_normal((3, 9, 11, 8))).astype(np.float32))
        fake_cupy.launches.clear()
        y = model.forward(x, training=True)
        assert "batch_norm_moments" not in [name for name, _, _ in fake_cupy.launches]
        running = [backend.to_numpy(a) + 0 for a in norm.own_buffers.values()]
        norm.make_state(0)
        a = conv.forward(x, training=True)
        other = norm.forward(a + 0, training=True)
        assert "batch_norm_moments" in [name for name, _, _ in fake_cupy.launches]
        close = {"rtol": 1e-5, "atol": 1e-5} if precision != "mixed_float16" else {"atol": 4e-3}
        np.testing.assert_allclose(backend.to_numpy(y), backend.to_numpy(other), **close)
        for got, want in zip(running, norm.own_buffers.values()):
            np.testing.assert_allclose(got, backend.to_numpy(want), rtol=1e-5)
        conv.forward(x, training=True)
        assert conv.output_moments is not None
        norm.make_state(0)
        norm.forward(backend.xp.ones_like(a), training=True)
        assert conv.output_moments is None  # the memory is free
        model.forward(x)
        assert conv.output_moments is None  # nobody asks for them outside training
        np.testing.assert_allclose(backend.to_numpy(norm.own_buffers["running_mean"]), 0.1,
                                   rtol=1e-6)


@pytest.mark.parametrize("make", [lambda: Conv2D(4, 1), lambda: Conv2D(4, 1, activation="tanh"),
                                  BatchNorm, lambda: MaxPool2D(1), lambda: Sequential([])],
                         ids=["conv", "conv with tanh", "norm", "pool", "nothing"])
def test_what_is_added_has_the_shape_of_the_output(backend, make):
    layer = make()
    layer.build((3, 5, 4))
    x = backend.asarray(np.ones((2, 3, 5, 4)), np.float32)
    for wrong in (x[:1], x[:, :1], x[..., :1]):  # which NumPy would repeat
        with pytest.raises(ValueError, match=rf"the output has shape \(2, 3, 5, 4\), what is added "
                                             rf"to it {re.escape(str(wrong.shape))}; they must be"):
            layer.forward_added(x, wrong, "relu")
    assert layer.forward_added(x, x, "relu").shape == x.shape


def test_the_plan_of_the_articles_network_on_the_cpu(capsys):
    models.article().summary((28, 28, 1), plan=True, batch=8)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "batches of 8, float32, on numpy"
    rows = [line.split("  ")[0] + "|" + " ".join(line[8:].split()) for line in lines]
    assert [re.sub(r" - - [\d.]+ [KM]iB$", " - - memory", row) for row in rows[3:8]] == [
        "conv1|forward few channels - - memory", "|weight gradient few channels - - memory",
        "conv2|forward rows of taps - - memory", "|input gradient rows of taps - - -",
        "|weight gradient rows of taps - - memory"]  # of both gradients, in one pass
    assert "dense3|forward matrix product - - -" in rows
    for batch in (0, 2.5, True):
        with pytest.raises(ValueError, match="^Sequential: batch must be an int >= 1, got"):
            models.article().summary((28, 28, 1), plan=True, batch=batch)


def test_the_algorithm_of_a_convolution_is_kept_and_checked():
    layer = Conv2D(8, 3, algorithm="implicit_gemm")
    assert layer.config()["algorithm"] == "implicit_gemm"
    assert from_config(layer.config()).algorithm == "implicit_gemm"
    with pytest.raises(ValueError, match="^Conv2D 'a': algorithm 'fft' is not known; use 'auto', "):
        Conv2D(8, 3, algorithm="fft", name="a")


@pytest.mark.parametrize(("channels", "filters", "groups", "kernel_size"), [
    (3, 3, 1, 3), (3, 8, 1, (3, 5)), (5, 2, 1, 3), (4, 6, 2, 3), (4, 4, 4, 3), (2, 3, 1, 2)])
def test_dirac_filters_pass_on_a_channel_each(channels, filters, groups, kernel_size, rng):
    layer = Conv2D(filters, kernel_size, groups=groups, padding="same", bias=False,
                   initializer="dirac")
    layer.build((6, 7, channels), dtype=np.float64)
    x = rng.standard_normal((2, 6, 7, channels))
    y, passed = layer.forward(x), min(channels, filters) // groups
    for group in range(groups):
        first, last = (group * n // groups for n in (channels, filters))
        np.testing.assert_array_equal(y[..., last:last + passed], x[..., first:first + passed])
    others = np.concatenate([w[..., passed:].ravel() for w in np.split(layer.w.data, groups, 3)])
    limit = (layer.w.size / filters) ** -0.5
    assert (np.abs(others) < limit).all()
    assert not others.size or np.abs(others).max() > 0.8 * limit


def test_the_initializer_of_a_convolution_is_kept_and_checked():
    assert from_config(Conv2D(8, 3, initializer="dirac").config()).initializer == "dirac"
    with pytest.raises(ValueError, match="^Conv2D 'a': initializer 'zero' is not known; use 'he', "
                                         "'dirac'$"):
        Conv2D(8, 3, initializer="zero", name="a")


def test_a_norm_without_scale_learns_its_shift_alone(backend, rng, tmp_path):
    model = Sequential([Conv2D(4, 1, bias=False), BatchNorm(scale=False, activation="relu"),
                        Flatten(), Dense(2)])
    model.build((3, 3, 2))
    assert list(model.parameters()) == ["conv1/w", "norm1/beta", "dense1/w", "dense1/b"]
    norm = model.layers[1]
    x = backend.asarray(rng.standard_normal((5, 3, 3, 2)), np.float32)
    model.backward(model.forward(x, training=True))
    optim.AdamW(model, 0.1, weight_decay=0.5).step()
    assert (norm.gamma.data == 1).all()
    assert norm.beta.data.any()
    models.save_model(model, tmp_path / "m.safetensors")
    again, _ = models.load_model(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(backend.to_numpy(again.forward(x)),
                                  backend.to_numpy(model.forward(x)))
    with_scale = BatchNorm()
    with_scale.build((3, 3, 2), seed=9)
    without = BatchNorm(scale=False)
    without.build((3, 3, 2))
    for one in (with_scale, without):
        one.beta.data[...] = 0.3
    dx = [backend.to_numpy(one.backward(one.forward(x, training=True)))
          for one in (with_scale, without)]
    np.testing.assert_array_equal(*dx)


@pytest.mark.parametrize("factor", [np.inf, np.nan])
def test_a_factor_is_finite(factor):
    with pytest.raises(ValueError, match="^Scale: factor must be finite, got"):
        Scale(factor)


def test_a_convolution_that_does_not_fit_is_named_once(backend):
    layer = Conv2D(2, 5)
    with pytest.raises(ValueError, match=r"^Conv2D: kernel 5x5 is larger than the padded input 4x"):
        layer.build((4, 4, 1))
