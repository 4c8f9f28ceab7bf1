"""Prove gpucnn on this machine's GPU: the tests, the speed of each kernel, an epoch of training.

Prints a table and writes the figures as JSON under benchmarks/. Takes less than ten minutes.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for python scripts/gpu_check.py

import numpy as np

import gpucnn
from gpucnn import cli, losses, models, optim, training
from gpucnn.backend import Backend, cupy_obstacle, make_backend
from gpucnn.data import Augmentation, Dataset, Loader, fashion_mnist
from gpucnn.files import write_atomically
from gpucnn.geometry import Window, make_window

ROOT = Path(__file__).resolve().parents[1]
POOLED = {"28x28x32": (28, 28, 32), "14x14x64": (14, 14, 64)}  # the article's feature maps
TEST_SECONDS, SANITIZER_SECONDS = 330, 75  # and what is left of ten minutes for the rest
SANITIZED_STEP = """
import numpy as np
from gpucnn import losses, models, optim, training, use_backend
with use_backend("cupy"):
    model = models.article()
    model.build((12, 12, 1))
    x = np.random.default_rng(0).random((4, 12, 12, 1), np.float32)
    training.train_step(model, losses.SoftmaxCrossEntropy(), optim.Adam(model), x, np.arange(4))
"""


class Measurement(NamedTuple):
    """A kernel, or the copy that it is compared with. Seconds are of one launch."""

    name: str
    bytes_moved: int
    seconds: float
    spread: float           # (maximum - minimum) / median of the windows
    correct: bool

    @property
    def bandwidth(self) -> float:
        """Bytes per second."""
        return self.bytes_moved / self.seconds


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__)
    p.add_argument("--out", type=Path, metavar="JSON",
                   help="(default: benchmarks/<GPU>-<date>.json)")
    p.add_argument("--batch-size", type=cli.positive_int, default=256, metavar="N",
                   help="images in the tensors of the kernels (default: %(default)s)")
    p.add_argument("--windows", type=cli.positive_int, default=9, metavar="N",
                   help="how often each kernel is timed (default: %(default)s)")
    p.add_argument("--images", type=cli.positive_int, metavar="N",
                   help="train and test on the first N images of the subset only")
    p.add_argument("--only", action="append", choices=SECTIONS, metavar="SECTION",
                   help=f"run this section, may be repeated: {', '.join(SECTIONS)}")
    return p


def main(arguments: argparse.Namespace) -> int:
    obstacle = cupy_obstacle()
    if obstacle:
        raise cli.UsageError(f"gpu_check needs a GPU, but {obstacle}")
    sections = arguments.only or list(SECTIONS)
    if "tests" in sections:
        require_pytest()
    backend = make_backend("cupy")
    report: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine(backend)}
    print(json.dumps(report["machine"], indent=1))
    for name in sections:
        started = time.perf_counter()
        try:
            result = SECTIONS[name](backend, arguments)
        except Exception as e:  # whatever it is, the other sections are worth having
            result = {"passed": False, "summary": f"{type(e).__name__}: {e}"}
        report[name] = result
        verdict = "passed" if result["passed"] else "FAILED"
        seconds = time.perf_counter() - started
        print(f"\n== {name}: {verdict} in {seconds:.0f} s\n{result['summary']}", flush=True)
    out = arguments.out or ROOT / "benchmarks" / (
        re.sub(r"[^a-z0-9]+", "-", report["machine"]["gpu"].lower()).strip("-")
        + f"-{date.today()}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(report, indent=1).encode())
    print(f"\n{out}")
    return 0 if all(report[name]["passed"] for name in sections) else 1


def require_pytest() -> None:
    """Raise UsageError with the remedy where pytest is missing."""
    try:
        import pytest  # noqa: F401
    except ImportError as e:
        raise cli.UsageError("the tests need pytest; pip install -e '.[test]', or choose other "
                             "sections with --only") from e


def machine(backend: Backend) -> dict[str, Any]:
    """The device and the versions, for the record."""
    cuda: Any = backend.xp.cuda
    properties = cuda.runtime.getDeviceProperties(cuda.Device().id)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                            capture_output=True, text=True, check=False).stdout.strip()
    return {"gpu": cli.device_name(backend),
            "compute_capability": str(cuda.Device().compute_capability),
            "multiprocessors": properties["multiProcessorCount"],
            "memory_bytes": properties["totalGlobalMem"], "l2_bytes": properties["l2CacheSize"],
            "driver": cuda.runtime.driverGetVersion(), "cuda": cuda.runtime.runtimeGetVersion(),
            "cupy": backend.xp.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "gpucnn": gpucnn.__version__,
            "commit": commit or None, "date": str(date.today())}


def run_tests(backend: Backend, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole test suite, whose "cupy" is the real one here."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        passed, output = run_child(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", "-p", "no:cacheprovider"],
            TEST_SECONDS)
        if not junit.exists():
            return {"passed": False, "summary": f"pytest left no results\n{output[-4000:]}"}
        suite = next(ElementTree.parse(junit).getroot().iter("testsuite")).attrib
    counts = {k: int(suite[k]) for k in ("tests", "failures", "errors", "skipped")}
    tail = "" if passed else "\n" + output[-4000:]
    return {"passed": passed, **counts,
            "summary": ", ".join(f"{v} {k}" for k, v in counts.items()) + tail}


def run_child(command: list[str], seconds: float) -> tuple[bool, str]:
    """Whether the command succeeds within the time, and what it printed until then."""
    try:
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, timeout=seconds,
                                stderr=subprocess.STDOUT, check=False)
    except subprocess.TimeoutExpired as e:
        return False, f"{(e.output or b'').decode(errors='replace')}\nended after {seconds} s"
    return result.returncode == 0, result.stdout.decode(errors="replace")


def run_sanitizer(backend: Backend, arguments: argparse.Namespace) -> dict[str, Any]:
    """NVIDIA's memory and race checkers over a small training step, where they are installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=os.path.join(os.environ.get("CUDA_PATH", "/usr/local/cuda"),
                                               "bin"))
    if tool is None:
        return {"passed": True, "found": False, "summary": "compute-sanitizer is not installed"}
    outputs: dict[str, Any] = {}
    for check in ("memcheck", "racecheck"):
        passed, output = run_child([tool, "--tool", check, "--error-exitcode", "1", sys.executable,
                                    "-c", SANITIZED_STEP], SANITIZER_SECONDS)
        outputs[check] = {"passed": passed, "output": output[-2000:].strip()}
    return {"passed": all(o["passed"] for o in outputs.values()), "found": True, **outputs,
            "summary": "\n".join(f"{k}: {o['output'].splitlines()[-1]}"
                                 for k, o in outputs.items() if o["output"])}


