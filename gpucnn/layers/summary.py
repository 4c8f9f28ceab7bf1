"""The tables that Layer.summary() prints."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from gpucnn.geometry import is_int
from gpucnn.layers.base import Layer, Shape
from gpucnn.layers.container import Sequential
from gpucnn.layers.memory import step_memory

_PLAN_HEADER = ("layer", "pass", "algorithm", "tile", "splits", "workspace")
_MEMORY_HEADER = ("layer", "type", "output shape", "keeps", "in forward", "in backward")
_HEADER = ("layer", "type", "output shape", "parameters", "multiply-adds", "as dense: weights")


def summary_table(model: Layer, input_shape: Shape) -> str:
    """One line a layer for one sample of input_shape, and the sums.

    "as dense" is inputs * outputs: what the layer would need if it neither shared its weights nor
    connected each output to a few inputs only. Raises ValueError where the shapes do not fit.
    """
    _declare(model, input_shape)
    leaves = [layer for layer in model.walk() if not layer.children()]
    rows = [(layer.path, type(layer).__name__, "x".join(map(str, layer.output_shape)),
             _number(_parameters(layer)), _number(layer.multiply_adds()),
             _number(_dense_weights(layer))) for layer in leaves]
    total = ("total", "", "", *(_number(sum(map(count, leaves))) for count in (
        _parameters, lambda layer: layer.multiply_adds(), _dense_weights)))
    return _table(_HEADER, rows, [total], numbers=3)


def plan_table(model: Layer, input_shape: Shape, batch: int) -> str:
    """One line for each pass of each convolution and dense layer, for `batch` images.

    The first layer that learns needs no input gradient. Workspaces serve one pass after the other:
    the last line has the largest. Raises ValueError where the shapes do not fit.
    """
    _check_batch(model, batch)
    _declare(model, input_shape)
    first, rows, largest = first_layer(model), [], 0
    for layer in model.walk():
        plans = layer.plan(batch, input_gradient=layer is not first)
        for name, plan in plans.items():
            rows.append((layer.path if name == "forward" else "", name, plan.algorithm,
                         plan.tile or "-", str(plan.splits) if plan.splits > 1 else "-",
                         _bytes(plan.workspace)))
            largest = max(largest, plan.workspace)
    return _title(model, batch) + _table(
        _PLAN_HEADER, rows, [("largest", *[""] * 4, _bytes(largest))], numbers=2)


def memory_table(model: Layer, input_shape: Shape, batch: int, optimizer: Any = None) -> str:
    """One line for each layer that makes an array, and the sums, of a training step.

    Arguments and errors as in Layer.summary().
    """
    _check_batch(model, batch)
    names = () if optimizer is None else getattr(optimizer, "state_names", None)
    if names is None:
        raise TypeError(f"{model.where}: optimizer must be an Optimizer or a class of them, such "
                        f"as optim.Adam, got {optimizer!r}")
    _declare(model, input_shape)
    m = step_memory(model, input_shape, batch, optimizer)
    rows = [(row.layer.path, type(row.layer).__name__,
             "x".join(map(str, row.layer.output_shape)), *map(_bytes, row[1:])) for row in m.rows]
    totals = [("parameters", m.parameters), ("gradients", m.gradients),
              (f"state of the optimizer ({', '.join(names) or 'none'})", m.state),
              ("activations, with the input", m.activations), ("workspace, at most", m.workspace),
              (f"peak of the step, in {m.where}", m.peak)]
    if optimizer is None:
        totals[2] = "each array of an optimizer's state, not counted", m.gradients
    return _title(model, batch) + _table(
        _MEMORY_HEADER, rows, [(name, *[""] * 4, _bytes(n)) for name, n in totals], numbers=3)


def _title(model: Layer, batch: int) -> str:
    return f"batches of {batch}, {model.precision.name}, on {model.backend.name}\n"


def _check_batch(model: Layer, batch: int) -> None:
    if not is_int(batch) or batch < 1:
        raise ValueError(f"{model.where}: batch must be an int >= 1, got {batch!r}")


def _declare(model: Layer, input_shape: Shape) -> None:
    if model.built:
        if input_shape != model.input_shape:
            raise ValueError(f"{model.where}: built for input {model.input_shape}, not "
                             f"{input_shape}; make a new model")
    else:
        model.declare_at(input_shape, model.path)


def first_layer(model: Layer) -> Layer:
    """The one whose backward_parameters() training calls, and not its backward().

    It is the first with parameters, which must be declared; what stands before it has no backward
    pass.
    """
    while isinstance(model, Sequential) and model.learns:
        model = next(layer for layer in model.layers if layer.learns)
    return model


def _parameters(layer: Layer) -> int:
    return sum(p.size for p in layer.own_parameters.values())


def _dense_weights(layer: Layer) -> int:
    if not any(p.decay for p in layer.own_parameters.values()):
        return 0
    return math.prod(layer.input_shape) * math.prod(layer.output_shape)


def _number(n: int) -> str:
    return f"{n:,}" if n else "-"


def _bytes(n: int) -> str:
    if not n:
        return "-"
    if n < 2**10:
        return f"{n} B"
    return f"{n / 2**20:,.1f} MiB" if n >= 2**20 else f"{n / 2**10:,.1f} KiB"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]],
           totals: Sequence[tuple[str, ...]], numbers: int) -> str:
    """The last columns, `numbers` of them, are set to the right.

    The name of a total may reach into the columns that it leaves empty.
    """
    widths = [max(map(len, column)) for column in zip(
        header, *rows, *(("", *total[1:]) for total in totals))]
    rule = "-" * (sum(widths) + 2 * len(widths) - 2)

    def line(cells: tuple[str, ...]) -> str:
        return "  ".join(c.ljust(w) if i < len(cells) - numbers else c.rjust(w)
                         for i, (c, w) in enumerate(zip(cells, widths))).rstrip()

    def sums(cells: tuple[str, ...]) -> str:
        first = next(i for i, cell in enumerate(cells) if i and cell)
        room = sum(widths[:first]) + 2 * (first - 1)
        return "  ".join([cells[0].ljust(room), *(
            c.rjust(w) for c, w in zip(cells[first:], widths[first:]))])

    return "\n".join([line(header), rule, *map(line, rows), rule, *map(sums, totals)])
