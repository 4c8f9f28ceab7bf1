"""What this GPU can do at most: the copy and the matrix product that all else is a share of."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from gpucnn.backend import cuda_convolution
from gpucnn.backend.cuda_convolution import Problem
from gpucnn.geometry import Window
from scripts.gpu.context import Context, Mode
from scripts.gpu.measure import Call, random_array, relative_error, verdict
from scripts.gpu.report import Job, Row, short

COPIED, ROWS = 1 << 29, 8192              # bytes, and rows and columns of a square matrix
QUICK_COPIED, QUICK_ROWS = 1 << 16, 64
WARM_SECONDS = 1
ONE_TAP = Window(1, 1, 1, 1, 0, 0, 0, 0, 1, 1)


def jobs(context: Context) -> Iterator[Job]:
    for mode in context.modes:
        yield Job("limits", f"product {mode.name}", partial(product, context, mode), 4)
    yield Job("limits", "copy", partial(copy, context))


def copy(context: Context) -> Row:
    """A device copy, in bytes read and written per second."""
    clock, nbytes = context.clock, QUICK_COPIED if context.quick else COPIED
    xp = clock.xp

    def call(source, target) -> Call:
        def copied() -> None:
            target[...] = source
        return copied

    sets = [(random_array(xp, (nbytes // 4,), "float32", k), xp.empty(nbytes // 4, "float32"))
            for k in range(clock.buffers(2 * nbytes))]
    timing = clock.time([call(*pair) for pair in sets])
    rate = context.limits["copy"] = 2 * nbytes / timing.median
    return timing.figures() | {"name": f"copy of {nbytes >> 10} KiB", "bytes": 2 * nbytes,
                               "rate": rate, "unit": "bytes", "passed": True}


def product(context: Context, mode: Mode) -> Row:
    """A large square product by our kernel, and by cuBLAS, which no CuPy graph can hold.

    It is compared with the exact product. The limit is the faster of the two.
    """
    clock, n = context.clock, QUICK_ROWS if context.quick else ROWS
    a, b = (random_array(clock.xp, (n, n), mode.dtype, k, n**-0.25) for k in (0, 1))
    tensor = mode.tensor and cuda_convolution.capability() >= 80
    p = Problem.of((1, 1, n, n), n, ONE_TAP, 1, mode.dtype, tensor)
    plan = cuda_convolution.forward_plan(p, "implicit_gemm")

    def ours():
        return cuda_convolution.forward(p, plan, a[None, None], b[None, None], None, None, None)

    clock.warm_up(ours, WARM_SECONDS * bool(clock.window_seconds))
    exact = clock.xp.matmul(a.astype("float32"), b.astype("float32"))
    wrong = verdict(relative_error(clock.xp, ours()[0, 0], exact), mode.tolerance, "cuBLAS")
    del exact
    timing = clock.time([ours])
    rates = {"ours": 2 * n**3 / timing.median}
    row: Row = timing.figures() | {
        "name": f"product of {n}, {mode.name}", "mode": mode.name, "flops": 2 * n**3,
        "rate": rates["ours"], "unit": "flops", "rates": rates, "passed": not wrong,
        "note": wrong or f"{short(plan)}, cuBLAS"}
    try:
        with tf32_products(clock.xp) if mode.tf32 else contextlib.nullcontext():
            cublas = clock.time_eagerly(lambda: clock.xp.matmul(a, b)).median
        rates["cublas"] = 2 * n**3 / cublas
        row |= {"other_microseconds": 1e6 * cublas, "ratio": cublas / timing.median}
    except Exception as e:  # CuPy has no TF32 that it promises, and little bfloat16
        row["note"] = wrong or f"{short(plan)}; cuBLAS: {type(e).__name__}: {e}"
    context.limits[f"matrix {mode.name}"] = max(rates.values())
    return row | {"of_limit": rates["ours"] / max(rates.values())}


@contextlib.contextmanager
def tf32_products(cupy: Any) -> Iterator[None]:
    """cuBLAS may round float32 to TF32. CuPy 14 has private names for that alone."""
    core = cupy._core
    before = core.get_compute_type("f")
    core.set_compute_type("f", core._routines_linalg.COMPUTE_TYPE_TF32)
    try:
        yield
    finally:
        core.set_compute_type("f", before)