def run_kernels(backend: Backend, arguments: argparse.Namespace) -> dict[str, Any]:
    """Each kernel's share of the bandwidth of a device copy, measured in the same run."""
    copy = measure_copy(backend, arguments.batch_size, arguments.windows)
    measured = [m for name, shape in POOLED.items()
                for m in measure_shape(backend, name, (arguments.batch_size, *shape),
                                       arguments.windows)]
    measured += [measure_loss(backend, arguments.batch_size, arguments.windows),
                 measure_adam(backend, arguments.batch_size, arguments.windows)]
    rows = [{"kernel": m.name, "bytes": m.bytes_moved, "microseconds": 1e6 * m.seconds,
             "spread": m.spread, "gigabytes_per_second": m.bandwidth / 1e9,
             "share_of_copy": m.bandwidth / copy.bandwidth, "correct": m.correct}
            for m in [copy, *measured]]
    return {"passed": all(m.correct for m in measured), "rows": rows, "summary": table(rows)}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'kernel':<28}{'us':>10}{'spread':>8}{'GB/s':>9}{'of copy':>9}  equals NumPy"]
    for r in rows:
        lines.append(f"{r['kernel']:<28}{r['microseconds']:>10.1f}{r['spread']:>8.1%}"
                     f"{r['gigabytes_per_second']:>9.0f}{r['share_of_copy']:>9.0%}  "
                     f"{'yes' if r['correct'] else 'NO'}")
    return "\n".join(lines)


def measure_copy(backend: Backend, batch: int, windows: int) -> Measurement:
    xp = backend.xp
    size = batch * 28 * 28 * 32
    x = np.random.default_rng(0).standard_normal(size, np.float32)
    sources = [backend.asarray(x) for _ in range(copies_past_l2(backend, 8 * size))]
    target = xp.empty(size, np.float32)

    def launch(k: int) -> None:
        target[...] = sources[k]

    seconds, spread = time_launches(backend, launch, len(sources), 10 * x.nbytes,
                                    windows)
    return Measurement("device copy", 8 * size, seconds, spread, True)


