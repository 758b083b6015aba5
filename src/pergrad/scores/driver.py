"""A scan from start to end.

Owns: what is left to do, opening or making the store, references, parts, the progress bar, counts.
Does not know: how a block is scored (the engine does), or the files' form (the store does).
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
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
from pergrad.scores.results import Scores
from pergrad.scores.scorer import Scorer, mean_gradient, prepared, sensible_batch_size
from pergrad.scores.store import Store, Survey, locked, say_damaged
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
        unknown = [] if isinstance(members, str) else [n for n in members if n not in names]
        if isinstance(members, str) or unknown or not members:
            raise UsageError(
                f"The group {group!r} has "
                + (
                    f"no parameters called {inputs.names_list(unknown)}"
                    if unknown
                    else "no list of names"
                )
                + f". The parameters are {inputs.names_list(names, 10)}."
            )
    return {str(group): tuple(members) for group, members in groups.items()}


@dataclass(frozen=True, slots=True)
class Opened:
    """A store that is ours to write to, and what is left to do in it."""

    store: Store
    manifest: dict[str, Any]
    work: Work
    missing: np.ndarray  # masks: without rows, and
    failed: np.ndarray  # those that have failed and are to be tried again

    @property
    def wanted(self) -> np.ndarray:
        """A mask of the examples to score now."""
        return self.missing | self.failed

    def blocks(self) -> Iterator[range]:
        """The same as blocks."""
        size = self.work.settings.batch_size
        return chain(_blocks(self.missing, size), _runs(self.failed, size))


def run(request: Request) -> Store:
    """Score what is not scored yet."""
    with opened(request) as scan:

        def smaller(size: int) -> None:
            scan.manifest["settings"]["batch_size"] = size
            scan.store.save(scan.manifest)

        if scan.wanted.any():
            score(request, scan, scan.blocks(), smaller)
        finish(request, scan)
    return scan.store


@contextmanager
def opened(request: Request) -> Iterator[Opened]:
    """Make the store, or make sure that it is about the same, and see what is left to do."""
    job = request.job
    with locked(request.folder) as store, prepared(job.model, request.mode, request.device):
        old = store.manifest if store.parts() else None  # nothing is lost by starting anew
        if old is not None and not request.resume:
            raise StoreError(
                f"{store.folder} already has scores, and resume is False. Take another folder, or "
                "remove this one if you do not need what is in it."
            )
        work, new = described(request, store, old)
        if old is None:
            store.save(new)
            everything = np.ones(len(job), dtype=bool)
            yield Opened(store, new, work, everything, ~everything)
        else:
            yield _reopened(request, store, old, new, work)


def described(
    request: Request, store: Store, old: Mapping[str, Any] | None
) -> tuple[Work, dict[str, Any]]:
    """What is to be scored, for the engine and for the manifest; `old` is the manifest there is."""
    settings = _settings(request, old)
    references = references_for(request, store, settings)
    work = Work(request.job, settings, references, proven=old is not None)
    return work, _manifest(request, settings, references)


def _reopened(
    request: Request, store: Store, old: dict[str, Any], new: dict[str, Any], work: Work
) -> Opened:
    """Make sure that the store is about the same; what is left to do."""
    differ = manifest.differences(old, new)
    if differ:
        raise StoreError(
            f"The scores in {store.folder} are of something else, so this scan cannot go on with "
            f"them: {'; '.join(differ)}. Nothing was changed. Scan into another folder, or bring "
            "back what was."
        )
    new["created"], new["finished"] = old["created"], old["finished"]
    survey = store.survey(len(request.job))
    if survey.damaged and request.rescore != "damaged":
        raise StoreError(say_damaged(store.folder, survey.damaged))
    if request.recheck:
        _recheck(store, work, survey)
    for part in survey.damaged:
        store.set_aside(part)
    again = np.zeros_like(survey.failed)
    if request.rescore == "failed":
        for part in survey.failed_parts:
            store.set_aside(part)
        again = survey.failed
    scan = Opened(store, new, work, ~survey.present, again)
    if scan.wanted.any():
        new["finished"] = False
        store.save(new)
    return scan


def score(
    request: Request,
    scan: Opened,
    blocks: Iterable[range],
    smaller: Callable[[int], None],
    share: int = 1,
) -> None:
    """Let the engine score blocks, one part in `share` of all, and write what it finds."""
    wanted = scan.wanted
    writer = _Writer(scan.store, wanted)
    with _bar(request, len(wanted), int(wanted.sum())) as advance:

        def write(table: pa.Table) -> None:
            advance(writer.add(table) * share)

        try:
            request.engine.run(scan.work, blocks, write, smaller)
        except StoreError:
            raise  # the disk takes no more
        except BaseException:
            # Also when Ctrl-C was pressed: what is scored is kept. Not what has failed: it may be
            # that nothing was wrong with these examples.
            writer.flush(failed=False)
            raise
        writer.flush()


def _recheck(store: Store, work: Work, survey: Survey) -> None:
    """Score the first and the last finished batch again: what the hashes do not see (the loss
    function, the examples themselves) shows in the numbers.
    """
    good = np.flatnonzero(survey.present & ~survey.failed)
    if not len(good):
        return
    size, total = work.settings.batch_size, len(survey.present)
    scorer = Scorer(work)
    stored = {name: np.full(total, np.nan) for name in ("loss", "norm")}
    firsts = sorted({int(good[0]) // size * size, int(good[-1]) // size * size})
    blocks = [range(lo, min(lo + size, total)) for lo in firsts]
    for _, table in store.tables(["index", "loss", "norm"]):
        if table is not None:
            index = table["index"].to_numpy()
            near = np.isin(index // size * size, firsts)
            for name, values in stored.items():
                values[index[near]] = table[name].to_numpy()[near]
    precision = [torch.finfo(p.dtype).eps for p in manifest.parameters_of(work.job).values()]
    tolerance = max(1e-3, 32 * max(precision))  # another machine's rounding, and far below a change
    for block in blocks:
        table = scorer.score(block)
        for name, values in stored.items():
            was = values[block.start : block.stop]
            now = table[name].to_numpy()
            known = np.isfinite(was)
            scale = np.fmax(abs(was), abs(now)) + 1e-2 * np.max(abs(was[known]), initial=0)
            wrong = np.flatnonzero(known & ~(abs(was - now) <= tolerance * scale))
            if len(wrong):
                at = wrong[0]
                raise StoreError(
                    f"The scores in {store.folder} are of something else, so this scan cannot go "
                    f"on with them: the {name} of example {block[at]} was {was[at]:.6g} and is now "
                    f"{now[at]:.6g} ({len(wrong)} of {len(block)} examples differ). Model and "
                    "settings are the same, so the loss function, the collate function or the data "
                    "must have changed, or draw random numbers of their own. Nothing was changed. "
                    "Scan into another folder, bring back what was, or pass recheck=False if the "
                    "difference is meant."
                )


def _settings(request: Request, old: Mapping[str, Any] | None) -> Settings:
    size = request.batch_size
    if size is None:
        size = (
            old["settings"]["batch_size"]
            if old is not None
            else sensible_batch_size(request.job, request.seed)
        )
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


def _blocks(wanted: np.ndarray, size: int) -> Iterator[range]:
    """The blocks that have an example to score, whole: an example's numbers must not depend on
    which of its neighbours were scored before.
    """
    for lo in range(0, len(wanted), size):
        if wanted[lo : lo + size].any():
            yield range(lo, min(lo + size, len(wanted)))


def _runs(mask: np.ndarray, size: int) -> Iterator[range]:
    """The marked examples as runs of neighbours in one block."""
    marked = np.flatnonzero(mask)
    cuts = np.flatnonzero((np.diff(marked) > 1) | (np.diff(marked // size) > 0)) + 1
    for run in np.split(marked, cuts):
        if len(run):
            yield range(int(run[0]), int(run[-1]) + 1)


class _Columns:
    """Rows without errors, in columns that are allocated once. Kept as small tables they would lie
    between the activations on the heap, and keep it from shrinking: 300 MB, measured.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.schema: pa.Schema | None = None
        self.numbers: dict[str, np.ndarray] = {}
        self.keys: list[str] = []

    def add(self, table: pa.Table) -> None:
        """Append rows."""
        if self.schema is None:
            self.schema = table.schema
            self.numbers = {
                field.name: np.empty(ROWS_PER_PART, field.type.to_pandas_dtype())
                for field in table.schema
                if not pa.types.is_string(field.type)
            }
        end = self.rows + len(table)
        for name, values in self.numbers.items():
            if len(values) < end:
                values = self.numbers[name] = np.resize(values, 2 * end)
            values[self.rows : end] = table[name].to_numpy()
        if "key" in self.schema.names:
            self.keys += table["key"].to_pylist()
        self.rows = end

    def table(self) -> pa.Table:
        """All rows; valid until the next are added."""
        assert self.schema is not None
        columns = {name: pa.array(v[: self.rows]) for name, v in self.numbers.items()}
        columns["key"] = pa.array(self.keys, pa.string())
        columns["error"] = pa.nulls(self.rows, pa.string())
        return pa.Table.from_arrays([columns[n] for n in self.schema.names], schema=self.schema)

    def clear(self) -> None:
        """Forget the rows, keep the memory."""
        self.rows, self.keys = 0, []


