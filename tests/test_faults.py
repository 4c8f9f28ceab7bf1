"""Bad input gets one clear line. The numbers are the rows of the project's list of faults."""
from __future__ import annotations

import numpy as np
import pytest

from gpucnn import losses, ops, optim
from gpucnn.backend import use_backend
from gpucnn.layers import (
    AvgPool2D,
    BatchNorm,
    Concat,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool2D,
    MaxPool2D,
    ReLU,
    Residual,
    Sequential,
    Softmax,
)
from gpucnn.training import evaluate, predict, train_step
from tests.conftest import needs_cupy

X = np.random.default_rng(0).standard_normal((2, 6, 5, 3)).astype(np.float32)
W = np.random.default_rng(1).standard_normal((3, 3, 3, 4)).astype(np.float32)


def conv(**options):
    layer = Conv2D(4, 3, name="c1", **options)
    layer.build((6, 5, 3))
    return layer


def refuses(kind, message):
    """The message, as text, must be part of one line of an error of this kind."""
    class Check:
        def __enter__(self):
            return self

        def __exit__(self, raised, value, traceback):
            assert raised is not None, f"nothing was refused; expected {message!r}"
            assert issubclass(raised, kind), f"{raised.__name__}: {value}"
            assert message in str(value), f"{value}\n  does not contain\n{message}"
            assert "\n" not in str(value)
            return True
    return Check()


# ---------------------------------------------------------------------------------------- arrays


def through_training(x, **options):
    """The calls that take images for a whole model, each made with x."""
    model = Sequential([conv(**options), GlobalAvgPool2D()], name="net")
    model.build((6, 5, 3))
    return (lambda: train_step(model, losses.SoftmaxCrossEntropy(), optim.Adam(model), x, [0, 1]),
            lambda: evaluate(model, [(x, [0, 1])]), lambda: predict(model, x))


def test_row_1_float64_into_a_float32_layer():
    y = conv().forward(X.astype(np.float64))
    assert y.dtype == np.float32
    with refuses(TypeError, "Conv2D 'c1': input is float64, layer is float32; cast with "
                            "x.astype('float32')"):
        conv(strict_dtype=True).forward(X.astype(np.float64))
    for call in through_training(X.astype(np.float64)):
        call()
    for call in through_training(X.astype(np.float64), strict_dtype=True):
        with refuses(TypeError, "Conv2D 'net/c1': input is float64, layer is float32; cast with"):
            call()
    with refuses(TypeError, "conv2d: x is float64, w is float32; cast one of them"):
        ops.conv2d(X.astype(np.float64), W)


DTYPES = {
    "row 2 uint8": (np.uint8, "is uint8 (0..255); scale to float first, e.g. x.astype('float32')"),
    "row 3 int64": (np.int64, "is int64; cast it with x.astype('float32')"),
    "row 4 bool": (np.bool_, "dtype bool of {} is not supported; use float16, float32 or float64"),
    "row 4 complex": (np.complex64, "dtype complex64 of {} is not supported"),
    "row 4 object": (object, "dtype object of {} is not supported"),
    "row 4 str": (str, "dtype <U"),
}


@pytest.mark.parametrize(("dtype", "message"), DTYPES.values(), ids=DTYPES)
def test_dtypes(dtype, message):
    bad = X.real.astype(dtype)
    with refuses(TypeError, message.format("input")):
        conv().forward(bad)
    for call in (lambda: ops.conv2d(bad, W), lambda: ops.max_pool2d(bad, 2),
                 lambda: ops.avg_pool2d(bad, 2), lambda: ops.im2col(bad, 2)):
        with refuses(TypeError, message.format("x")):
            call()
    for call in through_training(bad):
        with refuses(TypeError, message.format("input")):
            call()


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_row_5_float16_that_overflows_is_inf_and_the_loss_shows_it():
    y = ops.conv2d(np.full((1, 3, 3, 3), 6e4, np.float16), np.ones((3, 3, 3, 4), np.float16))
    assert y.dtype == np.float16
    assert np.isinf(y).all()
    model = Sequential([Conv2D(4, 3, name="c1"), GlobalAvgPool2D()])
    model.build((6, 5, 3))
    before = model.flat_data.copy()
    x = X.astype(np.float16)
    x[0] = np.inf
    loss, _ = train_step(model, losses.SoftmaxCrossEntropy(), optim.Adam(model), x, [0, 1])
    assert not np.isfinite(loss)
    np.testing.assert_array_equal(model.flat_data, before)


