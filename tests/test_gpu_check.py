"""scripts/gpu_check.py through the simulator: what it measures is checked, and nothing is lost."""
from __future__ import annotations

import json
import os

import numpy as np
import pytest

from gpucnn.backend.cuda_kernel import kernel_dir
from gpucnn.geometry import make_window
from scripts import gpu_check, performance
from scripts.contestants.contest import ROOT
from scripts.gpu import benchmark, cudnn, limits, memory, nets, report, step
from scripts.gpu.context import MODES, Context
from scripts.gpu.measure import Budget, Clock, relative_error, run_twice
from tests.conftest import SIMULATOR_WORKS, needs_compiler, needs_simulator
from tests.gpusim.mutation import mutated
from tests.test_scripts import error_of, run

QUICK = ("--quick", "--nets", "article", "--images", "16", "--out")
FAST = {"GPUSIM_CHECKS": "off", "OMP_NUM_THREADS": "1"}


def make_context(backend):
    clock = Clock(backend, 1, 0, 2)
    return Context(backend, clock, Budget(60), None, ["article"], list(MODES.values()), None,
                   True, 16)


@pytest.fixture
def context(cupy_backend):
    return make_context(cupy_backend)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A run of all sections that need no process of their own."""
    if not SIMULATOR_WORKS:
        pytest.skip("needs a C++ compiler")
    out = tmp_path_factory.mktemp("gpu_check") / "new" / "report.json"
    only = [word for name in ("memory", "conv", "training") for word in ("--only", name)]
    return out, run("tests.gpusim", "scripts.gpu_check", "--modes", "float16", "float32", *only,
                    *QUICK, out, **FAST)


# ---------------------------------------------------------------------------------- a whole run


def test_the_json_holds_all_that_a_reader_needs(checked):
    out, _ = checked
    content = json.loads(out.read_text())
    assert content["command"].startswith("python scripts/gpu_check.py --modes float16 float32 ")
    assert content["machine"]["gpu"] == "gpusim (CPU)"
    assert {"driver", "cuda", "cupy", "numpy", "python", "commit", "clocks", "l2_bytes",
            "multiprocessors"} <= content["machine"].keys()
    assert content["complete"]
    for name in ("limits", "memory", "conv", "training"):
        assert content[name]["rows"], name
        assert not content[name]["skipped"]
        assert all(row["passed"] for row in content[name]["rows"])
    assert content["training"]["rows"][0]["bitwise_equal"]


def test_every_kernel_is_a_share_of_the_copy(checked):
    rows = json.loads(checked[0].read_text())["memory"]["rows"]
    for dtype in memory.TOLERANCES:
        assert [row["name"] for row in rows if row["dtype"] == dtype] == [
            f"{k.name} 8x8x8" for k in memory.KERNELS if k.half or dtype == "float32"]
    for row in rows:
        assert row["of_limit"] > 0
        assert len(row["samples"]) == 1
    moved, halved = ({row["name"]: row["bytes"] for row in rows if row["dtype"] == dtype}
                     for dtype in memory.TOLERANCES)
    # Two images of 8x8x8 float32 in, a quarter of it and a byte for each of those out.
    assert moved["max_pool 8x8x8"] == 2 * (8 * 8 * 8 * 4 + 4 * 4 * 8 * (4 + 1))
    assert halved["max_pool 8x8x8"] == 2 * (8 * 8 * 8 * 2 + 4 * 4 * 8 * (2 + 1))
    assert moved["im2col 8x8x8"] == 2 * 8 * 8 * 8 * 4 * 10
    # dy and x twice, dx; mean, var, gamma, beta, dgamma and dbeta are float32.
    assert halved["norm_backward 8x8x8"] == 5 * 2 * 8 * 8 * 8 * 2 + 6 * 8 * 4
    # theta, m and v in and out, g; RATE and its like; the copy in 16 bits.
    assert halved["adam 8x8x8"] == 2 * 8 * 8 * 8 * (7 * 4 + 2) + 7 * 8


def test_every_pass_stands_beside_cudnn_and_has_a_best_tile(checked):
    pytest.importorskip("torch")
    conv = json.loads(checked[0].read_text())["conv"]
    convs = nets.distinct([c.small() for c in nets.convolutions("article")])
    passes = [f"{c.label} {which}" for c in convs for which in c.passes]
    rows = [row for row in conv["rows"] if row["mode"] == "float32"]
    compared = [row for row in rows if row.get("kind") != "tiles"]
    tiles = [row for row in rows if row.get("kind") == "tiles"]
    assert [row["name"] for row in compared] == [row["name"] for row in tiles] == passes
    for row in compared:
        assert float(row["error"]) < 1e-5
        assert row["ratio"] == pytest.approx(row["other_microseconds"] / row["microseconds"])
        assert row["of_limit"] > 0
    for row in tiles:
        assert row["ratio"] >= 1
        assert {tuple(plan["tile"]) for plan in row["plans"] if plan["tile"]} == {
            (128, 128), (128, 64), (64, 64), (64, 32), (32, 32)}
        assert row["plans"][0]["microseconds"] == row["microseconds"]
        # A direct kernel, where there is one, is among what was tried.
        direct = "direct" in {plan["algorithm"] for plan in row["plans"]}
        assert direct == (row["shape"][3] <= 4 and row["pass"] != "dx")
    summary = conv["summary"]["article float32"]
    product = np.prod([row["ratio"] for row in compared])
    assert summary["cudnn_to_ours"] == pytest.approx(product ** (1 / len(compared)))
    assert summary["worst_auto_to_best"] == max(row["ratio"] for row in tiles)


def test_wgmma_is_tried_beside_the_other_tiles(checked):
    """On tensor cores, where channels fill 16 bytes."""
    conv = json.loads(checked[0].read_text())["conv"]
    tiles = [row for row in conv["rows"] if (row["mode"], row.get("kind")) == ("float16", "tiles")]
    tried = [{(*plan["tile"], plan["wgmma"]) for plan in row["plans"] if plan["tile"]}
             for row in tiles if row["shape"][3] == 8]
    ordinary = {(128, 128), (128, 64), (64, 64), (128, 32), (32, 32)}
    wide = {(128, 128), (256, 128), (128, 64)}
    assert tried == [{(*t, False) for t in ordinary} | {(*t, True) for t in wide}] * 3
    for row in tiles:
        assert row["shape"][3] == 8 or not any(plan["wgmma"] for plan in row["plans"])


def test_the_summary_says_how_often_wgmma_is_the_best():
    from scripts.gpu import convolutions

    row = {"net": "n", "mode": "float16", "kind": "tiles", "ratio": 1.0}
    here, there = "implicit_gemm 64x64 on tensor cores", "implicit_gemm 256x128 by wgmma / 2"
    rows = [row | {"best": best, "auto": auto} for best, auto in (
        (here, there), (there, here), (there, there), ("direct", "direct"), (there, here))]
    summary = convolutions.summary(rows)["n float16"]
    assert summary["text"][-1] == "wgmma is the best of 3, and auto's choice of 2"
    assert "wgmma_best" not in convolutions.summary(rows[3:4])["n float16"]


def test_all_comparisons_come_before_tiles(context):
    """Except that bfloat16 waits for both."""
    from scripts.gpu import convolutions

    context.nets = ["article", "resnet18"]
    groups = dict.fromkeys(job.group for job in convolutions.jobs(context))
    assert list(groups) == [
        f"{what}, {net} {mode}" for modes in (["float16", "tf32", "float32"], ["bfloat16"])
        for what in ("beside cuDNN", "best tile") for mode in modes
        for net in ("article", "resnet18")]


def test_the_table_fits_100_columns(checked):
    lines = checked[1].stdout.splitlines()
    start = lines.index(report.header())
    assert len(lines) > start + 30
    assert max(map(len, lines[start:-1])) <= report.WIDTH
    assert lines[-1] == str(checked[0])
    assert " passed, 0 failed in " in lines[-2]


@needs_compiler
def test_a_wrong_kernel_is_not_timed_and_fails(tmp_path):
    out = tmp_path / "report.json"
    with mutated("maxpool.cu", "value > best.at[v]", "value < best.at[v]") as folder:
        result = run("tests.gpusim", "scripts.gpu_check", "--only", "memory", *QUICK, out, code=1,
                     GPUCNN_KERNEL_DIR=str(folder), **FAST)
    rows = json.loads(out.read_text())["memory"]["rows"]
    wrong = [row for row in rows if not row["passed"]]
    assert [(row["name"], row["dtype"]) for row in wrong] == [
        ("max_pool 8x8x8", "float32"), ("max_pool 8x8x8", "float16")]
    assert not any("microseconds" in row for row in wrong)
    assert "FAILED: differs from NumPy by " in result.stdout
    assert " 2 failed in " in result.stdout


@needs_simulator
def test_a_wrong_convolution_is_not_timed_and_fails(context, monkeypatch):
    pytest.importorskip("torch")
    from scripts.gpu import convolutions

    conv = nets.convolutions("article")[1].small()
    context.peer, _ = cudnn.find(context.clock)
    with mutated("activation.cuh", "activate(z, ACTIVATION)", "activate(z * 1.001f, ACTIVATION)"):
        for judge in ("NumPy", "cuDNN"):
            row = convolutions.compare(context, conv, "y", MODES["float32"])
            assert not row["passed"]
            assert row["note"] == f"differs from {judge} by 1.0e-03"
            assert "microseconds" not in row
            monkeypatch.setattr(convolutions, "differs_from_numpy", lambda *args: "")


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_every_mode_is_right_within_its_tolerance(context, mode, monkeypatch):
    """With an error of the size that the tolerance was derived from."""
    from scripts.gpu import convolutions

    monkeypatch.setenv("GPUSIM_CHECKS", "off")
    context.peer, _ = cudnn.find(context.clock)
    conv = nets.convolutions("article")[1].small()
    for which in conv.passes:
        row = convolutions.compare(context, conv, which, mode)
        assert row["passed"], row["note"]
        assert row["note"].endswith("t") == mode.tensor
        assert not context.peer or row["ratio"] > 0
        if mode.tensor and which == "dx":
            strict = mode._replace(tolerance=mode.tolerance / 10)
            assert not convolutions.compare(context, conv, which, strict)["passed"]
    row = limits.product(context, mode)
    assert row["passed"]
    assert row["rates"].keys() == {"ours", "cublas"}
    assert context.clock.xp._core.get_compute_type("f") == 1


def test_uneven_padding_beside_cudnn(context, monkeypatch):
    """The stem of resnet50: cuDNN is given the image with zeros around it."""
    pytest.importorskip("torch")
    from scripts.gpu import convolutions

    monkeypatch.setenv("GPUSIM_CHECKS", "off")
    context.peer, _ = cudnn.find(context.clock)
    conv = nets.convolutions("resnet50")[0].small()
    assert conv.window.top != conv.window.bottom
    for which in conv.passes:
        row = convolutions.compare(context, conv, which, MODES["float32"])
        assert row["passed"], row["note"]
        assert row["ratio"] > 0
    row = convolutions.compare(context, conv, "dx", MODES["float32"])
    assert "cuDNN: ValueError: it would be that of the image with the zeros" in row["note"]


def test_a_product_without_cublas_is_measured(context, monkeypatch):
    """CuPy may rename its switch for TF32."""
    monkeypatch.setattr(limits, "tf32_products", lambda cupy: cupy.no_such_name)
    row = limits.product(context, MODES["tf32"])
    assert row["passed"]
    assert row["rates"].keys() == {"ours"}
    assert "cuBLAS: AttributeError" in row["note"]
    assert context.limits["matrix tf32"] == row["rate"]


@needs_compiler
def test_without_torch_the_rest_runs(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    out = tmp_path / "report.json"
    result = run("tests.gpusim", "scripts.gpu_check", "--modes", "float32", "--only", "conv",
                 *QUICK, out, **FAST, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    content = json.loads(out.read_text())
    assert content["peer"].startswith("torch cannot be imported (No module named 'torch')")
    assert content["peer"] in result.stdout
    assert len(content["conv"]["rows"]) == 10
    for row in content["conv"]["rows"]:
        assert row["passed"]
        assert (row.get("kind") == "tiles") == ("ratio" in row)
    assert "cudnn_to_ours" not in content["conv"]["summary"]["article float32"]


@needs_compiler
def test_no_time_at_all_lists_everything(tmp_path):
    out = tmp_path / "report.json"
    result = run("tests.gpusim", "scripts.gpu_check", "--minutes", "0", "--out", out, **FAST)
    content = json.loads(out.read_text())
    assert not content["complete"]
    sections = [content[name] for name in ("limits", *gpu_check.SECTIONS)]
    assert not any(part["rows"] for part in sections)
    skipped = {group: names for part in sections for group, names in part["skipped"].items()}
    assert "28x28x32 > 32 3x3 dx" in skipped["beside cuDNN, article float32"]
    assert "7x7x512 > 2048 1x1 dw" in skipped["best tile, resnet50 float32"]
    assert "28x28x32 > 32 3x3 dx" in skipped["best tile, article bfloat16"]
    assert len(skipped["memory, float32"]) == 2 * len(memory.KERNELS)
    assert len(skipped["memory, float16"]) == 2 * sum(kernel.half for kernel in memory.KERNELS)
    assert {"limits", "training", "tests", "sanitizer"} <= skipped.keys()
    assert skipped["benchmark, mixed_float16"][:2] == ["article check", "article step"]
    assert "article step by torch-compile" in skipped["benchmark, mixed_float16"]
    assert "lenet5 step" in skipped["benchmark, float32"]
    assert "0 passed, 0 failed" in result.stdout
    assert "28x28x32 > 32 3x3 dx" in result.stdout


def test_help_and_hints_need_no_gpu():
    commands = run("scripts.gpu_check", "--sanitize").stdout.splitlines()
    assert commands[0] == ("compute-sanitizer --tool memcheck --error-exitcode 1 python -m "
                           "scripts.gpu.step")
    assert commands[-1].startswith("ncu ")


def test_the_steps_that_the_hints_run_work(cupy_backend, monkeypatch):
    monkeypatch.setenv("GPUSIM_CHECKS", "off")
    for precision in ("float32", "mixed_float16"):
        losses = step.small_steps(precision)
        assert len(losses) == 3
        assert np.isfinite(losses).all()


# -------------------------------------------------------------------------------- whole networks


def test_networks_are_measured_by_the_benchmark(tmp_path, gpu):
    """Each call's whole report is kept; a peer that cannot work is named."""
    for peer in ("torch", "jax"):
        (tmp_path / f"{peer}.py").write_text(f"raise ModuleNotFoundError('no {peer}')")
    out = tmp_path / "report.json"
    result = run("scripts.gpu_check", "--only", "benchmark", "--modes", "float32", *QUICK, out,
                 **gpu)
    content = json.loads(out.read_text())
    rows = {row["name"]: row for row in content["benchmark"]["rows"]}
    assert list(rows) == ["article check", "article step", "article infer",
                          "article step by torch-compile", "article load"]
    assert all(row["passed"] for row in rows.values())
    assert rows["article check"]["note"] == "captured, eager and another run: the same bits"
    assert "microseconds" not in rows["article check"]
    for name in list(rows)[1:]:
        assert rows[name]["microseconds"] > 0
        assert "ratio" not in rows[name]
    assert rows["article step"]["note"].endswith("not torch-channels-last, torch-graph, jax")
    report = rows["article step"]["report"]
    assert report["command"] == (
        "python scripts/benchmark.py step --model article --precision float32 --batch 2 "
        "--no-ceilings --windows 1 --seconds 0.001 --against torch-channels-last,torch-graph,jax")
    assert report["machine"]["gpu"] == "gpusim (CPU)"
    assert "-- benchmark, float32" in result.stdout
    page = performance.Page(tmp_path)
    assert not any("ceilings" in report for report in page.reports)  # the limits are those
    assert page.times("gpu", "step").count("images/s") == 2


