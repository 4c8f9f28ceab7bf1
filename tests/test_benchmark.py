"""scripts/benchmark.py compares equal things and says what a user must know. Nothing is timed."""
from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import json
import os
from collections.abc import Iterator

import numpy as np
import pytest

from gpucnn import models
from gpucnn.backend import use_backend
from gpucnn.layers import (
    BatchNorm,
    Conv2D,
    Dense,
    Dropout,
    Flatten,
    GlobalAvgPool2D,
    Layer,
    Sequential,
    SpaceToDepth,
    Whiten2D,
)
from gpucnn.models import MODELS
from scripts import benchmark
from scripts.contestants import Impossible, contest, gpucnn_contestant
from scripts.contestants.workloads import describe, distinct_ops
from tests.test_scripts import error_of, run

SMALL = ("--batch", "2", "--windows", "2", "--seconds", "0.002", "--threads", "1", "--json")
IMAGES = {"article": (28, 28, 1), "lenet5": (28, 28, 1), "airbench94": (32, 32, 3),
          "resnet18": (8, 8, 3), "resnet50": (32, 32, 3)}  # quick to train on
# resnet50's first convolution is one over squares of pixels, with 6,976 weights more (resnet.py).
MORE_PARAMETERS = {"resnet50": 4 * 4 * 16 * 64 - 7 * 7 * 3 * 64}


def workload_of(model: str, what: str = "step", **more) -> dict:
    """Without dropout: no two libraries draw the same numbers."""
    layer = MODELS[model](benchmark.NETS[model].classes)
    for dropout in layer.walk():
        if isinstance(dropout, Dropout):
            dropout.rate = 0.0
    layer.declare_at(IMAGES[model], "")
    return {"contestant": "gpucnn", "what": what, "model": model, "net": describe(layer),
            "batch": 8, "device": "cpu", "precision": "float32",
            "threads": 1, **more}


def make(name: str, workload: dict):
    module = importlib.import_module(f"scripts.contestants.{name.split('-')[0]}_contestant")
    return module.Contestant({**workload, "contestant": name})


def loss_of(contestant) -> float:
    """Of one more step."""
    value = contestant.tasks["step"]()
    ours = vars(contestant).get("training")
    return ours.results()[-1].loss if ours else float(value)


@functools.cache
def train_ours(name: str) -> tuple[Layer, list[float]]:
    """The model as it was before two steps of training, and their losses."""
    contestant = make("gpucnn", workload_of(name))
    for layer in contestant.model.walk():
        if isinstance(layer, Dropout):
            layer.rate = 0.0
    if name == "resnet50":  # as if it had a convolution of 7x7
        w = contestant.model.parameters()["conv1/w"].data
        w[...] = models.stem_weights(seven_by_seven(w))
    weights = contestant.model.flat_data.copy()
    losses = [loss_of(contestant) for _ in range(2)]
    contestant.model.flat_data[...] = weights
    return contestant.model, losses


def arrays_of(model: Layer) -> Iterator[tuple[Layer, str, np.ndarray]]:
    """(layer, name, array) of all that peers hold: gammas and filters that are not learned too."""
    stem = isinstance(model.layers[0], SpaceToDepth)
    for layer in model.walk():
        arrays = {name: p.data for name, p in layer.own_parameters.items()}
        if isinstance(layer, Whiten2D):
            arrays = {"w": layer.own_buffers["w"], **arrays}
        if isinstance(layer, BatchNorm):
            arrays = {"gamma": layer.gamma.data, **arrays}
        for name, array in arrays.items():
            if stem and isinstance(layer, Conv2D):
                array, stem = seven_by_seven(array), False
            yield layer, name, array


def seven_by_seven(w: np.ndarray) -> np.ndarray:
    """What models.stem_weights() makes w of."""
    filters = w.shape[3]
    w8 = w[:, :, :12].reshape(4, 4, 2, 2, 3, filters).transpose(0, 2, 1, 3, 4, 5)
    return w8.reshape(8, 8, 3, filters)[1:, 1:]


