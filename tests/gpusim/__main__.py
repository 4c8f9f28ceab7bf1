"""python -m tests.gpusim MODULE ARGS...: run a module with the stand-in for CuPy in place."""
import runpy
import sys

from tests import gpusim

if len(sys.argv) < 2:
    sys.exit("usage: python -m tests.gpusim MODULE ARGS...")
works, reason = gpusim.available()
if not works:
    sys.exit(f"gpusim: {reason}")
gpusim.install()
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
