"""Running sums over the parameters.

Owns: `Total`, one result to which every parameter adds a term.
Does not know: what the terms are.
"""

import torch
from torch import Tensor


class Total:
    """A running sum in the result's dtype, on the losses' device."""

    def __init__(self, losses: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype, self.device = shape, dtype, losses.device
        self.terms: list[Tensor] = []
        # One addition of many terms takes less time than many of two; and less rounding.
        self.at_most = 64 if len(shape) == 1 else 2

    def add(self, term: Tensor) -> None:
        """Add a term of the result's shape."""
        if term.dtype != self.dtype or term.device != self.device:
            term = term.to(self.device, torch.promote_types(self.dtype, term.dtype))
        self.terms.append(term)
        if len(self.terms) >= self.at_most:
            self.terms = [self.value]

    @property
    def value(self) -> Tensor:
        """The sum so far."""
        if not self.terms:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self.terms[0] if len(self.terms) == 1 else torch.stack(self.terms).sum(0)
