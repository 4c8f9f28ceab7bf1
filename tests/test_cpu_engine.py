"""The CPU's way of working: threads, blocks, the convolutions it chooses from, reused memory."""
from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import threadpoolctl

from gpucnn import convolution, layers, losses, models, ops, optim, training
from gpucnn.backend import make_backend, narrow_convolution, parallel, row_convolution
from gpucnn.backend.recycling import _PATIENCE, Recycler
from gpucnn.geometry import make_window
from tests import cases

NUMPY = make_backend("numpy")


# ----------------------------------------------------------------------------------- convolutions


ROWS, FEW, IM2COL, PRODUCT = "rows of taps", "few channels", "im2col", "matrix product"


@pytest.mark.parametrize(("c", "groups", "kernel", "stride", "forward", "backward", "first"), [
    (1, 1, 3, 1, FEW, IM2COL, FEW), (32, 1, 3, 1, ROWS, ROWS, ROWS),
    (32, 1, 3, 2, ROWS, IM2COL, ROWS), (32, 2, 3, 1, IM2COL, IM2COL, IM2COL),
    (32, 1, 1, 1, PRODUCT, PRODUCT, PRODUCT)])
def test_the_plan_is_what_is_done(c, groups, kernel, stride, forward, backward, first, monkeypatch):
    """first: the backward pass of a first layer, without an input gradient."""
    ways = {row_convolution: ROWS, narrow_convolution: FEW,
            convolution: PRODUCT if kernel == 1 else IM2COL}
    done = []

    def spied(way, function):
        return lambda *args: (done.append(ways[way]), function(*args))[1]

    for way in ways:
        for name in ("conv2d", "conv2d_backward", "weight_gradient"):
            if hasattr(way, name):
                monkeypatch.setattr(way, name, spied(way, getattr(way, name)))
    layer = layers.Conv2D(32, kernel, stride=stride, padding=kernel // 2, groups=groups)
    layer.build((14, 14, c))
    for input_gradient, back in ((True, backward), (False, first)):
        plans = layer.plan(2, input_gradient)
        assert plans.pop("forward").algorithm == forward
        assert {plan.algorithm for plan in plans.values()} == {back}
        assert ("input gradient" in plans) == input_gradient
        dy = layer.forward(np.ones((2, 14, 14, c), np.float32), training=True)
        (layer.backward if input_gradient else layer.backward_parameters)(dy)
    assert done == [forward, backward, forward, first]


@pytest.mark.parametrize("block_bytes", [1, 3000, 1 << 20])
@pytest.mark.parametrize("rows", [True, False])
def test_every_way_to_convolve_equals_the_reference(rows, block_bytes, monkeypatch):
    """Random cases, by rows wherever that is possible, and by im2col alone; in bands and blocks."""
    monkeypatch.setattr(NUMPY, "block_bytes", block_bytes)
    if rows:
        monkeypatch.setattr(row_convolution, "LEAST_ROW", 1)
    else:
        for way in (row_convolution, narrow_convolution):
            monkeypatch.setattr(way, "pays", lambda *shapes: False)
    for seed in range(100):
        case = cases.conv_case(seed)
        with cases.named(case):
            cases.judge(case, cases.expected_conv(case), NUMPY)


@pytest.mark.parametrize("c", [1, 3, 8])
@pytest.mark.parametrize("in_place", [1, 5000, 10**6])
def test_products_are_taken_apart_and_put_together(c, in_place, monkeypatch, rng):
    """Sizes at which products split into equal parts and a rest."""
    monkeypatch.setattr(row_convolution, "IN_PLACE", in_place)
    monkeypatch.setattr(narrow_convolution, "IN_PLACE", in_place)
    monkeypatch.setattr(row_convolution, "pays", lambda *shapes: True)
    x, w, b = rng.random((2, 11, 7, c)), rng.random((3, 2, c, 5)), rng.random(5)
    from gpucnn import reference
    expected = reference.conv2d(x, w, b, stride=1, padding=1)
    window = make_window("", (3, 2), 1, 1, 1, (11, 7))
    dy = rng.random(expected.shape)
    dx, dw, db = reference.conv2d_backward(dy, x, w, stride=1, padding=1)
    for way in (row_convolution, narrow_convolution):
        np.testing.assert_allclose(way.conv2d(NUMPY, x, w, b, window, None), expected)
    gradients = row_convolution.conv2d_backward(NUMPY, dy, dy, x, w, window, None, True)
    for gradient, want in zip(gradients, (dx, dw, db)):
        np.testing.assert_allclose(gradient, want)
    for gradient, want in zip(narrow_convolution.weight_gradient(NUMPY, dy, dy, x, w, window, None),
                              (dw, db)):
        np.testing.assert_allclose(gradient, want)


@pytest.mark.parametrize("rows", [slice(0, 1), slice(0, 6), slice(2, 4), slice(5, 6)])
@pytest.mark.parametrize("top", [0, 1, 9])
def test_a_band_meets_the_rows_that_its_windows_meet(rows, top):
    window = make_window("", 3, 2, ((top, 12), (0, 0)), 2, (4, 9))
    source, part = row_convolution.band(window, 4, rows)
    met = {y * 2 - top + k * 2 for y in range(rows.start, rows.stop) for k in range(3)}
    assert set(range(source.start, source.stop)) >= {y for y in met if 0 <= y < 4}
    assert min(part) >= 0
    size = source.stop - source.start
    if size:
        assert part.out_size(size, 9)[0] == rows.stop - rows.start
    assert source.start - part.top == min(met) or not size


# ---------------------------------------------------------------------------------------- threads


def results_of_everything() -> bytes:
    """The bits of all ops, and of a network after two steps, in blocks that threads share out."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 12, 12, 8)).astype(np.float32)
    results = []
    for c, groups in ((8, 1), (8, 2), (1, 1)):
        w = rng.standard_normal((3, 3, c // groups, 6)).astype(np.float32)
        y = ops.conv2d(x[..., :c], w, padding=1, groups=groups, activation="relu")
        results += [y, *ops.conv2d_backward(y, x[..., :c], w, padding=1, groups=groups)]
    y, mask = ops.max_pool2d(x, 3, stride=2, padding=1)
    results += [y, mask, ops.max_pool2d_backward(y, mask, x.shape, 3, stride=2, padding=1)]
    y = ops.avg_pool2d(x, 3, stride=2, padding=1)
    results += [y, ops.avg_pool2d_backward(y, x.shape, 3, stride=2, padding=1)]
    normed = layers.Sequential([layers.Conv2D(8), layers.BatchNorm(), layers.LeakyReLU(),
                                layers.Residual(layers.BatchNorm(), activation="relu"),
                                layers.GlobalAvgPool2D(), layers.Dense(10)])
    for model in (models.article(10), normed):
        model.build((12, 12, 8), seed=1)
        optimizer = optim.Adam(model)
        for _ in range(2):
            training.train_step(model, losses.SoftmaxCrossEntropy(), optimizer, x, np.arange(9))
        results.append(model.flat_data)
    return b"".join(a.tobytes() for a in results)


def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(NUMPY, "block_bytes", 5000)
    results = []
    for number in ("1", "2", "5"):
        monkeypatch.setenv("GPUCNN_THREADS", number)
        results.append(results_of_everything())
    assert results[0] == results[1] == results[2]


def test_all_threads_work(monkeypatch):
    monkeypatch.setenv("GPUCNN_THREADS", "3")
    together = threading.Barrier(3)  # passed only by three at a time
    parallel.for_each(lambda item: together.wait(timeout=30), range(3))


def test_work_inside_of_work_stays_on_its_thread(monkeypatch):
    monkeypatch.setenv("GPUCNN_THREADS", "2")
    threads = []
    together = threading.Barrier(2)

    def outer(item):
        together.wait(timeout=30)
        parallel.for_each(lambda _: threads.append((item, threading.get_ident())), range(4))

    parallel.for_each(outer, range(2))
    assert len(threads) == 8
    assert len(set(threads)) == 2


@pytest.mark.parametrize("text", ["0", "-1", "2.5", "", "all"])
def test_a_number_of_threads_that_is_none(text, monkeypatch):
    monkeypatch.setenv("GPUCNN_THREADS", text)
    with pytest.raises(ValueError, match=f"^GPUCNN_THREADS='{text}' must be an int >= 1"):
        ops.max_pool2d(np.ones((1, 2, 2, 1)), 2)


def test_without_the_variable_the_cores_of_this_process_work(monkeypatch):
    monkeypatch.delenv("GPUCNN_THREADS", raising=False)
    assert parallel.thread_count() == len(os.sched_getaffinity(0))


def test_an_error_in_a_thread_is_raised_and_all_is_as_before(monkeypatch):
    monkeypatch.setenv("GPUCNN_THREADS", "2")
    before = [library["num_threads"] for library in threadpoolctl.threadpool_info()]
    together = threading.Barrier(2)

    def work(item):
        together.wait(timeout=30)
        if item:
            raise KeyError("planted")

    for _ in range(2):
        with pytest.raises(KeyError, match="planted"):
            parallel.for_each(work, range(2))
    assert [lib["num_threads"] for lib in threadpoolctl.threadpool_info()] == before


def test_the_blas_has_one_thread_inside_and_its_own_number_outside(monkeypatch):
    monkeypatch.setenv("GPUCNN_THREADS", "2")
    inside = []
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        parallel.for_each(lambda item: inside.extend(_blas_threads()), range(2))
        outside = _blas_threads()
    assert set(inside) == {1}
    assert set(outside) == {3}


def _blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpoolctl.threadpool_info()
            if library["user_api"] == "blas"]


def test_the_caller_says_which_floating_point_errors_count(monkeypatch):
    monkeypatch.setenv("GPUCNN_THREADS", "2")
    together = threading.Barrier(2)

    def overflow(item):
        together.wait(timeout=30)
        np.multiply(np.float32(3e38), np.ones(2, np.float32) * 3)

    with np.errstate(over="ignore"):
        parallel.for_each(overflow, range(2))
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        parallel.for_each(overflow, range(2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own():
    code = ("import os, numpy as np\n"
            "from gpucnn import ops\n"
            "x, w = np.ones((64, 28, 28, 32)), np.ones((3, 3, 32, 8))\n"
            "ops.conv2d(x, w)\n"
            "child = os.fork()\n"
            "if not child:\n"
            "    os._exit(ops.conv2d(x, w).shape != (64, 26, 26, 8))\n"
            "assert os.waitpid(child, 0)[1] == 0\n")
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60,
                   env={**os.environ, "GPUCNN_THREADS": "2", "GPUCNN_BACKEND": "numpy"})


# ----------------------------------------------------------------------------------------- memory


def test_a_sum_is_added_in_shares_that_do_not_take_too_much_memory(monkeypatch):
    monkeypatch.setattr(parallel, "_SHARES_BYTES", 100)
    total, = parallel.sum_over(lambda item, sums: np.add(sums, item, out=sums), range(10),
                               [np.empty(5)])
    np.testing.assert_array_equal(total, np.full(5, 45.0))


def test_memory_is_given_out_again_when_nobody_refers_to_it():
    recycler = Recycler()
    a = recycler.empty((100, 1000), np.float32)
    address = a.ctypes.data
    b = recycler.empty((100, 1000), np.float32)
    assert b.ctypes.data != address
    view = a[3:, ::2].T
    del a
    assert recycler.empty((1000, 100), np.float32).ctypes.data != address  # the view holds it
    del view
    c = recycler.empty((50, 1000), np.float64)  # as many bytes
    assert c.ctypes.data == address
    assert c.shape == (50, 1000)
    assert c.dtype == np.float64
    assert c.flags.c_contiguous


def test_memory_that_is_not_wanted_any_more_is_freed():
    recycler = Recycler()
    recycler.empty((100_000,), np.uint8)
    kept = recycler.empty((200_000,), np.uint8)
    for _ in range(_PATIENCE):
        recycler.empty((300_000,), np.uint8)
    recycler.empty((400_000,), np.uint8)
    assert sorted(b.nbytes for b in recycler.buffers) == [200_000, 300_000, 400_000]
    assert kept.nbytes == 200_000


def test_results_are_the_callers_own(rng):
    """What an op returned does not change when the op is called again."""
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((32, 28, 28, 8), (3, 3, 8, 8)))
    first = ops.conv2d(x, w)
    copy = first.copy()
    ops.conv2d(-x, w)
    np.testing.assert_array_equal(first, copy)
