"""Whether a Gram's result may be trusted.

Owns: the limit of κ, and `SqNorms`: norms together with the doubts about them.
Does not know: what is done instead, and when.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pergrad.recording import flagged, is_recorded

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


class SqNorms(NamedTuple):
    """Squared norms, which of them are in doubt, and how to take these again."""

    values: Tensor  # (B,)
    doubtful: Tensor | None = None  # (B,) of bool; None: nobody
    again: Again | None = None

    def settled(self) -> Tensor:
        """(B,): those in doubt taken again, now."""
        if self.doubtful is None or self.again is None:
            return self.values
        if is_recorded():
            flagged(self.doubtful)
            return self.values
        rows = self.doubtful.nonzero()[:, 0]
        if not len(rows):
            return self.values
        return self.values.index_copy(0, rows, self.again(rows).to(self.values.dtype))


def held_against(norms: Tensor, sizes: Tensor | None, again: Again) -> SqNorms:
    """The norms, in doubt where they cancel; without sizes they are to be trusted."""
    return SqNorms(norms) if sizes is None else SqNorms(norms, cancels(norms, sizes), again)
