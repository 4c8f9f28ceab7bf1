"""The judge is judged: by hand-worked examples, by adjoints, and by torch."""
import itertools

import numpy as np
import pytest

from gpucnn import reference
from tests import cases


def grey(rows):
    """One grey image as a batch: (1, h, w, 1)."""
    return np.array(rows, float)[None, :, :, None]


# ---- worked by hand ------------------------------------------------------------------------------

HALF_BRIGHT = np.repeat([[10., 10., 10., 0., 0., 0.]], 6, axis=0)


def test_vertical_edges_stand_where_bright_meets_dark():
    np.testing.assert_array_equal(reference.convolve(HALF_BRIGHT, reference.VERTICAL_EDGES),
                                  [[0, 30, 30, 0]] * 4)
    np.testing.assert_array_equal(reference.convolve(HALF_BRIGHT, reference.HORIZONTAL_EDGES),
                                  np.zeros((4, 4)))
    np.testing.assert_array_equal(reference.convolve(HALF_BRIGHT.T, reference.HORIZONTAL_EDGES),
                                  np.transpose([[0, 30, 30, 0]] * 4))


def test_with_the_kernel_rotated_it_is_the_formula_with_minus_signs(rng):
    f, h = rng.standard_normal((6, 7)), rng.standard_normal((3, 2))
    flipped = np.array([[sum(h[j, k] * f[m - j, n - k] for j in range(3) for k in range(2))
                         for n in range(1, 7)] for m in range(2, 6)])
    np.testing.assert_allclose(reference.convolve(f, reference.rot180(h)), flipped, rtol=1e-13)


@pytest.mark.parametrize("f", [1, 3, 5, 7])
def test_same_padding_keeps_the_size(f):
    p = reference.same_padding(f)
    assert reference.output_size(9, f, p) == 9
    assert reference.conv2d(np.ones((1, 9, 9, 1)), np.ones((f, f, 1, 1)), padding=p).shape == (
        1, 9, 9, 1)


def test_same_padding_of_an_even_kernel_does_not_exist():
    with pytest.raises(ValueError, match="even size 4"):
        reference.same_padding(4)


def test_output_size_counts_the_positions_of_the_kernel():
    assert reference.output_size(6, 3) == 4
    assert reference.output_size(7, 3, s=2) == 3
    assert reference.output_size(224, 7, p=3, s=2) == 112
    for n, f, p, s in itertools.product(range(3, 9), range(1, 4), range(3), range(1, 4)):
        assert reference.output_size(n, f, p, s) == len(range(-p, n + p - f + 1, s))


def test_pixels_at_the_border_are_used_less():
    np.testing.assert_array_equal(reference.times_used(5, 3), [
        [1, 2, 3, 2, 1], [2, 4, 6, 4, 2], [3, 6, 9, 6, 3], [2, 4, 6, 4, 2], [1, 2, 3, 2, 1]])
    assert reference.times_used(5, 3, p=1)[0, 0] == 4
    np.testing.assert_array_equal(reference.times_used(4, 3, s=2), [
        [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]])


def test_volumes(rng):
    """[6, 6, 3] * [3, 3, 3] x 2 -> [4, 4, 2], the sum of one convolution a channel."""
    x, w = rng.standard_normal((1, 6, 6, 3)), rng.standard_normal((3, 3, 3, 2))
    y = reference.conv2d(x, w, np.array([0.5, -1]))
    assert y.shape == (1, 4, 4, 2)
    for o, b in ((0, 0.5), (1, -1)):
        channels = [reference.convolve(x[0, :, :, c], w[:, :, c, o]) for c in range(3)]
        np.testing.assert_allclose(y[0, :, :, o], np.sum(channels, axis=0) + b, rtol=1e-13)


