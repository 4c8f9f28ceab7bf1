"""Descriptions of nets and of their ops that a process of any library can build from."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gpucnn.layers import Layer

# What gpucnn.ops computes in passes of their own; other layers run forward, and both passes.
SPLIT = ("Conv2D", "MaxPool2D", "AvgPool2D")


def describe(layer: Layer) -> dict[str, Any]:
    """A declared layer as peers build it: class, arguments, shapes, and the layers inside."""
    arguments = {k: v for k, v in layer.config().items() if k not in ("class", "name")}
    if layer.children():
        arguments = {"activation": arguments.get("activation")}
    return {"class": type(layer).__name__, "arguments": arguments, "input_shape": layer.input_shape,
            "output_shape": layer.output_shape,
            "children": [describe(child) for child in layer.children().values()]}


def as_published(net: dict[str, Any]) -> dict[str, Any]:
    """The description with resnet50's 7x7 convolution, stride 2, in the place of its squares.

    gpucnn computes it as a 4x4 convolution over squares of 2x2 pixels (gpucnn.models.stem_weights);
    peers take the layer of the paper, which their libraries are made for.
    """
    children = net["children"]
    if [child["class"] for child in children[:2]] != ["SpaceToDepth", "Conv2D"]:
        return net
    squares, conv = children[:2]
    stem = {**conv, "input_shape": squares["input_shape"], "arguments": {
        **conv["arguments"], "kernel_size": [7, 7], "stride": [2, 2], "padding": 3}}
    return {**net, "children": [stem, *children[2:]]}


def distinct_ops(net: dict[str, Any]) -> list[dict[str, Any]]:
    """The passes of all layers of a net and of its loss, each kind and shape once."""
    def leaves(layer: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if not layer["children"]:
            yield layer
        for child in layer["children"]:
            yield from leaves(child)

    ops: dict[str, dict[str, Any]] = {}
    classes = net["output_shape"]
    loss = {"class": "SoftmaxCrossEntropy", "arguments": {}, "input_shape": classes,
            "output_shape": classes, "children": []}
    for layer in (*leaves(net), loss):
        if layer["class"] == "Flatten":
            continue
        a = layer["arguments"]
        size, stride = a.get("kernel_size", a.get("size")), a.get("stride")
        label = " ".join(filter(None, [
            layer["class"], by(size) if size else "", f"stride {by(stride)}" if stride else "",
            f"{by(layer['input_shape'])} -> {by(layer['output_shape'])}"]))
        passes = ["forward", "backward" if layer["class"] in SPLIT else "both"]
        for each in passes[1:] if layer is loss else passes:
            activation = a.get("activation") if each != "backward" else None
            what = "forward and backward" if each == "both" else each
            task = f"{label}{f' {activation}' if activation else ''}, {what}"
            ops.setdefault(task, {"task": task, "pass": each, "layer": layer})
    return list(ops.values())


def by(shape: int | Sequence[int]) -> str:
    """3 for 3, 3x3 for (3, 3)."""
    return "x".join(map(str, [shape] if isinstance(shape, int) else shape))
