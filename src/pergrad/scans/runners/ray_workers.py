"""Workers of Ray: each holds what was sent to it, and does one task after another with it.

Owns: how many workers, what each is given, which task is where, and what a dead worker costs.
Does not know: what is sent, or what a task is.
"""

import logging
import os
import pickle
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, Self

import torch

from pergrad.errors import UsageError, WorkerError, WorkerWarning
from pergrad.scans.runners.packing import Numerics, unpacked

AHEAD = 2  # tasks given to a worker: one that it does, one so that it never waits for the driver
DEATHS = 3  # workers that one task may cost
PATIENCE = 60.0  # seconds without any worker after which the user hears of it


@contextmanager
def session(ray: Any, address: str | None, workers: int | None) -> Iterator[None]:
    """Ray, running; afterwards as it was before."""
    if ray.is_initialized():
        if address is not None:
            raise UsageError(
                f"Ray is already initialised in this process, so address={address!r} comes too "
                "late. Leave address out to use this Ray, or call `ray.shutdown()` first."
            )
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {}
    with _process_as_it_was():
        if address == "local":
            # More workers than CPUs is the user's choice, and Ray counts what it is told.
            options = {"num_cpus": workers and max(workers, os.cpu_count() or 1),
                       "include_dashboard": False}  # fmt: skip
            # Ray reports to its makers unless told not to; whoever calls pergrad never asked for it
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # Workers find what this process finds, also what was put on sys.path as it ran.
            os.environ["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        _answers(address)
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise _no_cluster(address, error) from error
        try:
            yield
        finally:
            ray.shutdown()


def _answers(address: str) -> None:
    """Refuse a host that does not answer: Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "://" in address:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UsageError:
    return UsageError(
        f"No Ray cluster can be had at address={address!r}: {error}. Start one with `ray start "
        "--head`, or leave address out to run on this machine alone."
    )


@contextmanager
def _process_as_it_was() -> Iterator[None]:
    """Undoes what ray.init does to the process: environment variables, the handler of SIGTERM."""
    environment = dict(os.environ)
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if main else None
    try:
        yield
    finally:
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        if main:
            signal.signal(signal.SIGTERM, handler)


@dataclass(frozen=True, slots=True)
class Crew:
    """How many workers, and what each is given."""

    workers: int
    cpus: int
    gpus: int
    device: str | None
    threads: int


def plan(ray: Any, workers: int | None, device: str | None) -> Crew:
    """One worker for each GPU if there are any, otherwise for each CPU."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    if gpus and (device is None or device.startswith("cuda")):
        # A worker sees its own GPU alone, and that is number 0 there.
        return Crew(workers or gpus, 1, 1, "cuda", torch.get_num_threads())
    if device is not None and device.startswith("cuda"):
        raise UsageError(
            f"device is {device!r}, and this Ray cluster has no GPU. Leave device out, or start "
            "Ray where the GPUs are."
        )
    workers = workers or max(1, cpus)
    largest = int(max((node.get("CPU", 0) for node in nodes), default=1))
    threads = max(1, min(cpus // workers, largest, torch.get_num_threads()))
    return Crew(workers, threads, 0, device, threads)


@dataclass(frozen=True)
class _Raised:
    """What went wrong on a worker. Returned and not raised: Ray would wrap, print and log it."""

    error: Exception
    trace: str


@dataclass(frozen=True)
class _Done:
    """What came of a task, and what was warned of meanwhile."""

    found: Any
    warned: set[tuple[type[Warning], str]]


class Sent(Protocol):
    """What travels to a worker."""

    def serve(self, life: ExitStack, device: str | None) -> Callable[..., Any]:
        """On the worker: what does a task, given as a range and what `about` says of it."""


class _Serving:
    """What runs on a worker: what was sent, loaded once, and one task after another."""

    def start(
        self, content: bytes, numerics: Numerics, device: str | None, paths: list[str]
    ) -> dict[str, Any] | _Raised:
        """Load what was sent; what this worker is."""
        sys.path.extend(path for path in paths if path not in sys.path and os.path.exists(path))
        try:
            numerics.apply()
            self._life = ExitStack()  # the process ends with the actor, so nothing is put back
            self._do = unpacked(content).serve(self._life, device)
        except ImportError as error:
            where = f" It runs Python {sys.version.split()[0]}, {sys.executable}."
            return _Raised(not_there(str(error), where), traceback.format_exc())
        except Exception as error:
            return _raised(error)
        return {"pid": os.getpid(), "torch": torch.__version__}

    def do(self, start: int, stop: int, *about: Any) -> _Done | _Raised:
        """One task."""
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                found = self._do(range(start, stop), *about)
            except Exception as error:
                return _raised(error)
        return _Done(found, {(each.category, str(each.message)) for each in seen})


def _raised(error: Exception) -> _Raised:
    """An exception on its way to the driver, as itself if it can travel."""
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = WorkerError(f"{type(error).__name__}: {error}")
    return _Raised(error, trace)


def not_there(what: str, where: str = "") -> UsageError:
    """The error of a worker that lacks a module."""
    return UsageError(
        f"A worker of Ray cannot load the job: {what}.{where} Install what is missing where the "
        "workers run, pergrad included, or initialise Ray yourself before the scan and send the "
        "code along: `ray.init(address, runtime_env={'working_dir': '.'})`."
    )


@dataclass(eq=False)
class _Worker:
    """The driver's end of a worker."""

    actor: Any
    starting: Any
    pid: int | None = None
    blocks: deque[tuple[Any, range]] = field(default_factory=deque)  # in the order it does them


@dataclass(frozen=True)
class Words:
    """How messages name a run and its tasks."""

    run: str  # "scan"
    again: str  # how the same is done without workers, and goes on
    examples: str = "examples"  # what tasks are ranges of
    named: Callable[[range], str] = lambda b: f"{b.start} to {b.stop - 1}"


class Workers:
    """Hands out tasks, takes in what comes of them, replaces the dead. In the end none is left."""

    def __init__(
        self, ray: Any, crew: Crew, content: bytes, words: Words, *, proven: bool = True
    ) -> None:
        self._ray, self._crew, self._content = ray, crew, ray.put(content)
        self._words = words
        self.proven = proven  # whether a task has been done before, so that the job works
        self._actor = ray.remote(_Serving).options(
            num_cpus=crew.cpus, num_gpus=crew.gpus, max_restarts=0, max_task_retries=0
        )
        # What Ray raises when a worker, its node or a result that it still held is gone.
        gone = ray.exceptions
        self._gone = (gone.RayActorError, gone.OutOfMemoryError, gone.NodeDiedError,
                      gone.WorkerCrashedError, gone.ObjectLostError)  # fmt: skip
        self._workers: list[_Worker] = []
        self._waiting: deque[range] = deque()
        self._deaths: Counter[range] = Counter()
        self._aside: list[range] = []
        self._unborn = 0  # workers in a row that died before they had the model
        self._barren = 0  # tasks in a row that were set aside
        self._patient = True
        self._warned: set[tuple[type[Warning], str]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)

    def each(
        self,
        tasks: Iterable[range],
        about: Callable[[], tuple[Any, ...]],
        *,
        room: Callable[[], bool] = lambda: True,
        set_aside: bool = True,
        ahead: int = AHEAD,
    ) -> Iterator[tuple[range, Any]]:
        """Each task and what came of it, as they are done.

        Args:
            tasks: all different.
            about: what else a worker is told with a task, asked when it is handed out.
            room: whether more tasks may be handed out now.
            set_aside: do all others before an error names a task that killed its workers.
            ahead: how many tasks a worker has at a time.

        Raises:
            UsageError: what was sent cannot be loaded on a worker, or it has another torch.
            WorkerError: workers died, again and again.
        """
        left = iter(tasks)
        self._waiting.extend(islice(left, self._crew.workers))
        wanted = min(len(self._waiting), self._crew.workers)
        self._workers += [self._hired() for _ in range(wanted - len(self._workers))]
        while self._hand_out(left, about, room, ahead):
            yield from self._take_in(set_aside)
        if self._aside:
            raise self._given_up("All other work is done, and what came of it is stored.")

    def _hired(self) -> _Worker:
        """A worker that starts to load the model."""
        actor = self._actor.remote()
        numerics = Numerics.here(self._crew.threads)
        return _Worker(
            actor, actor.start.remote(self._content, numerics, self._crew.device, sys.path)
        )

    def _hand_out(
        self,
        tasks: Iterator[range],
        about: Callable[[], tuple[Any, ...]],
        room: Callable[[], bool],
        ahead: int,
    ) -> bool:
        """Give tasks to the workers that can take one; whether any is left to wait for."""

        def refill() -> None:
            if not self._waiting and room():
                self._waiting.extend(islice(tasks, 1))

        refill()  # also where nobody can take it yet: there is something to wait for
        for depth in range(ahead):
            for worker in self._workers:
                if worker.pid is None or len(worker.blocks) > depth:
                    continue
                refill()
                if self._waiting and self._may_have(worker, self._waiting[0]):
                    block = self._waiting.popleft()
                    ref = worker.actor.do.remote(block.start, block.stop, *about())
                    worker.blocks.append((ref, block))
        return bool(self._waiting) or any(worker.blocks for worker in self._workers)

    def _may_have(self, worker: _Worker, block: range) -> bool:
        # Until something could be done one worker goes ahead alone: it is the one to tell that
        # the job does not work at all, and others would tell the same.
        if not self.proven:
            ahead = next(each for each in self._workers if each.pid is not None)
            return worker is ahead and not any(each.blocks for each in self._workers)
        # A block under suspicion is alone with its worker: if that dies, it is the reason.
        held = [each for _, each in worker.blocks]
        return not held or not any(each in self._deaths for each in [*held, block])

    def _take_in(self, set_aside: bool) -> Iterator[tuple[range, Any]]:
        """Wait until something happens, and deal with it."""
        refs = {worker.starting: worker for worker in self._workers if worker.pid is None}
        refs |= {ref: worker for worker in self._workers for ref, _ in worker.blocks}
        ready, _ = self._ray.wait(list(refs), num_returns=1, timeout=PATIENCE)
        if not ready and self._patient and all(worker.pid is None for worker in self._workers):
            self._patient = False
            self._say(
                f"No worker of Ray has started for {PATIENCE:g} s. Each asks for {self._crew.cpus} "
                f"CPU and {self._crew.gpus} GPU; free are {self._ray.available_resources()}. The "
                "work goes on when Ray finds room; otherwise stop it, and ask for fewer workers."
            )
        for worker in {id(refs[ref]): refs[ref] for ref in ready}.values():
            try:
                yield from self._take_from(worker)
            except self._gone as error:
                if getattr(error, "actor_init_failed", False):
                    raise not_there(_last_line(error)) from None
                self._bury(worker, _last_line(error), set_aside)

    def _take_from(self, worker: _Worker) -> Iterator[tuple[range, Any]]:
        """The news of one worker, in the order in which it does things."""
        if worker.pid is None:
            born = self._got(worker.starting)
            if born["torch"] != torch.__version__:
                raise UsageError(
                    f"A worker of Ray has torch {born['torch']}, this process {torch.__version__}. "
                    "Their numbers would differ in one store: install the same torch on both."
                )
            worker.pid, self._unborn = born["pid"], 0
        while worker.blocks and self._ray.wait([worker.blocks[0][0]], timeout=0)[0]:
            done = self._got(worker.blocks[0][0])
            _, block = worker.blocks.popleft()
            self._deaths.pop(block, None)
            self._barren = 0
            for category, message in done.warned - self._warned:
                self._warned.add((category, message))
                warnings.warn(message, category, stacklevel=2)
            yield block, done.found

    def _got(self, ref: Any) -> Any:
        """What a worker returned; what it raised is raised here."""
        value = self._ray.get(ref)
        if isinstance(value, _Raised):
            value.error.add_note(f"Raised on a worker of Ray:\n{value.trace}")
            raise value.error
        return value

    def _bury(self, worker: _Worker, why: str, set_aside: bool) -> None:
        """Hand out again what a dead worker held, and hire another in its place."""
        self._ray.kill(worker.actor)  # it may be alive and out of reach
        self._workers.remove(worker)
        blocks = [block for _, block in worker.blocks]
        if blocks:
            self._blame(blocks, worker, why, set_aside)
        else:
            self._unborn += 1
            if self._unborn == DEATHS:
                raise WorkerError(
                    f"{DEATHS} workers of Ray in a row died while they loaded the model. {why} Too "
                    "little memory is the usual reason: every worker holds the model, the data set "
                    "and what examples are compared with. Ask for fewer workers, or use "
                    "engine='local', which goes on in the same folder."
                )
        self._workers.append(self._hired())

    def _blame(self, blocks: list[range], worker: _Worker, why: str, set_aside: bool) -> None:
        """A worker died on one of these tasks: each gets another chance, or none."""
        self._deaths.update(blocks)
        aside = [block for block in blocks if self._deaths[block] == DEATHS]
        again = [block for block in blocks if self._deaths[block] < DEATHS]
        self._say(
            f"A worker of Ray (process {worker.pid}) died while it had {self._named(blocks)}, "
            f"which are {'set aside' if aside else 'handed out again'}. {why}"
        )
        self._waiting.extendleft(reversed(again))
        self._aside += aside
        self._barren += len(aside)
        if aside and not set_aside:
            raise self._given_up(f"The {self._words.run} was stopped: what comes after needs them.")
        if self._barren >= DEATHS:
            raise self._given_up(
                f"The {self._words.run} was stopped, since nothing in between could be done."
            )

    def _given_up(self, rest: str) -> WorkerError:
        return WorkerError(
            f"{DEATHS} workers of Ray died, one after another, on {self._named(self._aside)}. "
            f"{rest} Too little memory, or code that crashes Python on one of these "
            f"{self._words.examples}, are the usual reasons. {self._words.again} with "
            "engine='local' and the same folder: it goes on with what is missing, and shows the "
            "crash itself."
        )

    def _say(self, message: str) -> None:
        warnings.warn(message, WorkerWarning, stacklevel=2)

    def _named(self, blocks: list[range]) -> str:
        parts = [self._words.named(b) for b in sorted(blocks, key=lambda b: b.start)]
        return f"{self._words.examples} " + " and ".join(parts)


def _last_line(error: Exception) -> str:
    """The part of Ray's account that says what happened."""
    return str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