def views():
    big = np.random.default_rng(2).standard_normal((4, 12, 10, 6)).astype(np.float32)
    read_only = big[:2, :6, :5, :3].copy()
    read_only.flags.writeable = False
    return {"sliced": big[1:3, 2:8, 1:6, :3], "every other": big[::2, ::2, ::2, ::2],
            "negative strides": big[:2, 5::-1, 4::-1, 2::-1],
            "transposed": big[:3, :6, :5, :2].transpose(3, 1, 2, 0),
            "broadcast": np.broadcast_to(big[:1, :1, :5, :3], (2, 6, 5, 3)),
            "read-only": read_only, "big-endian": big[:2, :6, :5, :3].astype(">f4")}


def everything(x, w, dy):
    """The results of all ops."""
    y, mask = ops.max_pool2d(x, 2, padding="same")
    pooled = ops.avg_pool2d(x, 2)
    cols = ops.im2col(x, 2)
    return [ops.conv2d(x, w, padding=1), *ops.conv2d_backward(dy, x, w, padding=1), y, mask,
            ops.max_pool2d_backward(y, mask, x.shape, 2, padding="same"), pooled,
            ops.avg_pool2d_backward(pooled, x.shape, 2), cols, ops.col2im(cols, x.shape, 2)]


@pytest.mark.parametrize("name", views())
def test_rows_6_and_7_views_give_the_same_bits(name, backend):
    x = views()[name]
    if backend.name == "cupy":  # a view with the same strides, of an array that lies there
        x = {"negative strides": lambda: backend.asarray(x[:, ::-1, ::-1, ::-1])[
                 :, ::-1, ::-1, ::-1],
             "transposed": lambda: backend.asarray(x.transpose(3, 1, 2, 0)).transpose(3, 1, 2, 0),
             "sliced": lambda: backend.asarray(np.pad(x, 1))[1:-1, 1:-1, 1:-1, 1:-1],
             "every other": lambda: backend.asarray(x.repeat(2, 1).repeat(2, 3))[:, ::2, :, ::2],
             "broadcast": lambda: backend.xp.broadcast_to(backend.asarray(x[:1, :1]), x.shape),
             }.get(name, lambda: backend.asarray(x, np.float32))()
    copy = backend.asarray(np.ascontiguousarray(backend.to_numpy(x), "=f4"))
    before = backend.to_numpy(x).copy()
    dy = backend.asarray(np.random.default_rng(3).standard_normal((2, 6, 5, 4)), np.float32)
    w = backend.asarray(W)
    for got, wanted in zip(everything(x, w, dy), everything(copy, w, dy)):
        np.testing.assert_array_equal(backend.to_numpy(got), backend.to_numpy(wanted))
        assert got.dtype.isnative
    np.testing.assert_array_equal(backend.to_numpy(x), before)


@pytest.mark.parametrize("name", views())
def test_rows_6_and_7_views_into_a_layer(name):
    x = views()[name]
    dy = np.random.default_rng(4).standard_normal((4, 3, 4, 2)).transpose(3, 2, 1, 0)
    results = []
    for values, gradient in ((x, dy), (np.array(x, np.float32, order="C"), dy.copy())):
        layer = conv(activation="tanh")
        y = layer.forward(values, training=True)
        results.append([y, layer.backward(gradient), layer.flat_grad])
    for got, wanted in zip(*results):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_row_8_other_kinds_of_arrays():
    with refuses(TypeError, "input is numpy.ma.MaskedArray; fill the mask first with x.filled(0)"):
        conv().forward(np.ma.masked_array(X))
    for call in through_training(np.ma.masked_array(X)):
        with refuses(TypeError, "Sequential 'net': input is numpy.ma.MaskedArray; fill the mask"):
            call()
    with refuses(TypeError, "x is numpy.matrix; use numpy.asarray(x)"):
        ops.conv2d(np.asmatrix(np.ones((2, 2))), W)
    with refuses(TypeError, "x is a dict; use a NumPy or CuPy array"):
        ops.conv2d({}, W)
    for name, call in {"x": lambda: ops.conv2d(None, W), "w": lambda: ops.conv2d(X, None),
                       "dy": lambda: ops.conv2d_backward(None, X, W)}.items():
        with refuses(TypeError, f": {name} is a NoneType; use a NumPy or CuPy array"):
            call()
    with refuses(TypeError, "max_pool2d: x is a NoneType; use a NumPy or CuPy array"):
        ops.max_pool2d(None, 2)
    np.testing.assert_array_equal(conv().forward(X.tolist()), conv().forward(X))


