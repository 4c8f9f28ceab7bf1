"""Time gpucnn beside its peers: a training step, inference, each op, or what loading takes.

Each contestant lives in a process of its own. After a warm-up they take turns, window by window;
the tables give the median of the windows, the fastest and the slowest. The ratio is the peer's
time / gpucnn's: above 1, gpucnn is faster. On a GPU times are those of CUDA events, wall ms beside
them the host's; JAX, which has no events, is timed by the host. `check` times nothing: it compares
bits.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/benchmark.py

from gpucnn import cli
from gpucnn.backend import Backend
from gpucnn.errors import GpucnnError
from gpucnn.files import one_line, write_atomically
from gpucnn.machine import cpu_name, device_name, git_commit
from gpucnn.models import MODELS
from scripts.contestants import copied_bytes, gemm_size
from scripts.contestants.contest import ROOT, Child, Contest, Failed, Row, alternate
from scripts.contestants.workloads import by, describe, distinct_ops


class Net(NamedTuple):
    """The shape of an image, how many classes, and the usual batch on a CPU and on a GPU."""

    image: tuple[int, int, int]
    classes: int
    cpu_batch: int
    gpu_batch: int

    def batch(self, device: str) -> int:
        return self.gpu_batch if device == "cuda" else self.cpu_batch


NETS = {"article": Net((28, 28, 1), 10, 256, 256), "lenet5": Net((28, 28, 1), 10, 64, 64),
        "airbench94": Net((32, 32, 3), 10, 64, 1024), "resnet18": Net((32, 32, 3), 10, 64, 512),
        "resnet50": Net((224, 224, 3), 1000, 8, 64)}
PEERS = {"gpucnn-eager": "gpucnn", "torch": "torch", "torch-channels-last": "torch",
         "torch-graph": "torch", "torch-compile": "torch", "jax": "jax"}  # what each imports
BEST = {"cpu": ["torch", "torch-channels-last", "jax"],
        "cuda": ["torch-channels-last", "torch-graph", "torch-compile", "jax"]}
PRECISIONS = ("float32", "tf32", "mixed_float16", "mixed_bfloat16")
LEAST_WINDOWS = 7
CEILING_WINDOWS = 3
CHECKED_STEPS = 4  # the first of a captured step is eager, the second captured, then come replays
MEMORY = ("peak_bytes", "growth_bytes", "device_bytes")
CACHES = ("CUPY_CACHE_DIR", "CUDA_CACHE_PATH", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR",
          "JAX_COMPILATION_CACHE_DIR")
CACHE_ALL = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
             "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="benchmark.py", description=__doc__)
    commands = p.add_subparsers(dest="command", required=True)
    cores = allowed_cores()
    for name, (_, summary) in COMMANDS.items():
        c = commands.add_parser(name, help=summary, description=summary)
        c.add_argument("--model", nargs="+", choices=NETS, default=["article"], type=model_name,
                       help="the network, or several (default: article)")
        c.add_argument("--batch", nargs="+", type=cli.positive_int, metavar="N",
                       help="images in a batch, or several numbers (default: "
                       + ", ".join(f"{model} {net.cpu_batch}" + (
                           f", on a GPU {net.gpu_batch}" if net.gpu_batch != net.cpu_batch else "")
                           for model, net in NETS.items())
                       + ("; and 1)" if name == "infer" else ")"))
        c.add_argument("--precision", choices=PRECISIONS, default="float32",
                       help="of all contestants; mixed ones need a GPU (default: %(default)s)")
        if name != "check":
            c.add_argument("--against", type=peers, default=[], metavar="PEER,...",
                           help=f"compare with these: {', '.join(PEERS)}; or best: those that may "
                                "be the fastest on this device (default: none)")
            c.add_argument("--windows", type=cli.positive_int, default=9, metavar="N",
                           help=f"how often each is timed; fewer than {LEAST_WINDOWS} prove "
                                "nothing (default: %(default)s)")
            c.add_argument("--seconds", type=cli.positive_float, default=1.0,
                           help="of a window (default: %(default)s)")
        c.add_argument("--threads", type=cli.positive_int, default=cores, metavar="N",
                       help="that each may use (default: the cores this process may use, "
                            "%(default)s)")
        c.add_argument("--json", nargs="?", type=Path, const=Path(), metavar="PATH",
                       help="write the figures (default PATH: "
                            "benchmarks/<command>-<machine>-<date>.json)")
        if name in ("step", "infer"):
            c.add_argument("--no-ceilings", dest="ceilings", action="store_false",
                           help="do not measure a matrix product and a copy before all else")
        if name == "step":
            c.add_argument("--profile", action="store_true",
                           help="also the time of each layer of gpucnn")
            c.add_argument("--memory", action="store_true",
                           help="also the bytes that are alive at most in each layer of gpucnn, "
                                "and those that model.summary() predicts")
    return p


def main(arguments: argparse.Namespace) -> int:
    backend = cli.choose_backend()
    cli.require_precision(arguments.precision, backend)
    if vars(arguments).get("against") == ["best"]:
        arguments.against = BEST[device(backend)]
    how = "the same bits from captured and eager steps, and from two runs?"
    if arguments.command != "check":
        few = "" if arguments.windows >= LEAST_WINDOWS else ", too few for a claim"
        how = (f"{arguments.windows} windows{few}; ratio = time / gpucnn's, above 1: gpucnn is "
               "faster")
    print(f"{arguments.command}: {arguments.precision}, {arguments.threads} threads each, {how}")
    report: dict[str, Any] = {
        "command": shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "environment": environment(arguments, backend), "date": str(date.today()),
        "machine": machine(backend), "versions": {"python": platform.python_version()},
        "precision": arguments.precision, "threads": arguments.threads,
        **{k: v for k, v in vars(arguments).items() if k in ("windows", "seconds")},
        "results": []}
    out = arguments.json
    if out is not None:  # before the work, in case it cannot be made
        out = out if out.name else default_path(arguments.command, report)
        out.parent.mkdir(parents=True, exist_ok=True)
    try:
        COMMANDS[arguments.command][0](arguments, backend, report)
    except GpucnnError:  # after what may have taken long
        save(report, out)
        raise
    save(report, out)
    return int(any("error" in row or not row.get("passed", True)
                   for row in report["results"] if row["contestant"] == "gpucnn"))


def save(report: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        write_atomically(out, json.dumps(report, indent=1).encode())
        print(out)


def run_nets(arguments: argparse.Namespace, backend: Backend, report: dict[str, Any]) -> None:
    """step and infer: a row for each model, batch and contestant."""
    if arguments.ceilings:
        report["ceilings"] = measure_ceilings(arguments, backend, report)
    for workload in workloads(arguments, backend):
        with Contest(["gpucnn", *arguments.against], workload, report) as contest:
            rows = contest.measure(arguments.command, arguments.windows, arguments.seconds)
            for row in rows:
                if "error" not in row:
                    row["images_per_second"] = workload["batch"] / row["median"]
                    row |= contest.ask(row["contestant"], "memory") or {}
        show(title(workload), rows, memory=True, gpu=backend.name == "cupy")
        for row in rows:
            if "not captured" in row.get("notes", {}):
                print(f"{row['contestant']} is no graph: {row['notes']['not captured']}")
        report["results"] += rows
        if arguments.command == "step" and arguments.profile:
            report.setdefault("profiles", []).append(run_profile(arguments, workload, report))
        if arguments.command == "step" and arguments.memory:
            report.setdefault("layer_memory", []).append(run_memory(workload, report))


def measure_ceilings(arguments: argparse.Namespace, backend: Backend, report: dict[str, Any]
                     ) -> list[Row]:
    """What gpucnn and torch, where it is a peer, reach in one large product, and in a copy."""
    where = device(backend)
    workload = {"what": "ceilings", "model": "", "batch": 1, "device": where,
                "precision": arguments.precision, "threads": arguments.threads}
    windows, n = min(CEILING_WINDOWS, arguments.windows), gemm_size(where)
    work = {"product": (2 * n**3, "GFLOP/s"), "copy": (2 * copied_bytes(where), "GB/s")}
    names = ["gpucnn", *(["torch"] if "torch" in map(PEERS.get, arguments.against) else [])]
    with Contest(names, workload, report) as contest:
        rows = [row for task in work for row in contest.measure(task, windows, arguments.seconds)]
    for row in rows:
        amount, unit = work[row["task"]]
        if "median" in row:
            row["per_second"] = amount / row["median"]
            print(f"{row['task']} by {row['contestant']}: {row['per_second'] / 1e9:.0f} {unit}")
        else:
            print(f"{row['task']} by {row['contestant']}: {row['error']}")
    return rows


def run_check(arguments: argparse.Namespace, backend: Backend, report: dict[str, Any]) -> None:
    """check: a row for each model and batch."""
    lines = []
    for workload in workloads(arguments, backend):
        row: Row = {"task": "check", "contestant": "gpucnn", "steps": CHECKED_STEPS,
                    **{k: workload[k] for k in ("model", "batch", "precision")}}
        try:
            captured, again, eager = (digests_of(name, workload, report)
                                      for name in ("gpucnn", "gpucnn", "gpucnn-eager"))
            row |= compare(captured, again, eager)
        except Failed as e:
            row["error"] = str(e)
        report["results"].append(row)
        lines.append([title(workload), *verdict(row)])
    print_table(["workload", "captured = eager", "two runs"], lines)


def digests_of(name: str, workload: dict[str, Any], report: dict[str, Any]) -> dict[str, str]:
    """Of all that a few steps in a process of its own have computed.

    Raises Failed, also where a graph was to be made and could not.
    """
    child = Child(name, workload, report["environment"])
    try:
        report["versions"] |= child.receive()["versions"]
        reply = child.ask("digests", steps=CHECKED_STEPS)
        if reply["not_captured"]:
            raise Failed(f"not captured: {reply['not_captured']}")
        return reply["digests"]
    finally:
        child.close()


def compare(captured: dict[str, str], again: dict[str, str], eager: dict[str, str]) -> Row:
    """Whether they are equal, and the names of what is not."""
    def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
        return sorted(name for name in one.keys() | other.keys()
                      if one.get(name) != other.get(name))

    eagerly, twice = differing(captured, eager), differing(captured, again)
    return {"arrays": len(captured), "captured_equals_eager": not eagerly, "runs_equal": not twice,
            "differs_from_eager": eagerly, "differs_between_runs": twice,
            "passed": not (eagerly or twice)}


def verdict(row: Row) -> list[str]:
    if "error" in row:
        return [row["error"]]
    return ["yes" if not names else f"NO: {len(names)} of {row['arrays']}, {names[0]} first"
            for names in (row["differs_from_eager"], row["differs_between_runs"])]


def run_ops(arguments: argparse.Namespace, backend: Backend, report: dict[str, Any]) -> None:
    """op: a row for each pass of each kind and shape of layer in the models."""
    for workload in workloads(arguments, backend):
        workload["ops"] = distinct_ops(workload["net"])
        with Contest(["gpucnn", *arguments.against], workload, report) as contest:
            rows = []
            for op in workload["ops"]:
                rows += contest.measure(op["task"], arguments.windows, arguments.seconds)
            memory = {name: contest.ask(name, "memory") for name in list(contest.running)}
        show(title(workload), rows, gpu=backend.name == "cupy")
        report["results"] += rows
        report.setdefault("memory", []).append(
            {"model": workload["model"], "batch": workload["batch"], **memory})


def run_load(arguments: argparse.Namespace, backend: Backend, report: dict[str, Any]) -> None:
    """load: imports, and the time from the start of a process to the end of its first step."""
    names = ["gpucnn", *arguments.against]
    modules = dict.fromkeys(["gpucnn", "numpy", *(PEERS[name] for name in arguments.against)])
    rows = alternate({module: partial(import_seconds, module, report["environment"])
                      for module in modules}, arguments.windows)
    show("import", rows)
    report["results"] += [{"task": "import", **row} for row in rows]
    for workload in workloads(arguments, backend):
        for task, rows in first_steps(names, workload, report, arguments.windows):
            show(f"{task} of {title(workload)}, from the start of the process", rows)
            report["results"] += [{"task": task, **{k: workload[k] for k in (
                "model", "batch", "precision")}, **row} for row in rows]


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "step": (run_nets, "One step of training: forward, loss, backward, Adam."),
    "infer": (run_nets, "The forward pass in inference."),
    "op": (run_ops, "Each op at the shapes that the models give it."),
    "load": (run_load, "Seconds of the imports, and from process start to the end of a step; on a "
                       "GPU with no kernel compiled before, and with all in the caches."),
    "check": (run_check, "Whether captured steps, eager ones and a second run give the same bits."),
}


def run_profile(arguments: argparse.Namespace, workload: dict[str, Any],
                report: dict[str, Any]) -> dict[str, Any]:
    """The time of each layer in a step of gpucnn, and its share of the peak of sgemm."""
    with Contest(["gpucnn"], {**workload, "what": "profile"}, report) as contest:
        (gemm,) = contest.measure("sgemm", arguments.windows, arguments.seconds)
        warm = contest.ask("gpucnn", "warm_up", task="step", seconds=arguments.seconds)
        profile = warm and contest.ask("gpucnn", "profile",
                                       steps=warm["steps"] * arguments.windows)
    if not profile:
        raise GpucnnError(f"no profile: {contest.reasons['gpucnn']}")
    peak = 2 * gemm_size("cpu")**3 / gemm["minimum"]
    whole = profile["step"]
    rest = whole - profile["loss"] - profile["optimiser"] - sum(
        row["forward"] + row["backward"] for row in profile["rows"])
    profile |= {"model": workload["model"], "batch": workload["batch"], "everything_else": rest,
                "peak_flops_per_second": peak}
    lines = []
    for row in profile["rows"]:
        rates = [row[f"{name}_flops"] / max(row[name], 1e-9) for name in ("forward", "backward")]
        row["forward_flops_per_second"], row["backward_flops_per_second"] = rates
        seconds = row["forward"] + row["backward"]
        figures = [f"{r / 1e9:.1f}" for r in rates] + [f"{r / peak:.0%}" for r in rates]
        lines.append([f"{row['layer']} {row['class']}", by(row["output_shape"]),
                      ms(row["forward"]), ms(row["backward"]), f"{seconds / whole:.1%}",
                      *(figures if row["forward_flops"] else ["-"] * 4)])
    for name, seconds in (("loss", profile["loss"]), ("optimiser", profile["optimiser"]),
                          ("everything else", rest), ("step", whole)):
        lines.append([name, "", ms(seconds), "", f"{seconds / whole:.1%}", *["-"] * 4])
    print(f"\n{workload['model']}, batch {workload['batch']}: medians of {profile['steps']} steps; "
          f"sgemm's peak {peak / 1e9:.0f} GFLOP/s")
    print_table(["layer", "output", "forward ms", "backward ms", "of step", "fw GFLOP/s",
                 "bw GFLOP/s", "fw of peak", "bw of peak"], lines)
    return profile


def run_memory(workload: dict[str, Any], report: dict[str, Any]) -> dict[str, Any]:
    """The bytes alive in each layer's passes in a step of gpucnn, as measured and as predicted."""
    with Contest(["gpucnn"], {**workload, "what": "memory"}, report) as contest:
        memory = contest.ask("gpucnn", "profile", steps=1)
    if not memory:
        raise GpucnnError(f"no memory: {contest.reasons['gpucnn']}")
    memory |= {"model": workload["model"], "batch": workload["batch"]}
    names = "keeps", "forward", "predicted_forward", "backward", "predicted_backward"
    lines = [[f"{row['layer']} {row['class']}", by(row["output_shape"]),
              *(mb(row[name]) for name in names)] for row in memory["rows"]]
    lines += [[name, "", mb(memory[name]), *["-"] * 4] for name in (
        "parameters", "gradients", "state", "activations", "workspace")]
    print(f"\n{workload['model']}, batch {workload['batch']}: MB that are alive at most, and as "
          f"predicted; the peak {memory['peak'] / 1e6:.2f}, "
          f"predicted {memory['predicted_peak'] / 1e6:.2f} in {memory['where']}")
    print_table(["layer", "output", "keeps", "forward", "predicted", "backward", "predicted"],
                lines)
    return memory


