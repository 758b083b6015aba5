"""Score a whole data set.

Owns: `scan`: its arguments, and which engine carries it out.
Does not know: how an engine works, or how a score is computed.
"""

import inspect
import random
from collections.abc import Callable
from functools import update_wrapper
from os import PathLike
from typing import ParamSpec, Protocol

from pergrad.errors import UsageError
from pergrad.extras import need
from pergrad.scans.job import Job
from pergrad.scans.options import ScanOptions
from pergrad.scans.results import Scores, folder_of

P = ParamSpec("P")


class _Taking(Protocol[P]):
    """A function of a job, a folder, and options by keyword."""

    def __call__(
        self, job: Job, out: str | PathLike[str], *args: P.args, **options: P.kwargs
    ) -> Scores: ...


def _taking(
    options: Callable[P, ScanOptions],
) -> Callable[[Callable[[Job, str | PathLike[str], ScanOptions], Scores]], _Taking[P]]:
    """Let a function take the fields of `ScanOptions` by keyword, for people, editors and types."""

    def decorated(
        function: Callable[[Job, str | PathLike[str], ScanOptions], Scores],
    ) -> _Taking[P]:
        def taking(job: Job, out: str | PathLike[str], *args: P.args, **given: P.kwargs) -> Scores:
            if args:
                raise UsageError(
                    "scan takes a job and a folder; name everything else, such as "
                    f"batch_size={args[0]!r}."
                )
            return function(job, out, ScanOptions.of(given))

        own = inspect.signature(function)
        first = [own.parameters[name] for name in ("job", "out")]
        named = list(inspect.signature(options).parameters.values())
        update_wrapper(taking, function)
        taking.__signature__ = own.replace(parameters=[*first, *named])  # type: ignore[attr-defined]
        return taking

    return decorated


@_taking(ScanOptions)
def scan(job: Job, out: str | PathLike[str], options: ScanOptions) -> Scores:  # noqa: D417
    """Score every example of a data set, and keep the scores in a folder.

    For each example its loss and the L2 norm of its gradient; on request the norm for each group of
    parameters, the inner product and cosine with given gradients, and loss and norm at several
    checkpoints. Goes on where an earlier scan
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
            for each row), a direction as in `pergrad.dots`, or the gradients that a
            `MeanGradient` or `Gradients` stands for, made in the mode of this scan.
        checkpoints: other weights of the model, a list or name -> state dict, module, file (of
            torch.save or safetensors), or function that returns one: columns `loss@NAME` and
            `norm@NAME` for each, and `loss@mean`, `norm@mean` over all of them. A file of a list
            has the file's name, anything else in it its number.
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
        on_mixing, check_layout, chunk_bytes: as in `pergrad.norms`.

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
        `pergrad.gradients`, and with checkpoints once more for each. Memory does not grow with the
        data set, but for a few bytes per example; checkpoints are held in it.

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
    drawn = random.getstate()
    from pergrad.scans import driver
    from pergrad.scans.runners import torchrun

    random.setstate(drawn)  # rich draws a number when it is imported
    if not isinstance(job, Job):
        remedy = "Pass a pergrad.Job(model, data, losses)."
        if isinstance(out, Job):
            remedy = "The order is pergrad.scan(job, out): swap the arguments."
        elif inspect.isfunction(job):
            remedy = "Pass the pergrad.Job that it returns: call it."
        raise UsageError(f"`job` is a {type(job).__name__}. {remedy}")
    run = torchrun.run if options.engine == "torchrun" else driver.run
    return Scores(run(driver.request(job, folder_of(out), options)))