def test_row_8_torch_tensors():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(X)
    np.testing.assert_array_equal(ops.conv2d(x, W), ops.conv2d(X, W))
    for bad in (x.clone().requires_grad_(), x.bfloat16()):
        with refuses(TypeError, "conv2d: x is a torch.Tensor that NumPy cannot read ("):
            ops.conv2d(bad, W)
        with refuses(TypeError, "; make a NumPy array of it, for torch by x.detach().cpu().float()"
                                ".numpy()"):
            conv().forward(bad)
    logits = np.zeros((2, 4))
    loss, _ = ops.softmax_cross_entropy(logits, torch.tensor([0, 3]))
    assert loss == ops.softmax_cross_entropy(logits, [0, 3])[0]
    with refuses(TypeError, "labels must be integers of shape (N,), got float32 (2,)"):
        ops.softmax_cross_entropy(logits, torch.zeros(2))


def made(make, shape=(6, 5, 3)):
    layer = make(name="a")
    layer.build(shape)
    return layer


@pytest.mark.parametrize("make", [
    ReLU, lambda name: Conv2D(3, 3, padding=1, name=name), lambda name: Dropout(0, name=name),
    lambda name: Residual(ReLU(), name=name), lambda name: Concat([ReLU()], name=name),
    lambda name: Sequential([Softmax()], name=name)], ids=range(6))
def test_gradients_are_checked_as_inputs_are(make):
    layer, results = made(make), []
    for good in (X, X.tolist(), X.astype(np.float64)):
        layer.forward(X, training=True)
        results.append(layer.backward(good))
    for result in results:
        assert result.dtype == np.float32
        np.testing.assert_array_equal(result, results[0])
    for bad, message in ((X.astype(np.complex64), "dtype complex64 of the gradient is not"),
                         (np.ma.masked_array(X), "the gradient is numpy.ma.MaskedArray; fill the"),
                         (X.astype(int), "the gradient is int64; cast it with x.astype('float32')"),
                         (None, "the gradient is a NoneType; use a NumPy or CuPy array")):
        layer.forward(X, training=True)
        with refuses(TypeError, message):
            layer.backward(bad)


@needs_cupy
def test_arrays_of_two_backends_do_not_mix(cupy_backend):
    there = cupy_backend.asarray(X)
    with refuses(TypeError, "conv2d: x is a cupy array, w a numpy array; move one of them"):
        ops.conv2d(there, W)
    with use_backend("numpy"), refuses(TypeError, "input is a cupy array, the layer is on numpy"):
        conv().forward(there)
    layer = made(ReLU)
    layer.forward(there, training=True)
    with refuses(TypeError, "the gradient is a numpy array, the layer is on cupy"):
        layer.backward(X)


def test_rows_9_10_15_shapes():
    with refuses(ValueError, "Conv2D 'c1': expected NHWC input with 4 dimensions, got 3: (6, 5, 3)"
                             "; add a batch axis with x[None]"):
        conv().forward(X[0])
    with refuses(ValueError, "max_pool2d: expected NHWC input with 4 dimensions, got 3"):
        ops.max_pool2d(X[0], 2)
    nchw = np.zeros((2, 3, 6, 5), np.float32)
    for where, call in (("Conv2D 'c1'", lambda: conv().forward(nchw)),
                        ("conv2d", lambda: ops.conv2d(nchw, W))):
        with refuses(ValueError, f"{where}: input has 5 channels (last axis of (2, 3, 6, 5)), "
                                 "weights expect 3; the layout is NHWC, for NCHW data use "
                                 "x.transpose(0, 2, 3, 1)"):
            call()
    for where, call in (("Conv2D 'c1'", lambda: conv().forward(X[:, :0])),
                        ("conv2d", lambda: ops.conv2d(X[:, :0], W))):
        with refuses(ValueError, f"{where}: input height is 0"):
            call()
    for make in (GlobalAvgPool2D, Flatten, Dropout, BatchNorm, Softmax, ReLU, AvgPool2D, MaxPool2D,
                 lambda name: Residual(ReLU(), name=name)):
        layer = made(make)
        for x, message in ((X[:, :0], "input height is 0: (2, 0, 5, 3); it must be at least 1"),
                           (X[:, :, :0], "input width is 0: (2, 6, 0, 3)"),
                           (X[..., :0], "input channel count is 0: (2, 6, 5, 0)")):
            with refuses(ValueError, message):
                layer.forward(x)
    dense = Dense(3, name="d")
    dense.build((4,))
    with refuses(ValueError, "Dense 'd': input axis 1 is 0: (2, 0)"):
        dense.forward(np.zeros((2, 0)))


