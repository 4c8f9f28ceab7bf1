"""gpucnn/precision.py, and what layers, training and saved files do with it."""
from __future__ import annotations

import json
from functools import wraps

import ml_dtypes
import numpy as np
import pytest

from gpucnn import layers, losses, optim
from gpucnn.backend import use_backend
from gpucnn.errors import CheckpointError
from gpucnn.geometry import make_window
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
)
from gpucnn.models import load_model, save_model
from gpucnn.precision import PRECISIONS, make_precision
from gpucnn.training import evaluate, predict, train_step
from tests.conftest import needs_cupy, needs_simulator
from tests.gpusim import fake_cupy

SINGLE, DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
STORED = {"float32": SINGLE, "tf32": SINGLE, "mixed_float16": np.dtype(np.float16),
          "mixed_bfloat16": np.dtype(ml_dtypes.bfloat16), "float64": DOUBLE}
MIXED = ("mixed_float16", "mixed_bfloat16")
SHAPE = (8, 8, 3)
# How far from float32 a few layers, or steps, may be: a few roundings of 11 or 8 bits.
CLOSE = {"tf32": 2e-3, "mixed_float16": 4e-3, "mixed_bfloat16": 3e-2, "float64": 1e-5}


def net():
    return Sequential([
        Conv2D(8, 3, padding="same", bias=False), BatchNorm(), ReLU(),
        Conv2D(16, 3, stride=2, padding="same", activation="leaky_relu"), MaxPool2D(2),
        Residual(Sequential([Conv2D(16, 3, padding="same", bias=False), BatchNorm()]),
                 activation="relu"),
        AvgPool2D(2), Dropout(0.2), Flatten(), Dense(8, activation="tanh"), Dense(4)])


def build(precision, make=net):
    model = make()
    model.build(SHAPE, seed=3, precision=precision)
    return model


def batch(backend, n=12):
    rng = np.random.default_rng(5)
    x, t = rng.random((n, *SHAPE), np.float32), rng.integers(0, 4, n)
    x[..., 0] += 0.5 * t[:, None, None]  # something to learn
    return backend.asarray(x), t


def launched(work):
    """The names of the kernels that work() launches."""
    fake_cupy.launches.clear()
    work()
    return {name for name, _, _ in fake_cupy.launches}


# ---- names and refusals --------------------------------------------------------------------------

@pytest.mark.parametrize("name", PRECISIONS)
def test_the_table(name):
    precision = make_precision("m", name, "cupy")
    assert precision.name == name
    assert precision.activations == STORED[name]
    assert precision.parameters == (DOUBLE if name == "float64" else SINGLE)
    assert precision.tf32 == (name == "tf32")
    assert precision.mixed == (name in MIXED)


def test_an_unknown_name_is_refused(backend):
    with pytest.raises(ValueError, match=r"^Sequential: precision 'half' is not known; use "
                                         r"'float32', 'tf32', .*'float64'$"):
        build("half")


@pytest.mark.parametrize("precision", MIXED)
def test_numpy_refuses_mixed_precision_in_one_line(precision):
    for make, where in ((net, "Sequential"), (lambda: Conv2D(4, name="c"), "Conv2D 'c'")):
        with pytest.raises(ValueError, match=rf"^{where}: precision '{precision}' needs the cupy "
                                             "backend and a GPU; on numpy use 'float32'$"):
            build(precision, make)


def test_dtype_is_another_way_to_say_it(backend):
    for dtype in ("float32", np.float64, DOUBLE):
        layer = Dense(2)
        layer.build((3,), dtype=dtype)
        assert layer.precision.name == np.dtype(dtype).name
    Dense(2).build((3,), dtype="float64", precision="float64")
    for dtype, precision in (("float64", "tf32"), ("float32", "mixed_float16"),
                             ("float32", "float64")):
        with pytest.raises(ValueError, match=f"dtype {dtype} is not that of precision "
                                             f"'{precision}'; give one of them"):
            Dense(2).build((3,), dtype=dtype, precision=precision)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got float16"):
        Dense(2).build((3,), dtype="float16")


@needs_cupy
@pytest.mark.parametrize("precision", MIXED)
def test_strict_dtype_refuses_what_would_be_cast(cupy_backend, precision):
    model = build(precision, lambda: Conv2D(8, name="c", strict_dtype=True))
    x, _ = batch(cupy_backend)
    name = STORED[precision].name
    with pytest.raises(TypeError, match=f"^Conv2D 'c': input is float32, layer is {name}; "
                                        rf"cast with x.astype\('{name}'\)$"):
        model.forward(x)
    assert model.forward(cupy_backend.asarray(x, STORED[precision])).dtype == STORED[precision]


# ---- training ------------------------------------------------------------------------------------

