"""python -m scripts.contestants NAME WORKLOAD: one contestant, which does what its stdin says.

Requests and replies are JSON objects, one a line. The first reply comes when all is built. An
error is a reply too, and the end.
"""
from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts.contestants import Contestant, Impossible, Task

SETTLED = 0.95   # a time below this share of the best one shows that warm-up goes on
PATIENCE = 10.0  # windows that warm-up may take


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no reply
    try:
        for reply in serve(sys.argv[1], json.loads(sys.argv[2])):
            print(json.dumps(reply), file=replies, flush=True)
    except Exception as e:
        message = " ".join(str(e).split())
        kind = "not installed" if isinstance(e, ModuleNotFoundError) else type(e).__name__
        error = message if isinstance(e, Impossible) else f"{kind}: {message}"
        print(json.dumps({"error": error}), file=replies, flush=True)


def serve(name: str, workload: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Build the contestant, then answer each request; yields the replies."""
    module = importlib.import_module(f"scripts.contestants.{name.split('-')[0]}_contestant")
    contestant: Contestant = module.Contestant({**workload, "contestant": name})
    built = memory("VmRSS")
    yield {"versions": contestant.versions, "tasks": list(contestant.tasks)}
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "warm_up":
            task = contestant.tasks[request["task"]]
            yield {"steps": warm_up(contestant, task, request["seconds"])}
        elif request["do"] == "window":
            task = contestant.tasks[request["task"]]
            started = time.perf_counter()
            seconds = contestant.measure(task, request["steps"])
            yield {"seconds": seconds, "wall": time.perf_counter() - started}
        elif request["do"] == "memory":
            peak = memory("VmHWM")
            yield {"peak_bytes": peak, "growth_bytes": peak - built,
                   "device_bytes": contestant.device_bytes(), "notes": contestant.notes}
        elif request["do"] == "digests":
            yield module.digests(contestant, request["steps"])
        else:  # profile
            yield module.profile(contestant, request["steps"])


def warm_up(contestant: Contestant, task: Task, seconds: float) -> int:
    """Run until three times in a row are no new best one; how many runs fill a window."""
    best = contestant.measure(task, 1)  # where there is something to compile, it is done here
    calm, elapsed, started = 0, 0.0, time.perf_counter()
    while (calm < 3 or elapsed < seconds / 2) and elapsed < PATIENCE * seconds:
        now = contestant.measure(task, 1)
        calm = 0 if now < SETTLED * best else calm + 1
        best = min(best, now)
        elapsed = time.perf_counter() - started
    return max(1, round(seconds / best))


def memory(field: str) -> int:
    """VmRSS or VmHWM, the peak, in bytes; where Linux does not say, the peak in both cases.

    On Linux ru_maxrss is no peak of ours: it begins with that of the process that started us.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines()
                    if line.startswith(field))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
