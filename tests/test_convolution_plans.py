"""By which kernel, in which tile and splits a convolution is computed on the GPU; who decides."""
from __future__ import annotations

import numpy as np
import pytest

from gpucnn import models, ops
from gpucnn.backend import ALGORITHMS, tile_costs
from gpucnn.geometry import make_window
from gpucnn.layers import Conv2D, Dense, Flatten, Residual, Sequential
from tests import variants
from tests.conftest import needs_simulator
from tests.convolution_judge import Case, launches
from tests.gpusim import fake_cupy

cuda = launches()
PLANS = (cuda.forward_plan, cuda.input_gradient_plan, cuda.weight_gradient_plan)
H100 = 132


def problem(n, size, c, c_out, groups=1, kernel=3, stride=1, dtype=np.float32, tensor=False):
    return Case((n, size, size, c), (kernel, kernel, c_out), stride, padding=kernel // 2,
                groups=groups, dtype=np.dtype(dtype), tensor=tensor).problem


@pytest.fixture
def no_gpu(monkeypatch):
    """Plans are functions of shapes, where the number of processors is given."""
    monkeypatch.setattr(cuda, "_processors", None)


# ---- the rule ---------------------------------------------------------------------------------

def test_the_tests_know_the_tiles():
    assert [t.constants for t in cuda.TILES] == list(variants.TILES)
    assert all(32 <= t.threads <= 1024 and t.threads % 32 == 0 for t in cuda.TILES)


@pytest.mark.parametrize(("c", "c_out", "groups", "forward", "gradient"), [
    (1, 32, 1, "direct", "implicit_gemm"),
    (4, 32, 1, "direct", "implicit_gemm"),
    (5, 32, 1, "implicit_gemm", "implicit_gemm"),
    (64, 64, 64, "direct", "direct"),
    (1, 1, 1, "direct", "direct"),
    (2, 4, 2, "implicit_gemm", "implicit_gemm"),     # two outputs for each input
    (4, 4, 2, "implicit_gemm", "implicit_gemm"),
])
def test_direct_where_an_output_depends_on_little(no_gpu, c, c_out, groups, forward, gradient):
    p = problem(8, 14, c, c_out, groups)
    assert [plan(p, "auto", H100).algorithm for plan in PLANS[:2]] == [forward, gradient]
    for plan in PLANS:
        assert plan(p, "implicit_gemm", H100).algorithm == "implicit_gemm"
        assert plan(p, "im2col", H100) == cuda.Plan("im2col")
    if forward == "direct":
        assert cuda.forward_plan(p, "direct", H100) == cuda.Plan("direct")
    else:
        with pytest.raises(ValueError, match=f"^no direct convolution of {c} channels to {c_out}"):
            cuda.forward_plan(p, "direct", H100)


def test_many_filters_in_16_bits_are_not_direct(no_gpu):
    for c, c_out, groups, dtype, algorithm in (
            (3, 23, 1, np.float16, "direct"), (3, 24, 1, np.float16, "implicit_gemm"),
            (3, 24, 1, np.float32, "direct"), (64, 64, 64, np.float16, "direct")):
        p = problem(8, 14, c, c_out, groups, dtype=dtype)
        assert cuda.forward_plan(p, "auto", H100).algorithm == algorithm
        assert cuda.forward_plan(p, "direct", H100).algorithm == "direct"
        assert cuda.weight_gradient_plan(p, "auto", H100).algorithm == "direct"


def test_a_direct_weight_gradient_has_few_terms(no_gpu):
    for c, kernel, algorithm in ((3, 3, "direct"), (4, 3, "implicit_gemm"),
                                 (1, 7, "implicit_gemm")):
        p = problem(64, 32, c, 64, kernel=kernel)
        assert cuda.weight_gradient_plan(p, "auto", H100).algorithm == algorithm
        assert cuda.weight_gradient_plan(p, "direct", H100).algorithm == "direct"
    assert cuda.weight_gradient_plan(problem(64, 32, 8, 8, 8, kernel=7), "auto", H100
                                     ).algorithm == "direct"


