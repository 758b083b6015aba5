"""Sums over a data set that a curvature is made of: what some of its examples add to them.

Owns: which losses a batch has, whose gradients are added, and which example spoils a sum.
Does not know: how sums become a curvature, which process adds what, files.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pergrad import api
from pergrad.attribution import estimate
from pergrad.attribution.batches import Batch, Batches
from pergrad.attribution.blocks import Block, check_block
from pergrad.attribution.likelihood import outputs_of
from pergrad.attribution.together import Task
from pergrad.engine.run import PassOptions
from pergrad.errors import UsageError
from pergrad.matrix import GradientMatrix


class Summing:
    """The job, the kind of curvature and the labels, and the tasks that these give.

    covariances      sums of the first pass
    eigenvalues      those of the second, in the bases that are given
    """

    def __init__(
        self, batches: Batches, kind: estimate.Kind, labels: Any, options: PassOptions
    ) -> None:
        self.batches, self.kind = batches, kind
        self.labels, self.options = labels, options
        self.params = batches.params
        self.first: GradientMatrix | None = None  # the first batch's, if it is known
        self.into: dict[str, Tensor] | None = None  # where this process alone adds up everything

    @property
    def models(self) -> list[nn.Module]:
        """The job's."""
        return [self.batches.job.model]

    @property
    def device(self) -> str | None:
        """Where its parameters are."""
        return str(next(iter(self.params.values())).device)

    def sent(self) -> tuple["Summing", dict[str, Any]]:
        """What a worker needs of this, and what users know of it by the names they know."""
        job = replace(self.batches.job, show=None, key=None)
        batches = replace(self.batches, job=job)
        return Summing(batches, self.kind, self.labels, self.options), {"job": job}

    def task(self, name: str, about: Sequence[Any], given: Mapping[str, Tensor]) -> Task:
        """What does the tasks of a name: of the blocks in `about`."""
        blocks = [Block(**block_from_json(block)) for block in about]
        estimators = [estimate.Estimator(block, self.kind) for block in blocks]
        stage = ("covariances", "eigenvalues").index(name)

        def add(rows: range) -> dict[str, Tensor]:
            own = self.empty(estimators, stage) if self.into is None else {}
            sums = {**given, **own} if self.into is None else self.into
            for batch in self.batches.over(rows):
                for J in self._matrices(batch, stage):
                    with J._working(), torch.no_grad():
                        self._add(estimators, stage, sums, J, batch)
            return {} if self.into is not None else {
                n: t for n, t in sums.items() if n not in given
            }  # fmt: skip

        return add

    @staticmethod
    def empty(estimators: Sequence[estimate.Estimator], stage: int) -> dict[str, Tensor]:
        """Sums of nothing."""
        if stage == 1:
            return {
                f"{i} Lambda": torch.zeros(e.block.shape, dtype=torch.float64)
                for i, e in enumerate(estimators)
                if e.corrected
            }
        return {
            f"{i} {name}": value
            for i, e in enumerate(estimators)
            for name, value in e.empty_sides().items()
        }

    def losses(self, batch: Batch, stage: int) -> Iterator[tuple[Tensor, bool]]:
        """The losses of each label, and whether it is the last."""
        if self.labels == "given":
            yield self.batches.losses(batch), True
            return
        outputs = outputs_of(self.batches, batch)
        seed = 2 * self.batches.seed + stage  # fresh labels for the eigenvalues
        each = outputs.losses(self.labels, batch.rows, seed)
        now = next(each, None)
        while now is not None:
            after = next(each, None)
            yield now, after is None
            now = after

    def _matrices(self, batch: Batch, stage: int) -> Iterator[GradientMatrix]:
        """The gradients of a batch for each label."""
        if self.first is not None and stage == 0 and batch.rows.start == 0:
            yield self.first
            self.first = None
            return
        for losses, last in self.losses(batch, stage):
            yield api.gradients(losses, self.params, retain_graph=not last, **self.options)

    def _add(
        self,
        estimators: Sequence[estimate.Estimator],
        stage: int,
        sums: dict[str, Tensor],
        J: Any,
        batch: Batch,
    ) -> None:
        factors = J._factors
        for i, e in enumerate(estimators):
            check_block(e.block, factors)
            if stage == 0:
                own = {
                    n.split(" ", 1)[1]: t for n, t in sums.items() if n.split(" ", 1)[0] == str(i)
                }
                e.add_sides(own, factors)
                sums |= {f"{i} {n}": t for n, t in own.items()}
                good = all(bool(t.sum().isfinite()) for t in own.values())
            else:
                if not e.corrected:
                    continue
                bases = {s: sums[f"{i} {s}"] for s in ("left", "right") if f"{i} {s}" in sums}
                squares = e.squares(factors, bases).to("cpu", torch.float64)
                good = bool(squares.sum().isfinite())
                sums[f"{i} Lambda"] += squares
            if not good:
                self._blame(e.block, J, batch)

    def _blame(self, block: Block, J: Any, batch: Batch) -> None:
        """Say which example's gradient is not finite."""
        norms = J.norms()
        bad = (~norms.isfinite()).nonzero()
        at = f"Example {batch.rows[int(bad[0, 0])]}" if len(bad) else f"An example in {batch.rows}"
        raise UsageError(
            f"{at} has a gradient for `{block.weight}` that is not finite, and would spoil the "
            "curvature of all. Nothing of this batch was kept: take the example out, or find out "
            "why, and start again in another folder."
        )


def block_from_json(block: Mapping[str, Any]) -> dict[str, Any]:
    """A block's fields as a manifest has them."""
    steps = block["steps"]
    return {
        **block,
        "source": tuple(block["source"]),
        "steps": None if steps is None else tuple((k, tuple(how)) for k, how in steps),
    }


def blocks_in(about: Mapping[str, Any]) -> list[Block]:
    """The blocks of a manifest."""
    return [Block(**block_from_json(block)) for block in about["blocks"]]
