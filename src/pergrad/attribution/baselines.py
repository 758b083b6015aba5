"""Scores that cost next to nothing, to stand beside those that take gradients.

Owns: random numbers, neighbours in the last layer's inputs, and BM25 for texts.
Does not know: retraining, statistics, how influence is computed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from pergrad.attribution.batches import Batch, batches_of
from pergrad.errors import UsageError
from pergrad.extras import need
from pergrad.scans.job import Job
from pergrad.scans.scorer import prepared


def baselines(
    job: Job, asked: Job, seed: int, text: Callable[[Any], str] | None
) -> dict[str, np.ndarray]:
    """name -> (Q, N): all that there are for these queries and examples."""
    random = np.random.default_rng(seed + 1)
    found = {"random": random.standard_normal((len(asked), len(job)))}
    cosines = neighbours(job, asked)
    if cosines is not None:
        found["last layer's neighbours"] = cosines
    if text is not None:
        found["BM25"] = bm25(texts_of(asked, text), texts_of(job, text))
    return found


def neighbours(job: Job, asked: Job) -> np.ndarray | None:
    """(Q, N): cosines of what goes into the last layer, less its mean over the examples.

    None where the first dimension of what goes in is not the example.

    Cost: a forward pass for each example and each query.
    """
    sides = [_last_inputs(replace(each, model=job.model, params=None)) for each in (asked, job)]
    if sides[0] is None or sides[1] is None or sides[0].shape[1] != sides[1].shape[1]:
        return None
    mean = sides[1].mean(0)
    unit = [x - mean for x in sides]
    unit = [x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in unit]
    return unit[0] @ unit[1].T


def check_text(text: object) -> None:
    """A function, or None; and what it needs is installed.

    Raises:
        UsageError: it is something else.
        MissingExtraError: `pip install 'pergrad[texts]'` brings what is missing.
    """
    if text is None:
        return
    if not callable(text):
        raise UsageError(
            f"text is a {type(text).__name__}. Pass a function from an item of the data set to its "
            "text."
        )
    need("texts", "bm25s")


def texts_of(job: Job, text: Callable[[Any], str]) -> list[str]:
    """The text of each example.

    Raises:
        UsageError: the function returned something else.
    """
    found = [text(job.data[i]) for i in range(len(job))]
    for i, each in enumerate(found):
        if not isinstance(each, str):
            raise UsageError(
                f"text returned a {type(each).__name__} for item {i}. Return its text, a str."
            )
    return found


def bm25(queries: list[str], texts: list[str]) -> np.ndarray:
    """(Q, N): how well the words of each text fit those of each query.

    Words that are rare count more, and more where a text is short; Lucene's form, k1 = 1.5, b = .75.

    Source: Robertson and Zaragoza 2009, doi:10.1561/1500000019; by bm25s, arXiv:2407.03618.
    """  # noqa: E501
    import bm25s

    def words(some: list[str]) -> list[list[str]]:
        return bm25s.tokenize(some, stopwords=None, return_ids=False, show_progress=False)

    corpus = words(texts)
    found = np.zeros((len(queries), len(texts)))
    if any(corpus):
        index = bm25s.BM25()
        index.index(corpus, show_progress=False)
        for row, asked in zip(found, words(queries), strict=True):
            if asked:
                row[:] = index.get_scores(asked)
    return found


def _last_inputs(job: Job) -> np.ndarray | None:
    """(n, d): what goes into the last layer that is called, averaged over positions.

    None if its first dimension is not the example.
    """
    batches = batches_of(job, None, 0)
    rows: list[np.ndarray] = []
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            seen[:] = [args[0].detach()]

    layers = [m for m in job.model.modules() if any(p.dim() > 1 for p in m._parameters.values()
                                                    if p is not None)]  # fmt: skip
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    try:
        with prepared(job.model, "eval"):
            for batch in batches.over(range(len(job))):
                x = _of(job, batch, seen)
                if x is None:
                    return None
                rows.append(x.double().cpu().numpy())
    finally:
        for hook in hooks:
            hook.remove()
    return np.concatenate(rows)


def _of(job: Job, batch: Batch, seen: list[Tensor]) -> Tensor | None:
    seen.clear()
    job.losses(job.model, batch.content)
    if not seen or seen[0].dim() < 2 or len(seen[0]) != len(batch.rows):
        return None
    x = seen[0]
    return x if x.dim() == 2 else x.flatten(1, -2).mean(1)
