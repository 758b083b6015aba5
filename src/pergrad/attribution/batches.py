"""Through a job's data set in batches: what is fetched, where it goes, what the losses are.

Owns: batches of a job, one after the other, checked; what names a job in a manifest.
Does not know: curvature, influence, or where results are kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pergrad import inputs
from pergrad.errors import UsageError
from pergrad.scans import manifest
from pergrad.scans.job import Job
from pergrad.scans.scorer import fetch, home_of, seed_for, sensible_batch_size, to_device


@dataclass(frozen=True)
class Batch:
    """Some examples of a job, collated and on the model's device."""

    rows: range
    content: Any


@dataclass(frozen=True)
class Batches:
    """A job's data set, a batch at a time."""

    job: Job
    size: int
    seed: int = 0
    noun: str = "Example"  # what one of them is called in a message

    @property
    def params(self) -> dict[str, Tensor]:
        """The parameters that gradients are taken for."""
        return manifest.parameters_of(self.job)

    def over(self, rows: range) -> Iterator[Batch]:
        """The batches of some neighbouring examples."""
        for first in range(rows.start, rows.stop, self.size):
            yield self.at(range(first, min(first + self.size, rows.stop)))

    def at(self, rows: Sequence[int]) -> Batch:
        """One batch."""
        job, home = self.job, home_of(self.params)
        try:
            content = fetch(job.collate, job.data, rows, self.seed)
        except Exception as error:
            raise UsageError(
                f"The examples {rows[0]} to {rows[-1]} could not be fetched: "
                f"{type(error).__name__}: {error}. Every example counts here: mend the data set, "
                "or take them out."
            ) from error
        if home is not None and home.type != "cpu":
            content = to_device(content, home)
        seed_for(self.seed, rows[0])
        return Batch(rows, content)  # type: ignore[arg-type]

    def losses(self, batch: Batch) -> Tensor:
        """One loss per example."""
        losses = inputs.check_losses(self.job.losses(self.job.model, batch.content))
        if len(losses) != len(batch.rows):
            raise UsageError(
                f"`losses` returned {len(losses)} numbers for a batch of {len(batch.rows)} "
                "examples. Return one per example, in the batch's order."
            )
        check_finite(losses, batch, "loss", self.noun)
        return losses


def check_finite(values: Tensor, batch: Batch, what: str, noun: str = "Example") -> None:
    """Every example's numbers are finite.

    Raises:
        UsageError: which example's are not.
    """
    good = values.detach().isfinite().reshape(len(batch.rows), -1).all(1)
    if not bool(good.all()):
        at = batch.rows[int((~good).nonzero()[0, 0])]
        raise UsageError(
            f"{noun} {at} has a {what} that is not finite, and would spoil every number that it "
            "goes into. Take it out, or find out why (see `job.losses(job.model, batch)`)."
        )


def batches_of(job: Job, batch_size: int | None, seed: int) -> Batches:
    """A job's batches, of a size that memory allows where none is given."""
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise UsageError(f"batch_size is {batch_size!r}; pass a positive number.")
    return Batches(job, batch_size or sensible_batch_size(job, seed), seed)


def check_job(job: object, what: str = "job") -> Job:
    """A Job.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(job, Job):
        raise UsageError(
            f"`{what}` is a {type(job).__name__}. Pass a pergrad.Job(model, data, losses)."
        )
    return job


def described(job: Job) -> dict[str, Any]:
    """What names a job in a manifest: model, parameters, weights, data."""
    return {k: v for k, v in manifest.scored(job).items() if k not in ("torch", "pergrad")}


def check_evaluating(job: Job) -> None:
    """No batch norm is in training mode, where an example has no gradient of its own.

    Raises:
        UsageError: one is.
    """
    for name, module in job.model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training:
            raise UsageError(
                f"The batch norm `{name}` is in training mode, where examples interact. Call "
                '`model.eval()`, or leave out mode="as is".'
            )