def give_torch(peer, model: Layer) -> None:
    """Copy the weights: OIHW filters, (units, inputs) matrices, and inputs of images by channel."""
    import torch
    mine = iter(peer.model.parameters())
    flattened = [layer.input_shape for layer in model.walk() if isinstance(layer, Flatten)]
    for _, _, w in arrays_of(model):
        if w.ndim == 4:
            w = w.transpose(3, 2, 0, 1)
        elif w.ndim == 2:
            if flattened:
                w = w.reshape(*flattened.pop(), -1).transpose(2, 0, 1, 3).reshape(w.shape)
            w = w.T
        with torch.no_grad():
            next(mine).copy_(torch.from_numpy(w.copy()))
    assert next(mine, None) is None


def give_jax(peer, model: Layer) -> None:
    import jax
    leaves, kept = [], []
    for layer, group in itertools.groupby(arrays_of(model), key=lambda entry: entry[0]):
        for _, name, array in sorted(group, key=lambda entry: entry[1]):
            if name in layer.own_parameters:
                leaves.append(jax.numpy.array(array))
            elif isinstance(layer, Whiten2D):
                kept.append(jax.numpy.array(array))
    p, stats, *others = peer.state
    assert [leaf.shape for leaf in jax.tree.leaves(p)] == [leaf.shape for leaf in leaves]
    if kept:
        (stats[0]["w"],) = kept
    peer.state = (jax.tree.unflatten(jax.tree.structure(p), leaves), stats, *others)


def parameters_of(name: str, peer) -> int:
    if name == "jax":
        import jax
        return sum(p.size for p in jax.tree.leaves(peer.state[0]))
    return sum(p.numel() for p in peer.model.parameters() if p.requires_grad)


PEERS = ["torch", "torch-channels-last", "jax"]  # that the CPU has, and that compile fast


@pytest.mark.parametrize(("name", "model"), [
    (name, model) for name in PEERS for model in MODELS
    if model != "resnet50" or name == "torch"])  # which takes JAX a minute to compile
def test_peers_train_the_same_net(name, model):
    """As many parameters; from the same weights the same loss, and again after a step of Adam."""
    pytest.importorskip(benchmark.PEERS[name])
    ours, (before, after) = train_ours(model)
    peer = make(name, workload_of(model))
    more = MORE_PARAMETERS.get(model, 0)
    assert parameters_of(name, peer) == sum(p.size for p in ours.parameters().values()) - more
    (give_jax if name == "jax" else give_torch)(peer, ours)
    assert abs(before - after) > 0.01
    np.testing.assert_allclose(loss_of(peer), before, rtol=1e-4 if more else 1e-5)
    if not more:  # which learn, too
        # Adam's first step has the size of the learning rate even where a gradient is rounding.
        np.testing.assert_allclose(loss_of(peer), after, rtol=1e-3)


def test_jax_begins_resnet50_as_the_paper_does():
    pytest.importorskip("jax")
    from scripts.contestants import jax_contestant
    model = Sequential([SpaceToDepth(2, 16), Conv2D(4, 4, padding=((2, 1), (2, 1)), bias=False),
                        GlobalAvgPool2D(), Dense(3)])
    model.build((8, 8, 3))
    w = model.parameters()["conv1/w"].data
    w[...] = models.stem_weights(seven_by_seven(w))
    peer = make("jax", {**workload_of("lenet5"), "net": describe(model)})
    give_jax(peer, model)
    (stem, *_), (p, stats, *_) = peer.net["children"], peer.state
    assert stem["arguments"]["kernel_size"] == [7, 7]
    y, _ = jax_contestant.apply(peer.net, p, stats, peer.x, None)
    np.testing.assert_allclose(y, model.forward(np.asarray(peer.x)), rtol=1e-4, atol=1e-5)


def new_kinds(ops, seen) -> Iterator[dict]:
    """The first of each layer with these arguments but for its size; it takes long to compile."""
    for op in ops:
        arguments = {k: v for k, v in op["layer"]["arguments"].items()
                     if k not in ("filters", "units")}
        kind = (op["layer"]["class"], op["pass"], json.dumps(arguments))
        if kind not in seen:
            seen.add(kind)
            yield op


@pytest.mark.parametrize("name", PEERS)
def test_peers_know_every_op_and_infer(name):
    pytest.importorskip(benchmark.PEERS[name])
    seen = set()
    for model in MODELS:
        workload = workload_of(model, "op", batch=2)
        workload["ops"] = list(new_kinds(distinct_ops(workload["net"]), seen))
        ours, peer = make("gpucnn", workload), make(name, workload)
        assert list(ours.tasks) == list(peer.tasks) == [op["task"] for op in workload["ops"]]
        for contestant in (ours, peer):
            assert all(contestant.measure(task, 1) > 0 for task in contestant.tasks.values())
    ours, peer = (make(who, workload_of("article", "infer")) for who in ("gpucnn", name))
    assert ours.tasks["infer"]().shape == tuple(peer.tasks["infer"]().shape) == (8, 10)


