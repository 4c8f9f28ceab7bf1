"""The kernels bound by memory: share of a copy's bandwidth, each after a check against NumPy.

A kernel is one line of KERNELS. Its bytes are what it must read and write at least: each element
of its inputs and outputs once; an array that a kernel changes in place is both.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from gpucnn import update
from gpucnn.augmentation import Augmentation
from gpucnn.backend import Backend, make_backend
from gpucnn.geometry import Window, make_window
from scripts.gpu.context import Context
from scripts.gpu.measure import outputs_of, relative_error, run_twice, verdict
from scripts.gpu.report import Job, Row

BATCH = 256
SHAPES = ((28, 28, 32), (14, 14, 64))  # the article's feature maps
FEW = 4                                # images that are compared with NumPy
SLABS, SPLITS = 64, 4                  # of a weight gradient; of a convolution
# |difference| / |expected|; float16 rounds each result by up to 2^-11 of it.
TOLERANCES = {"float32": 1e-5, "float16": 2**-10}
AUGMENTATION = Augmentation(crop=2, flip=True)
BLENDING = Augmentation(crop=2, flip=True, rotate=15)
RATE, BETA1, BETA2, EPSILON = 1e-3, 0.9, 0.999, 1e-8


class Setting(NamedTuple):
    """n images of h x w pixels and c channels, stored in `dtype`."""

    n: int
    h: int
    w: int
    c: int
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.n, self.h, self.w, self.c

    @property
    def conv(self) -> Window:
        return make_window("gpu_check", 3, 1, "same", 1, (self.h, self.w))

    @property
    def pool(self) -> Window:
        return make_window("gpu_check", 2, 2, 0, 1, (self.h, self.w))


Draw = Callable[[Setting, np.random.Generator], np.ndarray]
Shape = Callable[[Setting], tuple[int, ...]]


def stored(shape: Shape) -> Draw:
    """Normal numbers of the setting's dtype, as kernels call scalar_t."""
    return lambda s, rng: rng.standard_normal(shape(s), np.float32).astype(s.dtype)


def floats(shape: Shape) -> Draw:
    """Normal numbers of float32, whatever the setting stores."""
    return lambda s, rng: rng.standard_normal(shape(s), np.float32)


def positive(shape: Shape) -> Draw:
    return lambda s, rng: rng.random(shape(s), np.float32) + np.float32(0.5)


def channels(s: Setting) -> tuple[int, ...]:
    return (s.c,)


def pooled(s: Setting) -> tuple[int, ...]:
    return s.n, s.h // 2, s.w // 2, s.c


def flat(s: Setting) -> tuple[int, ...]:
    return (s.n * s.h * s.w * s.c,)


INPUTS: dict[str, Draw] = {
    "x": stored(lambda s: s.shape),
    "dz": stored(lambda s: s.shape),
    "grey": stored(lambda s: (s.n, s.h, s.w, 1)),
    "pooled": stored(pooled),
    "mask": lambda s, rng: rng.integers(0, 4, pooled(s), np.uint8),
    "cols": stored(lambda s: (s.n * s.h * s.w, 9 * s.c)),
    "filters": stored(lambda s: (3, 3, 1, s.c)),
    "slabs": floats(lambda s: (SLABS, 9 * s.c * s.c)),
    "partial": floats(lambda s: (SPLITS, *s.shape)),
    "bias": floats(channels),
    "mean": floats(channels),
    "var": positive(channels),
    "logits": stored(lambda s: (s.n * s.h * s.w, s.c)),
    "labels": lambda s, rng: rng.integers(0, s.c, s.n * s.h * s.w),
    "theta": floats(flat),
    "gradient": floats(flat),
    "moment": floats(flat),
    "squares": positive(flat),
    "control": lambda s, rng: np.array([RATE, *np.zeros(update.NORM)]),
    "averaging": lambda s, rng: np.zeros(2),
    "bytes": lambda s, rng: rng.integers(0, 256, s.shape, np.uint8),
    "order": lambda s, rng: rng.permutation(s.n),
    "cursor": lambda s, rng: np.zeros(2, np.int64),
    "choices": lambda s, rng: BLENDING.choices(),
    "table": lambda s, rng: AUGMENTATION.table(s.c, s.dtype),
}


