"""Tensors on which the user called `retain_grad()`, left as they were.

Owns: finding them, and putting their `.grad` back.
Does not know: the graph. torch adds to their `.grad` in every backward pass, and a node does not
tell whose gradient it retains, so they are looked for among Python's objects.
"""

import atexit
import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

# After so many collections between which nobody asked, nobody is likely to ask.
_PATIENCE = 50


@contextmanager
def retained_untouched() -> Iterator[None]:
    """Whatever passes run inside, `.grad` of tensors with retain_grad() is as before."""
    before = [(tensor, tensor.grad) for tensor in _old.retained()]
    try:
        yield
    finally:
        for tensor, grad in before:
            tensor.grad = grad


class _Old:
    """Tensors with a history that have outlived a collection of Python's garbage collector.

    Those of the latest forward pass are mostly its newest objects, at most some hundred: these are
    looked through at every pass. Looking through all objects of the process takes tens of
    milliseconds, so that is done once; later ones are seen when a collection is about to make them
    older.
    """

    def __init__(self) -> None:
        self._known: list[weakref.ref[Tensor]] = []
        self._watching = False
        self._collections = 0  # since somebody asked

    def retained(self) -> list[Tensor]:
        """Those on which retain_grad() has been called, new ones too."""
        self._collections = 0
        if not self._watching:
            # first the watch, then the search, the younger first: what ages meanwhile is found
            # twice, and never missed
            gc.callbacks.append(self._before_collection)
            self._watching = True
            for generation in (1, 2):
                self._remember(generation)
        found = {id(t): t for t in _with_history(gc.get_objects(0))}
        found.update((id(t), t) for ref in list(self._known) if (t := ref()) is not None)
        return [t for t in found.values() if t.retains_grad]

    def _before_collection(self, phase: str, info: dict[str, int]) -> None:
        if phase != "start":
            return
        if info["generation"] > 0:
            self._collections += 1
            if self._collections > _PATIENCE:
                self.stop()
                return
            # one list for good: a collection may come in the middle of whatever reads it
            self._known[:] = [ref for ref in self._known if ref() is not None]
        self._remember(0)

    def _remember(self, generation: int) -> None:
        found = _with_history(gc.get_objects(generation))
        self._known.extend([weakref.ref(t) for t in found])

    def stop(self) -> None:
        """Look at no collection any more; the next pass looks through all objects again."""
        self._watching = False
        self._known.clear()
        with suppress(ValueError):
            gc.callbacks.remove(self._before_collection)


_old = _Old()
atexit.register(_old.stop)  # the last collections find modules in pieces


def _with_history(objects: Iterable[Any]) -> list[Tensor]:
    return [o for o in objects if type(o) is Tensor and o.requires_grad]
