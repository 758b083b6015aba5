"""Is influence worth anything here? Retrain on subsets, and see whether scores foretell what comes.

Owns: `evaluate`: subsets, retraining, measuring, going on after a stop; cheap baselines.
Does not know: statistics (`evaluation`), or how scores are computed.

    manifest.json       the settings, and who was scored
    outputs-{k}-…       the measurements of the k-th retrained model
"""

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pergrad.arrays import as_tensor
from pergrad.attribution.baselines import baselines, check_text
from pergrad.attribution.batches import Batches, batches_of, check_job
from pergrad.attribution.evaluation import Evaluation, ceiling, lds
from pergrad.attribution.folder import Folder, differences
from pergrad.attribution.found import Influence
from pergrad.attribution.progress import bars, tell
from pergrad.attribution.ranking import npy
from pergrad.attribution.together import Crew, Engine, Task, hired
from pergrad.errors import StoreError, UsageError
from pergrad.extras import need
from pergrad.scans.job import Job
from pergrad.scans.mistakes import not_called_with_two
from pergrad.scans.runners.ray_workers import Words
from pergrad.scans.scorer import prepared

WHAT = "pergrad evaluation"
LEAST_SUBSETS = 20

Train = Callable[[list[int], int], nn.Module]
Found = Influence | Tensor | np.ndarray | Sequence[Sequence[float]]


def evaluate(
    train: Train,
    job: Job,
    queries: Any,
    found: Found | Mapping[str, Found],
    *,
    out: str | PathLike[str],
    subsets: int = 50,
    share: float = 0.5,
    seeds: int = 2,
    seed: int = 0,
    text: Callable[[Any], str] | None = None,
    batch_size: int | None = None,
    engine: Engine = "local",
    workers: int | None = None,
    address: str | None = None,
    progress: bool = True,
) -> Evaluation:
    """Retrain on random subsets, and compare what comes with what scores foretell.

    The linear datamodelling score (LDS): for each query, Spearman's correlation over the subsets
    between the retrained model's output and the sum of the scores of the subset's members; then the
    mean over queries. 1: perfect; 0: no better than chance. Beside it stand a 95 % interval, the
    ceiling that the noise between seeds leaves, and baselines that cost next to nothing: a cosine
    of what goes into the last layer, for texts BM25, and random numbers. Goes on where an earlier
    call with the same arguments stopped; other scores cost no retraining.

    Args:
        train: (numbers of examples, seed) -> a model trained on those alone.
        job: the job that was scored.
        queries: the queries that were asked: a data set, whose output is minus the loss, or a Job,
            whose output is its losses.
        found: an Influence with every pair, scores (Q, N) as a tensor, an array or lists, or
            several by name.
        out: the folder for the measurements, made if need be.
        subsets: how many, at least 20.
        share: how much of the training set is in each, between 0 and 1.
        seeds: how many models for each subset; with one there is no ceiling.
        seed: of the subsets and the random baseline.
        text: for texts: a function from an item, of the job's data or of the queries', to its text.
            BM25, a ranking by words, is then a baseline, too.
        batch_size: how many queries go through a model at once.
        engine: "local": this process. "ray": workers of Ray. "torchrun": this call is made on every
            rank, and the folder is on a disk that all of them see. See docs/scale-out.md.
        workers: ray: how many (default one for each GPU; without GPUs one for each CPU).
        address: ray: a cluster's address. Default: this machine.
        progress: show a bar.

    Returns:
        Evaluation: `.scores`, `.ceiling`, `.best`; it prints as a table.

    Raises:
        UsageError: an argument is wrong, or `train` returns no model, one that is not finite, or
            one that does not depend on its subset.
        StoreError: the folder is about something else.
        WorkerError: workers of Ray or ranks were lost; what they had finished is kept.
        MissingExtraError: a package is missing; `pip install 'pergrad[attribution]'` brings it, and
            'pergrad[texts]' what BM25 needs.

    Cost: subsets x seeds trainings.
    Source: Park et al. 2023, arXiv:2303.14186.

        >>> import tempfile, torch, pergrad
        >>> data = [(torch.zeros(1), 2.0**i) for i in range(12)]
        >>> def losses(m, b):
        ...     return (m(b[0])[:, 0] - b[1])**2
        >>> def train(indices, seed):          # the mean of the targets, and nothing else
        ...     model = torch.nn.Linear(1, 1)
        ...     with torch.no_grad():
        ...         model.bias.fill_(sum(data[i][1] for i in indices) / len(indices))
        ...     return model
        >>> job = pergrad.Job(train(range(12), 0), data, losses)
        >>> queries = [(torch.zeros(1), -10.0), (torch.zeros(1), 5000.0)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = pergrad.influence(job, queries, folder + "/found")
        ...     result = pergrad.evaluate(
        ...         train, job, queries, found, out=folder + "/lds", subsets=20, seeds=1)
        >>> print(f"{result.scores['influence'].lds:.3f}")
        1.000
    """
    need("attribution", "numpy", "pyarrow", "filelock", "safetensors")
    check_job(job)
    if not callable(train):
        raise UsageError(
            f"train is a {type(train).__name__}. Pass a function of a list of example numbers and "
            "a seed, which returns a model trained on those examples alone."
        )
    _check_train(train)
    _check_numbers(subsets, share, seeds)
    check_text(text)
    asking = queries if isinstance(queries, Job) else replace(
        job, data=queries, key=None, show=None, params=None)  # fmt: skip
    sign = 1.0 if isinstance(queries, Job) else -1.0
    named = _named(found, len(asking), len(job))
    members = _members(len(job), subsets, share, seed)
    folder = Folder(out, WHAT)
    settings = {"subsets": subsets, "share": share, "seeds": seeds, "seed": seed,
                "examples": len(job), "queries": len(asking),
                "measured": "losses of a Job" if sign > 0 else "minus the loss"}  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(bars(progress))
        crew = stack.enter_context(hired(engine, workers, address, _words(seeds)))
        with crew.together():
            if crew.leads:
                stack.enter_context(folder.locked())
            size = batch_size or batches_of(asking, None, 0).size
        tasks = _Retraining(train, asking, sign, members, seeds, crew.of_first(size))
        crew.check_same({"settings": settings}, differences)
        crew.lead(tasks, "eval", lambda: _finish(folder, tasks, settings, crew))
        by_seed = _measurements(folder, tasks)
    outputs = by_seed.mean(0)
    named |= baselines(job, asking, seed, text)
    return Evaluation(
        {name: lds(members, outputs, scores) for name, scores in named.items()},
        ceiling(by_seed), outputs, members, settings,
    )  # fmt: skip


