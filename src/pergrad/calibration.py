"""What this machine is good at: the constants of the cost model, measured.

Owns: the cases that are timed, and the fit of `Constants` to the times.
Does not know: where constants are kept (`factors.constants`).
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from pergrad.errors import UsageError
from pergrad.factors import (
    Correlation,
    Outer,
    Rows,
    costs,
)
from pergrad.factors.constants import Constants, constants, keep, machine
from pergrad.factors.correlation import norms as correlation_norms
from pergrad.factors.methods import choice, fused, grams
from pergrad.factors.outer import norms as outer_norms
from pergrad.factors.outer import products as outer_products
from pergrad.factors.rows import products as rows_products
from pergrad.factors.workspace import workspace
from pergrad.kernels import why_not

# Each constant is tried at these multiples of what it was, until none helps any more.
_STEPS = (0.35, 0.5, 0.7, 1.4, 2.0, 2.8)
_ROUNDS = 6
_LEAST_GAIN = 0.005  # of the time: less is noise
_MANY = 10
_REPETITIONS = 5
_ENOUGH = 0.05  # seconds for one method of one case


@dataclass(frozen=True, slots=True)
class Case:
    """One product, how long each method took, and which one given constants would choose.

    A method that was not timed is known to take many times longer.
    """

    what: str
    seconds: dict[str, float]
    choose: Callable[[Constants], str]

    def loss(self, by: Constants) -> float:
        """The time lost to the fastest method, as a share of its time."""
        best = min(self.seconds.values())
        return self.seconds.get(self.choose(by), _MANY * best) / best - 1


@dataclass(frozen=True, slots=True)
class Calibration:
    """What `pergrad.calibrate` found: constants of the cost model, and what they are worth."""

    device: str  # in words
    dtype: torch.dtype
    constants: dict[str, float]
    loss: float  # time lost by the choices to the fastest methods, as a share
    loss_before: float  # the same with the constants that held before
    cases: tuple[Case, ...]
    file: Path | None  # where the constants are kept; None: nowhere
    no_kernel: str | None  # why nothing was compiled for this device and dtype; None: it was

    def __repr__(self) -> str:
        compiled = "with compiled kernels" if self.no_kernel is None else (
            f"without compiled kernels: {self.no_kernel}"
        )  # fmt: skip
        return (
            f"Calibration({self.device}, {self.dtype}: over {len(self.cases)} products the choice "
            f"of method loses {self.loss:.1%} of the time to the best one, {self.loss_before:.1%} "
            f"before; {compiled}; kept in {self.file or 'this process only'})"
        )


def calibrate(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Calibration:
    """Measure which of its exact methods are fastest here, and choose by that from now on.

    pergrad takes a norm or an inner product in one of several ways, whichever costs least. What
    they cost is counted in multiply-adds, weighed with constants that were measured on one CPU.
    This measures them on yours: say it once per machine, device and dtype, with the number of
    threads that you work with. It changes how long pergrad takes, and of the results only the
    rounding.

    Args:
        device: where to measure.
        dtype: of the products. Half precision is multiplied in float32, so that is measured for it.

    Returns:
        A Calibration: `.constants`, `.loss` and `.loss_before` (the share of time that the choices
        lose to the fastest methods), `.cases` with all times, `.file`, and `.no_kernel` (why
        nothing could be compiled for this machine; None if it could). The constants are kept in the
        folder `~/.cache/pergrad/costs`, or the one that the environment variable PERGRAD_COSTS
        names (empty: none), and read by later processes on machines of the same kind, with as many
        threads.

    Raises:
        UsageError: another dtype, or a device that is not there.

    Cost: a few seconds, 200 MB.

        >>> import pergrad
        >>> found = pergrad.calibrate()
        >>> found.loss <= found.loss_before
        True
    """
    device = _present(device)
    if dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise UsageError(
            f"Products in {dtype!r} are not measured; pass torch.float32 or torch.float64."
        )
    before = constants(device, dtype)
    with workspace(None, device), torch.no_grad():
        cases = tuple(measure(device, dtype))
    found = fit(cases, before)
    path = keep(device, dtype, found)
    return Calibration(
        machine(device, torch.get_num_threads()),
        dtype,
        {name: getattr(found, name) for name in Constants.__slots__},
        _loss(cases, found),
        _loss(cases, before),
        cases,
        path,
        why_not(device, dtype),
    )


def _present(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        first = str(error).partition("\n")[0]
        raise UsageError(
            f"There is no device {device!r} to measure on ({first}). Pass one that this torch "
            'sees, such as "cpu".'
        ) from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(
            f'Nothing can be timed on {str(found)!r} so far: pass "cpu" or "cuda". Elsewhere '
            "pergrad goes by the constants of a CPU."
        )
    return found


def fit(cases: tuple[Case, ...], start: Constants) -> Constants:
    """Constants near `start` whose choices lose the least time.

    Least squares on the times would be simpler, and worse: a method's time matters only where
    another is about as fast.
    """
    best, least = start, _loss(cases, start)
    for _ in range(_ROUNDS):
        at_first = least
        for name in Constants.__slots__:
            for step in _STEPS:
                value = float(f"{getattr(best, name) * step:.3g}")
                tried = replace(best, **{name: value})
                loss = _loss(cases, tried)
                if loss < least - _LEAST_GAIN:
                    best, least = tried, loss
        if least == at_first:
            break
    return best


def _loss(cases: tuple[Case, ...], by: Constants) -> float:
    return sum(case.loss(by) for case in cases) / len(cases)


# (B, T, p, d) of linear layers, on both sides of where the methods are equally fast.
_NORMS = [
    (8, 128, 768, 768), (64, 16, 512, 512), (16, 128, 256, 256), (64, 49, 128, 128),
    (64, 64, 128, 128), (8, 197, 192, 768), (4, 512, 512, 512), (16, 256, 256, 1024),
    (16, 256, 256, 256), (1, 1024, 768, 768), (64, 32, 64, 64), (2, 512, 768, 768),
]  # fmt: skip
_DOTS = [
    (8, 128, 512, 512), (32, 8, 512, 512), (32, 32, 128, 128), (16, 64, 256, 256),
    (8, 64, 768, 768),
]  # fmt: skip
_GRAMS = [(16, 16, 256, 256), (16, 64, 256, 256), (32, 8, 128, 128), (8, 128, 512, 512)]
# (B, T, table, width) of embeddings.
_ROWS = [(16, 128, 1000, 256), (16, 128, 16000, 256), (64, 32, 30000, 128), (64, 64, 300, 64)]
_SHIFTED = 16  # pixels: above that, shifts take up to a thousand times longer than the rest
# (B, channels out, channels in, size, kernel, stride, groups) of convolutions.
_CONVOLUTIONS = [
    (16, 64, 64, 32, 3, 1, 1), (16, 128, 128, 16, 3, 1, 1), (16, 256, 256, 8, 3, 1, 1),
    (16, 512, 512, 4, 3, 1, 1), (32, 64, 3, 32, 3, 1, 1), (16, 64, 64, 32, 3, 1, 4),
    (16, 64, 64, 32, 3, 1, 64), (16, 128, 64, 16, 3, 2, 1), (64, 6, 1, 28, 5, 1, 1),
    (16, 128, 64, 16, 1, 2, 1),
]  # fmt: skip


def measure(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Every case, timed on a device."""
    at = _Bench(device, dtype)
    yield from (at.norms(*sizes) for sizes in _NORMS)
    yield from (at.dots(*sizes) for sizes in _DOTS)
    yield from (at.gram(*sizes) for sizes in _GRAMS)
    yield from (at.rows(*sizes) for sizes in _ROWS)
    yield from (at.convolution(*sizes) for sizes in _CONVOLUTIONS)