class MemoryKernel(NamedTuple):
    """run(setting, backend, *inputs) -> what is written, an array or several.

    expected: the same in NumPy, where the NumPy backend has no such method.
    half: whether it is measured with float16 in the place of float32 too.
    twice: the inputs that it must read in two passes, the first of which ends before the second.
    parts: whether the result are parts of a sum, and that sum alone is to be compared.
    """

    name: str
    file: str
    inputs: str
    run: Callable[..., Any]
    expected: Callable[..., Any] | None = None
    half: bool = False
    twice: str = ""
    parts: bool = False


def relu_bias_backward(s: Setting, b: Backend, da: Any, a: Any) -> Any:
    from gpucnn.backend import cuda_convolution
    db = b.empty((s.c,), np.float32)
    return cuda_convolution.activation_backward(da, a, "relu", db), db


def relu_gradients(s: Setting, b: Backend, da: Any, a: Any) -> Any:
    dz = da * (a > 0)
    return dz, dz.sum((0, 1, 2), dtype=np.float64).astype(dz.dtype)


def weight_gradient(groups: Callable[[Setting], int]) -> Callable[..., Any]:
    """Of a 3x3 convolution: without an activation, the only kernel that conv2d_backward needs."""
    def run(s: Setting, b: Backend, x: Any, dz: Any) -> Any:
        dw = b.empty((3, 3, x.shape[3] // groups(s), s.c), np.float32)
        w = b.empty(dw.shape, x.dtype)
        b.conv2d_backward(dz, dz, x, w, s.conv, groups(s), None, dw, input_gradient=False)
        return dw
    return run


def depthwise_input_gradient(s: Setting, b: Backend, dz: Any, w: Any) -> Any:
    from gpucnn.backend.cuda_convolution import Problem, input_gradient, input_gradient_plan
    p = Problem.of(dz.shape, s.c, s.conv, s.c, dz.dtype)
    return input_gradient(p, input_gradient_plan(p, "direct"), dz, w)


def depthwise_dx(s: Setting, b: Backend, dz: Any, w: Any) -> Any:
    return b.conv2d_backward(dz, dz, dz, w, s.conv, s.c, None, np.empty_like(w))


def sum_splits(s: Setting, b: Backend, slabs: Any) -> Any:
    from gpucnn.backend.cuda_kernel import Kernel
    total = b.empty(slabs.shape[1:], slabs.dtype)
    Kernel("sum_splits.cu", "sum_splits")(total.size, slabs, total, total.size, len(slabs))
    return total


def finish_splits(s: Setting, b: Backend, partial: Any, bias: Any, residual: Any) -> Any:
    from gpucnn.backend.cuda_kernel import Kernel
    y = b.empty(s.shape, s.dtype)
    Kernel("finish_splits.cu", "finish_splits")(y.size, partial, bias, residual, y, y.size, s.c,
                                                len(partial), ACTIVATION=1)
    return y


def finished(s: Setting, b: Backend, partial: Any, bias: Any, residual: Any) -> Any:
    return np.maximum(partial.sum(0, dtype=np.float64) + bias + residual, 0).astype(np.float32)


def norm_statistics(s: Setting, b: Backend, x: Any, mean: Any, var: Any) -> Any:
    return *b.batch_norm_statistics(x, mean, var, 0.1), mean, var


def norm_backward(s: Setting, b: Backend, dy: Any, x: Any, mean: Any, var: Any, gamma: Any,
                  beta: Any) -> Any:
    dgamma, dbeta = (b.empty((s.c,), np.float32) for _ in range(2))
    y = None if b.name == "cupy" else b.batch_norm(x, mean, var, gamma, beta, 1e-5, None, "relu")
    dx, _ = b.batch_norm_backward(dy, x, y, mean, var, gamma, beta, 1e-5, "relu", dgamma, dbeta,
                                  False)
    return dx, dgamma, dbeta


@cache
def random_stream(b: Backend) -> Any:
    """On the device before a graph is captured, which refuses to copy from the host."""
    return b.asarray(np.array([2]))


def adam(s: Setting, b: Backend, theta: Any, g: Any, m: Any, v: Any, control: Any) -> Any:
    """With the 16-bit copy of the parameters where the setting stores 16 bits."""
    copy = None if s.dtype == "float32" else b.empty(theta.shape, s.dtype)
    rule = update.Rule(update.ADAM, BETA1, BETA2, EPSILON)
    b.apply_update(update.Update(
        theta, g, {"m": m, "s": v}, control, formula=lambda g, *state: g, rule=rule,
        weight_decay=0.0, decayed_size=0, clip_norm=None, loss_scale=None, growth_interval=1,
        copy=copy))
    return (theta, m, v) if copy is None else (theta, m, v, copy)


def first_adam(s: Setting, b: Backend, theta: Any, g: Any, m: Any, v: Any, control: Any) -> Any:
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g**2
    theta = theta - RATE * (m / (1 - BETA1)) / (np.sqrt(v / (1 - BETA2)) + EPSILON)
    return theta, m, v, theta


def average(s: Setting, b: Backend, theta: Any, mean: Any, averaging: Any, control: Any) -> Any:
    b.apply_average(update.Averaging(theta, mean, averaging, control, decay=0.9, warm_up=False))
    return mean


KERNELS = (
    MemoryKernel("im2col", "im2col.cu", "x", lambda s, b, x: b.im2col(x, s.conv)),
    MemoryKernel("col2im", "im2col.cu", "cols",
                 lambda s, b, cols: b.col2im(cols, s.shape, s.conv)),
    MemoryKernel("max_pool", "maxpool.cu", "x", lambda s, b, x: b.max_pool(x, s.pool), half=True),
    MemoryKernel("max_pool_backward", "maxpool.cu", "pooled mask",
                 lambda s, b, dy, mask: b.max_pool_backward(dy, mask, s.shape, s.pool), half=True),
    MemoryKernel("avg_pool", "avgpool.cu", "x", lambda s, b, x: b.avg_pool(x, s.pool), half=True),
    MemoryKernel("avg_pool_backward", "avgpool.cu", "pooled",
                 lambda s, b, dy: b.avg_pool_backward(dy, s.shape, s.pool), half=True),
    MemoryKernel("dropout", "dropout.cu", "x",
                 lambda s, b, x: b.dropout(x, 0.25, 1, random_stream(b)), half=True),
    MemoryKernel("add_relu", "activation.cu", "x dz",
                 lambda s, b, z, other: b.activate(z, other, "relu"), half=True),
    MemoryKernel("relu_backward", "activation.cu", "dz x",
                 lambda s, b, da, a: b.activation_backward(da, a, "relu"), half=True),
    MemoryKernel("relu_bias_backward", "activation.cu", "dz x", relu_bias_backward, relu_gradients,
                 half=True),
    MemoryKernel("gelu", "gelu.cu", "x", lambda s, b, x: b.gelu(x), half=True),
    MemoryKernel("gelu_backward", "gelu.cu", "dz x",
                 lambda s, b, dy, x: b.gelu_backward(dy, x), half=True),
    MemoryKernel("norm_statistics", "batchnorm.cu", "x mean var", norm_statistics, half=True),
    MemoryKernel("norm", "batchnorm.cu", "x mean var bias bias",
                 lambda s, b, *arrays: b.batch_norm(*arrays, 1e-5, None, "relu"), half=True),
    MemoryKernel("norm_added", "batchnorm.cu", "x mean var bias bias dz",
                 lambda s, b, *arrays: b.batch_norm(*arrays[:5], 1e-5, arrays[5], "relu"),
                 half=True),
    MemoryKernel("norm_backward", "batchnorm.cu", "dz x mean var bias bias", norm_backward,
                 half=True, twice="dz x"),
    MemoryKernel("cross_entropy", "softmax_cross_entropy.cu", "logits labels",
                 lambda s, b, logits, labels: b.softmax_cross_entropy(logits, labels, 0.1),
                 half=True),
    MemoryKernel("adam", "optimizer.cu", "theta gradient moment squares control", adam, first_adam,
                 half=True),
    MemoryKernel("average", "optimizer.cu", "theta moment averaging control", average),
    MemoryKernel("sum_of_squares", "optimizer.cu", "gradient",
                 lambda s, b, g: b.sum_of_squares(g), parts=True),
    MemoryKernel("sum_splits", "sum_splits.cu", "slabs", sum_splits,
                 lambda s, b, slabs: slabs.sum(0, dtype=np.float64).astype(slabs.dtype)),
    MemoryKernel("finish_splits", "finish_splits.cu", "partial bias dz", finish_splits, finished,
                 half=True),
    MemoryKernel("direct y", "conv_direct.cu", "grey filters",
                 lambda s, b, x, w: b.conv2d(x, w, None, s.conv, 1, "relu"), half=True),
    MemoryKernel("direct dw", "conv_direct.cu", "grey dz", weight_gradient(lambda s: 1), half=True),
    MemoryKernel("depthwise y", "conv_direct.cu", "x filters",
                 lambda s, b, x, w: b.conv2d(x, w, None, s.conv, s.c, None)),
    MemoryKernel("depthwise dx", "conv_direct.cu", "dz filters", depthwise_input_gradient,
                 depthwise_dx),
    MemoryKernel("depthwise dw", "conv_direct.cu", "x dz", weight_gradient(lambda s: s.c)),
    MemoryKernel("gather_batch", "gather.cu", "bytes order cursor table",
                 lambda s, b, images, order, cursor, table: b.gather_batch(
                     images, order, order, cursor, s.n, table, AUGMENTATION, 1), half=True),
    MemoryKernel("augment_batch", "augment.cu", "bytes order cursor table choices",
                 lambda s, b, images, order, cursor, table, choices: b.gather_batch(
                     images, order, order, cursor, s.n, table, BLENDING, 1, choices=choices),
                 half=True),
)
TWO_NUMBERS = ("record_step.cu",)  # all that it writes: no share of a bandwidth
# What convolutions.py measures, and so has no line here.
MATRIX_FILES = ("conv_gemm.cu", "conv_weight_gradient.cu", "conv_tensor.cu",
                "conv_tensor_weight_gradient.cu")


def jobs(context: Context) -> Iterator[Job]:
    batch = context.batch or BATCH
    for dtype in TOLERANCES:
        for h, w, c in ((8, 8, 8),) if context.quick else SHAPES:
            for kernel in KERNELS:
                setting = Setting(2 if context.quick else batch, h, w, c, dtype)
                if kernel.half or dtype == "float32":
                    yield Job(group_of(dtype), f"{kernel.name} {h}x{w}x{c}",
                              partial(measure, context, kernel, setting))


def group_of(dtype: str) -> str:
    return f"memory, {dtype}"


def measure(context: Context, kernel: MemoryKernel, setting: Setting) -> Row:
    """Compared with NumPy on a few images, run twice into poisoned memory, then timed."""
    clock, backend, names = context.clock, context.backend, kernel.inputs.split()
    row: Row = {"name": f"{kernel.name} {'x'.join(map(str, setting.shape[1:]))}",
                "file": kernel.file, "shape": list(setting.shape), "dtype": setting.dtype,
                "group": group_of(setting.dtype)}
    wrong = differs_from_numpy(context, kernel, setting._replace(n=min(FEW, setting.n)), names)
    inputs = [backend.asarray(a) for a in drawn(setting, names)]
    outputs, problem = run_twice(
        clock, lambda: kernel.run(setting, backend, *[a.copy() for a in inputs]))
    if wrong or problem:
        return row | {"passed": False, "note": wrong or problem}
    moved = sum(a.nbytes for a in (*inputs, *outputs))
    moved += sum(inputs[names.index(name)].nbytes for name in kernel.twice.split())
    del outputs
    sets = [inputs, *([a.copy() for a in inputs] for _ in range(clock.buffers(moved) - 1))]
    timing = clock.time([partial(kernel.run, setting, backend, *arrays) for arrays in sets])
    rate = moved / timing.median
    return row | timing.figures() | {
        "bytes": moved, "rate": rate, "unit": "bytes", "of_limit": context.share_of_copy(rate),
        "passed": True}


def differs_from_numpy(context: Context, kernel: MemoryKernel, setting: Setting, names: list[str]
                       ) -> str:
    """What is wrong, "" for nothing. NumPy computes in float32 from the very same numbers."""
    backend, here = context.backend, drawn(setting, names)
    there = [backend.asarray(a) for a in here]
    wide = [a.astype(np.float32) if a.dtype == np.float16 else a.copy() for a in here]
    expected = outputs_of((kernel.expected or kernel.run)(
        setting._replace(dtype="float32"), make_backend("numpy"), *wide))
    with context.clock.poisoned():
        results = [backend.to_numpy(r) for r in outputs_of(kernel.run(setting, backend, *there))]
    if kernel.parts:
        results, expected = [results[0].sum()], (expected[0].sum(),)
    errors = [relative_error(np, r, e) for r, e in zip(results, expected)]
    return max((verdict(e, TOLERANCES[setting.dtype], "NumPy") for e in errors), key=bool)


def drawn(setting: Setting, names: list[str]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [INPUTS[name](setting, rng) for name in names]
