"""What an engine needs to score: the job, the settings, and the references.

Owns: the plain records that travel from `scan` to an engine and its workers.
Does not know: how anything is computed or kept.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from pergrad.matrix import GradientMatrix
from pergrad.scans.checkpoints import Named
from pergrad.scans.job import Job
from pergrad.scans.options import Mode

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Settings:
    """How to score."""

    batch_size: int
    automatic: bool = False  # whether the batch size may be halved when memory runs out
    mode: Mode = "eval"
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # column -> parameters
    seed: int = 0
    device: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of the verbs, such as on_mixing

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Reference:
    """Gradients that every example is compared with."""

    name: str
    value: GradientMatrix | Mapping[str, Tensor]  # K rows, or one direction by parameter
    norms: tuple[float, ...]  # of each row
    hash: str

    @property
    def columns(self) -> list[str]:
        """One name per row: the reference's own if it has one row, else name:0, name:1, ..."""
        if len(self.norms) == 1:
            return [self.name]
        return [f"{self.name}:{k}" for k in range(len(self.norms))]


@dataclass(frozen=True)
class Work:
    """All that a worker needs to score a block of examples."""

    job: Job
    settings: Settings
    references: tuple[Reference, ...] = ()
    checkpoints: tuple[Named, ...] = ()
    proven: bool = False  # whether examples have been scored before, so that the job works


class Engine(Protocol):
    """Scores blocks of examples, in any order.

    `blocks` are consecutive numbers [k * batch_size, (k + 1) * batch_size); each is scored whole
    by a Scorer, whose table goes to `write`. `smaller` is told when memory ran out and the batch
    size was halved.
    """

    def run(
        self,
        work: Work,
        blocks: Iterable[range],
        write: "Callable[[pa.Table], None]",
        smaller: Callable[[int], None],
    ) -> None:
        """Score all blocks."""
