"""One call by several processes: one that leads, and others that do tasks for it.

Owns: who does which task, how it gets there and back, and that an error on one is an error on all.
Does not know: what a task computes, files.

The leader alone has the folder. It asks for tasks by name (`each`), as ranges of examples, and
gets what came of them, in order. Alone it does them itself; with the ranks of torchrun each rank
does its share, the leader included; with Ray its workers do.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pergrad.attribution.folder import tensors_from_bytes, tensors_to_bytes
from pergrad.errors import UsageError, WorkerError
from pergrad.extras import need
from pergrad.scans.model_state import prepared
from pergrad.scans.runners.local import recut
from pergrad.scans.runners.packing import packed
from pergrad.scans.runners.ray_workers import Words, Workers, plan, session
from pergrad.scans.runners.torchrun import Ranks, ranks

Engine = Literal["local", "ray", "torchrun"]
Rows = Mapping[str, Tensor]
Task = Callable[[range], dict[str, Tensor]]

MOST = 16  # batches of a task, where a task has to travel
EACH = 4  # tasks that each process gets at least, so that all end at about the same time
AHEAD = 8  # tasks for each worker that may be done before one that comes first


class Tasks(Protocol):
    """What every process has that does tasks."""

    def task(self, name: str, about: Sequence[Any], given: Rows) -> Task:
        """What does the tasks of a name; `given` are tensors that the leader knows."""

    def sent(self) -> tuple["Tasks", dict[str, Any]]:
        """What a worker needs of this, and what users know of it by the names they know."""

    @property
    def models(self) -> list[nn.Module]:
        """Those that tasks go through."""

    @property
    def device(self) -> str | None:
        """Where they are; None if that does not matter."""


Step = Callable[[int], int]


def by_batches(examples: int, unit: int, most: int = MOST) -> Step:
    """Examples of a task, as a function of how many processes there are."""

    def step(size: int) -> int:
        return unit if size == 1 else unit * max(1, min(most, examples // unit // (EACH * size)))

    return step


class Crew:
    """This process alone."""

    alone = leads = True
    tasks: Tasks

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done within is done by all, and an error on one is an error on all."""
        yield

    def of_first(self, value: Any) -> Any:
        """What the leader says; anything that JSON can hold."""
        return value

    def check_same(self, about: Any, differences: Callable[[Any, Any], list[str]]) -> None:
        """All are about the same model, data and settings.

        Raises:
            UsageError: they are not.
        """

    def lead(self, tasks: Tasks, mode: Any, run: Callable[[], None]) -> None:
        """Run it on the leader; meanwhile the others do tasks."""
        self.tasks = tasks
        run()

    def each(
        self,
        name: str,
        about: Sequence[Any],
        given: Rows,
        runs: Sequence[range],
        step: Step,
        *,
        ordered: bool = True,
    ) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """What comes of each task.

        Args:
            name: of the tasks.
            about: what else they need to know.
            given: tensors that the leader knows.
            runs: examples, which tasks are pieces of.
            step: how many examples a task has.
            ordered: in the order of the examples; else each is known as soon as it is done.

        Raises:
            UsageError: the tasks cannot be sent to another process.
            WorkerError: another process has failed or is gone.
        """
        do = self.tasks.task(name, about, given)
        for block in recut(runs, step(1)):
            yield block, do(block)


