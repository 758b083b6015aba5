"""A scan from start to end.

Owns: what is left to do, opening or making the store, references, parts, the progress bar, counts.
Does not know: how a block is scored (the engine does), or the files' form (the store does).
"""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pergrad import inputs
from pergrad.engine.run import Options as VerbOptions
from pergrad.errors import StoreError, UsageError
from pergrad.scans import checkpoints, form, manifest, progress
from pergrad.scans.adding import Added, added, forget, options_for, put_beside
from pergrad.scans.groups import resolve_groups
from pergrad.scans.job import Job
from pergrad.scans.mistakes import check_against
from pergrad.scans.model_state import prepared
from pergrad.scans.options import ScanOptions
from pergrad.scans.previews import remember
from pergrad.scans.recheck import recheck
from pergrad.scans.references import references_for
from pergrad.scans.runners.local import Local
from pergrad.scans.runners.ray import OnRay
from pergrad.scans.scorer import sensible_batch_size
from pergrad.scans.store import Store, Survey, locked, say_damaged, say_damaged_file
from pergrad.scans.text import printable
from pergrad.scans.work import Engine, Settings, Work
from pergrad.scans.writer import Writer


@dataclass(frozen=True)
class Request:
    """What the user asked of `scan`, checked."""

    job: Job
    folder: Path
    options: ScanOptions
    engine: Engine
    groups: Mapping[str, tuple[str, ...]]
    checkpoints: Mapping[str, checkpoints.Checkpoint]


def request(job: Job, folder: Path, options: ScanOptions) -> Request:
    """A job, a folder and options, made ready.

    Raises:
        UsageError: the job has no such groups, checkpoints are none, an option of the verbs is
            wrong, or the engine or the device cannot be had.
    """
    VerbOptions(**options.of_the_verbs)
    if options.device is not None:
        inputs.check_device(options.device)
    if options.against is not None:
        options = replace(options, against=check_against(options.against))
    if options.engine == "ray":
        engine: Engine = OnRay(options.workers, options.address)
    else:  # torchrun is the local engine on every rank
        engine = Local(options.workers or 0)
    groups = resolve_groups(options.groups, job)
    with suppress(OSError):  # where there is no current folder
        folder = folder.absolute()  # the data may go elsewhere
    return Request(job, folder, options, engine, groups, checkpoints.named(options.checkpoints))


@dataclass(frozen=True, slots=True)
class Opened:
    """A store that is ours to write to, and what is left to do in it."""

    store: Store
    manifest: dict[str, Any]
    work: Work
    missing: np.ndarray  # masks: without rows, and
    failed: np.ndarray  # those that have failed and are to be tried again
    added: Added | None = None  # columns that finished scores are to get

    @property
    def wanted(self) -> np.ndarray:
        """A mask of the examples to score now."""
        return self.missing | self.failed

    def blocks(self) -> Iterator[range]:
        """The same as blocks."""
        size = self.work.settings.batch_size
        return chain(_blocks(self.missing, size), _runs(self.failed, size))


def run(request: Request, *, alone: bool = True) -> Store:
    """Score what is not scored yet. Unless `alone`, another scan shows and says the rest."""
    with opened(request) as scan:
        if scan.added is not None:
            _add(request, scan, scan.added)
            return scan.store

        def smaller(size: int) -> None:
            scan.manifest["settings"]["batch_size"] = size
            scan.store.save(scan.manifest)

        if scan.wanted.any():
            score(request, scan, scan.blocks(), smaller)
        now = scan.manifest["settings"]["batch_size"]
        if now != scan.work.settings.batch_size and request.options.progress:
            progress.say_batch_size(scan.work.settings.batch_size, now)
        finish(request, scan, say=alone)
    return scan.store


def _add(request: Request, scan: Opened, new: Added) -> None:
    """Score the new columns in a folder of their own, then put them beside the others."""
    command = scan.manifest["command"]
    staged = None
    if new.scored:
        own = replace(
            request,
            folder=request.folder / new.place,
            options=options_for(request.options, new, scan.work, command),
            groups={name: scan.work.settings.groups[name] for name in new.groups},
            checkpoints={name: request.checkpoints[name] for name in new.checkpoints},
            job=replace(request.job, key=None, show=None),
        )
        staged = run(own, alone=False)
    put_beside(scan.store, staged, scan.manifest, new)
    finish(request, scan)


@contextmanager
def opened(request: Request) -> Iterator[Opened]:
    """Make the store, or make sure that it is about the same, and see what is left to do."""
    job, options = request.job, request.options
    with locked(request.folder) as store, prepared(job.model, options.mode, options.device):
        parts = store.parts()
        if parts and store.manifest is None:
            raise StoreError(
                f"{printable(store.folder)} has {len(parts)} parts of scores and no manifest.json "
                "that says what they are. Nothing was changed. Bring manifest.json back from a "
                "copy, or move parts/ elsewhere if you do not need what is in it."
            )
        old = store.manifest if parts else None  # nothing is lost by starting anew
        _set_aside_damaged_files(store, options.rescore)
        if old is not None and not options.resume:
            raise StoreError(
                f"{printable(store.folder)} already has scores, and resume is False. Take "
                "another folder, or remove this one if you do not need what is in it."
            )
        work, new = described(request, store, old)
        if old is None:
            store.save(new)
            everything = np.ones(len(job), dtype=bool)
            yield Opened(store, new, work, everything, ~everything)
        else:
            yield _reopened(request, store, old, new, work)


def _set_aside_damaged_files(store: Store, rescore: str | None) -> None:
    """References and previews, before they are read."""
    damaged = store.damaged_files()
    if damaged and rescore != "damaged":
        raise StoreError(say_damaged_file(damaged[0]))
    for path in damaged:
        store.set_aside(path)