def test_each_op_stands_once_for_all_layers_of_its_shape():
    tasks = [op["task"] for op in distinct_ops(workload_of("article")["net"])]
    assert len(tasks) == len(set(tasks)) == 2 * (4 + 2 + 2 + 3) + 1  # and the loss
    assert tasks[0] == "Conv2D 3x3 stride 1x1 28x28x1 -> 28x28x32 relu, forward"
    assert tasks[1] == "Conv2D 3x3 stride 1x1 28x28x1 -> 28x28x32, backward"
    shapes = {task for task in (op["task"] for op in distinct_ops(workload_of("resnet18")["net"]))
              if task.startswith("Conv2D") and task.endswith("forward")}
    assert len(shapes) == 1 + 4 + 3 + 3  # the stem, one to each width, down to it, and shortcuts


def test_the_networks_and_their_contestants_are_all_there():
    assert benchmark.NETS.keys() == MODELS.keys()


def test_contestants_take_turns_and_one_that_fails_leaves_the_others():
    calls = []

    def measure(name, seconds):
        calls.append(name)
        if name == "b" and len(calls) > 3:
            raise contest.Failed("b is out")
        return seconds

    rows = contest.alternate({"gpucnn": lambda: measure("gpucnn", 2.0),
                              "b": lambda: measure("b", 1.0),
                              "c": lambda: measure("c", 3.0)}, 3)
    assert "".join(name[0] for name in calls) == "gbc" + "cb" + "g" + "gc"
    assert rows[1] == {"contestant": "b", "error": "b is out"}
    assert [row.get("ratio") for row in rows] == [1.0, None, 1.5]  # above 1: gpucnn is faster
    assert rows[2]["samples"] == [3.0] * 3


