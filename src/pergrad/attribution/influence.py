"""Influence: which training examples matter for a prediction, streamed over the training set.

Owns: `influence`: passes over the training set, going on after a stop, its folder.
Does not know: what its arguments may be (`asking`), how files are read again (`found`).

    manifest.json            what was asked of what, sign, unit; residuals when it is finished
    keys-…, shown-…          names and previews, see `shown`
    solved{k}-…              with refining: (H + damping)⁻¹ times the gradients of query block k
    refining{k}-{step}-…     conjugate gradients half-way
    gram-…                   rows of the kernel
    pairs{k}-…, ends{k}-…    scores, see `ranking`
    ranked-…                 the ends of all queries
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor, nn

from pergrad import api
from pergrad.attribution import kernel, ranking, shown
from pergrad.attribution.adam import step_cosines
from pergrad.attribution.asking import Asked, asked
from pergrad.attribution.basis import Solved
from pergrad.attribution.batches import Batch, Batches, check_evaluating, check_job, described
from pergrad.attribution.fit import Fit
from pergrad.attribution.folder import Folder, differences, tensors_from_bytes, tensors_to_bytes
from pergrad.attribution.found import WHAT, Influence
from pergrad.attribution.gauss_newton import Curvature, Refining, lengths
from pergrad.attribution.progress import tell
from pergrad.attribution.queries import Queries, most_bytes, queries_of
from pergrad.engine.run import PassOptions
from pergrad.errors import StoreError, UsageError
from pergrad.extras import need
from pergrad.factors.numeric import bytes_of
from pergrad.factors.workspace import chunks, limit
from pergrad.matrices import concatenate
from pergrad.matrix import GradientMatrix
from pergrad.scans.checkpoints import of_its_own, weights_kept
from pergrad.scans.job import Job
from pergrad.scans.scorer import prepared

BATCHES_PER_CHECKPOINT = 16  # between two of which other weights are put into the model


def influence(
    job: Job,
    queries: Any,
    out: str | PathLike[str],
    *,
    curvature: Fit | None = None,
    refine: int | None = None,
    checkpoints: Sequence[Any] | None = None,
    rates: Sequence[float] | None = None,
    cosine: bool = False,
    adam: Any = None,
    method: Literal["kernel"] | None = None,
    top: int | None = None,
    damping: float | None = None,
    terms: int | None = None,
    show: Callable[[int], Any] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    mode: Literal["eval", "as is"] = "eval",
    **options: Unpack[PassOptions],
) -> Influence:
    """Score every training example for every query: how much does it help, or harm?

        inner products        g_q' g_i, or their cosines; summed over checkpoints (TracIn)
        with a curvature      (1/N) g_q' (H + damping)⁻¹ g_i
        method="kernel"       the same with the empirical Fisher matrix, exactly

    with g_i an example's gradient and g_q a query's. **Sign**: for queries given as a data set a
    positive score means that the example helps: more of it lowers the query's loss. For queries
    given as a Job, its losses are a measurement (a logit, a margin), and positive raises it; a Job
    that returns a loss therefore has the opposite sign. **Unit**: with a curvature or the kernel,
    the change for each unit of weight that the example has more in the mean loss, divided by N; else
    that of the inner product.

    Queries are held, and training examples stream by. Goes on where an earlier call with the same
    arguments stopped, and opens the folder if it is finished.

    Args:
        job: the model, the training data, and the losses.
        queries: a data set with items as in the job's, or a Job with its own losses, for the same
            parameters.
        out: the folder, made if need be.
        curvature: a Fit of this model. H is its estimate, or, with refining, the whole Gauss-Newton
            matrix (the empirical Fisher matrix for labels="given") of the data that it was fitted to.
        refine: steps of conjugate gradients, each a pass over those data. Default with a curvature:
            5. 0: the curvature's own estimate.
        checkpoints: state dicts, files or modules; scores are summed over them. Default: the model
            as it is.
        rates: what each checkpoint's scores are multiplied with, such as its learning rate.
        cosine: compare directions alone: gradients of norm 1.
        adam: for LESS, `optimizer.state_dict()` of Adam, one for each checkpoint: rate x cosine of
            the query's gradient and Adam's step for the example.
        method: "kernel": exact, without fit, by a matrix of N x N inner products.
        top: keep the highest and lowest `top` scores of each query. Default: every pair.
        damping: a share of each block's mean curvature. Default: that of the curvature, which is
            1 with refining unless it was given another than .1; for the kernel .5 of the mean
            squared norm.
        terms: the curvature's inverse as so many Kronecker products, with refine=0: faster for
            layers of few positions, and an approximation; 8 lose next to nothing. Default: exactly.
        show: how a person sees query i of a data set in a report, as in `Job(show=)`; a Job of
            queries has its own.
        batch_size: how many examples go through the model at once; by default what memory allows.
            Scores do not depend on it.
        seed: of random numbers drawn while an example is fetched.
        mode: "eval" (dropout off, batch norm by its running statistics), or "as is".
        **options: on_mixing, check_layout, chunk_bytes, as in `pergrad.norms`.

    Returns:
        Influence: `.scores`, `.top(q)`, `.bottom(q)`, `.table()`, `.residuals`.

    Raises:
        UsageError: an argument is wrong, or an example's numbers are not finite.
        StoreError: the folder is about another model, data set or settings.
        MixedExamplesError, UnsupportedError: as in `pergrad.norms`.
        MissingExtraError: a package is missing; `pip install 'pergrad[attribution]'` brings it.

    Cost: a forward and a backward pass for each training example and checkpoint, and products with
        the queries; for each refining step as much as that again for every output, or three passes
        for every query where that is less. Memory: the model, the queries (their factors, or with a
        curvature their gradients, in blocks where memory is short), and a batch.
    Source: Koh and Liang 2017, arXiv:1703.04730; Pruthi et al. 2020, arXiv:2002.08484; Grosse et al.
        2023, arXiv:2308.03296; Xia et al. 2024, arXiv:2402.04333.

        >>> import tempfile, torch, pergrad
        >>> data = [(torch.ones(2), 1.0), (-torch.ones(2), 1.0)]
        >>> job = pergrad.Job(torch.nn.Linear(2, 1), data, lambda m, b: (m(b[0])[:, 0] - b[1])**2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = pergrad.influence(job, data, folder)
        ...     found.scores.shape
        torch.Size([2, 2])
    """  # noqa: E501
    need("attribution", "numpy", "pyarrow", "filelock", "safetensors")
    check_job(job)
    if mode not in ("eval", "as is"):
        raise UsageError(f'mode is {mode!r}; pass "eval" or "as is".')
    what = asked(job, curvature, refine, checkpoints, rates, cosine, adam, method, top, damping,
                 terms)  # fmt: skip
    folder = Folder(out, WHAT)
    with ExitStack() as stack:
        stack.enter_context(folder.locked())
        jobs = [job, *([queries] if isinstance(queries, Job) else [])]
        jobs += [what.fit.job] if what.fit is not None else []
        models = {id(each.model): each.model for each in jobs}
        for model in models.values():
            stack.enter_context(prepared(model, mode))
        for each in jobs:
            check_evaluating(each)
        batches = Batches(job, 1, seed)
        about = queries_of(job, queries, show, batch_size, seed, options)
        if what.fit is not None:
            what.check_weights(job)
            what.check_weights(about.batches.job)
        own = tuple(each.apart(list(models.values())) for each in what.checkpoints)
        what = replace(what, checkpoints=own)
        batches = Batches(job, batch_size or about.batches.size, seed)
        run = _Run(folder, batches, about, what, options)
        if what.checkpoints:
            stack.enter_context(weights_kept(list(models.values())))
        run.finish(mode)
        found = Influence(out)
        shown.remember(folder, found, job, about.batches.job)
    return found


class _Run:
    """One call of `influence`, with the folder open."""

    def __init__(
        self,
        folder: Folder,
        batches: Batches,
        queries: Queries,
        what: Asked,
        options: PassOptions,
    ) -> None:
        self.folder, self.batches, self.queries = folder, batches, queries
        self.what, self.options = what, options
        self.total = len(batches.job)
        self.all_queries: GradientMatrix | None = None  # if known, as factors
        self.dtype = api.result_dtype(batches.params)
        # 1/N of the data that the curvature is of, whichever examples are scored with it
        count = what.fit.examples if what.fit is not None else 1
        self.scale = queries.sign / count

    def finish(self, mode: str) -> None:
        """All that is missing to the folder."""
        about = self._about(mode)
        old = self.folder.manifest()
        if old is not None:
            self._same(old, about)
            if old["finished"]:
                return
            about["blocks"] = old["blocks"]
        else:
            shown.keep_keys(self.folder, "keys", self.batches.job)
            shown.keep_keys(self.folder, "askedkeys", self.queries.batches.job)
            about["blocks"] = self._blocks()
            self.folder.save_manifest({**about, "finished": False})
        blocks = [range(*block) for block in about["blocks"]]
        residuals = [self._block(k, block) for k, block in enumerate(blocks)]
        if self.what.top is not None:
            self._ranked(blocks)
        if self.what.refine:
            about["residuals"] = [float(r) for each in residuals for r in each or ()]
        self.folder.save_manifest({**about, "finished": True})
        done = ("gram", *(f"{kind}{k}" for k in range(len(blocks))
                          for kind in ("solved", "refining", "ends", "products")))  # fmt: skip
        for kind in done:
            for _, _, path in self.folder.files(kind):
                path.unlink(missing_ok=True)

    # --- what it is about ------------------------------------------------------------------------

    def _about(self, mode: str) -> dict[str, Any]:
        data = self.queries.sign > 0
        settings = self.what.settings() | {
            "queries": "data set" if data else "job",
            "seed": self.batches.seed,
            "mode": mode,
            "options": dict(self.options),
        }
        return {
            "scored": described(self.batches.job),
            "asked": described(self.queries.batches.job),
            "curvature": self.what.fitted(),
            "settings": settings,
            "sign": "the example helps: it lowers the query's loss" if data
            else "the example raises the measurement",
            "unit": self.what.unit,
            "losses": {
                "scored": self._sample(self.batches), "asked": self._sample(self.queries.batches)
            },
        }  # fmt: skip

    def _sample(self, batches: Batches) -> list[float]:
        """Losses of the first and last examples, by which other data are recognised."""
        ends = {*range(min(2, len(batches.job))), len(batches.job) - 1}
        return [float(batches.losses(batches.at([i])).detach()[0]) for i in sorted(ends)]

    def _same(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        differ = [
            f"{name}: {each}"
            for name in ("scored", "asked", "curvature", "settings")
            for each in differences(old[name] or {}, new[name] or {})
        ]
        near = 1e-3 if self.dtype == torch.float32 else 1e-6
        for name, values in new["losses"].items():
            before = old["losses"][name]
            if len(before) == len(values) and not np.allclose(before, values, near, near):
                differ.append(f"{name}: losses were {before[:2]} and are {values[:2]}")
        if differ:
            raise StoreError(
                f"The influences in {self.folder.path} are of something else: {'; '.join(differ)}. "
                "Nothing was changed. Give these another folder, or bring back what was."
            )

    def _blocks(self) -> list[list[int]]:
        """Queries that are held together."""
        count, budget = len(self.queries), most_bytes(self.batches.params)
        if self.what.formed:
            size = bytes_of(self.batches.params.values())
            each = size * (6 if self.what.refine else 2)
        else:
            J = next(self.queries.matrices(range(min(count, self.queries.batches.size))))
            self.all_queries = J if len(J) == count and not self.what.checkpoints else None
            each = bytes_of(J._unique_tensors()) // len(J) * max(1, len(self.what.checkpoints))
        return [[s.start, s.stop] for s in chunks(count, each, budget)]

    # --- a block of queries ----------------------------------------------------------------------

    def _block(self, k: int, rows: range) -> list[float] | None:
        """All examples' scores for a block of queries, kept; the queries' residuals."""
        if self.what.method == "kernel":
            self._kernel(k, rows)
            return None
        if self.what.refine:
            V, residuals = self._solved(k, rows)
            self._stream(self._keeper(k, rows), lambda: [V], self._with_rows, rows)
            return residuals
        if self.what.fit is not None:
            held = self._preconditioned
            self._stream(self._keeper(k, rows), lambda: held(rows), self._with, rows)
            return None
        by_adam = bool(self.what.adam)
        held, compare = (self._held_rows, self._adam) if by_adam else (self._held, self._with)
        self._stream(self._keeper(k, rows), lambda: held(rows), compare, rows)
        return None

    def _keeper(self, k: int, rows: range) -> ranking.Keeper:
        if self.what.top is None:
            return ranking.Pairs(self.folder, f"pairs{k}")
        return ranking.Ends(self.folder, f"ends{k}", len(rows), self.what.top, self._numpy)

    @property
    def _numpy(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _put(self, c: int) -> None:
        """A checkpoint's weights, into the models of the job and of the queries."""
        if self.what.checkpoints:
            for model in self._models:
                self.what.checkpoints[c].put(model)

    @property
    def _models(self) -> list[nn.Module]:
        both = {id(j.model): j.model for j in (self.batches.job, self.queries.batches.job)}
        return list(both.values())

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
                matrices = [of_its_own(J, self._models) for J in matrices]
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

    def _stream(
        self,
        keeper: ranking.Keeper,
        held: Callable[[], list[Any]],
        compare: Callable[[GradientMatrix, Any, int], Tensor],
        rows: range,
    ) -> None:
        """Every training example that is missing, past the queries."""
        begin = keeper.next
        if begin == self.total:
            return
        queries, rates = held(), self.what.rates
        several = len(rates) > 1
        step = self.batches.size * (BATCHES_PER_CHECKPOINT if several else 1)
        if not several:
            self._put(0)
        for first in range(begin, self.total, step):
            stretch = range(first, min(first + step, self.total))
            scores = torch.zeros((len(stretch), len(rows)), dtype=torch.float64)
            for c, rate in enumerate(rates):
                if several:
                    self._put(c)
                for batch in self.batches.over(stretch):
                    J = self._gradients(batch)
                    found = compare(J, queries[c], c).detach().cpu().double()
                    self._check(found, J, batch, rows)
                    scores[batch.rows.start - first : batch.rows.stop - first] += rate * found
            keeper.add((self.scale * scores).to(self.dtype).numpy())
            tell(f"queries {rows.start} to {rows.stop - 1}", stretch.stop, self.total)
        keeper.flush()

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

    # --- with a curvature ------------------------------------------------------------------------

    def _solved(self, k: int, rows: range) -> tuple[dict[str, Tensor], list[float]]:
        """The queries' gradients times the refined inverse, and how far from solved they are."""
        fit, files = self.what.fit, self.folder.files(f"solved{k}")
        assert fit is not None
        if not files:
            G = self.queries.rows(rows)
            norms = lengths(G)
            tensors, left = self._refined(k, G)
            shares = left / torch.where(norms == 0, 1.0, norms)
            whole = {**tensors, "residuals": shares.cpu()}
            self.folder.add(
                f"solved{k}", rows.start, rows.stop, tensors_to_bytes(whole), "safetensors"
            )
        # always as they are on the disk, as a run that goes on has them
        tensors = tensors_from_bytes(self.folder.read(self.folder.files(f"solved{k}")[-1][2]))
        residuals = tensors.pop("residuals").tolist()
        home = next(iter(self.batches.params.values())).device
        return {n: t.to(home) for n, t in tensors.items()}, residuals

    def _refined(self, k: int, G: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        fit, kind = self.what.fit, f"refining{k}"
        assert fit is not None
        given = fit.about["settings"]["labels"] == "given"
        batches = Batches(fit.job, self.batches.size, self.batches.seed)
        system = Curvature(batches, empirical=given, options=self.options)
        home = next(iter(G.values())).device
        now = Refining.begin(G, fit.solve_rows)
        while True:
            files = self.folder.files(kind)
            if files:
                tensors = tensors_from_bytes(self.folder.read(files[-1][2]))
                now = Refining.of({n: t.to(home) for n, t in tensors.items()}, files[-1][0])
            if now.steps >= self.what.refine:
                return now.X, lengths(now.R)
            now.step(system.times, fit.added, fit.solve_rows)
            content = tensors_to_bytes(now.tensors())
            self.folder.add(kind, now.steps, len(now.rz), content, "safetensors")
            for _, _, path in files:
                path.unlink(missing_ok=True)
            tell("refining steps", now.steps, self.what.refine)

    # --- the kernel ------------------------------------------------------------------------------

    def _kernel(self, k: int, rows: range) -> None:
        products = ranking.Pairs(self.folder, f"products{k}")
        keeper = self._keeper(k, rows)
        if keeper.next == self.total:
            return
        scale, self.scale = self.scale, 1.0
        self._stream(products, lambda: self._held(rows), self._with, rows)
        self.scale = scale
        assert self.what.damping is not None
        solve = kernel.Solve(kernel.gram(self.folder, self.batches, self.options),
                             self.what.damping)  # fmt: skip
        solved = solve(torch.from_numpy(ranking.read_pairs(self.folder, f"products{k}")))
        keeper.add((scale * solved[keeper.next :]).to(self.dtype).numpy())
        keeper.flush()

    # --- the strongest ---------------------------------------------------------------------------

    def _ranked(self, blocks: Sequence[range]) -> None:
        """One table of the ends of all queries."""
        if self.folder.files("ranked"):
            return
        assert self.what.top is not None
        table = ranking.of_blocks(self.folder, blocks, self.what.top, self._numpy)
        shown.keep_table(self.folder, "ranked", len(self.queries), table)
