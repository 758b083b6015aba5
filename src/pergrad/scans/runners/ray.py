"""The same job on Ray: workers that each hold the model, and a driver that alone writes.

Owns: how many workers, what each is given, which block is where, and what a dead worker costs.
Does not know: how a block is scored, how the store is kept.
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
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch

from pergrad.errors import UsageError, WorkerError, WorkerWarning
from pergrad.extras import need
from pergrad.scans.model_state import prepared
from pergrad.scans.runners.packing import Numerics, on_device, packed, unpacked
from pergrad.scans.scorer import Scorer
from pergrad.scans.work import Work

if TYPE_CHECKING:
    import pyarrow as pa

AHEAD = 2  # blocks given to a worker: one that it scores, one so that it never waits for the driver
DEATHS = 3  # workers that one block may cost
PATIENCE = 60.0  # seconds without any worker after which the user hears of it


@dataclass(frozen=True, slots=True)
class OnRay:
    """Scores on workers of Ray; this process hands out blocks and writes.

    Ray is used as it was found: where the caller has initialised it, that is used and left
    running; otherwise it is started on this machine, or joined at `address` (or at RAY_ADDRESS),
    and left at the end.

    A worker that dies costs the blocks that it held: they are handed out again, and a new worker
    takes its place. Since this process alone writes, an example is in the store once whatever
    happens. A block that has cost three workers is set aside; all others are scored, and then an
    error names it.

    Args:
        workers: how many. By default one for each GPU of the cluster; without GPUs, one for each
            CPU.
        address: of a cluster, as for `ray.init`.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    workers: int | None = None
    address: str | None = None

    def __post_init__(self) -> None:
        need("ray", "ray")
        if self.workers == 0:
            raise UsageError(
                'workers is 0, and with engine="ray" it is the workers that score. Pass at least '
                "1, or leave it out for one per GPU or CPU."
            )

    def run(
        self,
        work: Work,
        blocks: Iterable[range],
        write: "Callable[[pa.Table], None]",
        smaller: Callable[[int], None],
    ) -> None:
        """Score all blocks.

        Raises:
            UsageError: the job cannot be sent to another process or loaded there, the cluster
                cannot be reached, or it has another torch.
            WorkerError: workers died, again and again.
        """
        blocks = iter(blocks)
        first = next(blocks, None)
        if first is None:
            return
        import ray
        import ray.cloudpickle

        content = packed(work, ray.cloudpickle)
        with _session(ray, self.address, self.workers):
            crew = _plan(ray, self.workers, work.settings.device)
            stored = ray.put(content)
            del content  # it may hold a data set
            run = _Run(ray, crew, stored, work, write, smaller)
            run.finish(chain([first], blocks))


@contextmanager
def _session(ray: Any, address: str | None, workers: int | None) -> Iterator[None]:
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
class _Crew:
    """How many workers, and what each is given."""

    workers: int
    cpus: int
    gpus: int
    device: str | None
    threads: int


