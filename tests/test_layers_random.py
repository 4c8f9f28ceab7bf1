"""All layers on both backends on random cases: the layers with a window against gpucnn.reference
and torch, the others, and layers made of layers, against torch."""
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


def run_layer(case: Case, backend) -> dict[str, np.ndarray]:
    """y, dx and the parameters' gradients, of the case in the layer's dtype."""
    layer = LAYERS[case.op](case)
    layer.build(case.arrays["x"].shape[1:], dtype=case.dtype)
    for name, p in layer.parameters().items():
        p.data[...] = backend.asarray(case.arrays[name])
    results = {"y": layer.forward(backend.asarray(case.arrays["x"]), training=True),
               "dx": layer.backward(backend.asarray(case.arrays["dy"]))}
    results |= {f"d{name}": p.grad for name, p in layer.parameters().items()}
    return {name: backend.to_numpy(r) for name, r in results.items()}


def layer_case(op: str, seed: int) -> Case:
    case = cases.OPS[op].make(seed)
    dtype = np.promote_types(case.dtype, np.float32)  # layers have no float16
    return case._replace(dtype=dtype, arrays={k: v.astype(dtype) for k, v in case.arrays.items()})


@pytest.mark.parametrize(("op", "seeds"), cases.runs(share=4, ops=tuple(LAYERS)))
def test_layer_equals_the_reference(op, seeds, backend):
    for seed in seeds:
        case = layer_case(op, seed)
        # NaN in dy times a slope of 0 is NaN by the formula and 0 by ReLU's mask, as in torch.
        case = case._replace(arrays=case.arrays | {"dy": np.nan_to_num(case.arrays["dy"])})
        with cases.named(case):
            results, expected = run_layer(case, backend), EXPECTED[op](case)
            cases.assert_within(results, expected._replace(
                values={k: expected.values[k] for k in results}), case.dtype)


@pytest.mark.parametrize(("op", "seeds"), cases.runs(ops=tuple(LAYERS)))
def test_layer_with_a_window_equals_torch(op, seeds, backend):
    pytest.importorskip("torch")
    from tests import torch_judge
    for seed in seeds:
        case = layer_case(op, seed)
        with cases.named(case):
            results, bounds = run_layer(case, backend), EXPECTED[op](case).bounds
            options = {"layer": True} if op == "conv" else {}
            values = getattr(torch_judge, op)(case, **options)
            cases.assert_within(results, Expected({k: values[k] for k in results}, bounds),
                                case.dtype)


# ---- layers without a window, and layers made of layers ------------------------------------------

SMOOTH = [None, "sigmoid", "tanh"]  # where it is deep: at a kink rounding would choose the slope


def random_image(rng):
    return tuple(int(n) for n in (*rng.integers(1, 8, 2), rng.choice([1, 2, 3, 4, 8])))


def random_sample(rng):
    """The shape of an image, or of a row."""
    return random_image(rng) if rng.random() < 0.5 else (int(rng.integers(1, 9)),)


def random_dense(rng):
    return layers.Dense(int(rng.integers(1, 9)), bias=bool(rng.random() < 0.8),
                        activation=rng.choice([*SMOOTH, "relu", "leaky_relu"])), (
                            int(rng.integers(1, 9)),)


def random_activation(rng):
    kind = rng.choice(["ReLU", "LeakyReLU", "Sigmoid", "Tanh", "GELU"])
    options = {"slope": float(rng.uniform(0.01, 0.9))} if kind == "LeakyReLU" else {}
    return getattr(layers, kind)(**options), random_sample(rng)


def random_conv(rng, filters, padding="same", stride=1):
    return layers.Conv2D(filters, tuple(int(k) for k in rng.integers(1, 4, 2)), padding=padding,
                         stride=stride, activation=rng.choice(SMOOTH), bias=rng.random() < 0.8)


def random_chain(rng, filters):
    """One to three layers that keep the size of an image, the last of them a convolution."""
    chain = [[random_conv(rng, int(rng.integers(1, 5))), layers.BatchNorm(epsilon=0.1),
              layers.Sigmoid(), layers.AvgPool2D((1, 2), stride=1, padding="same")][int(i)]
             for i in rng.integers(0, 4, rng.integers(0, 3))]
    return layers.Sequential([*chain, random_conv(rng, filters)])


def random_residual(rng):
    h, w, c = random_image(rng)
    activation = rng.choice(SMOOTH)
    if rng.random() < 0.5:
        body = random_chain(rng, c)
        if rng.random() < 0.5:
            body = layers.Sequential([body, layers.BatchNorm(epsilon=0.1)])
        return layers.Residual(body, activation=activation), (h, w, c)
    stride = tuple(int(s) for s in rng.integers(1, 3, 2))
    return layers.Residual(*(random_conv(rng, 3, stride=stride) for _ in range(2)),
                           activation=activation), (h, w, c)


def random_concat(rng):
    branches = [random_chain(rng, int(rng.integers(1, 4))) for _ in range(rng.integers(1, 4))]
    return layers.Concat([*branches, layers.Tanh()]), random_image(rng)


