"""The ranks of a distributed run that score one data set together.

Owns: who is who, what all ranks must hear before they start and when they are done.
Does not know: how a block is scored, how the store is kept.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pergrad.errors import UsageError, WorkerError

# Ranks wait for the slowest one, which may take days longer; a rank that dies ends the waiting.
NEVER = timedelta(days=365)
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


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

    def share(self, blocks: list[range]) -> list[range]:
        """This rank's part of the blocks: every size-th, so that all advance alike."""
        return blocks[self.rank :: self.size]

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

    def agree(self, error: BaseException | None) -> None:
        """Meet the other ranks; if one of them has failed, fail on all."""
        said = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = {rank: each for rank, each in enumerate(said) if each is not None}
        if failed:
            rank, message = next(iter(failed.items()))
            raise WorkerError(
                f"Rank {rank} has failed, so the scan is not complete: {message} What the others "
                "have scored is stored. Start the same command again when the cause is gone: it "
                "goes on with what is missing."
            )


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks of this run: of the caller's process group, or by torchrun's environment variables.

    Raises:
        UsageError: neither is there.
    """
    if not dist.is_available():
        raise UsageError("engine='torchrun' needs torch.distributed, which this torch lacks.")
    own = not dist.is_initialized()
    if own:
        missing = [name for name in NEEDED if name not in os.environ]
        if missing:
            raise UsageError(
                f"engine='torchrun' is for a process started by torchrun, but {missing[0]} is not "
                "in the environment and torch.distributed is not initialised. Start the script "
                "with `torchrun --nproc-per-node=2 script.py`, or leave engine out."
            )
        dist.init_process_group("gloo", timeout=NEVER)
    # A group of our own: on the CPU whatever the caller's is for, and with a patience of its own.
    group = dist.new_group(backend="gloo", timeout=NEVER)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(None if own else group)
