"""What a training step has in memory, layer by layer: a walk over shapes, in which nothing is made.

The walk follows the passes of the layers and of their containers, array by array: an array is alive
as long as a pass that still runs, or a layer for its backward pass, refers to it. What a layer
itself keeps and needs beside, its memory() says.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

from gpucnn.layers.activation import temporaries
from gpucnn.layers.base import ALIGNMENT, Layer, LayerMemory, Shape
from gpucnn.layers.container import Concat, Residual, Sequential

_UNIT = 512  # bytes, of which CuPy's allocations are multiples


class LayerRow(NamedTuple):
    """Bytes of one layer.

    saved: what its forward pass keeps for its backward pass and no layer before it keeps already.
    forward, backward: all that the step has alive at most during that pass.
    """

    layer: Layer
    saved: int
    forward: int
    backward: int


class StepMemory(NamedTuple):
    """Bytes of a training step.

    parameters, with their 16-bit copy where there is one. gradients: of the parameters.
    activations: the input, and all that layers keep at the end of the forward pass.
    workspace: the most that a pass needs beside its arrays. peak: of all together.
    where: in which layer and which pass that is.
    """

    rows: list[LayerRow]
    parameters: int
    gradients: int
    state: int
    activations: int
    workspace: int
    peak: int
    where: str


def step_memory(model: Layer, input_shape: Shape, batch: int, optimizer: Any = None) -> StepMemory:
    """Of a built or declared model, for a batch that the caller holds in the model's dtype.

    optimizer: an Optimizer or a class of it, for its state; None for none.
    """
    size = sum(-(-p.size // ALIGNMENT) * ALIGNMENT for p in model.parameters().values())
    precision = model.precision
    one = size * precision.parameters.itemsize
    parameters = one + (size * precision.activations.itemsize if precision.mixed else 0)
    state = 0 if optimizer is None else len(optimizer.state_names) * one
    walk = _Walk(model, batch, parameters + one + state)
    x = walk.train(model, input_shape)
    rows = [LayerRow(layer, walk.saved.get(layer, 0), walk.most.get((layer, "forward"), 0),
                     walk.most.get((layer, "backward"), 0))
            for layer in model.walk() if not isinstance(layer, Sequential)]
    return StepMemory(rows, parameters, one, state, x.nbytes + sum(walk.saved.values()),
                      walk.workspace, *walk.peak())


class _Array:
    """One array. strided: whether it is part of a larger one, which a layer copies to read it.

    nbytes: of its own; none where it is part of another.
    """

    def __init__(self, nbytes: int, strided: bool = False):
        self.nbytes, self.strided = nbytes, strided
        self.holders = 0
        self.saved = False


class _Walk:
    """The passes as the layers run them, each with what the caller holds: x, dy, da, a residual.

    What a pass returns is held already, for the caller.
    """

    def __init__(self, model: Layer, batch: int, fixed: int):
        self.batch = batch
        self.unit = _UNIT if model.backend.name == "cupy" else 1
        self.itemsize = model.dtype.itemsize
        self.most: dict[tuple[Layer, str], int] = {}
        self.saved: dict[Layer, int] = {}
        self.workspace = 0
        self._kept: dict[Layer, dict[str, _Array]] = {layer: {} for layer in model.walk()}
        self._place = (model, "input")
        scratch: dict[str, int] = {}
        for layer in model.walk():
            for name, nbytes in layer.memory(batch).scratch.items():
                scratch[name] = max(scratch.get(name, 0), nbytes)
        self._scratch = sum(scratch.values())
        self._live = fixed + self._scratch + sum(
            layer.memory(batch).buffers for layer in model.walk())

    def train(self, model: Layer, input_shape: Shape) -> _Array:
        """A step. Returns x."""
        x = self._new(input_shape)
        x.saved = True  # not by a layer alone
        logits = self._forward(model, x)
        self._place = (model, "loss")
        dlogits = self._new(model.output_shape)
        self._beside(2 * logits.nbytes)  # of the loss
        self._drop(logits)
        self._backward(model, dlogits, input_gradient=False)
        return x

    def peak(self) -> tuple[int, str]:
        """The most of all places, and which that is."""
        layer, which = max(self.most, key=self.most.__getitem__)
        return self.most[layer, which], f"{layer.path} {which}".strip()

    # Each pass does what the method of its name does. Containers that are not known are leaves.

    def _forward(self, layer: Layer, x: _Array) -> _Array:
        if isinstance(layer, Sequential):
            return self._chain(layer.layers, x)
        if isinstance(layer, Residual):
            shortcut = self._forward(layer.shortcut, x) if layer.shortcut else self._hold(x)
            a = self._forward_added(layer.body, x, shortcut, layer.activation)
            self._at(layer, "forward")
            self._drop(shortcut)
            return a
        if isinstance(layer, Concat):
            parts = [self._forward(branch, x) for branch in layer.branches]
            self._at(layer, "forward")
            y = self._new(layer.output_shape)
            self._drop(*parts)
            return y
        return self._leaf_forward(layer, layer.memory(self.batch), x)

    def _chain(self, layers: list[Layer], x: _Array) -> _Array:
        self._hold(x)
        for layer in layers:
            y = self._forward(layer, x)
            self._drop(x)
            x = y
        return x

    def _forward_added(self, layer: Layer, x: _Array, residual: _Array, activation: str | None
                       ) -> _Array:
        if isinstance(layer, Sequential) and layer.layers:
            x = self._chain(layer.layers[:-1], x)
            a = self._forward_added(layer.layers[-1], x, residual, activation)
            self._drop(x)
            return a
        if layer.adds(activation):
            a = self._leaf_forward(layer, layer.memory_added(self.batch, activation), x)
        else:
            y = self._forward(layer, x)
            self._at(layer, "forward")
            a = self._new(layer.output_shape)
            if activation:
                self._beside(temporaries(layer, activation, self.batch)[0])
            self._drop(y)
        if activation and _by_default(layer, activation):
            self._save(layer, added=a)
        return a

    def _leaf_forward(self, layer: Layer, memory: LayerMemory, x: _Array) -> _Array:
        self._at(layer, "forward")
        y = self._hold(x) if memory.view else self._new(layer.output_shape)
        self._beside(memory.forward)
        arrays = {"x": x, "y": y}
        self._save(layer, **{name: arrays[name] for name in memory.saves})
        if memory.other:
            self._save(layer, other=_Array(self._rounded(memory.other)))
        return y

    def _forget(self, layer: Layer) -> None:
        for part in layer.walk():
            self._drop_saved(part, *self._kept[part])

    def _backward(self, layer: Layer, dy: _Array, input_gradient: bool = True) -> _Array:
        if not input_gradient and not layer.learns:
            self._forget(layer)
            return self._hold(_Array(0))
        if isinstance(layer, Sequential):
            return self._chain_back(layer.layers, dy, input_gradient)
        if isinstance(layer, Residual):
            self._at(layer, "backward")
            dx, dshortcut = self._backward_added(layer.body, dy, layer.activation)
            if layer.shortcut:
                ds = self._backward(layer.shortcut, dshortcut)
                self._drop(dshortcut)
                dshortcut = ds
            return self._sum(layer, dx, dshortcut)
        if isinstance(layer, Concat):
            self._at(layer, "backward")
            total = None
            for number, branch in enumerate(layer.branches):
                dx = self._backward(branch, _Array(0, strided=True))
                if total is None:
                    total = dx
                elif number == 1:
                    total = self._sum(layer, total, dx)
                else:
                    self._drop(dx)
            assert total is not None
            return total
        makes_dx = input_gradient or type(layer).backward_parameters is Layer.backward_parameters
        return self._leaf_backward(layer, layer.memory(self.batch, makes_dx), dy, makes_dx)

    def _chain_back(self, layers: list[Layer], dy: _Array, input_gradient: bool = True) -> _Array:
        first = 0 if input_gradient else next(
            (i for i, layer in enumerate(layers) if layer.learns), len(layers))
        self._hold(dy)
        for i in reversed(range(first, len(layers))):
            dx = self._backward(layers[i], dy, input_gradient or i > first)
            self._drop(dy)
            dy = dx
        for layer in layers[:first]:
            self._forget(layer)
        return dy

    def _backward_added(self, layer: Layer, da: _Array, activation: str | None
                        ) -> tuple[_Array, _Array]:
        if isinstance(layer, Sequential) and layer.layers:
            dx, dz = self._backward_added(layer.layers[-1], da, activation)
            for before in reversed(layer.layers[:-1]):
                dy, dx = dx, self._backward(before, dx)
                self._drop(dy)
            return dx, dz
        self._at(layer, "backward")
        dz = self._new(layer.output_shape) if activation else self._hold(da)
        if _by_default(layer, activation):
            if activation:
                self._beside(temporaries(layer, activation, self.batch)[1])
            self._drop_saved(layer, "added")
            return self._backward(layer, dz), dz
        memory = layer.memory_added(self.batch, activation)
        return self._leaf_backward(layer, memory, da, makes_dx=True), dz

    def _leaf_backward(self, layer: Layer, memory: LayerMemory, dy: _Array, makes_dx: bool
                       ) -> _Array:
        self._at(layer, "backward")
        dy = self._new(layer.output_shape) if dy.strided else self._hold(dy)
        if memory.view:
            self._drop_saved(layer, "other")
            return dy
        dx = _Array(0)
        for number, (needed, beside) in enumerate(memory.backward, 1):
            self._drop_saved(layer, *{"x", "y"}.difference(needed))
            if makes_dx and number == len(memory.backward):
                dx = self._new(layer.input_shape)
            self._beside(beside)
        self._drop_saved(layer, *self._kept[layer])
        self._drop(dy)
        return dx

    def _sum(self, layer: Layer, dx: _Array, other: _Array) -> _Array:
        self._at(layer, "backward")
        total = self._new(layer.input_shape)
        self._drop(dx, other)
        return total

    # Arrays.

    def _new(self, shape: Shape) -> _Array:
        """An array for the batch, of one sample's shape."""
        return self._hold(_Array(self._rounded(self.batch * math.prod(shape) * self.itemsize)))

    def _rounded(self, nbytes: int) -> int:
        return -(-nbytes // self.unit) * self.unit

    def _hold(self, array: _Array) -> _Array:
        array.holders += 1
        if array.holders == 1:
            self._live += array.nbytes
        self._beside(0)
        return array

    def _drop(self, *arrays: _Array) -> None:
        for array in arrays:
            array.holders -= 1
            if array.holders == 0:
                self._live -= array.nbytes

    def _save(self, layer: Layer, **arrays: _Array) -> None:
        for name, array in arrays.items():
            self._kept[layer][name] = self._hold(array)
            if not array.saved:
                self.saved[layer] = self.saved.get(layer, 0) + array.nbytes
            array.saved = True

    def _drop_saved(self, layer: Layer, *names: str) -> None:
        for name in names:
            if name in self._kept[layer]:
                self._drop(self._kept[layer].pop(name))

    def _at(self, layer: Layer, which: str) -> None:
        self._place = (layer, which)
        self._beside(0)

    def _beside(self, nbytes: int) -> None:
        """Note what is alive in this place, with some bytes beside."""
        self.workspace = max(self.workspace, self._scratch + nbytes)
        self.most[self._place] = max(self.most.get(self._place, 0), self._live + nbytes)


def _by_default(layer: Layer, activation: str | None) -> bool:
    """Whether Layer.backward_added makes dz, of what Layer.save_added keeps."""
    return type(layer).backward_added is Layer.backward_added or not layer.adds(activation)