class _OnRanks(Crew):
    """This process among the ranks of torchrun; the first one leads."""

    alone = False

    def __init__(self, own: Ranks) -> None:
        self.own, self.leads = own, own.first
        self.over = False  # all know of an error already

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.own.agree(error)
        self.own.agree(None)

    def of_first(self, value: Any) -> Any:
        return self.own.gather(value)[0]

    def check_same(self, about: Any, differences: Callable[[Any, Any], list[str]]) -> None:
        said = self.own.gather(about)
        for rank, other in enumerate(said):
            differ = [each for part in about for each in differences(said[0][part], other[part])]
            if differ:
                raise UsageError(
                    f"Rank {rank} would compute something else than rank 0: {'; '.join(differ)}. "
                    "Load the same weights and the same data set on every rank "
                    "(`torch.manual_seed` before a model is made at random), and make the same "
                    "call on all of them."
                )

    def lead(self, tasks: Tasks, mode: Any, run: Callable[[], None]) -> None:
        self.tasks = tasks
        if not self.leads:
            self._serve()
            return
        try:
            run()
        except Exception as error:
            if self.over:
                raise
            self.own.agree(error)
        self.own.agree(None)

    def each(
        self,
        name: str,
        about: Sequence[Any],
        given: Rows,
        runs: Sequence[range],
        step: Step,
        *,
        ordered: bool = True,
    ) -> Iterator[tuple[range, dict[str, Tensor]]]:
        tensors = {n: t.detach().cpu().contiguous() for n, t in given.items()}
        blocks = [[run.start, run.stop] for run in runs]
        wanted = [name, list(about), _forms(tensors), blocks, step(self.own.size)]
        self._agree(None, wanted)
        yield from self._share(name, about, self._shared(tensors), runs, step(self.own.size))

    def _serve(self) -> None:
        """Do tasks until the leader has no more."""
        while (wanted := self._agree(None)[0]) is not None:
            name, about, forms, runs, size = wanted
            given = self._shared(_empty(forms))
            for _ in self._share(name, about, given, [range(*run) for run in runs], size):
                pass

    def _share(
        self, name: str, about: Sequence[Any], given: Rows, runs: Sequence[range], size: int
    ) -> Iterator[tuple[range, dict[str, Tensor]]]:
        """This rank's tasks; on the leader what comes of all of them."""
        blocks, count, do = recut(runs, size), self.own.size, None
        for at in range(0, len(blocks), count):
            now = blocks[at : at + count]
            found: dict[str, Tensor] = {}
            error = None
            try:
                do = do or self.tasks.task(name, about, given)
                if self.own.rank < len(now):
                    found = _here(do(now[self.own.rank]))
            except Exception as raised:
                error = raised
            forms = self._agree(error, _forms(found))
            if not self.leads:
                for tensor in found.values():
                    self._tell(partial(dist.send, dst=0, group=self.own.group), tensor)
                continue
            taken = [found, *map(_empty, forms[1:])]
            for rank, tensors in enumerate(taken[1:], 1):
                for tensor in tensors.values():
                    self._tell(partial(dist.recv, src=rank, group=self.own.group), tensor)
            yield from zip(now, taken, strict=False)  # the last round may be short

    def _shared(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The leader's numbers, on every rank."""
        for tensor in tensors.values():
            self._tell(partial(dist.broadcast, src=0, group=self.own.group), tensor)
        return tensors

    def _agree(self, error: Exception | None, value: Any = None) -> list[Any]:
        try:
            return self.own.agree(error, value)
        except Exception:
            self.over = True
            raise

    def _tell(self, act: Callable[[Tensor], Any], tensor: Tensor) -> None:
        try:
            act(tensor)
        except RuntimeError as error:
            self.over = True
            raise WorkerError(
                f"Rank {self.own.rank} of {self.own.size} has lost another rank: {error} What has "
                "been written is whole. Start the same command again: it goes on from there."
            ) from error


class _OnRay(Crew):
    """This process, with workers of Ray that do its tasks."""

    alone = False

    def __init__(self, workers: int | None, address: str | None, words: Words) -> None:
        self.wanted, self.address, self.words = workers, address, words
        self.hired: tuple[Workers, int] | None = None  # when there is something to do
        self.key = 0

    def lead(self, tasks: Tasks, mode: Any, run: Callable[[], None]) -> None:
        self.tasks, self.mode = tasks, mode
        with ExitStack() as self.life:
            run()

    def each(
        self,
        name: str,
        about: Sequence[Any],
        given: Rows,
        runs: Sequence[range],
        step: Step,
        *,
        ordered: bool = True,
    ) -> Iterator[tuple[range, dict[str, Tensor]]]:
        import ray

        workers, size = self.hired = self.hired or self._hire(ray)
        tasks, self.key = recut(runs, step(size)), self.key + 1
        refs = [ray.put(tensors_to_bytes(given))] if given else []
        told = (self.key, name, list(about), refs)
        done: dict[range, dict[str, Tensor]] = {}  # what waits for something that comes before it
        left = iter(tasks)
        wanted = next(left, None)
        for block, found in workers.each(
            tasks,
            lambda: told,
            room=lambda: len(done) < AHEAD * size,
            set_aside=not ordered,
            ahead=2 if ordered else 1,
        ):
            if not ordered:
                yield block, found
                continue
            done[block] = found
            while wanted in done:
                yield wanted, done.pop(wanted)
                wanted = next(left, None)

    def _hire(self, ray: Any) -> tuple[Workers, int]:
        import ray.cloudpickle

        tasks, parts = self.tasks.sent()
        content = packed(_Sent(tasks, self.mode), parts, ray.cloudpickle)
        self.life.enter_context(session(ray, self.address, self.wanted))
        crew = plan(ray, self.wanted, self.tasks.device)
        workers = Workers(ray, crew, content, self.words)
        return self.life.enter_context(workers), crew.workers


@dataclass(frozen=True)
class _Sent:
    """What a worker of Ray is sent."""

    tasks: Tasks
    mode: Any

    def serve(self, life: ExitStack, device: str | None) -> Callable[..., dict[str, Tensor]]:
        """The models are prepared; what does a task."""
        for model in self.tasks.models:
            life.enter_context(prepared(model, self.mode, device))
        return _Serving(self.tasks).do


class _Serving:
    """On a worker: one task after another."""

    def __init__(self, tasks: Tasks) -> None:
        self.tasks, self.key = tasks, 0
        self.task: Task | None = None

    def do(
        self, block: range, key: int, name: str, about: Sequence[Any], refs: list[Any]
    ) -> dict[str, Tensor]:
        """A task of those with this key."""
        import ray

        if key != self.key or self.task is None:
            self.task = None  # what it holds goes before the next is made
            given = tensors_from_bytes(ray.get(refs[0])) if refs else {}
            self.task, self.key = self.tasks.task(name, about, given), key
        return _here(self.task(block))


def _here(tensors: Rows) -> dict[str, Tensor]:
    """As they travel."""
    return {n: t.detach().cpu().contiguous() for n, t in tensors.items()}


def _forms(tensors: Rows) -> dict[str, Any]:
    return {n: [list(t.shape), str(t.dtype).removeprefix("torch.")] for n, t in tensors.items()}


def _empty(forms: Mapping[str, Any]) -> dict[str, Tensor]:
    return {n: torch.empty(shape, dtype=getattr(torch, kind), device="cpu")
            for n, (shape, kind) in forms.items()}  # fmt: skip


@contextmanager
def hired(engine: Engine, workers: int | None, address: str | None, words: Words) -> Iterator[Crew]:
    """Those who do tasks for this call.

    Raises:
        UsageError: there is no such engine, or its options are others.
        MissingExtraError: Ray is not installed.
    """
    if engine not in ("local", "ray", "torchrun"):
        raise UsageError(f'engine is {engine!r}; pass "local", "ray" or "torchrun".')
    for name, value in (("workers", workers), ("address", address)):
        if value is not None and engine != "ray":
            raise UsageError(
                f'{name} is for engine="ray", and this is "{engine}". Leave out {name}, or pass '
                'engine="ray".'
            )
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise UsageError(f"workers is {workers!r}; pass a positive number of processes.")
    if engine == "torchrun":
        with ranks() as own:
            yield _OnRanks(own)
        return
    if engine == "local":
        yield Crew()
        return
    need("ray", "ray")
    yield _OnRay(workers, address, words)
