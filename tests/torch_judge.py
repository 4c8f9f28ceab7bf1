"""What torch's float64 autograd on the CPU says about the cases of tests/cases.py.

Import it inside a test, after pytest.importorskip("torch"). Arrays go in and come out as gpucnn
has them: NHWC and HWIO. Padding is put around the images by hand, because torch knows no
asymmetric padding; and a window that lies wholly in padding never reaches torch's max_pool2d,
whose backward pass writes out of bounds there: the cases have none.
"""
from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from gpucnn import rng
from gpucnn.layers import Layer
from tests import cases
from tests.cases import Arrays, Case

torch.set_num_threads(1)  # for tensors this small, waking the threads takes longer than the work

ACTIVATIONS = {None: lambda z: z, "relu": F.relu, "leaky_relu": F.leaky_relu,
               "sigmoid": torch.sigmoid, "tanh": torch.tanh}


def conv(case: Case, *, layer: bool = False) -> Arrays:
    """layer: whether dy is the derivative after the activation, as in Conv2D, or before it."""
    x, w = _leaf(_nchw(case.arrays["x"])), _leaf(case.arrays["w"].transpose(3, 2, 0, 1))
    b = _leaf(case.arrays["b"] if "b" in case.arrays else np.zeros(len(w)))
    o = case.options
    z = F.conv2d(_pad(x, case, 0), w, b, o["stride"], 0, o["dilation"], o["groups"])
    y = ACTIVATIONS[case.activation](z)
    (y if layer else z).backward(_tensor(_nchw(case.arrays["dy"])))
    return {"y": _nhwc(y), "dx": _nhwc(x.grad),
            "dw": w.grad.numpy().transpose(2, 3, 1, 0), "db": b.grad.numpy()}


