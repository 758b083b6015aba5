"""What influence is asked about: queries, by their losses or by a measurement of their own.

Owns: which sign a query's score has, queries' gradients as factors or as directions, and how much
memory they may take.
Does not know: training examples, curvature, files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pergrad import api
from pergrad.attribution.batches import Batch, Batches, batches_of
from pergrad.engine.run import PassOptions
from pergrad.errors import UsageError
from pergrad.factors.workspace import free_bytes
from pergrad.matrix import GradientMatrix
from pergrad.scans.job import Job
from pergrad.scans.mistakes import check_data

MOST_QUERY_BYTES = 2**32


@dataclass(frozen=True)
class Queries:
    """Queries in batches. `sign` is +1 for a data set, whose scores are positive where the query's
    loss falls, and -1 for a Job, whose scores are positive where its measurement rises.
    """

    batches: Batches
    sign: int
    options: PassOptions

    def __len__(self) -> int:
        return len(self.batches.job)

    def matrices(self, rows: range) -> Iterator[GradientMatrix]:
        """The gradients of some queries, a batch at a time."""
        for batch in self.batches.over(rows):
            values = self.batches.losses(batch)
            J = api.gradients(values, self.batches.params, **self.options)
            self._check(J, batch)
            yield J

    def rows(self, rows: range) -> dict[str, Tensor]:
        """name -> (Q, *shape): the same, formed."""
        found: dict[str, Tensor] = {}
        for J, first in zip(self.matrices(rows), rows[:: self.batches.size], strict=True):
            for n, part in J.dense().items():
                if n not in found:
                    found[n] = part.new_empty((len(rows), *part.shape[1:]))
                at = first - rows.start
                found[n][at : at + len(part)] = part
        return found

    def _check(self, J: GradientMatrix, batch: Batch) -> None:
        tensors = [t for f in J._factors.values() for t in f.tensors() if t.is_floating_point()]
        if all(bool(t.sum().isfinite()) for t in tensors):
            return  # norms would take a pass of their own
        bad = (~J.norms().isfinite()).nonzero()
        if len(bad):
            raise UsageError(
                f"Query {batch.rows[int(bad[0, 0])]} has a gradient that is not finite, so it has "
                "no influences. Take it out, or find out why (see `job.losses(job.model, batch)`)."
            )


def most_bytes(params: Mapping[str, Tensor]) -> int:
    """What the queries that are held together may take."""
    free = free_bytes(next(iter(params.values())).device)
    return MOST_QUERY_BYTES if free is None else min(MOST_QUERY_BYTES, free // 4)


def queries_of(
    job: Job, queries: Any, show: Any, batch_size: int | None, seed: int, options: PassOptions
) -> Queries:
    """A data set of queries under the job's losses, or a Job with its own.

    Raises:
        UsageError: there are none, or their parameters are not the job's.
    """
    if isinstance(queries, Job):
        if show is not None:
            raise UsageError(
                "show is for queries given as a data set, and these are a Job: pass it there, as "
                "Job(show=...)."
            )
        own = Batches(queries, 1).params
        names = Batches(job, 1).params
        differ = [n for n in {**own, **names} if n not in own or n not in names
                  or own[n].shape != names[n].shape or own[n].dtype != names[n].dtype]  # fmt: skip
        if differ:
            raise UsageError(
                f"The queries are about other parameters than the job: `{differ[0]}` is on one "
                "side alone, or has another shape or dtype there. Give both Jobs the same `params`."
            )
        return Queries(_named(batches_of(queries, batch_size, seed)), -1, options)
    if hasattr(queries, "__len__") and len(queries) == 0:
        raise UsageError("There are no queries: `queries` is empty. Pass at least one example.")
    check_data(queries, "queries")
    asked = replace(job, data=queries, key=None, show=show)
    return Queries(_named(batches_of(asked, batch_size, seed)), 1, options)


def _named(batches: Batches) -> Batches:
    return replace(batches, noun="Query")
