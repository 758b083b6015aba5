"""Is influence worth anything here? Retrain on subsets, and see whether scores foretell what comes.

Owns: `evaluate`: subsets, retraining, measuring, going on after a stop; cheap baselines.
Does not know: statistics (`evaluation`), or how scores are computed.

    manifest.json       the settings, and who was scored
    outputs-{k}-…       the measurements of the k-th retrained model
"""

import io
from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import numpy as np
from torch import Tensor, nn

from pergrad.attribution.baselines import baselines, check_text
from pergrad.attribution.batches import Batches, batches_of, check_job
from pergrad.attribution.evaluation import Evaluation, ceiling, lds
from pergrad.attribution.folder import Folder, differences
from pergrad.attribution.found import Influence
from pergrad.attribution.progress import tell
from pergrad.attribution.ranking import npy
from pergrad.errors import StoreError, UsageError
from pergrad.extras import need
from pergrad.scans.job import Job
from pergrad.scans.scorer import prepared

WHAT = "pergrad evaluation"
LEAST_SUBSETS = 20

Train = Callable[[list[int], int], nn.Module]


def evaluate(
    train: Train,
    job: Job,
    queries: Any,
    found: Influence | Tensor | Mapping[str, Influence | Tensor],
    *,
    out: str | PathLike[str],
    subsets: int = 50,
    share: float = 0.5,
    seeds: int = 2,
    seed: int = 0,
    text: Callable[[Any], str] | None = None,
    batch_size: int | None = None,
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
        found: an Influence with every pair, scores (Q, N), or several by name.
        out: the folder for the measurements, made if need be.
        subsets: how many, at least 20.
        share: how much of the training set is in each, between 0 and 1.
        seeds: how many models for each subset; with one there is no ceiling.
        seed: of the subsets and the random baseline.
        text: for texts: a function from an item, of the job's data or of the queries', to its text.
            BM25, a ranking by words, is then a baseline, too.
        batch_size: how many queries go through a model at once.

    Returns:
        Evaluation: `.scores`, `.ceiling`, `.best`; it prints as a table.

    Raises:
        UsageError: an argument is wrong, or `train` returns no model, one that is not finite, or
            one that does not depend on its subset.
        StoreError: the folder is about something else.
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
    with folder.locked():
        old = folder.manifest()
        differ = differences(old["settings"], settings) if old else []
        if differ:
            raise StoreError(
                f"The evaluation in {folder.path} is of something else: {'; '.join(differ)}. "
                "Nothing was changed. Give this one another folder, or bring back what was."
            )
        if old is None:
            folder.save_manifest({"settings": settings})
        by_seed = _outputs(folder, train, asking, sign, members, seeds, batch_size)
    outputs = by_seed.mean(0)
    named |= baselines(job, asking, seed, text)
    return Evaluation(
        {name: lds(members, outputs, scores) for name, scores in named.items()},
        ceiling(by_seed), outputs, members, settings,
    )  # fmt: skip


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
        scores = each.scores if isinstance(each, Influence) else each
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (queries, examples):
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise UsageError(
                f"The scores of {name!r} are {got}, for {queries} queries and {examples} examples. "
                "Pass what pergrad.influence gave for this job and these queries, or a tensor "
                "(queries, examples)."
            )
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


def _outputs(
    folder: Folder, train: Train, asking: Job, sign: float, members: np.ndarray, seeds: int,
    batch_size: int | None,
) -> np.ndarray:  # fmt: skip
    """(seeds, M, Q): every retrained model's measurements, those that are missing made."""
    done = {first: path for first, _, path in folder.files("outputs")}
    found = np.empty((seeds, len(members), len(asking)))
    size = batch_size or batches_of(asking, None, 0).size
    for k in range(seeds * len(members)):
        m, s = divmod(k, seeds)
        if k in done:
            content = folder.read(done[k])
            found[s, m] = np.load(io.BytesIO(content), allow_pickle=False)
            continue
        model = train(np.flatnonzero(members[m]).tolist(), s)
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"`train` returned a {type(model).__name__}. Return the trained model, a "
                "torch.nn.Module."
            )
        values = sign * _measured(replace(asking, model=model, params=None), size)
        if not np.isfinite(values).all():
            raise UsageError(
                f"The model retrained on subset {m} with seed {s} gives query "
                f"{int(np.flatnonzero(~np.isfinite(values))[0])} an output that is not finite. "
                "Check `train`; what was measured before is kept."
            )
        found[s, m] = values
        if m == 1 and np.array_equal(values, found[s, 0]):
            raise UsageError(
                "`train` gave models with equal outputs for two different subsets, so it seems to "
                "ignore the examples that it is given. Train on those alone."
            )
        folder.add("outputs", k, k + 1, npy(values), "npy")
        tell("retrained models", k + 1, seeds * len(members))
    return found


def _measured(job: Job, size: int) -> np.ndarray:
    batches = Batches(job, size)
    with prepared(job.model, "eval"):
        return np.concatenate([
            job.losses(job.model, batch.content).detach().double().cpu().numpy()
            for batch in batches.over(range(len(job)))
        ])  # fmt: skip