def _words(seeds: int) -> Words:
    def named(block: range) -> str:
        m, s = divmod(block.start, seeds)
        return f"on subset {m} with seed {s}"

    return Words("evaluation", "Make the same call again", "retrainings", named)


def _check_train(train: Any) -> None:
    """It can be called with two arguments."""
    why = not_called_with_two(train)
    if why is not None:
        raise UsageError(
            f"train is called with a list of example numbers and a seed, and {why}. Take both: "
            "def train(indices, seed): ..., which returns a model trained on those examples alone."
        )


def _check_numbers(subsets: Any, share: Any, seeds: Any) -> None:
    if not isinstance(subsets, int) or subsets < LEAST_SUBSETS:
        raise UsageError(
            f"subsets is {subsets!r}; pass at least {LEAST_SUBSETS}: a rank correlation over fewer "
            "says next to nothing."
        )
    if not isinstance(share, (int, float)) or not 0 < share < 1:
        raise UsageError(f"share is {share!r}; pass a number between 0 and 1, such as 0.5.")
    if not isinstance(seeds, int) or seeds < 1:
        raise UsageError(f"seeds is {seeds!r}; pass a positive number.")


def _named(found: Any, queries: int, examples: int) -> dict[str, np.ndarray]:
    """name -> scores (Q, N)."""
    several = found if isinstance(found, Mapping) else {"influence": found}
    named: dict[str, np.ndarray] = {}
    for name, each in several.items():
        scores = each.scores if isinstance(each, Influence) else as_tensor(each)
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (queries, examples):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UsageError(
                f"The scores of {name!r} are {got}, for {queries} queries and {examples} examples. "
                "Pass what pergrad.influence gave for this job and these queries, or a tensor, an "
                "array or lists (queries, examples)."
            )
        if scores.is_complex():
            raise UsageError(f"The scores of {name!r} are complex numbers. Pass real ones.")
        if not bool(scores.isfinite().all()):
            raise UsageError(f"The scores of {name!r} are not all finite. Leave these out.")
        named[name] = scores.detach().cpu().double().numpy()
    return named