def random_network(rng):
    head = [layers.Flatten()] if rng.random() < 0.5 else [layers.GlobalAvgPool2D()]
    return layers.Sequential([random_chain(rng, 3), *head, layers.Dense(3, activation="tanh"),
                              layers.Softmax()]), random_image(rng)


# kind: (a random layer and the shape of a sample of its input, how many cases)
OTHERS = {
    "dense": (random_dense, 150),
    "batch_norm": (lambda rng: (layers.BatchNorm(epsilon=float(rng.choice([1e-5, 1e-3, 0.1])),
                                                 activation=rng.choice([None, "relu"])),
                                random_sample(rng)), 150),
    "activation": (random_activation, 200),
    "softmax": (lambda rng: (layers.Softmax(), random_sample(rng)), 100),
    "global_avg_pool": (lambda rng: (layers.GlobalAvgPool2D(), random_image(rng)), 100),
    "flatten": (lambda rng: (layers.Flatten(), random_sample(rng)), 25),
    "dropout": (lambda rng: (layers.Dropout(float(rng.uniform(0, 0.9))), random_sample(rng)), 50),
    "residual": (random_residual, 75),
    "concat": (random_concat, 75),
    "sequential": (random_network, 75),
}


def values_of(rng, shape, values, dtype):
    """Normal, or small integers that tie, or with a NaN in one place."""
    a = rng.integers(-2, 3, shape) if values == "ties" else rng.standard_normal(shape)
    if values == "nan" and a.size and rng.random() < 0.6:
        a.flat[rng.integers(a.size)] = np.nan
    return a.astype(dtype)


def run_other(kind, seed, backend):
    """A random layer on random values: torch's results beside its own, and how far they may be."""
    import torch

    from tests import torch_judge
    rng = np.random.default_rng([seed, *kind.encode()])
    layer, sample = OTHERS[kind][0](rng)
    dtype = np.dtype(rng.choice(["float32", "float64"]))
    values = str(rng.choice(["normal", "ties", "nan"]))
    output = layer.build(sample, seed=seed, dtype=dtype)
    normed = any(isinstance(part, layers.BatchNorm) for part in layer.walk())
    # Two values a channel at least for a norm, and no empty batch, which torch refuses there.
    n = int(rng.integers(2, 5) if normed else rng.choice([0, 1, 1, 2, 3]))
    arrays = {"x": values_of(rng, (n, *sample), values, dtype),
              "dy": values_of(rng, (n, *output), "nan" if values == "nan" else "normal", dtype)}
    parameters = {k: values_of(rng, p.shape, "nan" if values == "nan" else "normal", dtype)
                  for k, p in layer.parameters().items()}
    for name, p in layer.parameters().items():
        p.data[...] = backend.asarray(parameters[name])
    results = {"y": layer.forward(backend.asarray(arrays["x"]), training=True),
               "dx": layer.backward(backend.asarray(arrays["dy"]))}
    results |= {k: p.grad for k, p in layer.parameters().items()}

    x, p = (torch.tensor(arrays["x"].astype(float), requires_grad=True),
            {k: torch.tensor(v.astype(float), requires_grad=True) for k, v in parameters.items()})
    y = torch_judge.layer(layer, x, p)
    y.backward(torch.tensor(arrays["dy"].astype(float)))
    wanted = {"y": y.detach(), "dx": x.grad, **{k: v.grad for k, v in p.items()}}
    wanted = {k: v.numpy() for k, v in wanted.items()}

    # As in test_layers_torch.py: u for each value that takes part, times the largest. What x is
    # off, a norm multiplies by its inverse standard deviation, and in dx once more.
    taking_part = [*arrays.values(), *parameters.values()]
    largest = max(float(np.nanmax(np.abs(v), initial=1)) for v in [*wanted.values(), *taking_part])
    bound = sum(v.size for v in taking_part) * cases.unit_roundoff(dtype) * largest
    if kind == "batch_norm":
        var = np.nan_to_num(arrays["x"].astype(float).reshape(-1, sample[-1]).var(axis=0))
        bound /= var.min() + layer.epsilon
    what = f"{kind} {seed}: {layer!r}, {n} x {sample}, {dtype}, {values}"
    return what, dtype, {k: backend.to_numpy(v) for k, v in results.items()}, Expected(
        wanted, {k: np.full(v.shape, bound) for k, v in wanted.items()})


@pytest.mark.parametrize(("kind", "seeds"), [
    pytest.param(kind, range(start, min(start + cases.CHUNK, count)), id=f"{kind}-{start}")
    for kind, (_, count) in OTHERS.items() for start in range(0, count, cases.CHUNK)])
def test_other_layers_equal_torch(kind, seeds, backend):
    pytest.importorskip("torch")
    for seed in seeds:
        what, dtype, results, expected = run_other(kind, seed, backend)
        with cases.named(what):
            cases.assert_within(results, expected, dtype)


def test_there_are_two_thousand_cases_of_layers():
    assert sum(cases.OPS[op].count for op in LAYERS) + sum(n for _, n in OTHERS.values()) >= 2000