@pytest.fixture
def broken_peers(tmp_path):
    """The environment of a machine without torch, and with a jax that kills its process."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    (tmp_path / "jax.py").write_text("import os, sys\nprint('out of luck', file=sys.stderr, "
                                     "flush=True)\nos._exit(3)")
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{contest.ROOT}"}


def test_step(tmp_path, broken_peers):
    out = tmp_path / "new" / "step.json"
    result = run("scripts/benchmark", "step", "--model", "lenet", *SMALL, out, "--profile",
                 "--against", "torch,torch-channels-last,jax", as_module=False, **broken_peers)
    report = json.loads(out.read_text())
    assert report["command"].startswith("python scripts/benchmark.py step --model lenet --batch 2")
    assert {report["environment"][k] for k in ("GPUCNN_THREADS", "OMP_NUM_THREADS")} == {"1"}
    assert {"cpu", "cores", "allowed_cores", "gpu", "commit"} <= report["machine"].keys()
    assert {"python", "numpy", "gpucnn"} <= report["versions"].keys()
    ours, *peers = report["results"]
    assert (ours["model"], ours["batch"], ours["contestant"]) == ("lenet5", 2, "gpucnn")
    assert len(ours["samples"]) == 2
    assert ours["minimum"] <= ours["median"] <= ours["maximum"]
    assert ours["ratio"] == 1
    assert ours["images_per_second"] == pytest.approx(2 / ours["median"])
    assert ours["peak_bytes"] > ours["growth_bytes"] >= 0
    assert [row["error"] for row in peers] == [
        "not installed: No module named 'torch'", "not installed: No module named 'torch'",
        "ended with code 3: out of luck"]
    lines = result.stdout.splitlines()
    assert "2 windows, too few for a claim" in lines[0]
    assert "above 1: gpucnn is faster" in lines[0]
    assert sum("not installed: No module named 'torch'" in line for line in lines) == 2 + 2
    assert lines[-1] == str(out)

    (profile,) = report["profiles"]
    parts = [row["forward"] + row["backward"] for row in profile["rows"]]
    assert [row["class"] for row in profile["rows"]] == [
        "Conv2D", "AvgPool2D", "Conv2D", "AvgPool2D", "Flatten", "Dense", "Dense", "Dense"]
    assert profile["rows"][0]["forward_flops"] == 2 * 2 * 28 * 28 * 6 * 25
    assert sum(parts) + profile["loss"] + profile["optimiser"] + profile["everything_else"] == (
        pytest.approx(profile["step"]))
    assert profile["peak_flops_per_second"] > 0


def test_step_with_memory(tmp_path):
    out = tmp_path / "step.json"
    result = run("scripts.benchmark", "step", "--model", "lenet5", *SMALL, out, "--memory",
                 "--batch", "64")
    (memory,) = json.loads(out.read_text())["layer_memory"]
    assert (memory["model"], memory["batch"]) == ("lenet5", 64)
    assert memory["peak"] == pytest.approx(memory["predicted_peak"], rel=0.1)
    assert memory["peak"] == max(row[name] for row in memory["rows"]
                                 for name in ("forward", "backward"))
    assert [row["class"] for row in memory["rows"]] == [
        "Conv2D", "AvgPool2D", "Conv2D", "AvgPool2D", "Flatten", "Dense", "Dense", "Dense"]
    first = memory["rows"][0]
    assert first["keeps"] == 64 * 28 * 28 * 6 * 4
    assert first["forward"] > memory["parameters"] + memory["gradients"] + memory["state"]
    printed = result.stdout.split("\nlenet5, batch 64: MB that are alive at most")[1].splitlines()
    assert printed[0].endswith(f"predicted {memory['predicted_peak'] / 1e6:.2f} in "
                               f"{memory['where']}")
    assert printed[1].split() == ["layer", "output", "keeps", "forward", "predicted", "backward",
                                  "predicted"]
    assert printed[2].split()[:4] == ["conv1", "Conv2D", "28x28x6", "1.20"]


def test_a_layers_memory_on_a_gpu_is_that_of_the_pool(cupy_backend):
    """In the process of a contestant, all that the pool gives out is counted."""
    workload = workload_of("lenet5", "memory", batch=2, device="cuda")
    contestant = gpucnn_contestant.Contestant(workload)
    memory = gpucnn_contestant.profile(contestant, 1)
    fixed = memory["parameters"] + memory["gradients"] + memory["state"]
    assert memory["peak"] - fixed == pytest.approx(memory["predicted_peak"] - fixed, rel=0.1)
    assert "forward" not in vars(contestant.model.layers[0])  # nothing is left wrapped


@pytest.mark.parametrize("net", ["resnet18", "resnet50"])
def test_a_profile_of_sums_and_of_what_has_no_backward_pass(net):
    """Norms that add run forward_added(); nothing needs the gradient of squares of pixels."""
    contestant = gpucnn_contestant.Contestant(workload_of(net, "profile", batch=2))
    profile = gpucnn_contestant.profile(contestant, 1)
    assert all(row["forward"] > 0 for row in profile["rows"])
    silent = [row["class"] for row in profile["rows"] if row["backward"] == 0]
    assert silent == (["SpaceToDepth"] if net == "resnet50" else [])
    first, second, *_ = [row for row in profile["rows"] if row["class"] == "Conv2D"]
    assert first["backward_flops"] == first["forward_flops"]
    assert second["backward_flops"] == 2 * second["forward_flops"]
    assert sum(row[name] for row in profile["rows"] for name in ("forward", "backward")) < (
        profile["step"])


def test_a_profile_that_fails_leaves_what_was_measured(tmp_path):
    out = tmp_path / "step.json"
    (tmp_path / "sitecustomize.py").write_text(
        "import statistics\nmedian = statistics.median\n"
        "def fails(values):\n    import sys\n"
        "    if sys._getframe(1).f_code.co_filename.endswith('profiling.py'):\n"
        "        raise OSError('no clock')\n    return median(values)\n"
        "statistics.median = fails\n")
    result = run("scripts.benchmark", "step", "--model", "lenet", *SMALL, out, "--profile",
                 code=1, PYTHONPATH=f"{tmp_path}{os.pathsep}{contest.ROOT}")
    assert "no profile: OSError: no clock" in error_of(result)
    assert len(json.loads(out.read_text())["results"]) == 1


def test_infer_beside_a_peer(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "infer.json"
    run("scripts.benchmark", "infer", *SMALL, out, "--against", "torch", "--no-ceilings")
    report = json.loads(out.read_text())
    ours, peer = report["results"]
    assert (peer["model"], peer["task"], peer["contestant"]) == ("article", "infer", "torch")
    assert peer["ratio"] == pytest.approx(peer["median"] / ours["median"])
    assert peer["peak_bytes"] > 0
    assert "torch" in report["versions"]


def test_a_contestant_that_cannot_be_built_says_why():
    report = {"environment": {"GPUCNN_BACKEND": "numpy"}, "versions": {}}
    with contest.Contest(["gpucnn"], {**workload_of("lenet5"), "model": "vgg"}, report) as both:
        (row,) = both.measure("step", 1, 0.01)
    assert row["error"] == "KeyError: 'vgg'"


def test_op(tmp_path):
    out = tmp_path / "op.json"
    result = run("scripts.benchmark", "op", "--model", "lenet5", *SMALL, out)
    report = json.loads(out.read_text())
    assert [row["task"] for row in report["results"]] == [
        op["task"] for op in distinct_ops(workload_of("lenet5")["net"])]
    assert report["memory"][0]["gpucnn"]["peak_bytes"] > 0
    assert "\nSoftmaxCrossEntropy 10 -> 10, forward and backward " in result.stdout


def test_load(tmp_path, broken_peers):
    out = tmp_path / "load.json"
    run("scripts.benchmark", "load", "--model", "lenet5", *SMALL, out, "--windows", "1",
        "--against", "torch", **broken_peers)
    rows = {(row["task"], row["contestant"]): row
            for row in json.loads(out.read_text())["results"]}
    assert list(rows) == [("import", "gpucnn"), ("import", "numpy"), ("import", "torch"),
                          ("first step", "gpucnn"), ("first step", "torch")]
    assert min(row["median"] for row in rows.values() if "median" in row) > 0
    assert "No module named 'torch'" in rows["import", "torch"]["error"]


USAGE = {
    "no command": ((), "arguments are required: command"),
    "a model": (("step", "--model", "vgg"), "argument --model: invalid choice: 'vgg'"),
    "a peer": (("infer", "--against", "torch,keras"),
               "argument --against: 'keras' is not one of gpucnn-eager, torch, "
               "torch-channels-last, torch-graph, torch-compile, jax"),
    "a precision": (("step", "--precision", "float16"),
                    "argument --precision: invalid choice: 'float16'"),
    "a number": (("op", "--batch", "0"), "argument --batch: must be >= 1, got 0"),
    "a time": (("load", "--seconds", "nan"), "--seconds: must be > 0 and finite, got nan"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_wrong_usage_exits_2(arguments, message):
    assert message in run("scripts.benchmark", *arguments, code=2).stderr.splitlines()[-1]


def test_a_backend_that_cannot_work_exits_2():
    result = run("scripts.benchmark", "step", code=2, GPUCNN_BACKEND="cuda")
    assert error_of(result).startswith("gpucnn: error: GPUCNN_BACKEND='cuda' is not known")


def test_figures_go_to_a_path_that_names_no_host():
    report = {"machine": {"gpu": None, "cpu": "AMD EPYC(TM) 7"}, "date": "2026-11-25",
              "precision": "float32"}
    assert benchmark.default_path("op", report).relative_to(contest.ROOT).as_posix() == (
        "benchmarks/op-amd-epyc-tm-7-2026-11-25.json")
    report |= {"machine": {"gpu": "NVIDIA X1", "cpu": "AMD"}, "precision": "mixed_float16"}
    assert benchmark.default_path("step", report).name == (
        "step-nvidia-x1-mixed-float16-2026-11-25.json")


def test_the_gpu_is_timed_by_events(cupy_backend, monkeypatch):
    contestant = make("gpucnn", workload_of("lenet5", batch=1, device="cuda"))
    pools = [CountedPool(3), CountedPool(4)]
    monkeypatch.setattr(cupy_backend.xp.cuda, "MemoryPool", CountedPool)
    assert contestant.measure(contestant.tasks["step"], 1) > 0
    assert contestant.device_bytes() == 7
    del pools[0]  # what was taken once counts
    assert contestant.device_bytes() == 7


class CountedPool:
    def __init__(self, total):
        self.total = total

    def total_bytes(self):
        return self.total


# ------------------------------------------------------------------------------ on a GPU, or as if


def test_a_step_on_a_gpu(tmp_path, gpu):
    """Captured, beside launch by launch, in mixed precision; what needs torch's CUDA is a line."""
    out = tmp_path / "step.json"
    result = run("scripts.benchmark", "step", "--model", "lenet5", *SMALL, out, "--precision",
                 "mixed_float16", "--against", "gpucnn-eager,torch-graph", **gpu)
    report = json.loads(out.read_text())
    ours, eager, graph = report["results"]
    assert (ours["precision"], eager["precision"]) == ("mixed_float16",) * 2
    assert ours["notes"] == eager["notes"] == {"memory": "CuPy's memory pools"}
    assert ours["device_bytes"] >= 1 << 20
    assert ours["wall"] > 0
    assert "error" in graph
    assert [(row["task"], row["contestant"]) for row in report["ceilings"]] == [
        ("product", "gpucnn"), ("product", "torch"), ("copy", "gpucnn"), ("copy", "torch")]
    for row in report["ceilings"][::2]:
        work = 2 * 32**3 if row["task"] == "product" else 2 << 12
        assert row["per_second"] == pytest.approx(work / row["median"])
    assert " wall ms " in result.stdout