def _plan(ray: Any, workers: int | None, device: str | None) -> _Crew:
    """One worker for each GPU if there are any, otherwise for each CPU."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("CPU", "GPU"))
    if gpus and (device is None or device.startswith("cuda")):
        # A worker sees its own GPU alone, and that is number 0 there.
        return _Crew(workers or gpus, 1, 1, "cuda", torch.get_num_threads())
    if device is not None and device.startswith("cuda"):
        raise UsageError(
            f"device is {device!r}, and this Ray cluster has no GPU. Leave device out, or start "
            "Ray where the GPUs are."
        )
    workers = workers or max(1, cpus)
    largest = int(max((node.get("CPU", 0) for node in nodes), default=1))
    threads = max(1, min(cpus // workers, largest, torch.get_num_threads()))
    return _Crew(workers, threads, 0, device, threads)


@dataclass(frozen=True)
class _Raised:
    """What went wrong on a worker. Returned and not raised: Ray would wrap, print and log it."""

    error: Exception
    trace: str


@dataclass(frozen=True)
class _Scored:
    """The rows of one block, the batch size that memory allowed, and what was warned of."""

    rows: "pa.Table"
    batch_size: int
    warned: set[tuple[type[Warning], str]]


class _Scoring:
    """What runs on a worker: the model, loaded once, and one block after another."""

    def start(
        self, content: bytes, numerics: Numerics, device: str | None, paths: list[str]
    ) -> dict[str, Any] | _Raised:
        """Load the model; what this worker is."""
        sys.path.extend(path for path in paths if path not in sys.path and os.path.exists(path))
        try:
            numerics.apply()
            work = unpacked(content)
            self._life = ExitStack()  # the process ends with the actor, so nothing is put back
            self._life.enter_context(prepared(work.job.model, work.settings.mode, device))
            self._work = on_device(work, device)
            self._scorer = Scorer(self._work)
        except ImportError as error:
            where = f" It runs Python {sys.version.split()[0]}, {sys.executable}."
            return _Raised(_not_there(str(error), where), traceback.format_exc())
        except Exception as error:
            return _raised(error)
        return {"pid": os.getpid(), "torch": torch.__version__}

    def score(self, start: int, stop: int, batch_size: int, proven: bool) -> _Scored | _Raised:
        """The rows of one block, given what is known of memory and of the job."""
        if proven and not self._work.proven:
            self._work = replace(self._work, proven=True)
            self._scorer = Scorer(self._work)
        scorer = self._scorer
        scorer.batch_size = min(scorer.batch_size, batch_size)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                rows = scorer.score(range(start, stop))
            except Exception as error:
                return _raised(error)
        warned = {(each.category, str(each.message)) for each in seen}
        return _Scored(rows, scorer.batch_size, warned)


def _raised(error: Exception) -> _Raised:
    """An exception on its way to the driver, as itself if it can travel."""
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = WorkerError(f"{type(error).__name__}: {error}")
    return _Raised(error, trace)


def _not_there(what: str, where: str = "") -> UsageError:
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
    blocks: deque[tuple[Any, range]] = field(default_factory=deque)  # in the order it scores them


class _Run:
    """One run: hands out blocks, takes in rows, replaces the dead."""

    def __init__(
        self,
        ray: Any,
        crew: _Crew,
        content: Any,
        work: Work,
        write: "Callable[[pa.Table], None]",
        smaller: Callable[[int], None],
    ) -> None:
        self._ray, self._crew, self._content = ray, crew, content
        self._batch_size, self._write, self._smaller = work.settings.batch_size, write, smaller
        self._actor = ray.remote(_Scoring).options(
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
        self._barren = 0  # blocks in a row that were set aside
        self._proven = work.proven
        self._patient = True
        self._warned: set[tuple[type[Warning], str]] = set()

    def finish(self, blocks: Iterator[range]) -> None:
        """Score all blocks; also after an error no worker is left."""
        self._waiting.extend(islice(blocks, self._crew.workers))
        try:
            self._workers = [self._hired() for _ in self._waiting]
            while self._hand_out(blocks):
                self._take_in()
        finally:
            for worker in self._workers:
                self._ray.kill(worker.actor)
        if self._aside:
            raise self._given_up("All other blocks are scored and stored.")

    def _hired(self) -> _Worker:
        """A worker that starts to load the model."""
        actor = self._actor.remote()
        numerics = Numerics.here(self._crew.threads)
        return _Worker(
            actor, actor.start.remote(self._content, numerics, self._crew.device, sys.path)
        )

    def _hand_out(self, blocks: Iterator[range]) -> bool:
        """Give blocks to the workers that can take one; whether any is left to wait for."""
        for depth in range(AHEAD):
            for worker in self._workers:
                if worker.pid is None or len(worker.blocks) > depth:
                    continue
                if not self._waiting:
                    self._waiting.extend(islice(blocks, 1))
                if self._waiting and self._may_have(worker, self._waiting[0]):
                    block = self._waiting.popleft()
                    ref = worker.actor.score.remote(
                        block.start, block.stop, self._batch_size, self._proven
                    )
                    worker.blocks.append((ref, block))
        return bool(self._waiting) or any(worker.blocks for worker in self._workers)

    def _may_have(self, worker: _Worker, block: range) -> bool:
        # Until an example could be scored one worker goes ahead alone: it is the one to tell that
        # the job cannot be scored at all, and others would tell the same.
        if not self._proven:
            ahead = next(each for each in self._workers if each.pid is not None)
            return worker is ahead and not any(each.blocks for each in self._workers)
        # A block under suspicion is alone with its worker: if that dies, it is the reason.
        held = [each for _, each in worker.blocks]
        return not held or not any(each in self._deaths for each in [*held, block])

    def _take_in(self) -> None:
        """Wait until something happens, and deal with it."""
        refs = {worker.starting: worker for worker in self._workers if worker.pid is None}
        refs |= {ref: worker for worker in self._workers for ref, _ in worker.blocks}
        ready, _ = self._ray.wait(list(refs), num_returns=1, timeout=PATIENCE)
        if not ready and self._patient and all(worker.pid is None for worker in self._workers):
            self._patient = False
            self._say(
                f"No worker of Ray has started for {PATIENCE:g} s. Each asks for {self._crew.cpus} "
                f"CPU and {self._crew.gpus} GPU; free are {self._ray.available_resources()}. The "
                "scan goes on when Ray finds room; otherwise stop it, and ask for fewer workers."
            )
        for worker in {id(refs[ref]): refs[ref] for ref in ready}.values():
            try:
                self._take_from(worker)
            except self._gone as error:
                if getattr(error, "actor_init_failed", False):
                    raise _not_there(_last_line(error)) from None
                self._bury(worker, _last_line(error))

    def _take_from(self, worker: _Worker) -> None:
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
            scored = self._got(worker.blocks[0][0])
            _, block = worker.blocks.popleft()
            self._deaths.pop(block, None)
            self._barren = 0
            self._proven = self._proven or scored.rows["error"].null_count > 0
            if scored.batch_size < self._batch_size:
                self._batch_size = scored.batch_size
                self._smaller(scored.batch_size)
            for category, message in scored.warned - self._warned:
                self._warned.add((category, message))
                warnings.warn(message, category, stacklevel=2)
            self._write(scored.rows)

    def _got(self, ref: Any) -> Any:
        """What a worker returned; what it raised is raised here."""
        value = self._ray.get(ref)
        if isinstance(value, _Raised):
            value.error.add_note(f"Raised on a worker of Ray:\n{value.trace}")
            raise value.error
        return value

    def _bury(self, worker: _Worker, why: str) -> None:
        """Hand out again what a dead worker held, and hire another in its place."""
        self._ray.kill(worker.actor)  # it may be alive and out of reach
        self._workers.remove(worker)
        blocks = [block for _, block in worker.blocks]
        if blocks:
            self._blame(blocks, worker, why)
        else:
            self._unborn += 1
            if self._unborn == DEATHS:
                raise WorkerError(
                    f"{DEATHS} workers of Ray in a row died while they loaded the model. {why} Too "
                    "little memory is the usual reason: every worker holds the model, the data set "
                    "and the references. Ask for fewer workers, or score with engine='local', "
                    "which goes on in the same folder."
                )
        self._workers.append(self._hired())

    def _blame(self, blocks: list[range], worker: _Worker, why: str) -> None:
        """A worker died on one of these blocks: each gets another chance, or none."""
        self._deaths.update(blocks)
        aside = [block for block in blocks if self._deaths[block] == DEATHS]
        again = [block for block in blocks if self._deaths[block] < DEATHS]
        self._say(
            f"A worker of Ray (process {worker.pid}) died while it had {_named(blocks)}, which are "
            f"{'set aside' if aside else 'handed out again'}. {why}"
        )
        self._waiting.extendleft(reversed(again))
        self._aside += aside
        self._barren += len(aside)
        if self._barren >= DEATHS:
            raise self._given_up("The scan was stopped, since no block in between could be scored.")

    def _given_up(self, rest: str) -> WorkerError:
        return WorkerError(
            f"{DEATHS} workers of Ray died, one after another, on {_named(self._aside)}. {rest} "
            "Too little memory, or code that crashes Python on one of these examples, are the "
            "usual reasons. Scan again with engine='local' and the same folder: it goes on with "
            "what is missing, and shows the crash itself."
        )

    def _say(self, message: str) -> None:
        warnings.warn(message, WorkerWarning, stacklevel=2)


def _named(blocks: list[range]) -> str:
    parts = [f"{b.start} to {b.stop - 1}" for b in sorted(blocks, key=lambda b: b.start)]
    return "examples " + " and ".join(parts)


def _last_line(error: Exception) -> str:
    """The part of Ray's account that says what happened."""
    return str(error).strip().splitlines()[-1].partition(" Some common causes")[0]
