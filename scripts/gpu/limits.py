"""What this GPU can do at most: the copy and the matrix product that all else is a share of."""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial

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

    The limit is the faster of the two.
    """
    clock, n = context.clock, QUICK_ROWS if context.quick else ROWS
    a, b = (random_array(clock.xp, (n, n), mode.dtype, k, n**-0.25) for k in (0, 1))
    p = Problem.of((1, 1, n, n), n, ONE_TAP, 1, mode.dtype)
    plan = cuda_convolution.forward_plan(p, "implicit_gemm")

    def ours():
        return cuda_convolution.forward(p, plan, a[None, None], b[None, None], None, None, None)

    clock.warm_up(ours, WARM_SECONDS * bool(clock.window_seconds))
    error = relative_error(clock.xp, ours()[0, 0], clock.xp.matmul(a, b))
    timing = clock.time([ours])
    cublas = clock.time_eagerly(lambda: clock.xp.matmul(a, b))
    rates = {"ours": 2 * n**3 / timing.median, "cublas": 2 * n**3 / cublas.median}
    context.limits[f"matrix {mode.name}"] = max(rates.values())
    wrong = verdict(error, mode.tolerance, "cuBLAS")
    return timing.figures() | {
        "name": f"product of {n}, {mode.name}", "mode": mode.name, "flops": 2 * n**3,
        "rate": rates["ours"], "unit": "flops", "of_limit": rates["ours"] / max(rates.values()),
        "other_microseconds": 1e6 * cublas.median, "ratio": cublas.median / timing.median,
        "rates": rates, "passed": not wrong, "note": wrong or f"{short(plan)}, cuBLAS"}
