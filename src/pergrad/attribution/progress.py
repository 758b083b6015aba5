"""How far a long call has come, for whoever wants to know.

Owns: who is told, and what: the name of a pass, how much of it is done, and how much there is.
Does not know: what is computed, or what a bar looks like.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pergrad.extras import need

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


@contextmanager
def bars(wanted: bool) -> Iterator[None]:
    """A bar on stderr for each pass that is told of, unless somebody listens already."""
    if not wanted or _listener.get() is not None:
        yield
        return
    need("attribution", "rich")
    drawn = random.getstate()
    from pergrad.scans.progress import passes

    random.setstate(drawn)  # rich draws a number when it is imported

    with passes() as shown, listening(shown):
        yield


def tell(what: str, done: int, total: int) -> None:
    """Say how far a pass has come."""
    listener = _listener.get()
    if listener is not None:
        listener(what, done, total)
