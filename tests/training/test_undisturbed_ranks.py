"""Plain loops on two ranks of gloo: half precision and adapters, alone and with all the rest.

DDP and FSDP2, the latter also in its own half precision. Training is the same to the bit, and what
is read of an adapter is what the loop over the examples gives.
"""

import os
from collections.abc import Callable
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import pergrad

BF16 = torch.bfloat16


class Adapted(nn.Module):
    """A frozen linear layer and a change of low rank, as LoRA has it; or a plain layer."""

    def __init__(self, lora: bool) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(not lora)
        self.lora = lora
        if lora:
            self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
            self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.drop(x))) if self.lora else self.base(x)


class Block(nn.Module):
    def __init__(self, lora: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6).requires_grad_(not lora)
        self.inner, self.outer, self.drop = Adapted(lora), Adapted(lora), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.outer(torch.tanh(self.inner(self.norm(x)))))


class Model(nn.Module):
    def __init__(self, lora: bool, recompute: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6).requires_grad_(not lora)
        self.blocks = nn.ModuleList([Block(lora), Block(lora)])
        self.head = nn.Linear(6, 11).requires_grad_(not lora)
        self.recompute = recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


def built(lora: bool, recompute: bool, dtype: torch.dtype) -> Model:
    torch.manual_seed(0)
    return Model(lora, recompute).to(dtype)


def per_example(scores: Tensor, ids: Tensor) -> Tensor:
    each = F.cross_entropy(scores[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return each.sum(1) / each.numel()


def ddp(model: nn.Module, _: dict[str, Any]) -> nn.Module:
    return DistributedDataParallel(model)


def fsdp2(model: Model, way: dict[str, Any]) -> nn.Module:
    policy = MixedPrecisionPolicy()
    if way.get("own_bf16"):
        policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


# of each way: autocast, adapters, checkpoints, micro-batches of a step, the type of the weights
WAYS: list[dict[str, Any]] = [
    {"autocast": True},
    {"own_bf16": True},
    {"lora": True},
    {"lora": True, "dtype": torch.float64},
    {"lora": True, "autocast": True},
    {"lora": True, "own_bf16": True},
    {"lora": True, "autocast": True, "recompute": True, "micro": 3},
    {"lora": True, "own_bf16": True, "recompute": True, "micro": 3},
]


def train(wrap: Callable[..., nn.Module], rank: int, way: dict[str, Any], folder: str) -> list[Any]:
    """Three steps; watched if there is a folder."""
    lora, micro, dtype = way.get("lora", False), way.get("micro", 1), way.get("dtype")
    model = built(lora, way.get("recompute", False), dtype or torch.float32)
    wrapped = wrap(model, way)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    watch = pergrad.Watch(folder, every=2, groups="layer") if folder else None
    generator = torch.Generator().manual_seed(rank)
    torch.manual_seed(10 + rank)
    found: list[Tensor] = []
    for step in range(3):
        optimizer.zero_grad()
        for _ in range(micro):
            ids = torch.randint(11, (3 + rank, 5), generator=generator)
            with torch.autocast("cpu", BF16, enabled=way.get("autocast", False)):
                scores = wrapped(ids)
                loss = F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / micro
            if watch is None:
                loss.backward()
                continue
            with watch(loss, wrapped, len(ids), step=step) as read:
                loss.backward()
            assert (read is None) == (step == 1)
            if read is not None:
                found.append(read.norms)
                assert read.norms.isfinite().all(), read.how
                assert (read.norms > 0).all()
        optimizer.step()
    if watch is not None:
        watch.close()
        assert watch.failures == []
    states = optimizer.state_dict()["state"]
    left = [[whole(p) for p in wrapped.parameters()],
            [whole(value) for state in states.values() for value in state.values()],
            random_states()]  # fmt: skip
    if found and lora and not (way.get("autocast") or way.get("own_bf16")):
        held_against_the_loop(found[0], rank, dtype or torch.float32)
    return left


def held_against_the_loop(norms: Tensor, rank: int, dtype: torch.dtype) -> None:
    """The first batch, by a plain copy that draws the same dropout."""
    plain = built(True, False, dtype)
    ids = torch.randint(11, (3 + rank, 5), generator=torch.Generator().manual_seed(rank))
    torch.manual_seed(10 + rank)
    want = naive.norms(naive.loop_grads(per_example(plain(ids), ids), plain))
    assert_agrees(norms, want, want, 1e-9 if dtype == torch.float64 else 1e-5, "lora")


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value.detach()


class Hidden(torch.autograd.Function):
    """Rows that no structure tells: what trl's own loss is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def _hidden(rank: int, folder: str) -> None:
    """Refused in the user's pass, which is as it was; a pass of our own, before, tells it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    ids = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(rank))
    for given in (True, False):
        model = built(False, False, torch.float64).eval()
        wrapped = fsdp2(built(False, False, torch.float64).eval(), {})
        losses = Hidden.apply(wrapped(ids)).flatten(1).sum(1)
        norms = pergrad.norms(losses, wrapped, retain_graph=True)
        want = naive.norms(naive.loop_grads(Hidden.apply(model(ids)).flatten(1).sum(1), model))
        assert_agrees(norms, want, want, 1e-9, "before")
        loss = losses.sum()
        with pergrad.reading(losses if given else loss, wrapped, None if given else 4) as read:
            loss.backward()
        with pytest.raises(pergrad.UsageError, match=r"gathered once(.|\n)*compute_loss_func"):
            read.norms  # noqa: B018
        alone = fsdp2(built(False, False, torch.float64).eval(), {})
        Hidden.apply(alone(ids)).flatten(1).sum(1).sum().backward()
        assert_same(*[[whole(p.grad) for p in m.parameters()] for m in (alone, wrapped)])
    dist.barrier()
    os._exit(0)


def test_what_would_have_to_be_measured_is_refused(tmp_path: Path) -> None:
    on_ranks(_hidden, str(tmp_path))


def _enter(rank: int, wrap: Callable[..., nn.Module], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    try:
        for k, way in enumerate(WAYS):
            if wrap is ddp and way.get("own_bf16"):  # FSDP2's
                continue
            plain = train(wrap, rank, way, "")
            assert_same(plain, train(wrap, rank, way, f"{folder}/{k}"))
        dist.barrier()
    except BaseException:
        dist.destroy_process_group()
        raise
    # gloo's threads sometimes abort a process that takes them down in order, with or without us
    os._exit(0)


@pytest.mark.parametrize("wrap", [ddp, fsdp2])
def test_two_ranks(wrap: Callable[..., nn.Module], tmp_path: Path) -> None:
    on_ranks(_enter, wrap, str(tmp_path))
    for k, way in enumerate(WAYS):
        if wrap is ddp and way.get("own_bf16"):
            assert not (tmp_path / str(k)).exists()
            continue
        micro = way.get("micro", 1)
        rows = pergrad.open_watch(tmp_path / str(k)).steps().to_pylist()
        assert [(row["step"], row["rank"], row["examples"]) for row in rows] == [
            (step, rank, (3 + rank) * micro) for step in (0, 2) for rank in (0, 1)
        ]
        assert all(row["p50"] > 0 for row in rows)
