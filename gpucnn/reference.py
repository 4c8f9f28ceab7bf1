"""The article's formulas as plain loops over pixels: slow, exact, and the judge of all the rest.

Read it beside "Gentle Dive into Math Behind Convolutional Neural Networks" (Piotr Skalski): the
functions stand in the article's order, and docs/article.md says where each formula is computed
fast. The functions that gpucnn.ops also has take the same arguments and give the same results.

Images are x[i, y, x, c], filters w[ky, kx, c, filter]; Z, A and W are z, a and w, and dz means
the derivative of the loss with respect to z. Everything is computed and returned in float64.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gpucnn.geometry import IntOrPair, Padding, Window, check_pool_window, make_window

Array = np.ndarray

# ---- one grey image and one kernel ---------------------------------------------------------------

VERTICAL_EDGES = np.array([[1., 0., -1.], [1., 0., -1.], [1., 0., -1.]])
HORIZONTAL_EDGES = VERTICAL_EDGES.T


def convolve(f: Array, h: Array) -> Array:
    """G[m, n] = (f * h)[m, n] = sum_j sum_k h[j, k] f[m + j, n + k], for an image f, a kernel h.

    The article's formula has f[m - j, n - k], which reads the kernel backwards. Neural networks
    lay the kernel on the image as it stands (elsewhere that is called a cross-correlation); with
    rot180(h) for h the one becomes the other. "Valid": h never leaves the image.
    """
    g = np.zeros((output_size(f.shape[0], h.shape[0]), output_size(f.shape[1], h.shape[1])))
    for m, n in np.ndindex(*g.shape):
        for j, k in np.ndindex(*h.shape):
            g[m, n] += h[j, k] * f[m + j, n + k]
    return g


def rot180(w: Array) -> Array:
    """The kernel (or filters, (kh, kw, ...)) turned by 180 degrees: last row first, and so on."""
    return w[::-1, ::-1]


def same_padding(f: int) -> int:
    """p = (f - 1) / 2: with it, a convolution of stride 1 keeps the size of the image."""
    if f % 2 == 0:
        raise ValueError(f"same_padding: a kernel of even size {f} has no middle pixel; "
                         "padding='same' puts the odd pixel at the bottom and right")
    return (f - 1) // 2


def output_size(n: int, f: int, p: int = 0, s: int = 1) -> int:
    """n_out = floor((n + 2p - f) / s) + 1."""
    return math.floor((n + 2 * p - f) / s) + 1


def times_used(n: int, f: int, p: int = 0, s: int = 1) -> Array:
    """How many positions of an f x f kernel use each pixel of an n x n image, (n, n).

    Without padding a corner counts once and the middle f * f times: what lies at the border of
    the image is nearly lost. This is what padding is for.
    """
    uses = np.zeros((n, n), int)
    out = output_size(n, f, p, s)
    for m, k in np.ndindex(out, out):
        for y in range(m * s - p, m * s - p + f):
            for x in range(k * s - p, k * s - p + f):
                if 0 <= y < n and 0 <= x < n:
                    uses[y, x] += 1
    return uses


# ---- volumes: [n, n, c] * [f, f, c] x n_f -> [n', n', n_f] ---------------------------------------

def conv2d(x: Any, w: Any, b: Any = None, *, stride: IntOrPair = 1, padding: Padding = 0,
           dilation: IntOrPair = 1, groups: int = 1, activation: str | None = None) -> Array:
    """Z = W * A + b, and g(Z) with activation="relu" and its like: a layer's forward pass.

    x: (n, h, w, c_in); w: (kh, kw, c_in / groups, c_out); b: (c_out,) or None.
    Returns (n, oh, ow, c_out). In groups, each filter sees one of `groups` slices of the channels.
    """
    a, w = _float64(x), _float64(w)
    kh, kw, depth, c_out = w.shape
    window = make_window("conv2d", (kh, kw), stride, padding, dilation, a.shape[1:3])
    padded = zero_pad(a, window)
    z = np.zeros((len(a), *window.out_size(*a.shape[1:3]), c_out))
    for i, m, k, o in np.ndindex(*z.shape):
        first = o // (c_out // groups) * depth           # where this filter's channels begin
        patch = padded[i, _under(m, window.sh, kh, window.dh),
                       _under(k, window.sw, kw, window.dw), first:first + depth]
        z[i, m, k, o] = np.vdot(patch, w[..., o]) + (0 if b is None else b[o])
    return z if activation is None else ACTIVATIONS[activation][0](z)


def conv2d_backward(dy: Any, x: Any, w: Any, *, stride: IntOrPair = 1, padding: Padding = 0,
                    dilation: IntOrPair = 1, groups: int = 1) -> tuple[Array, Array, Array]:
    """(dA, dW, db) of Z = W * A + b, given dZ as dy, (n, oh, ow, c_out).

    db = sum dZ, dW = A (conv) dZ, dA = dZ (full conv) rot180(W).
    """
    a, w, dz = _float64(x), _float64(w), _float64(dy)
    window = make_window("conv2d_backward", w.shape[:2], stride, padding, dilation, a.shape[1:3])
    db = np.array([np.sum(dz[..., o]) for o in range(w.shape[3])])
    return (_input_gradient(dz, a.shape, w, window, groups),
            _filter_gradient(dz, a, w.shape, window, groups), db)


def _filter_gradient(dz: Array, a: Array, w_shape: tuple[int, ...], window: Window,
                     groups: int) -> Array:
    """dW = A (conv) dZ: dZ slides over A as if it were the filter, and each stop gives one weight.

    Neighbours in dZ come from pixels `stride` apart, neighbours in W from pixels `dilation`
    apart, so here stride and dilation change places.
    """
    padded, (_, oh, ow, c_out) = zero_pad(a, window), dz.shape
    dw = np.zeros(w_shape)
    for ky, kx, c, o in np.ndindex(*w_shape):
        first = o // (c_out // groups) * w_shape[2]
        patch = padded[:, _under(ky, window.dh, oh, window.sh),
                       _under(kx, window.dw, ow, window.sw), first + c]
        dw[ky, kx, c, o] = np.vdot(patch, dz[..., o])
    return dw


def _input_gradient(dz: Array, a_shape: tuple[int, ...], w: Array, window: Window,
                    groups: int) -> Array:
    """dA = dZ (full conv) rot180(W), as the sum dA += sum_m sum_n W dZ[m, n]: conv2d mirrored.

    What the filter took from a patch at [m, n] goes back there. `full_convolution` gives the same,
    but the zeros that it needs around dZ and inside would turn a weight of NaN into more NaN.
    """
    n, h, width, c_in = a_shape
    kh, kw, depth, c_out = w.shape
    padded = np.zeros((n, h + window.top + window.bottom, width + window.left + window.right, c_in))
    for i, m, k, o in np.ndindex(*dz.shape):
        first = o // (c_out // groups) * depth
        padded[i, _under(m, window.sh, kh, window.dh), _under(k, window.sw, kw, window.dw),
               first:first + depth] += w[..., o] * dz[i, m, k, o]
    return padded[:, window.top:window.top + h, window.left:window.left + width]


def full_convolution(dz: Any, w: Any, *, stride: int = 1) -> Array:
    """dZ (full conv) rot180(W): convolve so far out that one corner pixel still overlaps.

    dz: (n, oh, ow, n_f); w: (f, f, c, n_f). Returns dA of all pixels that a filter saw, padding
    included: (n, (oh - 1) stride + f, (ow - 1) stride + f, c). A stride left pixels out, so zeros
    stand in their places between the elements of dZ. The filters become (f, f, n_f, c): what was
    an input channel is now a filter.
    """
    dz, w = _float64(dz), _float64(w)
    n, oh, ow, c_out = dz.shape
    between = np.zeros((n, (oh - 1) * stride + 1, (ow - 1) * stride + 1, c_out))
    between[:, ::stride, ::stride] = dz
    return conv2d(between, rot180(w).swapaxes(2, 3), padding=(w.shape[0] - 1, w.shape[1] - 1))


def zero_pad(a: Array, window: Window) -> Array:
    """The images (n, h, w, c) with the window's padding of zeros around them."""
    n, h, w, c = a.shape
    padded = np.zeros((n, h + window.top + window.bottom, w + window.left + window.right, c))
    padded[:, window.top:window.top + h, window.left:window.left + w] = a
    return padded


