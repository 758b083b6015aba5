"""Tensors on which the user called `retain_grad()`, left as they were.

Owns: finding them, and putting their `.grad` back.
Does not know: the graph. torch adds to their `.grad` in every backward pass, and a node does not
tell whose gradient it retains, so they are looked for among Python's objects.
"""

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

# Tensors of the latest forward pass are among the collector's young objects, of which there are
# few. Looking through all objects takes tens of milliseconds, so that is done only after the
# collector has moved young objects on; what was found then is remembered.
_known: list[weakref.ref[Tensor]] = []
_promotions = -1


@contextmanager
def retained_untouched() -> Iterator[None]:
    """Whatever passes run inside, `.grad` of tensors with retain_grad() is as before."""
    before = [(tensor, tensor.grad) for tensor in _retained()]
    try:
        yield
    finally:
        for tensor, grad in before:
            tensor.grad = grad


def _retained() -> list[Tensor]:
    global _known, _promotions
    promotions = gc.get_stats()[1]["collections"]
    found = {id(t): t for ref in _known if (t := ref()) is not None}
    generations: Iterable[int] = (0, 1)
    if promotions != _promotions:
        generations, _promotions = (0, 1, 2), promotions
    for generation in generations:
        found.update((id(t), t) for t in _among(gc.get_objects(generation)))
    _known = [weakref.ref(t) for t in found.values()]
    return list(found.values())


def _among(objects: Iterable[Any]) -> list[Tensor]:
    return [o for o in objects if type(o) is Tensor and o.retains_grad]
