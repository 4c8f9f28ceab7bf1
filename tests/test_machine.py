"""What is written down of the machine."""
from __future__ import annotations

import re
import subprocess

import gpucnn
from gpucnn import machine
from gpucnn.backend import get_backend, use_backend
from gpucnn.training.resume import environment


def test_the_blas_is_part_of_what_the_bits_depend_on(monkeypatch):
    with use_backend("numpy"):
        before = environment(get_backend())
        monkeypatch.setattr("threadpoolctl.threadpool_info", lambda: [
            {"user_api": "openmp", "internal_api": "openmp", "version": None},
            {"user_api": "blas", "internal_api": "openblas", "version": "0.3.31",
             "architecture": "Haswell"}])
        assert environment(get_backend()) == before | {"blas": "openblas 0.3.31 Haswell"}
    monkeypatch.undo()
    assert re.match(r"\w+ \d", machine.blas_name())


def test_the_commit_is_not_that_of_a_clone_around_an_installed_gpucnn(tmp_path, monkeypatch):
    package = tmp_path / "venv" / "gpucnn"
    package.mkdir(parents=True)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(git + command, check=True)
    monkeypatch.setattr(gpucnn, "__file__", str(package / "__init__.py"))
    assert machine.git_commit() is None
    (tmp_path / "gpucnn").mkdir()
    monkeypatch.setattr(gpucnn, "__file__", str(tmp_path / "gpucnn" / "__init__.py"))
    assert re.fullmatch("[0-9a-f]{7,}", machine.git_commit())
