"""Convolution on the GPU: which kernel does which part, in what tiles, and its launch.

docs/kernels.md explains the kernels, conv_gemm.cu, conv_weight_gradient.cu and conv_direct.cu. The
rule by which `auto` chooses among them is stated here, and what it chose can be read from the
plans: forward_plan, input_gradient_plan and weight_gradient_plan are functions of shapes alone.
"""
from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import cupy
import numpy as np

from gpucnn import activations
from gpucnn.backend import LEAKY_SLOPE, tile_costs
from gpucnn.backend.cuda_kernel import Kernel, accumulator
from gpucnn.backend.tile_costs import Cost
from gpucnn.geometry import Window

DIRECT_INPUTS = 4      # a direct kernel reads at most so many channels a group
# In 16 bits tiles were 1.2, 1.5 and 2.7 times as fast on an H100 with 24, 32 and 64 filters.
DIRECT_FILTERS_16_BITS = 23
DIRECT_THREADS = ROW_THREADS = 256  # in a block, as conv_direct.cu and activation.cu say
ROWS_A_LANE = 16       # at least, that a thread of activation.cu adds
DIRECT_TERMS = 9       # terms of the weight gradient that a thread keeps in registers
MAX_DIRECT_TERMS = 32  # of the weight gradient, where a tile of a matrix product is filled by more
MAX_SPLITS = 64
TERMS_A_SPLIT = 256    # at least: a block must have something to do before it writes its slab
BLOCKS_EACH = 2        # blocks that a multiprocessor runs at a time
TERM_BYTES = 64        # of k that a tile of tensor_tile.cuh is long
WGMMA_ALIGNMENT = 1024  # bytes, of wgmma_tile.cuh's tiles