def test_row_11_nan_in_is_nan_out(backend):
    x = X.copy()
    x[0, 2, 2, 0] = np.nan
    x = backend.asarray(x)
    w = backend.asarray(W)
    for activation in (None, "relu", "leaky_relu", "sigmoid", "tanh"):
        y = backend.to_numpy(ops.conv2d(x, w, activation=activation))
        assert np.isnan(y[0, 0, 0]).all()
        assert not np.isnan(y[1]).any()
    relu = ReLU()
    relu.build((3,))
    z = backend.asarray([[np.nan, -np.inf, 1]], np.float32)
    for result in (relu.forward(z, training=True), relu.backward(z)):
        np.testing.assert_array_equal(backend.to_numpy(result), [[np.nan, 0, 1]])
    y, mask = ops.max_pool2d(x, 3, stride=1)
    assert np.isnan(backend.to_numpy(y)[0, :3, :3, 0]).all()
    assert backend.to_numpy(mask)[0, 0, 0, 0] == 8
    assert np.isnan(backend.to_numpy(ops.avg_pool2d(x, 3))[0, 0, 0, 0])
    loss, _ = losses.SoftmaxCrossEntropy()(x[:, 2, 2], backend.asarray([0, 1]))
    assert np.isnan(float(loss))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_row_13_infinite_logits_are_nan():
    for logits in ([[np.inf, 0.0]], [[-np.inf, -np.inf]]):
        assert np.isnan(ops.softmax_cross_entropy(np.array(logits), [0])[0])


def test_row_14_empty_batches():
    empty = X[:0]
    assert ops.conv2d(empty, W).shape == (0, 4, 3, 4)
    assert ops.max_pool2d(empty, 2)[0].shape == (0, 3, 2, 3)
    assert ops.im2col(empty, 2).shape == (0, 12)
    dx, dw, db = ops.conv2d_backward(np.zeros((0, 4, 3, 4), np.float32), empty, W)
    assert dx.shape == empty.shape
    assert not dw.any()
    assert not db.any()
    message = "loss of an empty batch is undefined (0 samples)"
    for loss, target in ((losses.SoftmaxCrossEntropy(), np.zeros(0, int)),
                         (losses.MeanSquaredError(), np.zeros((0, 4))),
                         (losses.BinaryCrossEntropy(), np.zeros((0, 4)))):
        with refuses(ValueError, message):
            loss(np.zeros((0, 4), np.float32), target)


# -------------------------------------------------------------------------------- layer parameters

