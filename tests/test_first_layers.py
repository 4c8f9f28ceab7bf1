"""What networks begin with: whitening, squares of pixels, and layers that nobody trains."""
from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from gpucnn import convolution, layers, losses, optim
from gpucnn.backend import narrow_convolution, row_convolution, use_backend
from gpucnn.geometry import make_window
from gpucnn.layers import (
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    ReLU,
    Residual,
    Sequential,
    SpaceToDepth,
    Whiten2D,
)
from gpucnn.models import load_model, save_model
from gpucnn.training import TrainStep
from tests.conftest import needs_simulator

# ---- where the backward pass ends ----------------------------------------------------------------


def model_with_nothing_to_learn_in_front():
    """Squares, ReLU, [dropout, [convolution, ReLU]], dense: the convolution is the first to learn.
    """
    return Sequential([
        SpaceToDepth(2), ReLU(), Sequential([Dropout(0.1), Sequential([Conv2D(3), ReLU()])]),
        Flatten(), Dense(2)])


def test_the_backward_pass_ends_where_nothing_is_learned_any_more(backend, monkeypatch, rng):
    full, model = (model_with_nothing_to_learn_in_front() for _ in range(2))
    for one in (full, model):
        one.build((6, 8, 2), seed=4)
    first = model.layers[2].layers[1].layers[0]

    def refuse(*arguments, **options):
        raise AssertionError("nobody asked for it")

    for kind in (SpaceToDepth, Dropout):
        monkeypatch.setattr(kind, "backward", refuse)
    monkeypatch.setattr(first, "backward", refuse)
    monkeypatch.setattr(model.layers[1], "backward", refuse)
    x = backend.asarray(rng.random((3, 6, 8, 2)), np.float32)
    y = model.forward(x, training=True)
    model.backward_parameters(y)
    monkeypatch.undo()
    full.backward(full.forward(x, training=True))
    np.testing.assert_allclose(backend.to_numpy(model.flat_grad),
                               backend.to_numpy(full.flat_grad), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="before forward"):
        model.backward_parameters(y)


def test_what_stands_in_front_keeps_nothing_alive():
    model = Sequential([ReLU(), ReLU(), Conv2D(2), Flatten(), Dense(2)])
    model.build((4, 4, 1))
    saved = weakref.ref(x := np.ones((1, 4, 4, 1), np.float32))
    y = model.forward(x, training=True)
    kept = weakref.ref(model.layers[0]._saved[0])
    model.backward_parameters(y)
    del x
    gc.collect()
    assert saved() is None
    assert kept() is None
    assert all(layer._saved is None for layer in model.walk())


@pytest.mark.parametrize("make", [lambda: ReLU(), lambda: Sequential([]),
                                  lambda: Sequential([ReLU(), Sequential([Flatten()])])])
def test_a_model_that_learns_nothing_has_no_backward_pass(backend, make):
    model = make()
    model.build((2, 2, 1))
    assert not model.learns
    model.backward_parameters(model.forward(backend.xp.ones((1, 2, 2, 1), np.float32), True))
    assert all(layer._saved is None for layer in model.walk())


def test_a_residual_block_in_front_has_its_whole_backward_pass(backend, rng):
    model = Sequential([ReLU(), Residual(Sequential([Conv2D(2, 1), Conv2D(2, 1)]))])
    model.build((3, 3, 2), dtype=np.float64)
    x = backend.asarray(rng.standard_normal((2, 3, 3, 2)))
    gradients = []
    for backward in (model.backward, model.backward_parameters):
        backward(model.forward(x, training=True))
        gradients.append(backend.to_numpy(model.flat_grad) + 0)
    np.testing.assert_array_equal(*gradients)


