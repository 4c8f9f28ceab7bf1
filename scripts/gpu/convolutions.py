"""Every distinct convolution of the nets: checked, beside cuDNN, and in every tile.

What `auto` chose is compared with NumPy on a few images, with cuDNN on all, and only then timed.
The times of all tiles are what the costs in gpucnn/backend/tile_costs.py are fitted to, by which
`auto` chooses.
"""
from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gpucnn.backend import cuda_convolution, make_backend
from gpucnn.backend.cuda_convolution import MAX_SPLITS, Plan, Problem, possible_tiles
from gpucnn.backend.cuda_kernel import accumulator
from scripts.gpu.context import Context, Mode
from scripts.gpu.cudnn import Cudnn
from scripts.gpu.measure import Call, Clock, random_array, relative_error, run_twice, verdict
from scripts.gpu.nets import Convolution, convolutions, distinct, geometric_mean
from scripts.gpu.report import Job, Row, short

PLANS = {"y": cuda_convolution.forward_plan, "dx": cuda_convolution.input_gradient_plan,
         "dw": cuda_convolution.weight_gradient_plan}
IMAGES = 2          # compared with NumPy
SLOWER = 1.1        # than the best by this factor: no more splits in that direction
# cuDNN rounds as it likes, as in Winograd's transforms: so much more may differ than from NumPy.
PEER_SLACK = 4


class Tensors(NamedTuple):
    """What a pass of a convolution reads."""

    x: Any
    w: Any
    dy: Any


def problem_of(conv: Convolution, mode: Mode) -> Problem:
    return Problem.of((conv.batch, conv.h, conv.w, conv.c), conv.c_out, conv.window, conv.groups,
                      mode.dtype, mode.tensor and cuda_convolution.capability() >= 80)


def run(which: str, p: Problem, plan: Plan, t: Tensors) -> Any:
    """One pass by our kernels: the one place that knows how they are called.

    dw of 16-bit tensors is float32, as mixed precision keeps it.
    """
    if which == "y":
        return cuda_convolution.forward(p, plan, t.x, t.w, None, None, None)
    if which == "dx":
        return cuda_convolution.input_gradient(p, plan, t.dy, t.w)
    dw = cuda_convolution.cupy.empty(t.w.shape, accumulator(t.w.dtype))
    cuda_convolution.weight_gradient(p, plan, t.x, t.dy, dw)
    return dw