def max_pool(case: Case) -> Arrays:
    """The mask and dx are those of numbers in the same order: torch would take the last NaN, and
    the padding for the maximum of a window of minus infinities."""
    x = _tensor(_nchw(case.arrays["x"]))
    ordered = x.nan_to_num(nan=3e38, posinf=2e38, neginf=-2e38).requires_grad_()
    (kh, kw), (sh, sw), (dh, dw) = (cases.pair(case.options["size"]), _stride(case),
                                    cases.pair(case.options["dilation"]))
    y = F.max_pool2d(_pad(x, case, -np.inf), (kh, kw), (sh, sw), 0, (dh, dw))
    padded = _pad(ordered, case, -np.inf)
    largest, index = F.max_pool2d(padded, (kh, kw), (sh, sw), 0, (dh, dw), return_indices=True)
    largest.backward(_tensor(_nchw(case.arrays["dy"])))
    oh, ow = y.shape[2:]
    ky = (index // padded.shape[3] - torch.arange(oh)[:, None] * sh) // dh
    kx = (index % padded.shape[3] - torch.arange(ow) * sw) // dw
    return {"y": _nhwc(y), "mask": _nhwc(ky * kw + kx), "dx": _nhwc(ordered.grad)}


def avg_pool(case: Case) -> Arrays:
    """The sum over each window, divided by the same sum over an image of ones."""
    x = _leaf(_nchw(case.arrays["x"]))

    def window_sum(images: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(_pad(images, case, 0), cases.pair(case.options["size"]), _stride(case),
                            divisor_override=1)

    y = window_sum(x) / window_sum(torch.ones_like(x))
    y.backward(_tensor(_nchw(case.arrays["dy"])))
    return {"y": _nhwc(y), "dx": _nhwc(x.grad)}


def columns(case: Case) -> Arrays:
    """torch's columns are ordered (c, kh, kw) and lie the other way round."""
    n, _, _, c = case.arrays["x"].shape
    kh, kw = cases.pair(case.options["size"])
    x = _leaf(_nchw(case.arrays["x"]))
    unfolded = F.unfold(_pad(x, case, 0), (kh, kw), cases.pair(case.options["dilation"]), 0,
                        _stride(case))
    cols = unfolded.reshape(n, c, kh * kw, unfolded.shape[2]).permute(0, 3, 2, 1)
    cols = cols.reshape(-1, kh * kw * c)
    cols.backward(_tensor(case.arrays["cols"]))
    return {"cols": cols.detach().numpy(), "x": _nhwc(x.grad)}


def gelu(case: Case) -> Arrays:
    """By erfc: F.gelu adds erf to 1, which leaves few digits far to the left."""
    x = _leaf(case.arrays["x"])
    y = x * torch.special.erfc(-x * 0.5**0.5) / 2
    y.backward(_tensor(case.arrays["dy"]))
    return {"y": y.detach().numpy(), "dx": x.grad.numpy()}


def loss(case: Case) -> Arrays:
    logits = _leaf(case.arrays["logits"])
    mean = F.cross_entropy(logits, torch.tensor(case.arrays["labels"].astype(np.int64)),
                           **case.options)
    mean.backward()
    return {"loss": mean.detach().numpy(), "dlogits": logits.grad.numpy()}


def layer(part: Layer, x: torch.Tensor, p: dict[str, torch.Tensor], at: str = "") -> torch.Tensor:
    """What a layer makes of x in training; p: its parameters by path, of which its own begin with
    `at`. Where p has the running statistics of norms too, all is as in inference."""
    return _LAYERS[type(part).__name__](part, x, p, at)


def _conv_layer(part, x, p, at):
    padded = _pad_layer(part, part.kernel_size, x)
    w = p[at + "w"].permute(3, 2, 0, 1).contiguous()
    z = F.conv2d(padded, w, p.get(at + "b"), part.stride, 0, part.dilation, part.groups)
    return ACTIVATIONS[part.activation](z).permute(0, 2, 3, 1)


def _avg_pool_layer(part, x, p, at):
    total, seen = (F.avg_pool2d(_pad_layer(part, part.size, v), part.size, part.stride,
                                divisor_override=1) for v in (x, torch.ones_like(x)))
    return (total / seen).permute(0, 2, 3, 1)


def _dense_layer(part, x, p, at):
    z = x @ p[at + "w"]
    return ACTIVATIONS[part.activation](z + p[at + "b"] if part.bias else z)


def _batch_norm_layer(part, x, p, at):
    mean, var = p.get(at + "running_mean"), p.get(at + "running_var")
    z = F.batch_norm(x.movedim(-1, 1), mean, var, p[at + "gamma"], p[at + "beta"],
                     training=mean is None, eps=part.epsilon).movedim(1, -1)
    return ACTIVATIONS[part.activation](z)


def _dropout_layer(part, x, p, at):
    """What is dropped is 0, whatever it was; the mask is that of the layer's first step."""
    words = rng.random_words(x.numel(), part.key).reshape(x.shape)
    kept = torch.tensor(words >= rng.drop_threshold(part.rate))
    return torch.where(kept, x / (1 - part.rate), torch.zeros(()))


def _sequential(part, x, p, at):
    for name, child in part.children().items():
        x = layer(child, x, p, f"{at}{name}/")
    return x


def _residual(part, x, p, at):
    shortcut = layer(part.shortcut, x, p, at + "shortcut/") if part.shortcut else x
    return ACTIVATIONS[part.activation](layer(part.body, x, p, at + "body/") + shortcut)


def _concat(part, x, p, at):
    return torch.cat([layer(child, x, p, f"{at}{name}/")
                      for name, child in part.children().items()], -1)


_LAYERS = {
    "Conv2D": _conv_layer, "AvgPool2D": _avg_pool_layer, "Dense": _dense_layer,
    "BatchNorm": _batch_norm_layer, "Dropout": _dropout_layer, "Sequential": _sequential,
    "Residual": _residual, "Concat": _concat,
    "GlobalAvgPool2D": lambda part, x, p, at: x.mean((1, 2)),
    "MaxPool2D": lambda part, x, p, at: F.max_pool2d(
        x.permute(0, 3, 1, 2), part.size, part.stride).permute(0, 2, 3, 1),
    "Flatten": lambda part, x, p, at: x.flatten(1),
    "ReLU": lambda part, x, p, at: F.relu(x),
    "LeakyReLU": lambda part, x, p, at: F.leaky_relu(x, part.slope),
    "Sigmoid": lambda part, x, p, at: torch.sigmoid(x),
    "Tanh": lambda part, x, p, at: torch.tanh(x),
    "GELU": lambda part, x, p, at: F.gelu(x),
    "Scale": lambda part, x, p, at: x * part.factor,
    "Softmax": lambda part, x, p, at: x.softmax(-1),
}


def _pad_layer(part: Layer, size: tuple[int, int], x: torch.Tensor) -> torch.Tensor:
    """x (n, h, w, c), as torch has it, with the layer's padding of zeros around it."""
    geometry = {"padding": part.padding, "stride": part.stride,
                "dilation": getattr(part, "dilation", 1)}
    return _pad_sides(x.permute(0, 3, 1, 2), size, 0, **geometry)


def _pad(x: torch.Tensor, case: Case, value: float) -> torch.Tensor:
    geometry = {k: v for k, v in case.options.items() if k not in ("size", "groups")}
    size = case.options["size"] if "size" in case.options else case.arrays["w"].shape[:2]
    return _pad_sides(x, cases.pair(size), value, **{**geometry, "stride": _stride(case)})


def _pad_sides(x: torch.Tensor, size: tuple[int, int], value: float, **geometry) -> torch.Tensor:
    (top, bottom), (left, right) = cases.pad_pixels(*x.shape[2:], size, **geometry)
    return F.pad(x, (left, right, top, bottom), value=value)


def _stride(case: Case) -> tuple[int, int]:
    stride = case.options["stride"]
    return cases.pair(case.options["size"] if stride is None else stride)


def _tensor(a: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(a, np.float64))


def _leaf(a: np.ndarray) -> torch.Tensor:
    return _tensor(a).requires_grad_()


def _nchw(a: np.ndarray) -> np.ndarray:
    return a.transpose(0, 3, 1, 2)


def _nhwc(t: torch.Tensor) -> np.ndarray:
    return t.detach().numpy().transpose(0, 2, 3, 1)