def test_a_sum_is_split_where_there_are_few_tiles_and_it_is_long(no_gpu):
    many = problem(256, 56, 64, 64)          # thousands of tiles of pixels
    assert [plan(many, "auto", H100).splits for plan in PLANS[:2]] == [1, 1]
    assert cuda.weight_gradient_plan(many, "auto", H100).splits > 1  # 576 x 64 of 802,816 terms
    few = problem(1, 4, 512, 512)            # 16 pixels of 4,608 terms
    assert all(plan(few, "auto", H100).splits > 1 for plan in PLANS[:2])
    assert cuda.weight_gradient_plan(few, "auto", H100).splits == 1  # 16 terms
    assert cuda.forward_plan(problem(1, 4, 16, 16), "auto", H100).splits == 1  # 144 terms
    assert cuda.forward_plan(few, "auto", 1).splits < cuda.forward_plan(few, "auto", H100).splits


SHAPES = [problem(n, size, c, c_out, groups, kernel, stride, dtype)
          for n in (0, 1, 7, 256) for size in (1, 8, 57) for c, c_out, groups in (
              (1, 8, 1), (3, 64, 1), (32, 32, 32), (64, 130, 1), (512, 512, 2))
          for kernel, stride in ((1, 1), (3, 1), (3, 2)) for dtype in (np.float32, np.float64)]