class _Writer:
    """Collects rows into parts."""

    def __init__(self, store: Store, wanted: np.ndarray) -> None:
        self.store, self.wanted = store, wanted.copy()
        self.good = _Columns()
        self.failed: list[pa.Table] = []
        self.rows = 0
        self.start = self.last = time.monotonic()

    def add(self, table: pa.Table) -> int:
        """Take those rows that are wanted, each once; how many they are."""
        index = table["index"].to_numpy()
        new = self.wanted[index]
        if not new.all():
            table = table.filter(pa.array(new))
        self.wanted[index] = False
        good = table
        if table["error"].null_count < len(table):
            bad = pc.is_valid(table["error"])
            good = table.filter(pc.invert(bad))
            self.failed.append(table.filter(bad))
        if len(good):
            self.good.add(good)
        self.rows += len(table)
        now = time.monotonic()
        patience = max(SECONDS_PER_PART, SHARE_AT_RISK * (now - self.start))
        if self.rows >= ROWS_PER_PART or now - self.last > patience:
            self.flush()
        return len(table)

    def flush(self, *, failed: bool = True) -> None:
        """Write what has been collected; examples that failed go into a part of their own, after
        the others, so that they can be tried again without touching any other.
        """
        if self.good.rows:
            self.store.add(self.good.table())
        self.good.clear()
        if self.failed and failed:
            self.store.add(pa.concat_tables(self.failed))
            self.failed = []
        self.rows, self.last = 0, time.monotonic()