def _under(position: int, stride: int, taps: int, dilation: int) -> slice:
    """The pixels of one axis that lie under the taps of a window at the given position."""
    start = position * stride
    return slice(start, start + (taps - 1) * dilation + 1, dilation)


# ---- the layer: Z = W * A + b, A = g(Z) ----------------------------------------------------------

def _sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


# name: (g, g')
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: np.where(z <= 0, 0., 1.)),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda z: np.where(z > 0, 1., 0.01)),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * (1 - _sigmoid(z))),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
}


def layer_forward(a: Any, w: Any, b: Any, activation: str, **geometry: Any) -> tuple[Array, Array]:
    """Z = W * A + b and g(Z), which is the next layer's A. geometry: stride=, padding=, ..."""
    z = conv2d(a, w, b, **geometry)
    return z, ACTIVATIONS[activation][0](z)


def layer_backward(da: Any, z: Any, a: Any, w: Any, activation: str,
                   **geometry: Any) -> tuple[Array, Array, Array]:
    """dZ = dA g'(Z), and with it the gradients (dA of the layer's input a, dW, db)."""
    dz = _float64(da) * ACTIVATIONS[activation][1](_float64(z))
    return conv2d_backward(dz, a, w, **geometry)


def gelu(x: Any) -> Array:
    """x P(x), P(x) = erfc(-x / sqrt(2)) / 2 (Hendrycks and Gimpel 2016)."""
    return _elementwise(lambda v: v * math.erfc(-v / math.sqrt(2)) / 2, x)


