"""The table that Layer.summary() prints."""
from __future__ import annotations

import math

from gpucnn.layers.base import Layer, Shape

_HEADER = ("layer", "type", "output shape", "parameters", "multiply-adds", "as dense: weights")


def summary_table(model: Layer, input_shape: Shape) -> str:
    """One line a layer for one sample of input_shape, and the sums.

    "as dense" is inputs * outputs: what the layer would need if it neither shared its weights nor
    connected each output to a few inputs only. Raises ValueError where the shapes do not fit.
    """
    if model.built:
        if input_shape != model.input_shape:
            raise ValueError(f"{model.where}: built for input {model.input_shape}, not "
                             f"{input_shape}; make a new model")
    else:
        model.declare_at(input_shape, model.path)
    leaves = [layer for layer in model.walk() if not layer.children()]
    rows = [(layer.path, type(layer).__name__, "x".join(map(str, layer.output_shape)),
             _number(_parameters(layer)), _number(layer.multiply_adds()),
             _number(_dense_weights(layer))) for layer in leaves]
    total = ("total", "", "", *(_number(sum(map(count, leaves))) for count in (
        _parameters, lambda layer: layer.multiply_adds(), _dense_weights)))
    widths = [max(len(row[i]) for row in (_HEADER, *rows, total)) for i in range(len(_HEADER))]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    lines = [_line(_HEADER, widths), rule, *(_line(row, widths) for row in rows), rule,
             _line(total, widths)]
    return "\n".join(lines)


def _parameters(layer: Layer) -> int:
    return sum(p.size for p in layer.own_parameters.values())


def _dense_weights(layer: Layer) -> int:
    if not any(p.decay for p in layer.own_parameters.values()):
        return 0
    return math.prod(layer.input_shape) * math.prod(layer.output_shape)


def _number(n: int) -> str:
    return f"{n:,}" if n else "-"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(c.ljust(w) if i < 3 else c.rjust(w)
                     for i, (c, w) in enumerate(zip(cells, widths))).rstrip()
