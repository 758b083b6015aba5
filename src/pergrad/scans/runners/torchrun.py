"""The ranks of a distributed run score one data set together, each its share of the blocks.

Owns: who is who, and what the ranks tell each other before they start and when they are done.
Does not know: how a block is scored, how the store is kept.

The first rank holds the lock, writes the manifest and shows the progress; every rank writes parts
of its own into the folder that they share. An error on one rank is an error on all, so that no rank
waits for one that will not come.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pergrad.errors import UsageError, WorkerError, WorkerWarning
from pergrad.scans import driver
from pergrad.scans.driver import Opened, Request
from pergrad.scans.manifest import differences
from pergrad.scans.model_state import prepared
from pergrad.scans.store import Store
from pergrad.scans.text import message_of

T = TypeVar("T")

# Ranks wait for the slowest one, which may take days longer; a rank that dies ends the waiting.
NEVER = timedelta(days=365)
_calls = count()  # alike on all ranks
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Where the ranks of an environment meet. Kept until the process ends: without torchrun's agent the
# first rank serves the store, and a rank that is ahead must not find it closed between two calls.
_meetings: dict[tuple[str, ...], tuple[Any, int, int]] = {}


@dataclass(frozen=True)
class Ranks:
    """This process among those that score together."""

    rank: int
    size: int
    group: Any

    @property
    def first(self) -> bool:
        """Whether this is the rank that owns the lock, the manifest and the progress bar."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """What every rank says, on every rank; anything that JSON can hold."""
        # Not all_gather_object: it needs NumPy, and pickles.
        content = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(content)], device="cpu")
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        self._all_gather(lengths, length)
        padded = content.new_zeros(max(int(each) for each in lengths))
        padded[: len(content)] = content
        contents = [torch.zeros_like(padded) for _ in range(self.size)]
        self._all_gather(contents, padded)
        return [
            json.loads(bytes(each[: int(end)].tolist()))
            for each, end in zip(contents, lengths, strict=True)
        ]

    def _all_gather(self, into: list[torch.Tensor], value: torch.Tensor) -> None:
        try:
            dist.all_gather(into, value, group=self.group)
        except RuntimeError as error:
            raise WorkerError(
                f"Rank {self.rank} of {self.size} has lost another rank: {error} What all ranks "
                "have scored is stored. Start the same command again: it goes on with what is "
                "missing."
            ) from error

    def agree(self, error: BaseException | None, value: Any = None) -> list[Any]:
        """Meet the other ranks: what each says; if one of them has failed, all fail."""
        reason = None if error is None else message_of(error)
        said = self.gather([reason, value])
        if error is not None:
            raise error
        failed = {rank: reason for rank, (reason, _) in enumerate(said) if reason is not None}
        if failed:
            rank, reason = next(iter(failed.items()))
            raise WorkerError(
                f"Rank {rank} has failed, so the scan is not complete: {reason} What all ranks "
                "have scored is stored. Start the same command again when the cause is gone: it "
                "goes on with what is missing."
            )
        return [value for _, value in said]


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks of this run: of the caller's process group, or by torchrun's environment variables.

    Raises:
        UsageError: neither is there.
    """
    if not dist.is_available():
        raise UsageError(
            "engine='torchrun' needs torch.distributed, which this torch lacks. Leave engine out, "
            "or install a torch that has it."
        )
    own = not dist.is_initialized()
    if own:
        missing = [name for name in NEEDED if name not in os.environ]
        if missing:
            raise UsageError(
                f"engine='torchrun' is for a process started by torchrun, but {missing[0]} is not "
                "in the environment and torch.distributed is not initialised. Start the script "
                "with `torchrun --nproc-per-node=2 script.py`, or leave engine out."
            )
        store, rank, size = _meeting(tuple(os.environ[name] for name in NEEDED))
        # The store outlives a group, and with it the addresses of a group before this one.
        own_part = dist.PrefixStore(f"pergrad {next(_calls)}", store)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=own_part, rank=rank, world_size=size, timeout=NEVER)
    # A group of our own: on the CPU whatever the caller's is for, and with a patience of its own.
    group = dist.new_group(backend="gloo", timeout=NEVER)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(None if own else group)


