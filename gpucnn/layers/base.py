"""What every layer is: a forward pass that saves what its backward pass needs."""
from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np

from gpucnn.backend import Array, PassPlan, get_backend
from gpucnn.geometry import is_int
from gpucnn.layers.initializers import Initializer, Shape
from gpucnn.ops import as_array
from gpucnn.precision import make_precision

# The random numbers of one seed never overlap: parameter i of a model draws from stream i of the
# key `seed`, layer i from a key of its own that has these high bits.
_LAYER_KEYS = 0xD809_0000_0000_0000
# Each parameter starts at a multiple of so many elements of the flat arrays: 16 bytes or more that
# a GPU reads at once, in a 16-bit copy too. The gaps hold zeros, and so do their gradients.
ALIGNMENT = 8


class Parameter:
    """An array to learn, and the gradient that the last backward pass left for it.

    data and grad are views into two flat arrays of the model, once it is built. cast is what
    products read: data itself, or in mixed precision a view into a flat 16-bit copy, which the
    optimizer writes with data. After writing to data yourself, call the model's cast_parameters().
    """

    def __init__(self, shape: Shape, initializer: Initializer, decay: bool):
        self.shape = shape
        self.initializer = initializer
        self.decay = decay
        self.data: Array = None
        self.grad: Array = None
        self.cast: Array = None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


class LayerMemory(NamedTuple):
    """What a layer's passes have in memory for a batch, beside their input and what they give.

    saves: "x" and "y" in any order: which of its input and its output forward() keeps.
    other: bytes that it keeps for backward() beside.
    forward: bytes that forward() takes for a while.
    backward: the parts of backward(), in order: what of `saves` is kept so long, and bytes that the
        part takes. dx is made in the last.
    buffers: bytes that it has all the time beside its parameters.
    scratch: bytes that the CPU's threads keep for all passes that are to come, by the names that
        backend/parallel.py has for them.
    view: whether what forward() gives is x itself, and what backward() gives dy.
    """

    saves: str = "xy"
    other: int = 0
    forward: int = 0
    backward: tuple[tuple[str, int], ...] = (("xy", 0),)
    buffers: int = 0
    scratch: Mapping[str, int] = MappingProxyType({})
    view: bool = False