def gelu_backward(dy: Any, x: Any) -> Array:
    """dy (P(x) + x p(x)), p(x) = exp(-x^2 / 2) / sqrt(2 pi)."""
    return _float64(dy) * _elementwise(lambda v: math.erfc(-v / math.sqrt(2)) / 2 + v * math.exp(
        -v * v / 2) / math.sqrt(2 * math.pi), x)


# ---- pooling -------------------------------------------------------------------------------------

def max_pool2d(x: Any, size: IntOrPair, *, stride: IntOrPair | None = None, padding: Padding = 0,
               dilation: IntOrPair = 1) -> tuple[Array, Array]:
    """The largest value under each window, and the mask: the place ky * kw + kx where it stood.

    Padding counts as minus infinity. The first maximum in row-major order wins a tie, and the
    first NaN beats every number. Returns y and the mask (integers), both (n, oh, ow, c).
    """
    x, window = _pool_arguments(x, size, stride, padding, dilation)
    y = np.zeros((len(x), *window.out_size(*x.shape[1:3]), x.shape[3]))
    mask = np.zeros(y.shape, int)
    for i, m, k, c in np.ndindex(*y.shape):
        best, best_place = None, 0
        for place, iy, ix in _pixels_under(window, m, k, x.shape):
            value = x[i, iy, ix, c]
            if best is None or value > best or (np.isnan(value) and not np.isnan(best)):
                best, best_place = value, place
        y[i, m, k, c], mask[i, m, k, c] = best, best_place
    return y, mask


def max_pool2d_backward(dy: Any, mask: Any, x_shape: tuple[int, ...], size: IntOrPair, *,
                        stride: IntOrPair | None = None, padding: Padding = 0,
                        dilation: IntOrPair = 1) -> Array:
    """Each element of dy goes to the pixel that was its window's maximum; the others get nothing.

    Where windows overlap, a pixel adds up what it gets. Returns dx, x_shape.
    """
    dx, window = _pool_arguments(np.zeros(x_shape), size, stride, padding, dilation)
    dy = _float64(dy)
    for i, m, k, c in np.ndindex(*dy.shape):
        for place, iy, ix in _pixels_under(window, m, k, x_shape):
            if place == mask[i, m, k, c]:
                dx[i, iy, ix, c] += dy[i, m, k, c]
    return dx


