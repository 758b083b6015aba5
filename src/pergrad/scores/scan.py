"""Score a whole data set.

Owns: `scan`: its arguments checked, the store opened, an engine chosen.
Does not know: how an engine works, or how a score is computed.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from pergrad.engine import Options
from pergrad.errors import UsageError
from pergrad.extras import need
from pergrad.inputs import Direction
from pergrad.matrix import GradientMatrix
from pergrad.scores.job import Job, MeanGradient
from pergrad.scores.results import Scores
from pergrad.scores.work import Mode

Groups = Literal["layer", "parameter"] | Mapping[str, Sequence[str]] | None
Against = Mapping[str, GradientMatrix | Direction | MeanGradient] | None


def scan(
    job: Job,
    out: str | PathLike[str],
    *,
    batch_size: int | Literal["auto"] = "auto",
    engine: Literal["local", "ray", "torchrun"] = "local",
    workers: int | None = None,
    resume: bool = True,
    against: Against = None,
    groups: Groups = None,
    mode: Mode = "eval",
    device: str | None = None,
    rescore: Literal["damaged", "failed"] | None = None,
    recheck: bool = True,
    seed: int = 0,
    progress: bool = True,
    address: str | None = None,
    source: str | None = None,
    command: str | None = None,
    **options: Any,
) -> Scores:
    """Score every example of a data set, and keep the scores in a folder.

    For each example its loss and the L2 norm of its gradient; on request the norm for each group of
    parameters, and the inner product and cosine with given gradients. Goes on where an earlier scan
    into the same folder stopped, for whatever reason it did.

    Args:
        job: the model, the data, and the losses.
        out: the folder, made if need be.
        batch_size: how many examples go through the model at once. "auto" starts from an estimate
            of the memory that an example needs, and halves when memory runs out.
        engine: "local": this process. "ray": workers of Ray, on this machine or a cluster.
            "torchrun": this call is made on every rank, and each scores its share; see
            docs/scale-out.md.
        workers: local, torchrun: how many processes fetch examples ahead (default 0: this process
            does); ray: how many score (default one for each GPU; without GPUs one for each CPU).
        resume: go on where an earlier scan into this folder stopped. With False the folder must not
            have scores yet.
        against: name -> what to compare each example's gradient with: a GradientMatrix (a column
            for each row), a direction as in `pergrad.dots`, or a `MeanGradient`.
        groups: "layer", "parameter", or name -> names of parameters: a norm for each.
        mode: "eval" (dropout off, batch norm by its running statistics), "train", or "as is".
        device: where to compute; the model is moved there and back. Default: where it is.
        rescore: "damaged": set damaged files aside and score their examples again. "failed": try
            again the examples that raised.
        recheck: when going on, score one finished batch again first, and refuse if the scores
            differ: this finds a changed loss function or changed data.
        seed: of random numbers drawn while an example is fetched or scored.
        progress: show a bar.
        address: ray: a cluster's address. Default: this machine.
        source: where the job was loaded from, for the manifest.
        command: how this was called, for the manifest. Default: this process's command line.
        **options: on_mixing, check_layout, chunk_bytes, as in `pergrad.norms`.

    Returns:
        Scores, which read the folder.

    Raises:
        UsageError: an argument is wrong, or no example at all can be scored.
        StoreError: the folder cannot be written to, another scan is writing to it, it is about
            another model, data set or settings, or a file in it is damaged.
        MixedExamplesError, UnsupportedError: the model's gradients cannot be had, as in
            `pergrad.norms`.
        WorkerError: workers of Ray or ranks were lost; what they had finished is stored.
        MissingExtraError: a package is missing; `pip install 'pergrad[scan]'` brings it.

    Cost: that of `pergrad.norms` on each batch and a few per cent; with references that of
        `pergrad.gradients`. Memory does not grow with the data set, but for a few bytes per
        example.

        >>> import tempfile, torch, pergrad
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> data = [torch.tensor([3.0, 4.0]), torch.tensor([0.0, 1.0])]
        >>> job = pergrad.Job(model, data, lambda model, x: model(x).squeeze(1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     scores = pergrad.scan(job, folder, progress=False)
        ...     scores.table()["norm"].to_pylist()
        [5.0, 1.0]
    """
    need("scan", "numpy", "pyarrow", "filelock", "rich")
    from pergrad.scores import driver, under_torchrun

    if not isinstance(job, Job):
        raise UsageError(
            f"`job` is a {type(job).__name__}. Pass a pergrad.Job(model, data, losses)."
        )
    _check_options(options)
    if mode not in ("eval", "train", "as is"):
        raise UsageError(f'mode is {mode!r}; pass "eval", "train" or "as is".')
    if rescore not in (None, "damaged", "failed"):
        raise UsageError(f'rescore is {rescore!r}; pass "damaged", "failed" or None.')
    if batch_size != "auto" and (not isinstance(batch_size, int) or batch_size < 1):
        raise UsageError(f'batch_size is {batch_size!r}; pass a positive number, or "auto".')
    request = driver.Request(
        job=job,
        folder=Path(out),
        batch_size=None if batch_size == "auto" else int(batch_size),
        engine=driver.engine(engine, workers, address),
        resume=resume,
        against=dict(against or {}),
        groups=driver.resolve_groups(groups, job),
        mode=mode,
        device=device,
        rescore=rescore,
        recheck=recheck,
        seed=seed,
        progress=progress,
        source=source,
        command=command,
        options=options,
    )
    run = under_torchrun.run if engine == "torchrun" else driver.run
    return Scores(run(request))


def _check_options(options: Mapping[str, Any]) -> None:
    """Those of the verbs that make sense for numbers that go to a disk."""
    allowed = [n for n in Options.__dataclass_fields__ if n not in ("retain_graph", "create_graph")]
    unknown = [n for n in options if n not in allowed]
    if unknown:
        raise UsageError(
            f"scan has no option {', '.join(unknown)}. Besides its own arguments it takes "
            f"{', '.join(allowed)}."
        )
    Options(**options)