class _Bench:
    """Random factors in a dtype on a device, and how long their products take there."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator(device).manual_seed(0)  # not the user's

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device, dtype=self.dtype, generator=self._generator)

    def _numbers(self, below: int, *sizes: int) -> Tensor:
        return torch.randint(below, sizes, device=self.device, generator=self._generator)

    def _outer(self, B: int, T: int, p: int, d: int) -> Outer:
        return Outer(self._random(B, T, p), self._random(B, T, d))

    def _seconds(self, run: Callable[[], object]) -> float:
        """The median of a few runs after one that does not count."""
        taken: list[float] = []
        for _ in range(1 + _REPETITIONS):
            self._wait()
            start = time.perf_counter()
            run()
            self._wait()
            taken.append(time.perf_counter() - start)
            if len(taken) > 2 and sum(taken[1:]) > _ENOUGH:
                break
        return median(taken[1:])

    def _timed(
        self, what: str, choose: Callable[[Constants], str], **methods: Callable[[], object]
    ) -> Case:
        seconds = {name: self._seconds(run) for name, run in methods.items()}
        return Case(what, seconds, choose)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def norms(self, B: int, T: int, p: int, d: int) -> Case:
        """Squared norms of linear layers."""
        f = self._outer(B, T, p, d)
        kernel = fused.kernel_for(f.g, f.a)
        sizes = outer_norms.Sizes(T, p, d, kernel is not None)
        methods: dict[str, Callable[[], object]] = {
            "gram": lambda: grams.gram(f.g, f.a),
            "direct": lambda: outer_norms.direct(f.g, f.a),
        }
        if kernel is not None:
            methods["fused"] = partial(fused.fused_gram, kernel, f.g, f.a)
        return self._timed(
            f"norms, B={B} T={T}, {d} to {p}",
            lambda by: choice.cheapest(outer_norms.METHODS, sizes, by).name,
            **methods,
        )

    def dots(self, B: int, T: int, p: int, d: int) -> Case:
        """Products row by row."""
        f, h = self._outer(B, T, p, d), self._outer(B, T, p, d)
        return self._timed(
            f"row by row, B={B} T={T}, {d} to {p}",
            lambda by: costs.outer_dot_method(T, T, p, d, by),
            gram=lambda: outer_products.guarded_dot(f, h),
            direct=lambda: outer_products.direct_dot(f, h),
        )

    def gram(self, B: int, T: int, p: int, d: int) -> Case:
        """All pairs."""
        f, h = self._outer(B, T, p, d), self._outer(B, T, p, d)
        return self._timed(
            f"all pairs, B={B} T={T}, {d} to {p}",
            lambda by: costs.outer_gram_method(B, B, T, T, p, d, by=by),
            gram=lambda: outer_products.guarded_gram(f, h),
            tiles=lambda: outer_products.tile_gram(f, h),
        )

    def rows(self, B: int, T: int, table: int, width: int) -> Case:
        """All pairs of embeddings' gradients."""
        f, h = (
            Rows(
                self._numbers(table, B, T),
                self._random(B, T, width),
                (table, width),
            )
            for _ in range(2)
        )
        # how many examples look each row up, on both sides
        one, two = (torch.bincount(x.segments()[0].cpu() % table, minlength=table) for x in (f, h))
        pairs, ids = int(one @ two), int((one * two > 0).sum())

        def choose(by: Constants) -> str:
            return "join" if costs.join_is_cheaper(pairs, B, B, ids, width, by) else "tables"

        return self._timed(
            f"all pairs, B={B} T={T}, rows of {table} by {width}",
            choose,
            join=lambda: rows_products.gram(f, h, "join"),
            tables=lambda: rows_products.gram(f, h, "tables"),
        )

    def convolution(
        self, B: int, p: int, d: int, size: int, kernel: int, stride: int, groups: int
    ) -> Case:
        """Squared norms of convolutions."""
        padding = kernel // 2
        out = (size + 2 * padding - kernel) // stride + 1
        f = Correlation(
            self._random(B, p, out, out), self._random(B, d, size, size), kernel=(kernel,) * 2,
            stride=(stride,) * 2, padding=(padding,) * 2, dilation=(1, 1), groups=groups,
        )  # fmt: skip
        patches = f.method_by(constants(self.device, self.dtype), correlation_norms.PATCHES)
        methods = {"patches": partial(_settled, f, patches)}
        for method in correlation_norms.WITHOUT_PATCHES:
            long = "shift" in method.name and (out > _SHIFTED or groups > 1)
            if method.available(f.norm_sizes) and not long:
                methods[method.name] = partial(_settled, f, method)

        def choose(by: Constants) -> str:
            method = f.method_by(by)
            return "patches" if method in correlation_norms.PATCHES else method.name

        what = f"norms, B={B}, {d} to {p}, {kernel} x {kernel} on {size} x {size}"
        what += f" by {stride}" * (stride > 1) + f", {groups} groups" * (groups > 1)
        return self._timed(what, choose, **methods)


def _settled(f: Correlation, method: choice.Method) -> Tensor:
    return f.sq_norms_by(method).settled()
