"""scripts/gpu_check.py: its time, its table and JSON, and what it runs in other processes."""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scripts import gpu_check
from scripts.gpu import children, report
from scripts.gpu.report import Job, OutOfTime, Report, Section
from tests.test_gpu_check import make_context


@pytest.fixture
def context(cupy_backend):
    return make_context(cupy_backend)


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
    gpu_check.run_section("memory", jobs_of(Job("s", "some", passes("some"), 45)), context, other,
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


def test_what_takes_too_long_is_ended_with_its_children(tmp_path):
    alive = tmp_path / "alive"
    grandchild = f"import time; f = open({str(alive)!r}, 'w'); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with pytest.raises(OutOfTime):
        children.run_child([sys.executable, "-c", parent], 2)
    assert alive.exists()
    deadline = time.monotonic() + 20  # until a busy system has ended them

    def runs():
        return any(str(alive).encode() in contents(path)
                   for path in Path("/proc").glob("[0-9]*/cmdline"))

    while runs() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs()


def contents(path: Path) -> bytes:
    """Nothing of a process that has just ended."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


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