def _meeting(environment: tuple[str, ...]) -> tuple[Any, int, int]:
    """The store where the ranks find each other, this one's rank, and how many they are."""
    if environment not in _meetings:
        _meetings[environment] = next(dist.rendezvous("env://", timeout=NEVER))  # type: ignore[attr-defined]
    return _meetings[environment]


def run(request: Request) -> Store:
    """Score what is not scored yet, together with the other ranks.

    Raises:
        UsageError: this is not a distributed run, or ranks have different weights, data or
            settings.
        WorkerError: another rank has failed or died.
    """
    with ranks() as own, ExitStack() as stack:
        scan = _opened(request, own, stack)
        if scan.wanted.any():
            size, error = _tried(lambda: _scored(request, scan, own))
            if error is not None:
                warnings.warn(
                    f"Rank {own.rank} has failed, and waits for the other ranks to finish what "
                    f"they can: {message_of(error)}",
                    WorkerWarning,
                    stacklevel=2,
                )
            sizes = own.agree(error, size)
            scan.manifest["settings"]["batch_size"] = min(sizes)
        error = None
        if own.first:
            _, error = _tried(lambda: driver.finish(request, scan))
        own.agree(error)
    return Store(request.folder)


def _tried(step: Callable[[], T]) -> tuple[T, None] | tuple[None, Exception]:
    """What a step returns, or what it raises: the others must hear of it before it goes on."""
    try:
        return step(), None
    except Exception as error:
        return None, error


def _opened(request: Request, own: Ranks, stack: ExitStack) -> Opened:
    """The store, opened by the first rank and joined by the others."""
    if own.first:
        scan, error = _tried(lambda: stack.enter_context(driver.opened(request)))
        plan = scan and [scan.manifest, scan.store.owner, scan.work.proven, _runs(scan.missing),
                         _runs(scan.failed)]  # fmt: skip
        own.agree(error, plan)
    else:
        plan = own.agree(None)[0]
        scan, error = _tried(lambda: stack.enter_context(_joined(request, own, *plan)))
    own.agree(error)
    assert scan is not None
    return scan


def _runs(mask: np.ndarray) -> list[list[int]]:
    """Where a mask is set, as pairs of start and stop."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).tolist()


def _mask(runs: list[list[int]], size: int) -> np.ndarray:
    """The mask again."""
    mask = np.zeros(size, dtype=bool)
    for start, stop in runs:
        mask[start:stop] = True
    return mask


@contextmanager
def _joined(
    request: Request,
    own: Ranks,
    manifest: dict[str, Any],
    owner: str,
    proven: bool,
    missing: list[list[int]],
    failed: list[list[int]],
) -> Iterator[Opened]:
    """The store that the first rank has opened, if this rank sees the same and means the same."""
    store = Store(request.folder)
    if store.manifest is None or store.manifest["created"] != manifest["created"]:
        raise UsageError(
            f"Rank {own.rank} does not see in {request.folder} what rank 0 has written there. Give "
            "the scores a folder on a disk that all ranks share."
        )
    store.owner = owner
    with prepared(request.job.model, request.options.mode, request.options.device):
        work, mine = driver.described(request, store, manifest)
        differ = differences(manifest, mine)
        if not differ and work.settings.batch_size != manifest["settings"]["batch_size"]:
            differ = ["the batch size"]
        if differ:
            raise UsageError(
                f"Rank {own.rank} would score something else than rank 0: {'; '.join(differ)}. "
                "Load the same weights and the same data set on every rank (`torch.manual_seed` "
                "before a model is made at random), and call scan with the same arguments."
            )
        total = len(request.job)
        work = replace(work, proven=proven)
        yield Opened(store, manifest, work, _mask(missing, total), _mask(failed, total))


def _scored(request: Request, scan: Opened, own: Ranks) -> int:
    """Score this rank's share: every size-th block. The batch size that memory allowed."""
    sizes = [scan.work.settings.batch_size]
    share = islice(scan.blocks(), own.rank, None, own.size)
    # The ranks advance alike, so the first one's progress stands for all.
    options = replace(request.options, progress=request.options.progress and own.first)
    shown = replace(request, options=options)
    driver.score(shown, scan, share, sizes.append, share=own.size)
    return min(sizes)
