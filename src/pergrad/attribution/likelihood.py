"""What a model's outputs say about labels: labels drawn from them, and the loss's curvature there.

Owns: the categorical and the Gaussian likelihood, labels drawn so that they depend on the example
alone, and products with the Hessian of the loss by the outputs.
Does not know: parameters, gradients, data sets.

Outputs are (B, T, C): C numbers at each of T positions, T = 1 for plain classifiers. Position t
counts w[b, t] in the example's loss, so the loss's curvature is the sum over t of w[b, t] H[b, t].
Labels are drawn for each position alone, which makes their gradients' covariance the same sum if
each position's log-likelihood enters with the square root of its weight.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pergrad.attribution.batches import Batch, Batches, check_finite
from pergrad.errors import UsageError

Labels = Literal["all", "given"] | int
MOST_CLASSES = 64  # up to so many, all labels are taken unless something else is asked for
DRAWS = 8


@dataclass(frozen=True)
class Outputs:
    """What the likelihood of some examples is over."""

    values: Tensor  # (B, T, C), attached to its graph
    weights: Tensor  # (B, T)
    positions: bool  # whether there were positions, or T = 1 was added
    categorical: bool

    def hessian(self, U: Tensor) -> Tensor:
        """H U for U (B, T, C, Q): H[b, t] = diag(p) - p p' of the softmax, or 1 for a Gaussian."""
        weights = self.weights[..., None, None].to(U)
        if not self.categorical:
            return weights * U
        p = self.values.detach().softmax(2).to(U)[..., None]
        return weights * (p * U - p * (p * U).sum(2, keepdim=True))

    def losses(self, labels: Labels, rows: Sequence[int], seed: int) -> Iterator[Tensor]:
        """(B,) each: losses whose gradients G have the Fisher matrix as the sum of E[G G'].

        "all": one for each class, its log-likelihood times the root of its probability. A number:
        as many draws, which have to be divided by their number.
        """
        root = self.weights.sqrt()
        if labels == "all":
            yield from self._all(root)
            return
        assert isinstance(labels, int)
        noise = _noise(rows, self.values.shape[1:], seed, labels, normal=not self.categorical)
        for each in noise:
            drawn = torch.from_numpy(each).to(self.values)
            if self.categorical:
                log_p = self.values.log_softmax(2)
                steps = log_p.detach().double().exp().cumsum(2)
                point = drawn[..., :1].double() * steps[..., -1:]
                y = (steps < point).sum(2).clamp_max(steps.shape[2] - 1)
                picked = log_p.gather(2, y[..., None])[..., 0]
                yield -(root.to(picked) * picked).sum(1)
            else:
                yield (root[..., None].to(drawn) * drawn * self.values).sum((1, 2))

    def _all(self, root: Tensor) -> Iterator[Tensor]:
        if self.categorical:
            log_p = self.values.log_softmax(2)
            terms = log_p * (log_p.detach() / 2).exp()
        else:
            terms = self.values
        for t in range(terms.shape[1]):
            for c in range(terms.shape[2]):
                yield -terms[:, t, c] * root[:, t].to(terms)


def _noise(
    rows: Sequence[int], shape: Sequence[int], seed: int, draws: int, *, normal: bool
) -> Iterator[np.ndarray]:
    """(B, T, C or 1) for each draw, from the example's number alone: the same in any batch."""
    T, C = shape
    streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in rows]
    for _ in range(draws):
        if normal:
            yield np.stack([s.standard_normal((T, C)) for s in streams])
        else:
            yield np.stack([s.random((T, 1)) for s in streams])


def outputs_of(batches: Batches, batch: Batch) -> Outputs:
    """A job's outputs on a batch, checked.

    Raises:
        UsageError: the job has no `outputs`, or they or the weights are not what they should be.
    """
    job = batches.job
    if job.outputs is None:
        raise UsageError(
            "This needs what the likelihood is over: pass `Job(outputs=lambda model, batch: ...)`, "
            'which returns logits (B, C) or (B, T, C), or ask for labels="given", which takes the '
            "gradients of the losses as they are."
        )
    values = job.outputs(job.model, batch.content)
    count = len(batch.rows)
    fits = isinstance(values, Tensor) and values.dim() in (1, 2, 3) and len(values) == count
    if isinstance(values, Tensor) and values.dim() == 1 and job.likelihood == "categorical":
        fits = False
    if not fits or not values.requires_grad:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        detached = ", without graph" if fits else ""
        raise UsageError(
            f"`outputs` returned {got}{detached} for a batch of {count} examples. Return the "
            "logits, (B, C) or (B, T, C), attached to their graph."
        )
    check_finite(values, batch, "model output")
    positions = values.dim() == 3
    if not positions:
        values = values.reshape(count, 1, -1)
    weights = torch.ones(values.shape[:2], device=values.device)
    if job.weights is not None:
        weights = job.weights(batch.content)
        if not isinstance(weights, Tensor) or weights.shape != values.shape[:2]:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise UsageError(
                f"`weights` returned {got} for outputs {tuple(values.shape)}. Return (B, T), how "
                "much each position counts in the example's loss: 0 where it is ignored."
            )
        if bool((weights < 0).any()):
            raise UsageError(
                "`weights` has negative numbers: a likelihood cannot count less than nothing. "
                "Return 0 for positions that are ignored."
            )
        weights = weights.detach().to(torch.promote_types(weights.dtype, torch.float32))
    return Outputs(values, weights, positions, job.likelihood == "categorical")


def resolve_labels(labels: object, outputs: Outputs | None) -> Labels:
    """Which labels to take, None meaning all of them where they are few.

    Raises:
        UsageError: that cannot be had.
    """
    if labels == "given":
        return "given"
    assert outputs is not None
    classes = outputs.values.shape[2]
    if labels is None:
        return "all" if not outputs.positions and classes <= MOST_CLASSES else DRAWS
    if labels == "all":
        if outputs.positions and outputs.values.shape[1] > 1:
            raise UsageError(
                'labels="all" takes a backward pass for every class, and with positions for every '
                f"one of them: {outputs.values.shape[1]} x {classes}. Pass a number of draws, such "
                f"as labels={DRAWS}."
            )
        return "all"
    if isinstance(labels, int) and not isinstance(labels, bool) and labels > 0:
        return labels
    raise UsageError(f'labels is {labels!r}; pass "all", a positive number of draws, or "given".')


def price(labels: Labels, outputs: Outputs, kind: str) -> str:
    """What all labels cost where the default would not have taken them; nothing where it would."""
    classes = outputs.values.shape[2]
    if labels != "all" or classes <= MOST_CLASSES:
        return ""
    passes = classes * (1 if kind in ("kfac", "diagonal") else 2)
    return (
        f'labels="all" of {classes} classes takes {passes:,} backward passes for each batch, '
        f"{classes / DRAWS:.0f} times those of {DRAWS} draws, the default for so many classes. "
        f"For these pass labels={DRAWS}, or leave labels out."
    )
