"""scripts/performance.py: the page says what the files of benchmarks/ say, and nothing else."""
from __future__ import annotations

import json

import pytest

from gpucnn.errors import GpucnnError
from scripts import performance
from scripts.benchmark import NETS, PRECISIONS
from tests.test_scripts import error_of, run

CPU = {"cpu": "AMD X1", "gpu": None, "commit": "abc", "load_average": [0.25, 0, 0]}
GPU = {**CPU, "gpu": "NVIDIA X2"}


def row(contestant, median, task="step", model="article", batch=256, **more):
    return {"task": task, "model": model, "batch": batch, "contestant": contestant,
            "median": median, "minimum": 0.9 * median, "maximum": 1.1 * median,
            "images_per_second": batch / median, "peak_bytes": 3e6, "device_bytes": 4e6, **more}


def report(results, machine=CPU, date="2026-01-02", **more):
    return {"command": "python scripts/benchmark.py step", "date": date, "machine": machine,
            "versions": {"numpy": "2.4"}, "threads": 2, "results": results, **more}


@pytest.fixture
def page(tmp_path):
    """Of a folder of the given reports."""
    def make(*reports):
        for i, content in enumerate(reports):
            (tmp_path / f"{i}.json").write_text(json.dumps(content))
        return performance.Page(tmp_path)
    return make


def cells(table, line):
    return [cell.strip() for cell in table.splitlines()[2 + line].strip("|").split("|")]


def test_the_page_is_what_the_generator_makes():
    """Run python scripts/performance.py after changing the template or adding a file."""
    root = performance.ROOT
    text = performance.Page(root / "benchmarks").fill(
        (root / "docs" / "performance.template").read_text(encoding="utf-8"))
    assert text == (root / "docs" / "performance.md").read_text(encoding="utf-8")


def test_each_figure_names_its_run_and_the_newest_comes_first(page):
    old = report([row("gpucnn", 0.2)], date="2026-01-01")
    new = report([row("gpucnn", 0.1), row("torch", 0.05, ratio=0.5), row("jax", 1, error="no")])
    text = page(old, new).fill("{{times cpu step}}\n{{runs}}")
    assert cells(text, 0) == ["article", "256", "float32", "100 ms (90 to 110), 2560 images/s",
                              "0.50 (50 ms)", "", "failed", "[1](#runs)"]
    assert cells(text, 1)[3:] == ["200 ms (180 to 220), 1280 images/s", "", "", "", "[2](#runs)"]
    assert text.splitlines()[-4:] == [
        "1. AMD X1, 2 threads, 2026-01-02, commit abc, load average before it 0.2; numpy 2.4",
        "   `python scripts/benchmark.py step`",
        "2. AMD X1, 2 threads, 2026-01-01, commit abc, load average before it 0.2; numpy 2.4",
        "   `python scripts/benchmark.py step`"]


def test_what_no_gpu_has_run_is_not_measured_yet(page):
    kinds = ", ".join(PRECISIONS)
    for make in (performance.Page.times, performance.Page.memory):
        table = make(page(report([row("gpucnn", 0.1)])), "gpu", "step")
        assert [cells(table, i)[:4] for i in range(len(NETS))] == [
            [name, str(net.gpu_batch), kinds, "not measured yet"] for name, net in NETS.items()]
    for table in (page().load("gpu"), page().ceilings("gpu"), page().check("gpu"), page().limits(),
                  page().kernels(), page().convolutions()):
        assert "not measured yet" in table


def test_a_gpu_has_tables_of_its_own(page):
    measured = report([row("gpucnn", 1e-4, precision="tf32"),
                       row("torch-graph", 2e-4, precision="tf32", ratio=2.0)], GPU)
    both = page(measured, report([row("gpucnn", 0.1)]))
    table = both.times("gpu", "step")
    assert cells(table, 0) == [
        "article", "256", "tf32", "0.1 ms (0.09 to 0.11), 2560000 images/s", "", "", "",
        "2.00 (0.2 ms)", "", "", "[1](#runs)"]
    assert cells(table, 1)[2:4] == ["float32, mixed_float16, mixed_bfloat16", "not measured yet"]
    assert cells(both.memory("gpu", "step"), 0)[3] == "4"
    assert "0.1 ms" not in both.times("cpu", "step")
    eager = row("gpucnn", 1e-4, notes={"not captured": "a reason"})
    assert "images/s, without a graph" in page(report([eager], GPU)).times("gpu", "step")
    assert "NVIDIA X2" in both.list_of_runs()


