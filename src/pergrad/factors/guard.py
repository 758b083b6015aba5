"""Whether a Gram's result may be trusted.

Owns: the limit of κ, the examples above it, and whether these are looked at now or later.
Does not know: what is done instead, and when it is later.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# κ² = |A|²|G|² / |AᵀG|². A Gram's terms are of size |A|²|G|² and cancel down to |AᵀG|², so its
# relative error is at most about u κ² (in practice a hundredth of it) against u κ of the direct
# form. Below the limit the Gram keeps 4e-6 or so in float32 and 1e-12 in float64. Unrelated
# tokens have κ = √T and stay below it wherever a Gram is the cheaper method.
KAPPA_LIMIT = {torch.float32: 64.0, torch.float64: 1000.0}


def cancels(norms: Tensor, sizes: Tensor) -> Tensor:
    """Whether κ is above the limit; also where a Gram overflowed (so not `>`: NaN must be true)."""
    norms, sizes = norms.detach(), sizes.detach()
    return ~(sizes <= KAPPA_LIMIT[norms.dtype] ** 2 * norms)


Again = Callable[[Tensor], Tensor]  # rows -> their squared norms, computed another way
_postponed: ContextVar[list[tuple[Tensor, Again]] | None] = ContextVar("postponed", default=None)


def repaired(norms: Tensor, sizes: Tensor, again: Again) -> Tensor:
    """The norms, and those of examples that cancel as `again` has them."""
    doubtful = cancels(norms, sizes)
    later = _postponed.get()
    if later is not None:
        later.append((doubtful, again))
        return norms.masked_fill(doubtful, 0)
    rows = doubtful.nonzero()[:, 0]
    return norms.index_copy(0, rows, again(rows)) if len(rows) else norms


@contextmanager
def postponed() -> Iterator[list[tuple[Tensor, Again]]]:
    """What `repaired` would repair in this block is 0 for now, and noted: (who is doubtful, again).

    For one factor whose `sq_norms` ends in `repaired`, see `Factor.guarded`.
    """
    found: list[tuple[Tensor, Again]] = []
    token = _postponed.set(found)
    try:
        yield found
    finally:
        _postponed.reset(token)
