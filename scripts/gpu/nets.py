"""The networks whose convolutions are measured; python -m scripts.gpu.nets prints the table.

The shapes are taken from the layers of each net, so that no list can drift from it.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from gpucnn.backend import use_backend
from gpucnn.geometry import Window
from gpucnn.layers import Conv2D, Whiten2D
from gpucnn.layers.summary import first_layer
from gpucnn.models import MODELS

# What layers call the passes, and what this folder calls them.
PASSES = {"forward": "y", "input gradient": "dx", "weight gradient": "dw"}


class Net(NamedTuple):
    """What one of gpucnn.models is measured with."""

    image: tuple[int, int, int]
    classes: int
    batch: int


NETS = {
    "article": Net((28, 28, 1), 10, 256),
    "airbench94": Net((32, 32, 3), 10, 1024),
    "resnet18": Net((32, 32, 3), 10, 512),
    "resnet50": Net((224, 224, 3), 1000, 256),
}


class Convolution(NamedTuple):
    """One kind of convolution in a net: x (batch, h, w, c) -> (batch, oh, ow, c_out)."""

    net: str
    name: str           # of the first layer of this kind
    batch: int
    h: int
    w: int
    c: int
    c_out: int
    window: Window
    groups: int
    passes: tuple[str, ...]  # of PASSES, those that a training step computes
    times: int = 1      # how many layers of the net are of this kind

    @property
    def flops(self) -> int:
        """Of each pass."""
        oh, ow = self.window.out_size(self.h, self.w)
        return (2 * self.batch * oh * ow * self.c_out * self.window.places
                * (self.c // self.groups))

    @property
    def label(self) -> str:
        v = self.window
        kernel = f"{v.kh}x{v.kw}" + (f"/{v.sh}" if max(v.sh, v.sw) > 1 else "")
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"{self.h}x{self.w}x{self.c} > {self.c_out} {kernel}{groups}"

    def small(self) -> Convolution:
        """The same kind with few images, pixels and channels, to try the measurement itself."""
        scale = self.groups if self.groups > 1 else 1
        fewer = [scale * max(1, min(n // scale, 8)) for n in (self.c, self.c_out)]
        return self._replace(batch=2, h=min(self.h, 8), w=min(self.w, 8), c=fewer[0],
                             c_out=fewer[1])


def convolutions(name: str, batch: int | None = None) -> list[Convolution]:
    """The distinct convolutions of a net, in its order."""
    net = NETS[name]
    with use_backend("numpy"):  # layers are declared, never built
        model = MODELS[name](net.classes)
        model.declare_at(net.image, "")
    first, found = first_layer(model), []
    for layer in model.walk():
        if isinstance(layer, (Conv2D, Whiten2D)):
            h, w, c = layer.input_shape
            passes = layer.plan(1, input_gradient=layer is not first)
            found.append(Convolution(
                name, layer.path, batch or net.batch, h, w, c, layer.output_shape[2],
                layer.window, getattr(layer, "groups", 1), tuple(PASSES[p] for p in passes)))
    return distinct(found)


def distinct(all_of_them: Sequence[Convolution]) -> list[Convolution]:
    """Each kind once, with the number of its layers."""
    kinds: dict[Convolution, Convolution] = {}
    for conv in all_of_them:
        kind = conv._replace(name="", times=1)
        if kind in kinds:
            conv = kinds[kind]._replace(times=kinds[kind].times + conv.times)
        kinds[kind] = conv
    return list(kinds.values())


def table(convs: Sequence[Convolution]) -> str:
    """All sizes, and GFLOP of a pass, one convolution a line."""
    lines = [f"{'net':<11}{'first layer of its kind':<28}{'times':>5}{'n':>6}{'h':>5}{'w':>5}"
             f"{'c':>6}{'c_out':>6}{'kernel':>7}{'stride':>7}{'pad':>5}{'groups':>7}{'GFLOP':>7}"]
    for conv in convs:
        v = conv.window
        lines.append(
            f"{conv.net:<11}{conv.name:<28}{conv.times:>5}{conv.batch:>6}{conv.h:>5}{conv.w:>5}"
            f"{conv.c:>6}{conv.c_out:>6}{f'{v.kh}x{v.kw}':>7}{v.sh:>7}{v.top:>5}"
            f"{conv.groups:>7}{conv.flops / 1e9:>7.2f}")
    return "\n".join(lines)


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else None


if __name__ == "__main__":
    print(table([conv for net in NETS for conv in convolutions(net)]))