def described(
    request: Request, store: Store, old: Mapping[str, Any] | None
) -> tuple[Work, dict[str, Any]]:
    """What is to be scored, for the engine and for the manifest; `old` is the manifest there is."""
    settings = _settings(request, old)
    references = references_for(request.job, request.options.against or {}, store, settings)
    points = checkpoints.ready(request.checkpoints, request.job.model)
    work = Work(request.job, settings, references, points, proven=old is not None)
    return work, _manifest(request, work)


def _reopened(
    request: Request, store: Store, old: dict[str, Any], new: dict[str, Any], work: Work
) -> Opened:
    """Make sure that the store is about the same; what is left to do."""
    more = added(old, new) if request.options.engine != "torchrun" else None
    differ = [] if more else manifest.differences(old, new)
    if differ:
        raise StoreError(
            f"The scores in {printable(store.folder)} are of something else, so this scan cannot "
            f"go on with them: {'; '.join(differ)}. Nothing was changed. Scan into another "
            "folder, or bring back what was." + _how_to_add(old, new, request.options)
        )
    if not more:
        forget(store)
    new["created"], new["finished"] = old["created"], old["finished"]
    survey = store.survey(len(request.job))
    if survey.damaged and request.options.rescore != "damaged":
        raise StoreError(say_damaged(store.folder, survey.damaged))
    if more:
        _refuse_to_add(request, store, survey, more)
    if request.options.recheck:
        recheck(store, work, survey)
    if more:
        new["counts"] = old["counts"]
        nothing = np.zeros_like(survey.present)
        return Opened(store, new, work, nothing, nothing, more)
    for part in survey.damaged:
        store.set_aside(part.path)
    again = np.zeros_like(survey.failed)
    if request.options.rescore == "failed":
        for part in survey.failed_parts:
            store.set_aside(part.path)
        again = survey.failed
    scan = Opened(store, new, work, ~survey.present, again)
    if scan.wanted.any():
        new["finished"] = False
        store.save(new)
    return scan


def _refuse_to_add(request: Request, store: Store, survey: Survey, more: Added) -> None:
    """New columns are for scores of which nothing is left to do."""
    again = survey.failed.any() and request.options.rescore == "failed"
    if survey.damaged or not survey.present.all() or again:
        raise StoreError(
            f"The scores in {printable(store.folder)} are to get new columns "
            f"({', '.join(map(printable, more.columns[:4]))}), but some are still to be scored. "
            "Nothing was changed. First run the scan as it was begun, then with the new columns."
        )


def _how_to_add(old: Mapping[str, Any], new: Mapping[str, Any], options: ScanOptions) -> str:
    """Why columns cannot be added, where that is what was asked for."""
    if added({**old, "finished": True}, new) is None:
        return ""
    if options.engine == "torchrun":
        return ' New columns are added to finished scores by engine="local" or "ray".'
    return " To add columns, first finish the scan as it was begun."


def score(
    request: Request,
    scan: Opened,
    blocks: Iterable[range],
    smaller: Callable[[int], None],
    share: int = 1,
) -> None:
    """Let the engine score blocks, one part in `share` of all, and write what it finds."""
    wanted = scan.wanted
    shown = progress.bar(request.folder, request.options, len(wanted), int(wanted.sum()))
    with Writer(scan.store, wanted) as writer, shown as advance:

        def write(table: pa.Table) -> None:
            advance(writer.add(table) * share)

        before = manifest.hash_of_parameters(request.job)
        try:
            request.engine.run(scan.work, blocks, write, smaller)
        except StoreError:
            raise  # the disk takes no more
        except BaseException:
            # Also when Ctrl-C was pressed: what is scored is kept. Not what has failed: it may be
            # that nothing was wrong with these examples.
            writer.flush(failed=False)
            raise
        if manifest.hash_of_parameters(request.job) != before:
            writer.take_back()
            raise UsageError(
                "The model's parameters have changed while it was scored: something in the data, "
                "the losses or another thread writes to them, and nobody knows when. What was "
                f"scored since the scan began does not count; it is in {printable(request.folder)}"
                "/set-aside. Score a copy that nobody writes to: copy.deepcopy(model)."
            )
        writer.flush()


def _settings(request: Request, old: Mapping[str, Any] | None) -> Settings:
    options = request.options
    size = options.batch_size
    if size == "auto":
        size = (
            old["settings"]["batch_size"]
            if old is not None
            else sensible_batch_size(request.job, options.seed)
        )
    return Settings(
        batch_size=size,
        automatic=options.batch_size == "auto",
        mode=options.mode,
        groups=request.groups,
        seed=options.seed,
        device=options.device,
        options=options.of_the_verbs,
    )


def _manifest(request: Request, work: Work) -> dict[str, Any]:
    as_dict = work.settings.as_dict()
    as_dict["groups"] = {name: list(members) for name, members in work.settings.groups.items()}
    as_dict["against"] = {r.name: {"rows": len(r.norms), "hash": r.hash} for r in work.references}
    as_dict["checkpoints"] = {point.name: point.hash for point in work.checkpoints}
    return {
        "format": form.FORMAT,
        "version": form.VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": request.options.command or shlex.join(sys.orig_argv),
        "job": request.options.source,
        "scored": manifest.scored(request.job),
        "settings": as_dict,
        "columns": manifest.columns(work),
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


def finish(request: Request, scan: Opened, *, say: bool = True) -> None:
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
    remember(request.job, store)
    if request.options.progress and say:
        progress.say(store)