def test_convolution_backward_by_hand():
    a, dz = grey([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), grey([[1, 2], [3, 4]])
    w = np.array([[1., 0.], [0., -1.]])[:, :, None, None]
    da, dw, db = reference.conv2d_backward(dz, a, w)
    np.testing.assert_array_equal(da, grey([[1, 2, 0], [3, 3, -2], [0, -3, -4]]))
    np.testing.assert_array_equal(dw[:, :, 0, 0], [[37, 47], [67, 77]])
    np.testing.assert_array_equal(db, [10])


POOLED = grey([[1, 3, 2, 1], [4, 2, 1, 5], [7, 0, 8, 8], [6, 9, 8, 3]])


def test_max_pooling_by_hand():
    y, mask = reference.max_pool2d(POOLED, 2)
    np.testing.assert_array_equal(y, grey([[4, 5], [9, 8]]))
    np.testing.assert_array_equal(mask, grey([[2, 3], [3, 0]]))  # of three 8, the first
    dx = reference.max_pool2d_backward(grey([[10, 20], [30, 40]]), mask, (1, 4, 4, 1), 2)
    np.testing.assert_array_equal(dx, grey([[0, 0, 0, 0], [10, 0, 0, 20], [0, 0, 40, 0],
                                            [0, 30, 0, 0]]))


def test_overlapping_maxima_add_up():
    x = grey([[0, 0, 0], [0, 9, 0], [0, 0, 0]])
    _, mask = reference.max_pool2d(x, 2, stride=1)
    dx = reference.max_pool2d_backward(grey([[1, 2], [3, 4]]), mask, x.shape, 2, stride=1)
    np.testing.assert_array_equal(dx, grey([[0, 0, 0], [0, 10, 0], [0, 0, 0]]))


def test_max_pooling_of_what_is_not_finite():
    nan, inf = np.nan, np.inf
    y, mask = reference.max_pool2d(grey([[1, nan], [nan, inf]]), 2)
    assert np.isnan(y).all()
    assert mask == 1
    y, mask = reference.max_pool2d(np.full((1, 1, 1, 1), -inf), 2, padding=1, stride=2)
    assert (y, mask) == (-inf, 3)                        # the pixel, not the padding before it


def test_average_pooling_by_hand():
    y = reference.avg_pool2d(grey([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), 2, padding=((1, 0), (1, 0)))
    np.testing.assert_array_equal(y, grey([[1, 2.5], [5.5, 7]]))  # padding is not counted
    dx = reference.avg_pool2d_backward(grey([[1, 2], [4, 8]]), (1, 3, 3, 1), 2,
                                       padding=((1, 0), (1, 0)))
    np.testing.assert_array_equal(dx, grey([[1, 1, 1], [2, 2, 2], [2, 2, 2]]))


def test_softmax_cross_entropy_by_hand():
    loss, dlogits = reference.softmax_cross_entropy(np.log([[1., 1., 2.], [4., 2., 2.]]), [2, 0])
    assert loss == pytest.approx(np.log(2), rel=1e-15)
    np.testing.assert_allclose(dlogits, [[0.125, 0.125, -0.25], [-0.25, 0.125, 0.125]], rtol=1e-14)
    loss, dlogits = reference.softmax_cross_entropy(np.zeros((1, 4)), [1], label_smoothing=0.4)
    assert loss == pytest.approx(np.log(4), rel=1e-15)
    np.testing.assert_allclose(dlogits, [[0.15, -0.45, 0.15, 0.15]], rtol=1e-14)


def test_dense_layer_and_gradient_descent_by_hand():
    a, w, b = np.array([[1., 2.]]), np.array([[1., 0., 2.], [3., 1., 0.]]), np.array([1., 1., 1.])
    np.testing.assert_array_equal(reference.dense(a, w, b), [[8, 3, 3]])
    da, dw, db = reference.dense_backward([[1., 10., 100.]], a, w)
    np.testing.assert_array_equal(da, [[201, 13]])
    np.testing.assert_array_equal(dw, [[1, 10, 100], [2, 20, 200]])
    np.testing.assert_array_equal(db, [1, 10, 100])
    np.testing.assert_array_equal(reference.gradient_descent(b, db, 0.1), [0.9, 0, -9])


# ---- adjoints and slopes -------------------------------------------------------------------------

ADJOINT_CASES = 50


def assert_equal_sums(*products):
    """All products (a, b) have the same sum, to what float64 can tell."""
    sums = [float(np.sum(a * b)) for a, b in products]
    terms = sum(np.size(a) for a, _ in products) + 100
    magnitude = max(float(np.sum(np.abs(a * b))) for a, b in products)
    np.testing.assert_allclose(sums, sums[0], rtol=0, atol=terms * magnitude * 2**-53)


@pytest.mark.parametrize("op", ["conv", "max_pool", "avg_pool", "columns"])
def test_backward_is_the_adjoint_of_forward(op):
    """For linear y(x), sum(dy * y(x)) = sum(dx * x); max pooling is linear once its mask stands."""
    for seed in range(ADJOINT_CASES):
        case = cases.OPS[op].make(seed)
        if case.values not in ("normal", "ties"):
            continue
        a, o = {k: v.astype(float) for k, v in case.arrays.items()}, case.options
        with cases.named(case):
            if op == "conv":
                z = reference.conv2d(a["x"], a["w"], **o)
                dx, dw, db = reference.conv2d_backward(a["dy"], a["x"], a["w"], **o)
                assert_equal_sums((a["dy"], z), (dx, a["x"]), (dw, a["w"]))
                np.testing.assert_allclose(db, a["dy"].sum((0, 1, 2)), rtol=1e-13, atol=1e-13)
            elif op == "max_pool":
                y, mask = reference.max_pool2d(a["x"], **o)
                dx = reference.max_pool2d_backward(a["dy"], mask, a["x"].shape, **o)
                assert_equal_sums((a["dy"], y), (dx, a["x"]))
            elif op == "avg_pool":
                dx = reference.avg_pool2d_backward(a["dy"], a["x"].shape, **o)
                assert_equal_sums((a["dy"], reference.avg_pool2d(a["x"], **o)), (dx, a["x"]))
            else:
                x = reference.col2im(a["cols"], a["x"].shape, **o)
                assert_equal_sums((a["cols"], reference.im2col(a["x"], **o)), (x, a["x"]))


@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_the_layers_gradients_are_its_slopes(activation, rng):
    """Along random directions, by central differences: off by h^2 and by eps / h, h = 1e-5."""
    a, w, b = (rng.standard_normal(s) for s in ((2, 4, 5, 2), (3, 2, 2, 3), (3,)))
    geometry = {"stride": (1, 2), "padding": "same"}
    z, out = reference.layer_forward(a, w, b, activation, **geometry)
    da = rng.standard_normal(out.shape)
    gradients = reference.layer_backward(da, z, a, w, activation, **geometry)
    for which, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)

        def loss(h, which=which, direction=direction):
            moved = [v + h * direction if i == which else v for i, v in enumerate((a, w, b))]
            return float(np.sum(da * reference.layer_forward(*moved, activation, **geometry)[1]))

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert slope == pytest.approx(float(np.sum(gradient * direction)), rel=1e-7)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_input_gradient_is_the_full_convolution_with_the_rotated_filter(stride, rng):
    a, w = rng.standard_normal((2, 8, 9, 2)), rng.standard_normal((3, 2, 2, 3))
    dz = rng.standard_normal(reference.conv2d(a, w, stride=stride).shape)
    da, _, _ = reference.conv2d_backward(dz, a, w, stride=stride)
    full = reference.full_convolution(dz, w, stride=stride)
    seen = da[:, :full.shape[1], :full.shape[2]]
    np.testing.assert_allclose(seen, full, rtol=1e-12, atol=1e-12)
    seen[...] = 0
    assert not da.any()                                  # no filter saw what the stride left over


def test_a_weight_of_nan_reaches_the_pixels_that_it_saw_and_no_others():
    w = np.array([[1., np.nan]])[:, :, None, None]       # 1 x 2
    da, _, _ = reference.conv2d_backward(grey([[1, 2]]), grey([[0, 0, 0, 0]]), w, stride=2)
    np.testing.assert_array_equal(da, grey([[1, np.nan, 2, np.nan]]))


def test_convolution_is_the_matrix_product_over_im2col(rng):
    x, w = rng.standard_normal((2, 5, 4, 3)), rng.standard_normal((3, 2, 3, 4))
    geometry = {"stride": 2, "padding": ((1, 0), (0, 2)), "dilation": (1, 2)}
    y = reference.im2col(x, (3, 2), **geometry) @ w.reshape(-1, 4)
    np.testing.assert_allclose(reference.conv2d(x, w, **geometry).reshape(y.shape), y, rtol=1e-12)


# ---- torch ---------------------------------------------------------------------------------------

@pytest.mark.parametrize(("op", "seeds"), cases.runs(share=4))
def test_the_reference_equals_torch(op, seeds):
    pytest.importorskip("torch")
    from tests import torch_judge
    for seed in seeds:
        case = cases.OPS[op].make(seed)
        case = case._replace(dtype=np.dtype(np.float64), arrays={
            k: v.astype(float) if v.dtype.kind == "f" else v for k, v in case.arrays.items()})
        with cases.named(case):
            expected = cases.OPS[op].expect(case)
            cases.assert_within(expected.values, cases.Expected(
                getattr(torch_judge, op)(case), expected.bounds), case.dtype)