def test_the_first_step_on_a_gpu_with_empty_and_with_full_caches(tmp_path, gpu):
    out = tmp_path / "load.json"
    run("scripts.benchmark", "load", "--model", "lenet5", *SMALL, out, "--windows", "1", **gpu)
    rows = json.loads(out.read_text())["results"]
    assert [row["task"] for row in rows] == [
        "import", "import", "first step, cold caches", "first step, warm caches"]
    assert all(row["median"] > 0 for row in rows)


def test_cold_caches_are_new_ones_and_warm_ones_are_theirs(monkeypatch):
    seen = []

    def first_step(name, workload, report, settings):
        seen.append((name, settings["CUPY_CACHE_DIR"]))
        assert {os.path.dirname(settings[key]) for key in benchmark.CACHES} == {
            os.path.dirname(settings["CUPY_CACHE_DIR"])}
        return 1.0

    monkeypatch.setattr(benchmark, "first_step", first_step)
    list(benchmark.first_steps(["gpucnn", "jax"], {"device": "cuda"}, {}, 2))
    cold, warm = seen[:4], seen[4:]
    assert len(set(cold)) == 4
    assert set(warm) == set(cold[2:])  # what the second window has filled


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_captured_eager_and_another_run_give_the_same_bits(tmp_path, gpu, precision):
    out = tmp_path / "check.json"
    result = run("scripts.benchmark", "check", "--model", "lenet5", "--batch", "2", "--precision",
                 precision, "--json", out, **gpu)
    (row,) = json.loads(out.read_text())["results"]
    assert row["captured_equals_eager"] is row["runs_equal"] is row["passed"] is True
    assert row["arrays"] > 15
    assert result.stdout.splitlines()[-2].split()[-2:] == ["yes", "yes"]


