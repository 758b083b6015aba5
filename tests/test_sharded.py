"""FSDP2 (`fully_shard`) on two processes: each rank's own examples, nothing else changes."""

import os
from collections.abc import Callable
from pathlib import Path

import naive
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_agrees
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

import pergrad
from pergrad.graph import plan

WIDTH = 6


class Block(nn.Module):
    """Attention and a perceptron, with what needs weights in the pass: a chain, a scale, a use twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.slope = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mixed = (q @ k.mT / WIDTH**0.5).softmax(-1) @ v
        x = x + self.scale * self.out(mixed)
        return x + self.down(nn.functional.prelu(self.up(x), self.slope))


class Model(nn.Module):
    """Two blocks between an embedding and a head that shares its weight."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 11)
        self.head.weight = self.embed.weight
        self.recompute = recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    scores = model(ids)[:, :-1]
    each = nn.functional.cross_entropy(scores.flatten(0, 1).double(), ids[:, 1:].flatten(),
                                       reduction="none")  # fmt: skip
    return each.reshape(len(ids), ids.shape[1] - 1).sum(1)


def build(recompute: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(recompute).double()


def sharded(recompute: bool = False, **options) -> Model:
    model = build(recompute)
    for block in model.blocks:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def examples(rank: int, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(7 + rank)
    return torch.randint(11, (count, 5), generator=generator)


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.full_tensor().clone() for n, p in model.named_parameters()}


def _enter(rank: int, work: Callable[[int], None], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    try:
        work(rank)
        dist.barrier()
    except BaseException:
        dist.destroy_process_group()
        raise
    # gloo's threads sometimes abort a process that takes them down in order, with or without us
    os._exit(0)


def on_two_ranks(work: Callable[[int], None], folder: Path) -> None:
    mp.spawn(_enter, (work, str(folder)), nprocs=2)


def _exact(rank: int) -> None:
    for options in ({}, {"reshard_after_forward": False}, {"reshard_after_forward": True}):
        plan.clear()
        plain, model = build(), sharded(**options)
        ids = examples(rank, 3 + rank)
        truth = naive.loop_grads(losses_of(plain, ids), plain)
        norms = naive.norms(truth)
        for _ in range(2):  # with a plan to be made, and with one at hand
            assert_agrees(pergrad.norms(losses_of(model, ids), model), norms, norms)
        names = [n for n, _ in plain.named_parameters()]
        parts = pergrad.norms_by_parameter(losses_of(model, ids), model)
        assert list(parts) == names
        for name, want in naive.norms_by_parameter(truth).items():
            assert_agrees(parts[name], want, norms, what=name)
        J = pergrad.gradients(losses_of(model, ids), dict(model.named_parameters()))
        assert J.names == tuple(names)
        scale = norms[:, None] * norms
        assert_agrees(J @ J.T, naive.gram(truth), scale)
        assert_agrees(pergrad.gram(losses_of(model, ids), model), naive.gram(truth), scale)
        against = pergrad.dots(losses_of(model, ids), model, against=J)
        assert_agrees(against, naive.gram(truth), scale)
        coverage = pergrad.explain(losses_of(model, ids), model)
        assert coverage.exact_share == 1, coverage
        assert pergrad.check(losses_of(model, ids), model, examples=2 + rank).ok


def test_norms_are_those_of_the_plain_model(tmp_path: Path) -> None:
    on_two_ranks(_exact, tmp_path)
