"""How much the gradients of examples differ: the noise scale, with a band.

Owns: `NoiseScale`, its estimates by step, and the interval of their ratio.
Does not know: models, passes; torch, so that a run can be read without it.
"""

from collections import deque
from math import inf, nan, pi, sqrt, tan
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any

from pergrad.arrays import as_tensor
from pergrad.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


class NoiseScale:
    """The gradient noise scale of a run: the batch size up to which larger batches pay.

        noise scale = tr S / |G|**2

    G is the mean gradient over all data, S the covariance of the gradients of single examples. Each
    step gives an estimate of either without bias, from the examples' own norms: with weights w of
    sum 1 and the gradient trained on, g = sum over b of w[b] g[b],

        |G|**2 ~ (|g|**2 - q) / (1 - sum w**2)        q = sum over b of w[b]**2 |g[b]|**2
        tr S   ~ q / sum w**2 - |G|**2

    and the noise scale is the ratio of their means over steps; a mean of ratios would be off by
    factors.

    Args:
        window: the number of latest steps that count; None for all.
        coverage: how likely the band holds the truth.

    Attributes:
        value: tr S / |G|**2, in examples; NaN before the first step; inf where the steps show
            no mean gradient at all.
        low, high: the band (Fieller's, from how the steps differ): 0 and inf before the second step.
        trace: the mean of tr S, squared norms.
        sq_norm: the mean of |G|**2; below 0 now and then where noise is all there is.
        steps: how many steps count.

    Raises:
        UsageError: window or coverage make no sense.

    Cost: a few sums over (B,).
    Source: McCandlish et al. 2018, arXiv:1812.06162; Fieller 1954 for the band.

        >>> import torch, pergrad
        >>> noise = pergrad.NoiseScale()
        >>> for _ in range(50):
        ...     g = torch.randn(32, 10) + 1             # tr S = 10, |G|**2 = 10
        ...     noise.add(g.norm(dim=1), g.mean(0).norm())
        >>> noise.low < noise.value < noise.high
        True
    """  # noqa: E501

    def __init__(self, window: int | None = 100, coverage: float = 0.95) -> None:
        if window is not None and (not isinstance(window, int) or window < 2):
            raise UsageError(f"`window` is {window!r}; pass at least 2 steps, or None for all.")
        if not 0 < coverage < 1:
            raise UsageError(f"`coverage` is {coverage!r}; pass a share between 0 and 1, as 0.95.")
        self.coverage = coverage
        self._steps: deque[tuple[float, float]] = deque(maxlen=window)

    def add(
        self, norms: "Tensor", grad_norm: "Tensor | float", weights: "Tensor | None" = None
    ) -> None:
        """One step: the norms (B,) of its examples, and that of the gradient they add up to.

        Args:
            norms: (B,), |g[b]|, of all micro-batches and ranks that make up the step.
            grad_norm: |sum over b of w[b] g[b]|, before any clipping.
            weights: (B,), w; None for 1 / B. They need not have sum 1: they are brought to it, and
                `grad_norm` with them.

        Raises:
            UsageError: fewer than two examples have a weight, shapes differ, or a number is not
                finite.
        """
        norms, weights = as_tensor(norms), as_tensor(weights)
        if not _is_tensor(norms) or norms.dim() != 1:
            raise UsageError(
                "`norms` is not a tensor or an array (B,). Pass the norms of the step's examples."
            )
        norms = norms.detach().double().cpu()
        total = float(grad_norm)
        w = norms.new_full(norms.shape, 1 / max(1, len(norms)))
        if weights is not None:
            if not _is_tensor(weights) or weights.shape != norms.shape:
                raise UsageError(f"`weights` is not ({len(norms)},), as `norms` is.")
            w = weights.detach().double().cpu()
            share = float(w.sum())
            if share == 0:
                raise UsageError("The weights sum to 0: this step has no mean. Leave it out.")
            w, total = w / share, total / abs(share)
        norms = norms.masked_fill(w == 0, 0.0)  # an example of weight 0 may have no norm
        concentration = float(w.square().sum())
        if concentration >= 1 - 1e-12 or int((w != 0).sum()) < 2:
            raise UsageError(
                "One example alone does not tell how examples differ, so this step has no noise "
                "scale. Add the norms of all micro-batches of a step together."
            )
        self.add_sums(float((w * norms).square().sum()), total, concentration)

    def add_sums(self, sq_norm_sum: float, grad_norm: float, sq_weight_sum: float) -> None:
        """One step of which the sums are known, as of several ranks.

        Args:
            sq_norm_sum: sum over b of w[b]**2 |g[b]|**2, for weights of sum 1.
            grad_norm: |sum over b of w[b] g[b]|, before any clipping.
            sq_weight_sum: sum over b of w[b]**2; 1 / B for a plain mean.

        Raises:
            UsageError: one example has all the weight, or a number is not finite.
        """
        if not sq_weight_sum < 1 - 1e-12:
            raise UsageError(
                "One example alone does not tell how examples differ: `sq_weight_sum` is "
                f"{sq_weight_sum:.6g}. Add the sums of a whole step, over weights of sum 1."
            )
        sq_norm = (grad_norm**2 - sq_norm_sum) / (1 - sq_weight_sum)
        trace = sq_norm_sum / sq_weight_sum - sq_norm if sq_weight_sum else nan
        if not abs(trace) < inf or not abs(sq_norm) < inf:
            raise UsageError("A norm of this step is not finite. Leave the step out.")
        self._steps.append((trace, sq_norm))

    @property
    def steps(self) -> int:
        """How many steps count."""
        return len(self._steps)

    @property
    def trace(self) -> float:
        """The mean of tr S over the steps."""
        return fmean(t for t, _ in self._steps) if self._steps else nan

    @property
    def sq_norm(self) -> float:
        """The mean of |G|**2 over the steps."""
        return fmean(g for _, g in self._steps) if self._steps else nan

    @property
    def value(self) -> float:
        """The noise scale."""
        if not self._steps:
            return nan
        return self.trace / self.sq_norm if self.sq_norm > 0 else inf

    @property
    def low(self) -> float:
        """The lower end of the band."""
        return self._band()[0]

    @property
    def high(self) -> float:
        """The upper end of the band."""
        return self._band()[1]

    def __repr__(self) -> str:
        return (
            f"NoiseScale({self.value:.3g}, {self.low:.3g} to {self.high:.3g}, {self.steps} steps)"
        )

    def _band(self) -> tuple[float, float]:
        """All ratios R for which mean(trace) - R mean(sq_norm) may be 0, by Student's t."""
        n = len(self._steps)
        if n < 2:
            return 0.0, inf
        s, t = self.trace, self.sq_norm
        q = _student(0.5 + self.coverage / 2, n - 1) ** 2 / (n * (n - 1))
        ss = q * sum((a - s) ** 2 for a, _ in self._steps)
        st = q * sum((a - s) * (b - t) for a, b in self._steps)
        tt = q * sum((b - t) ** 2 for _, b in self._steps)
        a, b, c = t * t - tt, s * t - st, s * s - ss  # a R^2 - 2 b R + c <= 0
        inside = b * b - a * c
        if inside < 0:  # any ratio fits
            return 0.0, inf
        if a > 0:
            return max(0.0, (b - sqrt(inside)) / a), max(0.0, (b + sqrt(inside)) / a)
        # The mean gradient may be 0: no upper end. The roots have one sign only where s may be 0.
        return (max(0.0, (b - sqrt(inside)) / a) if a < 0 < c else 0.0), inf


def _is_tensor(value: Any) -> bool:
    """Whether it has what is used of a tensor here."""
    return all(hasattr(value, name) for name in ("detach", "double", "new_full", "masked_fill"))


def _student(p: float, freedom: int) -> float:
    """The quantile of Student's distribution: exact for 1 and 2, else an expansion in 1 / freedom.

    Abramowitz and Stegun 1964, 26.7.5.
    """
    if freedom == 1:
        return tan(pi * (p - 0.5))
    if freedom == 2:
        return (2 * p - 1) * sqrt(2 / (4 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    return z + sum(
        (
            (z**3 + z) / (4 * freedom),
            (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2),
            (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3),
        )
    )
