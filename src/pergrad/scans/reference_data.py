"""Gradients of a reference's own examples, under the job that is scanned.

Owns: the mean gradient of a data set, and the gradients of single examples.
Does not know: what is stored of them, or what is compared with them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pergrad import api, inputs
from pergrad.errors import PergradError, UsageError
from pergrad.matrices import concatenate
from pergrad.matrix import GradientMatrix
from pergrad.scans import manifest
from pergrad.scans.job import Job
from pergrad.scans.mistakes import hint
from pergrad.scans.scorer import fetch, home_of, seed_for, to_device, wrong_count
from pergrad.scans.text import message_of
from pergrad.scans.work import Settings


def mean_gradient(job: Job, data: Any, settings: Settings) -> dict[str, Tensor]:
    """The mean gradient of a data set, by name: float64 sums of ordinary backward passes.

    Raises:
        UsageError: an example cannot be scored, or the losses are not one for each.
    """
    params = manifest.parameters_of(job)
    home = home_of(params)
    wide = torch.float32 if home is not None and home.type == "mps" else torch.float64
    total = {n: torch.zeros_like(p, dtype=wide) for n, p in params.items()}
    for block in _blocks(data, settings):
        with _blamed("mean gradient", job, data, block):
            losses = _losses(job, data, block, settings)
            grads = torch.autograd.grad(losses.sum(), list(params.values()), allow_unused=True)
        for sum_, grad in zip(total.values(), grads, strict=True):
            if grad is not None:
                sum_ += grad.detach()
    dtype = api.result_dtype(params)
    return {n: (sum_ / len(data)).to(dtype) for n, sum_ in total.items()}


def single_gradients(job: Job, data: Any, settings: Settings) -> GradientMatrix:
    """The gradient of each example of a data set, as a matrix with a row for each.

    Raises:
        UsageError: an example cannot be scored, or the losses are not one for each.
    """
    params = manifest.parameters_of(job)
    pieces = []
    for block in _blocks(data, settings):
        with _blamed("gradients", job, data, block):
            losses = _losses(job, data, block, settings)
            J = api.gradients(losses, params, **settings.options).detach()
        pieces.append(J)
    return concatenate(pieces)


def _blocks(data: Any, settings: Settings) -> Iterator[range]:
    size = settings.batch_size
    for lo in range(0, len(data), size):
        yield range(lo, min(lo + size, len(data)))


def _losses(job: Job, data: Any, block: range, settings: Settings) -> Tensor:
    """One loss for each example of a block, with its graph."""
    home = home_of(manifest.parameters_of(job))
    batch = fetch(job.collate, data, block, settings.seed)
    if home is not None and home.type != "cpu":
        batch = to_device(batch, home)
    seed_for(settings.seed, block.start)
    losses = inputs.check_losses(job.losses(job.model, batch))
    if len(losses) != len(block):
        raise UsageError(wrong_count(len(losses), len(block)))
    return losses


@contextmanager
def _blamed(what: str, job: Job, data: Any, block: range) -> Iterator[None]:
    """What an example raises, as an error that says which."""
    try:
        yield
    except PergradError:
        raise
    except Exception as error:
        ragged = "equal size" in message_of(error)
        remedy = hint(error, data, job.collate) if ragged else "Take out the ones at fault."
        raise UsageError(
            f"The {what} needs every example of its data set, and those from {block.start} to "
            f"{block[-1]} raised {message_of(error)}. {remedy}"
        ) from error