def avg_pool2d(x: Any, size: IntOrPair, *, stride: IntOrPair | None = None,
               padding: Padding = 0) -> Array:
    """The mean of the pixels under each window, (n, oh, ow, c). Padding is not counted."""
    x, window = _pool_arguments(x, size, stride, padding, 1)
    y = np.zeros((len(x), *window.out_size(*x.shape[1:3]), x.shape[3]))
    for i, m, k, c in np.ndindex(*y.shape):
        pixels = [x[i, iy, ix, c] for _, iy, ix in _pixels_under(window, m, k, x.shape)]
        y[i, m, k, c] = sum(pixels) / len(pixels)
    return y


def avg_pool2d_backward(dy: Any, x_shape: tuple[int, ...], size: IntOrPair, *,
                        stride: IntOrPair | None = None, padding: Padding = 0) -> Array:
    """Each element of dy is shared out equally among the pixels under its window."""
    dx, window = _pool_arguments(np.zeros(x_shape), size, stride, padding, 1)
    dy = _float64(dy)
    for i, m, k, c in np.ndindex(*dy.shape):
        pixels = list(_pixels_under(window, m, k, x_shape))
        for _, iy, ix in pixels:
            dx[i, iy, ix, c] += dy[i, m, k, c] / len(pixels)
    return dx


def _pool_arguments(x: Any, size: IntOrPair, stride: IntOrPair | None, padding: Padding,
                    dilation: IntOrPair) -> tuple[Array, Window]:
    x = _float64(x)
    window = make_window("pool", size, size if stride is None else stride, padding, dilation,
                         x.shape[1:3])
    check_pool_window("pool", window, *x.shape[1:3])
    return x, window


