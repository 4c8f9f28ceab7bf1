"""Prove gpucnn on this machine's GPU, and measure it, in less than ten minutes.

    benchmark  scripts/benchmark.py: of five networks the bits of captured steps against eager ones
               and another run's, then steps, inference and loading beside PyTorch and JAX
    memory     each kernel that is bound by memory, in float32 and float16: its share of a copy's
               bandwidth
    conv       each convolution of the article's network, airbench94, ResNet-18 and
               ResNet-50, forward and both gradients, beside cuDNN through torch, in float16,
               TF32 and float32; then its best tile, wgmma's among them; then in bfloat16
    training   an epoch of the article's network, twice: the same bits?
    tests      the whole test suite on the GPU
    sanitizer  compute-sanitizer over a small step, where it is installed; --sanitize prints its
               command lines and that of the profiler ncu

Each result is checked before it is timed. Prints one table and writes the figures, as they come,
as JSON under benchmarks/. What there was no time for is listed; --only runs it again.
"""
from __future__ import annotations

import argparse
import platform
import re
import shlex
import subprocess
import sys
import textwrap
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/gpu_check.py

import numpy as np

import gpucnn
from gpucnn import cli
from gpucnn.backend import Backend, cupy_obstacle, make_backend
from gpucnn.machine import device_name, git_commit
from scripts.gpu import children, cudnn, report
from scripts.gpu.context import HAS_BFLOAT16, MODES, Context
from scripts.gpu.measure import Budget, Clock
from scripts.gpu.nets import NETS
from scripts.gpu.report import Job, OutOfTime, Report, Row, Section

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ("benchmark", "memory", "conv", "training", "tests", "sanitizer")
# By what part of the time a section is over, where one that may go on for longer is to come.
SHARES = {"limits": 0.5, "benchmark": 0.5, "memory": 0.7, "conv": 0.7}
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem",
              "power.limit", "temperature.gpu")


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="gpu_check.py", description=__doc__,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", action="append", choices=SECTIONS, metavar="SECTION",
                   help="run this section, may be repeated (default: all)")
    p.add_argument("--minutes", type=cli.nonnegative_float, default=10, metavar="M",
                   help="begin nothing that may not end within this time (default: %(default)s)")
    p.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), metavar="NET",
                   help=f"whose convolutions to measure, of {', '.join(NETS)} (default: all)")
    p.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE",
                   help=f"how to store and multiply, of {', '.join(MODES)} (default: all)")
    p.add_argument("--out", type=Path, metavar="JSON",
                   help="(default: benchmarks/gpu_<GPU>_<date>.json)")
    p.add_argument("--batch-size", type=cli.positive_int, metavar="N",
                   help="images in each tensor (default: 256 for the kernels, each net's own)")
    p.add_argument("--windows", type=cli.positive_int, default=7, metavar="N",
                   help="how often each call is timed (default: %(default)s)")
    p.add_argument("--images", type=cli.positive_int, metavar="N",
                   help="train and test on the first N images of the subset only")
    p.add_argument("--quick", action="store_true",
                   help="tiny tensors and one short window: tries the script, measures nothing")
    p.add_argument("--sanitize", action="store_true",
                   help="only print how to run compute-sanitizer and ncu")
    return p


def main(arguments: argparse.Namespace) -> int:
    if arguments.sanitize:
        print(children.hints())
        return 0
    obstacle = cupy_obstacle()
    if obstacle:
        raise cli.UsageError(f"gpu_check needs a GPU, but {obstacle}")
    chosen = [name for name in SECTIONS if not arguments.only or name in arguments.only]
    if "tests" in chosen:
        children.require_pytest()
    backend = make_backend("cupy")
    context, absent = make_context(arguments, backend)
    start = {"command": shlex.join(["python", "scripts/gpu_check.py", *sys.argv[1:]]),
             "minutes": arguments.minutes, "quick": arguments.quick, "machine": machine(backend),
             "peer": context.peer.versions if context.peer else absent}
    out = arguments.out or ROOT / "benchmarks" / default_name(start["machine"])
    results = Report(out, start)
    for key, value in {**start["machine"], "cuDNN": start["peer"]}.items():
        print(f"{key}: {value}")
    if not HAS_BFLOAT16:
        print("bfloat16: not measured, because ml_dtypes is not installed")
    print("us: median of a call; spread: (slowest - fastest) / median; limit: share of the copy's\n"
          "bandwidth or of the matrix product's rate; other: cuDNN, cuBLAS, or what auto chose;\n"
          "ratio: other / us. y: forward, dx and dw: the gradients. 128x64t/2: in tiles, on tensor "
          f"cores,\nw: by wgmma, sums in 2 parts.\n\n{report.header()}")
    sections = make_sections()
    for name in ("limits", *chosen):
        run_section(name, sections[name], context, results, last=chosen[-1])
    results.content["clocks_after"] = clocks()
    results.content["seconds"] = context.budget.used
    results.content["complete"] = not results.skipped
    results.save()
    show_skipped(results)
    passed = sum(results.verdicts)
    failed = len(results.verdicts) - passed
    print(f"\n{passed} passed, {failed} failed in {context.budget.used:.0f} s\n{out}")
    return int(failed > 0)


