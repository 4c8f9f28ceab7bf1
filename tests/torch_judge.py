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


def loss(case: Case) -> Arrays:
    logits = _leaf(case.arrays["logits"])
    mean = F.cross_entropy(logits, torch.tensor(case.arrays["labels"].astype(np.int64)),
                           **case.options)
    mean.backward()
    return {"loss": mean.detach().numpy(), "dlogits": logits.grad.numpy()}


def _pad(x: torch.Tensor, case: Case, value: float) -> torch.Tensor:
    geometry = {k: v for k, v in case.options.items() if k not in ("size", "groups")}
    size = case.options["size"] if "size" in case.options else case.arrays["w"].shape[:2]
    (top, bottom), (left, right) = cases.pad_pixels(*x.shape[2:], cases.pair(size), **{
        **geometry, "stride": _stride(case)})
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