class Layer:
    """The base of all layers, each of which is final: no layer inherits from another.

    A subclass stores each argument of its constructor under the argument's name, and writes

        declare(input_shape) -> output_shape    calls add_parameter() for what it learns
        forward(x, training)                    begins with x = self.receive(x)
        backward(dy)                            begins with self.take_saved()

    Shapes are those of one sample, without the batch axis. A layer is built before it is used,
    as part of the model that it belongs to or alone. It takes its backend when it is made.

    name: how messages and saved files call it; containers name their layers otherwise.
    strict_dtype: refuse input of another float dtype instead of casting it to the layer's.
    """

    kind: ClassVar[str] = "layer"

    def __init__(self, *, name: str | None = None, strict_dtype: bool = False):
        self.name = name
        self.strict_dtype = strict_dtype
        self.backend = get_backend()
        self.path = name or ""
        self.built = False
        self.precision = make_precision("", "float32", self.backend.name)
        self.input_shape: Shape = ()
        self.output_shape: Shape = ()
        self.own_parameters: dict[str, Parameter] = {}
        self.own_buffers: dict[str, Array] = {}
        self.own_counters: dict[str, Array] = {}  # (1,) int64, on the device: captured graphs count
        self.decayed_size = 0
        self.flat_data: Array = None
        self.flat_grad: Array = None
        self.flat_cast: Array = None
        self._saved: Any = None
        self._added: Array | None = None
        # Where a BatchNorm follows it, a layer may leave the moments of its last training output
        # beside that output. The BatchNorm takes them away, and uses them for that very array.
        self.feeds_norm = False
        self.output_moments: tuple[Array, Any] | None = None

    # What a subclass provides.

    def declare(self, input_shape: Shape) -> Shape:
        """Check input_shape, declare the parameters, and return the output shape."""
        return input_shape

    def forward(self, x: Array, training: bool = False) -> Array:
        """The layer's output for a batch; with training=True, keeps what backward() needs."""
        raise NotImplementedError

    def backward(self, dy: Array) -> Array:
        """dL/dx, given dL/dy of the last forward(training=True); sets each parameter's grad.

        Raises RuntimeError without such a forward pass, or the second time.
        """
        raise NotImplementedError

    def backward_parameters(self, dy: Array) -> None:
        """backward() where nobody asks for dL/dx, as in the first layer of a network.

        Where there is nothing to learn, it only lets go of what forward(training=True) saved.
        """
        if self.learns:
            self.backward(dy)
        else:
            self.forget()

    def forward_added(self, x: Array, residual: Array, activation: str | None,
                      training: bool = False) -> Array:
        """A = g(forward(x) + residual): for a layer that can do it all in one pass to do so.

        residual: of the output's shape; activation: as in Conv2D.
        """
        y = self.forward(x, training)
        self.check_residual(y.shape, residual)
        return self.save_added(self.backend.activate(y, residual, activation), activation, training)

    def backward_added(self, da: Array, activation: str | None) -> tuple[Array, Array]:
        """dL/dx and dL/dresidual, given dL/dA of the last forward_added() and its activation."""
        a, self._added = self._added, None
        dz = self.backend.activation_backward(da, da if a is None else a, activation)
        del a
        return self.backward(dz), dz

    def adds(self, activation: str | None) -> bool:
        """Whether forward_added() with this activation is one pass, and not forward() and a sum."""
        return False

    def make_state(self, key: int) -> None:
        """Make what the layer keeps beside its parameters. key: for random numbers of its own."""

    def multiply_adds(self) -> int:
        """Multiplications, each with its addition, in the forward pass of one sample."""
        return 0

    def plan(self, batch: int, input_gradient: bool = True) -> dict[str, PassPlan]:
        """How the backend computes the passes of a convolution or a dense layer; else nothing.

        input_gradient: whether it is among them.
        """
        return {}

    def memory(self, batch: int, input_gradient: bool = True) -> LayerMemory:
        """What forward() and backward() keep and take; by default x, y and nothing beside.

        input_gradient: False for backward_parameters(), where that is not the same.
        """
        return LayerMemory()

    def memory_added(self, batch: int, activation: str | None) -> LayerMemory:
        """The same of forward_added() and backward_added(), where adds(activation)."""
        return self.memory(batch)

    def children(self) -> dict[str, Layer]:
        """The layers inside this one, by name."""
        return {}

    # What every layer has.

    def build(self, input_shape: Shape, *, seed: int = 0, precision: str = "float32",
              dtype: Any = None) -> Shape:
        """Make the parameters, drawn from `seed`, and return the output shape.

        input_shape: of one sample, (h, w, c) for images.
        precision: "float32", "tf32", "mixed_float16", "mixed_bfloat16", or "float64" for gradient
            checks; gpucnn/precision.py says what each stores in which type.
        dtype: float32 or float64, another way to say that precision.

        The parameters lie in one flat array, `flat_data`, and their gradients in another,
        `flat_grad`: first those that weight decay applies to, then biases and norms, each at a
        multiple of 8 elements, with zeros between. The same seed gives the same numbers on every
        backend.

        Raises TypeError and ValueError for arguments and for shapes that do not fit, ImportError
        for bfloat16 without the package ml_dtypes.
        """
        if not is_int(seed):
            raise TypeError(f"{self.where}: seed must be an int, got {seed!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"{self.where}: seed must be from 0 to 2**32 - 1, got {seed}")
        if dtype is not None:
            if np.dtype(dtype) not in (np.float32, np.float64):
                raise TypeError(f"{self.where}: dtype must be float32 or float64, got {dtype}")
            if precision not in ("float32", np.dtype(dtype).name):
                raise ValueError(f"{self.where}: dtype {dtype} is not that of precision "
                                 f"{precision!r}; give one of them")
            precision = np.dtype(dtype).name
        chosen = make_precision(self.where, precision, self.backend.name)
        self.output_shape = self.declare_at(self._shape_of_input(input_shape), self.path)
        seed = int(seed)
        drawn = [p.initializer(p.shape, seed, stream)
                 for stream, p in enumerate(self.parameters().values())]
        order = sorted(zip(self.parameters().values(), drawn), key=lambda pair: not pair[0].decay)
        sizes = [-(-p.size // ALIGNMENT) * ALIGNMENT for p, _ in order]
        self.decayed_size = sum(size for size, (p, _) in zip(sizes, order) if p.decay)
        flat = np.concatenate([np.empty(0), *(np.append(values, np.zeros(size - p.size))
                                              for size, (p, values) in zip(sizes, order))])
        self.flat_data = self.backend.asarray(flat, chosen.parameters)
        self.flat_grad = self.backend.xp.zeros_like(self.flat_data)
        self.flat_cast = self.flat_data.astype(chosen.activations) if chosen.mixed else None
        start = 0
        for size, (p, _) in zip(sizes, order):
            p.data = self.flat_data[start:start + p.size].reshape(p.shape)
            p.grad = self.flat_grad[start:start + p.size].reshape(p.shape)
            p.cast = p.data if self.flat_cast is None else \
                self.flat_cast[start:start + p.size].reshape(p.shape)
            start += size
        for number, layer in enumerate(self.walk()):
            layer.precision, layer.built = chosen, True
            layer.make_state(_LAYER_KEYS ^ (seed << 16) ^ number)
        return self.output_shape

    def cast_parameters(self) -> None:
        """Write the 16-bit copy of the parameters anew; without mixed precision there is none."""
        if self.flat_cast is not None:
            self.flat_cast[...] = self.flat_data

    def declare_at(self, input_shape: Shape, path: str) -> Shape:
        """declare() under the name that the layer has inside its model."""
        self.path = path
        self.own_parameters = {}
        self.feeds_norm, self.output_moments = False, None
        self.input_shape = input_shape
        self.output_shape = self.declare(input_shape)
        return self.output_shape

    def add_parameter(self, name: str, shape: Shape, initializer: Initializer,
                      decay: bool) -> Parameter:
        """Declare an array to learn. decay: whether weight decay applies to it."""
        self.own_parameters[name] = Parameter(shape, initializer, decay)
        return self.own_parameters[name]

    def walk(self) -> Iterator[Layer]:
        """This layer and all inside it, in order."""
        yield self
        for child in self.children().values():
            yield from child.walk()

    def parameters(self) -> dict[str, Parameter]:
        """All parameters, this layer's and those inside it, by path such as "conv1/w"."""
        return {_join(layer.path, name): p
                for layer in self.walk() for name, p in layer.own_parameters.items()}

    def buffers(self) -> dict[str, tuple[Layer, str]]:
        """What is saved but not learned (running statistics): path -> (layer, name)."""
        return {_join(layer.path, name): (layer, name)
                for layer in self.walk() for name in layer.own_buffers}

    def counters(self) -> dict[str, Array]:
        """What training counts, by path: (1,) int64 arrays of the backend, "dropout1/step"."""
        return {_join(layer.path, name): counter
                for layer in self.walk() for name, counter in layer.own_counters.items()}

    def training_state(self) -> dict[str, np.ndarray]:
        """What training needs to go on with the same bits, beside parameters and buffers.

        The counters as arrays of the host, (1,) int64: of each dropout the number of its next step.
        Waits for the GPU.
        """
        return {path: np.array(self.backend.to_numpy(counter))
                for path, counter in self.counters().items()}

    def load_training_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from what training_state() gave, on this backend or the other.

        Raises ValueError for paths, shapes, dtypes or values that are not this model's; then it is
        unchanged.
        """
        counters = self.counters()
        if arrays.keys() != counters.keys():
            raise ValueError(f"{self.where}: the training state has {sorted(counters)}, got "
                             f"{sorted(arrays)}; give that of a model of the same layers")
        for path, given in arrays.items():
            given = np.asarray(given)
            if given.shape != (1,) or given.dtype != np.int64 or given[0] < 0:
                raise ValueError(f"{self.where}: {path} must be an int64 >= 0 of shape (1,), got "
                                 f"{given.dtype} {given.tolist()}")
        for path, counter in counters.items():
            counter[...] = self.backend.asarray(arrays[path])

    def config(self) -> dict[str, Any]:
        """The arguments that make this layer again, its class included; JSON can hold them."""
        arguments = {name: getattr(self, name) for name in argument_names(type(self))}
        return {"class": type(self).__name__, **{k: _plain(v) for k, v in arguments.items()}}

    @property
    def learns(self) -> bool:
        """Whether this layer, or one inside it, has parameters, once they are declared."""
        return any(layer.own_parameters for layer in self.walk())

    @property
    def dtype(self) -> np.dtype:
        """Of what the layer takes and gives."""
        return self.precision.activations

    @property
    def where(self) -> str:
        """How messages begin: "Conv2D 'conv1'"."""
        return f"{type(self).__name__} {self.path!r}" if self.path else type(self).__name__

    def receive(self, x: Array, ndim: int | None = None) -> Array:
        """x as this layer computes with it: of its backend and dtype, and not empty but in batch.

        Raises TypeError for another backend or dtype, ValueError for a wrong shape.
        """
        if not self.built:
            raise RuntimeError(f"{self.where}: not built; call build(input_shape) on the model "
                               "first")
        x = as_array(self.where, "input", x)
        self._check_shape(x.shape, ndim)
        if 0 in x.shape[1:]:
            axis = x.shape.index(0, 1)
            side = ("height", "width", "channel count")[axis - 1] if x.ndim == 4 else f"axis {axis}"
            raise ValueError(f"{self.where}: input {side} is 0: {x.shape}; it must be at least 1")
        if x.dtype != self.dtype and self.strict_dtype:
            raise TypeError(f"{self.where}: input is {x.dtype}, layer is {self.dtype}; "
                            f"cast with x.astype('{self.dtype}')")
        return self._cast("input", x)

    def nbytes(self, batch: int, shape: Shape) -> int:
        """Of an array of activations, given the shape of a sample."""
        return batch * int(np.prod(shape)) * self.dtype.itemsize

    def save(self, training: bool, *values: Any) -> None:
        """Keep values for backward(), in training only."""
        self._saved = values if training else None

    def forget(self) -> None:
        """Let go of what the last forward(training=True) saved, here and in the layers inside."""
        for layer in self.walk():
            layer._saved = layer._added = None

    def save_added(self, a: Array, activation: str | None, training: bool) -> Array:
        """Keep A, which is returned, for Layer.backward_added(); without activation it needs none.
        """
        self._added = a if training and activation else None
        return a

    def take_saved(self) -> Any:
        """What the last forward(training=True) saved; each forward serves one backward."""
        if self._saved is None:
            raise RuntimeError(f"{self.where}: backward() called before forward(training=True)")
        saved, self._saved = self._saved, None
        return saved

    def receive_gradient(self, dy: Array, shape: Shape) -> Array:
        """dy as the layer computes with it.

        Raises TypeError for another backend or dtype, ValueError unless it has the output's shape.
        """
        dy = as_array(self.where, "the gradient", dy)
        if dy.shape != shape:
            raise ValueError(f"{self.where}: the gradient has shape {dy.shape}, the output of the "
                             f"last forward pass had {shape}")
        return self._cast("the gradient", dy)

    def check_residual(self, shape: Shape, residual: Array) -> None:
        """Raise ValueError unless the residual has the output's shape."""
        if residual.shape != shape:
            raise ValueError(f"{self.where}: the output has shape {shape}, what is added to it "
                             f"{residual.shape}; they must be equal")

    def summary(self, input_shape: Shape, *, plan: bool = False, memory: bool = False,
                batch: int = 64, optimizer: Any = None) -> None:
        """Print a table: each layer's output shape, parameters and multiply-adds.

        Its last column holds the weights that a dense layer between the same shapes would need:
        the article's point about sparse connections and shared weights.

        plan: print instead by which algorithm, in which tiles and with what memory beside its
            arrays this backend computes each pass of the convolutions and dense layers.
        memory: print instead what a training step has in memory: of each layer, what its forward
            pass keeps for backward (and no layer before it keeps already), and all that is alive at
            most during each of its passes; then the sums, and the peak. The caller holds the batch,
            in the model's dtype. What an allocator keeps of freed memory comes on top.
        batch: for how many images.
        optimizer: for memory, one of gpucnn.optim or its class, whose state counts too.

        Raises TypeError and ValueError for an input_shape, batch or optimizer that is none, for an
        input_shape that the model was not built for, and for plan and memory at once.
        """
        from gpucnn.layers.summary import memory_table, plan_table, summary_table
        shape = self._shape_of_input(input_shape)
        if plan and memory:
            raise ValueError(f"{self.where}: plan and memory are two tables; ask for one at a time")
        if memory:
            print(memory_table(self, shape, batch, optimizer))
        else:
            print(plan_table(self, shape, batch) if plan else summary_table(self, shape))

    def _shape_of_input(self, input_shape: Any) -> Shape:
        wanted = "input_shape must be ints >= 1 without the batch axis, such as (28, 28, 1)"
        if not isinstance(input_shape, Iterable):
            raise TypeError(f"{self.where}: {wanted}; got {input_shape!r}")
        shape = tuple(input_shape)
        if not all(is_int(n) and n > 0 for n in shape):
            raise ValueError(f"{self.where}: {wanted}; got {shape}")
        return shape

    def _cast(self, name: str, array: Array) -> Array:
        if not isinstance(array, self.backend.xp.ndarray):
            raise TypeError(f"{self.where}: {name} is a {type(array).__module__} array, the layer "
                            f"is on {self.backend.name}; use backend.asarray(x) or "
                            "backend.to_numpy(x)")
        return self.backend.asarray(array, self.dtype)

    def _check_shape(self, shape: Shape, ndim: int | None) -> None:
        if ndim is None:
            return
        if len(shape) != ndim:
            what = "NHWC input with 4 dimensions" if ndim == 4 else f"input with {ndim} dimensions"
            remedy = "; add a batch axis with x[None]" if len(shape) == ndim - 1 else (
                "; put a Flatten() before it" if ndim == 2 else "")
            raise ValueError(f"{self.where}: expected {what}, got {len(shape)}: {shape}{remedy}")

    def __repr__(self) -> str:
        arguments = ", ".join(f"{k}={v!r}" for k, v in self.config().items() if k != "class")
        return f"{type(self).__name__}({arguments})"


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def argument_names(cls: type) -> list[str]:
    """The constructor's arguments, those that it passes on to Layer included."""
    names = [n for n, p in inspect.signature(cls).parameters.items()
             if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return names + [n for n in inspect.signature(Layer).parameters if n not in names]


def _plain(value: Any) -> Any:
    if isinstance(value, Layer):
        return value.config()
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value