def test_a_planted_difference_fails_the_check(tmp_path, gpu):
    """A learning rate that is another in every process."""
    with open(tmp_path / "sitecustomize.py", "a") as file:
        file.write("import os\ncontestants.LEARNING_RATE *= 1 + os.getpid() * 1e-3\n")
    out = tmp_path / "check.json"
    result = run("scripts.benchmark", "check", "--model", "lenet5", "--batch", "2", "--json", out,
                 code=1, **gpu)
    (row,) = json.loads(out.read_text())["results"]
    assert row["captured_equals_eager"] is row["runs_equal"] is row["passed"] is False
    assert "conv1/w" in row["differs_from_eager"]
    assert "NO: " in result.stdout


def test_a_step_that_is_not_captured_fails_the_check(tmp_path, gpu):
    with open(tmp_path / "sitecustomize.py", "a") as file:
        file.write("from gpucnn import optim\nstep = optim.Optimizer.step\noptim.Optimizer.step = "
                   "lambda self, loss=None: (step(self, loss), float(self.state['m'][0]))\n")
    out = tmp_path / "check.json"
    run("scripts.benchmark", "check", "--model", "lenet5", "--batch", "2", "--json", out, code=1,
        **gpu)
    (row,) = json.loads(out.read_text())["results"]
    assert row["error"].startswith("not captured: ")
    result = run("scripts.benchmark", "step", "--model", "lenet5", *SMALL, out, "--no-ceilings",
                 **gpu)
    assert "\ngpucnn is no graph: " in result.stdout