@pytest.mark.parametrize("processors", [1, 20, H100])
def test_every_plan_makes_sense(no_gpu, processors):
    for p in SHAPES:
        pixels, places = p.n * p.oh * p.ow, p.window.places
        sizes = (pixels * p.c_out, p.n * p.h * p.w * p.c, places * p.inputs * p.c_out)
        terms = (places * p.inputs, places * p.c_out // p.groups, pixels)
        for make, size, length in zip(PLANS, sizes, terms):
            plan = make(p, "auto", processors)
            assert plan == make(p, "auto", processors)
            assert 1 <= plan.splits <= max(cuda.MAX_SPLITS, cuda.BLOCKS_EACH * processors), p
            assert plan.splits == 1 or length // plan.splits >= cuda.TERMS_A_SPLIT, p
            slabs = size * plan.splits * p.dtype.itemsize if plan.splits > 1 else 0
            assert plan.workspace == slabs, p
            assert (plan.tile is None) == (plan.algorithm == "direct"), p


def products_of(p):
    """Of each pass: rows, columns, terms, how many products, and numbers in the result."""
    v, inputs, outputs = p.window, p.c // p.groups, p.c_out // p.groups
    pixels, taps = p.n * p.oh * p.ow, v.kh * v.kw
    phases = min(v.sh, p.h) * min(v.sw, p.w)  # pixels of x with as many taps, in strides
    a_phase = p.n * -(-p.h // v.sh) * -(-p.w // v.sw)
    return ((pixels, outputs, taps * inputs, p.groups, pixels * p.c_out),
            (a_phase, inputs, -(-taps // phases) * outputs, p.groups * phases,
             p.n * p.h * p.w * p.c),
            (taps * inputs, outputs, pixels, p.groups, taps * inputs * p.c_out))


def time_of(p, tile, cost, splits, product, processors):
    """The estimate of the rule, for the processor with most to do; and the traffic of what is
    split."""
    rows, columns, terms, products, size = product
    blocks = max(1, -(-rows // tile.m) * -(-columns // tile.n) * products) * splits
    full, rest = divmod(-(-blocks // processors), cost.resident)
    rounds = full + (max(rest / cost.resident, cost.alone) if rest else 0)
    each = tile.m * tile.n * (cost.product * -(-terms // splits) + cost.block)
    moved = (2 * splits + 1) * size / processors if splits > 1 else 0
    return rounds * cost.resident * each + moved * (300 if p.tensor else 40)


TENSOR = [problem(n, size, c, c_out, 1, kernel, stride, np.float16, tensor=True)
          for n in (1, 4, 64) for size in (4, 14, 28) for c, c_out in ((16, 256), (512, 256))
          for kernel, stride in ((1, 1), (1, 2), (3, 1), (3, 2))]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("processors", [1, 20, H100])
def test_no_other_tile_would_take_less_time(no_gpu, monkeypatch, processors, capability):
    monkeypatch.setattr(cuda, "capability", lambda: capability)
    assert all(p.tensor for p in TENSOR)
    for p in TENSOR if capability == 90 else SHAPES + TENSOR:
        for number, (make, product) in enumerate(zip(PLANS, products_of(p))):
            plan = make(p, "implicit_gemm", processors)
            tiles = cuda.possible_tiles(p, number == 2)
            least = time_of(p, plan.tile, tiles[plan.tile], plan.splits, product, processors)
            for tile, cost in tiles.items():
                for splits in possible_splits(tile, cost, product, processors):
                    time = time_of(p, tile, cost, splits, product, processors)
                    assert least <= time * (1 + 1e-9), (p, tile, splits)
            assert plan.splits in possible_splits(plan.tile, tiles[plan.tile], product, processors)


def possible_splits(tile, cost, product, processors):
    """Those with which all blocks run at a time, or none is idle, if the sum is long enough."""
    rows, columns, terms, products, _ = product
    blocks = max(1, -(-rows // tile.m) * -(-columns // tile.n) * products)
    most = min(terms // cuda.TERMS_A_SPLIT, cuda.MAX_SPLITS)
    return {max(1, min(wanted, most)) for wanted in (
        cost.resident * processors // blocks, -(-cost.resident * processors // blocks))}


def test_one_block_too_many_for_a_round_is_seen(no_gpu, monkeypatch):
    """9 x 2 tiles of 256 x 128 in 7 parts are 126 blocks for 132 processors, in 8 parts 144."""
    monkeypatch.setattr(cuda, "capability", lambda: 90)
    p = problem(1024, 7, 256, 256, dtype=np.float16, tensor=True)
    plan = cuda.weight_gradient_plan(p, "auto", H100)
    assert plan.blocks(9 * 256, 256) <= H100 if plan.tile.wgmma else 2 * H100
    assert plan.splits == 7


@pytest.mark.parametrize(("n", "size", "c", "c_out", "kernel", "stride", "wgmma"), [
    (1024, 7, 256, 256, 3, 1, True), (512, 16, 128, 128, 3, 1, True),
    (512, 8, 256, 512, 3, 2, True), (512, 4, 512, 512, 3, 1, True),
    (256, 28, 512, 1024, 1, 2, True), (256, 28, 32, 32, 3, 1, False),
    (256, 14, 64, 64, 3, 1, False), (256, 56, 64, 256, 1, 1, False),
    (256, 56, 256, 128, 1, 1, False)])
def test_wgmma_where_it_was_measured_to_be_faster(no_gpu, monkeypatch, n, size, c, c_out, kernel,
                                                  stride, wgmma):
    """Of y and dx: where sums are long and channels many, if the GPU has it."""
    p = problem(n, size, c, c_out, 1, kernel, stride, np.float16, tensor=True)
    for capability in (80, 90, 100):
        monkeypatch.setattr(cuda, "capability", lambda capability=capability: capability)
        for make in PLANS[:2]:
            tile = make(p, "auto", H100).tile
            assert tile.wgmma == (wgmma and capability == 90), (capability, tile)
            assert not tile.wgmma or (tile.m, tile.n) == (256, 128)


def test_which_tiles_a_gpu_has(monkeypatch):
    """wgmma is sm_90's alone; tensor cores take no float64."""
    short, tf32 = (problem(1, 8, 16, 16, dtype=d, tensor=True) for d in (np.float16, np.float32))
    for capability, hopper in ((80, False), (89, False), (90, True), (100, False), (120, False)):
        monkeypatch.setattr(cuda, "capability", lambda capability=capability: capability)
        for weight_gradient in (False, True):
            assert tuple(cuda.possible_tiles(short, weight_gradient)) == \
                cuda.TENSOR_TILES + (cuda.WGMMA_TILES if hopper else ())
        assert tuple(cuda.possible_tiles(tf32)) == cuda.TENSOR_TILES
        assert tuple(cuda.possible_tiles(problem(1, 8, 16, 16))) == cuda.TILES
    double = problem(1, 8, 16, 16, dtype=np.float64, tensor=True)
    assert not double.tensor


def test_every_tile_has_a_measured_cost():
    tiles = cuda.TENSOR_TILES + cuda.WGMMA_TILES
    for costs in (tile_costs.MEASURED, tile_costs.MEASURED_WEIGHT_GRADIENT):
        assert len(costs) == len(tiles)
        for tile, cost in zip(tiles, costs):
            shared = tile.shared(2, costs is tile_costs.MEASURED_WEIGHT_GRADIENT) + 1024
            assert cost.resident * shared <= 228 << 10  # KiB of a multiprocessor
            assert cost.resident * tile.threads <= 2048


def test_a_sum_in_splits_leaves_no_moments(cupy_backend):
    """A block has a part of it then, which is not the output."""
    p = problem(1, 4, 64, 8)
    assert cuda.forward_plan(p).splits > 1
    x, w = (cupy_backend.asarray(np.ones(shape), np.float32)
            for shape in ((1, 4, 4, 64), (3, 3, 64, 8)))
    y, moments = cupy_backend.conv2d_with_moments(x, w, None, p.window, 1, None)
    assert moments is None
    assert cupy_backend.to_numpy(y)[0, 1, 1].tolist() == [9 * 64] * 8


def test_sums_of_16_bits_are_kept_in_32(no_gpu):
    wide, narrow = (cuda.weight_gradient_plan(problem(64, 28, 64, 64, dtype=dtype), "auto", H100)
                    for dtype in ("float32", "float16"))
    assert wide == narrow
    assert wide.workspace == wide.splits * 9 * 64 * 64 * 4


def test_more_images_never_mean_smaller_tiles_or_more_splits(no_gpu):
    plans = [cuda.forward_plan(problem(2**i, 14, 128, 128), "auto", H100) for i in range(12)]
    areas, splits = [p.tile.m * p.tile.n for p in plans], [p.splits for p in plans]
    assert areas[0] < areas[-1]
    assert splits == sorted(splits, reverse=True)
    assert splits[0] > splits[-1] == 1


def test_a_plan_is_one_word_or_a_few():
    tile = cuda.TILES[1]
    assert str(cuda.Plan("direct")) == "direct"
    assert str(cuda.Plan("implicit_gemm", tile)) == "implicit_gemm 128x64"
    assert str(cuda.Plan("implicit_gemm", tile, 4, 1024)) == "implicit_gemm 128x64 / 4"


# ---- who decides ------------------------------------------------------------------------------

def chosen(backend, c=3, algorithm="auto"):
    window = make_window("test", 3, 1, 1, 1, (8, 8))
    plans = backend.conv2d_plan((2, 8, 8, c), (3, 3, c, 8), window, 1, np.float32, algorithm)
    return [plan.algorithm for plan in plans.values()]


def test_the_variable_wins(cupy_backend, monkeypatch):
    monkeypatch.delenv("GPUCNN_CONV", raising=False)
    assert chosen(cupy_backend) == ["direct", "implicit_gemm", "direct"]
    assert chosen(cupy_backend, algorithm="im2col") == ["im2col"] * 3
    monkeypatch.setenv("GPUCNN_CONV", "implicit_gemm")
    assert chosen(cupy_backend, algorithm="im2col") == ["implicit_gemm"] * 3
    monkeypatch.setenv("GPUCNN_CONV", "")
    assert chosen(cupy_backend, algorithm="im2col") == ["im2col"] * 3


def test_an_unknown_value_is_one_line(cupy_backend, monkeypatch):
    monkeypatch.setenv("GPUCNN_CONV", "winograd")
    x, w = (cupy_backend.asarray(np.zeros(s, np.float32)) for s in ((1, 4, 4, 2), (3, 3, 2, 2)))
    line = ("^GPUCNN_CONV='winograd' is not known; use 'auto', 'implicit_gemm', 'im2col', "
            "'direct'$")
    for call in (lambda: ops.conv2d(x, w), lambda: chosen(cupy_backend),
                 lambda: ops.conv2d_backward(x[:, :2, :2], x, w)):
        with pytest.raises(ValueError, match=line):
            call()


def test_numpy_does_not_follow_the_variable_but_refuses_an_unknown_value(monkeypatch):
    monkeypatch.setenv("GPUCNN_CONV", "im2col")
    Conv2D(8, 3).build((8, 8, 3))
    monkeypatch.setenv("GPUCNN_CONV", "winograd")
    with pytest.raises(ValueError, match="GPUCNN_CONV='winograd' is not known; use 'auto'"):
        Conv2D(8, 3).build((8, 8, 3))


def test_an_algorithm_that_cannot_is_refused_when_the_model_is_built(cupy_backend, monkeypatch):
    monkeypatch.delenv("GPUCNN_CONV", raising=False)
    model = Sequential([Conv2D(8, 3), Conv2D(8, 3, algorithm="direct")])
    why = ("no direct convolution of 8 channels to 8: it takes at most 4 channels, or a group for "
           "each; choose 'auto' or 'implicit_gemm'")
    with pytest.raises(ValueError, match=f"^Conv2D 'conv2': {why}$"):
        model.build((8, 8, 3))
    monkeypatch.setenv("GPUCNN_CONV", "direct")
    with pytest.raises(ValueError, match=f"^Conv2D 'conv2': GPUCNN_CONV='direct': {why}$"):
        Sequential([Conv2D(8, 3), Conv2D(8, 3)]).build((8, 8, 3))
    grouped = Conv2D(8, 3, groups=2, algorithm="im2col")
    with pytest.raises(ValueError, match="^Conv2D: GPUCNN_CONV='direct': .* to 8 in 2 groups:"):
        grouped.build((8, 8, 6))


def test_dense_layers_have_a_matrix_product_whatever_the_variable_says(cupy_backend, monkeypatch):
    """GPUCNN_CONV=im2col is cuBLAS for them too."""
    x = np.random.default_rng(0).integers(-3, 4, (5, 6)).astype(np.float32)
    there, results = cupy_backend.asarray(x), []
    for value, algorithm in (("auto", "implicit_gemm"), ("direct", "implicit_gemm"),
                             ("im2col", "im2col")):
        monkeypatch.setenv("GPUCNN_CONV", value)
        layer = Dense(3, activation="relu")
        layer.build((6,))
        layer.w.data[...] = cupy_backend.asarray(np.arange(18, dtype=np.float32).reshape(6, 3) - 9)
        assert {p.algorithm for p in layer.plan(5).values()} == {algorithm}
        y = layer.forward(there, training=True)
        results.append([cupy_backend.to_numpy(a) for a in (y, layer.backward(y), layer.w.grad,
                                                           layer.b.grad)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("c", "groups"), [(3, 1), (4, 4)])
def test_every_algorithm_gives_the_same(cupy_backend, monkeypatch, c, groups):
    """The same bits, since all sums are of small integers."""
    monkeypatch.delenv("GPUCNN_CONV", raising=False)
    rng = np.random.default_rng(0)
    x, w = rng.integers(-3, 4, (2, 6, 5, c)), rng.integers(-3, 4, (3, 3, c // groups, 4))
    results = {}
    for algorithm in ALGORITHMS:
        layer = Conv2D(4, 3, stride=(1, 2), padding="same", groups=groups, activation="relu",
                       algorithm=algorithm)
        layer.build(x.shape[1:])
        layer.w.data[...] = cupy_backend.asarray(w, np.float32)
        y = layer.forward(cupy_backend.asarray(x, np.float32), training=True)
        arrays = (y, layer.backward(y), layer.w.grad, layer.b.grad)
        results[algorithm] = [cupy_backend.to_numpy(a) for a in arrays]
    for algorithm, arrays in results.items():
        for got, want in zip(arrays, results["auto"]):
            np.testing.assert_array_equal(got, want, err_msg=algorithm)


@needs_simulator  # which notes the launches
@pytest.mark.parametrize(("algorithm", "kernels"), [
    ("im2col", {"im2col", "col2im"}),
    ("implicit_gemm", {"conv_forward", "conv_input_gradient", "conv_weight_gradient"}),
    ("direct", {"conv_direct", "conv_input_gradient", "conv_direct_weight_gradient"})])
def test_all_passes_go_by_the_algorithm_of_the_layer(cupy_backend, monkeypatch, algorithm, kernels):
    monkeypatch.delenv("GPUCNN_CONV", raising=False)
    layer = Conv2D(8, 3, bias=False, algorithm=algorithm)
    layer.build((6, 6, 3))
    assert launched_by(cupy_backend, layer, layer.backward) == kernels
    kernels = kernels - {"col2im", "conv_input_gradient"}
    assert launched_by(cupy_backend, layer, layer.backward_parameters) == kernels


def launched_by(backend, layer, backward):
    """The names of the kernels of a forward pass and this backward pass."""
    fake_cupy.launches.clear()
    x = backend.asarray(np.ones((2, *layer.input_shape)), np.float32)
    backward(layer.forward(x, training=True))
    return {name for name, _, _ in fake_cupy.launches}


@needs_simulator
def test_what_a_dense_layer_launches(cupy_backend, monkeypatch):
    """Without an input gradient where it comes first, and nothing where cuBLAS does it all."""
    layer = Dense(4, bias=False)
    layer.build((6,))
    assert "conv_input_gradient" in launched_by(cupy_backend, layer, layer.backward)
    first = launched_by(cupy_backend, layer, layer.backward_parameters)
    assert first == {"conv_forward", "conv_weight_gradient"}
    monkeypatch.setenv("GPUCNN_CONV", "im2col")
    assert launched_by(cupy_backend, layer, layer.backward) == set()


# ---- what summary(plan=True) prints -----------------------------------------------------------

def printed(capsys, model, shape, **options):
    model.summary(shape, plan=True, **options)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    return lines


def test_the_plan_of_the_articles_network(cupy_backend, capsys, monkeypatch):
    monkeypatch.delenv("GPUCNN_CONV", raising=False)
    monkeypatch.setattr(cuda, "_processors", lambda: H100)
    lines = printed(capsys, models.article(), (28, 28, 1), batch=256)
    assert lines[0] == "batches of 256, float32, on cupy"
    rows = [line.split() for line in lines]
    assert ["conv1", "forward", "direct", "-", "-", "-"] in rows
    assert rows[4][:4] == ["weight", "gradient", "direct", "-"]  # and before it no input gradient
    assert rows[5][:3] == ["conv2", "forward", "implicit_gemm"]
    assert rows[6][:3] == ["input", "gradient", "implicit_gemm"]
    p = problem(256, 28, 32, 32)
    plan = cuda.weight_gradient_plan(p, "auto", H100)
    assert rows[7] == ["weight", "gradient", "implicit_gemm", f"{plan.tile.m}x{plan.tile.n}",
                       str(plan.splits), f"{plan.splits * 9 * 32 * 32 * 4 / 2**20:.1f}", "MiB"]
    assert sum("weight gradient" in line for line in lines) == 7
    assert sum("input gradient" in line for line in lines) == 6
    largest = max(float(row[-2]) for row in rows[3:-2] if row[-1] == "MiB")
    assert rows[-1] == ["largest", f"{largest:.1f}", "MiB"]


@pytest.mark.parametrize(("dtype", "itemsize"), [("float16", 4), ("float32", 4), ("float64", 8)])
def test_the_memory_of_im2col_is_that_of_a_block(cupy_backend, monkeypatch, dtype, itemsize):
    """cuBLAS multiplies 16-bit numbers as float32."""
    window = make_window("test", 3, 1, 1, 1, (8, 8))
    image = 64 * 9 * 6 * itemsize
    for block, images in ((1 << 30, 5), (2 * image, 2), (1, 1)):
        monkeypatch.setattr(cupy_backend, "block_bytes", block)
        plans = cupy_backend.conv2d_plan((5, 8, 8, 6), (3, 3, 6, 8), window, 1, dtype, "im2col")
        assert {p.workspace for p in plans.values()} == {images * image}


def test_only_the_layer_that_training_begins_with_needs_no_input_gradient(cupy_backend, capsys):
    nested = Sequential([Sequential([Conv2D(4), Conv2D(4)]), Flatten(), Dense(2)])
    for model, inputs in ((nested, 2), (Sequential([Residual(Conv2D(3, padding=1))]), 1),
                          (Sequential([Flatten(), Dense(2)]), 0),
                          (Sequential([Flatten(), Dense(2), Dense(2)]), 1), (Conv2D(3), 0)):
        lines = printed(capsys, model, (8, 8, 3))
        assert lines[0].startswith("batches of 64")
        assert sum("input gradient" in line for line in lines) == inputs