def test_what_matters_most_comes_first():
    names = [call.name for call in benchmark.calls(["a", "b"], ["mixed_float16", "float32"])]
    assert names == [
        "a check", "a step", "b check", "b step", "a infer", "b infer", "a step by torch-compile",
        "b step by torch-compile", "a load", "a check", "a step", "b check", "b step"]


def test_the_fastest_peer_stands_in_the_row():
    def row(name, **more):
        return {"task": "step", "batch": 2, "contestant": name, **more}

    ours = row("gpucnn", median=1.0, spread=0.1, images_per_second=2.0)
    slow, fast = (row(name, median=t, ratio=t) for name, t in (("torch", 3.0), ("jax", 2.0)))
    report = {"results": [ours, slow, fast, row("torch-graph", error="no")]}
    assert benchmark.timed(report) == {
        "microseconds": 1e6, "spread": 0.1, "other_microseconds": 2e6, "ratio": 2.0,
        "note": "2 images/s, jax, not torch-graph"}
    assert benchmark.timed({"results": [row("gpucnn", error="broken"), fast]}) == {
        "note": "broken"}


def test_other_bits_are_named():
    result = {"differs_from_eager": [], "differs_between_runs": ["conv1/w"]}
    assert benchmark.checked({"results": [result]})["note"] == "other bits in conv1/w"
    assert benchmark.checked({"results": [{"error": "broken"}]})["note"] == "broken"