def make_context(arguments: argparse.Namespace, backend: Backend) -> tuple[Context, str]:
    """The context, and why there is no cuDNN in it, "" where there is."""
    clock = Clock(backend, 1, 0, 2) if arguments.quick else Clock(backend, arguments.windows)
    budget = Budget(60 * arguments.minutes)
    peer, absent = cudnn.find(clock)
    modes = [MODES[name] for name in arguments.modes]
    return Context(backend, clock, budget, peer, arguments.nets, modes, arguments.batch_size,
                   arguments.quick, arguments.images), absent


def make_sections() -> dict[str, Section]:
    """Imported here, because some need CuPy."""
    from scripts.gpu import benchmark, convolutions, limits, memory, step
    return {
        "limits": Section("what the GPU can do at most", limits.jobs),
        "benchmark": Section("networks beside PyTorch and JAX", benchmark.jobs),
        "memory": Section("kernels bound by memory", memory.jobs),
        "conv": Section("convolutions", convolutions.jobs, convolutions.summary),
        "training": Section("an epoch of the article's network", step.training_jobs),
        "tests": Section("the test suite", children.test_jobs),
        "sanitizer": Section("compute-sanitizer", children.sanitizer_jobs),
    }


def run_section(name: str, section: Section, context: Context, results: Report, last: str) -> None:
    """Run its jobs, most important first, as long as there is time; print and keep each row."""
    part, group = results.section(name), section.title
    print(f"== {group}", flush=True)
    share = SHARES.get(name, 1) if SHARES.get(last, 1) > SHARES.get(name, 1) else 1
    for job in section.jobs(context):
        if share * context.budget.seconds - context.budget.used < job.seconds:
            results.skip(name, job)
            continue
        began = context.budget.used
        row = run_job(job, context)
        if row is None:
            results.skip(name, job)
            continue
        if row.get("group", group) != group:
            group = row["group"]
            print(f"-- {group}")
        results.add(name, row | {"seconds": context.budget.used - began})
        print(report.line(row), flush=True)
        if not row["passed"] and row.get("output"):
            print(row["output"])
    part["summary"] = section.summary(part["rows"])
    for key, value in part["summary"].items():
        for text in value["text"]:
            print(textwrap.fill(f"{key}: {text}", report.WIDTH, subsequent_indent="  "))


def run_job(job: Job, context: Context) -> Row | None:
    """The job's row; None where it ran out of time or memory, which the GPU's size decides."""
    try:
        return job.run()
    except OutOfTime as e:
        print(f"{job.name}: {e.args[0]}")
        return None
    except Exception as e:  # whatever it is, the other rows are worth having
        if "OutOfMemory" in type(e).__name__:
            print(f"{job.name}: out of memory")
            return None
        return {"name": job.name, "passed": False, "note": f"{type(e).__name__}: {e}"}
    finally:
        context.free()


def show_skipped(results: Report) -> None:
    if results.skipped:
        print("\nskipped for lack of time or memory (--only and --nets choose, --minutes gives "
              "more):")
    for group, names in results.skipped.items():
        print(textwrap.fill(f"{group}: {'; '.join(names)}", report.WIDTH, subsequent_indent="  "))


def default_name(machine: dict[str, Any]) -> str:
    gpu = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    return f"gpu_{gpu}_{machine['date']}.json"


def machine(backend: Backend) -> dict[str, Any]:
    """The device and the versions, for the record."""
    cuda: Any = backend.xp.cuda
    properties = cuda.runtime.getDeviceProperties(cuda.Device().id)
    return {"gpu": device_name(backend),
            "compute_capability": str(cuda.Device().compute_capability),
            "multiprocessors": properties["multiProcessorCount"],
            "memory_bytes": properties["totalGlobalMem"], "l2_bytes": properties["l2CacheSize"],
            "driver": cuda.runtime.driverGetVersion(), "cuda": cuda.runtime.runtimeGetVersion(),
            "cupy": backend.xp.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "gpucnn": gpucnn.__version__,
            "commit": git_commit(), "date": str(date.today()), "clocks": clocks()}


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says, where there is one. It is asked, never told."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader"],
            capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in answer.splitlines()[0].split(",")]
    return dict(zip(SMI_FIELDS, values))


if __name__ == "__main__":
    cli.run(main, parser())