class Tile(NamedTuple):
    """How a block divides its m x n part of a matrix product.

    part_m, part_n: the sums of a thread, or with `stages` those of a warp on tensor cores, with
        wgmma those of a warpgroup.
    stages: how many tiles of the factors are in shared memory at a time; 0 without tensor cores.
    speed: an estimate of its share of the largest tile's products per second, while it is full;
        for where tile_costs.py has no measured ones.
    """

    m: int
    n: int
    part_m: int
    part_n: int
    speed: float
    stages: int = 0
    wgmma: bool = False

    @property
    def threads(self) -> int:
        threads_a_part = 128 if self.wgmma else 32 if self.stages else 1
        return self.m * self.n // (self.part_m * self.part_n) * threads_a_part

    @property
    def constants(self) -> dict[str, int]:
        """What gemm_tile.cuh, tensor_tile.cuh or wgmma_tile.cuh leaves to the launcher."""
        if self.stages:
            return {"TILE_M": self.m, "TILE_N": self.n, "WARP_M": self.part_m,
                    "WARP_N": self.part_n, "STAGES": self.stages, "WGMMA": int(self.wgmma)}
        return {"TILE_M": self.m, "TILE_N": self.n, "QUADS_M": self.part_m // 4,
                "QUADS_N": self.part_n // 4}

    def shared(self, itemsize: int, weight_gradient: bool = False) -> int:
        """Bytes of dynamic shared memory that a block of a kernel on tensor cores needs."""
        if not self.stages:
            return 0
        corners = self.threads // 32 * 16 * (self.part_n + 8) * 4
        if self.wgmma:
            return max(self.stages * (self.m + self.n) * 128, corners) + WGMMA_ALIGNMENT
        k, gap = TERM_BYTES // itemsize, 32 if itemsize == 4 else 0
        a = k * (self.m * itemsize + gap) if weight_gradient else self.m * TERM_BYTES
        return max(self.stages * (a + k * (self.n * itemsize + gap)), corners)


TILES = (Tile(128, 128, 8, 8, 1.0), Tile(128, 64, 8, 8, 0.9), Tile(64, 64, 8, 8, 0.75),
         Tile(64, 32, 8, 4, 0.6), Tile(32, 32, 4, 4, 0.4))
TENSOR_TILES = (Tile(128, 128, 64, 32, 1.0, 4), Tile(128, 64, 64, 32, 0.9, 4),
                Tile(64, 64, 32, 32, 0.7, 4), Tile(128, 32, 32, 32, 0.6, 4),
                Tile(32, 32, 16, 16, 0.3, 3))
# For 16-bit elements on sm_90, for which tile_costs.py has measured costs.
WGMMA_TILES = (Tile(128, 128, 128, 128, 1.0, 4, True), Tile(256, 128, 128, 128, 1.0, 4, True),
               Tile(128, 64, 128, 64, 0.9, 4, True))


class Plan(NamedTuple):
    """How one pass of a convolution is computed.

    workspace: bytes beside its arrays; of im2col, gpucnn/convolution.py has them.
    """

    algorithm: str
    tile: Tile | None = None
    splits: int = 1
    workspace: int = 0

    def blocks(self, rows: int, columns: int) -> int:
        """Of one product of so many rows and columns, all splits together."""
        assert self.tile is not None
        return -(-rows // self.tile.m) * -(-columns // self.tile.n) * self.splits

    @property
    def cores(self) -> str:
        """" on tensor cores", " by wgmma", or nothing."""
        if not self.tile or not self.tile.stages:
            return ""
        return " by wgmma" if self.tile.wgmma else " on tensor cores"

    def __str__(self) -> str:
        tile = f" {self.tile.m}x{self.tile.n}{self.cores}" if self.tile else ""
        return f"{self.algorithm}{tile}" + (f" / {self.splits}" if self.splits > 1 else "")


class Problem(NamedTuple):
    """The sizes of a convolution. x is (n, h, w, c), y is (n, oh, ow, c_out).

    tensor: whether its products are to be done on tensor cores.
    """

    n: int
    h: int
    w: int
    c: int
    oh: int
    ow: int
    c_out: int
    groups: int
    window: Window
    dtype: np.dtype
    tensor: bool = False

    @classmethod
    def of(cls, x_shape: tuple[int, ...], c_out: int, window: Window, groups: int,
           dtype: np.dtype, tensor: bool = False) -> Problem:
        """tensor: whether tensor cores may be used. They are where channels fill 16 bytes."""
        n, h, w, c = x_shape
        dtype = np.dtype(dtype)
        full = c // groups * dtype.itemsize % 16 == 0 == c_out // groups * dtype.itemsize % 16
        return cls(n, h, w, c, *window.out_size(h, w), c_out, groups, window, dtype,
                   tensor and full and dtype.itemsize <= 4)

    @property
    def inputs(self) -> int:
        """Input channels that an output channel reads."""
        return self.c // self.groups

    @property
    def depthwise(self) -> bool:
        return self.groups == self.c == self.c_out

    @property
    def direct(self) -> bool:
        """Whether conv_direct.cu can do it."""
        return self.depthwise or (self.groups == 1 and self.c <= DIRECT_INPUTS)

    @property
    def gradient_phases(self) -> tuple[int, int]:
        """How many phases conv_gemm.cu divides dx into, and the pixels of the largest."""
        v = self.window
        return (max(1, min(v.sh, self.h) * min(v.sw, self.w)),
                self.n * -(-self.h // v.sh) * -(-self.w // v.sw))

    @property
    def arguments(self) -> tuple[int, ...]:
        """As each kernel of a convolution takes them."""
        v = self.window
        return (self.n, self.h, self.w, self.c, self.oh, self.ow, v.kh, v.kw, v.sh, v.sw, v.top,
                v.left, v.dh, v.dw)


def forward_plan(p: Problem, algorithm: str = "auto", processors: int | None = None,
                 tile: Tile | None = None) -> Plan:
    """How y is computed. processors: the multiprocessors of the GPU, by default this one's; tile:
    the only one that implicit_gemm may choose.

    `auto` is direct where there is a kernel for it (Problem.direct), but not for many filters in
    16 bits, else implicit_gemm. Raises ValueError for `direct` where there is none.
    """
    if algorithm == "direct" and not p.direct:
        in_groups = f" in {p.groups} groups" if p.groups > 1 else ""
        raise ValueError(
            f"no direct convolution of {p.c} channels to {p.c_out}{in_groups}: it takes at most "
            f"{DIRECT_INPUTS} channels, or a group for each; choose 'auto' or 'implicit_gemm'")
    few = p.depthwise or p.dtype.itemsize > 2 or p.c_out <= DIRECT_FILTERS_16_BITS
    if algorithm == "direct" or (algorithm == "auto" and p.direct and few):
        return Plan("direct")
    if algorithm == "im2col":
        return Plan("im2col")
    return _gemm_plan(p, p.n * p.oh * p.ow, p.c_out // p.groups, p.window.places * p.inputs,
                      p.groups, p.n * p.oh * p.ow * p.c_out, processors, tile)


def input_gradient_plan(p: Problem, algorithm: str = "auto", processors: int | None = None,
                        tile: Tile | None = None) -> Plan:
    """How dx is computed: `direct` and `auto` are direct where the convolution is depthwise."""
    if p.depthwise and algorithm in ("direct", "auto"):
        return Plan("direct")
    if algorithm == "im2col":
        return Plan("im2col")
    phases, rows = p.gradient_phases
    terms = -(-p.window.places // phases) * (p.c_out // p.groups)
    return _gemm_plan(p, rows, p.inputs, terms, p.groups * phases, p.n * p.h * p.w * p.c,
                      processors, tile)


def weight_gradient_plan(p: Problem, algorithm: str = "auto", processors: int | None = None,
                         tile: Tile | None = None) -> Plan:
    """How dw is computed. `auto` is direct where that is possible and dw has few rows."""
    terms = p.window.places * p.inputs
    pixels, size = p.n * p.oh * p.ow, terms * p.c_out
    few = p.depthwise or terms <= MAX_DIRECT_TERMS
    if p.direct and (algorithm == "direct" or (algorithm == "auto" and few)):
        splits = max(1, min(BLOCKS_EACH * (processors or _processors()), pixels // TERMS_A_SPLIT))
        return Plan("direct", None, splits, _slabs(size, splits, p.dtype))
    if algorithm == "im2col":
        return Plan("im2col")
    return _gemm_plan(p, terms, p.c_out // p.groups, pixels, p.groups, size, processors, tile,
                      weight_gradient=True)


def possible_tiles(p: Problem, weight_gradient: bool = False) -> dict[Tile, Cost]:
    """Those in which this GPU can compute the products, and what a block of each costs."""
    if p.tensor and p.dtype.itemsize == 2 and capability() == 90:
        return dict(zip(TENSOR_TILES + WGMMA_TILES, tile_costs.MEASURED_WEIGHT_GRADIENT
                        if weight_gradient else tile_costs.MEASURED))
    return {tile: tile_costs.estimated(tile.speed) for tile in
            (TENSOR_TILES if p.tensor else TILES)}


def _gemm_plan(p: Problem, rows: int, columns: int, terms: int, products: int, size: int,
               processors: int | None, only: Tile | None, weight_gradient: bool = False) -> Plan:
    """The tile and the splits of `products` products (rows x terms) (terms x columns).

    Those that take the shortest time by the estimate of tile_costs.py, in products of a processor,
    and where the sum is split, what writing and reading `size` partial sums takes.

    A sum is split until all processors are full, if it is long enough for that: once so far that
    all blocks run at a time, and once further, by the least that leaves none idle.
    """
    processors = processors or _processors()
    a_word = (tile_costs.TENSOR_PRODUCTS_A_WORD if p.tensor else tile_costs.PRODUCTS_A_WORD)
    best, least = None, math.inf
    for tile, cost in possible_tiles(p, weight_gradient).items():
        if tile != (only or tile):
            continue
        blocks = max(1, -(-rows // tile.m) * -(-columns // tile.n) * products)
        at_once = cost.resident * processors
        for wanted in (at_once // blocks, -(-at_once // blocks)):
            splits = max(1, min(wanted, terms // TERMS_A_SPLIT, MAX_SPLITS))
            time = tile_costs.time_of(cost, tile.m, tile.n, -(-terms // splits), blocks * splits,
                                      processors)
            if splits > 1:
                time += a_word * (2 * splits + 1) * size / processors
            if time < least:
                best, least = (tile, splits), time
    assert best is not None
    tile, splits = best
    return Plan("implicit_gemm", tile, splits, _slabs(size, splits, p.dtype))


def _slabs(size: int, splits: int, dtype: np.dtype) -> int:
    return size * splits * accumulator(dtype).itemsize if splits > 1 else 0


# ------------------------------------------------------------------------------------- launches

_forward = Kernel("conv_gemm.cu", "conv_forward")
_input_gradient = Kernel("conv_gemm.cu", "conv_input_gradient")
_finish_splits = Kernel("finish_splits.cu", "finish_splits")
_weight_gradient = Kernel("conv_weight_gradient.cu", "conv_weight_gradient")
_tensor_forward = Kernel("conv_tensor.cu", "conv_tensor_forward")
_tensor_input_gradient = Kernel("conv_tensor.cu", "conv_tensor_input_gradient")
_tensor_weight_gradient = Kernel("conv_tensor_weight_gradient.cu", "conv_tensor_weight_gradient")
_direct = Kernel("conv_direct.cu", "conv_direct")
_depthwise_input_gradient = Kernel("conv_direct.cu", "conv_depthwise_input_gradient")
_direct_weight_gradient = Kernel("conv_direct.cu", "conv_direct_weight_gradient")
_sum_splits = Kernel("sum_splits.cu", "sum_splits")
_activate = Kernel("activation.cu", "activate_sum")
_activation_backward = Kernel("activation.cu", "activation_backward")
_activation_backward_bias = Kernel("activation.cu", "activation_backward_bias")


def forward(p: Problem, plan: Plan, x: Any, w: Any, b: Any, residual: Any,
            activation: str | None, moments: Any = None) -> Any:
    """y = g(x * w + b + residual), by a plan that is not im2col's. b and residual may be None.

    moments: an array (row tiles, 2, c_out) for those of y; only for a plan of tiles, not split.
    """
    y = cupy.empty((p.n, p.oh, p.ow, p.c_out), x.dtype)
    activated: dict[str, Any] = {"ACTIVATION": _activation_code(activation)}
    arrays = (x, w, y) if residual is None else (x, w, y, residual)
    if plan.tile is None:
        vec = _wide(p.c_out, *arrays)
        _direct(y.size // vec, x, w, b, residual, y, *p.arguments, p.c_out, vec=vec,
                **_direct_constants(p), **activated)
        return y
    outputs, partial = p.c_out // p.groups, _slab_array(plan, y.size, x.dtype)
    blocks = plan.blocks(p.n * p.oh * p.ow, outputs) * p.groups
    kernel, options = _options(plan.tile, _forward, _tensor_forward, p.inputs, outputs, arrays)
    kernel.launch(blocks, plan.tile.threads, x, w, b, residual, y, partial, moments,
                  *p.arguments, p.c_out, p.groups, plan.splits, MOMENTS=int(moments is not None),
                  **options, **activated)
    if partial is not None:
        _finish_splits(y.size, partial, b, residual, y, y.size, p.c_out, plan.splits, **activated)
    return y


def input_gradient(p: Problem, plan: Plan, dz: Any, w: Any) -> Any:
    """dx of x's shape, by a plan that is not im2col's."""
    dx = cupy.empty((p.n, p.h, p.w, p.c), dz.dtype)
    if plan.tile is None:
        vec = _wide(p.c, dz, w, dx)
        _depthwise_input_gradient(dx.size // vec, dz, w, dx, *p.arguments, vec=vec, ACTIVATION=0,
                                  **_direct_constants(p))
        return dx
    partial, (phases, rows) = _slab_array(plan, dx.size, dz.dtype), p.gradient_phases
    blocks = plan.blocks(rows, p.inputs) * phases * p.groups
    kernel, options = _options(plan.tile, _input_gradient, _tensor_input_gradient,
                               p.c_out // p.groups, p.inputs, (dz, w, dx))
    kernel.launch(blocks, plan.tile.threads, dz, w, dx, partial, *p.arguments, p.c_out, p.groups,
                  plan.splits, **options, ACTIVATION=0, MOMENTS=0)
    if partial is not None:
        _finish_splits(dx.size, partial, None, None, dx, dx.size, p.c, plan.splits, ACTIVATION=0)
    return dx


def weight_gradient(p: Problem, plan: Plan, x: Any, dz: Any, dw: Any) -> None:
    """Write dw (kh, kw, c / groups, c_out), by a plan that is not im2col's."""
    if dz.size == 0:
        dw.fill(0)
        return
    slabs = _slab_array(plan, dw.size, x.dtype)
    out = dw if slabs is None else slabs
    if plan.tile is None:
        vec = _wide(p.c_out, x, dz)
        grid = (plan.splits, -(-p.c_out // vec // DIRECT_THREADS),
                -(-dw.size // p.c_out // DIRECT_TERMS))
        _direct_weight_gradient.launch(grid, DIRECT_THREADS, x, dz, out, *p.arguments, p.c_out,
                                       vec=vec, ACTIVATION=0, **_direct_constants(p))
    else:
        outputs = p.c_out // p.groups
        blocks = plan.blocks(dw.size // p.c_out, outputs) * p.groups
        kernel, options = _options(plan.tile, _weight_gradient, _tensor_weight_gradient, p.inputs,
                                   outputs, (x, dz))
        kernel.launch(blocks, plan.tile.threads, x, dz, out, *p.arguments, p.c_out, p.groups,
                      plan.splits, **options)
    if slabs is not None:
        _sum_splits(dw.size, slabs, dw, dw.size, plan.splits)


def activate(z: Any, other: Any, activation: str | None, slope: float) -> Any:
    """g(z + other), of z's shape; other may be None."""
    a = cupy.empty(z.shape, z.dtype)
    vec = _wide(z.size, z, *([] if other is None else [other]))
    _activate(a.size // vec, z, other, a, a.size, slope, vec=vec,
              ACTIVATION=_activation_code(activation))
    return a


def activation_backward(da: Any, a: Any, activation: str | None, db: Any = None,
                        slope: float = LEAKY_SLOPE) -> Any:
    """dz = da g'(z); the sum of its rows is written to db (c,), unless that is None."""
    if activation is None and db is None:
        return da
    dz = None if activation is None else cupy.empty(da.shape, da.dtype)
    if db is None:
        vec = _wide(da.size, da, a)
        _activation_backward(da.size // vec, da, a, dz, da.size, slope, vec=vec,
                             ACTIVATION=_activation_code(activation))
        return dz
    c = da.shape[-1]
    rows, vec = da.size // c, _wide(c, da, a)
    lanes = max(1, ROW_THREADS // (c // vec))
    splits = max(1, min(BLOCKS_EACH * _processors(), rows // (ROWS_A_LANE * lanes)))
    slabs = db if splits == 1 else cupy.empty((splits, c), accumulator(da.dtype))
    _activation_backward_bias.launch(splits, ROW_THREADS, da, a, dz, slabs, rows, c, vec=vec,
                                     ACTIVATION=_activation_code(activation))
    if splits > 1:
        _sum_splits(c, slabs, db, c, splits)
    return da if dz is None else dz


def _activation_code(activation: str | None) -> int:
    """As activation.cuh counts."""
    return 0 if activation is None else 1 + activations.NAMES.index(activation)


def _direct_constants(p: Problem) -> dict[str, Any]:
    return {"DEPTHWISE": int(p.depthwise), "TERMS": DIRECT_TERMS}


def _slab_array(plan: Plan, size: int, dtype: np.dtype) -> Any:
    return cupy.empty((plan.splits, size), accumulator(dtype)) if plan.splits > 1 else None


def _options(tile: Tile, ordinary: Kernel, tensor: Kernel, terms: int, results: int,
             arrays: tuple) -> tuple[Kernel, dict[str, Any]]:
    """Which kernel computes a product in such tiles, and what it is launched with.

    terms, results: channels that are neighbours in memory among the terms, and the results.
    """
    if tile.stages:
        itemsize = arrays[0].itemsize
        return tensor, {"vec": 16 // itemsize, **tile.constants,
                        "shared": tile.shared(itemsize, tensor is _tensor_weight_gradient),
                        "architecture": "sm_90a" if tile.wgmma else ""}
    return ordinary, {"vec": _four(terms, *arrays), "VEC_N": _four(results, *arrays),
                      **tile.constants}


def _four(channels: int, *arrays: Any) -> int:
    """How many channels a product's kernel reads at once: 4 where all can, else 1."""
    return 4 if channels % 4 == 0 and _aligned(4, arrays) else 1


def _wide(channels: int, *arrays: Any) -> int:
    """How many channels a kernel bound by memory handles at once: 16 bytes' worth, or 1."""
    vec = 16 // arrays[0].itemsize
    return vec if channels % vec == 0 and _aligned(vec, arrays) else 1


def _aligned(vec: int, arrays: tuple) -> bool:
    return all(a.data.ptr % (vec * a.itemsize) == 0 for a in arrays)


def capability() -> int:
    """The compute capability of the current GPU: 90 for 9.0."""
    return int(cupy.cuda.Device().compute_capability)


@functools.cache
def _processors_of(device: int) -> int:
    return cupy.cuda.runtime.getDeviceProperties(device)["multiProcessorCount"]


def _processors() -> int:
    """The multiprocessors of the current GPU."""
    return _processors_of(cupy.cuda.Device().id)
