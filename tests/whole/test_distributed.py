"""DistributedDataParallel on two processes: each rank its own examples, nothing else changes."""

import os

import naive
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.ranks import free_port, on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import pergrad


def _in_step(gradient: Tensor) -> bool:
    """Whether both ranks hold the same gradient."""
    both = [torch.zeros_like(gradient) for _ in range(2)]
    dist.all_gather(both, gradient)
    return torch.equal(both[0], both[1])


def _rank(rank: int, port: int, options: dict) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        ddp = DistributedDataParallel(model, **options)
        torch.manual_seed(1 + rank)
        x = torch.randn(3, 4, dtype=torch.float64)

        def losses(call: nn.Module) -> Tensor:
            return call(x).square().sum(1)

        def step() -> None:
            ddp.zero_grad()
            losses(ddp).mean().backward()
            assert _in_step(model[0].weight.grad)

        if options.get("static_graph"):
            with pytest.raises(pergrad.UnsupportedError, match=r"static_graph(.|\n)*ddp\.module"):
                pergrad.norms(losses(ddp), ddp)
            pergrad.norms(losses(model), model)
            step()
        truth = naive.norms(naive.loop_grads(losses(model), model))
        for _ in range(2):
            torch.testing.assert_close(pergrad.norms(losses(ddp), ddp), truth)
            step()
        with ddp.no_sync():
            norms = pergrad.norms_by_parameter(losses(ddp), ddp)
        assert list(norms) == [f"module.{name}" for name, _ in model.named_parameters()]
        step()
        dist.barrier()
    except BaseException:
        dist.destroy_process_group()
        raise
    # gloo's threads sometimes abort a process that takes them down in order, with or without us
    os._exit(0)


class WithLoss(nn.Module):
    """Returns (loss, logits), as models of transformers do; some of it is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.spare = nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(x)
        return F.cross_entropy(logits, y), logits


def test_the_loss_that_the_model_returns_is_not_used() -> None:
    """DDP ties loss and logits together for its unused parameters; each output is its input's."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    try:
        model = WithLoss().double()
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 1, 0])
        _, logits = ddp(x, y)
        losses = F.cross_entropy(logits, y, reduction="none")
        norms = naive.norms(naive.loop_grads(losses, model))
        torch.testing.assert_close(pergrad.norms(losses, ddp), norms)
        _, logits = ddp(x, y)
        losses = F.cross_entropy(logits, y, reduction="none")
        torch.testing.assert_close(pergrad.backward(losses, ddp), norms)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True},
     {"static_graph": True}],
    ids=lambda o: next(iter(o), "default"),
)  # fmt: skip
def test_each_rank_its_own_examples(options: dict) -> None:
    on_ranks(_rank, free_port(), options)