def finish(request: Request, scan: Opened) -> None:
    """Count, and say in the manifest whether all is there."""
    store, new = scan.store, scan.manifest
    if not new["finished"]:
        survey = store.survey(new["scored"]["examples"])
        there, failed = int(survey.present.sum()), int(survey.failed.sum())
        new["counts"] = {
            "examples": there,
            "scored": there - failed,
            "failed": failed,
            "not finite": survey.not_finite,
        }
        new["finished"] = bool(survey.present.all())
        store.save(new)
    if request.progress:
        _say(store)


def references_for(request: Request, store: Store, settings: Settings) -> tuple[Reference, ...]:
    """What each example's gradient is compared with."""
    params = manifest.parameters_of(request.job)
    shapes = {n: tuple(p.shape) for n, p in params.items()}
    devices = {n: p.device for n, p in params.items()}
    found = []
    for name, value in request.against.items():
        if isinstance(value, GradientMatrix):
            _check_shapes(name, value, shapes)
            norms = tuple(value.norms().double().tolist())
            rows = (item for k in range(len(value)) for item in value[k].dense().items())
            found.append(Reference(name, value, norms, manifest.hash_of_tensors(rows)))
        else:
            if isinstance(value, MeanGradient):
                value = _mean(request, store, settings, name, value)
            v = inputs.direction(value, shapes, devices, f"against[{name!r}]")
            v = {n: part.detach() for n, part in v.items()}
            norm = float(torch.stack([p.double().cpu().norm() for p in v.values()]).norm())
            found.append(Reference(name, v, (norm,), manifest.hash_of_tensors(v.items())))
        if not all(map(math.isfinite, found[-1].norms)):
            raise UsageError(
                f"The reference against[{name!r}] has numbers that are not finite, so no inner "
                "product with it would be. Find the example or the parameter it comes from."
            )
    return tuple(found)


