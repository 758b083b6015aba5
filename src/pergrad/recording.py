"""What is computed is recorded, for a graph of its own that runs later on other numbers.

Owns: whether this is so, what such a graph has to flag, and what it may take from the first time.
Does not know: who records, what is computed.

Nobody can branch on numbers then: the recorded ops are those that a device is told which runs
behind the CPU. Where examples would be looked at again, or something was read that may differ the
next time, a flag says so, and the caller has to compute without the graph.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar, cast

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_Read = TypeVar("_Read")


@dataclass(slots=True)
class Recording:
    """What is computed once with numbers, and then the same once for any."""

    flags: list[Tensor] = field(default_factory=list)  # (): true where the graph does not hold
    read: list[object] = field(default_factory=list)  # in order
    replayed: int | None = None  # how many of those have been used; None: with numbers

    @contextmanager
    def active(self, *, again: bool = False) -> Iterator[list[Tensor]]:
        """Within: what is computed is recorded; with `again` for any numbers. Gives the flags."""
        self.flags, self.replayed = [], 0 if again else None
        if not again:
            self.read = []
        token = _now.set(self)
        try:
            yield self.flags
        finally:
            _now.reset(token)


_now: ContextVar[Recording | None] = ContextVar("recording", default=None)


def is_recorded() -> bool:
    """Whether what is computed is recorded."""
    return _now.get() is not None


def flagged(doubtful: Tensor) -> None:
    """Where any of these bools is true, the graph does not hold."""
    now = _now.get()
    assert now is not None
    now.flags.append(doubtful.any())


def read(function: Callable[[], _Read]) -> _Read:
    """What `function` reads in numbers; in a record what it read at that place before.

    The caller has to flag where it would read something else that matters.
    """
    now = _now.get()
    if now is None:
        return function()
    if now.replayed is None:
        now.read.append(function())
        return cast(_Read, now.read[-1])
    now.replayed += 1
    return cast(_Read, now.read[now.replayed - 1])


def constants() -> AbstractContextManager[object]:
    """Within: numbers as ever, which do not depend on the batch and are constants of the record."""
    return _disable_current_modes() if is_recorded() else nullcontext()
