"""A model comes back as it was, on either backend, or with one line that says why not."""
from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
import safetensors.numpy

from gpucnn.backend import use_backend
from gpucnn.errors import CheckpointError, ModelFormatError
from gpucnn.layers import BatchNorm, Conv2D, Dense, Dropout, Flatten, ReLU, Residual, Sequential
from gpucnn.models import load_model, load_weights, save_model
from tests.conftest import needs_cupy

SHAPE = (6, 5, 2)


def make(filters=3):
    model = Sequential([Conv2D(filters, (3, 2), padding="same", activation="relu"), BatchNorm(),
                        Residual(Sequential([Conv2D(filters, 1), ReLU()])), Dropout(0.1),
                        Flatten(), Dense(4, name="last")])
    model.build(SHAPE, seed=1)
    return model


def trained(backend):
    model = make()
    x = backend.asarray(np.random.default_rng(0).standard_normal((4, *SHAPE)), np.float32)
    model.backward(model.forward(x, training=True))
    return model, x


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(make(), path, class_names=["a", "b", "c", "d"])
    return path


def test_round_trip(backend, tmp_path):
    model, x = trained(backend)
    save_model(model, tmp_path / "m.safetensors", note="ä")
    again, metadata = load_model(tmp_path / "m.safetensors")
    assert metadata == {"note": "ä"}
    assert again.config() == model.config()
    assert sorted(os.listdir(tmp_path)) == ["m.json", "m.safetensors"]
    np.testing.assert_array_equal(backend.to_numpy(again.forward(x)),
                                  backend.to_numpy(model.forward(x)))


@needs_cupy
@pytest.mark.parametrize("order", [("numpy", "cupy"), ("cupy", "numpy")], ids="to".join)
def test_saved_on_one_backend_and_loaded_on_the_other(order, tmp_path):
    arrays = []
    for name in order:
        with use_backend(name) as backend:
            if name == order[0]:
                model, _ = trained(backend)
                save_model(model, tmp_path / "m.safetensors")
            else:
                model, _ = load_model(tmp_path / "m.safetensors")
            arrays.append([backend.to_numpy(p.data) for p in model.parameters().values()]
                          + [backend.to_numpy(layer.own_buffers[key])
                             for layer, key in model.buffers().values()])
    assert len(arrays[0]) == 10
    for here, there in zip(*arrays):
        np.testing.assert_array_equal(here, there)


def base():
    return np.arange(96, dtype=np.float32).reshape(4, 3, 2, 4)