def train(backend, precision, steps=4):
    """The losses of a few steps, and the model."""
    model, (x, t) = build(precision), batch(backend)
    scale = optim.LossScale(model, 2.0**10) if precision == "mixed_float16" else None
    loss = losses.SoftmaxCrossEntropy(loss_scale=scale)
    optimizer = optim.Momentum(model, 0.05, loss_scale=scale)
    return [train_step(model, loss, optimizer, x, t)[0] for _ in range(steps)], model


@needs_cupy
@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_training_goes_as_in_float32(cupy_backend, precision):
    exact, _ = train(cupy_backend, "float32")
    got, model = train(cupy_backend, precision)
    assert got[-1] < 0.9 * got[0]
    np.testing.assert_allclose(got, exact, rtol=CLOSE[precision])
    assert (got != exact) == (precision != "float32")
    for parameter in model.parameters().values():
        np.testing.assert_array_equal(
            cupy_backend.to_numpy(parameter.cast),
            cupy_backend.to_numpy(parameter.data).astype(STORED[precision]))


def watch(model):
    """The dtypes of all float arrays that pass between layers from now on: (where, what, dtype)."""
    seen = []

    def watched(layer, name):
        method = getattr(layer, name)

        @wraps(method)
        def call(*arguments, **options):
            result = method(*arguments, **options)
            results = result if isinstance(result, tuple) else (result,)
            seen.extend((layer.where, name, a.dtype) for a in (*arguments, *results)
                        if hasattr(a, "dtype"))
            return result
        setattr(layer, name, call)

    for layer in model.walk():
        for name in ("forward", "forward_added", "backward", "backward_added",
                     "backward_parameters"):
            watched(layer, name)
    return seen


@needs_cupy
@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_tensor_is_stored_as_the_table_says(cupy_backend, precision):
    model, (x, t) = build(precision), batch(cupy_backend)
    stored, kept = STORED[precision], DOUBLE if precision == "float64" else SINGLE
    seen = watch(model)
    logits = model.forward(cupy_backend.asarray(x, stored), training=True)
    value, dlogits = losses.SoftmaxCrossEntropy()(logits, t)
    model.backward(dlogits)
    model.forward(cupy_backend.asarray(x, stored))
    assert {where for where, _, _ in seen} == {layer.where for layer in model.walk()}
    assert [s for s in seen if s[2] != stored] == []
    assert value.dtype == kept
    for path, p in model.parameters().items():
        assert (p.data.dtype, p.grad.dtype, p.cast.dtype) == (kept, kept, stored), path
        assert (p.cast is p.data) == (precision not in MIXED), path
    for path, (layer, name) in model.buffers().items():
        assert layer.own_buffers[name].dtype == kept, path


@needs_cupy
@pytest.mark.parametrize("precision", MIXED)
def test_cast_parameters_writes_the_copy_anew(cupy_backend, precision):
    model = build(precision)
    p = model.parameters()["dense2/w"]
    p.data[...] = 0.1
    assert not (p.cast == p.data.astype(STORED[precision])).any()
    model.cast_parameters()
    assert (p.cast == p.data.astype(STORED[precision])).all()
    build("float32").cast_parameters()


def test_tf32_on_numpy_is_float32():
    with use_backend("numpy") as backend:
        (exact, one), (got, other) = (train(backend, p) for p in ("float32", "tf32"))
    assert exact == got
    np.testing.assert_array_equal(one.flat_data, other.flat_data)


# ---- each kind of layer --------------------------------------------------------------------------

LAYERS = {
    "Conv2D of 3": lambda: Conv2D(8, 3, activation="tanh"),
    "Conv2D": lambda: Sequential([Conv2D(8, 1), Conv2D(8, 3, stride=2, activation="sigmoid")]),
    "depthwise Conv2D": lambda: Conv2D(3, 3, groups=3, activation="leaky_relu"),
    "im2col": lambda: Conv2D(8, 3, activation="tanh", algorithm="im2col"),
    "Dense": lambda: Sequential([Flatten(), Dense(8, activation="tanh")]),
    "BatchNorm": BatchNorm,
    "BatchNorm, ReLU": lambda: BatchNorm(activation="relu"),
    "BatchNorm without scale": lambda: BatchNorm(scale=False),
    **{name: getattr(layers, name) for name in (
        "ReLU", "LeakyReLU", "Sigmoid", "Tanh", "GELU", "Softmax", "GlobalAvgPool2D", "Flatten",
        "SpaceToDepth", "Whiten2D")},
    "Scale": lambda: layers.Scale(1 / 9),
    "stem": lambda: Sequential([layers.SpaceToDepth(2, 16), Conv2D(8, 4, activation="tanh")]),
    "MaxPool2D": lambda: MaxPool2D(3, stride=2),
    "AvgPool2D": lambda: AvgPool2D(3, stride=2, padding=1),
    "Dropout": lambda: Dropout(0.3),
    "Residual": lambda: Residual(Conv2D(3, 1), activation="tanh"),
    "Residual with a shortcut": lambda: Residual(
        Sequential([Conv2D(8, 3, padding=1, bias=False), BatchNorm()]), Conv2D(8, 1)),
    "Concat": lambda: Concat([Conv2D(3, 1), MaxPool2D(1), BatchNorm()]),
}


