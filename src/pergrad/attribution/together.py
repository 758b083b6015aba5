"""Sums over a data set by the ranks of torchrun, each its share of the batches.

Owns: what the ranks tell each other, and that an error on one is an error on all.
Does not know: what is summed, files.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pergrad.errors import UsageError, WorkerError
from pergrad.scans.runners.torchrun import Ranks

ROUND = 16  # batches of each rank between two sums over the ranks


class Team:
    """This process among the ranks that estimate something together; the first one writes."""

    def __init__(self, own: Ranks) -> None:
        self.own = own

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes."""
        return self.own.first

    def of_first(self, value: Any) -> Any:
        """What the first rank says; anything that JSON can hold."""
        return self.own.gather(value)[0]

    def check_same(self, about: Any, differences: Callable[[Any, Any], list[str]]) -> None:
        """All ranks are about the same model, data and settings.

        Raises:
            UsageError: they are not.
        """
        said = self.own.gather(about)
        for rank, other in enumerate(said):
            differ = [each for part in ("scored", "settings")
                      for each in differences(said[0][part], other[part])]  # fmt: skip
            if differ:
                raise UsageError(
                    f"Rank {rank} would estimate something else than rank 0: {'; '.join(differ)}. "
                    "Load the same weights and the same data set on every rank "
                    "(`torch.manual_seed` before a model is made at random), and make the same "
                    "call on all of them."
                )

    def starts(self, begin: int, total: int, size: int) -> list[tuple[range, int]]:
        """For each round this rank's batches, by where they start, and what is done after it."""
        every, each = range(begin, total, size), ROUND * self.own.size
        return [
            (every[at + self.own.rank : at + each : self.own.size],
             min(total, begin + (at + each) * size))
            for at in range(0, len(every), each)
        ]  # fmt: skip

    def summed(self, step: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The sum over ranks of what `step` returns here, by name; a rank may lack names.

        Raises:
            WorkerError: another rank has failed or is gone.
        """
        try:
            found, error = step(), None
        except Exception as raised:
            found, error = {}, raised
        said = self.own.agree(error, {n: list(t.shape) for n, t in found.items()})
        shapes: dict[str, list[int]] = {n: shape for each in said for n, shape in each.items()}
        total = {}
        for n in sorted(shapes):
            total[n] = found.get(n, torch.zeros(shapes[n], dtype=torch.float64)).contiguous()
            self._collective(lambda t: dist.all_reduce(t, group=self.own.group), total[n])
        return total

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first rank's numbers, on every rank: eigenvectors may differ in their signs."""
        found = {n: tensors[n].contiguous() for n in sorted(tensors)}
        for t in found.values():
            self._collective(lambda t: dist.broadcast(t, 0, group=self.own.group), t)
        return found

    def wait(self) -> None:
        """Until all ranks are here."""
        self.own.gather(None)

    def _collective(self, act: Callable[[Tensor], Any], tensor: Tensor) -> None:
        try:
            act(tensor)
        except RuntimeError as error:
            raise WorkerError(
                f"Rank {self.own.rank} of {self.own.size} has lost another rank: {error} What has "
                "been written is whole. Start the same command again: it goes on from there."
            ) from error
