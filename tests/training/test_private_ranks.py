"""Private training on two ranks: the weights of one rank, whatever share of a step each has."""

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import pergrad


def network(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(n: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
    return list(zip(x, torch.randint(3, (n,), generator=generator), strict=True))


def private(model: nn.Module, n: int, rate: float, seed: int = 5, **more: float) -> pergrad.Private:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    settings = {"clip": 0.3, "noise": 0.7, "most": 3} | more
    return pergrad.Private(
        model, optimizer, data=data(n, next(model.parameters()).dtype), rate=rate,
        generator=torch.Generator().manual_seed(seed), **settings,
    )  # fmt: skip


def train(n: int, rate: float, dtype: torch.dtype, seed: int = 5) -> tuple[list[Tensor], list[int]]:
    """Weights after 10 steps, and how many examples this rank had in each that was seen."""
    model = network(dtype)
    run = private(model, n, rate, seed)
    sizes = []
    while run.steps < 10:
        for x, y in run:
            run.backward(F.cross_entropy(model(x), y, reduction="none"))
            sizes.append(len(y))
            if run.steps == 10:
                break
    return [p.detach() for p in model.parameters()], sizes


CASES = [(40, 0.4), (4, 0.25), (1, 1.0)]  # with steps in which a rank, or both, have no example


def _same_weights(rank: int) -> None:
    for dtype in (torch.float64, torch.float32):
        for n, rate in CASES:
            got, sizes = train(n, rate, dtype, seed=5 + 90 * rank)  # rank 0's seed counts
            alone = torch.load(f"{os.environ['FOLDER']}/{dtype}-{n}")
            every: list[list[int]] = [[], []]
            dist.all_gather_object(every, sizes)
            assert sum(map(sum, every)) == alone["examples"]
            assert every[0] != every[1] or n == 40
            for a, b in zip(got, alone["weights"], strict=True):
                tolerance = 1e-9 if dtype == torch.float64 else 1e-4
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            both: list[list[Tensor]] = [[], []]
            dist.all_gather_object(both, got)
            assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def _left_out(rank: int) -> None:
    """A rank leaves out what is not finite; the sum is the others'."""
    model = network(torch.float64)
    run = private(model, 6, 1.0, noise=0.0)
    run.data[1][0].fill_(float("nan"))  # of rank 1
    with pytest.warns(RuntimeWarning) if rank else nullcontext():
        for x, y in run:
            run.backward(F.cross_entropy(model(x), y, reduction="none"))
    assert run.left_out == rank
    assert all(p.isfinite().all() for p in model.parameters())


def _resumed(rank: int) -> None:
    """Rank 0's state serves all."""
    model = network(torch.float64)
    run = private(model, 8, 0.1)
    weights, state = {n: p.clone() for n, p in model.state_dict().items()}, run.state_dict()
    found = []
    for _ in range(2):
        for x, y in run:
            run.backward(F.cross_entropy(model(x), y, reduction="none"))
        found.append([p.detach().clone() for p in model.parameters()])
        model = network(torch.float64, seed=0)
        run = private(model, 8, 0.1, seed=77)
        states = [state if rank == 0 else None]
        dist.broadcast_object_list(states)
        run.load_state_dict(states[0])
        model.load_state_dict(weights)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _refused(rank: int) -> None:
    with pytest.raises(pergrad.UsageError, match=r"`0.weight` differs(.|\n)*seed before"):
        private(network(torch.float64, seed=rank), 6, 0.5)
    with pytest.raises(pergrad.UsageError, match=r"`data` differs(.|\n)*same settings"):
        private(network(torch.float64), 6 + rank, 0.5)
    model = DistributedDataParallel(network(torch.float64))
    with pytest.raises(pergrad.UnsupportedError, match=r"`model\.module`(.|\n)*once a step"):
        private(model, 6, 0.5)
    model = fully_shard(network(torch.float64))
    with pytest.raises(pergrad.UnsupportedError, match=r"sharded over(.|\n)*fully_shard out"):
        private(model, 6, 0.5)
    run = private(network(torch.float64), 6, 0.5)
    run._ranks = 1  # as if it had been made before they met
    with pytest.raises(pergrad.UsageError, match=r"Make it when the ranks have met"):
        next(iter(run))


def _enter(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["FOLDER"] = folder
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/meet")
    try:
        for script in (_same_weights, _left_out, _resumed, _refused):
            script(rank)
            dist.barrier()
    except BaseException:
        dist.destroy_process_group()
        raise
    # gloo's threads sometimes abort a process that takes them down in order, with or without us
    os._exit(0)


def test_two_ranks(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float32):
        for n, rate in CASES:
            weights, sizes = train(n, rate, dtype)
            torch.save({"weights": weights, "examples": sum(sizes)}, tmp_path / f"{dtype}-{n}")
    on_ranks(_enter, str(tmp_path))
