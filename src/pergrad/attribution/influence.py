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
from torch import Tensor

from pergrad import api
from pergrad.attribution import kernel, layers, ranking, shown
from pergrad.attribution.asking import asked
from pergrad.attribution.batches import Batches, check_evaluating, check_job, described
from pergrad.attribution.fit import Fit
from pergrad.attribution.folder import Folder, differences, tensors_from_bytes, tensors_to_bytes
from pergrad.attribution.found import WHAT, Influence
from pergrad.attribution.gauss_newton import Refining, lengths
from pergrad.attribution.progress import bars, tell
from pergrad.attribution.queries import most_bytes, queries_of
from pergrad.attribution.scoring import Scoring
from pergrad.attribution.together import Crew, Engine, by_batches, hired
from pergrad.engine.run import PassOptions
from pergrad.errors import StoreError, UsageError
from pergrad.extras import need
from pergrad.factors.numeric import bytes_of
from pergrad.factors.workspace import chunks
from pergrad.scans.checkpoints import weights_kept
from pergrad.scans.job import Job
from pergrad.scans.runners.ray_workers import Words
from pergrad.scans.scorer import prepared

IDENTITY = ("scored", "asked", "curvature", "settings")  # of a manifest: what it is about
WORDS = Words("computation of influences", "Make the same call again")
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
    groups: Literal["layer"] | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    mode: Literal["eval", "as is"] = "eval",
    engine: Engine = "local",
    workers: int | None = None,
    address: str | None = None,
    progress: bool = True,
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
    how far the query's loss falls, to first order, if the example counts once more in the mean loss
    (w[i] + 1 in (1/N) sum of w[i] loss[i]); else that of the inner product.

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
        groups: "layer": also in parts, one for each layer, that add up to the score; for the 24
            examples at each end of the first 200 queries, which a report shows. A folder that is
            finished gets them, too.
        batch_size: how many examples go through the model at once; by default what memory allows.
            Scores do not depend on it.
        seed: of random numbers drawn while an example is fetched.
        mode: "eval" (dropout off, batch norm by its running statistics), or "as is".
        engine: "local": this process. "ray": workers of Ray. "torchrun": this call is made on every
            rank, and the folder is on a disk that all of them see. See docs/scale-out.md.
        workers: ray: how many (default one for each GPU; on the CPU one for each CPU).
        address: ray: a cluster's address. Default: this machine.
        progress: show a bar for each pass.
        **options: on_mixing, check_layout, chunk_bytes, as in `pergrad.norms`.

    Returns:
        Influence: `.scores`, `.top(q)`, `.bottom(q)`, `.table()`, `.residuals`.

    Raises:
        UsageError: an argument is wrong, or an example's numbers are not finite.
        StoreError: the folder is about another model, data set or settings.
        MixedExamplesError, UnsupportedError: as in `pergrad.norms`.
        WorkerError: workers of Ray or ranks were lost; what they had finished is kept.
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
    if groups not in (None, "layer"):
        raise UsageError(f'groups is {groups!r}; pass "layer", or None for whole scores alone.')
    if groups is not None and what.method in ("kernel", "less"):
        raise UsageError(
            f"groups takes inner products apart, and a score of the method {what.method!r} is "
            "none. Leave out groups, or score with a curvature or without."
        )
    folder = Folder(out, WHAT)
    with ExitStack() as stack:
        stack.enter_context(bars(progress))
        crew = stack.enter_context(hired(engine, workers, address, WORDS))
        with crew.together():
            if crew.leads:
                stack.enter_context(folder.locked())
            jobs = [job, *([queries] if isinstance(queries, Job) else [])]
            jobs += [what.fit.job] if what.fit is not None else []
            models = {id(each.model): each.model for each in jobs}
            for model in models.values():
                stack.enter_context(prepared(model, mode))
            for each in jobs:
                check_evaluating(each)
            asking = queries_of(job, queries, show, batch_size, seed, options)
            if what.fit is not None:
                what.check_weights(job)
                what.check_weights(asking.batches.job)
            own = tuple(each.apart(list(models.values())) for each in what.checkpoints)
            what = replace(what, checkpoints=own)
            if what.checkpoints:
                stack.enter_context(weights_kept(list(models.values())))
        size = crew.of_first(asking.batches.size)
        asking = replace(asking, batches=replace(asking.batches, size=size))
        scoring = Scoring(Batches(job, size, seed), asking, what, options)
        run = _Run(folder, scoring, crew)
        with crew.together():
            about = run.about(mode)
        crew.check_same({n: about[n] or {} for n in IDENTITY}, differences)

        def lead() -> None:
            run.finish(about)
            found = Influence(out)
            shown.remember(folder, found, job, asking.batches.job)
            if groups is not None:
                layers.keep(folder, found, scoring, lambda: run.compared(found), run.scale)
            run.clean(len(found.manifest["blocks"]))

        crew.lead(scoring, mode, lead)
        return Influence(out)


