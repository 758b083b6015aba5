"""Weights that bound the gradients of examples.

Owns: `clip`, and the threshold that follows the norms seen so far.
Does not know: passes, gradients.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pergrad.errors import UsageError

# A quantile of so many of the latest norms: some batches, so that one of them decides little.
_REMEMBERED = 1024


def clip(
    max_norm: float | None = None,
    *,
    quantile: float | None = None,
    by: Literal["layer"] | None = None,
    mean: bool = False,
) -> "Clip":
    """Weights that bring every gradient's norm to at most `max_norm`.

        weights[b] = min(1, max_norm / norms[b]), and 1 where the norm is 0

    Args:
        max_norm: a positive number.
        quantile: in its place, a share such as 0.5: the threshold is that quantile of the latest
            1,024 norms, those at hand among them. It makes training robust against wrong labels;
            a threshold that looks at the data gives no privacy.
        by: None for whole gradients; "layer" to clip each of the L modules' own part of a gradient
            to max_norm / sqrt(L), so that the whole is at most `max_norm`.
        mean: whether the weights are divided by B, so that `backward` adds the mean of the clipped
            gradients to `.grad`, as a loss that is a mean would, and not their sum.

    Returns:
        A function norms (B,) -> weights (B,), for `pergrad.backward(..., weights=...)`. A norm that
        is not a number gives a weight that is not a number. `threshold` is the one used last.

    Raises:
        UsageError: max_norm is not a positive number, quantile no share, or both or none are given.

    Source: Abadi et al. 2016, arXiv:1607.00133.

        >>> import torch, pergrad
        >>> pergrad.clip(1.0)(torch.tensor([0.0, 0.5, 4.0]))
        tensor([1.0000, 1.0000, 0.2500])
        >>> pergrad.clip(quantile=0.5)(torch.tensor([1.0, 2.0, 4.0]))
        tensor([1.0000, 1.0000, 0.5000])
        >>> pergrad.clip(1.0, mean=True)(torch.tensor([0.5, 4.0]))
        tensor([0.5000, 0.1250])
    """
    if (max_norm is None) == (quantile is None):
        raise UsageError(
            "Pass either max_norm, a positive number as in `clip(1.0)`, or `clip(quantile=0.5)`."
        )
    if max_norm is not None and (not isinstance(max_norm, (int, float)) or not max_norm > 0):
        raise UsageError(f"max_norm is {max_norm!r}; pass a positive number.")
    if quantile is not None and (
        not isinstance(quantile, (int, float)) or isinstance(quantile, bool) or not 0 < quantile < 1
    ):
        raise UsageError(f"quantile is {quantile!r}; pass a share between 0 and 1.")
    if by not in (None, "layer"):
        raise UsageError(f'`by` is None or "layer", not {by!r}.')
    if by is not None and quantile is not None:
        raise UsageError(
            'A quantile is one of whole gradients: leave out by="layer", or pass max_norm.'
        )
    if not isinstance(mean, bool):
        raise UsageError(
            f"`mean` is {mean!r}; pass True for the mean of the clipped gradients, or leave it out "
            "for their sum."
        )
    return Clip(None if max_norm is None else float(max_norm), quantile, by, mean)


@dataclass(slots=True, repr=False)
class Clip:
    """What `clip` returns: a function from norms to weights."""

    max_norm: float | None
    quantile: float | None
    by: str | None
    mean: bool = False
    threshold: float | Tensor | None = None
    _seen: Tensor | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        limit = f"quantile={self.quantile}" if self.max_norm is None else f"{self.max_norm}"
        by = "" if self.by is None else f', by="{self.by}"'
        return f"pergrad.clip({limit}{by}{', mean=True' if self.mean else ''})"

    def __call__(self, norms: Tensor) -> Tensor:
        """Weights (B,) of these norms (B,)."""
        if self.by is not None:
            raise UsageError(
                'clip(by="layer") gives each layer weights of its own, which norms of whole '
                "gradients do not tell. Pass it to `pergrad.backward(..., weights=...)`."
            )
        self.threshold = self._quantile(norms) if self.max_norm is None else self.max_norm
        return self._weights(norms, self.threshold)

    def by_layer(self, norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights (B,) for each layer, from the norms of its parameters' gradients."""
        assert self.max_norm is not None
        self.threshold = self.max_norm / max(1, len(norms)) ** 0.5
        return {name: self._weights(own, self.threshold) for name, own in norms.items()}

    def _quantile(self, norms: Tensor) -> Tensor:
        here = norms.detach()
        if self._seen is not None:
            here = torch.cat([self._seen.to(here), here])
        self._seen = here = here[-max(_REMEMBERED, len(norms)) :]
        assert self.quantile is not None
        return torch.nanquantile(here, self.quantile)  # of none: not a number, and so no weight

    def _weights(self, norms: Tensor, threshold: float | Tensor) -> Tensor:
        safe = torch.where(norms == 0, 1.0, norms)
        weights = torch.where(norms == 0, 1.0, (threshold / safe).clamp_max(1.0))
        return weights / max(1, len(norms)) if self.mean else weights
