"""Layers made of layers."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gpucnn import activations
from gpucnn.backend import Array
from gpucnn.layers.base import Layer, Shape
from gpucnn.layers.norm import BatchNorm


class Sequential(Layer):
    """Each layer's output is the next one's input.

    Layers without a name are called by their kind and number: conv1, conv2, pool1, ...
    """

    kind = "sequential"

    def __init__(self, layers: Sequence[Layer], **options):
        super().__init__(**options)
        self.layers = list(layers)
        self._children = _name_layers(self, self.layers)
        _check_each_stands_once(self)

    def children(self) -> dict[str, Layer]:
        return self._children

    def declare(self, input_shape: Shape) -> Shape:
        for name, layer in self._children.items():
            input_shape = layer.declare_at(input_shape, _inside(self, name))
        for layer, following in zip(self.layers, self.layers[1:]):
            if isinstance(following, BatchNorm):
                layer.feeds_norm, following.source = True, layer
        return input_shape

    def forward(self, x: Array, training: bool = False) -> Array:
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def forward_added(self, x: Array, residual: Array, activation: str | None,
                      training: bool = False) -> Array:
        if not self.layers:
            return super().forward_added(x, residual, activation, training)
        for layer in self.layers[:-1]:
            x = layer.forward(x, training)
        return self.layers[-1].forward_added(x, residual, activation, training)

    def backward(self, dy: Array) -> Array:
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def backward_added(self, da: Array, activation: str | None) -> tuple[Array, Array]:
        if not self.layers:
            return super().backward_added(da, activation)
        dx, dresidual = self.layers[-1].backward_added(da, activation)
        for layer in reversed(self.layers[:-1]):
            dx = layer.backward(dx)
        return dx, dresidual

    def backward_parameters(self, dy: Array) -> None:
        first = next((i for i, layer in enumerate(self.layers) if layer.learns), len(self.layers))
        for layer in reversed(self.layers[first + 1:]):
            dy = layer.backward(dy)
        for layer in self.layers[first:first + 1]:
            layer.backward_parameters(dy)
        for layer in self.layers[:first]:
            layer.forget()


class Residual(Layer):
    """A = g(body(x) + shortcut(x)) (He et al. 2016).

    shortcut: None for x itself, which needs a body that keeps the shape.
    activation: g, as in Conv2D. A body that ends in a BatchNorm adds and applies it on the way.
    """

    kind = "residual"

    def __init__(self, body: Layer, shortcut: Layer | None = None, *,
                 activation: str | None = None, **options):
        super().__init__(**options)
        for part in (body, *([] if shortcut is None else [shortcut])):
            _check_layer(self, part)
        activations.check_name(self.where, activation)
        self.body = body
        self.shortcut = shortcut
        self.activation = activation
        _check_each_stands_once(self)

    def children(self) -> dict[str, Layer]:
        return {"body": self.body} | ({"shortcut": self.shortcut} if self.shortcut else {})

    def declare(self, input_shape: Shape) -> Shape:
        shapes = {name: layer.declare_at(input_shape, _inside(self, name))
                  for name, layer in self.children().items()}
        other = shapes.get("shortcut", input_shape)
        if shapes["body"] != other:
            raise ValueError(f"{self.where}: the body gives {shapes['body']}, the shortcut "
                             f"{other}; they are added and must be equal")
        return other

    def forward(self, x: Array, training: bool = False) -> Array:
        shortcut = self.shortcut.forward(x, training) if self.shortcut else self.receive(x)
        a = self.body.forward_added(x, shortcut, self.activation, training)
        self.save(training, a.shape)
        return a

    def backward(self, dy: Array) -> Array:
        (shape,) = self.take_saved()
        dx, dshortcut = self.body.backward_added(self.receive_gradient(dy, shape), self.activation)
        if self.shortcut:
            dshortcut = self.shortcut.backward(dshortcut)
        return self.backend.activate(dx, dshortcut, None)


class Concat(Layer):
    """The outputs of all branches, each given the same x, joined along the channels."""

    kind = "concat"

    def __init__(self, branches: Sequence[Layer], **options):
        super().__init__(**options)
        if not branches:
            raise ValueError(f"{self.where}: needs at least one branch")
        self.branches = list(branches)
        self._children = _name_layers(self, self.branches)
        _check_each_stands_once(self)

    def children(self) -> dict[str, Layer]:
        return self._children

    def declare(self, input_shape: Shape) -> Shape:
        shapes = [layer.declare_at(input_shape, _inside(self, name))
                  for name, layer in self._children.items()]
        if len({shape[:-1] for shape in shapes}) > 1:
            raise ValueError(f"{self.where}: the branches give {shapes}; all but the last number "
                             "must be equal")
        return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))

    def forward(self, x: Array, training: bool = False) -> Array:
        parts = [layer.forward(x, training) for layer in self.branches]
        shapes = [part.shape for part in parts]
        if len({shape[:-1] for shape in shapes}) > 1:  # of images of another size, perhaps
            raise ValueError(f"{self.where}: the branches give {shapes}; all but the last number "
                             "must be equal")
        # CuPy's concatenate() copies the addresses of many arrays from the host, which a captured
        # graph must not.
        y = self.backend.empty((*parts[0].shape[:-1], sum(p.shape[-1] for p in parts)),
                               parts[0].dtype)
        start = 0
        for part in parts:
            y[..., start:start + part.shape[-1]] = part
            start += part.shape[-1]
        self.save(training, y.shape)
        return y

    def backward(self, dy: Array) -> Array:
        (shape,) = self.take_saved()
        dy = self.receive_gradient(dy, shape)
        dx, start = None, 0
        for number, layer in enumerate(self.branches):
            end = start + layer.output_shape[-1]
            part = layer.backward(dy[..., start:end])
            if number > 1:
                dx += part
            else:  # what a layer gives may be dy itself
                dx = part if dx is None else dx + part
            del part  # before the next branch needs memory
            start = end
        return dx


def _name_layers(parent: Layer, layers: Sequence[Layer]) -> dict[str, Layer]:
    numbers: Counter[str] = Counter()
    named: dict[str, Layer] = {}
    for layer in layers:
        _check_layer(parent, layer)
        numbers[layer.kind] += 1
        name = layer.name or f"{layer.kind}{numbers[layer.kind]}"
        if name in named:
            raise ValueError(f"{parent.where}: two layers are called {name!r}; give each its own "
                             "name")
        named[name] = layer
    return named


def _check_layer(parent: Layer, part: object) -> None:
    if not isinstance(part, Layer):
        raise TypeError(f"{parent.where}: {part!r} is not a layer")


def _check_each_stands_once(parent: Layer) -> None:
    """A layer holds one set of parameters, and what one forward pass saved, however deep it is."""
    seen: set[Layer] = set()
    for layer in parent.walk():
        if layer in seen:
            raise ValueError(f"{parent.where}: {layer.where} stands in it twice; make a second one")
        seen.add(layer)


def _inside(parent: Layer, name: str) -> str:
    return f"{parent.path}/{name}" if parent.path else name