PARAMETERS = {
    "row 16": (ValueError, lambda: MaxPool2D(3, dilation=2, name="p3").build((2, 2, 1)),
               "MaxPool2D 'p3': kernel 3x3 (effective 5x5 with dilation (2, 2)) is larger than the "
               "padded input 2x2; use a smaller kernel or padding='same'"),
    "row 16 op": (ValueError, lambda: ops.conv2d(X[:, :2], W),
                  "conv2d: kernel 3x3 is larger than the padded input 2x5"),
    "row 17": (ValueError, lambda: Conv2D(4, stride=(0, 1)), "stride must be >= 1, got (0, 1)"),
    "row 18": (ValueError, lambda: ops.max_pool2d(X, 2, stride=-1), "stride must be >= 1, got -1"),
    "row 19 dilation": (ValueError, lambda: Conv2D(4, dilation=0), "dilation must be >= 1, got 0"),
    "row 19 groups 0": (ValueError, lambda: ops.conv2d(X, W[:, :, :1], groups=0), "got 0"),
    "row 19 groups": (ValueError, lambda: Conv2D(4, groups=2).build((6, 5, 3)),
                      "groups must be >= 1 and divide the 3 input and 4 output channels, got 2"),
    "row 19 groups type": (TypeError, lambda: Conv2D(4, groups=1.0).build((6, 5, 3)),
                           "groups must be an int, got 1.0"),
    "row 19 padding": (ValueError, lambda: ops.conv2d(X, W, padding=-1),
                       "padding must be >= 0, got -1"),
    "row 19 padding pair": (ValueError, lambda: ops.conv2d(X, W, padding=((0, 0), (0, -2))),
                            "padding must be >= 0, got (0, -2)"),
    "row 19 kernel": (ValueError, lambda: Conv2D(4, (3, 0)), "kernel_size must be >= 1, got"),
    "row 19 filters": (ValueError, lambda: Conv2D(0), "filters must be >= 1, got 0"),
    "row 19 padding word": (ValueError, lambda: ops.conv2d(X, W, padding="full"),
                            "padding must be 'valid', 'same', an int, (ph, pw) or ((top, bottom), "
                            "(left, right)), got 'full'"),
    "row 20": (ValueError, lambda: MaxPool2D(3, padding=2).build((6, 5, 3)),
               "MaxPool2D: padding 2 is more than half of kernel 3; a window would lie wholly in "
               "padding"),
    "row 20 average": (ValueError, lambda: AvgPool2D(2, padding=((0, 2), (0, 0))).build((6, 5, 3)),
                       "AvgPool2D: padding 2 is more than half of kernel 2"),
    "row 20 dilated": (ValueError, lambda: ops.max_pool2d(X[:, :3], (2, 1), dilation=(5, 1),
                                                          padding=((2, 3), (0, 0))),
                       "a window would lie wholly in padding"),
    "row 21 float": (TypeError, lambda: Conv2D(4, stride=1.0),
                     "stride must be an int or two ints, got 1.0"),
    "row 21 str": (TypeError, lambda: Conv2D(4, "3"),
                   "Conv2D: kernel_size must be an int or two ints, got '3'"),
    "row 21 bool": (TypeError, lambda: ops.max_pool2d(X, True),
                    "size must be an int or two ints, got True"),
    "row 21 padding": (TypeError, lambda: ops.conv2d(X, W, padding=0.5), "got 0.5"),
    "row 21 filters": (TypeError, lambda: Conv2D((4, 8)), "filters must be an int, got (4, 8)"),
    "row 21 units": (TypeError, lambda: Dense((3, 5)), "Dense: units must be an int, got (3, 5)"),
    "row 21 shape": (TypeError, lambda: Conv2D(4).build(28),
                     "Conv2D: input_shape must be ints >= 1 without the batch axis, such as "
                     "(28, 28, 1); got 28"),
    "row 21 seed": (TypeError, lambda: Conv2D(4).build((6, 5, 3), seed=1.5),
                    "Conv2D: seed must be an int, got 1.5"),
    "epsilon": (ValueError, lambda: BatchNorm(epsilon=float("nan")),
                "BatchNorm: epsilon must be > 0 and finite, got nan"),
    "activation": (ValueError, lambda: Conv2D(4, activation="gelu"), "'gelu' is not known; use"),
    "filters of another rank": (ValueError, lambda: ops.conv2d(X, W[0]), "w must be (kh, kw,"),
    "no filters": (ValueError, lambda: ops.conv2d(X, W[..., :0]), "w has shape (3, 3, 3, 0); all"),
    "bias": (ValueError, lambda: ops.conv2d(X, W, W[0, 0, 0, :3]), "b must be (4,)"),
    "gradient": (ValueError, lambda: ops.conv2d_backward(X, X, W), "dy has shape (2, 6, 5, 3)"),
    "columns": (ValueError, lambda: ops.col2im(X[0, 0], X.shape, 2), "cols has shape (5, 3)"),
    "mask": (TypeError, lambda: ops.max_pool2d_backward(X[:, :3, :2], X[:, :3, :2], X.shape, 2),
             "pass the uint8 mask that max_pool2d returned"),
    "no mask": (TypeError, lambda: ops.max_pool2d_backward(X[:, :3, :2], None, X.shape, 2),
                "pass the uint8 mask that max_pool2d returned"),
    "row 27 no array": (TypeError, lambda: ops.softmax_cross_entropy(X[0, 0], 3),
                        "labels must be integers of shape (N,), got 3"),
    "dense": (ValueError, lambda: Dense(3, name="d").build((4, 4, 1)),
              "Dense 'd': expected input with 2 dimensions, got 4: (1, 4, 4, 1); put a Flatten()"),
    "unbuilt": (RuntimeError, lambda: Conv2D(4, name="c").forward(X), "Conv2D 'c': not built"),
    "unbuilt model": (RuntimeError, lambda: optim.Adam(Sequential([Conv2D(4)])), "built model"),
    "learning rate": (ValueError, lambda: optim.Adam(conv(), learning_rate=-1), "got -1"),
    "momentum": (ValueError, lambda: optim.Momentum(conv(), momentum=1.0), "momentum must be >= 0"),
    "seed": (ValueError, lambda: Conv2D(4).build((6, 5, 3), seed=-1), "seed must be from 0"),
    "dtype": (TypeError, lambda: Conv2D(4).build((6, 5, 3), dtype="float16"), "got float16"),
}


