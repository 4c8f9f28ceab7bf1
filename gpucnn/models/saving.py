"""A model on disk: NAME.safetensors with the arrays, NAME.json with how to build the model.

Both are written under a temporary name and renamed, so that a reader finds the old or the new
file, whole, even after a kill or on a full disk. Nothing is ever unpickled. Arrays are saved as
they lie in NumPy's memory, so a model saved on one backend loads on the other.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from gpucnn._version import __version__
from gpucnn.backend import get_backend
from gpucnn.errors import CheckpointError, ModelFormatError
from gpucnn.files import PathLike, one_line, write_atomically
from gpucnn.layers import Layer, from_config
from gpucnn.precision import make_precision

FORMAT = 1


def save_model(model: Layer, path: PathLike, **metadata: Any) -> None:
    """Write a built model to `path` and to the .json beside it.

    path: ends in .safetensors.
    metadata: what the model's users need beside it, such as class_names; JSON must be able to
        hold it. load_model returns it.

    Raises CheckpointError where the files cannot be written; what was there before stays.
    """
    path = _checked(path)
    if not model.built:
        raise RuntimeError("save_model needs a built model; call model.build(input_shape)")
    description = {"format": FORMAT, "gpucnn": __version__, **describe(model), "metadata": metadata}
    try:
        text = json.dumps(description, indent=1)
        write_atomically(path, safetensors.numpy.save(arrays_of(model), {"format": str(FORMAT)}))
        write_atomically(path.with_suffix(".json"), text.encode())
    except OSError as e:
        raise CheckpointError(f"cannot write {one_line(path)}: {e.strerror or e}") from e


def load_model(path: PathLike, precision: str | None = None) -> tuple[Layer, dict[str, Any]]:
    """The saved model, built, on the backend in use now; and its metadata.

    precision: None for the one it was saved with; on NumPy a model of mixed precision is then
        built in float32, which its parameters are stored in. Another one must store parameters
        as that one does: they are not converted.

    Raises FileNotFoundError, CheckpointError for damaged or unfitting weights, ModelFormatError
    for a description that cannot be turned into a model, ValueError for a precision that is not
    known or not this backend's.
    """
    path = _checked(path)
    if precision is not None:
        make_precision("load_model", precision, get_backend().name)
    description = _read_description(path.with_suffix(".json"))
    try:
        model = build_described(description, precision)
    except (KeyError, TypeError, ValueError, OverflowError, MemoryError, RecursionError,
            ModelFormatError) as e:
        cause = f"{e.args[0]!r} is missing" if isinstance(e, KeyError) else e
        raise ModelFormatError(f"{one_line(path.with_suffix('.json'))}: {cause}") from e
    load_weights(model, path)
    return model, description["metadata"]


def load_weights(model: Layer, path: PathLike) -> None:
    """Read the parameters and buffers of a built model from a .safetensors file.

    Raises FileNotFoundError, or CheckpointError that lists everything that does not fit; then
    the model is unchanged.
    """
    path = _checked(path)
    set_arrays(model, _read_arrays(path), one_line(path))


def describe(model: Layer) -> dict[str, Any]:
    """How to build the model again: what build_described() takes, and JSON can hold."""
    return {"input_shape": model.input_shape, "dtype": str(model.precision.parameters),
            "precision": model.precision.name, "model": model.config()}


def build_described(description: dict[str, Any], precision: str | None = None) -> Layer:
    """The model of describe(), built on the backend in use now; precision: as in load_model."""
    model = from_config(description["model"])
    model.build(tuple(description["input_shape"]),
                precision=precision or _saved_precision(description, model))
    return model


def arrays_of(model: Layer) -> dict[str, np.ndarray]:
    """The parameters and buffers of a built model, by path, on the host."""
    to_numpy = model.backend.to_numpy
    arrays = {name: to_numpy(p.data) for name, p in model.parameters().items()}
    arrays |= {name: to_numpy(layer.own_buffers[key])
               for name, (layer, key) in model.buffers().items()}
    # safetensors writes the memory as it lies, which for a transposed view is another array.
    return {name: np.ascontiguousarray(a) for name, a in arrays.items()}


def set_arrays(model: Layer, saved: dict[str, np.ndarray], source: str) -> None:
    """Copy what arrays_of() gave into a model of the same layers.

    Raises CheckpointError that lists everything that does not fit; then the model is unchanged.
    """
    parameters, buffers = model.parameters(), model.buffers()
    stored = model.precision.parameters
    wanted = {name: (p.shape, stored) for name, p in parameters.items()}
    wanted |= {name: (layer.own_buffers[key].shape, stored)
               for name, (layer, key) in buffers.items()}
    problems = [f"missing {name}" for name in wanted if name not in saved]
    problems += [f"unexpected {name}" for name in saved if name not in wanted]
    for name, (shape, dtype) in wanted.items():
        if name in saved and saved[name].shape != shape:
            problems.append(f"{name} is {saved[name].shape}, model wants {shape}")
        elif name in saved and saved[name].dtype != dtype:
            problems.append(f"{name} is {saved[name].dtype}, model wants {dtype}")
    if problems:
        raise CheckpointError(f"{source} does not fit this model: {'; '.join(problems)}")
    for name, p in parameters.items():
        p.data[...] = model.backend.asarray(saved[name])
    model.cast_parameters()
    for name, (layer, key) in buffers.items():
        layer.own_buffers[key][...] = model.backend.asarray(saved[name])


def _saved_precision(description: dict[str, Any], model: Layer) -> str:
    dtype = description["dtype"]  # all that models saved before there were precisions say
    name = str(description.get("precision", dtype))
    return dtype if name.startswith("mixed_") and model.backend.name == "numpy" else name


def _checked(path: PathLike) -> Path:
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".pkl", ".pickle"):
        raise ModelFormatError(f"{one_line(path)} is a pickle file, which gpucnn never loads; "
                               "convert it to .safetensors")
    if path.suffix != ".safetensors":
        raise ValueError(f"a model's path must end in .safetensors, got {one_line(path)}")
    return path


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_bytes())
        written, version = description["format"], description["gpucnn"]
        metadata = description.setdefault("metadata", {})
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ModelFormatError(f"{one_line(path)}: not the description of a gpucnn model "
                               f"({one_line(e)})") from e
    if type(written) is not int or written < 1:
        raise ModelFormatError(f"{one_line(path)}: format must be an int >= 1, got {written!r}")
    if not isinstance(metadata, dict):
        raise ModelFormatError(f"{one_line(path)}: metadata must be an object, got {metadata!r}")
    if written > FORMAT:
        raise CheckpointError(f"{one_line(path)}: written by gpucnn {version} (format {written}); "
                              f"this is {__version__} (format {FORMAT}); pip install -U gpucnn")
    return description


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    try:
        return safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as e:
        raise CheckpointError(f"{one_line(path)}: damaged ({one_line(e)})") from e


