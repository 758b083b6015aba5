"""Calls `fused.c`: loops over examples that torch has no op for.

Owns: the C structures, whose threads it uses, and the trial that a library passes before any use.
Does not know: when these are the methods to use (`factors.costs`).
"""

import ctypes
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pergrad.kernels.build import NoKernelError, library, refuse

_SOURCE = Path(__file__).with_name("fused.c")
_TYPES = {torch.float32: ("-DREAL=float", "-DSIZE=4"), torch.float64: ("-DREAL=double", "-DSIZE=8")}
_FUNCTIONS = ("fused_sizes", "fused_norms", "fused_layer", "fused_shift_room")
_TRIAL = "library.fused_sizes(*map(ctypes.c_int64, (37, 16)), (ctypes.c_int64 * 3)())"
_SUMS = 5  # of a task: see fused.c
# Panels of 16 rows that are multiplied with as many others at a time: what they need stays in the
# second cache. If that makes few tasks, blocks are smaller, to keep all threads busy.
_BLOCK, _FEW = 16, 6
_PARTS = 8  # a layer norm's positions are cut until there are so many pieces of work

_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class _Side(ctypes.Structure):
    _fields_ = [("x", _POINTER), *_fields(_INT, "batch group row column width")]


class _Crew(ctypes.Structure):
    _fields_ = [*_fields(_INT, "tasks threads room_each"), ("room", _POINTER),
                *_fields(_INT, "next arrived"), ("serve", _POINTER)]  # fmt: skip


class _Norms(ctypes.Structure):
    _fields_ = [("crew", _Crew), ("g", _Side), ("a", _Side),
                *_fields(_INT, "examples groups T most"),
                *_fields(_POINTER, "sums results"), ("limit", ctypes.c_double),
                *_fields(_INT, "doubtful doubtful_g doubtful_a S grid count"),
                *_fields(_POINTER, "pixels corners offsets")]  # fmt: skip


class _Layers(ctypes.Structure):
    _fields_ = [("crew", _Crew), *_fields(_POINTER, "g x mean scale"),
                *_fields(_INT, "g_batch g_row x_batch x_row T size parts"),
                *_fields(_POINTER, "sums norms")]  # fmt: skip


class Cut(NamedTuple):
    """How the Gram of T positions is cut for a number of matrices."""

    most: int  # panels in a block
    tasks: int  # for each matrix
    room: int  # numbers that each thread needs room for


class Grid(NamedTuple):
    """Where a convolution's pixels and patches lie in a grid of places, that of the padded input.

    -1 for a pixel that no patch has.
    """

    places: int
    pixels: Tensor  # (S,): the place of each
    corners: Tensor  # (T,): the place of each patch's first term
    offsets: Tensor  # (k,): from there to each of its terms


class Norms(NamedTuple):
    """What is known after norms were taken from Grams, by example."""

    results: Tensor  # (6, B): |GᵀA|², |G|²|A|², |Σ_t g_t|², T |G|², |Σ_t a_t|², T |A|²
    doubtful: tuple[int, int, int]  # examples in which the first of a pair is less than its share