def test_the_plan_says_the_same(capsys):
    model_with_nothing_to_learn_in_front().summary((6, 8, 2), plan=True)
    printed = capsys.readouterr().out
    assert printed.count("input gradient") == 1  # of the dense layer
    Sequential([Whiten2D(2), Conv2D(4)]).summary((6, 8, 2), plan=True)
    printed = capsys.readouterr().out.split("conv1")
    assert "gradient" not in printed[0]
    assert "input gradient" in printed[1]
    Sequential([Conv2D(2, bias=False, padding="same"), Whiten2D(2)]).summary((6, 8, 2), plan=True)
    printed = capsys.readouterr().out.split("whiten1")
    assert "input gradient" not in printed[0]
    assert "input gradient" in printed[1]
    assert "weight gradient" not in printed[1]


# ---- Whiten2D ------------------------------------------------------------------------------------

def images(rng, n=60):
    """Neighbouring pixels and channels are much alike."""
    noise = rng.standard_normal((n, 9, 8, 3))
    return noise.cumsum(1).cumsum(2) / 5 + noise[..., :1]


def fitted(x, kernel_size=2, **options):
    layer = Whiten2D(kernel_size, **options)
    layer.build(x.shape[1:], dtype=np.float64)
    layer.fit(layer.backend.asarray(x))
    return layer


@pytest.mark.parametrize("kernel_size", [2, (1, 3)])
def test_what_it_gives_is_white(backend, rng, kernel_size):
    x = images(rng)
    layer = fitted(x, kernel_size, epsilon=1e-12)
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    half = y.shape[3] // 2
    rows = y[..., :half].reshape(-1, half)
    np.testing.assert_allclose(rows.T @ rows / len(rows), np.eye(half), atol=1e-8)
    np.testing.assert_allclose(y[..., half:], -y[..., :half], rtol=1e-12)


