"""Squared norms whose doubtful examples are looked at later.

Owns: what waits to be looked at, and for how long.
Does not know: who doubts (`factors.guard`), who adds the norms up.

A Gram's norms are held against their sizes, and the few examples that lost digits are taken again
another way. To know whether there are any, the CPU has to read a number; from a GPU that means to
wait until it has done all that it was told, at every use of a parameter, and to leave it without
work afterwards. So the answers are fetched while both go on, and read when they have come.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pergrad.engine.user_state import Held
from pergrad.factors import Factor, Placed
from pergrad.factors.guard import Again
from pergrad.factors.numeric import bytes_of, flat, reading_waits, tracing
from pergrad.factors.workspace import limit
from pergrad.recording import flagged, is_recorded

Add = Callable[[Tensor], None]


def adding_to(found: dict[str, Tensor], dtype: torch.dtype) -> Callable[[str, Tensor], None]:
    """A function that adds squared norms to those of the same name."""

    def add(name: str, squares: Tensor) -> None:
        squares = squares.to(torch.promote_types(dtype, squares.dtype))
        found[name] = found[name] + squares if name in found else squares

    return add


@dataclass(slots=True)
class _Doubt:
    """Examples of one parameter that may have to be taken again."""

    name: str
    held: Held
    doubtful: Tensor
    any: Callable[[], bool]
    again: Again
    add: Add
    size: int
    stream: torch.cuda.Stream | None  # the one that made all these, whose memory it is

    def resolve(self) -> None:
        """Add what was left out, if anything was."""
        if not self.any():
            return
        self.held.check(self.name)
        if self.stream is None:
            self.add(self._missing())
            return
        with torch.cuda.stream(self.stream):
            missing = self._missing()
        here = torch.cuda.current_stream(missing.device)
        here.wait_stream(self.stream)
        missing.record_stream(here)
        self.add(missing)

    def _missing(self) -> Tensor:
        """(B,): 0 where there is no doubt."""
        rows = self.doubtful.nonzero()[:, 0]
        squares = self.again(rows)
        return squares.new_zeros(len(self.doubtful)).index_copy(0, rows, squares)


class Doubts:
    """Squared norms of many factors, handed on at once; what is missing in them, later."""

    def __init__(self) -> None:
        self._waiting: deque[_Doubt] = deque()
        self.held = 0  # bytes of the factors that wait

    def sq_norms(self, name: str, factor: Factor, add: Add) -> None:
        """Call `add` with the squared norms (B,) of a parameter of this name.

        And, during `settle` at the latest, with what has to be added to them.
        """
        if isinstance(factor, Placed):  # zeros of the others are not looked at again
            placed = factor
            self.sq_norms(name, placed.factor, lambda squares: add(placed.spread(squares)))
            return
        norms = factor.sq_norms_and_doubts()
        values, doubtful, again = norms
        if is_recorded():
            flagged(_outside(values, factor) if doubtful is None else doubtful)
            add(values)
            return
        if doubtful is None or again is None:
            add(within_range(values, factor))
            return
        if not reading_waits(factor.device) or tracing(*factor.tensors()):
            add(within_range(norms.settled(), factor))
            return
        add(values.masked_fill(doubtful, 0))
        size = bytes_of(factor.tensors())
        stream = torch.cuda.current_stream(factor.device) if doubtful.is_cuda else None
        asked = _fetched(doubtful.any())
        self._waiting.append(_Doubt(name, Held(factor), doubtful, asked, again, add, size, stream))
        self.held += size
        self._settle(limit(factor.device))

    def settle(self) -> None:
        """Nothing is missing afterwards.

        Raises:
            UsageError: what an example has to be computed from again was overwritten meanwhile.
        """
        self._settle(0)

    def _settle(self, most: int) -> None:
        """The oldest first, whose answers have come: until no more than so many bytes are held."""
        while self.held > most:
            doubt = self._waiting.popleft()
            self.held -= doubt.size
            doubt.resolve()


# Squares of float32 lose digits below 2⁻¹²⁶ and overflow at 2¹²⁸; here there is room for sums.
_LEAST, _MOST = 2.0**-100, 2.0**126
_FEW = 64  # numbers that Python looks through sooner than torch


def within_range(squares: Tensor, factor: Factor) -> Tensor:
    """(B,): in float64 if an example's gradient is too small or too large to be squared in float32.

    Which is so for gradients below 1e-15, those of solved examples, and above 1e19.
    """
    if in_range(squares):
        return squares
    outside = ~((squares >= _LEAST) & (squares <= _MOST))
    rows, part = outside.nonzero()[:, 0], factor.select(outside)
    if part.multilinear:  # solved examples have gradients that are simply zero, in every parameter
        alive = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        for tensor in part.tensors():
            if tensor.is_floating_point() and tensor.numel():
                alive &= torch.linalg.vector_norm(flat(tensor), float("inf"), dim=1) != 0
                if not alive.any():
                    return squares
        rows, part = rows[alive], part.select(alive)
    again = part.to(dtype=torch.float64).sq_norms()
    return squares.double().index_copy(0, rows, again)


def in_range(squares: Tensor) -> bool:
    """Whether these (B,) are as good as they can be: none was too small or too large to square."""
    if squares.dtype != torch.float32 or squares.requires_grad or squares.device.type != "cpu":
        return True
    if squares.shape[0] <= _FEW:  # at every parameter of every pass
        few = squares.tolist()
        return not few or (min(few) >= _LEAST and sum(few) <= _MOST)  # the sum is NaN where one is
    return torch.equal(squares.clamp(_LEAST, _MOST), squares)  # NaN equals nothing


def _outside(squares: Tensor, factor: Factor) -> Tensor:
    """(B,) of bool: whose squares `within_range` would take again. Read by nobody."""
    outside = ~((squares >= _LEAST) & (squares <= _MOST))
    if factor.multilinear:
        for tensor in factor.tensors():
            if tensor.is_floating_point() and tensor.numel():
                outside = outside & (flat(tensor).abs().amax(1) != 0)
    return outside


def _fetched(flag: Tensor) -> Callable[[], bool]:
    """A number on its way to the CPU: waits for it when called, and for nothing that came after."""
    if not flag.is_cuda:
        return lambda: bool(flag)
    here = torch.empty((), dtype=flag.dtype, device="cpu", pin_memory=True)
    here.copy_(flag, non_blocking=True)
    come = torch.cuda.Event()
    come.record(torch.cuda.current_stream(flag.device))

    def value() -> bool:
        come.synchronize()
        return bool(here)

    return value
