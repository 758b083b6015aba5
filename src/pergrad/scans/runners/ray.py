"""A scan on Ray: workers that each hold the model, and a driver that alone writes.

Owns: what a worker of a scan holds, and what the driver makes of a block's rows.
Does not know: which worker has which block, how a block is scored, how the store is kept.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pergrad.errors import UsageError
from pergrad.extras import need
from pergrad.scans.model_state import prepared
from pergrad.scans.runners.packing import on_device, packed
from pergrad.scans.runners.ray_workers import Words, Workers, plan, session
from pergrad.scans.scorer import Scorer
from pergrad.scans.work import Work

if TYPE_CHECKING:
    import pyarrow as pa

WORDS = Words("scan", "Scan again")


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

        content = _content(work, ray.cloudpickle)
        size = work.settings.batch_size
        with session(ray, self.address, self.workers):
            crew = plan(ray, self.workers, work.settings.device)
            with Workers(ray, crew, content, WORDS, proven=work.proven) as workers:
                del content  # it may hold a data set
                about = lambda: (size, workers.proven)  # noqa: E731
                for _, scored in workers.each(chain([first], blocks), about):
                    workers.proven = workers.proven or scored.rows["error"].null_count > 0
                    if scored.batch_size < size:
                        size = scored.batch_size
                        smaller(size)
                    write(scored.rows)


def _content(work: Work, cloudpickle: ModuleType) -> bytes:
    """What a worker is sent; without the job's `show`, which it has no use for."""
    work = replace(work, job=replace(work.job, show=None))
    parts: dict[str, Any] = {"job": work.job, "settings": work.settings}
    parts |= {f"against[{r.name!r}]": r.value for r in work.references}
    parts |= {f"checkpoints[{p.name!r}]": p.checkpoint.source for p in work.checkpoints}
    return packed(_Scan(work), parts, cloudpickle)


@dataclass(frozen=True)
class _Scored:
    """The rows of one block, and the batch size that memory allowed."""

    rows: "pa.Table"
    batch_size: int


@dataclass(frozen=True)
class _Scan:
    """What a worker is sent."""

    work: Work

    def serve(self, life: ExitStack, device: str | None) -> Callable[..., _Scored]:
        """The model is prepared; what scores a block."""
        life.enter_context(prepared(self.work.job.model, self.work.settings.mode, device))
        return _Scoring(on_device(self.work, device)).score


class _Scoring:
    """On a worker: one block after another."""

    def __init__(self, work: Work) -> None:
        self._work, self._scorer = work, Scorer(work)

    def score(self, block: range, batch_size: int, proven: bool) -> _Scored:
        """The rows of one block, given what is known of memory and of the job."""
        if proven and not self._work.proven:
            self._work = replace(self._work, proven=True)
            self._scorer = Scorer(self._work)
        scorer = self._scorer
        scorer.batch_size = min(scorer.batch_size, batch_size)
        rows = scorer.score(block)
        return _Scored(rows, scorer.batch_size)
