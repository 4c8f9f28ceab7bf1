"""The optimisers' kernels against gpucnn.reference, on both backends; and bugs planted in them."""
from __future__ import annotations

import itertools
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from gpucnn import optim, reference
from gpucnn.backend import cuda_kernel, use_backend
from gpucnn.backend.cuda_kernel import Variant, kernel_dir, read_source
from gpucnn.optim import LossScale
from gpucnn.update import ADAM, DESCENT, MOMENTUM, RMS_PROP
from tests.cases import unit_roundoff
from tests.conftest import needs_simulator
from tests.gpusim import nvrtc
from tests.gpusim.mutation import caught

SIZES = (0, 1, 3, 1025)
RATE = 0.01
# name: (the optimiser, one step of gpucnn.reference from (w, dw, state, step) to (w, state))
OPTIMIZERS = {
    "descent": (lambda m, **o: optim.GradientDescent(m, RATE, **o),
                lambda w, g, s, t: (reference.gradient_descent(w, g, RATE),)),
    "momentum": (lambda m, **o: optim.Momentum(m, RATE, 0.8, **o),
                 lambda w, g, s, t: reference.momentum(w, g, *s, RATE, 0.8)),
    "nesterov": (lambda m, **o: optim.Momentum(m, RATE, 0.8, nesterov=True, **o),
                 lambda w, g, s, t: reference.momentum(w, g, *s, RATE, 0.8, nesterov=True)),
    "rmsprop": (lambda m, **o: optim.RMSProp(m, RATE, 0.7, 1e-3, **o),
                lambda w, g, s, t: reference.rms_prop(w, g, *s, RATE, 0.7, 1e-3)),
    "adam": (lambda m, **o: optim.Adam(m, RATE, 0.8, 0.999, 1e-3, **o),
             lambda w, g, s, t: reference.adam(w, g, *s, t, RATE, 0.8, 0.999, 1e-3)),
    "adamw": (lambda m, **o: optim.AdamW(m, RATE, 0.8, 0.999, 1e-3, 0.5, **o),
              lambda w, g, s, t: reference.adam(w, g, *s, t, RATE, 0.8, 0.999, 1e-3)),
}


