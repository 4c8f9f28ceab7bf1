"""The networks whose convolutions are measured; python -m scripts.gpu.nets prints the table.

The shapes are taken from the layers of each net, so that no list can drift from it. Nets that
gpucnn.models has come from there.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from gpucnn.backend import use_backend
from gpucnn.geometry import Window, make_window
from gpucnn.layers import (
    BatchNorm,
    Conv2D,
    Dense,
    Flatten,
    GlobalAvgPool2D,
    Layer,
    MaxPool2D,
    ReLU,
    Residual,
    Sequential,
)
from gpucnn.models import MODELS


def airbench94(classes: int = 10) -> Sequential:
    """After Keller Jordan's 94 % on CIFAR-10 in seconds: its convolutions, in their order."""
    def group(filters: int) -> list[Layer]:
        return [Conv2D(filters, 3, padding="same", bias=False), MaxPool2D(2), BatchNorm(), ReLU(),
                Conv2D(filters, 3, padding="same", bias=False), BatchNorm(), ReLU()]

    return Sequential([Conv2D(24, 2), ReLU(), *group(64), *group(256), *group(256), MaxPool2D(3),
                       Flatten(), Dense(classes, bias=False)])


def resnet50(classes: int = 1000) -> Sequential:
    """He, Zhang, Ren and Sun 2016, with the stride in the 3x3 convolutions."""
    def conv(filters: int, size: int, stride: int = 1) -> list[Layer]:
        return [Conv2D(filters, size, stride=stride, padding=size // 2, bias=False), BatchNorm()]

    layers: list[Layer] = [*conv(64, 7, 2), ReLU(), MaxPool2D(3, stride=2, padding=1)]
    for filters, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            s = stride if block == 0 else 1
            body = [*conv(filters, 1), ReLU(), *conv(filters, 3, s), ReLU(), *conv(4 * filters, 1)]
            shortcut = Sequential(conv(4 * filters, 1, s)) if block == 0 else None
            layers += [Residual(Sequential(body), shortcut), ReLU()]
    return Sequential([*layers, GlobalAvgPool2D(), Dense(classes)])


class Net(NamedTuple):
    make: Callable[[int], Sequential]
    image: tuple[int, int, int]
    classes: int
    batch: int


NETS = {
    "article": Net(MODELS["article"], (28, 28, 1), 10, 256),
    "airbench94": Net(airbench94, (32, 32, 3), 10, 1024),
    "resnet18": Net(MODELS["resnet18"], (32, 32, 3), 10, 512),
    "resnet50": Net(resnet50, (224, 224, 3), 1000, 256),
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
    first: bool         # whose input gradient nobody asks for
    times: int = 1      # how many layers of the net are of this kind

    @property
    def passes(self) -> tuple[str, ...]:
        """The forward pass and the gradients that a training step computes."""
        return ("y", "dw") if self.first else ("y", "dx", "dw")

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
        model = net.make(net.classes)
        model.declare_at(net.image, "")
    layers = [layer for layer in model.walk() if isinstance(layer, Conv2D)]
    found = []
    for layer in layers:
        h, w, c = layer.input_shape
        window = make_window(layer.where, layer.kernel_size, layer.stride, layer.padding,
                             layer.dilation, (h, w))
        found.append(Convolution(name, layer.path, batch or net.batch, h, w, c, layer.filters,
                                 window, layer.groups, layer is layers[0]))
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