@pytest.mark.parametrize(("kind", "call", "message"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters(kind, call, message):
    with refuses(kind, message):
        call()


def test_row_22_batch_norm_of_one_value():
    layer = BatchNorm(name="b1")
    layer.build((1, 1, 3))
    with refuses(ValueError, "BatchNorm 'b1': needs more than 1 value per channel in training, got "
                             "input (1, 1, 1, 3)"):
        layer.forward(X[:1, :1, :1], training=True)
    assert layer.forward(X[:1, :1, :1]).shape == (1, 1, 1, 3)


def test_row_23_backward_needs_a_forward():
    with refuses(RuntimeError, "Conv2D 'c1': backward() called before forward"):
        conv().backward(X)


# ------------------------------------------------------------------------------------------ labels

LABELS = {
    "row 25": (ValueError, [0, 4], "label 4 at position 1 is out of range for 4 classes (0..3)"),
    "row 26": (ValueError, [-1, 0], "label -1 at position 0 is out of range for 4 classes (0..3)"),
    "row 27 float": (TypeError, np.zeros(2, np.float32), "got float32 (2,)"),
    "row 27 bool": (TypeError, np.zeros(2, bool), "got bool (2,)"),
    "row 27 one-hot": (TypeError, np.zeros((2, 4), np.float32),
                       "labels must be integers of shape (N,), got float32 (2, 4); for one-hot use "
                       "labels.argmax(1)"),
    "row 27 column": (TypeError, np.zeros((2, 1), int), "got int64 (2, 1)"),
    "row 28": (ValueError, [0, 1, 2], "2 images but 3 labels"),
}


@pytest.mark.parametrize(("kind", "labels", "message"), LABELS.values(), ids=LABELS)
def test_labels(kind, labels, message, backend):
    logits = backend.xp.zeros((2, 4), np.float32)
    with refuses(kind, message):
        ops.softmax_cross_entropy(logits, backend.xp.asarray(np.asarray(labels)))


@needs_cupy
def test_labels_on_the_gpu_beside_logits_that_are_not():
    with use_backend("cupy") as there, refuses(
            TypeError, "softmax_cross_entropy: logits is a numpy array, labels a cupy array; move "
                       "one of them"):
        ops.softmax_cross_entropy(np.zeros((2, 4)), there.asarray([0, 1]))
    logits = there.asarray(np.eye(2))
    assert (float(ops.softmax_cross_entropy(logits, np.array([0, 1]))[0])
            == float(ops.softmax_cross_entropy(logits, there.asarray([0, 1]))[0]))
    with refuses(ValueError, "label 4 at position 1 is out of range for 2 classes (0..1)"):
        ops.softmax_cross_entropy(logits, np.array([0, 4]))


def test_masked_labels_are_refused():
    masked = np.ma.masked_array([0, 9], mask=[False, True])
    with refuses(TypeError, "labels is numpy.ma.MaskedArray; fill the mask first"):
        ops.softmax_cross_entropy(np.zeros((2, 4)), masked)
    model = Sequential([conv(), GlobalAvgPool2D()])
    model.build((6, 5, 3))
    with refuses(TypeError, "labels is numpy.ma.MaskedArray; fill the mask first"):
        train_step(model, losses.SoftmaxCrossEntropy(), optim.Adam(model), X, masked)


def test_label_smoothing_and_logits_are_checked():
    with refuses(ValueError, "label_smoothing must be >= 0 and < 1, got 1"):
        ops.softmax_cross_entropy(np.zeros((2, 4)), [0, 1], label_smoothing=1)
    with refuses(ValueError, "logits must be (n, classes), got (2,)"):
        ops.softmax_cross_entropy(np.zeros(2), [0, 1])
    with refuses(ValueError, "outputs have shape (2, 3), targets (3,); they must be equal"):
        losses.MeanSquaredError()(np.zeros((2, 3)), np.zeros(3))
