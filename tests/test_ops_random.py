"""gpucnn.ops on both backends against gpucnn.reference and torch: random cases, and views."""
import numpy as np
import pytest

from gpucnn import layers, ops
from tests import cases


@pytest.mark.parametrize(("op", "seeds"), cases.runs())
def test_equals_the_reference(op, seeds, backend, monkeypatch):
    for seed in seeds:
        case = cases.OPS[op].make(seed)
        # Every other case in blocks of one image, as large batches are worked through.
        monkeypatch.setattr(backend, "block_bytes", 1 if seed % 2 else 1 << 20)
        with cases.named(case):
            cases.judge(case, cases.OPS[op].expect(case), backend)


@pytest.mark.parametrize(("op", "seeds"), cases.runs())
def test_equals_torch(op, seeds, backend, monkeypatch):
    pytest.importorskip("torch")
    from tests import torch_judge
    for seed in seeds:
        case = cases.OPS[op].make(seed)
        monkeypatch.setattr(backend, "block_bytes", 1 if seed % 2 else 1 << 20)
        with cases.named(case):
            bounds = cases.OPS[op].expect(case).bounds
            cases.judge(case, cases.Expected(getattr(torch_judge, op)(case), bounds), backend)


def test_the_cases_are_as_varied_as_they_should_be():
    made = {op: [judged.make(seed) for seed in range(judged.count)]
            for op, judged in cases.OPS.items()}
    distinct = {op: len({(str(c._replace(seed=0)), *(a.tobytes() for a in c.arrays.values()))
                         for c in some}) for op, some in made.items()}
    assert distinct == {"conv": 600, "max_pool": 600, "avg_pool": 400, "columns": 250, "gelu": 250,
                        "loss": 250}
    assert sum(distinct.values()) >= 2000                # on each backend, for each of two judges
    for op in ("conv", "max_pool", "avg_pool", "columns"):
        some = made[op]
        size = [c.arrays["w"].shape[:2] if op == "conv" else c.options["size"] for c in some]
        geometry = [{k: v for k, v in c.options.items() if k not in ("size", "groups")}
                    | {"stride": c.options["stride"] or s} for c, s in zip(some, size)]
        shape = [c.arrays["x"].shape for c in some]
        pads = [cases.pad_pixels(*x[1:3], s, **g) for x, s, g in zip(shape, size, geometry)]
        stops = [cases.output_size(*x[1:3], s, **g) for x, s, g in zip(shape, size, geometry)]
        wanted = {
            "empty batch": sum(x[0] == 0 for x in shape),
            "one image": sum(x[0] == 1 for x in shape),
            "non-square": sum(x[1] != x[2] for x in shape),
            "16 bytes of channels": sum(x[3] % 4 == 0 for x in shape),
            "1x1": sum(s == (1, 1) for s in size),
            "even": sum(k % 2 == 0 for s in size for k in s),
            "same": sum(g["padding"] == "same" for g in geometry),
            "valid": sum(g["padding"] == "valid" for g in geometry),
            "int padding": sum(isinstance(g["padding"], int) for g in geometry),
            "asymmetric": sum(p[0] != p[1] for ps in pads for p in ps),
            "stride pair": sum(isinstance(g["stride"], tuple) for g in geometry),
            "stride": sum(max(cases.pair(g["stride"])) > 1 for g in geometry),
            "remainder": sum((x[1] + sum(p[0]) - s[0]) % cases.pair(g["stride"])[0] > 0
                             for x, p, s, g in zip(shape, pads, size, geometry)),
            "overlap": sum(max(o) > 1 and max(cases.pair(g["stride"])) < max(s)
                           for o, g, s in zip(stops, geometry, size)),
            **{f"NaN in {name}": sum(name in c.arrays and bool(np.isnan(c.arrays[name]).any())
                                     for c in some)
               for name in {name for c in some for name in c.arrays}},
            "seen backwards or transposed": sum(c.seed % 3 > 0 for c in some),
            "ties": sum(c.values == "ties" for c in some),
            **{str(t): sum(c.dtype == t for c in some) for t in ("float16", "float32", "float64")},
        }
        if op != "avg_pool":
            wanted["dilation"] = sum(max(cases.pair(g["dilation"])) > 1 for g in geometry)
        if op == "conv":
            wanted["groups"] = sum(c.options["groups"] > 1 for c in some)
            wanted["depthwise"] = sum(c.options["groups"] == c.arrays["x"].shape[3] > 1
                                      for c in some)
            wanted["rows of taps"] = sum(
                max(cases.pair(c.options["stride"])) == c.options["groups"] == 1 < k[0]
                and k[1] * min(x[3], c.arrays["w"].shape[3]) >= 16
                for c, k, x in zip(some, size, shape))
            wanted["no bias"] = sum("b" not in c.arrays for c in some)
            wanted |= {str(g): sum(c.activation == g for c in some)
                       for g in (None, "relu", "leaky_relu", "sigmoid", "tanh")}
        too_few = {k: v for k, v in wanted.items() if v < 5}
        assert not too_few, (op, too_few)


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity times the zeros of the padding
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_stays_with_the_pixels_that_it_saw(value, backend, rng):
    """Where rows of taps are long enough for the CPU to compute dx as a full convolution."""
    shapes = {"x": (2, 6, 5, 8), "w": (3, 3, 8, 8), "b": (8,), "dy": (2, 6, 5, 8)}
    arrays = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays["w"][0, 2, 1, 3] = value
    case = cases.Case("conv", 0, np.dtype(float), "normal", arrays,
                      {"stride": 1, "padding": 1, "dilation": 1, "groups": 1})
    cases.judge(case, cases.expected_conv(case), backend)