def test_a_call_that_leaves_no_report_fails(context, monkeypatch):
    monkeypatch.setattr(benchmark.children, "run_child", lambda *args: (False, "a\nb: broken\n"))
    row = benchmark.run(context, benchmark.Call("step", "article", "float32"))
    assert (row["passed"], row["note"]) == (False, "b: broken")


def test_without_a_gpu_it_says_so(tmp_path):
    (tmp_path / "cupy.py").write_text("raise ModuleNotFoundError('no', name='cupy')")
    result = run("scripts.gpu_check", code=2, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert error_of(result) == ("gpucnn: error: gpu_check needs a GPU, but CuPy is not installed; "
                                "pip install 'gpucnn[cuda12]' (or cuda13)")


@needs_compiler
def test_without_pytest_it_says_so(tmp_path):
    (tmp_path / "pytest.py").write_text("raise ModuleNotFoundError('no', name='pytest')")
    result = run("tests.gpusim", "scripts.gpu_check", "--only", "tests", code=2,
                 PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert error_of(result) == ("gpucnn: error: the tests need pytest; pip install -e '.[test]', "
                                "or choose other sections with --only")


# ------------------------------------------------------------------------------------ the tables


def test_every_kernel_file_has_a_row():
    """A new .cu file needs a line in scripts/gpu/memory.py, or a pass in convolutions.py."""
    covered = {kernel.file for kernel in memory.KERNELS}
    covered |= {*memory.MATRIX_FILES, *memory.TWO_NUMBERS}
    assert covered == {path.name for path in kernel_dir().glob("*.cu")}


@pytest.mark.parametrize(("net", "layers", "kinds", "gigaflops"), [
    ("article", 4, 4, 9.364), ("airbench94", 7, 6, 242.0), ("resnet18", 20, 11, 568.7),
    ("resnet50", 53, 23, 2137.4)])  # as published, multiply-adds by 2 and the batch,
# but for the stem of resnet50, 4 * 4 * 16 in place of 7 * 7 * 3 products an output
def test_the_convolutions_of_the_nets(net, layers, kinds, gigaflops):
    convs = nets.convolutions(net)
    assert len(convs) == kinds
    assert sum(conv.times for conv in convs) == layers
    flops = sum(conv.times * conv.flops for conv in convs)
    assert flops / 1e9 == pytest.approx(gigaflops, rel=1e-3)
    first = ("y",) if net == "airbench94" else ("y", "dw")
    assert [conv.passes for conv in convs] == [first, *[("y", "dx", "dw")] * (kinds - 1)]
    assert all(len(c.label) + 3 < report.COLUMNS[0][1] for c in convs)
    assert len(nets.table(convs).splitlines()) == kinds + 1


def test_small_convolutions_keep_their_kind():
    window = make_window("test", 3, 2, 1, 1, (56, 56))
    conv = nets.Convolution("net", "conv1", 256, 56, 56, 64, 128, window, 32, ("y",))
    small = conv.small()
    assert (small.batch, small.h, small.c, small.c_out, small.groups) == (2, 8, 64, 128, 32)
    assert small.window == window
    assert small.label == "8x8x64 > 128 3x3/2 g32"


# ---------------------------------------------------------------------------------- measurements


def test_what_is_not_written_or_not_repeated_shows(context):
    xp = context.clock.xp
    assert run_twice(context.clock, lambda: xp.ones(4))[1] == ""
    assert run_twice(context.clock, lambda: xp.empty(4))[1] == "not all is written, or finite"
    numbers = iter((1, 2))
    assert run_twice(context.clock, lambda: xp.ones(4) * next(numbers))[1] == "two runs differ"


def test_relative_error():
    one = np.array([3, 4], np.float32)
    assert relative_error(np, one, one) == 0
    assert relative_error(np, one + np.float32(0.5), one) == pytest.approx(0.5 * 2**0.5 / 5)
    assert not relative_error(np, one * np.float32(np.nan), one) <= 1
    assert relative_error(np, one[:1], one) == np.inf
    assert relative_error(np, 0 * one, 0 * one) == 0
    assert relative_error(np, one, 0 * one) == np.inf
    labels = np.arange(3)
    assert relative_error(np, labels, labels) == 0
    assert relative_error(np, labels + 1, labels) == np.inf


def test_buffers_pass_the_cache(context):
    clock = Clock(context.backend, 1, 0)
    clock.l2_bytes = 50 << 20
    assert clock.buffers(300 << 20) == 1
    assert clock.buffers(60 << 20) == 3
    assert clock.buffers(25 << 20) == 5
    assert clock.buffers(1) == 64
    assert context.clock.buffers(1) == 2


def test_the_buffers_are_taken_in_turn(context):
    turns = []
    calls = [lambda k=k: turns.append(k) for k in range(3)]
    timing = context.clock.time(calls)
    assert turns == [0, 1, 2] * 3  # compiled, estimated, captured; a graph launches no Python
    assert len(timing.samples) == 1
    assert timing.median > 0


@needs_simulator
def test_torch_that_cannot_read_cupy_is_no_peer(context, monkeypatch):
    pytest.importorskip("torch")
    assert cudnn.find(context.clock)[1] == ""
    monkeypatch.setattr(context.clock.xp.ndarray, "__dlpack__", lambda self, **options: 1 / 0)
    peer, reason = cudnn.find(context.clock)
    assert peer is None
    assert reason.startswith("torch cannot read CuPy's arrays (")


def test_a_peer_that_fails_is_a_note(context, monkeypatch):
    pytest.importorskip("torch")
    from scripts.gpu import convolutions

    context.peer, _ = cudnn.find(context.clock)
    monkeypatch.setattr(cudnn.Cudnn, "call", lambda *args: 1 / 0)
    conv = nets.convolutions("article")[0].small()
    row = convolutions.compare(context, conv, "y", MODES["float32"])
    assert row["passed"]
    assert row["microseconds"] > 0
    assert "ratio" not in row
    assert row["peer"] == "ZeroDivisionError: division by zero"
