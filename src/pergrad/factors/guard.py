"""Whether a Gram's result may be trusted.

Owns: the limit of κ, and the examples above it.
Does not know: what is done instead.
"""

from collections.abc import Callable

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


def repaired(norms: Tensor, sizes: Tensor, again: Callable[[Tensor], Tensor]) -> Tensor:
    """The norms, and those of examples that cancel as `again` has them."""
    rows = cancels(norms, sizes).nonzero()[:, 0]
    return norms.index_copy(0, rows, again(rows)) if len(rows) else norms
