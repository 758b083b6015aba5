"""How much memory temporaries may take, cutting work to fit, and the buffer that is used again.

Owns: the budget in bytes (`limit`, `workspace`), the chunks that respect it, and `lent`.
Does not know: factors. A chunk size never changes a result beyond rounding.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from math import prod

import torch
from torch import Tensor

from pergrad.recording import is_recorded

DEFAULT_BYTES = 256 * 2**20
SHARE_OF_FREE = 8  # at most one part in eight of what is free
# A temporary that is written and read again at once should not leave the CPU's caches: measured,
# a 4 MiB buffer is as fast as a smaller one and a fresh one of 100 MiB is three times slower.
CACHE_BYTES = 4 * 2**20
# malloc has less than this at hand: a fresh temporary takes no longer than one that is used again.
SMALL_BYTES = 128 * 2**10
# What a kernel needs for each thread at most times; so much is kept between passes.
THREAD_BYTES = 2 * 2**20
# What glibc keeps at most at the end of its heap, for a process that has freed a large tensor.
HEAP_END_BYTES = 64 * 2**20


class _Share:
    """A share of a device's free memory: asked for once, when the first temporary wants to know.

    The answer takes as long as a small matrix product.
    """

    __slots__ = ("_device", "_size")

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._size = 0

    @property
    def size(self) -> int:
        """Bytes."""
        if not self._size:
            self._size = _share_of_free(self._device)
        return self._size


_budget: ContextVar[int | _Share | None] = ContextVar("pergrad_workspace", default=None)


@contextmanager
def workspace(size: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Temporaries inside this block stay near `size` bytes; None is the default share.

    That is one of the device's free memory, or of the computer's. Nor is any product rounded on the
    way: autocast is off.
    """
    if size is not None and size <= 0:
        raise ValueError(f"The budget for temporary buffers must be positive, not {size} bytes.")
    outside = _budget.get()
    inside = size if size is not None else outside if outside is not None else _Share(device)
    token = _budget.set(inside)
    try:
        with _nothing_cast():
            yield
    finally:
        _budget.reset(token)


class _Kept(threading.local):
    """A thread's own buffer on the CPU, as large as any that was lent, and not small."""

    def __init__(self) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu")
        self.most = CACHE_BYTES
        self.free = True

    def renew(self) -> None:
        """Other memory of the size that was needed at most."""
        with torch.inference_mode(False):  # else it could not be written outside that mode
            # no torch.empty, which writes to all of it if asked for deterministic algorithms
            memory = torch.UntypedStorage(self.most, device="cpu")
            self.buffer = torch.empty(0, dtype=torch.uint8, device="cpu").set_(memory)


_kept = _Kept()


def pass_begins(device: torch.device, held: int) -> None:
    """A pass begins on this device, whose ops returned `held` bytes; see `lent`."""
    if held < CACHE_BYTES or device.type != "cpu" or not _kept.free or is_recorded():
        return
    # With cotangents of the same size less stays in the heap's end, which is not given back. There
    # a block would only be in the way: what lies below it is used again, what it takes is not.
    if 2 * held >= HEAP_END_BYTES:
        _kept.renew()


def _nothing_cast() -> AbstractContextManager[object]:
    """Autocast off, where it is on."""
    on = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if not on:
        return nullcontext()
    stack = ExitStack()
    for kind in on:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


@contextmanager
def lent(count: int, dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """Room for `count` numbers, flat, with whatever is in it; not to be used after the block.

    On a CPU it is the same memory throughout a pass, and kept until the next. That spares more than
    the page faults of fresh memory: a pass frees all that it had, malloc gives the pages at the end
    of its heap back to the system, and the next pass pays for them again (for a small transformer
    30,000 page faults, a tenth of the time). A block that stays where a pass needs most memory
    prevents that. So each pass takes a new one at its beginning, when all activations are there,
    before it returns the last one's; also where nothing will be lent. What nobody writes to is no
    memory but addresses. A small model's pass, whose activations take less than the block, returns
    no pages worth the trouble.
    """
    size = count * dtype.itemsize
    kept = _kept
    most = max(CACHE_BYTES, THREAD_BYTES * torch.get_num_threads())
    if device.type != "cpu" or size > most or not kept.free or is_recorded():
        yield torch.empty(count, dtype=dtype, device=device)
        return
    kept.most = max(kept.most, size)
    if not kept.buffer.numel():  # products in a thread that has had no pass
        kept.renew()
    if size > kept.buffer.numel():
        yield torch.empty(count, dtype=dtype, device=device)
        return
    kept.free = False
    try:
        yield kept.buffer[:size].view(dtype)
    finally:
        kept.free = True


def limit(device: torch.device | None = None) -> int:
    """Bytes that temporaries may take now, on this device."""
    chosen = _budget.get()
    if chosen is None:
        return _share_of_free(device)
    return chosen if isinstance(chosen, int) else chosen.size


def _share_of_free(device: torch.device | None) -> int:
    free = free_bytes(device)
    return DEFAULT_BYTES if free is None else max(2**20, min(DEFAULT_BYTES, free // SHARE_OF_FREE))


def scratch(device: torch.device) -> int:
    """Bytes for one buffer that is filled and read over and over: cache-sized on a CPU."""
    return min(limit(device), CACHE_BYTES) if device.type == "cpu" else limit(device)


def free_bytes(device: torch.device | None) -> int | None:
    """Free memory, None where the platform does not tell."""
    try:
        if device is not None and device.type == "cuda":
            # the caching allocator holds memory that the driver counts as taken
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return torch.cuda.mem_get_info(device)[0] + cached
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError, RuntimeError):
        return None


def chunks(count: int, bytes_each: int, budget: int) -> list[slice]:
    """Cut range(count) into slices of about `budget` bytes and equal size, one item at least."""
    most = max(1, budget // max(1, bytes_each))
    # not 7 + 1 of 8: a small last piece keeps one thread busy and the others waiting
    step = -(-count // max(1, -(-count // most)))
    return [slice(lo, min(lo + step, count)) for lo in range(0, count, step or 1)]


def by_chunks(
    count: int,
    bytes_each: int,
    fill: Callable[[slice], Tensor],
    *,
    like: Tensor,
    tail: tuple[int, ...] = (),
    budget: int | None = None,
) -> Tensor:
    """Concatenate fill(slice) over chunks of the first dimension: (count, *tail)."""
    pieces = [
        fill(piece)
        for piece in chunks(count, bytes_each, limit(like.device) if budget is None else budget)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat(pieces) if pieces else like.new_zeros((0, *tail))


def row_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of one dense row of this shape."""
    return prod(shape) * dtype.itemsize