class _Run:
    """One call of `influence`, with the folder open."""

    def __init__(
        self,
        folder: Folder,
        scoring: Scoring,
        crew: Crew,
    ) -> None:
        self.folder, self.scoring, self.crew = folder, scoring, crew
        self.batches, self.queries, self.what = scoring.batches, scoring.queries, scoring.what
        self.total = len(scoring.batches.job)
        self.dtype = api.result_dtype(scoring.batches.params)
        # 1/N of the data that the curvature is of, whichever examples are scored with it
        fit = self.what.fit
        count = fit.examples if fit is not None else 1
        self.scale = self.queries.sign / count

    def finish(self, about: dict[str, Any]) -> None:
        """All that is missing to the folder."""
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

    def clean(self, count: int) -> None:
        """Remove what was kept on the way to the scores of so many blocks of queries."""
        done = ("gram", *(f"{kind}{k}" for k in range(count)
                          for kind in ("solved", "refining", "ends", "products")))  # fmt: skip
        for kind in done:
            for _, _, path in self.folder.files(kind):
                path.unlink(missing_ok=True)

    # --- what it is about ------------------------------------------------------------------------

    def about(self, mode: str) -> dict[str, Any]:
        data = self.queries.sign > 0
        settings = self.what.settings() | {
            "queries": "data set" if data else "job",
            "seed": self.batches.seed,
            "mode": mode,
            "options": dict(self.scoring.options),
        }
        return {
            "scored": described(self.batches.job),
            "asked": described(self.queries.batches.job),
            "curvature": self.what.fitted(),
            "settings": settings,
            "sign": "the example helps: it lowers the query's loss" if data
            else "the example raises the measurement",
            "unit": self.what.unit(data),
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
            for name in IDENTITY
            for each in differences(old[name] or {}, new[name] or {})
        ]
        near = 1e-3 if self.dtype == torch.float32 else 1e-6
        for name, values in new["losses"].items():
            before = old["losses"][name]
            if len(before) == len(values) and not np.allclose(before, values, near, near):
                whose = "the queries have other losses" if name == "asked" else f"{name}: losses"
                differ.append(f"{whose}: they were {before[:2]} and are {values[:2]}")
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
            self.scoring.all_queries = J if len(J) == count and not self.what.checkpoints else None
            each = bytes_of(J._unique_tensors()) // len(J) * max(1, len(self.what.checkpoints))
        return [[s.start, s.stop] for s in chunks(count, each, budget)]

    # --- a block of queries ----------------------------------------------------------------------

    def _block(self, k: int, rows: range) -> list[float] | None:
        """All examples' scores for a block of queries, kept; the queries' residuals."""
        if self.what.method == "kernel":
            self._kernel(k, rows)
            return None
        V, residuals = self._solved(k, rows) if self.what.refine else ({}, None)
        self._stream(self._keeper(k, rows), rows, V, self.scale)
        return residuals

    def _keeper(self, k: int, rows: range) -> ranking.Keeper:
        if self.what.top is None:
            return ranking.Pairs(self.folder, f"pairs{k}")
        return ranking.Ends(self.folder, f"ends{k}", len(rows), self.what.top, self._numpy)

    @property
    def _numpy(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _stream(
        self, keeper: ranking.Keeper, rows: range, given: dict[str, Tensor], scale: float
    ) -> None:
        """Every training example that is missing, past the queries."""
        if keeper.next == self.total:
            return
        left = range(keeper.next, self.total)
        unit, step = self.scoring.batches.size, by_batches(len(left), self.scoring.batches.size)
        if len(self.what.rates) > 1:  # other weights are put into the model not too often
            unit = unit * BATCHES_PER_CHECKPOINT
            step = by_batches(len(left), unit, 1)
        each = self.crew.each("scores", [rows.start, rows.stop], given, [left], step)
        for stretch, found in each:
            keeper.add((scale * found["scores"]).to(self.dtype).numpy())
            tell(f"queries {rows.start} to {rows.stop - 1}", stretch.stop, self.total)
        keeper.flush()

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
        home = self.scoring.home
        return {n: t.to(home) for n, t in tensors.items()}, residuals

    def _refined(self, k: int, G: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        fit, kind = self.what.fit, f"refining{k}"
        assert fit is not None
        home = self.scoring.home
        now = Refining.begin(G, fit.solve_rows)
        while True:
            files = self.folder.files(kind)
            if files:
                tensors = tensors_from_bytes(self.folder.read(files[-1][2]))
                now = Refining.of({n: t.to(home) for n, t in tensors.items()}, files[-1][0])
            if now.steps >= self.what.refine:
                return now.X, lengths(now.R)
            now.step(self._curved, fit.added, fit.solve_rows)
            content = tensors_to_bytes(now.tensors())
            self.folder.add(kind, now.steps, len(now.rz), content, "safetensors")
            for _, _, path in files:
                path.unlink(missing_ok=True)
            tell("refining steps", now.steps, self.what.refine)

    def _curved(self, D: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The curvature times directions: a pass over the data that it is of."""
        assert self.what.fit is not None
        count = self.what.fit.examples
        total = {n: torch.zeros_like(d) for n, d in D.items()}
        step = by_batches(count, self.scoring.batches.size)
        for _, part in self.crew.each("curvature", [], D, [range(count)], step):
            for n, t in part.items():
                total[n] += t.to(total[n])
        return {n: t / count for n, t in total.items()}

    def compared(self, found: Influence) -> list[dict[str, Tensor]]:
        """For each block of queries what examples are compared with, where it was solved for."""
        blocks = [range(*block) for block in found.manifest["blocks"]]
        if not self.what.refine:
            return [{} for _ in blocks]
        return [self._solved(k, rows)[0] for k, rows in enumerate(blocks)]

    # --- the kernel ------------------------------------------------------------------------------

    def _kernel(self, k: int, rows: range) -> None:
        products = ranking.Pairs(self.folder, f"products{k}")
        keeper = self._keeper(k, rows)
        if keeper.next == self.total:
            return
        self._stream(products, rows, {}, 1.0)
        assert self.what.damping is not None
        solve = kernel.Solve(
            kernel.gram(self.folder, self.scoring.batches, self.crew, self.scoring.options),
            self.what.damping,
        )
        solved = solve(torch.from_numpy(ranking.read_pairs(self.folder, f"products{k}")))
        keeper.add((self.scale * solved[keeper.next :]).to(self.dtype).numpy())
        keeper.flush()

    # --- the strongest ---------------------------------------------------------------------------

    def _ranked(self, blocks: Sequence[range]) -> None:
        """One table of the ends of all queries."""
        if self.folder.files("ranked"):
            return
        assert self.what.top is not None
        table = ranking.of_blocks(self.folder, blocks, self.what.top, self._numpy)
        shown.keep_table(self.folder, "ranked", len(self.queries), table)
