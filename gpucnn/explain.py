"""Where in an image a network sees what it says: Grad-CAM."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpucnn.backend import Array
from gpucnn.data import check_labels
from gpucnn.geometry import is_int
from gpucnn.layers import AvgPool2D, BatchNorm, Dropout, Layer, MaxPool2D, Sequential
from gpucnn.training.plain import receive


def grad_cam(model: Layer, x: Any, class_index: Any = None, layer: str | None = None
             ) -> np.ndarray:
    """How much each place of an image speaks for a class: float32 (n, h, w) from 0 to 1.

    Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
    Localization", equations 1 and 2, with A (h, w, channels) what a layer gives for an image and
    z_c the logit of the class:

        alpha_k = mean over i, j of dz_c / dA_ijk
        L_ij    = max(0, sum over k of alpha_k A_ijk)

    divided by its largest value, where that is not 0. h and w are those of A: stretch the map over
    the image. The network computes what it does in inference.

    model: built; it gives logits (n, classes).
    x: images (n, height, width, channels), on the host or the model's backend.
    class_index: of all images, or integers (n,), one for each; None for the most probable class.
    layer: the path of the layer that gives A, such as "conv4" (the names of model.walk() have all).
        None for the last that gives images and neither pools nor drops, such as the last
        convolution, its norm and activation included, or the last residual block.

    The model stays as it was, its gradients too, but for what a forward pass in training has kept
    for backward(): that is gone.

    Raises ValueError for a class or a layer that there is none of, and where the map is not finite.
    """
    if model.flat_grad is None:
        raise RuntimeError("grad_cam needs a built model; call model.build(input_shape)")
    target = last_image_layer(model) if layer is None else _layer_called(layer, model)
    with np.errstate(over="ignore", invalid="ignore"), _in_inference(model), \
            _watched(target) as seen:  # the map shows what overflows
        logits = model.forward(receive(model, x), training=True)
        if logits.ndim != 2:
            raise ValueError(f"grad_cam: the model must give logits (n, classes), got "
                             f"{logits.shape}")
        if "a" not in seen:
            raise ValueError(f"grad_cam: what {target.where} gives is added to another output "
                             "in the same pass; take the layer around both")
        model.backward(_one_hot(model, logits, class_index))
        maps = (seen["a"] * seen["alpha"][:, None, None, :]).sum(axis=-1)
    maps = np.maximum(model.backend.to_numpy(maps).astype(np.float32), 0)
    largest = maps.max(axis=(1, 2), keepdims=True)
    if not np.isfinite(largest).all():
        raise ValueError(f"grad_cam: the map of image {int(np.isfinite(largest).argmin())} is not "
                         "finite; the model may have diverged: train it again with a lower "
                         "learning rate")
    return maps / np.where(largest > 0, largest, 1)


def last_image_layer(model: Layer) -> Layer:
    """The last layer that gives images and neither pools nor drops. Raises ValueError for none."""
    layers = [layer for layer in _in_a_row(model) if len(layer.output_shape) == 3
              and not isinstance(layer, (MaxPool2D, AvgPool2D, Dropout))]
    if not layers:
        raise ValueError(f"grad_cam: no layer of {model.where} gives images; it needs a "
                         "convolution")
    return layers[-1]


def _in_a_row(layer: Layer) -> Iterator[Layer]:
    """The layers that follow one another, those inside of residual blocks and branches left out."""
    if isinstance(layer, Sequential):
        for inner in layer.layers:
            yield from _in_a_row(inner)
    else:
        yield layer


def _layer_called(path: str, model: Layer) -> Layer:
    with_images = {layer.path: layer for layer in model.walk() if len(layer.output_shape) == 3}
    if path not in with_images:
        raise ValueError(f"grad_cam: layer {path!r} is none that gives images; they are "
                         f"{', '.join(with_images)}")
    return with_images[path]


def _one_hot(model: Layer, logits: Array, class_index: Any) -> Array:
    """dz_c / dlogits of each image: images do not depend on each other in inference."""
    n, classes = logits.shape
    if class_index is None:
        labels = model.backend.to_numpy(logits.argmax(axis=1))
    elif is_int(class_index):
        labels = np.full(n, class_index)
    else:
        labels = np.asarray(class_index)
    check_labels(labels, classes)
    if len(labels) != n:
        raise ValueError(f"grad_cam: class_index has {len(labels)} classes for {n} images")
    return model.backend.asarray(np.eye(classes)[labels], model.dtype)


@contextmanager
def _in_inference(model: Layer) -> Iterator[None]:
    """forward(training=True) computes what it does in inference; what changes is put back."""
    gradients = model.flat_grad.copy()
    switches = {BatchNorm: ("frozen", True), Dropout: ("rate", 0.0)}
    before = [(layer, name, getattr(layer, name), value) for layer in model.walk()
              for name, value in [switches.get(type(layer), ("", None))] if name]
    try:
        for layer, name, _, value in before:
            setattr(layer, name, value)
        yield
    finally:
        for layer, name, value, _ in before:
            setattr(layer, name, value)
        model.flat_grad[...] = gradients
        model.forget()


@contextmanager
def _watched(layer: Layer) -> Iterator[dict[str, Array]]:
    """Holds "a", what the layer gives, and after its backward pass "alpha", the mean of da."""
    seen: dict[str, Array] = {}
    forward, backward, wide = layer.forward, layer.backward, layer.precision.parameters

    def watch_forward(x: Array, training: bool = False) -> Array:
        a = forward(x, training)
        seen["a"] = a.astype(wide, copy=False)
        return a

    def watch_backward(da: Array) -> Array:
        seen["alpha"] = da.mean(axis=(1, 2), dtype=wide)
        return backward(da)

    vars(layer).update(forward=watch_forward, backward=watch_backward)
    try:
        yield seen
    finally:
        del vars(layer)["forward"], vars(layer)["backward"]