VIEWS = {
    "transposed": lambda: base().transpose(1, 2, 3, 0)[:, :, :2, :3],
    "sliced": lambda: base()[:3, :2, :2, :3],
    "every other": lambda: np.arange(288, dtype=np.float32).reshape(6, 4, 4, 3)[::2, ::2, ::2],
    "negative strides": lambda: base()[2::-1, 1::-1, ::-1, 2::-1],
    "broadcast": lambda: np.broadcast_to(base()[:3, :2, :1, :1], (3, 2, 2, 3)),
    "Fortran order": lambda: np.asfortranarray(base()[:3, :2, :2, :3]),
    "read-only": lambda: np.frombuffer(base()[:3, :2, :2, :3].tobytes(), np.float32).reshape(
        3, 2, 2, 3),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_row_35_views_are_saved_as_they_look(view, tmp_path):
    model = make()
    parameter = model.parameters()["conv1/w"]
    parameter.data = view()
    assert parameter.data.shape == parameter.shape == (3, 2, 2, 3)
    save_model(model, tmp_path / "m.safetensors")
    again, _ = load_model(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(again.parameters()["conv1/w"].data, parameter.data)


def test_numpy_numbers_as_arguments_are_saved(tmp_path):
    model = Sequential([Conv2D(np.int64(2), np.int32(1), groups=np.int64(1)),
                        Dropout(np.float64(0.25))])
    model.build(SHAPE)
    save_model(model, tmp_path / "m.safetensors")
    again, _ = load_model(tmp_path / "m.safetensors")
    assert again.config() == model.config()


def test_a_residual_network_from_before_its_layers_had_activations(tmp_path, rng):
    """It loads as it was, and its weights fit the network whose ReLUs are fused."""
    def network(norm_and_relu, relu, **activation):
        body = Sequential([Conv2D(3, padding=1), *norm_and_relu(), Conv2D(3, padding=1),
                           BatchNorm()])
        return Sequential([Conv2D(3, 1), *norm_and_relu(), Residual(body, **activation), *relu])

    old = network(lambda: [BatchNorm(), ReLU()], [ReLU()])
    new = network(lambda: [BatchNorm(activation="relu")], [], activation="relu")
    for seed, model in enumerate((old, new)):
        model.build((5, 4, 3), seed=seed)
    x = rng.standard_normal((4, 5, 4, 3)).astype(np.float32)
    old.forward(x, training=True)
    path = tmp_path / "m.safetensors"
    save_model(old, path)
    text = path.with_suffix(".json").read_text()
    described = re.sub(r'\n *"activation": null,', "", text)
    assert (text.count("activation"), described.count("activation")) == (7, 0)
    path.with_suffix(".json").write_text(described)
    again, _ = load_model(path)
    assert again.config() == old.config()
    np.testing.assert_array_equal(again.forward(x), old.forward(x))
    load_weights(new, path)
    np.testing.assert_allclose(new.forward(x), old.forward(x), rtol=1e-5, atol=1e-6)


def header(data):
    return int.from_bytes(data[:8], "little")


DAMAGES = {
    "empty": lambda d: b"",
    "cut in the length": lambda d: d[:5],
    "cut in the header": lambda d: d[:40],
    "cut in the data": lambda d: d[:-1],
    "one byte more": lambda d: d + b"\0",
    "a huge header": lambda d: b"\xff" * 8 + d[8:],
    "no JSON": lambda d: d[:8] + b"x" * header(d) + d[8 + header(d):],
    "a text file": lambda d: b"hello, this is no model at all\n" * 4,
    "a zip file": lambda d: b"PK\x03\x04" + d[4:],
    "an unknown dtype": lambda d: d.replace(b'"F32"', b'"Q32"', 1),
    "offsets that overlap": lambda d: d.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1),
    "a shape too large": lambda d: d.replace(b'"shape":[3,2,2,3]', b'"shape":[9,2,2,3]', 1),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_row_32_damaged_weights(damage, saved):
    data = saved.read_bytes()
    assert damage(data) != data
    saved.write_bytes(damage(data))
    with pytest.raises(CheckpointError, match=r"m\.safetensors: damaged \(") as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


DESCRIPTIONS = {
    "no JSON": (b"{", "not the description of a gpucnn model"),
    "no text": (b"\xff\xfe\x00", "not the description of a gpucnn model"),
    "a list": (b"[1]", "not the description of a gpucnn model"),
    "another JSON": (b'{"a": 1}', "not the description of a gpucnn model"),
    "no model": (b'{"format": 1, "gpucnn": "0.1.0"}', "'model' is missing"),
    "unknown layer": (b'{"format": 1, "gpucnn": "0.1.0", "model": {"class": "Conv9D"}}',
                      "layer class 'Conv9D' is not known; known: AvgPool2D"),
    "unknown argument": (b'{"format": 1, "gpucnn": "0.1.0", "model": {"class": "ReLU", "x": 1}}',
                         "layer ReLU cannot be made: .*'x'"),
    "no shape": (b'{"format": 1, "gpucnn": "0.1.0", "model": {"class": "ReLU"}}',
                 "'input_shape' is missing"),
    "model is a list": (b'{"format": 1, "gpucnn": "0.1.0", "model": []}',
                        "a layer must be an object with its class, got"),
    "part is no layer": (b'{"format": 1, "gpucnn": "0.1.0", "model": {"class": "Residual", "body":'
                         b' 3}}', "Residual: 3 is not a layer"),
    "layers is text": (b'{"format": 1, "gpucnn": "0.1.0", "model": {"class": "Sequential", "layers"'
                       b': "x"}}', "Sequential: 'x' is not a layer"),
    "deep": (b"[" * 100_000, "not the description of a gpucnn model .maximum recursion"),
    "format true": (b'{"format": true, "gpucnn": "0.1.0"}', "format must be an int >= 1, got True"),
    "format 0": (b'{"format": 0, "gpucnn": "0.1.0"}', "format must be an int >= 1, got 0"),
    "no metadata": (b'{"format": 1, "gpucnn": "0.1.0", "metadata": null}',
                    "metadata must be an object, got None"),
    "deep model": (b'{"format": 1, "gpucnn": "0.1.0", "model": ' + 400 * b'{"class": "Sequential", '
                   b'"layers": [' + b'{"class": "ReLU"}' + 400 * b"]}" + b"}", "maximum recursion"),
    "huge": (b'{"format": 1, "gpucnn": "0.1.0", "model": {"class": "Dense", "units": 1000000}, '
             b'"input_shape": [1000000000], "dtype": "float32"}', "Unable to allocate"),
    "bad shape": (b'{"format": 1, "gpucnn": "0.1.0", "model": {"class": "ReLU"}, "input_shape": '
                  b'[-1], "dtype": "float32"}', "input_shape must be ints >= 1"),
}


@pytest.mark.parametrize(("text", "message"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_damaged_descriptions(text, message, saved):
    saved.with_suffix(".json").write_bytes(text)
    with pytest.raises(ModelFormatError, match=f"m.json: .*{message}"):
        load_model(saved)


def test_row_33_everything_that_does_not_fit_is_listed_at_once(saved):
    arrays = safetensors.numpy.load_file(saved)
    del arrays["norm1/gamma"]
    arrays["fc9/b"] = arrays["last/b"]
    arrays["last/w"] = arrays["last/w"].astype(np.float64)
    saved.write_bytes(safetensors.numpy.save(arrays))
    model = make(filters=4)
    before = model.flat_data.copy()
    with pytest.raises(CheckpointError, match="does not fit this model") as caught:
        load_weights(model, saved)
    for problem in ("missing norm1/gamma", "unexpected fc9/b",
                    "conv1/w is (3, 2, 2, 3), model wants (3, 2, 2, 4)"):
        assert problem in str(caught.value)
    np.testing.assert_array_equal(model.flat_data, before)
    with pytest.raises(CheckpointError, match="last/w is float64, model wants float32"):
        load_weights(make(), saved)


def test_row_34_a_newer_format_is_named(saved):
    description = json.loads(saved.with_suffix(".json").read_text()) | {"format": 3,
                                                                        "gpucnn": "2.1"}
    saved.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"written by gpucnn 2\.1 \(format 3\); this is "
                                              r".* \(format 1\); pip install -U gpucnn"):
        load_model(saved)


def test_paths(tmp_path):
    with pytest.raises(ModelFormatError, match="w.pth is a pickle file, which gpucnn never loads"):
        load_model(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"must end in \.safetensors, got .*w\.npz"):
        save_model(make(), tmp_path / "w.npz")
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot write .*No such file or directory"):
        save_model(make(), tmp_path / "nowhere" / "m.safetensors")
    with pytest.raises(RuntimeError, match="needs a built model"):
        save_model(Sequential([ReLU()]), tmp_path / "m.safetensors")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_model(function, saved, monkeypatch):
    before = saved.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(CheckpointError, match=r"m.safetensors: No space left on device"):
        save_model(make(filters=5), saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert sorted(os.listdir(saved.parent)) == ["m.json", "m.safetensors"]
    load_model(saved)
