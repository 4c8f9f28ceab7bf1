"""Conv2D, MaxPool2D and AvgPool2D on both backends against gpucnn.reference, on random cases."""
import numpy as np
import pytest

from gpucnn import layers, reference
from tests import cases
from tests.cases import Case, Expected

LAYERS = {
    "conv": lambda case: layers.Conv2D(
        case.arrays["w"].shape[3], case.arrays["w"].shape[:2], activation=case.activation,
        bias="b" in case.arrays, **case.options),
    "max_pool": lambda case: layers.MaxPool2D(**case.options),
    "avg_pool": lambda case: layers.AvgPool2D(**case.options),
}


def expected_conv_layer(case: Case) -> Expected:
    """The article's layer. z is off by its bound, g'(z) by no more than that and its own rounding
    (slopes of g' are at most 1), the gradients by what dz is off, and by their own rounding.
    """
    a, o = case.arrays, case.options
    size = {k: np.abs(np.nan_to_num(v)) for k, v in a.items()}
    forward = cases.expected_conv(case)
    if case.activation:
        z = reference.conv2d(a["x"], a["w"], a.get("b"), **o)
        gradients = reference.layer_backward(a["dy"], z, a["x"], a["w"], case.activation, **o)
    else:
        gradients = reference.conv2d_backward(a["dy"], a["x"], a["w"], **o)
    dz_off = size["dy"] * (forward.bounds["y"] + 8 * cases.unit_roundoff(case.dtype))
    off = reference.conv2d_backward(dz_off, size["x"], size["w"], **o)
    values = {"y": forward.values["y"], **dict(zip(("dx", "dw", "db"), gradients))}
    # |g'| <= 1, so what bounds the gradients without an activation bounds them with one.
    bounds = {name: forward.bounds[name] + (more if case.activation else 0)
              for name, more in zip(("dx", "dw", "db"), off)}
    return Expected(values, {"y": forward.bounds["y"], **bounds})


EXPECTED = {"conv": expected_conv_layer, "max_pool": cases.expected_max_pool,
            "avg_pool": cases.expected_avg_pool}


@pytest.mark.parametrize(("op", "seeds"), cases.runs(share=2, ops=tuple(LAYERS)))
def test_layer_equals_the_reference(op, seeds, backend):
    for seed in seeds:
        case = cases.OPS[op].make(seed)
        dtype = np.promote_types(case.dtype, np.float32)  # layers have no float16
        arrays = {k: v.astype(dtype) for k, v in case.arrays.items()}
        # NaN in dy times a slope of 0 is NaN by the formula and 0 by ReLU's mask, as in torch.
        arrays["dy"] = np.nan_to_num(arrays["dy"])
        case = case._replace(dtype=dtype, arrays=arrays)
        with cases.named(case):
            arrays = {name: backend.asarray(a) for name, a in case.arrays.items()}
            layer = LAYERS[op](case)
            layer.build(case.arrays["x"].shape[1:], dtype=dtype)
            for name, p in layer.parameters().items():
                p.data[...] = arrays[name]
            results = {"y": layer.forward(arrays["x"], training=True),
                       "dx": layer.backward(arrays["dy"])}
            results |= {f"d{name}": p.grad for name, p in layer.parameters().items()}
            expected = EXPECTED[op](case)
            cases.assert_within(
                {name: backend.to_numpy(r) for name, r in results.items()},
                expected._replace(values={k: expected.values[k] for k in results}), dtype)
