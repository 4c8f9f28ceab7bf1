"""The kernels bound by memory: share of a copy's bandwidth, each after a check against NumPy.

A kernel is one line of KERNELS. Its bytes are what it must read and write at least: each element
of its inputs and outputs once; an array that a kernel changes in place is both.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gpucnn.augmentation import Augmentation
from gpucnn.backend import Backend, make_backend
from gpucnn.geometry import Window, make_window
from scripts.gpu.context import Context
from scripts.gpu.measure import outputs_of, relative_error, run_twice, verdict
from scripts.gpu.report import Job, Row

BATCH = 256
SHAPES = ((28, 28, 32), (14, 14, 64))  # the article's feature maps
FEW = 4                                # images that are compared with NumPy
SLABS = 64
TOLERANCE = 1e-5
AUGMENTATION = Augmentation(crop=2, flip=True)


class Setting(NamedTuple):
    """n images of h x w pixels and c channels."""

    n: int
    h: int
    w: int
    c: int

    @property
    def conv(self) -> Window:
        return make_window("gpu_check", 3, 1, "same", 1, (self.h, self.w))

    @property
    def pool(self) -> Window:
        return make_window("gpu_check", 2, 2, 0, 1, (self.h, self.w))


Draw = Callable[[Setting, np.random.Generator], np.ndarray]


def floats(shape: Callable[[Setting], tuple[int, ...]]) -> Draw:
    """Normal numbers."""
    return lambda s, rng: rng.standard_normal(shape(s), np.float32)


INPUTS: dict[str, Draw] = {
    "x": floats(tuple),
    "dz": floats(tuple),
    "grey": floats(lambda s: (s.n, s.h, s.w, 1)),
    "pooled": floats(lambda s: (s.n, s.h // 2, s.w // 2, s.c)),
    "mask": lambda s, rng: rng.integers(0, 4, (s.n, s.h // 2, s.w // 2, s.c), np.uint8),
    "cols": floats(lambda s: (s.n * s.h * s.w, 9 * s.c)),
    "filters": floats(lambda s: (3, 3, 1, s.c)),
    "slabs": floats(lambda s: (SLABS, 9 * s.c * s.c)),
    "bytes": lambda s, rng: rng.integers(0, 256, s, np.uint8),
    "order": lambda s, rng: rng.permutation(s.n),
    "cursor": lambda s, rng: np.zeros(2, np.int64),
    "table": lambda s, rng: AUGMENTATION.table(s.c, np.float32),
}


class MemoryKernel(NamedTuple):
    """run(setting, backend, *inputs) -> what is written, an array or several.

    expected: the same in NumPy, where the NumPy backend has no such method.
    """

    name: str
    file: str
    inputs: str
    run: Callable[..., Any]
    expected: Callable[..., Any] | None = None


def activation_backward(s: Setting, b: Backend, da: Any, a: Any) -> Any:
    from gpucnn.backend import cuda_convolution
    db = b.empty((s.c,), da.dtype)
    return cuda_convolution.activation_backward(da, a, "relu", db), db


def relu_gradients(s: Setting, b: Backend, da: Any, a: Any) -> Any:
    dz = da * (a > 0)
    return dz, dz.sum((0, 1, 2), dtype=np.float64).astype(dz.dtype)


def weight_gradient(groups: Callable[[Setting], int]) -> Callable[..., Any]:
    """Of a 3x3 convolution: without an activation, the only kernel that conv2d_backward needs."""
    def run(s: Setting, b: Backend, x: Any, dz: Any) -> Any:
        dw = b.empty((3, 3, x.shape[3] // groups(s), s.c), x.dtype)
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


KERNELS = (
    MemoryKernel("im2col", "im2col.cu", "x", lambda s, b, x: b.im2col(x, s.conv)),
    MemoryKernel("col2im", "im2col.cu", "cols",
                 lambda s, b, cols: b.col2im(cols, tuple(s), s.conv)),
    MemoryKernel("max_pool", "maxpool.cu", "x", lambda s, b, x: b.max_pool(x, s.pool)),
    MemoryKernel("max_pool_backward", "maxpool.cu", "pooled mask",
                 lambda s, b, dy, mask: b.max_pool_backward(dy, mask, tuple(s), s.pool)),
    MemoryKernel("avg_pool", "avgpool.cu", "x", lambda s, b, x: b.avg_pool(x, s.pool)),
    MemoryKernel("avg_pool_backward", "avgpool.cu", "pooled",
                 lambda s, b, dy: b.avg_pool_backward(dy, tuple(s), s.pool)),
    MemoryKernel("dropout", "dropout.cu", "x", lambda s, b, x: b.dropout(x, 0.25, 1, 2)),
    MemoryKernel("activation_backward", "activation.cu", "dz x", activation_backward,
                 relu_gradients),
    MemoryKernel("sum_splits", "sum_splits.cu", "slabs", sum_splits,
                 lambda s, b, slabs: slabs.sum(0, dtype=np.float64).astype(slabs.dtype)),
    MemoryKernel("direct y", "conv_direct.cu", "grey filters",
                 lambda s, b, x, w: b.conv2d(x, w, None, s.conv, 1, "relu")),
    MemoryKernel("direct dw", "conv_direct.cu", "grey dz", weight_gradient(lambda s: 1)),
    MemoryKernel("depthwise y", "conv_direct.cu", "x filters",
                 lambda s, b, x, w: b.conv2d(x, w, None, s.conv, s.c, None)),
    MemoryKernel("depthwise dx", "conv_direct.cu", "dz filters", depthwise_input_gradient,
                 depthwise_dx),
    MemoryKernel("depthwise dw", "conv_direct.cu", "x dz", weight_gradient(lambda s: s.c)),
    MemoryKernel("gather_batch", "gather.cu", "bytes order cursor table",
                 lambda s, b, images, order, cursor, table: b.gather_batch(
                     images, order, order, cursor, s.n, table, AUGMENTATION, 1)),
)
# What convolutions.py measures, and so has no line here.
MATRIX_FILES = ("conv_gemm.cu", "conv_weight_gradient.cu")


def jobs(context: Context) -> Iterator[Job]:
    batch = context.batch or BATCH
    for h, w, c in ((8, 8, 8),) if context.quick else SHAPES:
        for kernel in KERNELS:
            setting = Setting(2 if context.quick else batch, h, w, c)
            yield Job("memory", f"{kernel.name} {h}x{w}x{c}",
                      partial(measure, context, kernel, setting))


def measure(context: Context, kernel: MemoryKernel, setting: Setting) -> Row:
    """Compared with NumPy on a few images, run twice into poisoned memory, then timed."""
    clock, backend, names = context.clock, context.backend, kernel.inputs.split()
    row: Row = {"name": f"{kernel.name} {'x'.join(map(str, setting[1:]))}", "file": kernel.file,
                "shape": list(setting)}
    few = setting._replace(n=min(FEW, setting.n))
    here = drawn(few, names, 0)
    expected = outputs_of((kernel.expected or kernel.run)(few, make_backend("numpy"), *here))
    with clock.poisoned():
        results = outputs_of(kernel.run(few, backend, *map(backend.asarray, here)))
    errors = [relative_error(np, backend.to_numpy(r), e) for r, e in zip(results, expected)]
    wrong = max((verdict(e, TOLERANCE, "NumPy") for e in errors), key=bool)
    inputs = [backend.asarray(a) for a in drawn(setting, names, 0)]
    outputs, problem = run_twice(
        clock, lambda: kernel.run(setting, backend, *[a.copy() for a in inputs]))
    if wrong or problem:
        return row | {"passed": False, "note": wrong or problem}
    moved = sum(a.nbytes for a in (*inputs, *outputs))
    del results, outputs
    sets = [inputs, *([a.copy() for a in inputs] for _ in range(clock.buffers(moved) - 1))]
    timing = clock.time([partial(kernel.run, setting, backend, *arrays) for arrays in sets])
    rate = moved / timing.median
    return row | timing.figures() | {
        "bytes": moved, "rate": rate, "unit": "bytes", "of_limit": context.share_of_copy(rate),
        "passed": True}


def drawn(setting: Setting, names: list[str], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [INPUTS[name](setting, rng) for name in names]
