"""How far a long call has come, for whoever wants to know.

Owns: who is told, and what: the name of a pass, how much of it is done, and how much there is.
Does not know: what is computed, or how its progress is shown.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]

_listener: ContextVar[Listener | None] = ContextVar("pergrad_progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Meanwhile `listener(what, done, total)` is called now and then."""
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)


def tell(what: str, done: int, total: int) -> None:
    """Say how far a pass has come."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)
