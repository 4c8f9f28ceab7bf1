"""Convolution, pooling, batch norm and the rest as plain functions on NumPy or CuPy arrays.

Each checks what it is given, takes the backend that the arrays belong to, and calls it. Images
are NHWC, (n, h, w, c); filters HWIO, (kh, kw, c_in / groups, c_out). `size`, `stride` and
`dilation` are an int or a (vertical, horizontal) pair. `padding` is "valid", "same"
(out = ceil(n / stride), the odd pixel at the bottom and right; for stride 1 and odd filters the
article's p = (f - 1) / 2), an int, (ph, pw), or ((top, bottom), (left, right)).

Arrays may be float16, bfloat16 (of ml_dtypes), float32 or float64, and any view: transposed,
sliced, with negative strides, read-only or broadcast. They are never written. Those of 16 bits are
computed in float32 and returned in theirs. Lists and arrays of other libraries that offer DLPack
are taken as NumPy's.

Raises TypeError for dtypes and types, ValueError for shapes and values; the message names the
function, the value, and what is accepted.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np

from gpucnn import activations
from gpucnn.backend import Array, Backend, backend_of
from gpucnn.geometry import (
    IntOrPair,
    Padding,
    Window,
    check_groups,
    check_pool_window,
    make_window,
)

FLOATS = ("float16", "bfloat16", "float32", "float64")


def conv2d(x: Array, w: Array, b: Array | None = None, *, stride: IntOrPair = 1,
           padding: Padding = 0, dilation: IntOrPair = 1, groups: int = 1,
           activation: str | None = None, residual: Array | None = None) -> Array:
    """The article's convolution layer: Z = W * A + b + residual, then g(Z).

    x (n, h, w, c_in), w (kh, kw, c_in / groups, c_out), b (c_out,) or None -> (n, oh, ow, c_out)
    with oh = floor((h + top + bottom - ((kh - 1) dilation + 1)) / stride) + 1 and ow alike. As
    everywhere in neural nets the filter is not flipped (a cross-correlation).

    activation: None, "relu", "leaky_relu" (slope 0.01), "sigmoid" or "tanh".
    residual: None, or what a skip connection adds, (n, oh, ow, c_out) (He et al. 2016).
    """
    where = "conv2d"
    backend, dtype, (x, w, b, residual) = _receive(where, x=x, w=w, b=b, residual=residual)
    activations.check_name(where, activation)
    window = _conv_window(where, x, w, stride, padding, dilation, groups)
    if b is not None and b.shape != w.shape[3:]:
        raise ValueError(f"{where}: b has shape {b.shape}, w has {w.shape[3]} filters; "
                         f"b must be {w.shape[3:]}")
    if residual is not None:
        _check_shape(where, "residual", residual,
                     (len(x), *window.out_size(*x.shape[1:3]), w.shape[3]))
    return _as(dtype, backend.conv2d(x, w, b, window, groups, activation, residual))


def conv2d_backward(dy: Array, x: Array, w: Array, *, stride: IntOrPair = 1, padding: Padding = 0,
                    dilation: IntOrPair = 1, groups: int = 1) -> tuple[Array, Array, Array]:
    """The gradients of a conv2d without activation: dy (n, oh, ow, c_out) -> (dx, dw, db).

    The article's db = sum dZ, dW = A conv dZ, and dA = the full convolution of dZ with the
    filters rotated by 180 degrees. With an activation, dy must be dZ = dA g'(Z).
    """
    where = "conv2d_backward"
    backend, dtype, (dy, x, w) = _receive(where, dy=dy, x=x, w=w)
    window = _conv_window(where, x, w, stride, padding, dilation, groups)
    _check_shape(where, "dy", dy, (len(x), *window.out_size(*x.shape[1:3]), w.shape[3]))
    dw, db = backend.empty(w.shape, w.dtype), backend.empty(w.shape[3:], w.dtype)
    dx = backend.conv2d_backward(dy, dy, x, w, window, groups, None, dw, db)
    return _as(dtype, dx), _as(dtype, dw), _as(dtype, db)


def im2col(x: Array, size: IntOrPair, *, stride: IntOrPair = 1, padding: Padding = 0,
           dilation: IntOrPair = 1) -> Array:
    """The windows of x (n, h, w, c) as rows: (n * oh * ow, kh * kw * c). Padding counts as 0."""
    backend, dtype, (x,) = _receive("im2col", x=x)
    window = _window("im2col", x.shape, size, stride, padding, dilation)
    return _as(dtype, backend.im2col(x, window))


def col2im(cols: Array, x_shape: tuple[int, ...], size: IntOrPair, *, stride: IntOrPair = 1,
           padding: Padding = 0, dilation: IntOrPair = 1) -> Array:
    """The adjoint of im2col: cols (n * oh * ow, kh * kw * c), summed where windows overlap."""
    backend, dtype, (cols,) = _receive("col2im", cols=cols)
    window = _window("col2im", x_shape, size, stride, padding, dilation)
    rows = x_shape[0] * math.prod(window.out_size(*x_shape[1:3]))
    _check_shape("col2im", "cols", cols, (rows, window.places * x_shape[3]))
    return _as(dtype, backend.col2im(cols, tuple(x_shape), window))


def max_pool2d(x: Array, size: IntOrPair, *, stride: IntOrPair | None = None,
               padding: Padding = 0, dilation: IntOrPair = 1) -> tuple[Array, Array]:
    """The maximum of each window: x (n, h, w, c) -> y and its mask, both (n, oh, ow, c).

    stride: None for the window's size. Padding counts as minus infinity. mask holds the place
    ky * kw + kx of the maximum in its window, the first in row-major order where several are
    equal; one byte where a window has at most 255 places, else int32. NaN in gives NaN out. 0.0
    and -0.0 are equal, and y may be either where both are about.
    """
    where = "max_pool2d"
    backend, dtype, (x,) = _receive(where, x=x)
    window = _pool_window(where, x.shape, size, stride, padding, dilation)
    y, mask = backend.max_pool(x, window)
    return _as(dtype, y), mask


def max_pool2d_backward(dy: Array, mask: Array, x_shape: tuple[int, ...], size: IntOrPair, *,
                        stride: IntOrPair | None = None, padding: Padding = 0,
                        dilation: IntOrPair = 1) -> Array:
    """dy and mask (n, oh, ow, c) -> dx of x_shape: each dy goes to the place in its mask."""
    where = "max_pool2d_backward"
    backend, dtype, (dy,) = _receive(where, dy=dy)
    window = _pool_window(where, x_shape, size, stride, padding, dilation)
    _check_shape(where, "dy", dy, (x_shape[0], *window.out_size(*x_shape[1:3]), x_shape[3]))
    if backend_of(mask) is not backend or getattr(mask, "dtype", None) != window.mask_dtype:
        raise TypeError(f"{where}: mask is {type(mask).__module__} {getattr(mask, 'dtype', None)}; "
                        f"pass the {np.dtype(window.mask_dtype)} mask that max_pool2d returned")
    _check_shape(where, "mask", mask, dy.shape)
    return _as(dtype, backend.max_pool_backward(
        dy, backend.asarray(mask), tuple(x_shape), window))


def avg_pool2d(x: Array, size: IntOrPair, *, stride: IntOrPair | None = None,
               padding: Padding = 0) -> Array:
    """The mean of each window: x (n, h, w, c) -> (n, oh, ow, c). Padding is not counted.

    stride: None for the window's size.
    """
    backend, dtype, (x,) = _receive("avg_pool2d", x=x)
    window = _pool_window("avg_pool2d", x.shape, size, stride, padding, 1)
    return _as(dtype, backend.avg_pool(x, window))


def avg_pool2d_backward(dy: Array, x_shape: tuple[int, ...], size: IntOrPair, *,
                        stride: IntOrPair | None = None, padding: Padding = 0) -> Array:
    """dy (n, oh, ow, c) -> dx of x_shape: each dy is shared out evenly over its window."""
    where = "avg_pool2d_backward"
    backend, dtype, (dy,) = _receive(where, dy=dy)
    window = _pool_window(where, x_shape, size, stride, padding, 1)
    _check_shape(where, "dy", dy, (x_shape[0], *window.out_size(*x_shape[1:3]), x_shape[3]))
    return _as(dtype, backend.avg_pool_backward(dy, tuple(x_shape), window))


def gelu(x: Array) -> Array:
    """x P(x) of each element, P being the normal distribution (Hendrycks and Gimpel 2016)."""
    backend, dtype, (x,) = _receive("gelu", x=x)
    return _as(dtype, backend.gelu(x))


def gelu_backward(dy: Array, x: Array) -> Array:
    """dy of the shape of x -> dx = dy (P(x) + x p(x)), p being the density of P."""
    backend, dtype, (dy, x) = _receive("gelu_backward", dy=dy, x=x)
    _check_shape("gelu_backward", "dy", dy, x.shape)
    return _as(dtype, backend.gelu_backward(dy, x))


def batch_norm_statistics(x: Array) -> tuple[Array, Array]:
    """The mean and the variance (c,) of x (..., c) over all other axes, of 2 values at least.

    The variance is that of the values themselves, divided by their number: for batch_norm.

    Raises ValueError for fewer values.
    """
    where = "batch_norm_statistics"
    backend, dtype, (x,) = _receive(where, x=x)
    c = x.shape[-1] if x.ndim else 0
    if x.size < 2 * c or not c:
        raise ValueError(f"{where}: needs more than 1 value per channel (last axis), got {x.shape}")
    unused = backend.xp.zeros((2, c), x.dtype)
    mean, var = backend.batch_norm_statistics(x, unused[0], unused[1], 1.0)
    return _as(dtype, mean), _as(dtype, var)


def batch_norm(x: Array, mean: Array, var: Array, gamma: Array, beta: Array, *,
               epsilon: float = 1e-5, residual: Array | None = None,
               activation: str | None = None) -> Array:
    """g(gamma (x - mean) / sqrt(var + epsilon) + beta + residual) (Ioffe and Szegedy 2015).

    x and residual (..., c), the others (c,). mean and var: batch_norm_statistics(x) in training,
    their running averages otherwise. activation: None or "relu".
    """
    where = "batch_norm"
    check_epsilon(where, epsilon)
    activations.check_name(where, activation, activations.FUSED_WITH_NORM)
    backend, dtype, (x, mean, var, gamma, beta, residual) = _receive(
        where, x=x, mean=mean, var=var, gamma=gamma, beta=beta, residual=residual)
    _check_channels(where, x, mean=mean, var=var, gamma=gamma, beta=beta)
    if residual is not None:
        _check_shape(where, "residual", residual, x.shape)
    return _as(dtype, backend.batch_norm(x, mean, var, gamma, beta, epsilon, residual, activation))


def batch_norm_backward(dy: Array, x: Array, mean: Array, var: Array, gamma: Array, *,
                        epsilon: float = 1e-5) -> tuple[Array, Array, Array]:
    """The gradients of a batch_norm with the statistics of x itself: (dx, dgamma, dbeta).

    dy (..., c) as x; with an activation it must be dZ = dA g'(Z), which is the residual's gradient
    as well.
    """
    where = "batch_norm_backward"
    check_epsilon(where, epsilon)
    backend, dtype, (dy, x, mean, var, gamma) = _receive(where, dy=dy, x=x, mean=mean, var=var,
                                                         gamma=gamma)
    _check_channels(where, x, mean=mean, var=var, gamma=gamma)
    _check_shape(where, "dy", dy, x.shape)
    dgamma, dbeta = (backend.empty(gamma.shape, gamma.dtype) for _ in range(2))
    beta = gamma  # which takes no part without an activation
    dx, _ = backend.batch_norm_backward(dy, x, None, mean, var, gamma, beta, epsilon, None, dgamma,
                                        dbeta, False)
    return _as(dtype, dx), _as(dtype, dgamma), _as(dtype, dbeta)


def softmax_cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0
                          ) -> tuple[Array, Array]:
    """The mean of -sum_k q_k log softmax(logits)_k over the batch, and its gradient.

    logits (n, classes); labels (n,) integers from 0 to classes - 1. q is 1 at the label, or with
    label smoothing s (Szegedy et al. 2016) 1 - s + s / classes there and s / classes elsewhere.

    Returns (loss, dlogits): a scalar of the backend, not yet copied from the GPU, and
    (softmax(logits) - q) / n. Infinite logits give nan.
    """
    loss, dlogits, _ = cross_entropy_and_hits(logits, labels, label_smoothing=label_smoothing)
    return _as(dlogits.dtype, loss), dlogits


def cross_entropy_and_hits(logits: Array, labels: Array, *, label_smoothing: float = 0.0,
                           loss_scale: Array | None = None) -> tuple[Array, Array, Array]:
    """softmax_cross_entropy, and how many labels are the first maximum of their row.

    A row that holds a NaN counts as wrong. The number is a scalar of the backend, as the loss,
    which is float32 here also where the logits, and their gradient, have 16 bits.

    loss_scale: None, or doubles of the backend, with the first of which dlogits are multiplied.
    """
    where = "softmax_cross_entropy"
    backend, _, (logits,) = _receive(where, keep_short=True, logits=logits)
    if logits.ndim != 2:
        raise ValueError(f"{where}: logits must be (n, classes), got {logits.shape}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{where}: label_smoothing must be >= 0 and < 1, got {label_smoothing}")
    n, classes = logits.shape
    if n == 0:
        raise ValueError("loss of an empty batch is undefined (0 samples)")
    labels = check_labels(backend, labels, n, classes)
    return backend.softmax_cross_entropy(logits, labels, label_smoothing, loss_scale)


def check_labels(backend: Backend, labels: Array, n: int, classes: int) -> Array:
    """labels as an integer array (n,) of the backend, each from 0 to classes - 1.

    Those of the host are checked there and moved; those of the GPU are checked on it, for which it
    is waited. While a CUDA graph is captured nothing can wait: the kernel makes the loss NaN then
    for a label out of range.

    Raises TypeError for floats, bools, one-hot rows, masked arrays and labels on a GPU beside
    logits that are not, ValueError for a wrong number or a label out of range.
    """
    if not hasattr(labels, "dtype") and not isinstance(labels, (list, tuple)):
        raise TypeError(f"labels must be integers of shape (N,), got {labels!r}")
    labels = _plain_array("softmax_cross_entropy: labels", labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise TypeError(f"labels must be integers of shape (N,), got {labels.dtype} {labels.shape}"
                        "; for one-hot use labels.argmax(1)")
    if len(labels) != n:
        raise ValueError(f"{n} images but {len(labels)} labels")
    if backend.name == "numpy" and backend_of(labels) is not backend:
        raise TypeError(f"softmax_cross_entropy: logits is a numpy array, labels a "
                        f"{backend_of(labels).name} array; move one of them")
    if backend_of(labels).name == "cupy" and backend.capturing():
        return labels
    wrong = (labels < 0) | (labels >= classes)
    if wrong.any():
        position = int(wrong.argmax())
        raise ValueError(f"label {int(labels[position])} at position {position} is out of range "
                         f"for {classes} classes (0..{classes - 1})")
    return backend.asarray(labels)


def as_array(where: str, name: str, value: Any) -> Array:
    """value as an array of NumPy or CuPy with a float dtype; lists and DLPack become NumPy's.

    Raises TypeError for what would be computed wrongly or not at all.
    """
    value = _plain_array(f"{where}: {name}", value)
    if value.dtype.kind in "iu":
        remedy = ("; scale to float first, e.g. x.astype('float32')/255"
                  if value.dtype == np.uint8 else "; cast it with x.astype('float32')")
        values = " (0..255)" if value.dtype == np.uint8 else ""
        raise TypeError(f"{where}: {name} is {value.dtype}{values}{remedy}")
    if value.dtype.name not in FLOATS:
        raise TypeError(f"{where}: dtype {value.dtype} of {name} is not supported; use float16, "
                        "float32 or float64")
    return value


def _plain_array(what: str, value: Any) -> Array:
    """value as an array of NumPy or CuPy of any dtype, without a mask."""
    for kind, called, remedy in (
            (np.ma.MaskedArray, "numpy.ma.MaskedArray", "fill the mask first with x.filled(0)"),
            (np.matrix, "numpy.matrix", "use numpy.asarray(x)")):
        if isinstance(value, kind):
            raise TypeError(f"{what} is {called}; {remedy}")
    if isinstance(value, np.ndarray) or backend_of(value).name == "cupy":
        return value
    if isinstance(value, (list, tuple, int, float, np.generic)):
        return np.asarray(value)
    if not hasattr(value, "__dlpack__"):
        raise TypeError(f"{what} is a {type(value).__name__}; use a NumPy or CuPy array")
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as e:
        raise TypeError(f"{what} is a {type(value).__module__}.{type(value).__name__} that NumPy "
                        f"cannot read ({' '.join(str(e).split())}); make a NumPy array of it, "
                        "for torch by x.detach().cpu().float().numpy()") from e


def _receive(where: str, keep_short: bool = False, **arrays: Any
             ) -> tuple[Backend, np.dtype, list[Any]]:
    """The backend of the arrays, their dtype, and them as the backend takes them.

    That is C-contiguous, of native byte order, and float32 in the place of 16-bit floats, unless
    those are to be kept. Only b and residual may be None.
    """
    values = {k: None if v is None and k in ("b", "residual") else as_array(where, k, v)
              for k, v in arrays.items()}
    given = {k: v for k, v in values.items() if v is not None}
    (first, model), *others = given.items()
    backend, dtype = backend_of(model), model.dtype.newbyteorder("=")
    for name, value in others:
        if backend_of(value) is not backend:
            raise TypeError(f"{where}: {first} is a {backend.name} array, {name} a "
                            f"{backend_of(value).name} array; move one of them")
        if value.dtype.newbyteorder("=") != dtype:
            raise TypeError(f"{where}: {first} is {dtype}, {name} is {value.dtype}; cast one of "
                            f"them, e.g. {name}.astype('{dtype}')")
    computed = np.dtype(np.float32) if dtype.itemsize == 2 and not keep_short else dtype
    return backend, dtype, [None if v is None else backend.asarray(v, computed)
                            for v in values.values()]


def _as(dtype: np.dtype, result: Array) -> Array:
    return result if result.dtype == dtype else result.astype(dtype)


def _window(where: str, x_shape: tuple[int, ...], size: IntOrPair, stride: IntOrPair,
            padding: Padding, dilation: IntOrPair) -> Window:
    if len(x_shape) != 4:
        hint = "; add a batch axis with x[None]" if len(x_shape) == 3 else ""
        raise ValueError(f"{where}: expected NHWC input with 4 dimensions, got {len(x_shape)}: "
                         f"{tuple(x_shape)}{hint}")
    return make_window(where, size, stride, padding, dilation, (x_shape[1], x_shape[2]))


def _pool_window(where: str, x_shape: tuple[int, ...], size: IntOrPair,
                 stride: IntOrPair | None, padding: Padding, dilation: IntOrPair) -> Window:
    window = _window(where, x_shape, size, size if stride is None else stride, padding, dilation)
    check_pool_window(where, window, *x_shape[1:3])
    return window


def _conv_window(where: str, x: Array, w: Array, stride: IntOrPair, padding: Padding,
                 dilation: IntOrPair, groups: int) -> Window:
    if w.ndim != 4:
        raise ValueError(f"{where}: w must be (kh, kw, c_in / groups, c_out), got {w.shape}")
    if 0 in w.shape:
        raise ValueError(f"{where}: w has shape {w.shape}; all sizes must be at least 1")
    window = _window(where, x.shape, w.shape[:2], stride, padding, dilation)
    check_groups(where, groups, x.shape[3], w.shape[3])
    check_channels(where, x.shape, w.shape[2], groups)
    return window


def check_channels(where: str, x_shape: tuple[int, ...], channels: int, groups: int = 1) -> None:
    """Raise ValueError if NHWC x_shape has not the `channels * groups` that the weights expect."""
    if x_shape[3] == channels * groups:
        return
    nchw = ("; the layout is NHWC, for NCHW data use x.transpose(0, 2, 3, 1)"
            if x_shape[1] == channels * groups else "; the layout is NHWC")
    raise ValueError(f"{where}: input has {x_shape[3]} channels (last axis of {tuple(x_shape)}), "
                     f"weights expect {channels * groups}{nchw}")


def check_epsilon(where: str, epsilon: float) -> None:
    """Raise ValueError unless a variance may be divided by once epsilon is added to it."""
    if not 0 < epsilon < math.inf:
        raise ValueError(f"{where}: epsilon must be > 0 and finite, got {epsilon}")


def _check_channels(where: str, x: Array, **vectors: Array) -> None:
    """Raise ValueError unless each has a number for each channel of x, of which there is one."""
    if x.ndim < 1 or not x.shape[-1]:
        raise ValueError(f"{where}: x must be (..., c) with at least 1 channel, got {x.shape}")
    for name, vector in vectors.items():
        _check_shape(where, name, vector, x.shape[-1:])


def _check_shape(where: str, name: str, array: Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{where}: {name} has shape {array.shape}, expected {shape}")
