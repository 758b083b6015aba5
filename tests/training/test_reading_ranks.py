"""Reading on two ranks: each its own examples, and all is the same to the bit as without."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import assert_agrees, assert_same, random_states
from tests.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import pergrad
from pergrad.training.noise_of_ranks import add_noise


class Block(nn.Module):
    """A residual perceptron that reads its own weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.tanh(self.inner(torch.tanh(self.inner(self.norm(x))))))


class Model(nn.Module):
    """Returns its loss and its scores, as models of transformers do."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 11)
        self.recompute = recompute

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x = self.table(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        scores = self.head(x)
        # what a hook on the module sees: below what a wrapper puts around its outputs
        self.inside = F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        return self.inside, scores


def built(recompute: bool, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model(recompute).to(dtype)


def losses_of(scores: Tensor, ids: Tensor) -> Tensor:
    each = F.cross_entropy(scores[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return each.sum(1) / each.numel()


def train(
    wrap: Callable[[Model], nn.Module], rank: int, given: str, recompute: bool, dtype: torch.dtype,
    folder: str = "",
) -> list[Any]:  # fmt: skip
    """Three steps of two micro-batches; what is read is held against the loop on a plain copy."""
    model = built(recompute, dtype)
    watch = pergrad.Watch(f"{folder}/{dtype}", every=2) if given == "watch" else None
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    plain = built(False, dtype)
    for step in range(3):
        optimizer.zero_grad()
        for _ in range(2):
            ids = torch.randint(11, (3 + rank, 5), generator=generator)
            loss, scores = wrapped(ids)
            losses = losses_of(scores, ids)
            if given == "nothing":
                loss.backward()
                continue
            if watch is not None:
                with watch(loss, wrapped, len(ids), step=step):
                    loss.backward()
                continue
            whole = given == "losses"
            root = losses if whole else model.inside if given == "inside" else loss
            with pergrad.reading(root, wrapped, len(ids)) as read:
                (losses.sum() if whole else loss).backward()
            if step == 0:  # the plain copy has the same weights as yet
                want = naive.norms(naive.loop_grads(losses_of(plain(ids)[1], ids), plain))
                tolerance = 1e-9 if dtype == torch.float64 else 1e-5
                assert_agrees(read.norms, want, want, tolerance, given)
            assert read.norms.isfinite().all(), read.how
        optimizer.step()
    if watch is not None:
        watch.close()
        assert watch.failures == []
    states = optimizer.state_dict()["state"]
    return [[whole_of(p) for p in wrapped.parameters()],
            [whole_of(value) for state in states.values() for value in state.values()],
            random_states()]  # fmt: skip


def whole_of(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.detach()


def shard(model: Model, **options: bool) -> nn.Module:
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def noise_of_the_first_step() -> pergrad.NoiseScale:
    """From the gradients of all examples of both ranks."""
    plain, grads, weights = built(False, torch.float64), [], []
    for rank in (0, 1):
        generator = torch.Generator().manual_seed(rank)
        for _ in range(2):
            ids = torch.randint(11, (3 + rank, 5), generator=generator)
            own = losses_of(plain(ids)[1], ids) * len(ids)  # each example's mean
            grads.append(naive.flat(naive.loop_grads(own, plain)))
            weights += [1 / len(ids) / 2] * len(ids)  # DDP and FSDP take the ranks' mean
    G, w = torch.cat(grads), torch.tensor(weights, dtype=torch.float64)
    noise = pergrad.NoiseScale()
    noise.add(G.norm(dim=1), (w[:, None] * G).sum(0).norm(), w)
    return noise


def _enter(rank: int, wrap: Callable, recompute: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    try:
        for dtype in (torch.float64, torch.float32):
            plain = train(wrap, rank, "nothing", recompute, dtype)
            watched = train(wrap, rank, "scalar", recompute, dtype)
            assert_same(plain, watched)
            assert_same(plain, train(wrap, rank, "watch", recompute, dtype, folder))
            train(wrap, rank, "losses", recompute, dtype)
            assert_same(plain, train(wrap, rank, "inside", recompute, dtype))
        dist.barrier()
        if rank == 0:
            rows = pergrad.open_watch(f"{folder}/{torch.float32}").steps().to_pylist()
            assert sorted((row["step"], row["rank"], row["examples"]) for row in rows) == [
                (0, 0, 6), (0, 1, 8), (2, 0, 6), (2, 1, 8)
            ]  # fmt: skip
            want = noise_of_the_first_step()
            for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
                rows = pergrad.open_watch(f"{folder}/{dtype}").steps().to_pylist()
                add_noise(got := pergrad.NoiseScale(), [row for row in rows if row["step"] == 0])
                assert got.trace == pytest.approx(want.trace, rel=tolerance)
                assert got.sq_norm == pytest.approx(want.sq_norm, rel=tolerance)
        dist.barrier()
    except BaseException:
        dist.destroy_process_group()
        raise
    # gloo's threads sometimes abort a process that takes them down in order, with or without us
    os._exit(0)


@pytest.mark.parametrize(
    ("wrap", "recompute"),
    [
        (DistributedDataParallel, False),
        (partial(DistributedDataParallel, find_unused_parameters=True), False),
        (partial(DistributedDataParallel, gradient_as_bucket_view=True), True),
        (shard, False),
        (partial(shard, reshard_after_forward=True), True),
    ],
    ids=["ddp", "ddp unused", "ddp views checkpointed", "fsdp2", "fsdp2 checkpointed"],
)
def test_two_ranks(wrap: Callable, recompute: bool, tmp_path: Path) -> None:
    on_ranks(_enter, wrap, recompute, str(tmp_path))
