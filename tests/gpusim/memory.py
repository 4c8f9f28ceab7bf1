"""CuPy's memory pools and memory hooks, for arrays whose memory is NumPy's.

A pool counts what the arrays that came from it take, each rounded up to 512 bytes, as in CuPy. It
is told of an array when it is made, and of its end when nothing refers to its memory any more.
"""
from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

UNIT = 512  # bytes, of which CuPy's allocations are multiples

_pointers = itertools.count(UNIT, UNIT)
_hooks: dict[str, MemoryHook] = {}
# By the id of the array of NumPy that owns it: memory, and the arrays of the device that lie there.
_known: dict[int, tuple[Memory, set[weakref.ref]]] = {}


class OutOfMemoryError(MemoryError):
    """cupy.cuda.memory.OutOfMemoryError."""

    def __init__(self, size, total, limit=0):
        set_to = f", limit set to: {limit:,} bytes" if limit else ""
        super().__init__(f"Out of memory allocating {size:,} bytes (allocated so far: {total:,} "
                         f"bytes{set_to}).")


class MemoryHook:
    """cupy.cuda.MemoryHook: told of each allocation of every pool while it is entered."""

    name = "MemoryHook"

    def __enter__(self):
        if self.name in _hooks:
            raise KeyError(f"memory hook {self.name} already exists")
        _hooks[self.name] = self
        return self

    def __exit__(self, *error):
        del _hooks[self.name]

    def malloc_preprocess(self, **arguments):
        """device_id, size (as asked for), mem_size (rounded up)."""

    def malloc_postprocess(self, **arguments):
        """As malloc_preprocess, and mem_ptr, pmem_id."""

    def free_preprocess(self, **arguments):
        """device_id, mem_size, mem_ptr, pmem_id."""

    def free_postprocess(self, **arguments):
        """As free_preprocess."""


class Memory:
    """What malloc() gives: here a number for the hooks, and a note of its size."""

    def __init__(self, pool: MemoryPool, size: int):
        self.pool, self.size, self.ptr = pool, size, next(_pointers)

    def memset_async(self, value: int, size: int) -> None:
        """Nothing: the stand-in's empty() fills arrays itself."""

    def free(self) -> None:
        _tell("free_preprocess", mem_size=self.size, mem_ptr=self.ptr, pmem_id=id(self))
        self.pool.used -= self.size
        _tell("free_postprocess", mem_size=self.size, mem_ptr=self.ptr, pmem_id=id(self))


class MemoryPool:
    """cupy.cuda.MemoryPool, without splitting blocks: what is free serves arrays of any size."""

    def __init__(self, allocator: Any = None):
        self.used = self.total = self.limit = 0

    def set_limit(self, size: int | None = None, fraction: float | None = None) -> None:
        """To so many bytes; 0: none."""
        assert fraction is None
        self.limit = size or 0

    def get_limit(self) -> int:
        return self.limit

    def malloc(self, size: int) -> Memory:
        rounded = -(-size // UNIT) * UNIT
        if self.limit and self.used + rounded > self.limit:
            raise OutOfMemoryError(rounded, self.used, self.limit)
        _tell("malloc_preprocess", size=size, mem_size=rounded)
        memory = Memory(self, rounded)
        self.used += rounded
        self.total = max(self.total, self.used)
        _tell("malloc_postprocess", size=size, mem_size=rounded, mem_ptr=memory.ptr,
              pmem_id=id(memory))
        return memory

    def used_bytes(self) -> int:
        return self.used

    def total_bytes(self) -> int:
        """Those in use, and those kept for later."""
        return self.total

    def free_bytes(self) -> int:
        return self.total - self.used

    def free_all_blocks(self, stream: Any = None) -> None:
        self.total = self.used


default_pool = MemoryPool()
_allocator: Callable[[int], Memory] = default_pool.malloc


@contextlib.contextmanager
def using_allocator(allocator: Callable[[int], Memory] | None = None) -> Iterator[None]:
    """New arrays are counted by this allocator's pool; None: by none."""
    global _allocator
    before, _allocator = _allocator, allocator or MemoryPool().malloc
    try:
        yield
    finally:
        _allocator = before


def default_in_use() -> bool:
    return _allocator == default_pool.malloc


def track(array: Any) -> None:
    """Count the memory of a new array of the device, until no array refers to it any more.

    That of a view is known already. A graph keeps memory of NumPy's, but no array.
    """
    owner = array._host
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    if not array._host.nbytes:
        return
    key = id(owner)
    if key not in _known:
        _known[key] = _allocator(array._host.nbytes), set()
    memory, arrays = _known[key]

    def gone(reference: weakref.ref) -> None:
        arrays.discard(reference)
        if not arrays:
            del _known[key]
            memory.free()

    arrays.add(_Identity(array, gone))


class _Identity(weakref.ref):
    """A weak reference that is told from others by itself: arrays have no equality of one bool."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def _tell(event: str, **arguments: Any) -> None:
    for hook in list(_hooks.values()):
        getattr(hook, event)(device_id=0, **arguments)