def _pixels_under(window: Window, m: int, k: int,
                  x_shape: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(place in the window, row, column) of each pixel under the window of output [m, k]."""
    for place, (ky, kx) in enumerate(np.ndindex(window.kh, window.kw)):
        iy = m * window.sh - window.top + ky * window.dh
        ix = k * window.sw - window.left + kx * window.dw
        if 0 <= iy < x_shape[1] and 0 <= ix < x_shape[2]:
            yield place, iy, ix


# ---- dense layers, loss, gradient descent --------------------------------------------------------

def dense(x: Any, w: Any, b: Any) -> Array:
    """Z = A W + b: every output is connected with every input. (n, in) with (in, out) -> (n, out).

    A convolution of the same shapes has sparse connections, f * f * c an output, and all its
    outputs share one filter's weights: f * f * c * n_f weights in place of in * out.
    """
    x, w = _float64(x), _float64(w)
    z = np.zeros((len(x), w.shape[1]))
    for i, o in np.ndindex(*z.shape):
        z[i, o] = np.vdot(x[i], w[:, o]) + b[o]
    return z


def dense_backward(dy: Any, x: Any, w: Any) -> tuple[Array, Array, Array]:
    """(dA, dW, db) of Z = A W + b, given dZ as dy: dA = dZ W^T, dW = A^T dZ, db = sum dZ."""
    x, w, dz = _float64(x), _float64(w), _float64(dy)
    return (dense(dz, w.T, np.zeros(len(w))), dense(x.T, dz, np.zeros(w.shape[1])),
            np.array([np.sum(dz[:, o]) for o in range(w.shape[1])]))


def batch_norm(x: Any, gamma: Any, beta: Any, *, epsilon: float = 1e-5, residual: Any = None,
               activation: str | None = None) -> tuple[Array, Array, Array]:
    """(A, mean, var) of a batch x (..., c): z = gamma x_hat + beta + residual, A = g(z).

    x_hat = (x - mean) / sqrt(var + epsilon), with the mean and the (biased) variance of each
    channel over all the rest: Ioffe and Szegedy 2015, algorithm 1.
    """
    rows = _rows(x)
    mean, var, z = np.zeros(rows.shape[1]), np.zeros(rows.shape[1]), np.zeros(rows.shape)
    for c in range(rows.shape[1]):
        mean[c] = np.sum(rows[:, c]) / len(rows)
        var[c] = np.sum((rows[:, c] - mean[c]) ** 2) / len(rows)
        for i in range(len(rows)):
            z[i, c] = gamma[c] * (rows[i, c] - mean[c]) / math.sqrt(var[c] + epsilon) + beta[c]
    z = z.reshape(np.shape(x)) + (0 if residual is None else _float64(residual))
    return ACTIVATIONS[activation][0](z) if activation else z, mean, var


def batch_norm_backward(dy: Any, x: Any, gamma: Any, *, epsilon: float = 1e-5
                        ) -> tuple[Array, Array, Array]:
    """(dx, dgamma, dbeta) of a batch_norm without activation, step by step as in the paper.

    Ioffe and Szegedy 2015, section 3, by the chain rule: x acts through x_hat, mean and var.
    """
    rows, dz = _rows(x), _rows(dy)
    m, channels = rows.shape
    dx, dgamma, dbeta = np.zeros(rows.shape), np.zeros(channels), np.zeros(channels)
    for c in range(channels):
        centred = rows[:, c] - np.sum(rows[:, c]) / m
        std = math.sqrt(np.sum(centred ** 2) / m + epsilon)
        dgamma[c], dbeta[c] = np.sum(dz[:, c] * centred / std), np.sum(dz[:, c])
        dx_hat = dz[:, c] * gamma[c]
        dvar = np.sum(dx_hat * centred) * -0.5 / std ** 3
        dmean = np.sum(-dx_hat / std) + dvar * np.sum(-2 * centred) / m
        for i in range(m):
            dx[i, c] = dx_hat[i] / std + dvar * 2 * centred[i] / m + dmean / m
    return dx.reshape(np.shape(x)), dgamma, dbeta


def softmax_cross_entropy(logits: Any, labels: Any, *,
                          label_smoothing: float = 0.0) -> tuple[float, Array]:
    """The mean over n images of -sum_k q_k log p_k, and its gradient (p - q) / n.

    p = softmax(logits), (n, classes). q is 1 at the label; with smoothing s, q is
    (1 - s) at the label plus s / classes everywhere.
    """
    logits = _float64(logits)
    n, classes = logits.shape
    loss, dlogits = 0.0, np.zeros(logits.shape)
    for i in range(n):
        q = np.full(classes, label_smoothing / classes)
        q[labels[i]] += 1 - label_smoothing
        shifted = logits[i] - np.max(logits[i])          # the same softmax, and no exp overflows
        log_p = shifted - np.log(np.sum(np.exp(shifted)))
        loss -= np.sum(q * log_p) / n
        dlogits[i] = (np.exp(log_p) - q) / n
    return loss, dlogits


def gradient_descent(w: Any, dw: Any, learning_rate: float) -> Array:
    """W := W - alpha dW."""
    return _float64(w) - learning_rate * _float64(dw)


def hits(logits: Any, labels: Any) -> int:
    """How many labels are the first maximum of their row; a row with a NaN has no maximum."""
    return sum(not any(np.isnan(z)) and list(z).index(max(z)) == label
               for z, label in zip(_float64(logits), labels))


# ---- other optimisers, one step each: parameters w, gradients dw, averages in and out ------------

def momentum(w: Any, dw: Any, v: Any, learning_rate: float, mu: float, nesterov: bool = False
             ) -> tuple[Array, Array]:
    """(w, v). Polyak 1964; Nesterov's look-ahead as in Sutskever et al. 2013, in torch's form."""
    v = mu * _float64(v) + _float64(dw)
    return gradient_descent(w, dw + mu * v if nesterov else v, learning_rate), v


def rms_prop(w: Any, dw: Any, s: Any, learning_rate: float, rho: float, epsilon: float
             ) -> tuple[Array, Array]:
    """(w, s). Tieleman and Hinton 2012, lecture 6.5."""
    s = rho * _float64(s) + (1 - rho) * _float64(dw) ** 2
    return gradient_descent(w, dw / (np.sqrt(s) + epsilon), learning_rate), s


def adam(w: Any, dw: Any, m: Any, s: Any, t: int, learning_rate: float, beta1: float, beta2: float,
         epsilon: float) -> tuple[Array, Array, Array]:
    """(w, m, s) of step t, counted from 1. Kingma and Ba 2015, algorithm 1.

    AdamW (Loshchilov and Hutter 2019) is this with w * (1 - learning_rate * weight_decay) for w.
    """
    m = beta1 * _float64(m) + (1 - beta1) * _float64(dw)
    s = beta2 * _float64(s) + (1 - beta2) * _float64(dw) ** 2
    m_hat, s_hat = m / (1 - beta1**t), s / (1 - beta2**t)
    return gradient_descent(w, m_hat / (np.sqrt(s_hat) + epsilon), learning_rate), m, s


def clip(dw: Any, limit: float) -> tuple[Array, float]:
    """dw, made shorter where its norm is over the limit, and the norm. Pascanu et al. 2013."""
    norm = math.sqrt(math.fsum(g * g for g in _float64(dw)))
    return _float64(dw) * (limit / norm if norm > limit else 1), norm


def loss_scale(scale: float, good: int, finite: bool, interval: int) -> tuple[float, int]:
    """The scale and the good steps in a row after a step. Micikevicius et al. 2018."""
    if not finite:
        return max(scale / 2, 2.0**-126), 0
    return (scale * 2, 0) if good + 1 == interval else (scale, good + 1)


# ---- convolution as one matrix product -----------------------------------------------------------

def im2col(x: Any, size: IntOrPair, *, stride: IntOrPair = 1, padding: Padding = 0,
           dilation: IntOrPair = 1) -> Array:
    """The patch under each window as a row: (n * oh * ow, kh * kw * c), taps row-major."""
    a = _float64(x)
    window = make_window("im2col", size, stride, padding, dilation, a.shape[1:3])
    padded, (oh, ow) = zero_pad(a, window), window.out_size(*a.shape[1:3])
    cols = np.zeros((len(a) * oh * ow, window.places * a.shape[3]))
    for row, (i, m, k) in enumerate(np.ndindex(len(a), oh, ow)):
        cols[row] = padded[i, _under(m, window.sh, window.kh, window.dh),
                           _under(k, window.sw, window.kw, window.dw)].reshape(-1)
    return cols


def col2im(cols: Any, x_shape: tuple[int, ...], size: IntOrPair, *, stride: IntOrPair = 1,
           padding: Padding = 0, dilation: IntOrPair = 1) -> Array:
    """The adjoint of im2col: each entry is added to the pixel that im2col copied it from."""
    cols = _float64(cols)
    n, h, w, c = x_shape
    window = make_window("col2im", size, stride, padding, dilation, (h, w))
    x = np.zeros(x_shape)
    for row, (i, m, k) in enumerate(np.ndindex(n, *window.out_size(h, w))):
        patch = cols[row].reshape(window.places, c)
        for place, iy, ix in _pixels_under(window, m, k, x_shape):
            x[i, iy, ix] += patch[place]
    return x


def _elementwise(g: Callable[[float], float], x: Any) -> Array:
    x = _float64(x)
    return np.array([g(float(v)) for v in x.reshape(-1)]).reshape(x.shape)


def _rows(a: Any) -> Array:
    """(..., c) -> (rows, c)."""
    return _float64(a).reshape(-1, np.shape(a)[-1])


def _float64(a: Any) -> Array:
    return np.asarray(a, np.float64)
