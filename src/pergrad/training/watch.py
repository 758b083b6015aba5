"""A run that is watched: every k-th step is read, and nothing happens in the others.

Owns: `Watch`, its blocks around backward passes, and that no failure of ours reaches a user's step.
Does not know: how norms are read (`reader`), what is made of them (`recorder`).
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pergrad import inputs
from pergrad.errors import UsageError
from pergrad.extras import need
from pergrad.inputs import Params
from pergrad.training.noise_scale import NoiseScale
from pergrad.training.pieces import check_scale, norm_of, piece_of
from pergrad.training.reader import Reading
from pergrad.training.report import write
from pergrad.training.run import open_watch
from pergrad.training.trainers import (
    Batch,
    Maker,
    attach,
    lightning_callback,
    not_a_callback,
    transformers_callback,
)

if TYPE_CHECKING:
    from pergrad.training.recorder import Recorder

_OPEN: "weakref.WeakValueDictionary[str, Watch]" = weakref.WeakValueDictionary()


class Watch:
    """Watch a training run: norms of examples, noise scale, outliers, spikes, from every k-th step.

        watch = pergrad.Watch("run", every=10)
        for x, y, ids in loader:
            loss = F.cross_entropy(model(x), y)
            with watch(loss, model, len(x), keys=ids):
                loss.backward()
            optimizer.step(); optimizer.zero_grad()
        watch.close()

    What is trained is the same to the bit. Nothing is raised into a step: what fails (memory, the
    disk, an op that mixes examples) is logged once, by the logger `pergrad.watch`, stands in
    `failures`, and costs that step's numbers alone.

    Args:
        out: the run's folder, made if it is new. In a folder of the same run, watching goes on;
            steps that are stored there are not read again. A run that begins at the first of them
            again, with other examples or losses, is another run: nothing of it is read.
        every: steps whose number it divides are read.
        groups: None, or "layer" for norms by module.
        clip: a threshold; the share of norms above it is reported. Nothing is clipped.
        keep: how many examples the report shows.
        show: key -> what a person sees of an example: a PIL image, an array of one, a string, or a
            dict of "image", "text", "label". Called for outliers.
        log: called after each watched step with a dict of numbers, named as `pergrad/norm/p50`, and
            the step's number.
        resume: go on with the run in the folder. With False there must not be one.

    Attributes:
        failures: what could not be read or written, and why; each once.
        spikes: steps whose loss or gradient stands out, each with the examples that made it.
        noise: the NoiseScale of the latest watched steps.

    Raises:
        UsageError: an argument makes no sense.
        StoreError: the folder is something else's.
        MissingExtraError: pyarrow is not installed; `pip install 'pergrad[scan]'` brings it.

    Cost: nothing in the steps between; a watched one as `pergrad.reading`, and some milliseconds.
    Source: docs/api.md, `Watch`.

        >>> import tempfile, torch, pergrad
        >>> model = torch.nn.Linear(3, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     watch = pergrad.Watch(folder, every=2)
        ...     for _ in range(5):
        ...         loss = model(torch.randn(8, 3)).square().mean()
        ...         with watch(loss, model, examples=8):
        ...             loss.backward()
        ...         model.zero_grad()
        ...     watch.close()
        ...     pergrad.open_watch(folder).steps()["step"].to_pylist()
        [0, 2, 4]
    """

    def __init__(
        self,
        out: str | PathLike[str],
        every: int = 10,
        groups: str | None = None,
        clip: float | None = None,
        keep: int = 50,
        show: Callable[[Any], Any] | None = None,
        *,
        log: Callable[[dict[str, float], int], Any] | None = None,
        resume: bool = True,
    ) -> None:
        _check_arguments(every, groups, clip, keep, show, log)
        need("scan", "numpy", "pyarrow", "filelock")
        from pergrad.training.recorder import Recorder
        from pergrad.training.run_folder import RunFolder

        self.out = Path(out)
        other = _OPEN.get(str(self.out.absolute()))
        if other is not None:  # of an earlier cell of a notebook: one process writes once
            other.close()
        self.every, self.groups, self._show = every, groups, show
        folder = RunFolder(self.out)
        if not resume:
            folder.check_new()
        self._recorder: Recorder = Recorder(folder, clip, keep, log)
        self._next: int | None = None
        self._described = False
        self._end = weakref.finalize(self, self._recorder.close)
        _OPEN[str(self.out.absolute())] = self

    def __call__(
        self,
        loss: Tensor,
        model: Params,
        examples: int | None = None,
        keys: Sequence[Any] | Tensor | None = None,
        step: int | None = None,
        **options: Any,
    ) -> "Block":
        """A block around the backward pass of one micro-batch.

        Args:
            loss: the scalar loss, or the losses (B,), as for `reading`.
            model: as for `reading`.
            examples: as for `reading`.
            keys: B names of the examples, by which they are found again; a tensor or a list.
            step: the step's number. The same one several times: micro-batches of one step. None:
                each call is a step, and they are counted.
            **options: further options of `reading`: batch_dim, rest, on_mixing and others.

        Returns:
            A context manager that gives the Reading in watched steps, None in others.
        """
        number = step
        try:
            if number is None:
                number = self._count()
            elif not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise UsageError(f"`step` is {number!r}; pass the step's number, 0 or more.")
            else:
                self._start()
                self._recorder.begins_with(number)
            if number % self.every:
                self._recorder.finish_step()
                return Block(None, number, step is None)
        except Exception as error:
            self._recorder.fail(error)
            return Block(None, 0, False)
        return Block(self, number, step is None, loss, model, examples, keys, options)

    def _start(self) -> None:
        rank, ranks = 0, 1
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            rank, ranks = distributed.get_rank(), distributed.get_world_size()
        self._recorder.start(rank, ranks)

    def _count(self) -> int:
        if self._next is None:
            self._start()
            self._next = self._recorder.goes_on()
        self._next += 1
        return self._next - 1

    def __getattr__(self, name: str) -> Any:
        instead = "`watch.hf()` to transformers' Trainer, `watch.lightning()` to Lightning's"
        raise not_a_callback(name, "A Watch", instead)

    @property
    def hf(self) -> Callable[..., Any]:
        """A callback for transformers' Trainer, which alone is enough.

            trainer = Trainer(model, args, train_dataset=data, callbacks=[watch.hf()])

        Keys are hashes of the rows (the trainer drops ids); outliers' texts come from the
        tokenizer. What is logged goes to the trainer's loggers when the trainer logs. The call
        takes options of `reading`: on_mixing, check_layout, chunk_bytes. With
        `watch.hf(on_mixing="exact")` models with batch norm are read, too, for the price of a
        backward pass per example.

        Raises:
            UsageError: there is no such option.
            MissingExtraError: transformers is not installed.
        """
        return Maker("watch.hf", partial(transformers_callback, self), Watch.hf.__doc__)

    @staticmethod
    def keys_of(inputs: Any) -> list[str]:
        """The keys that `hf`, `attach` and `lightning` give to the rows of a trainer's batch.

        keys = watch.keys_of(collate(data))             # all of a data set, however it is padded
        keys.index(run.top(1)["key"][0].as_py())        # the row that a run's table names
        """
        return Batch(inputs).keys() or []

    def attach(
        self, trainer: Any, examples: Callable[[Any], int] | None = None, **options: Any
    ) -> None:  # fmt: skip
        """Watch a trainer of transformers or trl that computes its loss itself.

            watch.attach(trainer)                           # before trainer.train()

        Its `compute_loss` is wrapped; the loss is what that returns.

        Args:
            trainer: a trainer with `compute_loss` and `add_callback`.
            examples: inputs -> how many examples the loss is made of; by default the number of rows
                of `input_ids`, or of the first tensor.
            **options: as for `hf`.

        Raises:
            UsageError: it has no such methods, or there is no such option.
            MissingExtraError: transformers is not installed.
        """
        attach(self, trainer, examples, **options)

    @property
    def lightning(self) -> Callable[..., Any]:
        """A callback for lightning's Trainer, also where a module optimizes by hand.

            trainer = lightning.Trainer(callbacks=[watch.lightning()])

        The call takes the same options as `hf`.

        Raises:
            UsageError: there is no such option.
            MissingExtraError: lightning is not installed.
        """
        return Maker("watch.lightning", partial(lightning_callback, self), Watch.lightning.__doc__)

    def skips(self, step: int) -> bool:
        """Whether nothing is read in a step."""
        return step % self.every != 0

    def finish_step(self) -> None:
        """The step at hand is over; without it, the next block of another step says so."""
        try:
            self._recorder.finish_step()
        except Exception as error:
            self._recorder.fail(error)

    def is_over(self, step: int) -> bool:
        """Whether another step than this one is under way, in a trainer that counts its own."""
        return self._recorder.under_way not in (None, step)

    def fail(self, error: BaseException) -> None:
        """Note a failure of ours, once."""
        self._recorder.fail(error)

    def say(self, words: str) -> None:
        """Note something, once."""
        self._recorder.say(words)

    def also_log(self, log: Callable[[dict[str, float], int], Any]) -> None:
        """Another receiver of each watched step's numbers."""
        self._recorder.logs.append(log)

    @property
    def failures(self) -> list[str]:
        """What could not be read or written, and why."""
        return self._recorder.failures

    @property
    def spikes(self) -> list[str]:
        """Steps whose loss or gradient stands out, and the examples that made them."""
        return self._recorder.spikes

    @property
    def noise(self) -> NoiseScale:
        """The noise scale of the latest watched steps."""
        return self._recorder.noise

    def flush(self) -> None:
        """Write to the folder what has been read so far."""
        self._recorder.finish_step()
        self._recorder.flush()

    def report(self, path: str | PathLike[str] = "run.html", *, title: str | None = None) -> Path:
        """Write the run so far as one HTML page; see `Run.report`.

        Raises:
            UsageError: the file cannot be written.
            StoreError: nothing has been read yet, the folder has another run, or a file of the run
                is damaged.
            MissingExtraError: a package is missing; `pip install 'pergrad[report]'` brings it.
        """
        self.flush()
        self._recorder.check_written()
        return write(open_watch(self.out), path, title=title, said=self.failures)

    def close(self) -> None:
        """The run is over: write everything. Also done at exit."""
        self._end()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        noise = self.noise
        return f"Watch({str(self.out)!r}, every={self.every}, noise={noise})"


class Block:
    """The block around one backward pass; see `Watch`."""

    __slots__ = (
        "_first",
        "_given",
        "_keys",
        "_loss",
        "_model",
        "_preview",
        "_single",
        "_step",
        "_watch",
        "reading",
    )

    def __init__(
        self,
        watch: Watch | None,
        step: int,
        single: bool,
        loss: Any = None,
        model: Any = None,
        examples: int | None = None,
        keys: Any = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._watch, self._step, self._single = watch, step, single
        self._loss, self._model, self._keys = loss, model, keys
        self._given = examples, dict(options or {})
        self._preview: Callable[[int], Any] | None = None
        self.reading: Reading | None = None

    def describe(
        self, keys: Callable[[], list[str] | None], preview: Callable[[int], Any]
    ) -> None:  # fmt: skip
        """What a trainer's batch says of its examples; asked for only if it is needed."""
        self._keys, self._preview = keys, preview

    def __enter__(self) -> Reading | None:
        if self._watch is None:
            return None
        recorder = self._watch._recorder
        try:
            named = inputs.named(self._model)
            self._describe(recorder, named)
            if recorder.wants(self._step):
                self.reading = self._begin(recorder, named)
        except Exception as error:
            recorder.fail(error)
        return self.reading

    def _describe(self, recorder: "Recorder", named: Mapping[str, Tensor]) -> None:
        watch = self._watch
        assert watch is not None
        if watch._described:
            return
        watch._described = True
        shapes = [[n, list(p.shape), str(p.dtype)] for n, p in named.items()]
        of = type(self._model).__qualname__ if isinstance(self._model, nn.Module) else ""
        recorder.describe(of, shapes, {"every": watch.every, "groups": watch.groups})

    def _begin(self, recorder: "Recorder", named: Mapping[str, Tensor]) -> Reading | None:
        first = recorder.begins(self._step)
        self._first = not first or norm_of(named)[0] == 0  # gradients so far are this step's
        examples, options = self._given
        batch_dim, rest = options.pop("batch_dim", 0), options.pop("rest", False)
        return Reading(self._loss, self._model, examples, batch_dim, rest, options).__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch is None:
            return
        recorder, read = self._watch._recorder, self.reading
        try:
            if read is not None:
                read.__exit__(kind, error, trace)
                self._end(recorder, read)
        except Exception as failure:
            recorder.fail(failure)
        self._loss = self._model = None
        if self._single:
            try:
                recorder.finish_step()
            except Exception as failure:
                recorder.fail(failure)

    def _end(self, recorder: "Recorder", read: Reading) -> None:
        watch = self._watch
        assert watch is not None
        piece = piece_of(read, watch.groups)
        check_scale(read, piece)
        count = len(piece.norm)
        given = self._keys() if callable(self._keys) else self._keys
        if given is not None:
            keys = given.tolist() if isinstance(given, Tensor) else list(given)
            if len(keys) != count:
                raise UsageError(f"`keys` has {len(keys)} entries, for {count} examples.")
            piece.keys = [str(key) for key in keys]
            piece.preview = self._preview
            if (show := watch._show) is not None:
                piece.preview = lambda row: show(keys[row])
        grad_norm, sharded = norm_of(inputs.named(self._model))
        if self._given[1].get("rest") or "without" in read.how:
            grad_norm = float("nan")  # what belongs to no example is in it
        if not self._first:
            grad_norm = float("nan")
            recorder.say(
                "Gradients were not zero before the step, so the noise scale is left out. For "
                "micro-batches of one step pass their step's number: `watch(..., step=step)`."
            )
        recorder.add(piece, grad_norm, sharded)


def _check_arguments(
    every: Any, groups: Any, clip: Any, keep: Any, show: Any, log: Any
) -> None:  # fmt: skip
    def whole(name: str, value: Any, least: int) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(f"`{name}` is {value!r}; pass a whole number of at least {least}.")

    whole("every", every, 1)
    whole("keep", keep, 0)
    if groups not in (None, "layer"):
        raise UsageError(f'`groups` is {groups!r}; pass "layer" for norms by module, or None.')
    if clip is not None and (isinstance(clip, bool) or not clip > 0):
        raise UsageError(f"`clip` is {clip!r}; pass a positive norm, or None.")
    for name, value in (("show", show), ("log", log)):
        if value is not None and not callable(value):
            raise UsageError(f"`{name}` is {value!r}; pass a function, or None.")