def test_no_kind_of_layer_is_left_out():
    used = {type(layer).__name__ for make in LAYERS.values() for layer in make().walk()}
    assert used >= set(layers.__all__) - {"Layer", "Parameter", "from_config", "Shape"}


@needs_cupy
@pytest.mark.parametrize("precision", MIXED)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_keeps_16_bits_and_its_results(cupy_backend, name, precision):
    stored, results = STORED[precision], []
    rng = np.random.default_rng(7)
    x = cupy_backend.asarray(rng.standard_normal((5, *SHAPE)), stored)
    for chosen in ("float32", precision):
        layer = build(chosen, LAYERS[name])
        evaluated = layer.forward(x)
        y = layer.forward(x, training=True)
        dy = cupy_backend.asarray(np.random.default_rng(8).standard_normal(y.shape), stored)
        dx = layer.backward(dy)
        if chosen == precision:
            assert {evaluated.dtype, y.dtype, dx.dtype} == {stored}
            assert {p.grad.dtype for p in layer.parameters().values()} <= {SINGLE}
        results.append([np.asarray(cupy_backend.to_numpy(a), np.float64) for a in (
            evaluated, y, dx, *(p.grad for p in layer.parameters().values()))])
    for exact, got in zip(*results):
        assert np.abs(got - exact).max() <= CLOSE[precision] * np.abs(exact).max()


@needs_cupy
def test_the_mean_of_an_image_may_have_a_sum_past_the_largest_float16(cupy_backend):
    layer = GlobalAvgPool2D()
    layer.build((20, 30, 8), precision="mixed_float16")
    x = cupy_backend.asarray(np.full((2, 20, 30, 8), 30000), np.float16)
    y = layer.forward(x, training=True)
    assert (y == 30000).all()
    dx = layer.backward(cupy_backend.asarray(np.full((2, 8), 600), np.float16))
    assert (dx == 1).all()
    empty = layer.forward(x[:0], training=True)
    assert empty.shape == (0, 8)
    assert layer.backward(empty).shape == (0, 20, 30, 8)


# ---- which kernels -------------------------------------------------------------------------------

TENSOR = {"conv_tensor_forward", "conv_tensor_weight_gradient", "conv_tensor_input_gradient"}
ORDINARY = {"conv_forward", "conv_weight_gradient", "conv_input_gradient"}


def forward_and_backward(backend, layer, shape, precision):
    layer.build(shape, precision=precision)
    y = layer.forward(backend.asarray(np.ones((2, *shape)), np.float32), training=True)
    layer.backward(y)


@needs_simulator
@pytest.mark.parametrize(("make", "image"), [
    (lambda: Conv2D(8, 3), (5, 5)), (lambda: Dense(8), ())], ids=["Conv2D", "Dense"])
@pytest.mark.parametrize(("precision", "capability", "channels", "tensor"), [
    ("float32", "90", 8, False), ("tf32", "90", 8, True), ("tf32", "80", 12, True),
    ("tf32", "75", 8, False), ("float64", "90", 8, False), ("mixed_float16", "120", 8, True),
    ("mixed_float16", "75", 8, False), ("mixed_bfloat16", "70", 8, False),
    ("mixed_bfloat16", "80", 8, True), ("mixed_bfloat16", "80", 12, False)])
def test_tensor_cores_where_there_are_any_and_channels_fill_16_bytes(
        cupy_backend, monkeypatch, make, image, precision, capability, channels, tensor):
    monkeypatch.setattr(fake_cupy._Device, "compute_capability", capability)
    names = launched(lambda: forward_and_backward(cupy_backend, make(), (*image, channels),
                                                  precision))
    assert names & (TENSOR | ORDINARY) == (TENSOR if tensor else ORDINARY)