def import_seconds(module: str, env: dict[str, str]) -> float:
    """Of `import module` in a fresh interpreter. Raises Failed."""
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **env},
                            capture_output=True, text=True, check=False)
    if result.returncode:
        last = result.stderr.strip().splitlines()[-1:]
        raise Failed(one_line("".join(last)).replace("ModuleNotFoundError", "not installed"))
    return float(result.stdout.splitlines()[-1])


def first_steps(names: list[str], workload: dict[str, Any], report: dict[str, Any], windows: int
                ) -> Iterator[tuple[str, list[Row]]]:
    """(task, rows); on a GPU one in which each process finds its caches empty, then full."""
    if workload["device"] == "cpu":
        yield "first step", alternate({name: partial(first_step, name, workload, report)
                                       for name in names}, windows)
        return
    with tempfile.TemporaryDirectory() as root:
        folders: dict[str, str] = {}

        def cold(name: str) -> float:
            folders[name] = tempfile.mkdtemp(dir=root)
            return warm(name)

        def warm(name: str) -> float:
            return first_step(name, workload, report, caches_in(folders[name]))

        for task, measure in (("first step, cold caches", cold), ("first step, warm caches", warm)):
            yield task, alternate({name: partial(measure, name) for name in names}, windows)


def caches_in(folder: str) -> dict[str, str]:
    """The settings by which all libraries keep what they compile in a folder."""
    return {**{name: os.path.join(folder, name.lower()) for name in CACHES}, **CACHE_ALL}


