"""The GPU: CuPy arrays, and our kernels for what CuPy has no function for."""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np

from gpucnn import convolution, update
from gpucnn.augmentation import Augmentation
from gpucnn.backend import (
    LEAKY_SLOPE,
    Moments,
    PassPlan,
    convolution_algorithm,
    cuda_batch_norm,
    cuda_convolution,
    cuda_copies,
    cuda_graph,
)
from gpucnn.backend.cuda_convolution import (
    Problem,
    forward_plan,
    input_gradient_plan,
    weight_gradient_plan,
)
from gpucnn.backend.cuda_kernel import BLOCK, Kernel, accumulator, launch_grid
from gpucnn.geometry import Window
from gpucnn.numerics import blocks_of
from gpucnn.rng import drop_threshold, words_of

_im2col = Kernel("im2col.cu", "im2col")
_col2im = Kernel("im2col.cu", "col2im")
_max_pool = Kernel("maxpool.cu", "max_pool")
_max_pool_backward = Kernel("maxpool.cu", "max_pool_backward")
_avg_pool = Kernel("avgpool.cu", "avg_pool")
_avg_pool_backward = Kernel("avgpool.cu", "avg_pool_backward")
_gelu = Kernel("gelu.cu", "gelu")
_gelu_backward = Kernel("gelu.cu", "gelu_backward")
_dropout = Kernel("dropout.cu", "dropout")
_ONE_TAP = Window(1, 1, 1, 1, 0, 0, 0, 0, 1, 1)
_gather_batch = Kernel("gather.cu", "gather_batch")
_augment_batch = Kernel("augment.cu", "augment_batch")
_softmax_cross_entropy = Kernel("softmax_cross_entropy.cu", "softmax_cross_entropy")
_over_rows = Kernel("softmax_cross_entropy.cu", "over_rows")
_sum_of_squares = Kernel("optimizer.cu", "sum_of_squares")
_prepare_step = Kernel("optimizer.cu", "prepare_step")
_update = Kernel("optimizer.cu", "update")
_prepare_average = Kernel("optimizer.cu", "prepare_average")
_update_average = Kernel("optimizer.cu", "update_average")
_record_step = Kernel("record_step.cu", "record_step")

WARP = 32
WARP_CLASSES = 128  # more than these are work for a whole block
MAX_PARTIALS = 1024