@needs_simulator
@pytest.mark.parametrize("odd", ["x", "w", "residual", "da"])
@pytest.mark.parametrize("precision", ["float32", "tf32", *MIXED])
def test_an_odd_address_takes_the_ordinary_kernels(cupy_backend, precision, odd):
    """And the results are those of arrays at addresses that all kernels can read."""
    dtype, tf32, rng = STORED[precision], precision == "tf32", np.random.default_rng(1)
    values = {name: rng.standard_normal(shape) for name, shape in {
        "x": (2, 4, 5, 8), "w": (3, 3, 8, 8), "residual": (2, 4, 5, 8), "da": (2, 4, 5, 8)}.items()}
    window = make_window("test", 3, 1, 1, 1, (4, 5))

    def compute(odd):
        a = {name: cupy_backend.asarray(v, dtype) for name, v in values.items()}
        if odd:
            flat = cupy_backend.asarray(np.append(0, values[odd]), dtype)[1:]
            a[odd] = flat.reshape(a[odd].shape)
            assert a[odd].data.ptr % 16
        dw = cupy_backend.empty((3, 3, 8, 8), np.float32)
        x, w, da = a["x"], a["w"], a["da"]
        y = cupy_backend.conv2d(x, w, None, window, 1, None, a["residual"], tf32=tf32)
        dx = cupy_backend.conv2d_backward(da, da, x, w, window, 1, None, dw, tf32=tf32)
        return [np.asarray(cupy_backend.to_numpy(r), np.float64) for r in (y, dx, dw)]

    for got, want in zip(compute(odd), compute(None)):
        np.testing.assert_allclose(got, want, rtol=0, atol=20 * CLOSE.get(precision, 1e-6))


# ---- evaluation ----------------------------------------------------------------------------------

@needs_cupy
@pytest.mark.parametrize("precision", MIXED)
def test_probabilities_and_losses_are_float32(cupy_backend, precision):
    x, t = batch(cupy_backend)
    host = cupy_backend.to_numpy(x)
    exact, mixed = build("float32"), build(precision)
    probabilities = predict(mixed, host)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(probabilities, predict(exact, host), atol=CLOSE[precision])
    one, other = evaluate(exact, [(x, t)]), evaluate(mixed, [(x, t)])
    np.testing.assert_allclose(other.loss, one.loss, rtol=CLOSE[precision])
    logits = np.asarray(cupy_backend.to_numpy(mixed.forward(x)), np.float64)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    exactly = shifted / shifted.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, exactly, rtol=2e-6)
    np.testing.assert_allclose(other.loss, -np.log(exactly[np.arange(len(t)), t]).mean(),
                               rtol=2e-6)


# ---- saved files ---------------------------------------------------------------------------------

def description(path):
    return json.loads(path.with_suffix(".json").read_text())


@needs_cupy
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_model_comes_back_in_its_precision(cupy_backend, tmp_path, precision):
    _, model = train(cupy_backend, precision, steps=1)
    path = tmp_path / "m.safetensors"
    save_model(model, path)
    assert description(path)["precision"] == precision
    again, _ = load_model(path)
    assert again.precision == model.precision
    x, _ = batch(cupy_backend)
    np.testing.assert_array_equal(cupy_backend.to_numpy(again.forward(x)),
                                  cupy_backend.to_numpy(model.forward(x)))


@needs_cupy
@pytest.mark.parametrize("precision", ["tf32", *MIXED])
def test_a_model_of_the_gpu_loads_on_numpy(cupy_backend, tmp_path, precision):
    _, model = train(cupy_backend, precision, steps=1)
    path, (x, _) = tmp_path / "m.safetensors", batch(cupy_backend)
    save_model(model, path)
    with use_backend("numpy"):
        here, _ = load_model(path)
        assert here.precision.name == ("float32" if precision in MIXED else precision)
        with pytest.raises(ValueError, match="^load_model: precision 'mixed_float16' needs the "):
            load_model(path, "mixed_float16")
    np.testing.assert_array_equal(here.flat_data, cupy_backend.to_numpy(model.flat_data))
    np.testing.assert_allclose(here.forward(cupy_backend.to_numpy(x)),
                               np.asarray(cupy_backend.to_numpy(model.forward(x)), np.float32),
                               atol=CLOSE[precision])


@needs_cupy
def test_a_model_of_numpy_loads_in_another_precision_on_the_gpu(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(build("float32"), path)
    with use_backend("cupy") as backend:
        for precision in PRECISIONS[:4]:
            model, _ = load_model(path, precision)
            assert model.precision.name == precision
            for p in model.parameters().values():
                np.testing.assert_array_equal(
                    backend.to_numpy(p.cast), backend.to_numpy(p.data).astype(STORED[precision]))
        with pytest.raises(CheckpointError, match="is float32, model wants float64"):
            load_model(path, "float64")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_file_from_before_there_were_precisions_loads(tmp_path, dtype):
    path = tmp_path / "m.safetensors"
    save_model(build(dtype), path)
    old = description(path)
    assert old["dtype"] == dtype
    del old["precision"]
    path.with_suffix(".json").write_text(json.dumps(old))
    model, _ = load_model(path)
    assert model.precision.name == dtype