def tensors(xp: Any, conv: Convolution, mode: Mode, seed: int) -> Tensors:
    """Random numbers; w so small that y has the size of x."""
    oh, ow = conv.window.out_size(conv.h, conv.w)
    terms = conv.window.places * (conv.c // conv.groups)
    shapes = ((conv.batch, conv.h, conv.w, conv.c),
              (conv.window.kh, conv.window.kw, conv.c // conv.groups, conv.c_out),
              (conv.batch, oh, ow, conv.c_out))
    return Tensors(*(random_array(xp, shape, mode.dtype, 3 * seed + k, scale)
                     for k, (shape, scale) in enumerate(zip(shapes, (1, terms**-0.5, 1)))))


def further_tensors(clock: Clock, conv: Convolution, mode: Mode, first: Tensors) -> list[Tensors]:
    """As many more as it takes, with the first, to find none in the cache.

    What a pass reads and writes has the sizes of x, w and dy, whichever pass it is.
    """
    count = clock.buffers(sum(a.nbytes for a in first))
    return [tensors(clock.xp, conv, mode, k) for k in range(1, count)]


def jobs(context: Context) -> Iterator[Job]:
    """First all comparisons, mode by mode and net by net, then all tiles; bfloat16 after all of
    that, for its products take float16's time.

    Together the two take half a second on average on an H100, at most some two.
    """
    for late in (False, True):
        for group, work in (("beside cuDNN", compare), ("best tile", sweep)):
            for mode in context.modes:
                if (mode.name == "bfloat16") != late:
                    continue
                for conv in (conv for net in context.nets for conv in chosen(context, net)):
                    for which in conv.passes:
                        yield Job(f"{group}, {conv.net} {mode.name}", f"{conv.label} {which}",
                                  partial(work, context, conv, which, mode), 2.0)


def chosen(context: Context, net: str) -> list[Convolution]:
    convs = convolutions(net, context.batch)
    return distinct([conv.small() for conv in convs]) if context.quick else convs


# ------------------------------------------------------------------------------------ beside cuDNN


def compare(context: Context, conv: Convolution, which: str, mode: Mode) -> Row:
    """Auto's plan beside cuDNN, on the same tensors."""
    clock, p = context.clock, problem_of(conv, mode)
    plan = PLANS[which](p)
    row = described(conv, which, mode) | {"plan": str(plan), "note": short(plan)}
    wrong = differs_from_numpy(context, conv, which, mode, plan)
    sets = [tensors(clock.xp, conv, mode, 0)]
    (ours,), problem = run_twice(clock, lambda: run(which, p, plan, sets[0]))
    wrong = wrong or problem
    peer, calls = context.peer, []
    if peer:
        peer.allow_tf32(mode.tf32)
        try:
            calls = [peer_call(peer, which, conv, sets[0])]
            error = relative_error(clock.xp, ours, peer.array(which, calls[0]()))
            wrong = wrong or verdict(error, PEER_SLACK * mode.tolerance, "cuDNN")
            row["error"] = str(error)
        except Exception as e:
            peer = None
            note_refusal(row, e)
    del ours
    if wrong:
        return row | {"passed": False, "note": wrong}
    sets += further_tensors(clock, conv, mode, sets[0])
    timing = clock.time([partial(run, which, p, plan, t) for t in sets])
    row |= timing.figures() | {"rate": conv.flops / timing.median, "unit": "flops"}
    row |= {"of_limit": context.share_of_matrix_peak(mode, row["rate"]), "passed": True}
    if peer:
        calls += [peer_call(peer, which, conv, t) for t in sets[1:]]
        try:
            other = clock.time(calls, peer)
            row |= {f"other_{name}": value for name, value in other.figures().items()} | {
                    "ratio": other.median / timing.median}
        except Exception as e:
            note_refusal(row, e)
    return row


def note_refusal(row: Row, e: Exception) -> None:
    row["peer"] = f"{type(e).__name__}: {e}"
    row["note"] += f"; cuDNN: {row['peer']}"


def peer_call(peer: Cudnn, which: str, conv: Convolution, t: Tensors) -> Call:
    return peer.call(which, t.x, t.w, t.dy, conv.window, conv.groups)


def described(conv: Convolution, which: str, mode: Mode) -> Row:
    """The shape, for the table and for the JSON."""
    return {"name": f"{conv.label} {which}", "net": conv.net, "mode": mode.name, "pass": which,
            "group": f"{conv.net}, batch {conv.batch}, {mode.name}", "layer": conv.name,
            "times": conv.times, "shape": [conv.batch, conv.h, conv.w, conv.c],
            "c_out": conv.c_out, "window": conv.window._asdict(), "groups": conv.groups,
            "flops": conv.flops}


def differs_from_numpy(context: Context, conv: Convolution, which: str, mode: Mode, plan: Plan
                       ) -> str:
    """What is wrong with this plan on a few images; "" for nothing."""
    xp, few = context.clock.xp, conv._replace(batch=min(IMAGES, conv.batch))
    t = tensors(xp, few, mode, 100)
    with context.clock.poisoned():
        result = run(which, problem_of(few, mode), plan, t)
    here = make_backend("numpy")
    x, w, dy = (context.backend.to_numpy(a).astype(np.float32) for a in t)
    if which == "y":
        expected = here.conv2d(x, w, None, few.window, few.groups, None)
    else:
        dw = np.empty_like(w)
        dx = here.conv2d_backward(dy, dy, x, w, few.window, few.groups, None, dw,
                                  input_gradient=which == "dx")
        expected = dx if which == "dx" else dw
    error = relative_error(np, context.backend.to_numpy(result).astype(np.float32), expected)
    return verdict(error, mode.tolerance, "NumPy")


# ------------------------------------------------------------------------------------- every tile


def sweep(context: Context, conv: Convolution, which: str, mode: Mode) -> Row:
    """The fastest tile and number of splits beside what auto chose.

    Each tile begins with the splits that auto would choose in it. From there they are doubled, and
    halved, as long as that helps.
    """
    clock, p = context.clock, problem_of(conv, mode)
    most = 2 if context.quick else MAX_SPLITS
    auto = PLANS[which](p)._replace(workspace=0)
    sets = [tensors(clock.xp, conv, mode, 0)]
    sets += further_tensors(clock, conv, mode, sets[0])
    expected = run(which, p, auto, sets[0])
    seconds: dict[Plan, float] = {}
    wrong = []

    def measure(plan: Plan) -> float:
        if plan not in seconds:
            result = run(which, p, plan, sets[0])
            problem = verdict(relative_error(clock.xp, result, expected), mode.tolerance, "auto")
            if problem:
                wrong.append(f"{plan} {problem}")
            calls = [partial(run, which, p, plan, t) for t in sets]
            seconds[plan] = clock.time(calls, roughly=True).median
        return seconds[plan]

    measure(auto)
    for plan in other_algorithms(p, which, auto):
        measure(plan)
    for tile in possible_tiles(p):
        start = min(most, PLANS[which](p, "implicit_gemm", tile=tile).splits)
        best = measure(tiled(tile, start))
        for factor in (2, 0.5):
            splits = int(start * factor)
            while 1 <= splits <= most:
                now = measure(tiled(tile, splits))
                if now > SLOWER * best:
                    break
                best, splits = min(best, now), int(splits * factor)
    fastest = min(seconds, key=lambda plan: seconds[plan])
    best, ours = seconds[fastest], seconds[auto]
    return described(conv, which, mode) | {
        "kind": "tiles", "group": f"best tile, then auto's: {conv.net}, {mode.name}",
        "auto": str(auto), "best": str(fastest), "passed": not wrong,
        "microseconds": 1e6 * best, "rate": conv.flops / best, "unit": "flops",
        "of_limit": context.share_of_matrix_peak(mode, conv.flops / best),
        "other_microseconds": 1e6 * ours, "ratio": ours / best, "processors": context.processors,
        "plans": [{"algorithm": plan.algorithm, "tile": plan.tile and list(plan.tile[:2]),
                   "wgmma": bool(plan.tile and plan.tile.wgmma), "splits": plan.splits,
                   "microseconds": 1e6 * s}
                  for plan, s in sorted(seconds.items(), key=lambda item: item[1])],
        "note": wrong[0] if wrong else f"{short(fastest)}, {short(auto)}"}


def tiled(tile: Any, splits: int) -> Plan:
    return Plan("implicit_gemm", tile, splits)


def other_algorithms(p: Problem, which: str, auto: Plan) -> list[Plan]:
    """A direct kernel where there is one and auto did not take it."""
    possible = p.depthwise if which == "dx" else p.direct
    if not possible or auto.algorithm == "direct":
        return []
    return [PLANS[which](p, "direct")._replace(workspace=0)]


# ----------------------------------------------------------------------------------------- summary


def summary(rows: list[Row]) -> Row:
    """Per net and mode: cuDNN / ours, a step's convolutions, what auto loses to the best tile, and
    how often that is wgmma's."""
    nets: Row = {}
    for net, mode in dict.fromkeys((row["net"], row["mode"]) for row in rows if "net" in row):
        mine = [row for row in rows if (row.get("net"), row.get("mode")) == (net, mode)
                and "ratio" in row]
        pairs, tiles = ([row for row in mine if (row.get("kind") == "tiles") == is_tiles]
                        for is_tiles in (False, True))
        part: Row = {"shapes": len(pairs), "tiled_shapes": len(tiles)}
        text = []
        if pairs:
            part |= {"cudnn_to_ours": geometric_mean([row["ratio"] for row in pairs])}
            for whose, key in (("ours", "microseconds"), ("cudnn", "other_microseconds")):
                part[f"{whose}_milliseconds"] = sum(r["times"] * r[key] for r in pairs) / 1e3
            text.append("cuDNN / ours {cudnn_to_ours:.2f} (geometric mean of {shapes}), a step's "
                        "{ours_milliseconds:.3g} ms, cuDNN's {cudnn_milliseconds:.3g}")
        if tiles:
            ratios = [row["ratio"] for row in tiles]
            part |= {"auto_to_best": geometric_mean(ratios), "worst_auto_to_best": max(ratios)}
            text.append("auto / best {auto_to_best:.2f}, at worst {worst_auto_to_best:.2f} "
                        "(of {tiled_shapes})")
        by_wgmma = [sum("wgmma" in row[whose] for row in tiles) for whose in ("best", "auto")]
        if any(by_wgmma):
            part |= dict(zip(("wgmma_best", "wgmma_auto"), by_wgmma))
            text.append("wgmma is the best of {wgmma_best}, and auto's choice of {wgmma_auto}")
        nets[f"{net} {mode}"] = part | {"text": [line.format(**part) for line in text]}
    return nets