class Fused:
    """The library for one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        found = library(_SOURCE, *_TYPES[dtype], functions=_FUNCTIONS, trial=_TRIAL)
        self.dtype, self.library = dtype, found
        self._sizes, self._norms, self._layer, self._shift_room = (
            found.fused_sizes, found.fused_norms, found.fused_layer, found.fused_shift_room,
        )  # fmt: skip
        self._sizes.argtypes, self._sizes.restype = [_INT, _INT, _POINTER], None
        self._norms.argtypes, self._norms.restype = [_POINTER, _POINTER], None
        self._layer.argtypes, self._layer.restype = [_POINTER, _POINTER], None
        self._shift_room.argtypes, self._shift_room.restype = [_INT] * 3, _INT
        self._parallel = _parallel()
        self.cut = lru_cache(maxsize=256)(self._cut)

    def reads(self, *tensors: Tensor) -> bool:
        """Whether these are in memory as they are, and torch's threads can be had."""
        if self._parallel is None and torch.get_num_threads() > 1:
            return False
        return all(
            type(x) is Tensor and x.is_cpu and x.layout == torch.strided and not x.is_neg()
            for x in tensors
        )

    def _cut(self, matrices: int, T: int) -> Cut:
        found = (_INT * 2)()
        for most in (_BLOCK, _BLOCK // 2):
            self._sizes(T, most, found)
            if matrices * found[0] >= _FEW:
                break
        return Cut(most, *found)

    def norms(self, g: Tensor, a: Tensor, cut: Cut, room: Tensor, limit: float) -> Norms:
        """Norms of Gᵀ A for g (B, N, T, p) and a (B, N, T, d), summed over groups.

        The room is for as many threads as are to work.
        """
        return self._served(g, a, cut.most, cut.tasks, cut.room, room, limit)

    def shift_room(self, T: int, places: int) -> int:
        """Numbers that each thread needs room for in `shift_norms`."""
        found: int = self._shift_room(T, places, _BLOCK)
        return found

    def shift_norms(self, g: Tensor, x: Tensor, grid: Grid, room: Tensor, limit: float) -> Norms:
        """The same for the patches of pixels x (B, N, S, c), whose Grams are sums of pixels' Grams.

        What is said about sums over positions is of the pixels.
        """
        each = self.shift_room(g.shape[2], grid.places)
        return self._served(
            g, x, _BLOCK, 1, each, room, limit, x.shape[2], grid.places,
            len(grid.offsets), *(where.data_ptr() for where in grid[1:]),
        )  # fmt: skip

    def _served(
        self, g: Tensor, a: Tensor, most: int, tasks: int, each: int, room: Tensor, limit: float,
        *grid: int,
    ) -> Norms:  # fmt: skip
        B, N, T, _ = g.shape
        sums = g.new_empty(B * N * tasks * _SUMS, dtype=torch.float64)
        results = g.new_empty(6, B, dtype=self.dtype)
        threads = min(room.numel() // each, B * N * tasks)
        crew = _Crew(B * N * tasks, threads, each, room.data_ptr())
        job = _Norms(crew, _side(g), _side(a), B, N, T, most,
                     sums.data_ptr(), results.data_ptr(), limit, 0, 0, 0, *grid)  # fmt: skip
        self._norms(ctypes.byref(job), self._parallel)
        return Norms(results, (job.doubtful, job.doubtful_g, job.doubtful_a))

    def layer(
        self, g: Tensor, x: Tensor, mean: Tensor | None, scale: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Σ_t scale_t (x_t - mean_t) g_t and Σ_t g_t of g and x (B, T, size).

        Each (B, size), and its squared norms (B,).

        Rows of g and x are contiguous, mean and scale (B, T) as well.
        """
        B, T, size = g.shape
        parts = max(1, min(T, _PARTS // B))
        sums, norms = g.new_empty(B, parts, 2, size), g.new_empty(2, B)
        threads = min(torch.get_num_threads(), B * parts)
        room = g.new_empty(threads * 2 * size)
        job = _Layers(_Crew(B * parts, threads, 2 * size, room.data_ptr()),
                      g.data_ptr(), x.data_ptr(), None if mean is None else mean.data_ptr(),
                      scale.data_ptr(), *g.stride()[:2], *x.stride()[:2], T, size, parts,
                      sums.data_ptr(), norms.data_ptr())  # fmt: skip
        self._layer(ctypes.byref(job), self._parallel)
        return (sums[:, 0, 0], norms[0]), (sums[:, 0, 1], norms[1])


def _side(x: Tensor) -> _Side:
    return _Side(x.data_ptr(), *x.stride(), x.shape[3])


@lru_cache(maxsize=64)
def grid_of(
    size: Sequence[int], out: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Grid:  # fmt: skip
    """The grid of a convolution over an input of some size."""
    cpu = torch.device("cpu")  # also where the user's default is another
    pixels = corners = offsets = torch.zeros(1, dtype=torch.int64, device=cpu)
    inside, places = torch.ones(1, dtype=torch.bool, device=cpu), 1
    for n, o, k, s, p, e in zip(size, out, kernel, stride, padding, dilation, strict=True):
        width = s * (o - 1) + e * (k - 1) + 1
        at = torch.arange(n, device=cpu) + p
        pixels = (pixels[:, None] * width + at).flatten()
        inside = (inside[:, None] & (at < width)).flatten()
        corners = (corners[:, None] * width + s * torch.arange(o, device=cpu)).flatten()
        offsets = (offsets[:, None] * width + e * torch.arange(k, device=cpu)).flatten()
        places *= width
    return Grid(places, pixels.where(inside, -1), corners, offsets)


def fused(device: torch.device, dtype: torch.dtype) -> Fused | None:
    """The library for products on a device in a dtype, compiled now if it has never been."""
    found = _fused(dtype) if device.type == "cpu" else None
    return found if isinstance(found, Fused) else None


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no library for them; None if there is one."""
    found = _fused(dtype) if device.type == "cpu" else f"not on {device.type} so far"
    return found if isinstance(found, str) else None


@lru_cache(maxsize=8)
def _fused(dtype: torch.dtype) -> Fused | str:
    if dtype not in _TYPES:
        return f"not in {dtype}"
    try:
        found = Fused(dtype)
    except NoKernelError as error:
        return str(error)
    except Exception as error:  # a library is never worth an error to who asks for norms
        return f"what was compiled cannot be used: {type(error).__name__}: {error}"
    try:
        _try(found)
    except Exception as error:
        refuse(found.library, str(error))
        return str(error)
    return found


def _try(found: Fused) -> None:
    """What was compiled must agree with torch on this machine before it is used."""
    with torch.no_grad(), torch.inference_mode(False), torch.device("cpu"):
        make = torch.Generator().manual_seed(0)  # not the user's
        for T, p, d in ((37, 300, 21), (300, 5, 18)):
            g = torch.randn(2, 2, T, p, dtype=found.dtype, generator=make)
            a = torch.randn(2, 2, d, T, dtype=found.dtype, generator=make).mT
            expected = (g.double().mT @ a.double()).square().sum((1, 2, 3))
            cut = found.cut(4, T)
            room = torch.empty(cut.room, dtype=found.dtype)
            off = (found.norms(g, a, cut, room, 1.0).results[0] / expected - 1).abs().max().item()
            if not off < 1e3 * torch.finfo(found.dtype).eps:
                raise NoKernelError(f"what was compiled is wrong by {off:.1e} on this machine")


@lru_cache(maxsize=1)
def _parallel() -> int | None:
    """The address at which the OpenMP runtime that torch has loaded runs a function in parallel.

    None if there is no such runtime. Its own pool, since threads of another would compete with
    those that wait in it for their next task.
    """
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[-1].strip() for line in maps}
    except OSError:
        return None
    runtimes = [x for x in paths if re.search(r"/lib(gomp|omp|iomp5)[^/]*$", x)]
    for path in sorted(runtimes, key=lambda x: "torch" not in x):
        try:
            found = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(found, ctypes.c_void_p).value
    return None