def test_the_check_names_what_differs_from_which():
    one, other = {"w": "1", "b": "2"}, {"w": "1", "b": "3"}
    assert benchmark.compare(one, one, one)["passed"]
    row = benchmark.compare(one, one, other)
    assert (row["captured_equals_eager"], row["runs_equal"], row["passed"]) == (False, True, False)
    assert row["differs_from_eager"] == ["b"]
    row = benchmark.compare(one, {"w": "1"}, one)
    assert (row["captured_equals_eager"], row["runs_equal"]) == (True, False)
    assert benchmark.verdict(row) == ["yes", "NO: 1 of 2, b first"]


def test_two_runs_are_equal_on_the_cpu(tmp_path):
    run("scripts.benchmark", "check", "--model", "lenet5", "--batch", "2")


# ------------------------------------------------------------------------------------ precisions


def test_mixed_precision_needs_a_gpu():
    result = run("scripts.benchmark", "infer", "--precision", "mixed_bfloat16", code=2)
    assert error_of(result) == ("gpucnn: error: --precision: precision 'mixed_bfloat16' needs the "
                                "cupy backend and a GPU; on numpy use 'float32'")


@pytest.mark.parametrize("precision", ["tf32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("name", PEERS)
def test_peers_train_and_infer_in_every_precision(name, precision):
    """The peers know mixed precision on the CPU too. A loss scale that is too large is halved."""
    pytest.importorskip(benchmark.PEERS[name])
    model = "resnet18" if precision == "mixed_bfloat16" else "lenet5"
    peer = make(name, workload_of(model, batch=4, precision=precision))
    losses = [loss_of(peer) for _ in range(20)]
    assert losses[-1] < losses[0] / 2
    op = workload_of(model, "op", batch=2, precision=precision)
    op["ops"] = distinct_ops(op["net"])
    peer = make(name, op)
    for task in peer.tasks.values():
        task()
    y = make(name, workload_of(model, "infer", precision=precision)).tasks["infer"]()
    kept = {"tf32": "float32"}.get(precision, precision.removeprefix("mixed_"))
    assert str(y.dtype).removeprefix("torch.") == kept


@pytest.mark.parametrize("precision", ["float32", "tf32", "mixed_float16", "mixed_bfloat16"])
def test_ops_of_every_precision_run_on_a_gpu(cupy_backend, precision, monkeypatch):
    monkeypatch.setenv("GPUSIM_CHECKS", "off")
    with use_backend("cupy"):
        workload = workload_of("lenet5", "op", batch=2, precision=precision, device="cuda")
        workload["ops"] = distinct_ops(workload["net"])
        for name, task in make("gpucnn", workload).tasks.items():
            task()
            task()  # what was saved once serves again
            assert name


def test_a_graph_needs_a_gpu():
    pytest.importorskip("torch")
    with pytest.raises(Impossible, match="^torch-graph needs a GPU$"):
        make("torch-graph", workload_of("lenet5"))


@pytest.fixture
def no_cuda(monkeypatch):
    """torch.cuda as far as a capture needs it; what is captured runs once, and at each replay."""
    torch = pytest.importorskip("torch")
    tasks = []

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            tasks.append("replay")

    for name, value in {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph,
                        "stream": contextlib.nullcontext, "graph": contextlib.nullcontext,
                        "empty_cache": lambda: tasks.append("freed"),
                        "reset_peak_memory_stats": lambda: tasks.append("reset")}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return tasks


def test_torch_warms_up_before_it_captures(no_cuda):
    from scripts.contestants import torch_contestant
    replay = torch_contestant.captured(lambda: no_cuda.append("task") or 7)
    assert no_cuda == ["task"] * (torch_contestant.WARM_UPS + 1)
    assert replay() == 7
    assert no_cuda[-1] == "replay"


def test_torch_takes_the_faster_layout_and_gives_back_what_the_trial_took(no_cuda, monkeypatch):
    peer = make("torch-channels-last", workload_of("lenet5", batch=2))
    for faster in ("contiguous", "channels_last"):
        times = iter([1.0, 1.0, 2.0, 2.0] if faster == "contiguous" else [2.0, 2.0, 1.0, 1.0])
        monkeypatch.setattr(peer, "measure", lambda task, n, times=times: next(times))
        no_cuda.clear()
        assert peer._faster_layout() == faster
        assert no_cuda == ["freed", "freed", "reset"]


def test_the_best_peers_of_each_device_are_peers():
    assert all(set(names) <= benchmark.PEERS.keys() for names in benchmark.BEST.values())
    assert benchmark.peers("best") == ["best"]