def test_the_filters_are_those_of_airbench(rng):
    """By its own formula, on torch's order of axes; its signs are left to chance."""
    torch = pytest.importorskip("torch")
    x = images(rng)
    patches = torch.tensor(x).permute(0, 3, 1, 2).unfold(2, 2, 1).unfold(3, 2, 1)
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    values, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
    want = (vectors.T.reshape(12, 3, 2, 2).flip(0)
            / (values.flip(0).reshape(-1, 1, 1, 1) + 5e-4).sqrt()).numpy()
    w = fitted(x).own_buffers["w"]
    assert w.shape == (2, 2, 3, 24)
    got = w[..., :12].transpose(3, 2, 0, 1)
    signs = np.sign((got * want).sum((1, 2, 3), keepdims=True))
    np.testing.assert_allclose(got, signs * want, rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(w[..., 12:], -w[..., :12])


def test_the_filters_do_not_depend_on_the_order_of_the_images_or_on_blocks(rng, monkeypatch):
    x = images(rng)
    one = fitted(x).own_buffers["w"]
    monkeypatch.setattr("gpucnn.layers.whiten._BLOCK_BYTES", 1 << 15)
    np.testing.assert_allclose(fitted(x[::-1]).own_buffers["w"], one, rtol=1e-8, atol=1e-10)


def test_the_signs_of_the_filters_are_not_left_to_lapack(rng, monkeypatch):
    x, eigh = images(rng), np.linalg.eigh
    one = fitted(x).own_buffers["w"]

    def turned(matrix):
        values, vectors = eigh(matrix)
        return values, vectors * np.where(np.arange(len(values)) % 3, 1, -1)

    monkeypatch.setattr(np.linalg, "eigh", turned)
    np.testing.assert_array_equal(fitted(x).own_buffers["w"], one)


def test_before_fit_they_are_random_and_at_right_angles(backend):
    ws = []
    for seed in (1, 1, 2):
        layer = Whiten2D(2)
        layer.build((5, 5, 3), seed=seed)
        ws.append(backend.to_numpy(layer.own_buffers["w"]).reshape(12, 24))
    np.testing.assert_array_equal(ws[0], ws[1])
    assert (ws[0] != ws[2]).any()
    np.testing.assert_allclose(ws[0][:, :12].T @ ws[0][:, :12], np.eye(12), atol=1e-6)


def test_only_the_bias_is_learned_and_all_is_saved(backend, rng, tmp_path):
    x = images(rng, 8).astype(np.float32)
    model = Sequential([Whiten2D(2), ReLU(), Flatten(), Dense(3)])
    model.build(x.shape[1:])
    model.layers[0].fit(x)
    assert [name for name in model.parameters() if name.startswith("whiten1")] == ["whiten1/b"]
    before = backend.to_numpy(model.layers[0].own_buffers["w"]) + 0
    y = model.forward(backend.asarray(x), training=True)
    model.backward_parameters(y)
    optim.GradientDescent(model, 0.1).step()
    np.testing.assert_array_equal(backend.to_numpy(model.layers[0].own_buffers["w"]), before)
    assert model.layers[0].b.data.any()
    save_model(model, tmp_path / "m.safetensors")
    again, _ = load_model(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(backend.to_numpy(again.forward(backend.asarray(x))),
                                  backend.to_numpy(model.forward(backend.asarray(x))))


def test_no_gradient_of_the_filters_is_computed(backend, rng):
    """Where dw is None: dx and db as they are with it, and db alone."""
    x, w, dy = (backend.asarray(rng.standard_normal(shape)) for shape in (
        (2, 5, 6, 3), (2, 2, 3, 4), (2, 4, 5, 4)))
    window = make_window("test", 2, 1, 0, 1, (5, 6))
    dw, want = backend.xp.empty(w.shape), backend.xp.empty(4)
    for algorithm in ("auto", "im2col"):
        dx = backend.conv2d_backward(dy, dy, x, w, window, 1, "tanh", dw, want, True, algorithm)
        for input_gradient in (True, False):
            db = backend.xp.zeros(4)
            got = backend.conv2d_backward(dy, dy, x, w, window, 1, "tanh", None, db,
                                          input_gradient, algorithm)
            np.testing.assert_allclose(backend.to_numpy(db), backend.to_numpy(want), rtol=1e-13)
            if input_gradient:
                np.testing.assert_array_equal(backend.to_numpy(got), backend.to_numpy(dx))
            else:
                assert got is None
    assert backend.conv2d_backward(dy, dy, x, w, window, 1, None, None, None, False) is None


def test_whitening_on_a_cpu_multiplies_nothing_in_its_backward_pass(monkeypatch):
    layer = Whiten2D(2)
    layer.build((5, 6, 3))
    y = layer.forward(np.ones((2, 5, 6, 3), np.float32), training=True)
    for module in (convolution, narrow_convolution, row_convolution):
        for name in ("conv2d_backward", "weight_gradient"):
            monkeypatch.setattr(module, name, None, raising=False)
    layer.backward_parameters(np.ones_like(y))
    np.testing.assert_array_equal(layer.b.grad, 2 * 4 * 5)


@needs_simulator
@pytest.mark.parametrize("precision", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_whitening_on_a_gpu_launches_no_weight_gradient(precision, rng):
    from tests.gpusim import fake_cupy
    with use_backend("cupy") as backend:
        model = Sequential([Whiten2D(2), Flatten(), Dense(8)])
        model.build((9, 8, 3), precision=precision)
        x = images(rng, 8).astype(np.float32)
        model.layers[0].fit(x)
        fake_cupy.launches.clear()
        layer = model.layers[0]
        y = layer.forward(backend.asarray(x), training=True)
        assert y.dtype == model.precision.activations
        layer.backward_parameters(y)
        names = {name for name, _, _ in fake_cupy.launches}
    assert not [name for name in names if "gradient" in name]
    assert any("bias" in name for name in names)


def test_whitening_refuses_what_it_cannot_use(backend):
    with pytest.raises(ValueError, match="^Whiten2D: epsilon must be > 0 and finite, got 0"):
        Whiten2D(2, epsilon=0)
    layer = Whiten2D(3, name="first")
    with pytest.raises(RuntimeError, match="not built"):
        layer.fit(np.ones((2, 5, 5, 1)))
    layer.build((5, 5, 1))
    for wrong, message in (
            (np.ones((5, 5, 1)), "expected NHWC input with 4 dimensions"),
            (np.ones((1, 5, 5, 2)), "weights expect 1"),
            (np.ones((1, 2, 5, 1)), "kernel 3x3 is larger"),
            (np.ones((0, 5, 5, 1)), "needs images with finite values, got none"),
            (np.full((1, 5, 5, 1), np.nan), "got NaN or infinity among them")):
        with pytest.raises(ValueError, match=message):
            layer.fit(wrong)
    with pytest.raises(TypeError, match="scale to float first"):
        layer.fit(np.ones((1, 5, 5, 1), np.uint8))


def test_images_without_any_variation_give_finite_filters():
    assert np.isfinite(fitted(np.zeros((3, 4, 4, 1))).own_buffers["w"]).all()


# ---- SpaceToDepth --------------------------------------------------------------------------------

def test_channels_are_in_the_order_of_the_pixels(backend):
    x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3).astype(np.float32)
    layer = SpaceToDepth(2, channels=14)
    assert layer.build((4, 6, 3)) == (2, 3, 14)
    y = backend.to_numpy(layer.forward(backend.asarray(x)))
    for dy, dx, c in np.ndindex(2, 2, 3):
        np.testing.assert_array_equal(y[..., (dy * 2 + dx) * 3 + c], x[:, dy::2, dx::2, c])
    assert not y[..., 12:].any()


def test_squares_refuse_what_does_not_fit(backend):
    for shape in ((5, 6, 3), (6, 5, 3)):
        with pytest.raises(ValueError, match=rf"^SpaceToDepth: images of {shape[0]} x {shape[1]} "
                                             "pixels have no whole number of squares of 2 x 2; "
                                             "crop or pad them$"):
            SpaceToDepth(2).build(shape)
    layer = SpaceToDepth(2)
    layer.build((4, 4, 1))
    with pytest.raises(ValueError, match="images of 4 x 3 pixels have no whole number"):
        layer.forward(backend.xp.ones((1, 4, 3, 1), np.float32))
    with pytest.raises(ValueError, match="channels must be >= 12 for images with 3 ch"):
        SpaceToDepth(2, channels=8).build((4, 4, 3))
    with pytest.raises(ValueError, match="size"):
        SpaceToDepth(0)


def test_squares_in_blocks_are_the_same(backend, monkeypatch, rng):
    layer = SpaceToDepth(2, channels=16)
    layer.build((4, 6, 3))
    x = backend.asarray(rng.random((5, 4, 6, 3)), np.float32)
    results = []
    for block_bytes in (1 << 20, 1):
        monkeypatch.setattr(backend, "block_bytes", block_bytes)
        y = layer.forward(x, training=True)
        results.append([backend.to_numpy(a) for a in (y, layer.backward(y))])
    for one, other in zip(*results):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(results[0][1], backend.to_numpy(x))


NETS = {
    "squares": lambda: Sequential([
        SpaceToDepth(2, channels=16), Conv2D(8, 3, bias=False), BatchNorm(scale=False),
        layers.GELU(), Flatten(), Dense(8), layers.Scale(1 / 9)]),
    "whitened": lambda: Sequential([
        Whiten2D(2), layers.GELU(), Conv2D(8, 3, initializer="dirac"), Flatten(), Dense(8)]),
}


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_a_graph_gives_the_bits_of_plain_steps(cupy_backend, make, precision, rng):
    x, t, results = rng.random((4, 2, 8, 8, 3), np.float32), rng.integers(0, 8, (4, 2)), []
    for capture in (True, False):
        model = make()
        model.build((8, 8, 3), precision=precision)
        step = TrainStep(model, losses.SoftmaxCrossEntropy(), optim.Momentum(model, 0.1),
                         capture=capture)
        for batch in zip(x, t):
            step(*batch)
        assert step.not_captured is None
        results.append((step.results(), cupy_backend.to_numpy(model.flat_data) + 0))
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])
