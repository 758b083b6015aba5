"""Estimate a model's curvature from a data set: K-FAC, EK-FAC, Shampoo or the diagonal.

Owns: `curvature`: its arguments checked, passes over the data, going on after a stop, its folder.
Does not know: what is summed (`estimate`), or what a fit does with gradients (`fit`).

    manifest.json                 what was estimated from what, and the blocks
    state-{stage}-{next}-….safetensors     sums so far, while it is being estimated
    fit-{0}-{examples}-….safetensors       the bases and eigenvalues, when it is
"""

import time
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from os import PathLike
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from pergrad import api
from pergrad.attribution import estimate
from pergrad.attribution.batches import (
    Batch,
    batches_of,
    check_evaluating,
    check_job,
    described,
)
from pergrad.attribution.blocks import Block, blocks_of
from pergrad.attribution.fit import DAMPING, Curved, Fit, check_damping
from pergrad.attribution.folder import (
    Folder,
    differences,
    tensors_from_bytes,
    tensors_to_bytes,
)
from pergrad.attribution.likelihood import outputs_of, price, resolve_labels
from pergrad.attribution.progress import bars, tell
from pergrad.attribution.summing import Summing, blocks_in
from pergrad.attribution.together import Crew, Engine, by_batches, hired
from pergrad.engine.run import PassOptions
from pergrad.errors import StoreError, UsageError, users_line
from pergrad.extras import need
from pergrad.scans.job import Job
from pergrad.scans.model_state import prepared
from pergrad.scans.runners.ray_workers import Words

WHAT = "pergrad curvature"
SECONDS_BETWEEN_STATES = 20.0
WORDS = Words("estimation", "Make the same call again")
PASSES = ("covariances", "eigenvalues")
KINDS = ("kfac", "ekfac", "shampoo", "diagonal")


def curvature(
    job: Job,
    out: str | PathLike[str],
    *,
    kind: estimate.Kind = "ekfac",
    labels: Literal["all", "given"] | int | None = None,
    damping: float = DAMPING,
    batch_size: int | None = None,
    seed: int = 0,
    mode: Literal["eval", "as is"] = "eval",
    engine: Engine = "local",
    workers: int | None = None,
    address: str | None = None,
    progress: bool = True,
    **options: Unpack[PassOptions],
) -> Fit:
    """Estimate the curvature of the loss, to precondition gradients with.

        F = mean over examples of E[G G'], labels drawn from the model

    in blocks: a weight with its bias (one for each group of a convolution), an embedding, a scale.
    F is the generalised Gauss-Newton matrix of a likelihood's loss. Goes on where an earlier call
    with the same arguments stopped, and opens the folder if it is finished.

    Args:
        job: the model, the data, the losses, and `outputs` for labels that the model draws.
        out: the folder, made if need be.
        kind: "ekfac": eigenvectors of Kronecker factors, their eigenvalues estimated anew.
            "kfac": Kronecker factors. "shampoo": eigenvectors of E[G G'] and E[G' G], the same
            eigenvalues. "diagonal": no eigenvectors.
        labels: "all": the expectation over labels exactly, a backward pass for each class. A
            number: as many draws, fresh ones for the eigenvalues. "given": those of the data set,
            the empirical Fisher matrix. Default: "all" for outputs (B, C) with C up to 64, else 8.
            "all" of more than 64 classes is done, with a warning that says what it takes.
        damping: what is added to each block, as a share of its mean eigenvalue.
        batch_size: how many examples go through the model at once; by default what memory allows.
        seed: of the labels drawn. An example's labels do not depend on its batch.
        mode: "eval" (dropout off, batch norm by its running statistics), or "as is".
        engine: "local": this process. "ray": workers of Ray. "torchrun": this call is made on every
            rank, and the folder is on a disk that all of them see. See docs/scale-out.md.
        workers: ray: how many (default one for each GPU; on the CPU one for each CPU).
        address: ray: a cluster's address. Default: this machine.
        progress: show a bar for each pass.
        **options: on_mixing, check_layout, chunk_bytes, as in `pergrad.norms`.

    Returns:
        A Fit: `J.precondition(fit)`, `fit.solve(K)`, `print(fit)`.

    Raises:
        UsageError: an argument is wrong, or an example has numbers that are not finite.
        StoreError: the folder is about another model, data set or settings.
        MixedExamplesError, UnsupportedError: as in `pergrad.norms`.
        WorkerError: workers of Ray or ranks were lost; what they had finished is kept.
        MissingExtraError: a package is missing; `pip install 'pergrad[attribution]'` brings it.

    Cost: for each example one forward pass, and a backward pass with the products of each layer's
        inputs and output gradients, for every label and twice for "ekfac"; eigenvectors of every
        side, up to 8192 wide. Memory: the model's and twice that of the sides, in float64.
    Source: Martens and Grosse 2015, arXiv:1503.05671; George et al. 2018, arXiv:1806.03884; Grosse
        et al. 2023, arXiv:2308.03296.

        >>> import tempfile, torch, pergrad
        >>> def losses(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> data = [(torch.randn(4), i % 3) for i in range(20)]
        >>> job = pergrad.Job(torch.nn.Linear(4, 3), data, losses, outputs=lambda m, b: m(b[0]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fit = pergrad.curvature(job, folder)
        >>> fit.blocks["weight"].Lambda.shape          # the bias is a fifth column
        torch.Size([1, 3, 5])
        >>> J = pergrad.gradients(losses(job.model, (torch.ones(2, 4), torch.tensor([0, 1]))), job.model)
        >>> J.precondition(fit).shape
        torch.Size([2, 15])
    """  # noqa: E501
    need("attribution", "numpy", "pyarrow", "filelock", "safetensors")
    check_job(job)
    check_damping(damping)
    if kind not in KINDS:
        raise UsageError(f"kind is {kind!r}; pass one of {', '.join(map(repr, KINDS))}.")
    if mode not in ("eval", "as is"):
        raise UsageError(f'mode is {mode!r}; pass "eval" or "as is".')
    if labels is not None and labels != "given":
        if job.outputs is None:
            raise UsageError(
                "labels are drawn from the model's outputs, and the job has none: pass "
                '`Job(outputs=lambda model, batch: logits)`, or labels="given".'
            )
    elif labels is None and job.outputs is None:
        labels = "given"
    folder = Folder(out, WHAT)
    with ExitStack() as stack:
        stack.enter_context(bars(progress))
        crew = stack.enter_context(hired(engine, workers, address, WORDS))
        with crew.together():
            if crew.leads:
                stack.enter_context(folder.locked())
            stack.enter_context(prepared(job.model, mode))
            check_evaluating(job)
            batches = batches_of(job, batch_size, seed)
        batches = replace(batches, size=crew.of_first(batches.size))
        with crew.together():
            run = _Run(folder, Summing(batches, kind, labels, options), mode, crew)
        crew.check_same({n: run.about[n] for n in ("scored", "settings")}, differences)
        crew.lead(run.summing, mode, run.finish)
        return run.fit(damping)