@pytest.mark.parametrize("far", [8, 2**33])
def test_steps_past_the_end_of_the_input_come_to_the_same(far, backend, rng):
    x, w = (backend.asarray(rng.standard_normal(s)) for s in ((2, 5, 6, 2), (3, 1, 2, 3)))
    y = backend.to_numpy(ops.conv2d(x, w, padding=1)[:, :1, :1])
    far_apart = {"stride": far, "padding": 1, "dilation": (1, far)}
    np.testing.assert_array_equal(backend.to_numpy(ops.conv2d(x, w, **far_apart)), y)
    dx, _, _ = ops.conv2d_backward(backend.asarray(y), x, w, **far_apart)
    assert not backend.to_numpy(dx)[:, 2:].any()
    assert ops.max_pool2d(x, 2, stride=far)[0].shape == (2, 1, 1, 2)


def test_the_mean_of_many_pixels_keeps_its_digits(backend):
    """h + w roundings, of a row and of the rows' sums, where h * w would leave two digits."""
    h, w = 1024, 512
    x = backend.asarray(np.full((1, h, w, 3), 0.1, np.float32))
    layer = layers.GlobalAvgPool2D()
    layer.build(x.shape[1:])
    for y in (ops.avg_pool2d(x, (h, w)), layer.forward(x)):
        np.testing.assert_allclose(backend.to_numpy(y).ravel(), [np.float32(0.1)] * 3,
                                   rtol=(h + w) * cases.unit_roundoff(y.dtype))


@pytest.mark.parametrize("places", [255, 256])
def test_mask_of_a_window_too_large_for_a_byte(places, backend):
    x = np.zeros((1, 1, places, 4), np.float32)
    x[0, 0, -1] = 1
    case = cases.Case("max_pool", 0, x.dtype, "ties", {"x": x, "dy": x[:, :, :1] + 1},
                      {"size": (1, places)})
    results = cases.run_max_pool(case, {k: backend.asarray(v) for k, v in case.arrays.items()})
    results = {name: backend.to_numpy(r) for name, r in results.items()}
    assert results["mask"].dtype == (np.uint8 if places == 255 else np.int32)
    assert results["mask"].max() == places - 1
    cases.assert_within(results, cases.expected_max_pool(case), x.dtype)


def _viewed_case(op, **options):
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"x": (2, 5, 6, 4), "w": (3, 2, 2, 8), "b": (8,), "dy": (2, 2, 5, 8)},
        "max_pool": {"x": (2, 5, 6, 4), "dy": (2, 2, 5, 4)},
        "avg_pool": {"x": (2, 5, 6, 4), "dy": (2, 2, 5, 4)},
        "columns": {"x": (2, 5, 6, 4), "cols": (20, 24)},
        "gelu": {"x": (5, 6, 4), "dy": (5, 6, 4)},
        "loss": {"logits": (7, 5)},
    }[op]
    arrays = {k: rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    if op == "loss":
        arrays["labels"] = rng.integers(0, 5, 7)
    elif op != "gelu":
        options["stride"] = 2, 1
        options |= {"groups": 2} if op == "conv" else {"size": (3, 2)}
    return cases.Case(op, 0, np.dtype(np.float32), "normal", arrays, options)


BACKWARDS = slice(None, None, -1)
# name: (how the values are stored, the view of the store that has them in order again)
VIEWS = {
    "transposed": (lambda a: a.transpose(), lambda xp, s, shape: s.transpose()),
    "last axes swapped": (lambda a: a.swapaxes(-1, -2), lambda xp, s, shape: s.swapaxes(-1, -2)),
    "negative strides": (lambda a: a[(BACKWARDS,) * a.ndim],
                         lambda xp, s, shape: s[(BACKWARDS,) * s.ndim]),
    "sliced": (lambda a: np.repeat(a, 2, axis=0), lambda xp, s, shape: s[1::2]),
    "broadcast": (lambda a: a[:1], lambda xp, s, shape: xp.broadcast_to(s, shape)),
    "off alignment": (lambda a: np.array([0, *a.flat], a.dtype),
                      lambda xp, s, shape: s[1:].reshape(shape)),
    "read-only": (lambda a: a, lambda xp, s, shape: s),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("op", cases.OPS)
def test_views_give_the_bits_of_their_contiguous_copies(op, view, backend):
    store, look = VIEWS[view]
    case, run = _viewed_case(op), cases.OPS[op].run
    copies, views = {}, {}
    for name, a in case.arrays.items():
        if view == "broadcast":
            a = np.broadcast_to(a[:1], a.shape)
        copies[name] = views[name] = backend.asarray(np.ascontiguousarray(a))
        if a.ndim > 1:
            views[name] = look(backend.xp, backend.asarray(np.ascontiguousarray(store(a))), a.shape)
            np.testing.assert_array_equal(backend.to_numpy(views[name]), a)
            assert views[name].flags.c_contiguous == (view in ("off alignment", "read-only"))
        if view == "read-only" and backend.name == "numpy":
            views[name].flags.writeable = False
    want, got = run(case, copies), run(case, views)
    for name in want:
        assert (backend.to_numpy(got[name]).tobytes()
                == backend.to_numpy(want[name]).tobytes()), name
