"""Sketch a data set: a few numbers of each gradient, so that queries take no pass over it.

Owns: `sketch` and `open_sketch`: arguments, the pass over the data, going on after a stop.
Does not know: how gradients are projected (`projection`), or what is asked (`index`).

    manifest.json            what was sketched, how, with which curvature
    rows-…, scales-…         see `shards`
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from math import prod
from os import PathLike
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from pergrad import api
from pergrad.attribution.asking import Asked
from pergrad.attribution.batches import (
    Batch,
    Batches,
    batches_of,
    check_evaluating,
    check_job,
    described,
)
from pergrad.attribution.blocks import Block
from pergrad.attribution.fit import Fit
from pergrad.attribution.folder import Folder, differences
from pergrad.attribution.index import Sketch
from pergrad.attribution.progress import bars, tell
from pergrad.attribution.projection import Coordinates, TensorSketch, plain_blocks
from pergrad.attribution.shards import Writer, ends
from pergrad.attribution.shown import check_keys
from pergrad.attribution.summing import blocks_in
from pergrad.attribution.together import Crew, Engine, Task, by_batches, hired
from pergrad.engine.run import PassOptions
from pergrad.errors import StoreError, UsageError
from pergrad.extras import need
from pergrad.scans.job import Job
from pergrad.scans.runners.ray_workers import Words
from pergrad.scans.scorer import prepared

WHAT = "pergrad sketch"
SIZE = 1024
IDENTITY = ("scored", "curvature", "settings")  # of a manifest: what it is about
WORDS = Words("sketch", "Make the same call again")


def sketch(
    job: Job,
    out: str | PathLike[str],
    *,
    curvature: Fit | None = None,
    size: int = SIZE,
    batch_size: int | None = None,
    seed: int = 0,
    mode: Literal["eval", "as is"] = "eval",
    engine: Engine = "local",
    workers: int | None = None,
    address: str | None = None,
    progress: bool = True,
    **options: Unpack[PassOptions],
) -> Sketch:
    """Keep a few numbers of each example's gradient, so that queries take no pass over the data.

        with a curvature      the `size` coordinates of (F + damping)^(-1/2) g_i with most energy,
                              in the curvature's basis
        without               a TensorSketch: E<P g_q, P g_i> = g_q' g_i, with variance at most
                              8 |g_q|² |g_i|² / size

    Goes on where an earlier call with the same arguments stopped, and opens the folder if it is
    finished. Of a data set that has grown at its end only the new examples are added.

    Args:
        job: the model, the training data, and the losses.
        out: the folder, made if need be.
        curvature: a Fit of this model, with the damping that scores are to have.
        size: numbers kept of each example, 2 bytes each.
        batch_size: how many examples go through the model at once; by default what memory allows.
        seed: of the TensorSketch, and of random numbers drawn while an example is fetched.
        mode: "eval" (dropout off, batch norm by its running statistics), or "as is".
        engine: "local": this process. "ray": workers of Ray. "torchrun": this call is made on every
            rank, and the folder is on a disk that all of them see. See docs/scale-out.md.
        workers: ray: how many (default one for each GPU; on the CPU one for each CPU).
        address: ray: a cluster's address. Default: this machine.
        progress: show a bar.
        **options: on_mixing, check_layout, chunk_bytes, as in `pergrad.norms`.

    Returns:
        Sketch: `index.query(queries, top=1000, rerank=job)`, `index.scores(queries)`.

    Raises:
        UsageError: an argument is wrong, or an example's gradient is not finite.
        StoreError: the folder is about another model, data set or settings.
        MixedExamplesError, UnsupportedError: as in `pergrad.norms`.
        WorkerError: workers of Ray or ranks were lost; what they had finished is kept.
        MissingExtraError: a package is missing; `pip install 'pergrad[attribution]'` brings it.

    Cost: a forward and a backward pass for each example, and the projection: of a layer with T
        positions T x size x log(size), or T products for each kept coordinate.
    Source: Pham and Pagh 2013, doi:10.1145/2487575.2487591; George et al. 2018, arXiv:1806.03884.

        >>> import tempfile, torch, pergrad
        >>> def losses(model, batch):
        ...     return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        >>> data = [(torch.randn(4), i % 3) for i in range(40)]
        >>> job = pergrad.Job(torch.nn.Linear(4, 3), data, losses, outputs=lambda m, b: m(b[0]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fit = pergrad.curvature(job, folder + "/fit")
        ...     index = pergrad.sketch(job, folder + "/index", curvature=fit, size=8)
        ...     answer = index.query(data[:2], top=10, rerank=job)
        >>> answer.top(0, 3).column_names
        ['rank', 'index', 'score', 'estimate', 'error']
    """  # noqa: E501
    need("attribution", "numpy", "pyarrow", "filelock", "safetensors")
    check_job(job)
    if mode not in ("eval", "as is"):
        raise UsageError(f'mode is {mode!r}; pass "eval" or "as is".')
    _check_fit(job, curvature)
    _check_size(size, Batches(job, 1))
    check_keys(job)
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
            about = _about(job, curvature, size, seed, mode, options)
        batches = replace(batches, size=crew.of_first(batches.size))
        crew.check_same({n: _told(about, n) for n in IDENTITY}, differences)
        tasks = _Sketching(batches, curvature, size, options)
        crew.lead(tasks, mode, lambda: _finish(folder, tasks, about, crew))
    return open_sketch(out, job, curvature=curvature)


def open_sketch(
    out: str | PathLike[str], job: Job, *, curvature: Fit | None = None
) -> Sketch:  # fmt: skip
    """Open what `pergrad.sketch` has written.

    Args:
        out: the folder.
        job: the job that was sketched, for the queries' gradients.
        curvature: the Fit that was sketched with, if one was.

    Returns:
        Sketch, as `pergrad.sketch` returns it.

    Raises:
        UsageError: the curvature is missing, or of another model.
        StoreError: there is no such folder, it is not finished, or it is about something else.

        >>> import tempfile, torch, pergrad
        >>> data = [(torch.randn(9), 1.0) for i in range(20)]
        >>> job = pergrad.Job(torch.nn.Linear(9, 1), data, lambda m, b: (m(b[0])[:, 0] - b[1])**2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pergrad.sketch(job, folder, size=4)
        ...     len(pergrad.open_sketch(folder, job))
        20
    """
    need("attribution", "numpy", "pyarrow", "filelock", "safetensors")
    check_job(job)
    _check_fit(job, curvature)
    folder = Folder(out, WHAT)
    old = folder.manifest()
    if old is None or not old["finished"]:
        state = "has no sketch" if old is None else "is not finished"
        raise StoreError(
            f"{folder.path} {state}. Make the same call of pergrad.sketch again: it goes on where "
            "it stopped."
        )
    if old["curvature"] is not None and curvature is None:
        raise UsageError(
            f"The sketch in {folder.path} is in the basis of the curvature in "
            f"{old['curvature']['folder']}. Pass curvature=, opened by the same call of "
            "pergrad.curvature as it was made with."
        )
    own = old["settings"]
    _same(
        folder, old, _about(job, curvature, own["size"], own["seed"], own["mode"], own["options"])
    )
    blocks = None
    if old["blocks"] is not None:
        blocks = blocks_in(old)
    return Sketch(folder, job, curvature, _projection(curvature, blocks, own["size"], own["seed"]))


def _check_fit(job: Job, fit: Any) -> None:
    if fit is None:
        return
    if not isinstance(fit, Fit):
        raise UsageError(
            f"curvature is a {type(fit).__name__}. Pass what pergrad.curvature returns. For one "
            "in a folder call pergrad.curvature(job, folder) again, which opens it."
        )
    Asked("solve", fit).check_weights(job)


def _check_size(size: Any, batches: Batches) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise UsageError(f"size is {size!r}; pass a positive number.")
    total = sum(prod(p.shape) for p in batches.params.values())
    if size > total:
        raise UsageError(
            f"size is {size:,}, and a gradient has {total:,} numbers: a sketch would be larger "
            "than what it stands for. Pass a smaller size, or use pergrad.influence, which is "
            "exact."
        )


def _about(
    job: Job, fit: Fit | None, size: int, seed: int, mode: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    curved = None
    if fit is not None:
        curved = {name: fit.about[name] for name in ("scored", "settings")}
        curved |= {"damping": fit.damping, "folder": str(fit.folder)}
    how = "TensorSketch" if fit is None else "coordinates of most energy"
    return {
        "scored": described(job),
        "curvature": curved,
        "settings": {
            "projection": how, "size": size, "seed": seed, "mode": mode, "options": dict(options)
        },
    }  # fmt: skip


def _told(about: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = about[name] or {}
    return {n: value for n, value in found.items() if n != "folder"}  # it may have moved


def _same(folder: Folder, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    differ = [
        f"{name}: {each}"
        for name in IDENTITY
        for each in differences(_told(old, name), _told(new, name))
    ]
    if differ:
        raise StoreError(
            f"The sketch in {folder.path} is of something else: {'; '.join(differ)}. Nothing was "
            "changed. Give this one another folder, or bring back what was."
        )


def _grown(old: Mapping[str, Any], job: Job) -> Mapping[str, Any]:
    """What was sketched, told as if it had been this data set, if that begins with it."""
    count = old["scored"]["examples"]
    if count >= len(job):
        return old
    keys = old["scored"]["keys_hash"]
    if keys is not None and job.key is not None:
        if keys != described(replace(job, data=Subset(job.data, range(count))))["keys_hash"]:
            return old
        keys = described(job)["keys_hash"]
    return {**old, "scored": {**old["scored"], "examples": len(job), "keys_hash": keys}}


def _same_data(
    folder: Folder, batches: Batches, how: Coordinates | TensorSketch, options: PassOptions
) -> None:
    """The first and the last example that are sketched are those of the data set.

    Raises:
        StoreError: they are not.
    """
    for i, vector, norm in ends(folder):
        batch = batches.at([i])
        J = api.gradients(batches.losses(batch), batches.params, **options)
        now, most = how.project(J)[0].cpu(), float(vector.abs().max())
        off = max(float((now - vector).abs().max()) - 5e-3 * most,
                  abs(float(J.norms()[0]) - norm) - 5e-3 * norm)  # fmt: skip
        if not off <= 0:
            raise StoreError(
                f"The sketch in {folder.path} is of another data set: example {i} has another "
                "gradient now. Nothing was changed. Give this one another folder, or bring back "
                "what was; new examples go to the end."
            )


def _blocks(
    batches: Batches, old: Mapping[str, Any] | None, fit: Fit | None, options: PassOptions
) -> list[Block] | None:
    """How each parameter lies in a matrix, for a TensorSketch."""
    if fit is not None:
        return None
    if old is not None:
        return blocks_in(old)
    first = batches.at(range(min(batches.size, len(batches.job))))
    return plain_blocks(api.gradients(batches.losses(first), batches.params, **options))


def _projection(
    fit: Fit | None, blocks: list[Block] | None, size: int, seed: int
) -> Coordinates | TensorSketch:
    if fit is not None:
        return Coordinates(fit, size)
    assert blocks is not None
    return TensorSketch(blocks, size, seed)


def _finish(folder: Folder, tasks: "_Sketching", about: dict[str, Any], crew: Crew) -> None:
    """All that is missing to the folder."""
    batches, old = tasks.batches, folder.manifest()
    total = len(batches.job)
    if old is not None:
        _same(folder, _grown(old, batches.job), about)
    writer = Writer(folder, tasks.size)
    blocks = _blocks(batches, old, tasks.fit, tasks.options)
    about["blocks"] = None if blocks is None else [asdict(block) for block in blocks]
    _same_data(folder, batches, tasks.projection(blocks), tasks.options)
    if old is not None and writer.next == total:
        return
    if old is None or total > old["scored"]["examples"]:
        folder.save_manifest({**about, "finished": False})
    left = range(writer.next, total)
    step = by_batches(len(left), batches.size)
    for rows, found in crew.each("vectors", about["blocks"] or [], {}, [left], step):
        writer.add(found["rows"], found["norms"])
        tell("sketched examples", rows.stop, total)
    writer.flush()
    folder.save_manifest({**about, "finished": True})


class _Sketching:
    """The job and the projection, and the one kind of tasks that these give."""

    def __init__(self, batches: Batches, fit: Fit | None, size: int, options: PassOptions) -> None:
        self.batches, self.fit, self.size, self.options = batches, fit, size, options

    @property
    def models(self) -> list[nn.Module]:
        """The job's."""
        return [self.batches.job.model]

    @property
    def device(self) -> str | None:
        """Where its parameters are."""
        return str(next(iter(self.batches.params.values())).device)

    def sent(self) -> tuple["_Sketching", dict[str, Any]]:
        """What a worker needs of this, and what users know of it by the names they know."""
        job = replace(self.batches.job, show=None, key=None)
        fit = None if self.fit is None else self.fit.of_job(None)
        batches = replace(self.batches, job=job)
        return _Sketching(batches, fit, self.size, self.options), {"job": job}

    def projection(self, blocks: list[Block] | None) -> Coordinates | TensorSketch:
        """How gradients become short."""
        return _projection(self.fit, blocks, self.size, self.batches.seed)

    def task(self, name: str, about: Sequence[Any], given: Mapping[str, Tensor]) -> Task:
        """Short vectors of examples, and their gradients' norms."""
        how = self.projection(blocks_in({"blocks": about}))

        def vectors(rows: range) -> dict[str, Tensor]:
            found, norms = [], []
            for batch in self.batches.over(rows):
                J = api.gradients(self.batches.losses(batch), self.batches.params, **self.options)
                norms.append(J.norms())
                _check(norms[-1], batch)
                found.append(how.project(J))
            return {"rows": torch.cat(found), "norms": torch.cat(norms)}

        return vectors


def _check(norms: Any, batch: Batch) -> None:
    bad = (~norms.isfinite()).nonzero()
    if len(bad):
        raise UsageError(
            f"Example {batch.rows[int(bad[0, 0])]} has a gradient that is not finite, so it cannot "
            "be sketched. What came before is kept: take it out into another folder, or mend the "
            "losses and make the same call again."
        )
