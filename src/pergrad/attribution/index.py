"""A sketch that has been computed: estimates for queries, and exact scores of the candidates.

Owns: `Sketch`: what is asked of it, candidates, re-ranking, and how it prints.
Does not know: how a gradient is projected, files, how exact scores are computed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from pergrad.arrays import whole
from pergrad.attribution.answer import Answer
from pergrad.attribution.batches import check_evaluating
from pergrad.attribution.fit import Fit
from pergrad.attribution.folder import Folder
from pergrad.attribution.influence import influence
from pergrad.attribution.projection import DEGREE, Coordinates, TensorSketch
from pergrad.attribution.queries import Queries, queries_of
from pergrad.attribution.shards import Shards
from pergrad.errors import UsageError
from pergrad.scans.job import Job
from pergrad.scans.scorer import prepared

TOP = 1000  # candidates at each end


@dataclass(frozen=True)
class Sketched:
    """Queries as the sketch sees them."""

    vectors: Tensor  # (Q, size), times sign and 1/N
    errors: Callable[[Tensor], Tensor]  # norms of examples (n,) -> (n, Q) or (1, Q)
    sign: int


class Sketch:
    """Short vectors of training examples, made by `pergrad.sketch` and `pergrad.open_sketch`.

    `len(index)` is the number of examples, `index.size` the numbers kept of each.
    """

    def __init__(
        self, folder: Folder, job: Job, fit: Fit | None, how: Coordinates | TensorSketch
    ) -> None:
        self._how, self._job, self._fit = how, job, fit
        self.folder = folder.path
        found = folder.manifest()
        assert found is not None
        self.manifest: dict[str, Any] = found
        self._shards = Shards(folder, len(self))

    def __len__(self) -> int:
        return int(self.manifest["scored"]["examples"])

    @property
    def size(self) -> int:
        """Numbers kept of each example."""
        return self._how.size

    def scores(self, queries: Any, *, batch_size: int | None = None) -> Tensor:
        """(Q, N): the estimate for every pair.

        Raises:
            UsageError: there are no queries, or they are about other parameters.
        """
        with self._asked(queries, batch_size) as asked:
            known = self._sketched(asked)
        return torch.cat([found for _, found, _ in self._shards.against(known.vectors)]).mT

    def query(
        self,
        queries: Any,
        top: int = TOP,
        *,
        rerank: Job | None = None,
        refine: int = 0,
        batch_size: int | None = None,
    ) -> Answer:
        """The examples with the highest and the lowest scores for each query.

        The sketch names `top` candidates at each end. With `rerank` all of these get exact scores,
        those that `pergrad.influence` gives with the same curvature, and are ranked by them;
        `answer.recall()` says what share of the highest is expected to be among the candidates.

        Args:
            queries: as for `pergrad.influence`: a data set, or a Job with a measurement.
            top: candidates at each end.
            rerank: the job that was sketched, for exact scores.
            refine: with a curvature, refining steps of the exact scores. 0: none, as the sketch.
            batch_size: how many examples go through the model at once.

        Returns:
            Answer: `.top(q)`, `.bottom(q)`, `.recall()`.

        Raises:
            UsageError: an argument is wrong, or the queries are about other parameters.

        Cost: a pass over the sketch, 2 bytes x size for each example; with `rerank` that of
            `influence` for at most 2 x top x Q examples.
        """
        top = whole(top)
        if not isinstance(top, int) or isinstance(top, bool) or top < 1:
            raise UsageError(f"top is {top!r}; pass a positive number of candidates.")
        if refine and (rerank is None or self._fit is None):
            raise UsageError(
                "refine is for exact scores with a curvature: pass rerank=job, and sketch with "
                "curvature=."
            )
        if rerank is not None and (not isinstance(rerank, Job) or len(rerank) != len(self)):
            job = isinstance(rerank, Job)
            got = f"Job of {len(rerank)} examples" if job else type(rerank).__name__
            raise UsageError(
                f"rerank is a {got}; pass the Job that was sketched, of {len(self)} examples."
            )
        with self._asked(queries, batch_size) as asked:
            known = self._sketched(asked)
        high, low = self._candidates(known, min(top, len(self)))
        candidates = torch.cat([high, low], 1).unique()
        estimates, errors = self._of(known, candidates)
        exact = None
        if rerank is not None:
            exact = self._exact(rerank, queries, candidates, refine, batch_size)
        return Answer(
            job=self._job, candidates=candidates, estimates=estimates, errors=errors,
            exact=exact, top_=min(top, len(self)), refined=bool(refine),
            sign="the example helps: it lowers the query's loss" if known.sign > 0
            else "the example raises the measurement",
            others=lambda: self._others(known, candidates),
        )  # fmt: skip

    # --- queries ---------------------------------------------------------------------------------

    @contextmanager
    def _asked(self, queries: Any, batch_size: int | None) -> Iterator[Queries]:
        settings = self.manifest["settings"]
        with ExitStack() as stack:
            for each in [self._job, *([queries] if isinstance(queries, Job) else [])]:
                stack.enter_context(prepared(each.model, settings["mode"]))
                check_evaluating(each)
            yield queries_of(
                self._job, queries, None, batch_size, settings["seed"], settings["options"]
            )

    def _sketched(self, asked: Queries) -> Sketched:
        how, everything = self._how, range(len(asked))
        if isinstance(how, Coordinates):
            assert self._fit is not None
            scale = 1 / self._fit.examples
            vectors, left_out = [], []
            for first in range(0, len(asked), asked.batches.size):
                rows = range(first, min(first + asked.batches.size, len(asked)))
                part, variance = how.of_rows(asked.rows(rows))
                vectors.append(part.cpu() * (asked.sign * scale))
                left_out.append(variance.cpu().sqrt() * scale)
            spread = torch.cat(left_out).float()[None]
            return Sketched(torch.cat(vectors), lambda norms: spread, asked.sign)
        parts, norms = [], []
        for J in asked.matrices(everything):
            parts.append(how.project(J).cpu() * asked.sign)
            norms.append(J.norms().cpu().float())
        bound = (DEGREE / how.size) ** 0.5 * torch.cat(norms)
        return Sketched(torch.cat(parts), lambda own: own[:, None] * bound, asked.sign)

    # --- passes over the sketch ------------------------------------------------------------------

    def _candidates(self, known: Sketched, top: int) -> tuple[Tensor, Tensor]:
        """(Q, top) numbers of those with the highest, and of those with the lowest estimates."""
        none = torch.empty((len(known.vectors), 0))
        high, low = (none, none.long()), (none, none.long())
        for first, found, _ in self._shards.against(known.vectors):
            columns = found.mT.contiguous()
            high = _merged(high, columns, first, top)
            low = _merged(low, -columns, first, top)
        return high[1], low[1]

    def _of(self, known: Sketched, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, C) estimates and errors of some examples, ascending."""
        estimates, errors = [], []
        for first, found, norms in self._shards.against(known.vectors):
            lo, hi = torch.searchsorted(candidates, torch.tensor([first, first + len(found)]))
            at = candidates[lo:hi] - first
            estimates.append(found[at])
            errors.append(known.errors(norms[at]).expand(len(at), found.shape[1]))
        return torch.cat(estimates).mT, torch.cat(errors).mT

    def _others(self, known: Sketched, candidates: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(n, Q) estimates and errors of those that are no candidates, a piece at a time."""
        for first, found, norms in self._shards.against(known.vectors):
            there = torch.ones(len(found), dtype=torch.bool)
            lo, hi = torch.searchsorted(candidates, torch.tensor([first, first + len(found)]))
            there[candidates[lo:hi] - first] = False
            yield found[there], known.errors(norms[there])

    def _exact(
        self, job: Job, queries: Any, candidates: Tensor, refine: int, batch_size: int | None
    ) -> Tensor:
        settings = self.manifest["settings"]
        few = replace(job, data=Subset(job.data, candidates.tolist()), key=None, show=None)
        with TemporaryDirectory() as folder:
            solve: dict[str, Any] = {} if self._fit is None else {
                "curvature": self._fit, "refine": refine, "damping": self._fit.damping
            }  # fmt: skip
            found = influence(
                few, queries, folder, batch_size=batch_size, seed=settings["seed"],
                mode=settings["mode"], progress=False, **solve, **settings["options"],
            )  # fmt: skip
            return found.scores.clone()

    def __repr__(self) -> str:
        how = "TensorSketch of gradients"
        if isinstance(self._how, Coordinates):
            kind = self.manifest["curvature"]["settings"]["kind"]
            how = f"{100 * self._how.share:.1f} % of the energy, by the basis of a {kind} curvature"
        return f"Sketch of {len(self):,} examples, {self.size:,} numbers each ({how}), in {self.folder}"  # noqa: E501


def _merged(
    kept: tuple[Tensor, Tensor], found: Tensor, first: int, top: int
) -> tuple[Tensor, Tensor]:
    """The `top` highest of both, and which examples they are."""
    most = min(top, found.shape[1])
    if kept[0].shape[1] == top:  # few get past those that are kept: no more than these are sorted
        most = min(most, int((found > kept[0].amin(1, True)).sum(1).max()))
        if not most:
            return kept
    values, at = found.topk(most, 1, sorted=False)
    both = torch.cat([kept[0], values], 1), torch.cat([kept[1], at + first], 1)
    values, at = both[0].topk(min(top, both[0].shape[1]), 1, sorted=False)
    return values, both[1].gather(1, at)
