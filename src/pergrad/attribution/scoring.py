"""Training examples past queries: inner products, cosines, Adam's steps, solves and their parts.

Owns: how an example is compared with queries, on whichever process does it.
Does not know: which process that is, how scores are kept, files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pergrad import api
from pergrad.attribution import kernel
from pergrad.attribution.adam import step_cosines
from pergrad.attribution.asking import Asked
from pergrad.attribution.basis import Solved
from pergrad.attribution.batches import Batch, Batches
from pergrad.attribution.gauss_newton import Curvature
from pergrad.attribution.queries import Queries, most_bytes
from pergrad.attribution.together import Task
from pergrad.engine.places import module_of
from pergrad.engine.run import PassOptions
from pergrad.errors import UsageError
from pergrad.factors import Dense
from pergrad.factors.numeric import bytes_of
from pergrad.factors.workspace import chunks, limit
from pergrad.matrices import concatenate
from pergrad.matrix import GradientMatrix
from pergrad.scans.checkpoints import of_its_own
from pergrad.scans.job import Job

Compare = Callable[[GradientMatrix, Any, int], Tensor]


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to."""
    return module_of(name) or name


class Scoring:
    """The job, the queries and the method, and the tasks that these give.

    scores       of examples for the queries about[0] to about[1]
    curvature    what examples of the curvature's data add to its product with `given`
    kernel       examples' inner products with themselves and all that come after them
    """

    def __init__(
        self, batches: Batches, queries: Queries, what: Asked, options: PassOptions
    ) -> None:
        self.batches, self.queries = batches, queries
        self.what, self.options = what, options
        self.all_queries: GradientMatrix | None = None  # if known, as factors

    @property
    def models(self) -> list[nn.Module]:
        """Those of the job, the queries and the curvature."""
        jobs = [self.batches.job, self.queries.batches.job]
        jobs += [self.what.fit.job] if self.what.fit is not None else []
        return list({id(job.model): job.model for job in jobs}.values())

    @property
    def home(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.batches.params.values())).device

    @property
    def device(self) -> str | None:
        """The same, for workers of Ray."""
        return str(self.home)

    def sent(self) -> tuple["Scoring", dict[str, Any]]:
        """What a worker needs of this, and what users know of it by the names they know."""
        jobs: dict[int, Job] = {}

        def bare(job: Job) -> Job:
            return jobs.setdefault(id(job), replace(job, show=None, key=None))

        batches = replace(self.batches, job=bare(self.batches.job))
        asked = self.queries.batches
        queries = replace(self.queries, batches=replace(asked, job=bare(asked.job)))
        what, fit = self.what, self.what.fit
        own = queries.batches.job  # of a data set the rest is the job's
        asked_as = own if queries.sign < 0 else own.data
        parts: dict[str, Any] = {"job": batches.job, "queries": asked_as}
        if fit is not None:
            job = bare(fit.job)
            what = replace(what, fit=fit.of_job(job))
            parts["curvature.job"] = job
        for i, point in enumerate(what.checkpoints):
            parts[f"checkpoints[{i}]"] = point.source
        return Scoring(batches, queries, what, self.options), parts

    def task(self, name: str, about: Sequence[Any], given: Mapping[str, Tensor]) -> Task:
        """What does the tasks of a name."""
        here = {n: t.to(self.home) for n, t in given.items()}
        if name == "scores":
            return self._scores(range(*about), here)
        if name == "curvature":
            system = self.system
            return lambda rows: system.over(rows, here)
        assert name == "kernel"
        return lambda rows: {"rows": kernel.rows(self.batches, rows, self.options)}

    @property
    def system(self) -> Curvature:
        """The curvature that is solved with."""
        fit = self.what.fit
        assert fit is not None
        given = fit.about["settings"]["labels"] == "given"
        batches = Batches(fit.job, self.batches.size, self.batches.seed)
        return Curvature(batches, empirical=given, options=self.options)

    # --- scores ----------------------------------------------------------------------------------

    def _scores(self, rows: range, given: Mapping[str, Tensor]) -> Task:
        """Scores (examples, queries), in float64, not yet with sign and unit."""
        queries, compare = self._compared(rows, given)
        rates = self.what.rates
        several = len(rates) > 1
        if not several:
            self._put(0)

        def score(stretch: range) -> dict[str, Tensor]:
            scores = torch.zeros((len(stretch), len(rows)), dtype=torch.float64)
            for c, rate in enumerate(rates):
                if several:
                    self._put(c)
                for batch in self.batches.over(stretch):
                    J = self._gradients(batch)
                    found = compare(J, queries[c], c).detach().cpu().double()
                    self._check(found, J, batch, rows)
                    at = slice(batch.rows.start - stretch.start, batch.rows.stop - stretch.start)
                    scores[at] += rate * found
            return {"scores": scores}

        return score

    def in_layers(
        self, rows: range, given: Mapping[str, Tensor], chosen: Sequence[int], names: Sequence[str]
    ) -> Tensor:
        """(layers, chosen examples, queries): scores in parts that add up to them."""
        queries, _ = self._compared(rows, given)
        found = torch.zeros((len(names), len(chosen), len(rows)), dtype=torch.float64)
        at = {layer: k for k, layer in enumerate(names)}
        for c, rate in enumerate(self.what.rates):
            self._put(c)
            for first in range(0, len(chosen), self.batches.size):
                few = chosen[first : first + self.batches.size]
                J = self._gradients(self.batches.at(few))
                scale = self._norms(J, queries[c])
                for name, part in self._parts(J, queries[c]):
                    own = found[at[layer_of(name)], first : first + len(few)]
                    own += rate * (part.detach().double() / scale.double()).cpu()
        return found

    def _parts(self, J: GradientMatrix, held: Any) -> Iterator[tuple[str, Tensor]]:
        """Inner products with the queries by parameter, or by a block's weight."""
        if isinstance(held, Solved):
            yield from held.by_block(J)
            return
        with J._working(), torch.no_grad():
            for n, factor in J._factors.items():
                if isinstance(held, Mapping):
                    yield n, factor.gram(Dense(held[n].to(factor.device, factor.dtype)))
                else:
                    yield n, factor.gram(held[0]._factors[n])

    def _norms(self, J: GradientMatrix, held: Any) -> Tensor:
        """What inner products are divided by: 1, or for cosines both norms; infinity for 0."""
        if not self.what.cosine:
            return torch.ones((), device=J.device)
        scale = J.norms()[:, None] * held[1][None]
        return torch.where(scale == 0, torch.inf, scale)

    def _compared(self, rows: range, given: Mapping[str, Tensor]) -> tuple[list[Any], Compare]:
        """For each checkpoint what examples are compared with, and how."""
        if given:
            return [given], self._with_rows
        if self.what.fit is not None:
            return self._preconditioned(rows), self._with
        if self.what.adam:
            return self._held_rows(rows), self._adam
        return self._held(rows), self._with

    def _put(self, c: int) -> None:
        """A checkpoint's weights, into the models of the job and of the queries."""
        if self.what.checkpoints:
            for model in self.models:
                self.what.checkpoints[c].put(model)

    def _held(self, rows: range) -> list[Any]:
        """For each checkpoint the queries' gradients, as factors or formed, and their norms."""
        held = []
        size = len(rows) * bytes_of(self.batches.params.values()) * len(self.what.rates)
        for c in range(len(self.what.rates)):
            self._put(c)
            known, self.all_queries = self.all_queries, None
            if known is not None and len(known) == len(rows):
                matrices = [known]
            else:
                matrices = list(self.queries.matrices(rows))
            if self.what.checkpoints:
                matrices = [of_its_own(J, self.models) for J in matrices]
            K = concatenate(matrices)
            norms = K.norms() if self.what.cosine else None
            if size <= most_bytes(self.batches.params):
                K = K._map(lambda factor: factor.met_by(self.batches.size))
            held.append((K, norms))
        return held

    def _held_rows(self, rows: range) -> list[Any]:
        """For each checkpoint the queries' gradients, formed."""
        held = []
        for c in range(len(self.what.rates)):
            self._put(c)
            held.append(self.queries.rows(rows))
        return held

    def _gradients(self, batch: Batch) -> GradientMatrix:
        return api.gradients(self.batches.losses(batch), self.batches.params, **self.options)

    def _check(self, scores: Tensor, J: GradientMatrix, batch: Batch, rows: range) -> None:
        bad = (~scores.isfinite()).nonzero()
        if not len(bad):
            return
        i, q = bad[0].tolist()
        if bool(J[i : i + 1].norms().isfinite().all()):
            raise UsageError(
                f"Query {rows.start + q} has a gradient that is not finite or too large to be "
                f"multiplied with that of example {batch.rows[i]}, so it has no influences. Take "
                "it out, or find out why (see `job.losses(job.model, batch)`)."
            )
        raise UsageError(
            f"Example {batch.rows[i]} has a gradient that is not finite, so it has no influence. "
            "What came before is kept: take it out into another folder, or mend the losses and "
            "make the same call again."
        )

    # --- how an example is compared with queries -------------------------------------------------

    def _with(self, J: GradientMatrix, held: Any, c: int) -> Tensor:
        """(B, Q): inner products or cosines with factors."""
        if isinstance(held, Solved):
            return held.against(J)
        K, norms = held
        products = J @ K.T
        if not self.what.cosine:
            return products
        scale = J.norms()[:, None].to(products) * norms[None].to(products)
        return torch.where(scale == 0, 0.0, products / torch.where(scale == 0, 1.0, scale))

    def _with_rows(self, J: GradientMatrix, V: Any, c: int) -> Tensor:
        return J @ V

    def _adam(self, J: GradientMatrix, K: Any, c: int) -> Tensor:
        """(B, Q): cosines of Adam's steps for each example with the queries' gradients."""
        own, lost = self.what.adam[c], []
        each = 4 * sum(f.bytes_per_row for f in J._factors.values())
        for rows in chunks(len(J), each, limit(J.device)):
            lost.append(step_cosines(own, J[rows].dense(), K))
        return torch.cat(lost)

    def _preconditioned(self, rows: range) -> list[Any]:
        """The queries' gradients times the fit's inverse."""
        fit, terms = self.what.fit, self.what.terms
        assert fit is not None
        if terms is None:
            return [Solved(fit, self.queries.matrices(rows))]
        inverse = fit.in_terms(terms)
        return [(concatenate([J.precondition(inverse) for J in self.queries.matrices(rows)]), None)]