def flat_model(backend, size, dtype=np.float64, *, offset=(0, 0)):
    """As much of a model as an optimiser sees; parameters and gradients begin so many elements off
    an aligned address."""
    rng = np.random.default_rng(size)
    data, grad = (backend.asarray(rng.standard_normal(size + off), dtype)[off:] for off in offset)
    return SimpleNamespace(backend=backend, built=True, flat_data=data, flat_grad=grad,
                           flat_cast=None, decayed_size=size // 3)


def check_updates(backend, names=tuple(OPTIMIZERS), sizes=SIZES, dtype=np.float64, *, offset=(0, 0),
                  clip_norm=None, scale=None):
    """Three steps of each optimiser against gpucnn.reference.

    A formula rounds at most 16 times a step, each time by less than u times the largest of w, 1.
    """
    for name, size in itertools.product(names, sizes):
        make, formula = OPTIMIZERS[name]
        model = flat_model(backend, size, dtype, offset=offset)
        rng = np.random.default_rng(size + 1)
        copy = model.flat_cast = backend.xp.zeros_like(model.flat_data)
        optimizer = make(model, clip_norm=clip_norm,
                         loss_scale=None if scale is None else LossScale(model, scale))
        w = np.array(backend.to_numpy(model.flat_data), np.float64)
        state = [np.zeros(size) for _ in optimizer.state]
        for step in range(1, 4):
            g = rng.standard_normal(size).astype(dtype)
            model.flat_grad[...] = backend.asarray(g * dtype(scale or 1))
            optimizer.step()
            if clip_norm is not None:
                g, norm = reference.clip(g, clip_norm)
                assert optimizer.gradient_norm == pytest.approx(norm, rel=1e-6)
            if name == "adamw":
                w[:model.decayed_size] *= 1 - RATE * 0.5
            w, *state = formula(w, g, state, step)
            off = step * 16 * unit_roundoff(np.dtype(dtype)) * max(1, *np.abs(w), 1)
            for got, want in ((model.flat_data, w), (copy, w), *zip(optimizer.state.values(),
                                                                    state)):
                assert got.dtype == dtype
                np.testing.assert_allclose(backend.to_numpy(got), want, rtol=0, atol=off,
                                           err_msg=f"{name}, {size}, step {step}")
        assert optimizer.steps == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_optimizers(backend, name, dtype):
    check_updates(backend, (name,), dtype=dtype)


@pytest.mark.parametrize("options", [{"offset": (1, 1)}, {"offset": (1, 0)},
                                     {"offset": (0, 1)}, {"clip_norm": 3.0}, {"scale": 1024.0},
                                     {"clip_norm": 0.5, "scale": 2.0**-3}], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_optimizers_off_alignment_clipped_and_scaled(backend, dtype, options):
    check_updates(backend, ("adamw", "nesterov"), dtype=dtype, **options)


def test_blocks_on_the_cpu_give_the_same(monkeypatch):
    """The decayed parameters end inside one."""
    with use_backend("numpy") as backend:
        monkeypatch.setattr(backend, "block_bytes", 1000)
        assert len(backend.blocks(1025, 6 * 8)) > 20
        check_updates(backend, sizes=(1025,))


def test_64_bit_offsets_give_the_same(cupy_backend, monkeypatch):
    monkeypatch.setattr(cuda_kernel, "MAX_INT_INDEX", -1)
    check_updates(cupy_backend, clip_norm=3.0)


@pytest.mark.parametrize("grid", [1, 2])
def test_each_thread_does_more_than_one_step(cupy_backend, monkeypatch, grid):
    monkeypatch.setattr(cuda_kernel, "MAX_GRID", grid)
    check_updates(cupy_backend, ("adamw",), (4099,), clip_norm=3.0)


def test_two_runs_give_the_same_bits(backend):
    bits = []
    for _ in range(2):
        model = flat_model(backend, 70001, np.float32)
        optim.Adam(model, clip_norm=1.0, loss_scale=LossScale(model)).step()
        bits.append(backend.to_numpy(model.flat_data).tobytes())
    assert bits[0] == bits[1]


def test_a_step_passes_nothing_that_changes(cupy_backend, monkeypatch):
    """Else a captured graph would replay the learning rate and the number of its first step."""
    launched = []
    launch = cuda_kernel.Kernel.launch

    def record(self, *args, **options):
        launched.append((self.name, [a for a in args if isinstance(a, (int, float))], options))
        launch(self, *args, **options)

    monkeypatch.setattr(cuda_kernel.Kernel, "launch", record)
    model = flat_model(cupy_backend, 100)
    optimizer = optim.AdamW(model, clip_norm=1.0, loss_scale=LossScale(model, growth_interval=1))
    optimizer.step()
    first = list(launched)
    optimizer.learning_rate = 0.5
    model.flat_grad[...] = 100
    optimizer.step()
    assert [name for name, _, _ in first] == ["sum_of_squares", "prepare_step", "update"]
    assert launched[3:] == first


def test_half_copies_of_double_weights_are_refused(cupy_backend):
    """The kernel would be compiled for float masters, and read the doubles as such."""
    model = flat_model(cupy_backend, 8)
    model.flat_cast = cupy_backend.xp.zeros(8, np.float16)
    optimizer = optim.Adam(model)
    with pytest.raises(TypeError, match="'copy_or_null': float16 beside sums in float64"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_copies_in_16_bits(backend, dtype):
    """The copy is the new weights, rounded."""
    for size, offset in ((1025, (0, 0)), (1025, (1, 1)), (1025, (0, 1)), (3, (0, 0))):
        model = flat_model(backend, size, np.float32, offset=offset)
        copy = model.flat_cast = backend.asarray(np.zeros(size, dtype))
        optim.Adam(model).step()
        np.testing.assert_array_equal(backend.to_numpy(copy),
                                      backend.to_numpy(model.flat_data).astype(dtype))


@pytest.mark.parametrize("rule", [DESCENT, MOMENTUM, RMS_PROP, ADAM])
def test_every_rule_compiles_by_nvrtc(rule):
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
    for scalar, architecture in itertools.product(
            ("float32", "float64", "float16", ml_dtypes.bfloat16), ("sm_75", "sm_120")):
        variant = Variant(np.dtype(scalar), np.dtype(np.uint8), np.dtype(np.int64),
                          16 // np.dtype(scalar).itemsize, (("RULE", rule),))
        source = read_source(kernel_dir(), "optimizer.cu", variant)
        assert not nvrtc.compile(source, "optimizer.cu", architecture).log


def test_four_parameters_are_one_access():
    library, reason = nvrtc.find()
    if library is None:
        pytest.skip(reason)
    variant = Variant(np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.int32), 4)
    ptx = nvrtc.compile(read_source(kernel_dir(), "optimizer.cu", variant), "optimizer.cu",
                        "compute_90").code
    assert b"ld.global.nc.v4.f32" in ptx
    assert b"st.global.v4.f32" in ptx
    assert b".local" not in ptx, "no spills to local memory"


BUGS = {
    "writes past the end": ("optimizer.cu", "< VEC ? (int)(size - (long long)i * VEC) : VEC",
                            "< 0 ? 0 : VEC"),
    "the last few are left out": ("optimizer.cu", "(size + VEC - 1) / VEC)) {\n        const",
                                  "size / VEC)) {\n        const"),
    "decay of one more": ("optimizer.cu", "v < decayed_size", "v <= decayed_size"),
    "the averages change places": ("optimizer.cu", "write(m_or_null, i, count, m)",
                                   "write(m_or_null, i, count, s)"),
    "no correction": ("optimizer.cu", "1 / sqrt(1 - pow(beta2, step))", "1"),
    "a step behind": ("optimizer.cu", "control[STEPS] + 1", "control[STEPS]"),
    "1 - beta in float": ("optimizer.cu", "(accum_t)(1 - beta2)", "1 - (accum_t)(float)beta2"),
    "the norm has the loss scale": ("optimizer.cu", "sqrt(sum) / scale", "sqrt(sum)"),
    "gradients keep the loss scale": ("optimizer.cu", "limit / norm : 1) / scale",
                                      "limit / norm : 1)"),
    "clipped always": ("optimizer.cu", "norm > limit ?", "norm > 0 ?"),
    "Nesterov looks back": ("optimizer.cu", "g + c.beta1 * m", "g + m"),
    "the epsilon is under the root": ("optimizer.cu", "g / (sqrt(s) + c.epsilon)",
                                      "g / sqrt(s + c.epsilon)"),
}


def check_everything(backend):
    check_updates(backend, sizes=(1027,))
    check_updates(backend, ("adamw",), (3, 1027), np.float32, clip_norm=3.0, scale=0.25)
    check_updates(backend, ("descent",), (1027,), clip_norm=1e6)


@needs_simulator
@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_planted_bug_is_caught(cupy_backend, bug):
    with caught(*bug):
        check_everything(cupy_backend)


def test_they_pass_where_no_bug_is_planted(cupy_backend):
    check_everything(cupy_backend)
