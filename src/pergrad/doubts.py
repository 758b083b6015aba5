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

from pergrad.factors import Factor
from pergrad.factors.guard import Again, postponed
from pergrad.factors.numeric import bytes_of, reading_waits, tracing
from pergrad.factors.workspace import limit
from pergrad.held import Held

Add = Callable[[Tensor], None]


def adding_to(found: dict[str, Tensor], dtype: torch.dtype) -> Callable[[str, Tensor], None]:
    """A function that adds squared norms to those of the same name."""

    def add(name: str, squares: Tensor) -> None:
        squares = squares.to(dtype)
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
        later = factor.guarded and reading_waits(factor.device)
        if not later or tracing(*factor.tensors()):
            add(factor.sq_norms())
            return
        with postponed() as found:
            squares = factor.sq_norms()
        add(squares)
        if not found:
            return
        ((doubtful, again),) = found  # the factor's own: it is `guarded`
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