def first_step(name: str, workload: dict[str, Any], report: dict[str, Any],
               settings: dict[str, str] | None = None) -> float:
    """Seconds from the start of a process to the end of its first step. Raises Failed."""
    started = time.perf_counter()
    child = Child(name, workload, {**report["environment"], **(settings or {})})
    try:
        report["versions"] |= child.receive()["versions"]
        child.ask("window", task="step", steps=1)
        return time.perf_counter() - started
    finally:
        child.close()


def workloads(arguments: argparse.Namespace, backend: Backend) -> Iterator[dict[str, Any]]:
    """One for each model and batch that the arguments name."""
    what, where = arguments.command, device(backend)
    for name in arguments.model:
        net = NETS[name]
        model, usual = MODELS[name](net.classes), net.batch(where)
        model.declare_at(net.image, "")
        for batch in arguments.batch or ([1, usual] if what == "infer" else [usual]):
            yield {"what": what, "model": name, "net": describe(model), "batch": batch,
                   "device": where, "precision": arguments.precision,
                   "threads": arguments.threads}


def device(backend: Backend) -> str:
    return "cuda" if backend.name == "cupy" else "cpu"


def title(workload: dict[str, Any]) -> str:
    return f"{workload['model']}, batch {workload['batch']}, {workload['precision']}"


