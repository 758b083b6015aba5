"""What a sketch answers: candidates with their estimates, errors and exact scores.

Owns: `Answer`: ranked tables, and what share of the highest is expected among the candidates.
Does not know: how candidates are found, or how scores are computed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pergrad.arrays import whole
from pergrad.errors import UsageError
from pergrad.scans import manifest
from pergrad.scans.job import Job
from pergrad.scans.rows import Rows

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, repr=False)
class Answer:
    """Candidates (C,) of all queries together, ascending, and their numbers (Q, C).

    `estimates` are what the sketch says, `errors` their standard errors, `exact` the exact scores
    or None. Made by `index.query`.
    """

    job: Job
    candidates: Tensor
    estimates: Tensor
    errors: Tensor
    exact: Tensor | None
    top_: int
    refined: bool
    sign: str
    others: Callable[[], Iterator[tuple[Tensor, Tensor]]]

    def top(self, query: int, n: int = 20) -> Rows:
        """The n candidates with the highest scores for a query, highest first.

        Columns: `rank`, `index`, `key` if the job has keys, `score` (exact where there is one),
        `estimate`, and the estimate's standard error `error`.

        Raises:
            UsageError: there is no such query, or there are not so many candidates.
        """
        return self._end(query, n, -1)

    def bottom(self, query: int, n: int = 20) -> Rows:
        """The n candidates with the lowest scores for a query, lowest first; as `top`."""
        return self._end(query, n, 1)

    def recall(self, n: int = 20) -> Tensor:
        """(Q,): what share of the n highest is expected to be among the candidates.

        Each other example is expected with the chance that its score, normal about its estimate with
        the standard error, is above the n-th of the candidates' exact scores. Without a curvature
        the error is a bound, and so is the share: at least that much.

        Raises:
            UsageError: there are no exact scores, or they are refined, which the sketch is not of.

        Cost: a pass over the sketch.
        """  # noqa: E501
        if self.exact is None or self.refined:
            raise UsageError(
                "Recall is told against exact scores of the kind that the sketch estimates: pass "
                "rerank=job and refine=0."
            )
        _, n = self._checked(0, n)
        least = self.exact.topk(n, 1).values[:, -1].double()
        missed = torch.zeros(len(least), dtype=torch.float64)
        for estimates, errors in self.others():
            above = (estimates.double() - least) / errors.double().clamp_min(1e-300)
            missed += torch.special.ndtr(above).sum(0)
        return n / (n + missed)

    def _checked(self, query: int, n: int) -> tuple[int, int]:
        queries = len(self.estimates)
        query, n = whole(query), whole(n)
        if not isinstance(query, int) or not 0 <= query < queries:
            raise UsageError(f"There is no query {query!r}: pass a number from 0 to {queries - 1}.")
        if not isinstance(n, int) or not 1 <= n <= self.top_:
            raise UsageError(
                f"n is {n!r}, and there are {self.top_} candidates at each end. Ask for more with "
                "index.query(..., top=)."
            )
        return query, n

    def _end(self, query: int, n: int, sign: int) -> Rows:
        import pyarrow as pa

        query, n = self._checked(query, n)
        scores = (self.estimates if self.exact is None else self.exact)[query]
        order = (sign * scores).argsort(stable=True)[:n]
        index = self.candidates[order].tolist()
        columns = {"rank": list(range(len(index))), "index": index}
        if self.job.key is not None:
            columns["key"] = [manifest.key_of(self.job, i) for i in index]
        columns["score"] = scores[order].tolist()
        for name, values in (("estimate", self.estimates), ("error", self.errors)):
            columns[name] = values[query][order].tolist()
        table = pa.table(columns).replace_schema_metadata({"sign": self.sign})
        return Rows(table, ["rank", "score"])

    def __repr__(self) -> str:
        how = "by estimates" if self.exact is None else "by exact scores"
        queries, count = self.estimates.shape
        return (
            f"{queries:,} queries, {self.top_:,} candidates at each end, {count:,} in all, ranked "
            f"{how}; positive: {self.sign}"
        )