class _Run:
    """One call of `curvature`, with the folder open."""

    def __init__(self, folder: Folder, summing: Summing, mode: str, crew: Crew) -> None:
        self.folder, self.summing, self.crew = folder, summing, crew
        self.batches, self.kind = summing.batches, summing.kind
        self.params, self.total = summing.params, len(summing.batches.job)
        self.last = time.monotonic()
        first = self.batches.at(range(min(self.batches.size, self.total)))
        outputs = None if summing.labels == "given" else outputs_of(self.batches, first)
        summing.labels = self.labels = resolve_labels(summing.labels, outputs)
        self.price = "" if outputs is None else price(self.labels, outputs, self.kind)
        self.about = self._about(mode)
        self.first = first
        self.tensors: dict[str, Tensor] | None = None

    def finish(self) -> None:
        """All that is missing to the folder."""
        old, done = self.folder.manifest(), self.folder.files("fit")
        if old is not None:
            self._same(old, self.about)
        self.about["blocks"] = (
            old["blocks"] if old else [asdict(block) for block in self._blocks(self.first)]
        )
        blocks = blocks_in(self.about)
        self.estimators = [estimate.Estimator(block, self.kind) for block in blocks]
        if old is None:
            self.folder.save_manifest({**self.about, "finished": False})
        if not done:
            if self.price:
                warnings.warn(self.price, UserWarning, stacklevel=users_line())
            self.tensors = self._estimated()
            content = tensors_to_bytes(self.tensors)
            self.folder.add("fit", 0, self.total, content, "safetensors")
            self.folder.save_manifest({**self.about, "finished": True})
        for _, _, path in self.folder.files("state"):
            path.unlink(missing_ok=True)

    def fit(self, damping: float) -> Fit:
        """What the folder has."""
        tensors = self.tensors
        if tensors is None:
            tensors = tensors_from_bytes(self.folder.read(self.folder.files("fit")[-1][2]))
        if not self.crew.leads:
            self.about["blocks"] = (self.folder.manifest() or {})["blocks"]
        shapes = {n: tuple(p.shape) for n, p in self.params.items()}
        curved = [
            Curved(block, **{
                part: tensors[f"{part} {block.weight}"]
                for part in ("Lambda", "left", "right", "A", "S")
                if f"{part} {block.weight}" in tensors
            })
            for block in blocks_in(self.about)
        ]  # fmt: skip
        return Fit(curved, shapes, self.about, self.folder.path, damping, self.batches.job)

    def _about(self, mode: str) -> dict[str, Any]:
        return {
            "scored": described(self.batches.job),
            "losses": self._sample(),
            "settings": {
                "kind": self.kind,
                "labels": self.labels,
                "likelihood": self.batches.job.likelihood,
                "seed": self.batches.seed,
                "mode": mode,
                "options": dict(self.summing.options),
            },
        }

    def _sample(self) -> list[float]:
        """Losses of the first and last examples, by which other data are recognised."""
        rows = sorted({*range(min(2, self.total)), self.total - 1})
        return self.batches.losses(self.batches.at(rows)).detach().double().tolist()

    def _same(self, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
        differ = [*differences(old["scored"], new["scored"]),
                  *differences(old["settings"], new["settings"])]  # fmt: skip
        was, now = (torch.tensor(each.get("losses", new["losses"])) for each in (old, new))
        near = 1e-3 if api.result_dtype(self.params) == torch.float32 else 1e-6
        if not differ and not torch.allclose(was, now, near, near):
            differ = [f"losses were {was.tolist()[:2]} and are {now.tolist()[:2]}"]
        if differ:
            raise StoreError(
                f"The curvature in {self.folder.path} is of something else: {'; '.join(differ)}. "
                "Nothing was changed. Give this one another folder, or bring back what was."
            )

    def _blocks(self, first: Batch) -> list[Block]:
        losses, _ = next(self.summing.losses(first, 0))
        J = api.gradients(losses, self.params, **self.summing.options)
        if self.labels == "given":
            self.summing.first = J  # the first batch's, which the first pass begins with
        return blocks_of(J._factors)

    @property
    def _draws(self) -> int:
        return self.labels if isinstance(self.labels, int) else 1

    # --- passes over the data --------------------------------------------------------------------

    def _estimated(self) -> dict[str, Tensor]:
        state, stage, begin = self._state()
        found: dict[str, Tensor] = {}
        if stage == 0:
            sums = state or self.summing.empty(self.estimators, 0)
            sums = self._pass(0, begin, sums) if self.kind != "diagonal" else sums
            state, begin = self._turned(sums), 0
        for i, e in enumerate(self.estimators):
            for part in ("left", "right", "A", "S"):
                if f"{i} {part}" in state:
                    found[f"{part} {e.block.weight}"] = state[f"{i} {part}"]
        if any(e.corrected for e in self.estimators):
            state = self._pass(1, begin, state)
        for i, e in enumerate(self.estimators):
            Lambda = state[f"{i} Lambda"]
            if e.corrected:
                Lambda = Lambda / (self.total * self._draws)
            found[f"Lambda {e.block.weight}"] = Lambda
        dtype = api.result_dtype(self.params)
        return {n: t.to(dtype) for n, t in found.items()}

    def _turned(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the sums of the first pass to bases, and Lambda where it is known or starts at 0."""
        state: dict[str, Tensor] = {}
        examples = float(self.total * self._draws)
        for i, e in enumerate(self.estimators):
            own = {n.split(" ", 1)[1]: t for n, t in sums.items() if n.split(" ", 1)[0] == str(i)}
            mixed = e.mixed(own)
            if self.kind != "diagonal" and e.block.how != "diagonal":
                A, S = e.sides(mixed, examples)
                state |= {f"{i} A": A, f"{i} S": S}
                state |= {f"{i} {side}": Q for side, Q in e.bases(mixed).items()}
            if e.corrected:
                state[f"{i} Lambda"] = torch.zeros(e.block.shape, dtype=torch.float64)
            else:
                state[f"{i} Lambda"] = e.product(mixed, examples)
        return state

    def _pass(self, stage: int, begin: int, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add all examples from `begin` on, and keep the state now and then."""
        if begin == self.total:
            return sums
        bases = {n: t for n, t in sums.items() if stage == 1 and n.endswith((" left", " right"))}
        self.summing.into = sums if self.crew.alone else None
        step = by_batches(self.total - begin, self.batches.size)
        each = self.crew.each(
            PASSES[stage], self.about["blocks"], bases, [range(begin, self.total)], step
        )
        for rows, part in each:
            for n, t in part.items():
                sums[n] = sums[n] + t if n in sums else t
            self._keep(stage, rows.stop, sums)
            tell(PASSES[stage], rows.stop, self.total)
        return sums

    # --- going on --------------------------------------------------------------------------------

    def _keep(self, stage: int, after: int, sums: Mapping[str, Tensor]) -> None:
        if time.monotonic() - self.last < SECONDS_BETWEEN_STATES:
            return
        old = self.folder.files("state")
        self.folder.add("state", stage, after, tensors_to_bytes(sums), "safetensors")
        for _, _, path in old:
            path.unlink(missing_ok=True)
        self.last = time.monotonic()

    def _state(self) -> tuple[dict[str, Tensor], int, int]:
        """Sums so far, in which pass, and up to which example."""
        files = self.folder.files("state")
        if not files:
            return {}, 0, 0
        stage, after, path = files[-1]
        return tensors_from_bytes(self.folder.read(path)), stage, after