def environment(arguments: argparse.Namespace, backend: Backend) -> dict[str, str]:
    """The settings that give every contestant the same threads, and gpucnn its backend."""
    names = ("GPUCNN_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS",
             "PJRT_NPROC")  # the last is XLA's
    return {**dict.fromkeys(names, str(arguments.threads)), "GPUCNN_BACKEND": backend.name,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def machine(backend: Backend) -> dict[str, Any]:
    """The processor, the GPU, and how busy the machine was, for the record."""
    return {"cpu": cpu_name(),
            "cores": os.cpu_count(), "allowed_cores": allowed_cores(),
            "gpu": None if backend.name == "numpy" else device_name(backend),
            "system": platform.system(), "load_average": os.getloadavg(),
            "commit": git_commit()}


def allowed_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_path(command: str, report: dict[str, Any]) -> Path:
    name = report["machine"]["gpu"] or report["machine"]["cpu"]
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    precision = report["precision"].replace("_", "-")
    middle = label if precision == "float32" else f"{label}-{precision}"
    return ROOT / "benchmarks" / f"{command}-{middle}-{report['date']}.json"


def show(title: str, rows: list[Row], memory: bool = False, gpu: bool = False) -> None:
    """Print the rows; a contestant that failed is a line with the reason.

    memory, gpu: whether they say what memory was taken, and the time on the host's clock.
    """
    several = len({row.get("task") for row in rows}) > 1
    lines = []
    for row in rows:
        first = [row["task"]] if several else []
        if "error" in row:
            lines.append([*first, row["contestant"], f"  {row['error']}"])
            continue
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else "-"
        line = [*first, row["contestant"], ms(row["median"]), ms(row["minimum"]),
                ms(row["maximum"]), *([ms(row["wall"])] if gpu else []), ratio]
        if memory:
            line += [f"{row['images_per_second']:.0f}", *(
                f"{row[k] / 1e6:.0f}" if row.get(k) is not None else "-" for k in MEMORY)]
        lines.append(line)
    print(f"\n{title}")
    print_table([*(["op"] if several else []), "contestant", "median ms", "minimum", "maximum",
                 *(["wall ms"] if gpu else []), "ratio",
                 *(["images/s", "peak MB", "growth MB", "GPU MB"] if memory else [])], lines)


LEFT = ("op", "contestant", "layer", "output", "workload", "captured = eager", "two runs")


def print_table(header: list[str], lines: list[list[str]]) -> None:
    """Text to the left, numbers to the right; a line that is too short ends in a message."""
    whole = [line for line in (header, *lines) if len(line) == len(header)]
    widths = [max(len(line[i]) for line in whole) for i in range(len(header))]
    for line in (header, *lines):
        cells = [c.ljust(w) if h in LEFT else c.rjust(w)
                 for h, c, w in zip(header, line, widths)]
        print("  ".join(cells).rstrip(), flush=True)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f}"


def model_name(text: str) -> str:
    """An argparse type: "lenet" is lenet5."""
    return "lenet5" if text == "lenet" else text


def peers(text: str) -> list[str]:
    """An argparse type: names of PEERS, separated by commas, or best alone."""
    if text == "best":
        return [text]
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in PEERS:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(PEERS)}")
    return names


if __name__ == "__main__":
    cli.run(main, parser())
