"""scripts/gpu_check.py through the simulator: what it measures is checked, and nothing is lost."""
from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest

from gpucnn.backend.cuda_kernel import kernel_dir
from gpucnn.geometry import make_window
from scripts import gpu_check
from scripts.contestants.contest import ROOT
from scripts.gpu import children, cudnn, memory, nets, report, step
from scripts.gpu.context import MODES, Context
from scripts.gpu.measure import Budget, Clock, relative_error, run_twice
from scripts.gpu.report import Job, OutOfTime, Report, Section
from tests.conftest import needs_simulator
from tests.gpusim.mutation import mutated
from tests.test_gpusim import WORKS
from tests.test_scripts import error_of, run

needs_gpusim = pytest.mark.skipif(not WORKS, reason="needs a C++ compiler")
QUICK = ("--quick", "--nets", "article", "--images", "16", "--out")
FAST = {"GPUSIM_CHECKS": "off", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def context(cupy_backend):
    clock = Clock(cupy_backend, 1, 0, 2)
    return Context(cupy_backend, clock, Budget(60), None, ["article"], list(MODES.values()), None,
                   True, 16)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """A run of all sections that need no process of their own."""
    if not WORKS:
        pytest.skip("needs a C++ compiler")
    out = tmp_path_factory.mktemp("gpu_check") / "new" / "report.json"
    only = [word for name in ("step", "memory", "conv", "training") for word in ("--only", name)]
    return out, run("tests.gpusim", "scripts.gpu_check", *only, *QUICK, out, **FAST)


# ---------------------------------------------------------------------------------- a whole run


def test_the_json_holds_all_that_a_reader_needs(checked):
    out, _ = checked
    content = json.loads(out.read_text())
    assert content["command"].startswith("python scripts/gpu_check.py --only step")
    assert content["machine"]["gpu"] == "gpusim (CPU)"
    assert {"driver", "cuda", "cupy", "numpy", "python", "commit", "clocks", "l2_bytes",
            "multiprocessors"} <= content["machine"].keys()
    assert content["complete"]
    for name in ("limits", "step", "memory", "conv", "training"):
        assert content[name]["rows"], name
        assert not content[name]["skipped"]
        assert all(row["passed"] for row in content[name]["rows"])
    assert content["training"]["rows"][0]["bitwise_equal"]


def test_every_kernel_is_a_share_of_the_copy(checked):
    rows = json.loads(checked[0].read_text())["memory"]["rows"]
    assert [row["name"] for row in rows] == [f"{k.name} 8x8x8" for k in memory.KERNELS]
    for row in rows:
        assert row["of_limit"] > 0
        assert len(row["samples"]) == 1
    moved = {row["name"]: row["bytes"] for row in rows}
    # Two images of 8x8x8 float32 in, a quarter of it and a byte for each of those out.
    assert moved["max_pool 8x8x8"] == 2 * (8 * 8 * 8 * 4 + 4 * 4 * 8 * (4 + 1))
    assert moved["im2col 8x8x8"] == 2 * 8 * 8 * 8 * 4 * 10


def test_every_pass_stands_beside_cudnn_and_has_a_best_tile(checked):
    pytest.importorskip("torch")
    conv = json.loads(checked[0].read_text())["conv"]
    convs = nets.distinct([c.small() for c in nets.convolutions("article")])
    passes = [f"{c.label} {which}" for c in convs for which in c.passes]
    compared = [row for row in conv["rows"] if row.get("kind") != "tiles"]
    tiles = [row for row in conv["rows"] if row.get("kind") == "tiles"]
    assert [row["name"] for row in compared] == [row["name"] for row in tiles] == passes
    for row in compared:
        assert float(row["error"]) < 1e-5
        assert row["ratio"] == pytest.approx(row["other_microseconds"] / row["microseconds"])
        assert row["of_limit"] > 0
    for row in tiles:
        assert row["ratio"] >= 1
        assert {tuple(plan["tile"]) for plan in row["plans"] if plan["tile"]} == {
            (128, 128), (128, 64), (64, 64), (32, 32)}
        assert row["plans"][0]["microseconds"] == row["microseconds"]
        # A direct kernel, where there is one, is among what was tried.
        direct = "direct" in {plan["algorithm"] for plan in row["plans"]}
        assert direct == (row["shape"][3] <= 4 and row["pass"] != "dx")
    summary = conv["summary"]["article float32"]
    product = np.prod([row["ratio"] for row in compared])
    assert summary["cudnn_to_ours"] == pytest.approx(product ** (1 / len(compared)))
    assert summary["worst_auto_to_best"] == max(row["ratio"] for row in tiles)


def test_what_a_graph_refuses_is_a_row(checked):
    rows = {row["name"]: row for row in json.loads(checked[0].read_text())["step"]["rows"]}
    for part in ("forward", "backward", "optimiser"):
        assert rows[f"step, {part}"]["captured"]
    for part in ("loss", "all"):
        row = rows[f"step, {part}"]
        assert row["captured"] or row["note"].startswith("refused: ")
    assert rows["step, without a graph"]["images_per_second"] > 0


def test_the_table_fits_100_columns(checked):
    lines = checked[1].stdout.splitlines()
    start = lines.index(report.header())
    assert len(lines) > start + 30
    assert max(map(len, lines[start:-1])) <= report.WIDTH
    assert lines[-1] == str(checked[0])
    assert " passed, 0 failed in " in lines[-2]


@needs_gpusim
def test_a_wrong_kernel_is_not_timed_and_fails(tmp_path):
    out = tmp_path / "report.json"
    with mutated("maxpool.cu", "value > best.at[v]", "value < best.at[v]") as folder:
        result = run("tests.gpusim", "scripts.gpu_check", "--only", "memory", *QUICK, out, code=1,
                     GPUCNN_KERNEL_DIR=str(folder), **FAST)
    rows = json.loads(out.read_text())["memory"]["rows"]
    (wrong,) = (row for row in rows if not row["passed"])
    assert wrong["name"] == "max_pool 8x8x8"
    assert "microseconds" not in wrong
    assert "FAILED: differs from NumPy by " in result.stdout
    assert " 1 failed in " in result.stdout


@needs_simulator
def test_a_wrong_convolution_is_not_timed_and_fails(context, monkeypatch):
    pytest.importorskip("torch")
    from scripts.gpu import convolutions

    conv = nets.convolutions("article")[1].small()
    context.peer, _ = cudnn.find(context.clock)
    with mutated("conv_gemm.cu", "activate(z, ACTIVATION)", "activate(z * 1.001f, ACTIVATION)"):
        for judge in ("NumPy", "cuDNN"):
            row = convolutions.compare(context, conv, "y", MODES["float32"])
            assert not row["passed"]
            assert row["note"] == f"differs from {judge} by 1.0e-03"
            assert "microseconds" not in row
            monkeypatch.setattr(convolutions, "differs_from_numpy", lambda *args: "")


@needs_gpusim
def test_without_torch_the_rest_runs(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    out = tmp_path / "report.json"
    result = run("tests.gpusim", "scripts.gpu_check", "--only", "conv", *QUICK, out, **FAST,
                 PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    content = json.loads(out.read_text())
    assert content["peer"].startswith("torch cannot be imported (No module named 'torch')")
    assert content["peer"] in result.stdout
    assert len(content["conv"]["rows"]) == 10
    for row in content["conv"]["rows"]:
        assert row["passed"]
        assert (row.get("kind") == "tiles") == ("ratio" in row)
    assert "cudnn_to_ours" not in content["conv"]["summary"]["article float32"]


@needs_gpusim
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
    assert len(skipped["memory"]) == 2 * len(memory.KERNELS)
    assert {"limits", "step", "training", "tests", "sanitizer"} <= skipped.keys()
    assert "0 passed, 0 failed" in result.stdout
    assert "28x28x32 > 32 3x3 dx" in result.stdout


def test_help_and_hints_need_no_gpu():
    commands = run("scripts.gpu_check", "--sanitize").stdout.splitlines()
    assert commands[0] == ("compute-sanitizer --tool memcheck --error-exitcode 1 python -m "
                           "scripts.gpu.step")
    assert commands[-1].startswith("ncu ")


@needs_gpusim
def test_the_step_that_the_hints_run_works():
    assert run("tests.gpusim", "scripts.gpu.step", **FAST).stdout == ""


def test_without_a_gpu_it_says_so(tmp_path):
    (tmp_path / "cupy.py").write_text("raise ModuleNotFoundError('no', name='cupy')")
    result = run("scripts.gpu_check", code=2, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert error_of(result) == ("gpucnn: error: gpu_check needs a GPU, but CuPy is not installed; "
                                "pip install 'gpucnn[cuda12]' (or cuda13)")


@needs_gpusim
def test_without_pytest_it_says_so(tmp_path):
    (tmp_path / "pytest.py").write_text("raise ModuleNotFoundError('no', name='pytest')")
    result = run("tests.gpusim", "scripts.gpu_check", "--only", "tests", code=2,
                 PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert error_of(result) == ("gpucnn: error: the tests need pytest; pip install -e '.[test]', "
                                "or choose other sections with --only")


# ------------------------------------------------------------------------------------ the tables


def test_every_kernel_file_has_a_row():
    """A new .cu file needs a line in scripts/gpu/memory.py, or a pass in convolutions.py."""
    covered = {kernel.file for kernel in memory.KERNELS} | set(memory.MATRIX_FILES)
    assert covered == {path.name for path in kernel_dir().glob("*.cu")}


@pytest.mark.parametrize(("net", "layers", "kinds", "gigaflops"), [
    ("article", 4, 4, 9.364), ("airbench94", 7, 6, 242.0), ("resnet18", 20, 11, 568.7),
    ("resnet50", 53, 23, 2092.6)])  # as in published counts of multiply-adds, by 2 and the batch
def test_the_convolutions_of_the_nets(net, layers, kinds, gigaflops):
    convs = nets.convolutions(net)
    assert len(convs) == kinds
    assert sum(conv.times for conv in convs) == layers
    flops = sum(conv.times * conv.flops for conv in convs)
    assert flops / 1e9 == pytest.approx(gigaflops, rel=1e-3)
    assert [conv.first for conv in convs] == [True, *[False] * (kinds - 1)]
    assert all((c.window.top, c.window.left) == (c.window.bottom, c.window.right) for c in convs)
    assert all(len(c.label) + 3 < report.COLUMNS[0][1] for c in convs)
    assert len(nets.table(convs).splitlines()) == kinds + 1


def test_small_convolutions_keep_their_kind():
    window = make_window("test", 3, 2, 1, 1, (56, 56))
    conv = nets.Convolution("net", "conv1", 256, 56, 56, 64, 128, window, 32, False)
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


def test_a_captured_step_must_give_the_bits_of_a_plain_one(context, monkeypatch):
    monkeypatch.setenv("GPUSIM_CHECKS", "off")

    def loss(logits, labels):
        return None, logits * 0.01  # what a graph can hold

    monkeypatch.setattr(step.losses, "SoftmaxCrossEntropy", lambda: loss)
    row = step.capture_step(context)
    assert (row["captured"], row["passed"], row["note"]) == (True, True, "captured")
    assert row["microseconds"] > 0
    factors = iter((0.01, 0.02, 0.03))
    monkeypatch.setattr(step.losses, "SoftmaxCrossEntropy", lambda: (
        lambda logits, labels: (None, logits * next(factors))))
    row = step.capture_step(context)
    assert (row["passed"], row["note"]) == (False, "a replayed step has other bits")


def test_a_refused_capture_leaves_the_clock_usable(context):
    x = context.clock.xp.ones(3)
    row = step.refusal(context, "host", lambda: x.get(), lambda replay: replay())
    assert not row["captured"]
    assert row["passed"]
    assert "refused: RuntimeError: " in row["note"]
    assert step.refusal(context, "sum", lambda: x + x, lambda replay: replay())["captured"]


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


# ----------------------------------------------------------------------------- budget and report


def jobs_of(*jobs):
    return Section("jobs", lambda context: iter(jobs))


def passes(name):
    return lambda: {"name": name, "passed": True}


def test_jobs_that_may_not_end_in_time_are_left_out(context, tmp_path, capsys):
    results = Report(tmp_path / "report.json", {})
    section = jobs_of(Job("g", "short", passes("short"), 40), Job("g", "long", passes("long"), 61),
                      Job("g", "late", lambda: 1 / 0, 1))
    gpu_check.run_section("conv", section, context, results, last="conv")
    assert results.skipped == {"g": ["long"]}
    assert results.verdicts == [True, False]
    assert "FAILED: ZeroDivisionError" in capsys.readouterr().out
    # What is measured leaves the tests their share.
    other = Report(tmp_path / "other.json", {})
    gpu_check.run_section("conv", section, context, other, last="tests")
    assert other.skipped == {"g": ["long"]}
    gpu_check.run_section("step", jobs_of(Job("s", "some", passes("some"), 45)), context, other,
                          last="tests")
    assert other.skipped == {"g": ["long"], "s": ["some"]}


def test_running_out_of_memory_or_time_is_no_failure(context, tmp_path):
    class OutOfMemoryError(Exception):
        """CuPy and torch have one each."""

    def full():
        raise OutOfMemoryError

    def late():
        raise OutOfTime("not finished in 1 s")

    results = Report(tmp_path / "report.json", {})
    gpu_check.run_section("tests", jobs_of(Job("a", "full", full), Job("b", "late", late)), context,
                          results, last="tests")
    assert results.skipped == {"a": ["full"], "b": ["late"]}
    assert results.verdicts == []


def test_each_row_is_on_the_disk_at_once(tmp_path):
    path = tmp_path / "folder" / "report.json"
    results = Report(path, {"command": "x"})
    assert json.loads(path.read_text()) == {"command": "x", "complete": False}
    results.add("conv", {"name": "one", "passed": True, "plan": np.int64(3)})
    assert [row["name"] for row in json.loads(path.read_text())["conv"]["rows"]] == ["one"]
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]


def test_lines_of_the_table():
    row = {"name": "56x56x256 > 128 1x1 dw", "microseconds": 1234.56, "spread": 0.021,
           "rate": 42.4e12, "unit": "flops", "of_limit": 0.876, "other_microseconds": 987.6,
           "ratio": 0.8, "note": "128x64/16", "passed": True}
    assert report.line(row) == (
        "56x56x256 > 128 1x1 dw           1235   2.1%  42.4 TF/s   88%      988  0.800  128x64/16")
    wrong = {"name": "im2col", "passed": False, "note": "two\nlines" + 100 * "x"}
    assert report.line(wrong).startswith("im2col                         FAILED: two\\nlinesx")
    assert len(report.line(wrong)) == report.WIDTH
    assert report.line({"name": "copy", "microseconds": 3.5, "rate": 2.95e12, "unit": "bytes",
                        "passed": True}).endswith("2950 GB/s")


def test_the_default_path_names_the_gpu_and_the_day():
    assert gpu_check.default_name({"gpu": "NVIDIA H100 80GB HBM3", "date": "2026-11-25"}) == (
        "gpu_nvidia-h100-80gb-hbm3_2026-11-25.json")


def test_clocks_come_from_nvidia_smi(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700 W, 40'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpu_check.clocks()["clocks.sm"] == "1980 MHz"
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert gpu_check.clocks() is None


# ------------------------------------------------------------------- what runs in another process


def test_tests_without_results_show_what_they_printed(monkeypatch):
    monkeypatch.setattr(children, "run_child", lambda *args: (False, "no such option"))
    assert children.run_tests(1) == {"name": "tests", "passed": False, "output": "no such option",
                                     "note": "pytest left no results"}


def test_what_takes_too_long_is_ended():
    sleeper = "import time; print('so far', flush=True); time.sleep(60)"
    with pytest.raises(OutOfTime, match="not finished in 2 s") as e:
        children.run_child([sys.executable, "-c", sleeper], 2)
    assert e.value.args[1] == "so far\n"


def test_the_sanitizer_is_run_where_it_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(children, "sanitizer", lambda: None)
    assert children.run_sanitizer("memcheck")["passed"]
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho \"$2\"\necho '========= ERROR SUMMARY: 1 error'\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setattr(children, "sanitizer", lambda: str(tool))
    row = children.run_sanitizer("racecheck")
    assert not row["passed"]
    assert row["output"].startswith("racecheck\n")
    assert row["note"] == "========= ERROR SUMMARY: 1 error"
