"""What is installed holds all that is needed: from a wheel, an sdist, in place, or not at all."""
from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

import gpucnn

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("setuptools", minversion="70.1", reason="building needs setuptools >= 70.1")

LOOK_AROUND = """
import importlib.resources, pathlib, sys
import gpucnn
from gpucnn.backend.cuda_kernel import Variant, kernel_dir, read_source
from gpucnn.data import fashion_mnist
import numpy as np
assert pathlib.Path(gpucnn.__file__).is_relative_to(sys.argv[1]), gpucnn.__file__
assert {"im2col.cu", "maxpool.cu", "avgpool.cu", "dropout.cu", "common.cuh"} <= {
    p.name for p in kernel_dir().iterdir()}, kernel_dir()
f4, u1, i4 = map(np.dtype, ("f4", "u1", "i4"))
assert "max_pool_backward" in read_source(kernel_dir(), "maxpool.cu", Variant(f4, u1, i4, 4))
train, test = fashion_mnist.load(subset=True)
assert (len(train), len(test)) == (10000, 2000)
assert (pathlib.Path(gpucnn.data.fashion_mnist_subset.__file__).parent / "LICENSE").exists()
assert (pathlib.Path(gpucnn.__file__).parent / "py.typed").exists()
assert (pathlib.Path(gpucnn.__file__).parent / "report" / "style.css").exists()
print("found", gpucnn.__version__)
"""


def look_around(where, cwd, site_packages=None):
    """In a process of its own, started elsewhere: gpucnn must come from the folder `where`.

    site_packages: a folder whose .pth files are read, as an editable install needs it. -S leaves
    out those of this environment, where gpucnn may be installed as well.
    """
    script = f"import site, sys; site.addsitedir({str(site_packages or where)!r}); "
    script += f"sys.path.append({str(Path(np.__file__).parents[1])!r})\n"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-S", "-c", script + LOOK_AROUND, str(where)], cwd=cwd, text=True,
        capture_output=True, check=False, env=environment)
    assert result.stdout == f"found {gpucnn.__version__}\n", result.stderr


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout, so that nothing is built inside it."""
    copy = tmp_path_factory.mktemp("source") / "gpucnn"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(
        ".git", ".venv", "*.egg-info", "build", "dist", "runs", "__pycache__", ".*_cache"))
    return copy


def build(source, what, out):
    """By the backend that pyproject.toml names, without a network."""
    script = ("import sys; from setuptools import build_meta as b; "
              f"print(b.build_{what}(sys.argv[1]))")
    result = subprocess.run([sys.executable, "-c", script, str(out)], cwd=source,
                            capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return out / result.stdout.splitlines()[-1]


def unpack(wheel, folder):
    """A wheel of pure Python is installed by unpacking it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_bare_checkout(source, tmp_path):
    look_around(source, tmp_path)


@pytest.mark.parametrize("script", ["train", "evaluate", "predict", "report", "benchmark",
                                    "gpu_check"])
def test_scripts_of_a_bare_checkout(script, source, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(np.__file__).parents[1])}
    result = subprocess.run(
        [sys.executable, "-S", str(source / "scripts" / f"{script}.py"), "--help"], cwd=tmp_path,
        text=True, capture_output=True, check=False, env=environment)
    assert result.stdout.startswith(f"usage: {script}.py"), result.stderr


def test_wheel(source, tmp_path):
    installed = unpack(build(source, "wheel", tmp_path), tmp_path / "installed")
    look_around(installed, tmp_path)
    names = {p.name for p in installed.iterdir()}
    assert names == {"gpucnn", f"gpucnn-{gpucnn.__version__}.dist-info"}


def test_sdist_and_the_wheel_made_from_it(source, tmp_path):
    sdist = build(source, "sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, **({"filter": "data"} if sys.version_info >= (3, 12) else {}))
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "setup.cfg",
            "kernels/im2col.cu", "tests/conftest.py", "tests/gpusim/runtime.cpp",
            "scripts/train.py", "docs/article.md"} <= names
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    installed = unpack(build(unpacked, "wheel", tmp_path), tmp_path / "installed")
    look_around(installed, tmp_path)


def test_editable_install(source, tmp_path):
    installed = unpack(build(source, "editable", tmp_path), tmp_path / "site")
    look_around(source, tmp_path, site_packages=installed)


def test_the_metadata_agree():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: gpucnn._version.__version__"
    extras = set(setup["options.extras_require"])
    used = {extra for file in ("README.md", "CONTRIBUTING.md") for group in
            re.findall(r"(?:gpucnn|\.)\[([a-z0-9,]+)\]", (ROOT / file).read_text())
            for extra in group.split(",")}
    assert used
    assert used <= extras
    packages = set(setup["options"]["packages"].split())
    found = {"gpucnn.kernels"} | {
        ".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("gpucnn/**/__init__.py")}
    assert packages == found


def test_quick_start_is_two_commands():
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Quick start\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```sh\n(.*?)^```", section, re.S | re.M)
    assert len(blocks) == 2
    assert all(block.count("\n") == 1 for block in blocks)
    assert "scripts/train.py" in blocks[0]
    assert "pytest" in blocks[1]


def test_the_readmes_python_runs(tmp_path):
    pytest.importorskip("sklearn", reason="needs scikit-learn: pip install 'gpucnn[sklearn]'")
    readme = (ROOT / "README.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", readme, re.S | re.M))
    assert code.count("import") > 4
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                            text=True, check=False,
                            env={**os.environ, "PYTHONPATH": str(ROOT), "GPUCNN_BACKEND": "numpy"})
    assert result.returncode == 0, result.stderr
    assert "multiply-adds" in result.stdout
