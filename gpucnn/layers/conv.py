"""The convolution layer of the article."""
from __future__ import annotations

import math

from gpucnn import activations
from gpucnn.backend import ALGORITHMS, Array, PassPlan
from gpucnn.geometry import (
    IntOrPair,
    Padding,
    Window,
    check_groups,
    integer,
    make_window,
    pair,
)
from gpucnn.layers.base import Layer, LayerMemory, Parameter, Shape
from gpucnn.layers.initializers import constant, dirac, he_normal
from gpucnn.ops import check_channels

INITIALIZERS = ("he", "dirac")


class Conv2D(Layer):
    """Z = W * A + b, then A = g(Z): (n, h, w, c) -> (n, oh, ow, filters).

    filters: how many, the channels of the output.
    kernel_size, stride, dilation, padding, groups, activation: as in gpucnn.ops.conv2d.
    bias: whether there is a b; batch normalisation after it would take it out again.
    algorithm: how a GPU computes it: "auto", "implicit_gemm", "im2col" or "direct" (one to four
        channels, or depthwise). The environment variable GPUCNN_CONV, where set, overrides it.
        summary(input_shape, plan=True) shows what "auto" chose.
    initializer: of w: "he" for He's normal distribution, or "dirac", with which the first filters
        pass on a channel each (gpucnn.layers.base.dirac).

    Parameters: w (kh, kw, c / groups, filters); b (filters,), 0.
    """

    kind = "conv"
    w: Parameter
    b: Parameter | None

    def __init__(self, filters: int, kernel_size: IntOrPair = 3, *, stride: IntOrPair = 1,
                 padding: Padding = 0, dilation: IntOrPair = 1, groups: int = 1,
                 activation: str | None = None, bias: bool = True, algorithm: str = "auto",
                 initializer: str = "he", **options):
        super().__init__(**options)
        self.filters = integer(self.where, "filters", filters)
        self.kernel_size = pair(self.where, "kernel_size", kernel_size)
        self.stride = pair(self.where, "stride", stride)
        self.dilation = pair(self.where, "dilation", dilation)
        self.padding = padding
        self.groups = groups
        self.activation = activation
        self.bias = bias
        self.algorithm = algorithm
        self.initializer = initializer
        self._windows: dict[tuple[int, int], Window] = {}  # by the height and width of the input
        activations.check_name(self.where, activation)
        if algorithm not in ALGORITHMS:
            raise ValueError(f"{self.where}: algorithm {algorithm!r} is not known; use "
                             f"{', '.join(map(repr, ALGORITHMS))}")
        if initializer not in INITIALIZERS:
            raise ValueError(f"{self.where}: initializer {initializer!r} is not known; use "
                             f"{', '.join(map(repr, INITIALIZERS))}")

    def declare(self, input_shape: Shape) -> Shape:
        self._check_shape((1, *input_shape), 4)
        c = input_shape[2]
        check_groups(self.where, self.groups, c, self.filters)
        fan_in = math.prod(self.kernel_size) * c // self.groups
        self.w = self.add_parameter("w", (*self.kernel_size, c // self.groups, self.filters),
                                    dirac(fan_in, self.groups) if self.initializer == "dirac"
                                    else he_normal(fan_in), decay=True)
        self.b = self.add_parameter("b", (self.filters,), constant(0), decay=False) \
            if self.bias else None
        self.plan(batch=1)
        return (*self.window.out_size(*input_shape[:2]), self.filters)

    def forward(self, x: Array, training: bool = False) -> Array:
        return self._forward(x, None, self.activation, training)

    def _forward(self, x: Array, residual: Array | None, activation: str | None, training: bool
                 ) -> Array:
        x = self.receive(x, 4)
        check_channels(self.where, x.shape, self.w.shape[2], self.groups)
        window = self._window(x.shape)
        if residual is not None:
            self.check_residual((len(x), *window.out_size(*x.shape[1:3]), self.filters), residual)
        arguments = (x, self.w.cast, self.b.data if self.b else None, window, self.groups,
                     activation, residual, self.algorithm, self.precision.tf32)
        if training and self.feeds_norm:
            a, moments = self.backend.conv2d_with_moments(*arguments)
            self.output_moments = None if moments is None else (a, moments)
        else:
            a = self.backend.conv2d(*arguments)
        self.save(training, x, a if self.activation else None, a.shape, window)
        return a

    def forward_added(self, x: Array, residual: Array, activation: str | None,
                      training: bool = False) -> Array:
        if not self.adds(activation):
            return super().forward_added(x, residual, activation, training)
        a = self._forward(x, residual, activation, training)
        return self.save_added(a, activation, training)

    def adds(self, activation: str | None) -> bool:
        return self.activation is None  # it would come before the addition

    def backward(self, dy: Array) -> Array:
        return self._backward(dy, input_gradient=True)

    def backward_parameters(self, dy: Array) -> None:
        self._backward(dy, input_gradient=False)

    def _backward(self, dy: Array, input_gradient: bool) -> Array:
        x, a, shape, window = self.take_saved()
        da = self.receive_gradient(dy, shape)
        finish = self.backend.start_conv2d_backward(
            da, da if a is None else a, x, self.w.cast, window, self.groups, self.activation,
            self.w.grad, self.b.grad if self.b else None, input_gradient, self.algorithm,
            self.precision.tf32)
        del da, a, x  # before there is memory for dx
        return finish()

    def plan(self, batch: int, input_gradient: bool = True) -> dict[str, PassPlan]:
        """As Layer.plan. Raises ValueError where the algorithm cannot compute this convolution."""
        window = self.window  # says itself where it does not fit
        try:
            return self.backend.conv2d_plan(
                (batch, *self.input_shape), self.w.shape, window,
                self.groups, self.dtype, self.algorithm, input_gradient, self.precision.tf32)
        except ValueError as e:
            raise ValueError(f"{self.where}: {e}") from None

    @property
    def window(self) -> Window:
        """Over images of the shape that the layer was built for."""
        return self._window((1, *self.input_shape))

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        plans = self.plan(batch, input_gradient)
        forward, dw, dx = (plans.get(name, PassPlan("")) for name in (
            "forward", "weight gradient", "input gradient"))
        needs = [plan.workspace - sum(plan.kept.values()) for plan in (forward, dw, dx)]
        saves = "xy" if self.activation else "x"
        x, y = (self.nbytes(batch, shape) for shape in (self.input_shape, self.output_shape))
        dz = y if self.activation else 0
        if dw.in_steps:
            backward: tuple[tuple[str, int], ...] = ((saves, dz), ("x", dz + needs[1]))
            if input_gradient:
                backward = (*backward, ("", dz + needs[2]))
        else:  # in blocks
            dz = self.backend.scratch_bytes(batch, dz, x * self.kernel_size[1] + y)
            backward = ((saves, dz + needs[1] + needs[2]),)
        scratch = {name: max(forward.kept.get(name, 0), dw.kept.get(name, 0))
                   for name in (*forward.kept, *dw.kept)}
        return LayerMemory(saves, forward=needs[0], backward=backward, scratch=scratch)

    def multiply_adds(self) -> int:
        return math.prod(self.output_shape[:2]) * self.w.size

    def _window(self, x_shape: Shape) -> Window:
        size = x_shape[1], x_shape[2]
        if size not in self._windows:
            self._windows[size] = make_window(self.where, self.kernel_size, self.stride,
                                              self.padding, self.dilation, size,
                                              size_name="kernel_size")
        return self._windows[size]