class CupyBackend:
    name = "cupy"
    xp = cupy
    captures = True
    norm_recomputes = True  # which takes fewer bytes than to read y
    block_bytes = 256 << 20  # large enough to fill a GPU, small beside its memory

    def asarray(self, a: Any, dtype: Any = None) -> Any:
        return cupy.ascontiguousarray(cupy.asarray(a, dtype))

    def to_numpy(self, a: Any) -> np.ndarray:
        return cupy.asnumpy(a)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return cupy.empty(shape, dtype)  # CuPy's memory pool reuses what is free

    def free_bytes(self) -> float:
        free, _ = cupy.cuda.runtime.memGetInfo()
        return float(free + cupy.get_default_memory_pool().free_bytes())

    def memory_in_use(self) -> tuple[float, float]:
        pool = cupy.get_default_memory_pool()
        limit = pool.get_limit()  # CUPY_GPU_MEMORY_LIMIT, or set_limit()
        if limit:
            return float(pool.used_bytes()), float(limit)
        free, total = cupy.cuda.runtime.memGetInfo()
        return float(total - free), float(total)

    def free_unused(self) -> None:
        cupy.get_default_memory_pool().free_all_blocks()

    def capturing(self) -> bool:
        return bool(cupy.cuda.get_current_stream().is_capturing())

    def graph_memory(self) -> cuda_graph.GraphMemory:
        return cuda_graph.GraphMemory()

    def capture(self, work: Callable[[], Any], memory: Any = None) -> Callable[[], None]:
        return cuda_graph.capture(work, memory or self.graph_memory())

    def fetch(self, a: Any) -> cuda_copies.Fetch:
        return cuda_copies.Fetch(a)

    def upload(self, targets: Sequence[Any]) -> cuda_copies.Upload:
        return cuda_copies.Upload(targets)

    def record_step(self, loss: Any, hits: Any, ring: Any, count: Any) -> None:
        _record_step.launch(1, 1, loss, hits, ring, count, len(ring))

    def blocks(self, n: int, item_bytes: int, least_bytes: int = 0) -> list[slice]:
        return blocks_of(n, max(self.block_bytes, least_bytes) // max(1, item_bytes))

    def scratch_bytes(self, n: int, nbytes: int, block_nbytes: int) -> int:
        return 0

    def for_each(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        for item in items:
            work(item)

    def sum_over(self, work: Callable[..., None], items: Sequence[Any], like: Sequence[Any]
                 ) -> list[Any]:
        totals = [cupy.zeros(a.shape, a.dtype) for a in like]
        for item in items:
            work(item, *totals)
        return totals

    def matmul(self, a: Any, b: Any, out: Any = None) -> Any:
        return cupy.matmul(a, b, out=out)

    def conv2d(self, x: Any, w: Any, b: Any, window: Window, groups: int,
               activation: str | None, residual: Any = None, algorithm: str = "auto",
               tf32: bool = False) -> Any:
        return self._conv2d(x, w, b, window, groups, activation, residual,
                            convolution_algorithm(algorithm), tf32)

    def _conv2d(self, x: Any, w: Any, b: Any, window: Window, groups: int, activation: str | None,
                residual: Any, algorithm: str, tf32: bool) -> Any:
        problem = _problem(x, w, residual, window, groups, tf32)
        plan = forward_plan(problem, algorithm)
        if plan.algorithm == "im2col":
            return convolution.conv2d(self, _as_float32(x), _as_float32(w), b, window, groups,
                                      activation, _as_float32(residual)).astype(x.dtype, copy=False)
        return cuda_convolution.forward(problem, plan, x, w, b, residual, activation)

    def conv2d_with_moments(self, x: Any, w: Any, b: Any, window: Window, groups: int,
                            activation: str | None, residual: Any = None,
                            algorithm: str = "auto", tf32: bool = False
                            ) -> tuple[Any, Moments | None]:
        problem = _problem(x, w, residual, window, groups, tf32)
        plan = forward_plan(problem, convolution_algorithm(algorithm))
        tile = plan.tile
        if tile is None or plan.splits > 1:  # what a block has is not the output then
            return self.conv2d(x, w, b, window, groups, activation, residual, algorithm, tf32), None
        bands = -(-problem.n * problem.oh * problem.ow // tile.m)
        partial = cupy.empty((bands, 2, problem.c_out), accumulator(x.dtype))
        a = cuda_convolution.forward(problem, plan, x, w, b, residual, activation, partial)
        return a, Moments(partial, tile.m)

    def conv2d_backward(self, da: Any, a: Any, x: Any, w: Any, window: Window, groups: int,
                        activation: str | None, dw: Any, db: Any = None,
                        input_gradient: bool = True, algorithm: str = "auto",
                        tf32: bool = False) -> Any:
        return self.start_conv2d_backward(da, a, x, w, window, groups, activation, dw, db,
                                          input_gradient, algorithm, tf32)()

    def start_conv2d_backward(self, da: Any, a: Any, x: Any, w: Any, window: Window, groups: int,
                              activation: str | None, dw: Any, db: Any = None,
                              input_gradient: bool = True, algorithm: str = "auto",
                              tf32: bool = False) -> Callable[[], Any]:
        return self._start_backward(da, a, x, w, window, groups, activation, dw, db,
                                    input_gradient, convolution_algorithm(algorithm), tf32)

    def _start_backward(self, da: Any, a: Any, x: Any, w: Any, window: Window, groups: int,
                        activation: str | None, dw: Any, db: Any, input_gradient: bool,
                        algorithm: str, tf32: bool) -> Callable[[], Any]:
        if algorithm == "im2col":
            if dw is None and not input_gradient:
                cuda_convolution.activation_backward(da, a, activation, db)
                return lambda: None
            dx, filter_gradient, bias_gradient = convolution.conv2d_backward(
                self, _as_float32(da), _as_float32(a), _as_float32(x), _as_float32(w), window,
                groups, activation, input_gradient)
            if dw is not None:
                dw[...] = filter_gradient
            if db is not None:
                db[...] = bias_gradient
            dx = None if dx is None else dx.astype(x.dtype, copy=False)
            return lambda: dx
        dz = cuda_convolution.activation_backward(da, a, activation, db)
        p = _problem(x, w, dz, window, groups, tf32)
        if dw is not None:
            cuda_convolution.weight_gradient(p, weight_gradient_plan(p, algorithm), x, dz, dw)
        if not input_gradient:
            return lambda: None
        plan = input_gradient_plan(p, algorithm)
        return lambda: cuda_convolution.input_gradient(p, plan, dz, w)

    def conv2d_plan(self, x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window,
                    groups: int, dtype: Any, algorithm: str = "auto", input_gradient: bool = True,
                    tf32: bool = False) -> dict[str, PassPlan]:
        chosen = convolution_algorithm(algorithm)
        try:
            return self._plans(x_shape, w_shape, window, groups, dtype, chosen,
                               input_gradient, tf32)
        except ValueError as e:
            if os.environ.get("GPUCNN_CONV"):
                raise ValueError(f"GPUCNN_CONV={chosen!r}: {e}") from None
            raise

    def _plans(self, x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window,
               groups: int, dtype: Any, algorithm: str, input_gradient: bool, tf32: bool
               ) -> dict[str, PassPlan]:
        dtype = np.dtype(dtype)
        p = Problem.of(x_shape, w_shape[3], window, groups, dtype, _tensor_cores(dtype, tf32))
        columns = convolution.workspace(self, x_shape, w_shape, window, accumulator(dtype).itemsize)
        passes = {"forward": forward_plan(p, algorithm)}
        if input_gradient:
            passes["input gradient"] = input_gradient_plan(p, algorithm)
        passes["weight gradient"] = weight_gradient_plan(p, algorithm)
        return {name: PassPlan(
            plan.algorithm + plan.cores, f"{plan.tile.m}x{plan.tile.n}" if plan.tile else "",
            plan.splits, columns if plan.algorithm == "im2col" else plan.workspace,
            in_steps=plan.algorithm != "im2col")
            for name, plan in passes.items()}

    def dense(self, x: Any, w: Any, b: Any, activation: str | None, tf32: bool = False) -> Any:
        # A convolution with one tap over one image, a row of n pixels.
        return self._conv2d(x[None, None], w[None, None], b, _ONE_TAP, 1, activation, None,
                            _dense_algorithm(), tf32)[0, 0]

    def dense_backward(self, da: Any, a: Any, x: Any, w: Any, activation: str | None,
                       dw: Any, db: Any = None, input_gradient: bool = True,
                       tf32: bool = False) -> Any:
        dx = self._start_backward(
            da[None, None], a[None, None], x[None, None], w[None, None], _ONE_TAP, 1, activation,
            dw[None, None], db, input_gradient, _dense_algorithm(), tf32)()
        return None if dx is None else dx[0, 0]

    def dense_plan(self, n: int, inputs: int, units: int, dtype: Any, input_gradient: bool = True,
                   tf32: bool = False) -> dict[str, PassPlan]:
        return self._plans((1, 1, n, inputs), (1, 1, inputs, units), _ONE_TAP, 1, dtype,
                           _dense_algorithm(), input_gradient, tf32)

    def activate(self, z: Any, other: Any, activation: str | None, slope: float = LEAKY_SLOPE
                 ) -> Any:
        return cuda_convolution.activate(z, other, activation, slope)

    def activation_backward(self, da: Any, a: Any, activation: str | None,
                            slope: float = LEAKY_SLOPE) -> Any:
        return cuda_convolution.activation_backward(da, a, activation, slope=slope)

    def gelu(self, x: Any) -> Any:
        y, vec = cupy.empty(x.shape, x.dtype), _channels_at_once(x.size, (x,))
        _gelu(x.size // vec, x, y, x.size, vec=vec)
        return y

    def gelu_backward(self, dy: Any, x: Any) -> Any:
        dx, vec = cupy.empty(x.shape, x.dtype), _channels_at_once(x.size, (dy, x))
        _gelu_backward(x.size // vec, dy, x, dx, x.size, vec=vec)
        return dx

    def im2col(self, x: Any, window: Window) -> Any:
        n, oh, ow, c = _output_shape(x.shape, window)
        cols = cupy.empty((n * oh * ow, window.places * c), x.dtype)
        _launch(_im2col, cols.size, (x, cols), x.shape, window)
        return cols

    def col2im(self, cols: Any, x_shape: tuple[int, ...], window: Window) -> Any:
        x = cupy.empty(x_shape, cols.dtype)
        _launch(_col2im, x.size, (cols, x), x_shape, window)
        return x

    def max_pool(self, x: Any, window: Window, relu: bool = False, want_mask: bool = True
                 ) -> tuple[Any, Any]:
        y = cupy.empty(_output_shape(x.shape, window), x.dtype)
        mask = cupy.empty(y.shape, window.mask_dtype) if want_mask else None
        _launch(_max_pool, y.size, (x, y, mask), x.shape, window, (window.dh, window.dw, int(relu)))
        return y, mask

    def max_pool_backward(self, dy: Any, mask: Any, x_shape: tuple[int, ...],
                          window: Window) -> Any:
        dx = cupy.empty(x_shape, dy.dtype)
        _launch(_max_pool_backward, dx.size, (dy, mask, dx), x_shape, window)
        return dx

    def avg_pool(self, x: Any, window: Window) -> Any:
        y = cupy.empty(_output_shape(x.shape, window), x.dtype)
        _launch(_avg_pool, y.size, (x, y), x.shape, window, ())
        return y

    def avg_pool_backward(self, dy: Any, x_shape: tuple[int, ...], window: Window) -> Any:
        dx = cupy.empty(x_shape, dy.dtype)
        _launch(_avg_pool_backward, dx.size, (dy, dx), x_shape, window, ())
        return dx

    def global_avg_pool(self, x: Any) -> Any:
        n, h, w, c = x.shape
        return self.avg_pool(x, _whole_image(h, w)).reshape(n, c)

    def global_avg_pool_backward(self, dy: Any, x_shape: tuple[int, ...]) -> Any:
        n, h, w, c = x_shape
        return self.avg_pool_backward(dy.reshape(n, 1, 1, c), x_shape, _whole_image(h, w))

    def dropout(self, x: Any, rate: float, key: int, stream: Any) -> Any:
        y = cupy.empty(x.shape, x.dtype)
        _dropout(-(-x.size // 4), x, y, x.size, drop_threshold(rate), 1 / (1 - rate),
                 *words_of(key), stream)
        return y

    def gather_batch(self, images: Any, labels: Any, order: Any, cursor: Any, n: int, table: Any,
                     augmentation: Augmentation, key: int, streamed: int = 0,
                     choices: Any = None, classes: int = 0) -> tuple[Any, Any]:
        total, h, w, c = images.shape
        x, mixup = cupy.empty((n, h, w, c), table.dtype), augmentation.mixup > 0
        y = cupy.empty((n, classes), np.float32) if mixup else cupy.empty((n,), np.int64)
        window = (augmentation.crop, int(augmentation.padding == "reflect"),
                  int(augmentation.flip))
        if augmentation.blends:
            _augment_batch(n * h * w, table, x, None if mixup else y, y if mixup else None,
                           images, labels, order, cursor, choices, total, streamed, n, h, w, c,
                           classes, *window, int(augmentation.rotate > 0),
                           augmentation.colour_steps, int(mixup), augmentation.cutout,
                           *words_of(key))
        else:
            vec = _channels_at_once(w * c, (x, table))
            _gather_batch(x.size // vec, table, x, y, images, labels, order, cursor, total,
                          streamed, n, h, w, c, *window, augmentation.cutout, *words_of(key),
                          vec=vec)
        return x, y

    def batch_norm_statistics(self, x: Any, running_mean: Any, running_var: Any, momentum: float,
                              moments: Moments | None = None) -> tuple[Any, Any]:
        return cuda_batch_norm.statistics(x, running_mean, running_var, float(momentum),
                                          _channels_at_once(x.shape[-1], (x,)), moments)

    def batch_norm(self, x: Any, mean: Any, var: Any, gamma: Any, beta: Any, epsilon: float,
                   residual: Any, activation: str | None) -> Any:
        arrays = (x,) if residual is None else (x, residual)
        return cuda_batch_norm.forward(x, mean, var, gamma, beta, float(epsilon), residual,
                                       activation == "relu", _channels_at_once(x.shape[-1], arrays))

    def batch_norm_backward(self, dy: Any, x: Any, y: Any, mean: Any, var: Any, gamma: Any,
                            beta: Any, epsilon: float, activation: str | None, dgamma: Any,
                            dbeta: Any, has_residual: bool) -> tuple[Any, Any]:
        relu = activation == "relu"
        dz = cupy.empty(x.shape, x.dtype) if relu and has_residual else None
        given = (dy, x) if dz is None else (dy, x, y)
        dx = cuda_batch_norm.backward(dy, x, None if dz is None else y, mean, var, gamma, beta,
                                      float(epsilon), relu, dgamma, dbeta, dz,
                                      _channels_at_once(x.shape[-1], given))
        return dx, (dz if relu else dy) if has_residual else None

    def softmax_cross_entropy(self, logits: Any, labels: Any, label_smoothing: float,
                              loss_scale: Any = None) -> tuple[Any, Any, Any]:
        n, classes = logits.shape
        dlogits = cupy.empty(logits.shape, logits.dtype)
        losses, loss = (cupy.empty(shape, accumulator(logits.dtype)) for shape in (n, ()))
        hits, hit_count = (cupy.empty(shape, np.int32) for shape in (n, ()))
        _softmax_cross_entropy.launch(
            launch_grid(n * BLOCK), WARP if classes <= WARP_CLASSES else BLOCK, logits,
            self.asarray(labels, np.int64), loss_scale, dlogits, losses, hits, n, classes,
            float(label_smoothing))
        _over_rows.launch(1, BLOCK, losses, hits, loss, hit_count, n)
        return loss, dlogits, hit_count

    def sum_of_squares(self, g: Any) -> Any:
        vec = _wide(g)
        grid = min(launch_grid(-(-g.size // vec)), MAX_PARTIALS)
        partials = cupy.empty(grid, np.float64)
        _sum_of_squares.launch(grid, BLOCK, g, partials, g.size, vec=vec)
        return partials

    def apply_update(self, u: update.Update) -> None:
        rule = u.rule or update.Rule(update.DESCENT)
        partials = self.sum_of_squares(u.g) if u.needs_norm else None
        _prepare_step.launch(
            1, BLOCK, u.control, partials, 0 if partials is None else partials.size, u.loss,
            u.loss_scale, u.growth_interval,
            float("inf") if u.clip_norm is None else float(u.clip_norm), float(rule.beta1),
            float(rule.beta2))
        if u.rule is None:
            update.apply(self, u)
            return
        first = u.state.get("v", u.state.get("m"))  # a velocity is kept as an average of g is
        arrays = u.theta, u.g, first, u.state.get("s"), u.copy
        vec = _wide(*(a for a in arrays if a is not None))
        _update(-(-u.theta.size // vec), *arrays, u.control, u.theta.size, u.decayed_size,
                float(u.weight_decay), float(rule.beta1), float(rule.beta2), float(rule.epsilon),
                int(rule.nesterov), vec=vec, RULE=rule.number)

    def apply_average(self, a: update.Averaging) -> None:
        _prepare_average.launch(1, 1, a.averaging, a.control, float(a.decay), int(a.warm_up))
        vec = _wide(a.theta, a.average)
        _update_average(-(-a.theta.size // vec), a.theta, a.average, a.averaging, a.theta.size,
                        vec=vec)


def _as_float32(a: Any) -> Any:
    """a, or None, as im2col's products take it: cuBLAS would store their sums in 16 bits."""
    return a.astype(np.float32) if a is not None and a.itemsize == 2 else a


def _tensor_cores(dtype: np.dtype, tf32: bool) -> bool:
    """They compute with 16-bit arrays, and with float32 ones where tf32 is allowed."""
    return (dtype.itemsize == 2 or tf32) and cuda_convolution.capability() >= 80


def _problem(x: Any, w: Any, other: Any, window: Window, groups: int, tf32: bool) -> Problem:
    """other: None, or what else lies as the output does."""
    arrays = (x, w) if other is None else (x, w, other)
    tensor = _tensor_cores(x.dtype, tf32) and all(a.data.ptr % 16 == 0 for a in arrays)
    return Problem.of(x.shape, w.shape[3], window, groups, x.dtype, tensor)


def _dense_algorithm() -> str:
    """A matrix product: ours, or with GPUCNN_CONV=im2col cuBLAS's."""
    return "im2col" if convolution_algorithm("auto") == "im2col" else "implicit_gemm"


def _whole_image(h: int, w: int) -> Window:
    return Window(h, w, h, w, 0, 0, 0, 0, 1, 1)


def _output_shape(x_shape: tuple[int, ...], window: Window) -> tuple[int, ...]:
    n, h, w, c = x_shape
    return (n, *window.out_size(h, w), c)


def _launch(kernel: Kernel, elements: int, arrays: tuple, x_shape: tuple[int, ...],
            window: Window, last: tuple[int, ...] | None = None) -> None:
    """Launch a kernel that slides `window` over x: one thread for each 16 bytes of its result.

    last: the kernel's last arguments, by default the dilation.
    """
    n, h, w, c = x_shape
    vec = _channels_at_once(c, arrays)
    kernel(elements // vec, *arrays, n, h, w, c, *window.out_size(h, w), window.kh, window.kw,
           window.sh, window.sw, window.top, window.left,
           *((window.dh, window.dw) if last is None else last), vec=vec)


def _channels_at_once(channels: int, arrays: tuple) -> int:
    """16 bytes' worth where every pixel starts at a multiple of 16 bytes, else 1."""
    vec = _wide(*arrays)
    return vec if channels % vec == 0 else 1


def _wide(*arrays: Any) -> int:
    """How many elements are 16 bytes of the first array, where all begin at that many; else 1."""
    vec = 16 // arrays[0].itemsize
    aligned = all(a.data.ptr % (vec * a.itemsize) == 0 for a in arrays if a is not None)
    return vec if aligned else 1