def _members(examples: int, subsets: int, share: float, seed: int) -> np.ndarray:
    """(M, N): who is in which subset."""
    size = round(share * examples)
    if not 0 < size < examples:
        raise UsageError(
            f"A share of {share} of {examples} examples is {size}: nothing would differ between "
            "subsets. Pass another share, or more examples."
        )
    random = np.random.default_rng(seed)
    members = np.zeros((subsets, examples), bool)
    for row in members:
        row[random.permutation(examples)[:size]] = True
    return members


def _finish(folder: Folder, tasks: "_Retraining", settings: Mapping[str, Any], crew: Crew) -> None:
    """Every measurement that is missing to the folder."""
    old = folder.manifest()
    differ = differences(old["settings"], settings) if old else []
    if differ:
        raise StoreError(
            f"The evaluation in {folder.path} is of something else: {'; '.join(differ)}. "
            "Nothing was changed. Give this one another folder, or bring back what was."
        )
    if old is None:
        folder.save_manifest({"settings": settings})
    done = {first: path for first, _, path in folder.files("outputs")}
    total = tasks.seeds * len(tasks.members)
    left = [range(k, k + 1) for k in range(total) if k not in done]
    if left:
        tell("retrained models", len(done), total)  # the first may take long
    two = 0, tasks.seeds  # the first seed of the first two subsets
    first = {k: _read(folder, done[k]) for k in two if k in done}
    each = crew.each("outputs", [], {}, left, lambda size: 1, ordered=False) if left else ()
    for count, (block, found) in enumerate(each, len(done) + 1):
        k, values = block.start, found["outputs"].numpy()
        if k in two:
            first[k] = values
        if k in two and len(first) == 2 and np.array_equal(first[two[0]], first[two[1]]):
            raise UsageError(
                "`train` gave models with equal outputs for two different subsets, so it seems to "
                "ignore the examples that it is given. Train on those alone."
            )
        folder.add("outputs", k, k + 1, npy(values), "npy")
        tell("retrained models", count, total)


def _measurements(folder: Folder, tasks: "_Retraining") -> np.ndarray:
    """(seeds, M, Q): what all retrained models gave."""
    found = np.empty((tasks.seeds, len(tasks.members), len(tasks.asking)))
    for k, _, path in folder.files("outputs"):
        m, s = divmod(k, tasks.seeds)
        found[s, m] = _read(folder, path)
    return found


def _read(folder: Folder, path: Path) -> np.ndarray:
    found: np.ndarray = np.load(io.BytesIO(folder.read(path)), allow_pickle=False)
    return found


class _Retraining:
    """How models are made and measured, and the one kind of tasks that these give."""

    device = None  # where a model is trained is the user's business
    models: list[nn.Module] = []  # noqa: RUF012

    def __init__(
        self, train: Train, asking: Job, sign: float, members: np.ndarray, seeds: int, size: int
    ) -> None:
        self.train, self.asking, self.sign = train, asking, sign
        self.members, self.seeds, self.size = members, seeds, size

    def sent(self) -> tuple["_Retraining", dict[str, Any]]:
        """What a worker needs of this, and what users know of it by the names they know."""
        asking = replace(self.asking, show=None, key=None)
        there = _Retraining(self.train, asking, self.sign, self.members, self.seeds, self.size)
        return there, {"train": self.train, "queries": asking}

    def task(self, name: str, about: Sequence[Any], given: Mapping[str, Tensor]) -> Task:
        """The measurements of a retrained model."""
        return lambda block: {"outputs": torch.from_numpy(self._outputs(block.start))}

    def _outputs(self, k: int) -> np.ndarray:
        m, s = divmod(k, self.seeds)
        model = self.train(np.flatnonzero(self.members[m]).tolist(), s)
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"`train` returned a {type(model).__name__}. Return the trained model, a "
                "torch.nn.Module."
            )
        asking = replace(self.asking, model=model, params=None)
        values = self.sign * _measured(asking, self.size)
        if not np.isfinite(values).all():
            raise UsageError(
                f"The model retrained on subset {m} with seed {s} gives query "
                f"{int(np.flatnonzero(~np.isfinite(values))[0])} an output that is not finite. "
                "Check `train`; what was measured before is kept."
            )
        return values


def _measured(job: Job, size: int) -> np.ndarray:
    batches = Batches(job, size)
    with prepared(job.model, "eval"):
        return np.concatenate([
            job.losses(job.model, batch.content).detach().double().cpu().numpy()
            for batch in batches.over(range(len(job)))
        ])  # fmt: skip