def test_the_other_tables(page):
    product = {"task": "product", "contestant": "torch", "precision": "tf32", "per_second": 5e14}
    loads = [{"task": "import", "contestant": "gpucnn", "median": 0.1},
             row("gpucnn", 0.7, "first step"), row("jax", 1, "first step", error="no")]
    bits = [row("gpucnn", 1, "check", passed=True),
            row("gpucnn", 1, "check", model="lenet5", passed=False)]
    made = page(report([*bits], GPU, ceilings=[product]), report(loads))
    assert cells(made.ceilings("gpu"), 0)[:4] == ["product", "tf32", "torch", "500000 GFLOP/s"]
    assert cells(made.load("cpu"), 0)[:2] == ["import", "gpucnn 0.10"]
    assert cells(made.load("cpu"), 1)[:2] == ["first step of article, batch 256, float32",
                                              "gpucnn 0.70; jax failed"]
    assert cells(made.check("gpu"), 0)[3] == "the same bits"
    assert "OTHER BITS" in made.check("gpu")


def test_what_gpu_check_has_found(page):
    inside = report([row("gpucnn", 1e-4, precision="mixed_float16")], GPU)
    checked = {"command": "python scripts/gpu_check.py", "machine": {**GPU, "date": "2026-01-03"},
               "peer": {"torch": "2"},
               "limits": {"rows": [{"name": "copy", "rate": 3e12, "unit": "bytes"}]},
               "memory": {"rows": [{"name": "pool", "dtype": "float16", "microseconds": 7.0,
                                    "of_limit": 0.9}, {"name": "wrong", "passed": False}]},
               "conv": {"summary": {"article float16": {"text": ["cuDNN / ours 1.10"]}}},
               "benchmark": {"rows": [{"name": "article step", "report": inside}]}}
    made = page(checked)
    assert "0.1 ms" in made.times("gpu", "step")
    assert cells(made.limits(), 0)[:2] == ["copy", "3.00 TB/s"]
    assert cells(made.kernels(), 0)[:4] == ["pool", "float16", "7.0", "90%"]
    assert cells(made.convolutions(), 0)[:2] == ["article float16", "cuDNN / ours 1.10"]
    assert "2026-01-03" in made.list_of_runs()


def test_sentences_take_figures_from_the_files(page):
    layer = {"layer": "conv1", "class": "Conv2D", "forward": 0.1, "backward": 0.2,
             "forward_flops": 1e9, "forward_flops_per_second": 5e10,
             "backward_flops_per_second": 1e10}
    profile = {"model": "article", "rows": [layer], "loss": 0.1, "optimiser": 0.0, "step": 0.4,
               "peak_flops_per_second": 1e11}
    text = page(report([row("gpucnn", 0.1), row("torch", 0.05, ratio=0.5)], profiles=[profile])
                ).fill("{{ms step article 256 torch}} {{ratio step article 256 torch}} "
                       "{{share article Conv2D}} {{peak article}}\n{{profile article}}")
    first, *table = text.split("\n", 1)
    assert first == "50 0.50 75% 100"
    assert cells(table[0], 0) == ["conv1", "100.00", "200.00", "75.0%", "50%", "10%"]


@pytest.mark.parametrize("template", [
    "{{nothing}}", "{{ms step article 256 jax}}", "{{profile lenet5}}"])
def test_what_is_not_there_is_an_error(page, template):
    with pytest.raises(GpucnnError):
        page(report([row("gpucnn", 0.1), row("torch", 0.05)])).fill(template)


def test_the_script_writes_the_page(tmp_path):
    template, out = tmp_path / "in", tmp_path / "out"
    (tmp_path / "files").mkdir()
    template.write_text("{{times gpu step}}\n")
    arguments = ("--benchmarks", tmp_path / "files", "--template", template, "--out", out)
    assert run("scripts/performance", *arguments, as_module=False).stdout.strip() == str(out)
    assert "not measured yet" in out.read_text()
    template.write_text("{{wrong}}")
    assert "is neither a table nor a figure" in error_of(
        run("scripts.performance", *arguments, code=1))
