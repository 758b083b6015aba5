"""The local engine: one process scores, others may fetch the examples.

Owns: the loop over blocks, fetching ahead, and what to do when a process that fetches dies.
Does not know: what is stored, or what a score is.
"""

import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset

from pergrad.errors import WorkerError, WorkerWarning
from pergrad.scans.scorer import Fetched, Scorer, fetch
from pergrad.scans.work import Work

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Local:
    """Scores in this process; `workers` others fetch and collate."""

    workers: int = 0

    def run(
        self,
        work: Work,
        blocks: Iterable[range],
        write: "Callable[[pa.Table], None]",
        smaller: Callable[[int], None],
    ) -> None:
        """Score all blocks."""
        scorer = Scorer(work, smaller)
        if self.workers == 0:
            for block in blocks:
                write(scorer.score(block))
            return
        left = list(blocks)
        with _deaths_are_seen_when_asked() as hush:
            while left:
                size = scorer.batch_size
                done = 0
                for block, fetched in self._fetched(work, left, hush):
                    write(scorer.score(block, fetched))
                    done += 1
                    if scorer.batch_size < size:
                        break
                left = recut(left[done:], scorer.batch_size)

    def _fetched(
        self, work: Work, blocks: Iterable[range], hush: Callable[[], None]
    ) -> Iterator[tuple[range, Fetched | None]]:
        """Blocks in order, each with its batch unless fetching it failed."""
        left = deque(blocks)
        # What a dead process was at, nobody knows: one of these; each of them is fetched alone.
        alone = 0
        while left:
            wanted, workers = (list(left), self.workers) if alone == 0 else ([left[0]], 1)
            try:
                batches = iter(_loader(work, wanted, workers))
                hush()
                for block, batch in zip(wanted, batches, strict=True):
                    left.popleft()
                    alone = max(0, alone - 1)
                    yield block, None if isinstance(batch, _Failed) else Fetched(block, batch)
            except (RuntimeError, OSError, EOFError) as error:
                if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                    raise
                if alone:
                    raise _twice(left[0], error) from error
                alone = min(len(left), self.workers * AHEAD)
                warnings.warn(
                    f"A process that fetches examples died ({error}). It was at some of the "
                    f"examples {left[0].start} to {left[alone - 1].stop - 1}: these are fetched "
                    "again, one batch at a time.",
                    WorkerWarning,
                    stacklevel=2,
                )


@contextmanager
def _deaths_are_seen_when_asked() -> Iterator[Callable[[], None]]:
    """Yields what takes torch's handler of dead children away, to be called once it is set.

    That handler raises wherever the process is just then: in the middle of writing a part, say.
    Whoever waits for a batch asks who is alive. At the end it is back.
    """
    if os.name == "nt" or threading.current_thread() is not threading.main_thread():
        yield lambda: None  # no handler is set there
        return
    before = signal.getsignal(signal.SIGCHLD)
    torchs = getattr(before, "__module__", "").startswith("torch.")
    ours = signal.SIG_DFL if torchs or before is None else before

    def hush() -> None:
        nonlocal before
        now = signal.getsignal(signal.SIGCHLD)
        if now != ours:
            before = now
            signal.signal(signal.SIGCHLD, ours)

    try:
        yield hush
    finally:
        if before is not None:
            signal.signal(signal.SIGCHLD, before)


AHEAD = 2  # batches that each process fetches before they are asked for


def _loader(work: Work, blocks: list[range], workers: int) -> DataLoader:
    source = _Ahead(work, blocks)
    return DataLoader(source, batch_size=None, num_workers=workers, collate_fn=_as_it_is,
                      prefetch_factor=AHEAD)  # fmt: skip


def _twice(block: range, error: Exception) -> WorkerError:
    return WorkerError(
        f"The process that fetches the examples {block.start} to {block.stop - 1} died twice "
        f"({error}). What has been scored is stored. Too little memory, or code that crashes "
        "Python on one of these examples, are the usual reasons: scan again into the same folder "
        "with workers=0, which goes on with what is missing and shows the crash itself."
    )


def recut(blocks: Iterable[range], size: int) -> list[range]:
    """The same examples in blocks of at most `size`."""
    return [block[lo : lo + size] for block in blocks for lo in range(0, len(block), size)]


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass(frozen=True, slots=True)
class _Failed:
    """A block that could not be fetched; whoever scores it fetches it again, and finds out why."""


class _Ahead(Dataset):
    """Item k is the collated batch of block k. It goes to other processes, which where they are not
    forked means pickling: so it holds neither the model nor the losses.
    """

    def __init__(self, work: Work, blocks: list[range]) -> None:
        self.data, self.collate = work.job.data, work.job.collate
        self.seed, self.blocks = work.settings.seed, blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, k: int) -> Any:
        try:
            return fetch(self.collate, self.data, self.blocks[k], self.seed)
        except Exception:
            return _Failed()
