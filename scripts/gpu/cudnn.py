"""cuDNN's convolutions, through torch, on the memory of CuPy's arrays."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpucnn.files import one_line
from gpucnn.geometry import Window
from scripts.gpu.measure import Call, Clock

NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
OIHW = (3, 2, 0, 1)  # of HWIO


class Cudnn:
    """The Library of torch's calls. On a CPU, where the tests run it, graphs are plain calls."""

    def __init__(self, clock: Clock, torch: Any, device: str):
        self.clock, self.torch, self.device = clock, torch, device
        torch.backends.cudnn.benchmark = True
        self.versions = {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()}

    def allow_tf32(self, allowed: bool) -> None:
        self.torch.backends.cudnn.allow_tf32 = allowed
        self.torch.backends.cuda.matmul.allow_tf32 = allowed

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        self.clock.wait()
        with contextlib.ExitStack() as stack:
            if self.device == "cuda":
                stream = self.torch.cuda.ExternalStream(self.clock.stream.ptr)
                stack.enter_context(self.torch.cuda.stream(stream))
            yield
        self.clock.wait()

    def capture(self, work: Call) -> Call:
        if self.device != "cuda":
            return work
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            work()
        return graph.replay

    def free(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.empty_cache()

    def call(self, which: str, x: Any, w: Any, dy: Any, window: Window, groups: int) -> Call:
        """One pass, y, dx or dw, of a convolution of CuPy's NHWC and HWIO arrays.

        torch reads x and dy where they lie, as channels_last; w, whose order of axes is another,
        is copied once, into channels_last too. The call returns a tensor; array() reads it.

        cuDNN pads both sides alike: where they differ, the zeros are laid around x before.
        """
        v, torch = window, self.torch
        image, gradient = (self._tensor(a).permute(NCHW) for a in (x, dy))
        filters = self._tensor(w).permute(OIHW).contiguous(memory_format=torch.channels_last)
        stride, padding, dilation = [v.sh, v.sw], [v.top, v.left], [v.dh, v.dw]
        if (v.top, v.left) != (v.bottom, v.right):
            if which == "dx":
                raise ValueError("it would be that of the image with the zeros around it")
            image = torch.nn.functional.pad(image, (v.left, v.right, v.top, v.bottom)).contiguous(
                memory_format=torch.channels_last)
            padding = [0, 0]
        if which == "y":
            return lambda: torch.nn.functional.conv2d(image, filters, None, stride, padding,
                                                      dilation, groups)
        number = ("dx", "dw").index(which)
        wanted = [which == "dx", which == "dw", False]
        return lambda: torch.ops.aten.convolution_backward(
            gradient, image, filters, None, stride, padding, dilation, False, [0, 0], groups,
            wanted)[number]

    def array(self, which: str, tensor: Any) -> Any:
        """A result as our array, of our order of axes."""
        tensor = tensor.permute((2, 3, 1, 0) if which == "dw" else NHWC)
        if tensor.dtype == self.torch.bfloat16:  # which DLPack may not know
            import ml_dtypes
            return self.clock.xp.from_dlpack(tensor.view(self.torch.int16)).view(ml_dtypes.bfloat16)
        return self.clock.xp.from_dlpack(tensor)

    def _tensor(self, array: Any) -> Any:
        if array.dtype.name == "bfloat16":
            return self.torch.from_dlpack(array.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_dlpack(array)


def find(clock: Clock) -> tuple[Cudnn | None, str]:
    """The peer, or None and why there is none."""
    try:
        import torch
    except ImportError as e:
        return None, f"torch cannot be imported ({one_line(e)}): cuDNN is not measured"
    try:
        device = torch.from_dlpack(clock.xp.ones(1, np.float32)).device.type
    except Exception as e:  # torch has many ways to say that it was built without CUDA
        return None, f"torch cannot read CuPy's arrays ({one_line(e)}): cuDNN is not measured"
    return Cudnn(clock, torch, device), ""
