"""scripts/benchmark.py compares equal things and says what a user must know. Nothing is timed."""
from __future__ import annotations

import functools
import importlib
import json
import os

import numpy as np
import pytest

from gpucnn.layers import Dropout, Flatten, Layer
from gpucnn.models import MODELS
from scripts import benchmark
from scripts.contestants import contest, gpucnn_contestant
from scripts.contestants.workloads import describe, distinct_ops
from tests.test_scripts import error_of, run

SMALL = ("--batch", "2", "--windows", "2", "--seconds", "0.002", "--threads", "1", "--json")
IMAGES = {"article": (28, 28, 1), "lenet5": (28, 28, 1), "resnet18": (8, 8, 3)}  # quick to train on


def workload_of(model: str, what: str = "step", **more) -> dict:
    """Without dropout: no two libraries draw the same numbers."""
    layer = MODELS[model](10)
    for dropout in layer.walk():
        if isinstance(dropout, Dropout):
            dropout.rate = 0.0
    layer.declare_at(IMAGES[model], "")
    return {"contestant": "gpucnn", "what": what, "model": model, "net": describe(layer),
            "batch": 8, "device": "cpu", "threads": 1, **more}


def make(name: str, workload: dict):
    module = importlib.import_module(f"scripts.contestants.{name.split('-')[0]}_contestant")
    return module.Contestant({**workload, "contestant": name})


@functools.cache
def train_ours(name: str) -> tuple[Layer, list[float]]:
    """The model as it was before two steps of training, and their losses."""
    contestant = make("gpucnn", workload_of(name))
    for layer in contestant.model.walk():
        if isinstance(layer, Dropout):
            layer.rate = 0.0
    weights = contestant.model.flat_data.copy()
    losses = [float(contestant.step()) for _ in range(2)]
    contestant.model.flat_data[...] = weights
    return contestant.model, losses


def give_torch(peer, model: Layer) -> None:
    """Copy the weights: OIHW filters, (units, inputs) matrices, and inputs of images by channel."""
    import torch
    mine, image = iter(peer.model.parameters()), None
    for layer in model.walk():
        if isinstance(layer, Flatten):
            image = layer.input_shape
        for p in layer.own_parameters.values():
            w = p.data
            if w.ndim == 4:
                w = w.transpose(3, 2, 0, 1)
            elif w.ndim == 2:
                if image:
                    w, image = w.reshape(*image, -1).transpose(2, 0, 1, 3).reshape(w.shape), None
                w = w.T
            with torch.no_grad():
                next(mine).copy_(torch.from_numpy(w.copy()))


def give_jax(peer, model: Layer) -> None:
    import jax
    leaves = [jax.numpy.array(layer.own_parameters[name].data) for layer in model.walk()
              for name in sorted(layer.own_parameters)]
    p, *others = peer.state
    assert [leaf.shape for leaf in jax.tree.leaves(p)] == [leaf.shape for leaf in leaves]
    peer.state = (jax.tree.unflatten(jax.tree.structure(p), leaves), *others)


def parameters_of(name: str, peer) -> int:
    if name == "jax":
        import jax
        return sum(p.size for p in jax.tree.leaves(peer.state[0]))
    return sum(p.numel() for p in peer.model.parameters())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", benchmark.PEERS)
def test_peers_train_the_same_net(name, model):
    """As many parameters; from the same weights the same loss, and again after a step of Adam."""
    pytest.importorskip(benchmark.PEERS[name])
    ours, (before, after) = train_ours(model)
    peer = make(name, workload_of(model))
    assert parameters_of(name, peer) == sum(p.size for p in ours.parameters().values())
    (give_jax if name == "jax" else give_torch)(peer, ours)
    assert abs(before - after) > 0.01
    np.testing.assert_allclose(float(peer.tasks["step"]()), before, rtol=1e-5)
    # Adam's first step has the size of the learning rate even where a gradient is only rounding.
    np.testing.assert_allclose(float(peer.tasks["step"]()), after, rtol=1e-3)


@pytest.mark.parametrize("name", benchmark.PEERS)
def test_peers_know_every_op_and_infer(name):
    pytest.importorskip(benchmark.PEERS[name])
    for model in MODELS:
        workload = workload_of(model, "op", batch=2)
        workload["ops"] = distinct_ops(workload["net"])
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
    assert "".join(name[0] for name in calls) == "gbc" + "bcg" + "cg"
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
    assert sum("not installed: No module named 'torch'" in line for line in lines) == 2
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


def test_infer_beside_a_peer(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "infer.json"
    run("scripts.benchmark", "infer", *SMALL, out, "--against", "torch")
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
               "argument --against: 'keras' is not one of torch, torch-channels-last, jax"),
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
    report = {"machine": {"gpu": None, "cpu": "AMD EPYC(TM) 7"}, "date": "2026-11-25"}
    assert benchmark.default_path("op", report).relative_to(contest.ROOT).as_posix() == (
        "benchmarks/op-amd-epyc-tm-7-2026-11-25.json")


def test_the_gpu_is_timed_by_events(cupy_backend, monkeypatch):
    pool = type("Pool", (), {"total_bytes": lambda self: 7})
    monkeypatch.setattr(cupy_backend.xp, "get_default_memory_pool", pool, raising=False)
    contestant = gpucnn_contestant.Contestant(workload_of("lenet5", batch=1, device="cuda"))
    assert contestant.measure(contestant.tasks["step"], 1) > 0
    assert contestant.device_bytes() == 7
