"""A scan from start to end.

Owns: what is left to do, opening or making the store, references, parts, the progress bar, counts.
Does not know: how a block is scored (the engine does), or the files' form (the store does).
"""

import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from pergrad import inputs
from pergrad.engine import module_of
from pergrad.errors import StoreError, UsageError
from pergrad.matrix import GradientMatrix
from pergrad.scores import manifest
from pergrad.scores.job import Job, MeanGradient
from pergrad.scores.local import Local
from pergrad.scores.on_ray import OnRay
from pergrad.scores.scorer import mean_gradient, prepared
from pergrad.scores.store import Store, locked, say_damaged
from pergrad.scores.work import Engine, Mode, Reference, Settings, Work

ROWS_PER_PART = 2**16
SECONDS_PER_PART = 10.0
SHARE_AT_RISK = 0.01  # of the time so far, that a kill may cost at most


@dataclass(frozen=True)
class Request:
    """What the user asked of `scan`, checked."""

    job: Job
    folder: Path
    batch_size: int | None
    engine: Engine
    resume: bool
    against: Mapping[str, Any]
    groups: Mapping[str, tuple[str, ...]]
    mode: Mode
    device: str | None
    rescore: str | None
    recheck: bool
    seed: int
    progress: bool
    source: str | None
    command: str | None
    options: Mapping[str, Any]


def engine(name: str, workers: int | None, address: str | None) -> Engine:
    """The engine of a name."""
    if workers is not None and (not isinstance(workers, int) or workers < 0):
        raise UsageError(f"workers is {workers!r}; pass a number of processes.")
    if name in ("local", "torchrun"):  # which is the local engine on every rank
        if address is not None:
            raise UsageError('address is for engine="ray"; the others run in this process.')
        return Local(workers or 0)
    if name == "ray":
        return OnRay(workers, address)
    raise UsageError(f'There is no engine {name!r}. Pass "local", "ray" or "torchrun".')


def resolve_groups(groups: Any, job: Job) -> dict[str, tuple[str, ...]]:
    """Name of each group -> its parameters' names."""
    if groups is None:
        return {}
    names = list(manifest.parameters_of(job))
    if groups == "parameter":
        return {n: (n,) for n in names}
    if groups == "layer":
        found: dict[str, tuple[str, ...]] = {}
        for n in names:
            layer = module_of(n) or n
            found[layer] = (*found.get(layer, ()), n)
        return found
    if not isinstance(groups, Mapping):
        raise UsageError(
            f"groups is {groups!r}. Pass \"layer\", \"parameter\", or a mapping from a name to a "
            "list of parameters' names."
        )  # fmt: skip
    for group, members in groups.items():
        unknown = [n for n in members if n not in names]
        if isinstance(members, str) or unknown or not members:
            raise UsageError(
                f"The group {group!r} has "
                + (f"no parameters called {inputs.names_list(unknown)}" if unknown else "no list")
                + f". The parameters are {inputs.names_list(names, 10)}."
            )
    return {str(group): tuple(members) for group, members in groups.items()}


@dataclass(frozen=True, slots=True)
class Opened:
    """A store that is ours to write to, and what is left to do in it."""

    store: Store
    manifest: dict[str, Any]
    work: Work
    wanted: np.ndarray


@contextmanager
def opened(request: Request) -> Iterator[Opened]:
    """Open or make the store, and see what is left to do."""
    job = request.job
    with locked(request.folder) as store, prepared(job.model, request.mode, request.device):
        old = store.manifest
        work, new = described(request, old)
        if old is None:
            store.save(new)
        else:
            _check_same(request, store, old, new)
            new["created"] = old["created"]
        yield Opened(store, new, work, _wanted(request, store, len(job)))


def described(request: Request, old: Mapping[str, Any] | None) -> tuple[Work, dict[str, Any]]:
    """The work, and the manifest that says so; `old` is the manifest there is."""
    settings = _settings(request, old)
    references = _references(request, settings)
    return Work(request.job, settings, references), _manifest(request, settings, references)


def score(
    request: Request,
    scan: Opened,
    blocks: Iterable[range],
    advance: Callable[[int], None],
    smaller: Callable[[int], None],
) -> None:
    """Score blocks into the store. Whatever happens, what was scored is written."""
    writer = _Writer(scan.store, scan.wanted)

    def write(table: pa.Table) -> None:
        advance(writer.add(table))

    try:
        request.engine.run(scan.work, blocks, write, smaller)
    except StoreError:
        raise
    except BaseException:
        writer.flush()
        raise
    writer.flush()


def run(request: Request) -> Store:
    """Score what is not scored yet."""
    with opened(request) as scan:
        if not scan.wanted.any():
            return scan.store

        def smaller(size: int) -> None:
            scan.manifest["settings"]["batch_size"] = size
            scan.store.save(scan.manifest)

        with bar(request, len(scan.wanted), int(scan.wanted.sum())) as advance:
            todo = blocks(scan.wanted, scan.work.settings.batch_size)
            score(request, scan, todo, advance, smaller)
        finish(scan)
    return scan.store


def _settings(request: Request, old: Mapping[str, Any] | None) -> Settings:
    size = request.batch_size
    if size is None:
        size = old["settings"]["batch_size"] if old is not None else 64
    return Settings(
        batch_size=size,
        automatic=request.batch_size is None,
        mode=request.mode,
        groups=request.groups,
        seed=request.seed,
        device=request.device,
        options=dict(request.options),
    )