def _check_shapes(name: str, J: GradientMatrix, shapes: Mapping[str, tuple[int, ...]]) -> None:
    differ = [n for n in {**shapes, **J.shapes} if J.shapes.get(n) != shapes.get(n)]
    if differ:
        raise UsageError(
            f"The reference against[{name!r}] is not about the parameters that are scored: "
            f"{inputs.names_list(differ)} differ or are only on one side. Pass the same selection "
            "of parameters to pergrad.gradients and as the job's `params`."
        )


def _mean(
    request: Request, store: Store, settings: Settings, name: str, value: MeanGradient
) -> dict[str, Tensor]:
    """The mean gradient: the stored one if it is the same but for rounding, so that a scan that is
    resumed on another machine compares with the very same numbers.
    """
    mean = mean_gradient(request.job, value.data, settings.batch_size, settings.seed)
    safe = manifest.hash_of_strings([name])
    kept = store.load_tensors(safe)
    if kept is not None and _close(kept, mean):
        return {n: kept[n].to(m.device) for n, m in mean.items()}
    if kept is None or not store.parts():
        store.save_tensors(safe, mean)
    return mean


def _close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two directions differ by rounding at most."""
    if [(n, t.shape, t.dtype) for n, t in a.items()] != [
        (n, t.shape, t.dtype) for n, t in b.items()
    ]:
        return False
    pairs = [(a[n].double().cpu(), b[n].double().cpu()) for n in a]
    apart = sum(float((x - y).square().sum()) for x, y in pairs)
    return apart <= 1e-6 * sum(float(y.square().sum()) for _, y in pairs)


def _say(store: Store) -> None:
    """On stderr: what there is now."""
    Console(stderr=True).print(repr(Scores(store)), highlight=False, soft_wrap=True)


class _Rate(ProgressColumn):
    """Examples per second of this run."""

    def render(self, task: Any) -> Text:
        seconds = task.finished_time or task.elapsed or 0
        done = task.completed - task.fields["before"]
        return Text(f"{done / seconds:,.0f} examples/s" if done and seconds else "", style="cyan")


@contextmanager
def _bar(request: Request, total: int, todo: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, with rate and time left."""
    if not request.progress:
        yield lambda count: None
        return
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(),
        _Rate(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=console, refresh_per_second=2,
    )  # fmt: skip
    how = {"eval": "in eval mode (dropout off)", "train": "in train mode", "as is": "as it is"}
    console.print(
        f"Scoring {todo:,} of {total:,} examples into {request.folder}, the model "
        f"{how[request.mode]}.",
        highlight=False,
        soft_wrap=True,
    )
    with bar:
        task = bar.add_task("scan", total=total, completed=total - todo, before=total - todo)
        yield lambda count: bar.advance(task, count)
