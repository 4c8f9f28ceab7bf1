"""The CPU: the ops of the kernels, in NumPy.

A window of kh x kw places is taken apart into its places: one strided view of the padded image
for each, as large as the output. The loops over places are short; all pixels are NumPy's work.
The batch is worked through in blocks of images that stay in the cache, on several threads.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from gpucnn import convolution, update
from gpucnn.activations import LEAKY_SLOPE, activate, activation_backward
from gpucnn.augmentation import Augmentation
from gpucnn.backend import (
    Fetch,
    Moments,
    PassPlan,
    Upload,
    batch_gather,
    batch_norm,
    convolution_algorithm,
    gelu,
    narrow_convolution,
    parallel,
    row_convolution,
)
from gpucnn.backend.convolution_ways import (
    FEW_CHANNELS,
    PRODUCT,
    ROWS,
    backward_way,
    backward_workspace,
    forward_way,
    forward_workspace,
)
from gpucnn.backend.recycling import Recycler
from gpucnn.backend.row_convolution import pad
from gpucnn.geometry import Window
from gpucnn.numerics import blocks_of, for_blocks, sum_rows, zero_where
from gpucnn.rng import drop_threshold, random_words

MATMUL_ROWS = 64         # or columns of a block: fewer would not repay the copy of the other matrix
WORK = 1 << 24           # multiply-adds of a block at least: fewer would not repay a thread
DROPOUT_BLOCK = 1 << 17  # elements
SQUARES_BLOCK = 1 << 16  # elements


class _Fetched:
    """A copy that is there at once."""

    done = True

    def __init__(self, array: np.ndarray):
        self._copy = array.copy()

    def result(self) -> np.ndarray:
        return self._copy


class _Targets:
    """Arrays that are filled where they are."""

    def __init__(self, targets: Sequence[np.ndarray]):
        self._targets = list(targets)

    def arrays(self) -> list[np.ndarray]:
        return self._targets

    def send(self) -> None:
        pass


class NumpyBackend:
    name = "numpy"
    xp = np
    captures = False
    norm_recomputes = False  # reading y takes less time here
    block_bytes = 3 << 20  # fits a core's share of the cache, and is worth waking a thread for

    def __init__(self) -> None:
        self._recycler = Recycler()

    def asarray(self, a: Any, dtype: Any = None) -> np.ndarray:
        return np.asarray(a, dtype, order="C")

    def to_numpy(self, a: np.ndarray) -> np.ndarray:
        return a

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return self._recycler.empty(shape, dtype)

    def free_bytes(self) -> float:
        return float("inf")

    def memory_in_use(self) -> None:
        return None

    def free_unused(self) -> None:
        self._recycler.free_unused()

    def capturing(self) -> bool:
        return False

    def graph_memory(self) -> None:
        return None

    def capture(self, work: Callable[[], Any], memory: Any = None) -> Callable[[], None]:
        return work

    def fetch(self, a: np.ndarray) -> Fetch:
        return _Fetched(a)

    def upload(self, targets: Sequence[np.ndarray]) -> Upload:
        return _Targets(targets)

    def record_step(self, loss: np.ndarray, hits: np.ndarray, ring: np.ndarray,
                    count: np.ndarray) -> None:
        ring[count[0] % len(ring)] = loss, hits
        count += 1

    def blocks(self, n: int, item_bytes: int, least_bytes: int = 0) -> list[slice]:
        count = max(1, -(-n * item_bytes // max(self.block_bytes, least_bytes)))
        if count < 16:  # a power of two: threads that share out few blocks get as many each
            count = 1 << count.bit_length() - 1
        return blocks_of(n, -(-n // count))

    def scratch_bytes(self, n: int, nbytes: int, block_nbytes: int) -> int:
        blocks = self.blocks(n, block_nbytes // n)
        return nbytes * blocks[0].stop // n * min(parallel.thread_count(), len(blocks))

    def for_each(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        parallel.for_each(work, items)

    def sum_over(self, work: Callable[..., None], items: Sequence[Any], like: Sequence[np.ndarray]
                 ) -> list[np.ndarray]:
        return parallel.sum_over(work, items, like)

    def matmul(self, a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        (m, k), n = a.shape, b.shape[1]
        product = self.empty((m, n), a.dtype) if out is None else out

        def rows(part: slice) -> None:
            np.matmul(a[part], b, out=product[part])

        def columns(part: slice) -> None:
            np.matmul(a, b[:, part], out=product[:, part])

        longer, shorter = max(m, n), min(m, n)
        self.for_each(rows if m >= n else columns, blocks_of(
            longer, max(MATMUL_ROWS, WORK // max(1, k * shorter))))
        return product

    def conv2d(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None, window: Window,
               groups: int, activation: str | None, residual: np.ndarray | None = None,
               algorithm: str = "auto", tf32: bool = False) -> np.ndarray:
        way = forward_way(window, groups, x.shape, w.shape[-1])
        if way == ROWS:
            return row_convolution.conv2d(self, x, w, b, window, activation, residual)
        if way == FEW_CHANNELS:
            return narrow_convolution.conv2d(self, x, w, b, window, activation, residual)
        return convolution.conv2d(self, x, w, b, window, groups, activation, residual)

    def conv2d_with_moments(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None,
                            window: Window, groups: int, activation: str | None,
                            residual: np.ndarray | None = None, algorithm: str = "auto",
                            tf32: bool = False) -> tuple[np.ndarray, Moments | None]:
        return self.conv2d(x, w, b, window, groups, activation, residual), None

    def conv2d_backward(self, da: np.ndarray, a: np.ndarray, x: np.ndarray, w: np.ndarray,
                        window: Window, groups: int, activation: str | None,
                        dw: np.ndarray | None, db: np.ndarray | None = None,
                        input_gradient: bool = True, algorithm: str = "auto",
                        tf32: bool = False) -> np.ndarray | None:
        if dw is None and not input_gradient:
            if db is not None:
                db[...] = self._sum_rows(
                    self.activation_backward(da, a, activation).reshape(-1, da.shape[-1]))
            return None
        if dw is None:  # it comes with dx
            dw = self.empty(w.shape, w.dtype)
        way = backward_way(window, groups, x.shape, w.shape[-1], input_gradient)
        # A full convolution multiplies filters with zeros around dZ: NaN for a weight that is not
        # finite, at pixels that it never saw.
        if way == ROWS and np.isfinite(w).all():
            dx, dw[...], bias_gradient = row_convolution.conv2d_backward(
                self, da, a, x, w, window, activation, input_gradient)
        elif way == FEW_CHANNELS:
            dx, (dw[...], bias_gradient) = None, narrow_convolution.weight_gradient(
                self, da, a, x, w, window, activation)
        else:
            dx, dw[...], bias_gradient = convolution.conv2d_backward(
                self, da, a, x, w, window, groups, activation, input_gradient)
        if db is not None:
            db[...] = bias_gradient
        return dx

    def start_conv2d_backward(self, da: np.ndarray, a: np.ndarray, x: np.ndarray, w: np.ndarray,
                              window: Window, groups: int, activation: str | None,
                              dw: np.ndarray | None, db: np.ndarray | None = None,
                              input_gradient: bool = True, algorithm: str = "auto",
                              tf32: bool = False) -> Callable[[], np.ndarray | None]:
        dx = self.conv2d_backward(da, a, x, w, window, groups, activation, dw, db, input_gradient)
        return lambda: dx

    def conv2d_plan(self, x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window,
                    groups: int, dtype: Any, algorithm: str = "auto", input_gradient: bool = True,
                    tf32: bool = False) -> dict[str, PassPlan]:
        convolution_algorithm(algorithm)  # is not followed here; but a misspelled one is refused
        forward = forward_way(window, groups, x_shape, w_shape[-1])
        backward = backward_way(window, groups, x_shape, w_shape[-1], input_gradient)
        arguments = self, x_shape, w_shape, window, np.dtype(dtype)
        kept, freed = forward_workspace(forward, *arguments)
        kept_back, freed_back = backward_workspace(backward, *arguments, input_gradient)
        # One pass over the images makes both gradients: what it takes is told once.
        return {"forward": PassPlan(forward, workspace=sum(kept.values()) + freed, kept=kept),
                **({"input gradient": PassPlan(backward)} if input_gradient else {}),
                "weight gradient": PassPlan(backward, kept=kept_back,
                                            workspace=sum(kept_back.values()) + freed_back)}

    def dense(self, x: np.ndarray, w: np.ndarray, b: np.ndarray | None, activation: str | None,
              tf32: bool = False) -> np.ndarray:
        z = self.matmul(x, w)
        if b is not None:
            z += b
        return activate(np, activation, z)

    def dense_backward(self, da: np.ndarray, a: np.ndarray, x: np.ndarray, w: np.ndarray,
                       activation: str | None, dw: np.ndarray, db: np.ndarray | None = None,
                       input_gradient: bool = True, tf32: bool = False) -> np.ndarray | None:
        dz = activation_backward(np, activation, da, a)
        self.matmul(x.T, dz, out=dw)
        if db is not None:
            db[...] = self._sum_rows(dz)
        return self.matmul(dz, w.T) if input_gradient else None

    def activate(self, z: np.ndarray, other: np.ndarray | None, activation: str | None,
                 slope: float = LEAKY_SLOPE) -> np.ndarray:
        a = self.empty(z.shape, z.dtype)

        def add(a: np.ndarray, z: np.ndarray, *others: np.ndarray) -> None:
            if others:
                np.add(z, others[0], out=a)
            else:
                a[...] = z
            activate(np, activation, a, slope)

        for_blocks(self, add, a, z, *([] if other is None else [other]))
        return a

    def activation_backward(self, da: np.ndarray, a: np.ndarray, activation: str | None,
                            slope: float = LEAKY_SLOPE) -> np.ndarray:
        if activation is None:
            return da
        dz = self.empty(da.shape, da.dtype)

        def work(dz: np.ndarray, da: np.ndarray, a: np.ndarray) -> None:
            activation_backward(np, activation, da, a, slope, out=dz)

        for_blocks(self, work, dz, da, a)
        return dz

    def gelu(self, x: np.ndarray) -> np.ndarray:
        return gelu.forward(self, x)

    def gelu_backward(self, dy: np.ndarray, x: np.ndarray) -> np.ndarray:
        return gelu.backward(self, dy, x)

    def dense_plan(self, n: int, inputs: int, units: int, dtype: Any, input_gradient: bool = True,
                   tf32: bool = False) -> dict[str, PassPlan]:
        passes = ("forward", *(("input gradient",) if input_gradient else ()), "weight gradient")
        return {name: PassPlan(PRODUCT) for name in passes}

    def im2col(self, x: np.ndarray, window: Window) -> np.ndarray:
        n, oh, ow, c = _output_shape(x.shape, window)
        cols = self.empty((n * oh * ow, window.places * c), x.dtype)

        def unfold(images: slice) -> None:
            rows = cols.reshape(n, oh, ow, window.kh, window.kw, c)[images]
            windows = _windows(pad(x[images], window), window, oh, ow)
            if c == 1:  # NumPy copies along the longest axis that lies well: not along the taps
                for ky, kx in np.ndindex(window.kh, window.kw):
                    rows[:, :, :, ky, kx] = windows[:, :, :, ky, kx]
            else:
                rows[...] = windows

        self._for_images(unfold, x, cols.nbytes)
        return cols

    def col2im(self, cols: np.ndarray, x_shape: tuple[int, ...], window: Window) -> np.ndarray:
        n, oh, ow, c = _output_shape(x_shape, window)
        places = cols.reshape(n, oh, ow, window.places, c)
        return self._gather(x_shape, window, cols, lambda n, place: places[n, :, :, place])

    def max_pool(self, x: np.ndarray, window: Window, relu: bool = False, want_mask: bool = True
                 ) -> tuple[np.ndarray, np.ndarray | None]:
        y = self.empty(_output_shape(x.shape, window), x.dtype)
        mask = self.empty(y.shape, window.mask_dtype) if want_mask else None

        def pool(n: slice) -> None:
            _max_pool(x[n], window, y[n], None if mask is None else mask[n])
            if relu:
                if mask is not None:
                    dead = y[n] <= 0
                    # All ones are 255 in a byte and -1 in an int32.
                    mask[n] |= -dead.astype(mask.dtype)
                np.maximum(y[n], 0, out=y[n])

        self._for_images(pool, x, 2 * x.nbytes)
        return y, mask

    def max_pool_backward(self, dy: np.ndarray, mask: np.ndarray, x_shape: tuple[int, ...],
                          window: Window) -> np.ndarray:
        return self._gather(x_shape, window, dy,
                            lambda n, place: zero_where(mask[n] != place, dy[n]))

    def avg_pool(self, x: np.ndarray, window: Window) -> np.ndarray:
        y = self.empty(_output_shape(x.shape, window), x.dtype)
        seen = _pixels_seen(x.shape, window, x.dtype)

        def average(n: slice) -> None:
            padded = pad(x[n], window)
            rows = parallel.scratch("rows", (len(padded), y.shape[1], *padded.shape[2:]), x.dtype)
            _sum(_taps(padded, 1, window.kh, window.sh, y.shape[1]), out=rows)
            _sum(_taps(rows, 2, window.kw, window.sw, y.shape[2]), out=y[n])
            y[n] /= seen

        self._for_images(average, x, 2 * x.nbytes)
        return y

    def avg_pool_backward(self, dy: np.ndarray, x_shape: tuple[int, ...],
                          window: Window) -> np.ndarray:
        dx = self.empty(x_shape, dy.dtype)
        seen = _pixels_seen(x_shape, window, dy.dtype)

        def share_out(n: slice) -> None:
            share = dy[n] / seen
            if _tiles(window, x_shape):
                rows = np.repeat(share, window.kw, axis=2)
                dx[n].reshape(*rows.shape[:2], window.kh, -1)[...] = rows.reshape(
                    *rows.shape[:2], 1, -1)
                return
            padded = parallel.scratch("padded", _padded_shape(dx[n].shape, window), dx.dtype)
            rows = parallel.scratch("rows", (len(padded), dy.shape[1], *padded.shape[2:]), dx.dtype)
            rows[...] = 0
            padded[...] = 0
            for taps in _taps(rows, 2, window.kw, window.sw, dy.shape[2]):
                taps += share
            for taps in _taps(padded, 1, window.kh, window.sh, dy.shape[1]):
                taps += rows
            dx[n] = _unpad(padded, x_shape, window)

        self._for_images(share_out, dx, 2 * dx.nbytes)
        return dx

    def global_avg_pool(self, x: np.ndarray) -> np.ndarray:
        # Products with ones, along a row and then over the rows: see numerics.sum_rows.
        _, h, w, _ = x.shape
        return np.ones(h, x.dtype) @ (np.ones(w, x.dtype) @ x) / float(h * w)

    def global_avg_pool_backward(self, dy: np.ndarray, x_shape: tuple[int, ...]) -> np.ndarray:
        n, h, w, c = x_shape
        share = (dy / float(h * w)).reshape(n, 1, 1, c)
        return np.ascontiguousarray(np.broadcast_to(share, x_shape))

    def dropout(self, x: np.ndarray, rate: float, key: int, stream: np.ndarray) -> np.ndarray:
        number, y = int(stream[0]), self.empty(x.shape, x.dtype)
        flat_x, flat_y = x.reshape(-1), y.reshape(-1)

        def drop(block: slice) -> None:
            words = random_words(block.stop - block.start, key, number, start=block.start)
            scaled = np.multiply(flat_x[block], x.dtype.type(1 / (1 - rate)), out=flat_y[block])
            scaled[...] = zero_where(words < drop_threshold(rate), scaled)

        count = max(1, -(-x.size // DROPOUT_BLOCK))
        fours = -(-x.size // (4 * count))  # words are drawn four at a time
        self.for_each(drop, blocks_of(x.size, 4 * fours))
        return y

    def gather_batch(self, images: np.ndarray, labels: np.ndarray, order: np.ndarray,
                     cursor: np.ndarray, n: int, table: np.ndarray, augmentation: Augmentation,
                     key: int, streamed: int = 0, choices: np.ndarray | None = None,
                     classes: int = 0) -> tuple[np.ndarray, np.ndarray]:
        return batch_gather.gather_batch(self, images, labels, order, cursor, n, table,
                                         augmentation, key, streamed, choices, classes)

    def batch_norm_statistics(self, x: np.ndarray, running_mean: np.ndarray,
                              running_var: np.ndarray, momentum: float,
                              moments: Moments | None = None) -> tuple[np.ndarray, np.ndarray]:
        return batch_norm.statistics(self, x, running_mean, running_var, momentum)

    def batch_norm(self, x: np.ndarray, mean: np.ndarray, var: np.ndarray, gamma: np.ndarray,
                   beta: np.ndarray, epsilon: float, residual: np.ndarray | None,
                   activation: str | None) -> np.ndarray:
        return batch_norm.forward(self, x, mean, var, gamma, beta, epsilon, residual, activation)

    def batch_norm_backward(self, dy: np.ndarray, x: np.ndarray, y: np.ndarray | None,
                            mean: np.ndarray, var: np.ndarray, gamma: np.ndarray,
                            beta: np.ndarray, epsilon: float, activation: str | None,
                            dgamma: np.ndarray, dbeta: np.ndarray, has_residual: bool
                            ) -> tuple[np.ndarray, np.ndarray | None]:
        return batch_norm.backward(self, dy, x, y, mean, var, gamma, epsilon, activation, dgamma,
                                   dbeta, has_residual)

    def softmax_cross_entropy(self, logits: np.ndarray, labels: np.ndarray, label_smoothing: float,
                              loss_scale: np.ndarray | None = None
                              ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        n, classes = logits.shape
        rows = np.arange(n)
        best = logits.argmax(axis=1)  # the first maximum, or the first NaN
        largest = logits[rows, best]
        hits = np.count_nonzero((best == labels) & (largest == largest))
        z = np.subtract(logits, largest[:, None], dtype=np.promote_types(logits.dtype, np.float32))
        p = np.exp(z)
        total = p.sum(axis=1, keepdims=True)
        loss = np.log(total).mean() - (1 - label_smoothing) * z[rows, labels].mean()
        p /= total
        p[rows, labels] -= 1 - label_smoothing
        if label_smoothing:
            loss -= label_smoothing * z.mean()
            p -= label_smoothing / classes
        p *= (1 if loss_scale is None else float(loss_scale[0])) / n
        # With NumPy 1.26 a Python float has made it a double.
        return z.dtype.type(loss), p.astype(logits.dtype, copy=False), np.asarray(hits)

    def sum_of_squares(self, g: np.ndarray) -> np.ndarray:
        blocks = blocks_of(g.size, SQUARES_BLOCK)
        partials = np.zeros(len(blocks))

        def add(i: int) -> None:
            part = g[blocks[i]]
            partials[i] = np.vdot(part, part)
            if not 1e-20 < partials[i] < 1e30:  # float32 may have overflowed or vanished
                wide = part.astype(np.float64)
                partials[i] = np.vdot(wide, wide)

        self.for_each(add, range(len(blocks)))
        return partials

    def apply_update(self, u: update.Update) -> None:
        update.prepare(u, float(self.sum_of_squares(u.g).sum()) if u.needs_norm else 0.0)
        update.apply(self, u)

    def apply_average(self, a: update.Averaging) -> None:
        update.prepare_average(a)
        update.apply_average(self, a)

    def _sum_rows(self, matrix: np.ndarray) -> np.ndarray:
        def add(rows: slice, total: np.ndarray) -> None:
            total += sum_rows(np, matrix[rows])

        return self.sum_over(add, self.blocks(len(matrix), matrix[:1].nbytes),
                             [np.empty(matrix.shape[1], matrix.dtype)])[0]

    def _gather(self, x_shape: tuple[int, ...], window: Window, dy: np.ndarray,
                reaching: Callable[[slice, int], np.ndarray]) -> np.ndarray:
        """dx: the sum over all places of what reaches the pixels there.

        reaching: images, place -> (n, oh, ow, c), for each output what it sends to that place.
        """
        dx = self.empty(x_shape, dy.dtype)

        def gather(n: slice) -> None:
            padded = dx[n] if not _is_padded(window) else \
                parallel.scratch("padded", _padded_shape(dx[n].shape, window), dx.dtype)
            padded[...] = 0
            for place, pixels in _places(padded, window, *window.out_size(*x_shape[1:3])):
                pixels += reaching(n, place)
            if _is_padded(window):
                dx[n] = _unpad(padded, x_shape, window)

        self._for_images(gather, dx, dx.nbytes + dy.nbytes)
        return dx

    def _for_images(self, work: Callable[[slice], None], x: np.ndarray, nbytes: int) -> None:
        """work(images) for all images of x, in blocks; nbytes: what it works on for all of x."""
        self.for_each(work, self.blocks(len(x), nbytes // max(1, len(x))))


def _max_pool(x: np.ndarray, window: Window, y: np.ndarray, mask: np.ndarray | None) -> None:
    """Write the maxima of each window to y and their places to mask, if there is one."""
    places = [pixels for _, pixels in _places(pad(x, window, -np.inf), window, *y.shape[1:3])]
    np.maximum(places[0], places[-1], out=y)  # NaN if either is
    for pixels in places[1:-1]:
        np.maximum(y, pixels, out=y)
    if mask is None:
        return
    # The place of the maximum is the number of places before it, none of which equals it.
    smaller = places[0] != y
    mask[...] = smaller
    for pixels in places[1:-1]:
        smaller &= pixels != y
        mask += smaller
    nan = np.isnan(y)  # equals nothing
    if nan.any():
        mask[nan] = np.argmax([np.isnan(pixels[nan]) for pixels in places], axis=0)
    if window.top or window.left:
        # A window of nothing but minus infinities has its first *pixel* as its maximum, and that
        # is not place 0 where the window begins in the padding.
        nothing = y == -np.inf
        if nothing.any():
            mask[nothing] = np.broadcast_to(_first_pixels(x.shape, window), y.shape)[nothing]


def _sum(terms: list[np.ndarray], out: np.ndarray) -> None:
    """Write the sum of arrays of one shape to out."""
    if len(terms) == 1:
        out[...] = terms[0]
        return
    np.add(terms[0], terms[1], out=out)
    for term in terms[2:]:
        out += term


def _output_shape(x_shape: tuple[int, ...], window: Window) -> tuple[int, int, int, int]:
    n, h, w, c = x_shape
    return (n, *window.out_size(h, w), c)


def _padded_shape(x_shape: tuple[int, ...], window: Window) -> tuple[int, int, int, int]:
    n, h, w, c = x_shape
    return n, window.top + h + window.bottom, window.left + w + window.right, c


def _is_padded(window: Window) -> bool:
    return any((window.top, window.bottom, window.left, window.right))


def _tiles(window: Window, x_shape: tuple[int, ...]) -> bool:
    """Whether each pixel is seen by exactly one window."""
    (kh, kw, sh, sw), (_, h, w, _) = window[:4], x_shape
    return not _is_padded(window) and (kh, kw) == (sh, sw) and h % kh == w % kw == 0


def _unpad(padded: np.ndarray, x_shape: tuple[int, ...], window: Window) -> np.ndarray:
    """The view of a padded x that is x."""
    _, h, w, _ = x_shape
    return padded[:, window.top:window.top + h, window.left:window.left + w]


def _windows(padded: np.ndarray, window: Window, oh: int, ow: int) -> np.ndarray:
    """All windows of padded images: a view (n, oh, ow, kh, kw, c)."""
    n, _, _, c = padded.shape
    image, row, pixel, channel = padded.strides
    return as_strided(padded, (n, oh, ow, window.kh, window.kw, c), (
        image, window.sh * row, window.sw * pixel, window.dh * row, window.dw * pixel, channel))


def _taps(a: np.ndarray, axis: int, taps: int, stride: int, out: int) -> list[np.ndarray]:
    """For each tap of a window along one axis, the view of a that its `out` outputs meet there."""
    before = (slice(None),) * axis
    return [a[(*before, slice(tap, tap + (out - 1) * stride + 1, stride))] for tap in range(taps)]


def _places(padded: np.ndarray, window: Window, oh: int, ow: int
            ) -> Iterator[tuple[int, np.ndarray]]:
    """For each place ky * kw + kx of the window, the pixels it meets: a view (n, oh, ow, c)."""
    for ky, kx in np.ndindex(window.kh, window.kw):
        y, x = ky * window.dh, kx * window.dw
        yield ky * window.kw + kx, padded[:, y:y + (oh - 1) * window.sh + 1:window.sh,
                                          x:x + (ow - 1) * window.sw + 1:window.sw]


def _inside(n: int, before: int, taps: int, stride: int, dilation: int, out: int) -> np.ndarray:
    """Which taps of each output's window meet one of the n pixels of an axis: (out, taps) bool."""
    pixel = np.arange(out)[:, None] * stride - before + np.arange(taps) * dilation
    return (pixel >= 0) & (pixel < n)


def _inside_both(x_shape: tuple[int, ...], window: Window) -> tuple[np.ndarray, np.ndarray]:
    _, h, w, _ = x_shape
    oh, ow = window.out_size(h, w)
    return (_inside(h, window.top, window.kh, window.sh, window.dh, oh),
            _inside(w, window.left, window.kw, window.sw, window.dw, ow))


def _pixels_seen(x_shape: tuple[int, ...], window: Window, dtype: np.dtype) -> np.ndarray:
    """How many pixels each window sees, (oh, ow, 1), or a scalar where all see the same."""
    if not _is_padded(window):
        return np.asarray(window.places, dtype)
    rows, columns = _inside_both(x_shape, window)
    return np.outer(rows.sum(1), columns.sum(1))[:, :, None].astype(dtype)


def _first_pixels(x_shape: tuple[int, ...], window: Window) -> np.ndarray:
    """The first place of each window that is not padding, (oh, ow, 1)."""
    rows, columns = _inside_both(x_shape, window)
    return (rows.argmax(1)[:, None] * window.kw + columns.argmax(1))[:, :, None]