def _manifest(
    request: Request, settings: Settings, references: Sequence[Reference]
) -> dict[str, Any]:
    as_dict = settings.as_dict()
    as_dict["groups"] = {name: list(members) for name, members in settings.groups.items()}
    as_dict["against"] = {r.name: {"rows": len(r.norms), "hash": r.hash} for r in references}
    return {
        "format": manifest.FORMAT,
        "version": manifest.VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": request.command or shlex.join(sys.orig_argv),
        "job": request.source,
        "scored": manifest.scored(request.job),
        "settings": as_dict,
        "columns": manifest.columns(request.job, settings, references),
        "finished": False,
        "counts": {},
    }


def _check_same(
    request: Request, store: Store, old: Mapping[str, Any], new: Mapping[str, Any]
) -> None:
    if not request.resume:
        raise StoreError(
            f"{store.folder} already has scores, and resume is False. Take another folder, or "
            "remove this one if you do not need what is in it."
        )
    differ = manifest.differences(old, new)
    if differ:
        raise StoreError(
            f"The scores in {store.folder} are of something else, so this scan cannot go on with "
            f"them: {'; '.join(differ)}. Nothing was changed. Scan into another folder, or bring "
            "back what was."
        )


def _wanted(request: Request, store: Store, total: int) -> np.ndarray:
    """A mask of the examples to score now."""
    damaged = store.damaged()
    if damaged and request.rescore != "damaged":
        raise StoreError(say_damaged(store.folder, damaged))
    for part in damaged:
        store.set_aside(part)
    if request.rescore == "failed":
        for part in store.failed():
            store.set_aside(part)
    return ~store.present(total)


def blocks(wanted: np.ndarray, size: int) -> Iterator[range]:
    """The blocks that have an example to score, whole: an example's numbers must not depend on
    which of its neighbours were scored before.
    """
    for lo in range(0, len(wanted), size):
        if wanted[lo : lo + size].any():
            yield range(lo, min(lo + size, len(wanted)))


class _Writer:
    """Collects rows into parts."""

    def __init__(self, store: Store, wanted: np.ndarray) -> None:
        self.store, self.wanted = store, wanted.copy()
        self.pending: list[pa.Table] = []
        self.rows = 0
        self.start = self.last = time.monotonic()

    def add(self, table: pa.Table) -> int:
        """Take those rows that are wanted, each once; how many they are."""
        index = table["index"].to_numpy()
        new = self.wanted[index]
        if not new.all():
            table = table.filter(pa.array(new))
        self.wanted[index] = False
        if len(table):
            self.pending.append(table)
            self.rows += len(table)
        now = time.monotonic()
        patience = max(SECONDS_PER_PART, SHARE_AT_RISK * (now - self.start))
        if self.rows >= ROWS_PER_PART or now - self.last > patience:
            self.flush()
        return len(table)

    def flush(self) -> None:
        """Write what has been collected; examples that failed into a part of their own."""
        if self.pending:
            table = pa.concat_tables(self.pending)
            failed = pc.is_valid(table["error"])
            for rows in (table.filter(pc.invert(failed)), table.filter(failed)):
                if len(rows):
                    self.store.add(rows)
        self.pending, self.rows, self.last = [], 0, time.monotonic()


def finish(scan: Opened) -> None:
    """Count, and say in the manifest that all is there."""
    store, new = scan.store, scan.manifest
    table = store.read(["loss", "norm", "error"])
    failed = len(table) - table["error"].null_count
    finite = pc.and_(pc.is_finite(table["loss"]), pc.is_finite(table["norm"]))
    new["counts"] = {
        "examples": len(table),
        "scored": len(table) - failed,
        "failed": failed,
        "not finite": pc.sum(pc.invert(finite)).as_py() or 0,
    }
    new["finished"] = len(table) == new["scored"]["examples"]
    store.save(new)


def _references(request: Request, settings: Settings) -> tuple[Reference, ...]:
    params = manifest.parameters_of(request.job)
    shapes = {n: tuple(p.shape) for n, p in params.items()}
    devices = {n: p.device for n, p in params.items()}
    found = []
    for name, value in request.against.items():
        if isinstance(value, GradientMatrix):
            norms = tuple(value.norms().double().tolist())
            found.append(
                Reference(name, value, norms, manifest.hash_of_tensors(value.dense().items()))
            )
            continue
        if isinstance(value, MeanGradient):
            value = mean_gradient(request.job, value.data, settings.batch_size, settings.seed)
        direction = inputs.direction(value, shapes, devices, f"against[{name!r}]")
        found.append(
            Reference(
                name, direction, (_norm(direction),), manifest.hash_of_tensors(direction.items())
            )
        )
    return tuple(found)


def _norm(direction: Mapping[str, Tensor]) -> float:
    return float(torch.stack([d.double().norm() for d in direction.values()]).norm())


class _Rate(ProgressColumn):
    """Examples per second."""

    def render(self, task: Any) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} examples/s", style="cyan")


@contextmanager
def bar(request: Request, total: int, todo: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, with rate and time left."""
    if not request.progress:
        yield lambda count: None
        return
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(),
        _Rate(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=console,
    )  # fmt: skip
    how = {"eval": "in eval mode (dropout off)", "train": "in train mode", "as is": "as it is"}
    console.print(
        f"Scoring {todo:,} of {total:,} examples into {request.folder}, the model "
        f"{how[request.mode]}.",
        highlight=False,
    )
    with bar:
        task = bar.add_task("scan", total=total, completed=total - todo)
        yield lambda count: bar.advance(task, count)
