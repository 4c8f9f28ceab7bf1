"""What runs in a process of its own: the test suite, and NVIDIA's checkers."""
from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from gpucnn import cli
from scripts.gpu.context import Context
from scripts.gpu.report import Job, OutOfTime, Row

ROOT = Path(__file__).resolve().parents[2]
TEST_SECONDS, SANITIZER_SECONDS = 330, 75
LEAST_TEST_SECONDS = 60


def test_jobs(context: Context) -> Iterator[Job]:
    yield Job("tests", "all", lambda: run_tests(min(TEST_SECONDS, context.budget.left)),
              LEAST_TEST_SECONDS)


def require_pytest() -> None:
    """Raise UsageError with the remedy where pytest is missing."""
    try:
        import pytest  # noqa: F401
    except ImportError as e:
        raise cli.UsageError("the tests need pytest; pip install -e '.[test]', or choose other "
                             "sections with --only") from e


def run_tests(seconds: float) -> Row:
    """The whole test suite, whose "cupy" is the real one here. Raises OutOfTime."""
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        passed, output = run_child(
            [sys.executable, "-m", "pytest", "-q", f"--junitxml={junit}", "-p", "no:cacheprovider"],
            seconds)
        if not junit.exists():
            return {"name": "tests", "passed": False, "note": "pytest left no results",
                    "output": output[-4000:]}
        suite = next(ElementTree.parse(junit).getroot().iter("testsuite")).attrib
    counts = {k: int(suite[k]) for k in ("tests", "failures", "errors", "skipped")}
    return {"name": "tests", "passed": passed, **counts,
            "note": ", ".join(f"{v} {k}" for k, v in counts.items()),
            **({} if passed else {"output": output[-4000:]})}


def run_child(command: list[str], seconds: float, settings: dict[str, str] | None = None
              ) -> tuple[bool, str]:
    """Whether the command succeeds, and what it printed. Raises OutOfTime.

    It ends with all processes that it has started. settings: of its environment, beside ours.
    """
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, **(settings or {})}, start_new_session=True) as child:
        try:
            output, _ = child.communicate(timeout=seconds)
        except BaseException as e:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            if not isinstance(e, subprocess.TimeoutExpired):
                raise
            said = (e.output or b"").decode(errors="replace")
            raise OutOfTime(f"not finished in {seconds:.0f} s", said) from e
    return child.returncode == 0, output.decode(errors="replace")


def sanitizer() -> str | None:
    """Where compute-sanitizer is; None where it is not installed."""
    cuda = os.path.join(os.environ.get("CUDA_PATH", "/usr/local/cuda"), "bin")
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=cuda)


def sanitizer_command(check: str, python: str = "python", tool: str = "compute-sanitizer"
                      ) -> list[str]:
    """A check, memcheck or racecheck, over small training steps."""
    return [tool, "--tool", check, "--error-exitcode", "1", python, "-m", "scripts.gpu.step"]


def hints() -> str:
    """Command lines for NVIDIA's tools, to be run in the folder of the repository."""
    profile = ["ncu", "--clock-control", "none", "--set", "full", "-k", "regex:conv_", "python",
               "-m", "scripts.gpu.step"]
    return "\n".join(map(shlex.join, [
        *(sanitizer_command(check) for check in ("memcheck", "racecheck", "initcheck")), profile]))


def sanitizer_jobs(context: Context) -> Iterator[Job]:
    for check in ("memcheck", "racecheck"):
        yield Job("sanitizer", check, partial(run_sanitizer, check), SANITIZER_SECONDS)


def run_sanitizer(check: str) -> Row:
    tool = sanitizer()
    if tool is None:
        return {"name": check, "passed": True, "found": False,
                "note": "compute-sanitizer is not installed"}
    passed, output = run_child(sanitizer_command(check, sys.executable, tool), SANITIZER_SECONDS)
    return {"name": check, "passed": passed, "found": True, "output": output[-2000:].strip(),
            "note": "".join(output.strip().splitlines()[-1:])}
