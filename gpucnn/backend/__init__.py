"""What a backend is, and which one is in use."""
from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpucnn.augmentation import Augmentation
from gpucnn.errors import BackendError
from gpucnn.geometry import Window
from gpucnn.update import Averaging, Update

Array = Any  # numpy.ndarray or cupy.ndarray
LEAKY_SLOPE = 0.01
ALGORITHMS = ("auto", "implicit_gemm", "im2col", "direct")  # of convolution, on the GPU


class Moments(NamedTuple):
    """Of bands of rows of a matrix (rows, c): the means, and the sums of squared differences.

    partial: (bands, 2, c). band: the rows of each; the last one may have fewer.
    """

    partial: Array
    band: int


class PassPlan(NamedTuple):
    """How a backend computes one pass of a layer.

    tile: of the result, that a block of threads computes, or "". splits: of each sum.
    workspace: bytes of memory beside its arrays.
    kept: those of them that the CPU's threads keep for the next pass, by the names that
        parallel.scratch() has for them.
    in_steps: of a gradient, whether dz is an array of its own, and dw done before dx is begun.
    """

    algorithm: str
    tile: str = ""
    splits: int = 1
    workspace: int = 0
    kept: Mapping[str, int] = MappingProxyType({})
    in_steps: bool = False


class Fetch(Protocol):
    """A copy of an array of the backend, on its way to the host."""

    @property
    def done(self) -> bool:
        """Whether it has arrived."""

    def result(self) -> np.ndarray:
        """The copy; waits for it."""


class Upload(Protocol):
    """Host arrays that are copied into arrays of the backend, again and again."""

    def arrays(self) -> list[np.ndarray]:
        """What send() will copy: to be filled."""

    def send(self) -> None:
        """Copy them; what is computed from now on finds them there. The host does not wait."""


