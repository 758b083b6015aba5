"""The local engine: one process scores, others may fetch the examples.

Owns: the loop over blocks, and fetching ahead.
Does not know: what is stored, or what a score is.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset

from pergrad.scores.scorer import Fetched, Scorer, fetch
from pergrad.scores.work import Work

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
        left = list(blocks)
        while left:
            size = scorer.batch_size
            done = 0
            for block, fetched in self._fetched(work, left):
                write(scorer.score(block, fetched))
                done += 1
                if scorer.batch_size < size:
                    break
            left = recut(left[done:], scorer.batch_size)

    def _fetched(
        self, work: Work, blocks: Iterable[range]
    ) -> Iterator[tuple[range, Fetched | None]]:
        if self.workers == 0:
            yield from ((block, None) for block in blocks)
            return
        source = _Ahead(work, list(blocks))
        loader = DataLoader(source, batch_size=None, num_workers=self.workers, collate_fn=_as_it_is)
        for block, batch in zip(source.blocks, loader, strict=True):
            yield block, None if isinstance(batch, _Failed) else Fetched(block, batch)


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