def measure_shape(backend: Backend, name: str, shape: tuple[int, ...], windows: int
                  ) -> list[Measurement]:
    """All kernels on a tensor of the shape: compared with NumPy on a few images, then timed.

    bytes_moved is the least that the operation must read and write: each element once.
    """
    here = make_backend("numpy")
    n, h, w, c = shape
    conv = make_window("gpu_check", 3, 1, "same", 1, (h, w))
    pool = make_window("gpu_check", 2, 2, 0, 1, (h, w))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    cols = np.random.default_rng(1).standard_normal((n * h * w, 9 * c)).astype(np.float32)
    dy = np.random.default_rng(2).standard_normal((n, h // 2, w // 2, c)).astype(np.float32)
    _, mask = here.max_pool(x, pool)
    augmentation = Augmentation(crop=2, flip=True)
    cursor = {b.name: b.asarray(np.array([0, 0])) for b in (here, backend)}
    table = {b.name: b.asarray(augmentation.table(c, np.float32)) for b in (here, backend)}

    def case(kernel: str, run: Callable[..., Any], *inputs: np.ndarray) -> Measurement:
        few = tuple(a[:len(a) // n * min(n, 4)] for a in inputs)
        expected = first_of(run(here, *few))
        result = first_of(run(backend, *map(backend.asarray, few)))
        correct = np.allclose(backend.to_numpy(result), expected, rtol=1e-5, atol=1e-5)
        outputs = run(backend, *map(backend.asarray, inputs))
        written = sum(a.nbytes for a in (outputs if isinstance(outputs, tuple) else (outputs,)))
        moved = written + sum(a.nbytes for a in inputs)
        rotated = [tuple(map(backend.asarray, inputs))
                   for _ in range(copies_past_l2(backend, moved))]
        seconds, spread = time_launches(backend, lambda k: run(backend, *rotated[k]), len(rotated),
                                        10 * x.nbytes, windows)
        return Measurement(f"{kernel} {name}", moved, seconds, spread, correct)

    def like(window: Window) -> Callable[[int], tuple[int, ...]]:
        outputs = int(np.prod(window.out_size(h, w)))
        return lambda rows: (rows // outputs if window is conv else rows, h, w, c)

    # mean, var, gamma, beta; and what is written of as many numbers
    vectors, written = ({b.name: list(b.xp.ones((k, c), np.float32)) for b in (here, backend)}
                        for k in (4, 2))
    return [
        case("im2col", lambda b, a: b.im2col(a, conv), x),
        case("col2im", lambda b, a: b.col2im(a, like(conv)(len(a)), conv), cols),
        case("max_pool", lambda b, a: b.max_pool(a, pool), x),
        case("max_pool_backward",
             lambda b, g, m: b.max_pool_backward(g, m, like(pool)(len(g)), pool), dy, mask),
        case("avg_pool", lambda b, a: b.avg_pool(a, pool), x),
        case("avg_pool_backward",
             lambda b, g: b.avg_pool_backward(g, like(pool)(len(g)), pool), dy),
        case("dropout", lambda b, a: b.dropout(a, 0.25, 1, 2), x),
        case("gather_batch", lambda b, images, order: b.gather_batch(
            images, order, order, cursor[b.name], len(images), table[b.name], augmentation, 1),
             (255 * np.abs(np.sin(x))).astype(np.uint8), np.arange(n)),
        case("batch_norm_statistics",
             lambda b, a: b.batch_norm_statistics(a, *written[b.name], 0.1), x),
        case("batch_norm",
             lambda b, a: b.batch_norm(a, *vectors[b.name], 1e-5, None, "relu"), x),
        case("batch_norm_backward",
             lambda b, g, a: b.batch_norm_backward(g, a, None, *vectors[b.name], 1e-5, None,
                                                   *written[b.name], False)[0], x[::-1], x),
    ]


def measure_loss(backend: Backend, batch: int, windows: int) -> Measurement:
    """Softmax cross-entropy over 1000 classes."""
    here, size = make_backend("numpy"), batch * 1000
    logits = np.random.default_rng(0).standard_normal((batch, 1000)).astype(np.float32)
    labels = np.arange(batch) % 1000
    there = backend.asarray(labels)
    rotated = [backend.asarray(logits) for _ in range(copies_past_l2(backend, 8 * size))]

    def launch(k: int) -> None:
        backend.softmax_cross_entropy(rotated[k], there, 0.0)

    results = zip(backend.softmax_cross_entropy(rotated[0], there, 0.0),
                  here.softmax_cross_entropy(logits, labels, 0.0))
    correct = all(np.allclose(backend.to_numpy(got), want, rtol=1e-5, atol=1e-7)
                  for got, want in results)
    seconds, spread = time_launches(backend, launch, len(rotated), 40 * size, windows)
    return Measurement("softmax_cross_entropy 1000", 8 * size, seconds, spread, correct)


def measure_adam(backend: Backend, batch: int, windows: int) -> Measurement:
    """A step of Adam over as many parameters as the copied tensor has elements."""
    size = batch * 28 * 28 * 32
    data, grad = np.random.default_rng(0).standard_normal((2, size), np.float32)

    def adam(on: Backend, n: int) -> optim.Adam:
        model: Any = SimpleNamespace(backend=on, built=True, decayed_size=0,
                                     flat_data=on.asarray(data[:n].copy()),
                                     flat_grad=on.asarray(grad[:n]))
        return optim.Adam(model)

    results = []
    for on in (backend, make_backend("numpy")):
        optimizer = adam(on, 1025)
        optimizer.step()
        results.append(on.to_numpy(optimizer.model.flat_data))
    step = adam(backend, size).step
    seconds, spread = time_launches(backend, lambda k: step(), 1, 40 * size, windows)
    return Measurement("Adam", 28 * size, seconds, spread,
                       np.allclose(results[0], results[1], rtol=1e-5, atol=1e-6))


def first_of(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


def copies_past_l2(backend: Backend, nbytes: int) -> int:
    """How many sets of buffers to go through in turn, so that none is still in the L2 cache."""
    cuda: Any = backend.xp.cuda
    cache = cuda.runtime.getDeviceProperties(cuda.Device().id)["l2CacheSize"]
    return max(2, min(16, 1 + 2 * cache // nbytes))


def time_launches(backend: Backend, launch: Callable[[int], None], n_buffers: int,
                  filler_bytes: int, windows: int, *, launches: int = 20, fillers: int = 40
                  ) -> tuple[float, float]:
    """(median seconds of a launch, spread of the windows) by the events of the device.

    A kernel of ten microseconds ends before the host has launched the next one. So each window
    begins with copies that keep the device busy until all launches to be timed stand in its queue.
    """
    cuda: Any = backend.xp.cuda
    source, target = (backend.xp.ones(filler_bytes, np.uint8) for _ in range(2))
    for k in range(n_buffers):
        launch(k)
    cuda.Device().synchronize()
    seconds = []
    for _ in range(windows):
        start, end = cuda.Event(), cuda.Event()
        for _ in range(fillers):
            target[...] = source
        start.record()
        for k in range(launches):
            launch(k % n_buffers)
        end.record()
        end.synchronize()
        seconds.append(cuda.get_elapsed_time(start, end) / 1e3 / launches)
    median = statistics.median(seconds)
    return median, (max(seconds) - min(seconds)) / median


def run_training(backend: Backend, arguments: argparse.Namespace) -> dict[str, Any]:
    """An epoch of the article's network on the packaged images, twice: the same bits?"""
    train_set, test_set = (Dataset(d.images[:arguments.images], d.labels[:arguments.images],
                                   d.class_names, d.name) for d in fashion_mnist.load(subset=True))
    n = len(train_set)
    runs = []
    for _ in range(2):
        with gpucnn.use_backend("cupy"):
            model = models.article()
            loader, test_loader = Loader(train_set, 64, seed=0), Loader(test_set, 500)
        model.build((28, 28, 1), seed=0)
        optimizer, loss = optim.Adam(model), losses.SoftmaxCrossEntropy()
        started = time.perf_counter()
        for x, t in loader.epoch():
            training.train_step(model, loss, optimizer, x, t)
        backend.xp.cuda.Device().synchronize()
        seconds = time.perf_counter() - started
        runs.append((backend.to_numpy(model.flat_data), seconds))
    test = training.evaluate(model, test_loader.epoch())
    equal = bool((runs[0][0] == runs[1][0]).all())
    seconds = runs[1][1]  # the first one compiles
    return {"passed": equal and bool(np.isfinite(test.loss)), "seconds": seconds,
            "first_seconds": runs[0][1], "images_per_second": n / seconds,
            "test_accuracy": test.accuracy, "bitwise_equal": equal,
            "summary": f"{n} images in {seconds:.2f} s, {n / seconds:.0f} images/s (first run "
                       f"{runs[0][1]:.2f} s), test accuracy {test.accuracy:.4f}, two runs "
                       f"{'equal to the bit' if equal else 'DIFFER'}"}


SECTIONS: dict[str, Callable[[Backend, argparse.Namespace], dict[str, Any]]] = {
    "tests": run_tests, "sanitizer": run_sanitizer, "kernels": run_kernels,
    "training": run_training}


if __name__ == "__main__":
    cli.run(main, parser())