class Backend(Protocol):
    """The ops that have a kernel of ours. All else is `xp` code, which NumPy and CuPy share.

    Arrays are C-contiguous, NHWC and already checked: gpucnn.ops does that. They are float32 or
    float64, on a GPU also float16 or bfloat16, whose sums, statistics, biases and gradients of
    parameters are float32.
    """

    @property
    def name(self) -> str:
        """numpy or cupy."""

    @property
    def xp(self) -> ModuleType:
        """The array library."""

    @property
    def block_bytes(self) -> int:
        """How much memory one block of work should go over."""

    def asarray(self, a: Any, dtype: Any = None) -> Array:
        """a as a C-contiguous array of this backend, copied only if it must be."""

    def to_numpy(self, a: Array) -> np.ndarray:
        """a in host memory."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An uninitialised C-contiguous array, in memory that was used before if there is any."""

    def free_bytes(self) -> float:
        """How much memory arrays can still take: infinity where they lie in the host's."""

    def memory_in_use(self) -> tuple[float, float] | None:
        """Bytes that are taken of the device's memory, and all that it has; None if not known."""

    def free_unused(self) -> None:
        """Give memory back that is kept for arrays to come."""

    @property
    def norm_recomputes(self) -> bool:
        """Whether batch_norm_backward without a residual makes y from x, and needs none given."""

    @property
    def captures(self) -> bool:
        """Whether capture() makes CUDA graphs."""

    def capturing(self) -> bool:
        """Whether calls are captured into a CUDA graph now: nothing can be waited for then."""

    def graph_memory(self) -> Any:
        """What graphs that never run at the same time may share, to pass to capture()."""

    def capture(self, work: Callable[[], Any], memory: Any = None) -> Callable[[], None]:
        """A function that does again what work() does: on a GPU a CUDA graph of its launches.

        On the CPU it is work() itself. On a GPU work() must have run before, for its kernels to be
        compiled, and is called once more; nothing is computed before the graph is launched. Arrays
        that it reads must stay where they are, and what it returns elsewhere is written anew by
        each launch. Raises what CuPy raises against what cannot be captured.
        """

    def fetch(self, a: Array) -> Fetch:
        """Begin to copy what a holds now to the host; what is computed next need not wait."""

    def upload(self, targets: Sequence[Array]) -> Upload:
        """To fill arrays of the backend from the host while it computes."""

    def record_step(self, loss: Array, hits: Array, ring: Array, count: Array) -> None:
        """Write loss () and hits () to row count[0] % len(ring) of ring (rows, 2), doubles.

        count (1,) int64 is then one more.
        """

    def blocks(self, n: int, item_bytes: int, least_bytes: int = 0) -> list[slice]:
        """n items in blocks of about block_bytes, or of `least_bytes` where that is more.

        Their length depends on the arguments alone, so that sums over blocks are always the same.
        """

    def scratch_bytes(self, n: int, nbytes: int, block_nbytes: int) -> int:
        """Bytes that the CPU's threads have at a time of arrays that are made in blocks; GPUs: 0.

        nbytes: of the arrays for all n items. block_nbytes: what blocks() is told of all n items.
        """

    def for_each(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        """work(item) for each item, in any order; on the CPU by several threads."""

    def sum_over(self, work: Callable[..., None], items: Sequence[Any], like: Sequence[Array]
                 ) -> list[Array]:
        """The sums of what work(item, *totals) adds to arrays of zeros with the shapes of `like`.

        They are added in an order that depends on the number of items alone.
        """

    def matmul(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """The product of two matrices, written to `out` if it is given."""

    def conv2d(self, x: Array, w: Array, b: Array | None, window: Window, groups: int,
               activation: str | None, residual: Array | None = None, algorithm: str = "auto",
               tf32: bool = False) -> Array:
        """x (n, h, w, c), w (kh, kw, c / groups, c_out), b (c_out,) -> A (n, oh, ow, c_out).

        residual: of A's shape, added before the activation.
        algorithm: one of ALGORITHMS, which are the GPU's; NumPy always chooses for itself.
        tf32: whether products of float32 may be rounded to 10 bits, which tensor cores do.
        """

    def conv2d_with_moments(self, x: Array, w: Array, b: Array | None, window: Window,
                            groups: int, activation: str | None, residual: Array | None = None,
                            algorithm: str = "auto", tf32: bool = False
                            ) -> tuple[Array, Moments | None]:
        """conv2d, and the moments of A where its kernel can give them on the way."""

    def conv2d_backward(self, da: Array, a: Array, x: Array, w: Array, window: Window, groups: int,
                        activation: str | None, dw: Array | None, db: Array | None = None,
                        input_gradient: bool = True, algorithm: str = "auto",
                        tf32: bool = False) -> Array | None:
        """da and a (n, oh, ow, c_out), x and w as in conv2d -> dx; writes dw and db.

        dw, db: C-contiguous arrays for these gradients, or None: of w, where it is not learned.
        input_gradient: without it dx is None, and is not computed.
        """

    def start_conv2d_backward(self, da: Array, a: Array, x: Array, w: Array, window: Window,
                              groups: int, activation: str | None, dw: Array | None,
                              db: Array | None = None, input_gradient: bool = True,
                              algorithm: str = "auto", tf32: bool = False
                              ) -> Callable[[], Array | None]:
        """The same in two steps: writes dw and db, and what it returns is to be called for dx.

        In between da, a and x can be given up, unless one pass over the images makes all three.
        """

    def conv2d_plan(self, x_shape: tuple[int, ...], w_shape: tuple[int, ...], window: Window,
                    groups: int, dtype: Any, algorithm: str = "auto", input_gradient: bool = True,
                    tf32: bool = False) -> dict[str, PassPlan]:
        """How conv2d and conv2d_backward compute arrays of these shapes, by the pass.

        The passes are forward, input gradient (if it is wanted) and weight gradient. Raises
        ValueError where the algorithm cannot compute the convolution.
        """

    def dense(self, x: Array, w: Array, b: Array | None, activation: str | None,
              tf32: bool = False) -> Array:
        """x (n, inputs), w (inputs, units), b (units,) -> A (n, units)."""

    def dense_backward(self, da: Array, a: Array, x: Array, w: Array, activation: str | None,
                       dw: Array, db: Array | None = None, input_gradient: bool = True,
                       tf32: bool = False) -> Array | None:
        """da and a (n, units), x and w as in dense -> dx, None if unwanted; writes dw and db."""

    def activate(self, z: Array, other: Array | None, activation: str | None,
                 slope: float = LEAKY_SLOPE) -> Array:
        """A = g(z + other), of one shape and dtype. slope: of the leaky ReLU."""

    def activation_backward(self, da: Array, a: Array, activation: str | None,
                            slope: float = LEAKY_SLOPE) -> Array:
        """dz = dA g'(z), given A = g(z), of one shape and dtype; da itself without activation."""

    def gelu(self, x: Array) -> Array:
        """x P(x), P being the normal distribution; 0 and infinity at the infinities."""

    def gelu_backward(self, dy: Array, x: Array) -> Array:
        """dx = dy (P(x) + x p(x)), p being the density of P; dy and x of one shape and dtype."""

    def dense_plan(self, n: int, inputs: int, units: int, dtype: Any, input_gradient: bool = True,
                   tf32: bool = False) -> dict[str, PassPlan]:
        """As conv2d_plan, of dense and dense_backward for n samples."""

    def im2col(self, x: Array, window: Window) -> Array:
        """x (n, h, w, c) -> (n * oh * ow, kh * kw * c); padding counts as 0."""

    def col2im(self, cols: Array, x_shape: tuple[int, ...], window: Window) -> Array:
        """The adjoint of im2col: cols (n * oh * ow, kh * kw * c) -> x_shape."""

    def max_pool(self, x: Array, window: Window, relu: bool = False, want_mask: bool = True
                 ) -> tuple[Array, Array | None]:
        """x (n, h, w, c) -> y and mask (n, oh, ow, c); mask holds ky * kw + kx of each maximum.

        relu: y is max(0, the maximum), and the mask holds -1, in a byte 255, where that is 0.
        """

    def max_pool_backward(self, dy: Array, mask: Array, x_shape: tuple[int, ...],
                          window: Window) -> Array:
        """The adjoint of max_pool, given its mask: dy (n, oh, ow, c) -> dx of x_shape."""

    def avg_pool(self, x: Array, window: Window) -> Array:
        """x (n, h, w, c) -> (n, oh, ow, c), the mean over the pixels that each window sees."""

    def avg_pool_backward(self, dy: Array, x_shape: tuple[int, ...], window: Window) -> Array:
        """The adjoint of avg_pool: dy (n, oh, ow, c) -> dx of x_shape."""

    def global_avg_pool(self, x: Array) -> Array:
        """x (n, h, w, c) -> (n, c), the mean over the image."""

    def global_avg_pool_backward(self, dy: Array, x_shape: tuple[int, ...]) -> Array:
        """The adjoint of global_avg_pool: dy (n, c) -> dx of x_shape."""

    def dropout(self, x: Array, rate: float, key: int, stream: Array) -> Array:
        """x with elements zeroed where gpucnn.rng draws below `rate`, the rest / (1 - rate).

        stream: (1,) int64, of the backend: a captured graph reads it anew each time.
        """

    def gather_batch(self, images: Array, labels: Array, order: Array, cursor: Array, n: int,
                     table: Array, augmentation: Augmentation, key: int, streamed: int = 0,
                     choices: Array | None = None, classes: int = 0) -> tuple[Array, Array]:
        """A batch of a data set, augmented: x (n, h, w, c) of the dtype of the table, y (n,) int64;
        or y (n, classes) float32 where images are mixed.

        images (total, h, w, c) uint8; labels and order (total,) int64; cursor (2,) int64, the place
            in the order where the batch begins and the epoch, read where they lie: no launch
            depends on them.
        streamed: 0; or how many images the data set has, where `images` and `labels` are only
            those whose numbers are in `order`, one for one.
            With mixup the batch is followed by one image more, with which its last one is mixed.
        table: Augmentation.table. key: image i of epoch e draws words 4 i to 4 i + 3 of stream e.
        choices: Augmentation.choices, where it blends. classes: of the labels, for mixup.

        An image that is not there, or a place past the end of the order, gives NaN and label -1.
        """

    def batch_norm_statistics(self, x: Array, running_mean: Array, running_var: Array,
                              momentum: float, moments: Moments | None = None
                              ) -> tuple[Array, Array]:
        """mean and var (c,) of x (..., c) over all other axes, of at least 2 values a channel.

        The running ones are moved towards them, by the share momentum; they count var divided by
        (values - 1), and what is returned by values. moments: of x, where they are known.
        """

    def batch_norm(self, x: Array, mean: Array, var: Array, gamma: Array, beta: Array,
                   epsilon: float, residual: Array | None, activation: str | None) -> Array:
        """g(gamma (x - mean) / sqrt(var + epsilon) + beta + residual), of the shape of x.

        x, residual (..., c), the others (c,); activation: None or "relu".
        """

    def batch_norm_backward(self, dy: Array, x: Array, y: Array | None, mean: Array, var: Array,
                            gamma: Array, beta: Array, epsilon: float, activation: str | None,
                            dgamma: Array, dbeta: Array, has_residual: bool
                            ) -> tuple[Array, Array | None]:
        """dx and dresidual (None without one) of batch_norm with the statistics of x itself.

        y: what it gave, None without an activation, or where norm_recomputes. dgamma, dbeta (c,):
        written. dresidual is dy itself where there is no activation.
        """

    def softmax_cross_entropy(self, logits: Array, labels: Array, label_smoothing: float,
                              loss_scale: Array | None = None) -> tuple[Array, Array, Array]:
        """logits (n, classes), labels (n,) -> loss (), dlogits (n, classes), hits ().

        hits: how many labels are the first maximum of their row; a row with a NaN has none.
        loss_scale: None, or doubles on the device, with the first of which dlogits are multiplied.
        Logits may be float16 or bfloat16: the loss is float32 then, dlogits are like the logits.
        """

    def sum_of_squares(self, g: Array) -> Array:
        """Doubles (any number,) whose sum is that of the squares of g (size,)."""

    def apply_update(self, u: Update) -> None:
        """One step of an optimiser; without effect where its loss is not finite."""

    def apply_average(self, a: Averaging) -> None:
        """Move an average of the parameters after such a step; without effect where that had none.
        """


def get_backend() -> Backend:
    """The innermost use_backend() block's, else what GPUCNN_BACKEND says now (default auto)."""
    chosen = _override.get()
    if chosen is not None:
        return chosen
    return make_backend(os.environ.get("GPUCNN_BACKEND", "auto"))


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Layers made inside the block use the named backend, and keep it afterwards."""
    backend = make_backend(name)
    token = _override.set(backend)
    try:
        yield backend
    finally:
        _override.reset(token)


@functools.cache
def make_backend(name: str) -> Backend:
    """The one instance of the named backend. Asking for "cupy" never falls back to NumPy.

    name: "numpy", "cupy", or "auto", which takes CuPy where it can work and says once, on
        standard error, which one it took and why.

    Raises ValueError for another name, BackendError where CuPy cannot work.
    """
    if name == "auto":
        obstacle = cupy_obstacle()
        backend = make_backend("numpy" if obstacle else "cupy")
        print(f"gpucnn: backend {backend.name} ({obstacle or 'a GPU is usable'}); "
              "set GPUCNN_BACKEND to choose", file=sys.stderr)
        return backend
    if name == "numpy":
        from gpucnn.backend.numpy_backend import NumpyBackend
        return NumpyBackend()
    if name == "cupy":
        obstacle = cupy_obstacle()
        if obstacle:
            raise BackendError(f"GPUCNN_BACKEND=cupy but {obstacle}, or set GPUCNN_BACKEND=numpy")
        from gpucnn.backend.cupy_backend import CupyBackend
        return CupyBackend()
    raise ValueError(f"GPUCNN_BACKEND={name!r} is not known; use 'numpy', 'cupy' or 'auto'")


def convolution_algorithm(of_layer: str) -> str:
    """GPUCNN_CONV, where it is set, else the layer's own. Raises ValueError for an unknown one."""
    chosen = os.environ.get("GPUCNN_CONV")
    if chosen and chosen not in ALGORITHMS:
        raise ValueError(f"GPUCNN_CONV={chosen!r} is not known; use "
                         f"{', '.join(map(repr, ALGORITHMS))}")
    return chosen or of_layer


def backend_of(array: Array) -> Backend:
    """The backend that an array belongs to, by its type."""
    return make_backend("cupy" if type(array).__module__.split(".")[0] == "cupy" else "numpy")


def cupy_obstacle() -> str | None:
    """Why CuPy cannot work here and what to do about it; None if it can."""
    try:
        import cupy
    except ImportError as e:
        if isinstance(e, ModuleNotFoundError) and e.name == "cupy":
            return "CuPy is not installed; pip install 'gpucnn[cuda12]' (or cuda13)"
        reason = str(e.__cause__ or e)  # CuPy wraps the error that says why in a page of advice
        return f"CuPy cannot be imported ({' '.join(reason.split())}); reinstall it"
    try:
        if cupy.cuda.runtime.getDeviceCount() > 0:
            return None
        cause = "cudaErrorNoDevice"
    except cupy.cuda.runtime.CUDARuntimeError as e:
        cause = str(e)
    if "NoDevice" in cause:
        remedy = "check nvidia-smi and CUDA_VISIBLE_DEVICES"
    else:
        remedy = "install or update the NVIDIA driver until nvidia-smi works"
    return f"CuPy {cupy.__version__} found no usable GPU ({cause}); {remedy}"


_override: ContextVar[Backend | None] = ContextVar("gpucnn_backend", default=None)
