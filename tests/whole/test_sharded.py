"""FSDP2 (`fully_shard`) on two processes: each rank's own examples, nothing else changes."""

import faulthandler
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import naive
import pytest
import torch
import torch.distributed as dist
from helpers import assert_agrees
from tests.ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import pergrad
from pergrad.graph import plan
from pergrad.graph import sharded as by_fsdp

WIDTH = 6


class Block(nn.Module):
    """A transformer block with what needs weights in the pass: a chain, a scale, a slope."""

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
    faulthandler.enable()  # weights that FSDP has freed end the process when they are read
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
    on_ranks(_enter, work, str(folder))


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


def _elsewhere(rank: int) -> None:
    """Other ways to shard the same model."""
    ids, plain = examples(rank), build()
    norms = naive.norms(naive.loop_grads(losses_of(plain, ids), plain))

    def whole() -> Model:
        return fully_shard(build())

    def blocks_alone() -> Model:
        model = build()
        for block in model.blocks:
            fully_shard(block)
        return model

    def blocks_together() -> Model:
        model = build()
        fully_shard([*model.blocks])
        return fully_shard(model)

    def some_left_out() -> Model:
        model = build()
        ignored = {p for n, p in model.named_parameters() if n.endswith(("scale", "slope"))}
        for module in (*model.blocks, model):
            fully_shard(module, ignored_params=ignored)
        return model

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    for make in (
        whole,
        blocks_alone,
        blocks_together,
        some_left_out,
        lambda: sharded(mesh=mesh),
        lambda: sharded(reshard_after_forward=2),
        lambda: sharded(offload_policy=CPUOffloadPolicy(pin_memory=False)),
        lambda: sharded(
            shard_placement_fn=lambda p: None if p.shape[-1] % 2 else Shard(p.dim() - 1)
        ),
    ):
        model = make()
        for _ in range(2):
            losses = losses_of(model, ids)
            assert_agrees(pergrad.norms(losses, model, retain_graph=True), norms, norms)
            losses.sum().backward()
    losses = losses_of(model, ids) + losses_of(model, ids.flip(1))  # two forward passes
    both = losses_of(plain, ids) + losses_of(plain, ids.flip(1))
    norms = naive.norms(naive.loop_grads(both, plain))
    assert_agrees(pergrad.norms(losses, model), norms, norms)


def test_other_ways_to_shard(tmp_path: Path) -> None:
    on_two_ranks(_elsewhere, tmp_path)


def _steps(rank: int) -> None:
    """Three steps, the last two accumulated from two batches, are those of a run without scores."""

    def train(score: bool, **options) -> dict[str, Tensor]:
        model = sharded(**options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            for part in range(1 + (step > 0)):
                last = part == (step > 0)
                model.set_requires_gradient_sync(last)
                losses = losses_of(model, examples(10 * step + 2 * part + rank))
                if score:
                    pergrad.norms(losses, model, retain_graph=True)
                    pergrad.gram(losses, model, retain_graph=True)
                losses.mean().backward()
                if score:  # with no backward after it
                    pergrad.norms(losses_of(model, examples(rank)), model)
            if step == 0:
                assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
        return {n: p.full_tensor() for n, p in model.named_parameters()}

    for options in ({}, {"reshard_after_forward": False}):
        with_scores, without = train(True, **options), train(False, **options)
        for name, want in without.items():
            assert torch.equal(with_scores[name], want), name


def test_training_goes_on_as_without(tmp_path: Path) -> None:
    on_two_ranks(_steps, tmp_path)


def _state(model: nn.Module) -> list:
    """What a call may not change: which parameters are whole, and every gradient."""
    return [(type(p), p.grad, p.untyped_storage().size() if type(p) is nn.Parameter else 0)
            for p in model.parameters()]  # fmt: skip


def _left(rank: int) -> None:
    for options in ({}, {"reshard_after_forward": False}):
        model = sharded(**options)
        losses = losses_of(model, examples(rank))
        before = _state(model)
        pergrad.norms(losses, model, retain_graph=True)
        assert _state(model) == before
        pergrad.norms(losses, model)
        assert not any(type(p) is nn.Parameter for p in model.parameters())  # all sharded
        # what was asked for outlives the weights
        plain = build()
        truth = naive.loop_grads(losses_of(plain, examples(rank)), plain)
        J = pergrad.gradients(losses_of(model, examples(rank)), model)
        for name, got in J.dense().items():
            assert_agrees(got, truth[name], float(naive.norms(truth).max()))


def test_weights_are_sharded_again(tmp_path: Path) -> None:
    on_two_ranks(_left, tmp_path)


def _apart(rank: int) -> None:
    """No rank waits for the other: one has no examples, or other ones, or an error."""
    model, plain = sharded(), build()
    ids = examples(rank, 2 * rank)  # none on the first rank
    norms = naive.norms(naive.loop_grads(losses_of(plain, ids), plain))
    for _ in range(2):
        assert_agrees(pergrad.norms(losses_of(model, ids), model), norms, norms)
    ids = examples(rank, 2)
    norms = naive.norms(naive.loop_grads(losses_of(plain, ids), plain))
    losses = losses_of(model, ids)
    if rank == 0:
        with pytest.raises(pergrad.MixedExamplesError):
            pergrad.norms(losses - losses.mean(), model, retain_graph=True)
        again = pergrad.norms(losses, model)
    else:
        again = pergrad.norms(losses, model, retain_graph=True)
        pergrad.norms(losses, model, check_layout="always")
    assert_agrees(again, norms, norms)
    want = build()
    losses_of(want, ids).mean().backward()
    losses_of(model, ids).mean().backward()
    for name, p in want.named_parameters():
        dist.all_reduce(p.grad)
        assert_agrees(grads_of(model)[name], p.grad / 2, 1.0, what=name)


def test_ranks_may_differ(tmp_path: Path) -> None:
    on_two_ranks(_apart, tmp_path)


def _precisions(rank: int) -> None:
    ids = examples(rank)
    torch.manual_seed(0)
    narrow = Model()  # float32
    wide = build()
    wide.load_state_dict(narrow.state_dict())
    truth = naive.norms(naive.loop_grads(losses_of(wide, ids), wide))
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 0.05)):
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        torch.manual_seed(0)
        model = Model()
        for module in (*model.blocks, model):
            fully_shard(module, mp_policy=policy)
        norms = pergrad.norms(losses_of(model, ids), model)
        assert_agrees(norms, truth, truth, tolerance)
        # against the loop in the same precision
        losses = losses_of(model, ids)
        assert pergrad.check(losses, model).ok


def test_mixed_precision_policy(tmp_path: Path) -> None:
    on_two_ranks(_precisions, tmp_path)


def _recomputed(rank: int) -> None:
    ids, plain = examples(rank), build()
    norms = naive.norms(naive.loop_grads(losses_of(plain, ids), plain))
    for options in ({}, {"reshard_after_forward": False}):
        model = sharded(recompute=True, **options)
        for _ in range(2):
            losses = losses_of(model, ids)
            assert_agrees(pergrad.norms(losses, model, retain_graph=True), norms, norms)
            losses.sum().backward()
        want = build()
        for _ in range(2):
            losses_of(want, ids).sum().backward()
        for name, p in want.named_parameters():
            dist.all_reduce(p.grad)
            assert_agrees(grads_of(model)[name], p.grad / 2, 1.0, what=name)


def test_checkpointed_blocks(tmp_path: Path) -> None:
    on_two_ranks(_recomputed, tmp_path)


class Double(torch.autograd.Function):
    """Of which pergrad knows neither the layout nor a rule."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).flatten(0, -2).sum(0)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(WIDTH))
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(Double.apply(x, self.w))[0])


def _odd(rank: int) -> None:
    warnings.simplefilter("ignore", pergrad.FallbackWarning)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), Odd(), Odd()).double()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Odd(), Odd()).double()
    for module in (model[1], model[2], model):
        fully_shard(module)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64)
    for frozen in (False, True):  # then with frozen weights above and below what is asked for
        if frozen:
            for each in (plain, model):
                for name, p in each.named_parameters():
                    p.requires_grad_(name.startswith("1.last"))
        truth = naive.loop_grads(plain(x).square().sum((1, 2)), plain)
        norms = naive.norms(truth)
        got = pergrad.norms_by_parameter(model(x).square().sum((1, 2)), model)
        assert list(got) == list(truth)
        for name, want in naive.norms_by_parameter(truth).items():
            assert_agrees(got[name], want, norms, what=name)


def test_fallbacks_measured_layouts_and_frozen_weights(tmp_path: Path) -> None:
    on_two_ranks(_odd, tmp_path)


def _around(rank: int) -> None:
    """What is asked for is not sharded itself: the pass goes through sharded weights to it."""
    ids = examples(rank)
    embedding = nn.Embedding(11, WIDTH).double()
    plain, block = build().blocks[0], build().blocks[0].requires_grad_(False)
    fully_shard(block)
    truth = naive.norms(naive.loop_grads(plain(embedding(ids)).square().sum((1, 2)), embedding))
    for _ in range(2):
        norms = pergrad.norms(block(embedding(ids)).square().sum((1, 2)), embedding)
        assert_agrees(norms, truth, truth)


def test_a_plain_layer_below_frozen_shards(tmp_path: Path) -> None:
    on_two_ranks(_around, tmp_path)


def _compiled(rank: int) -> None:
    warnings.simplefilter("ignore", pergrad.FallbackWarning)
    ids, plain = examples(rank), build()
    norms = naive.norms(naive.loop_grads(losses_of(plain, ids), plain))
    for recompute in (False, True):
        model = build(recompute)
        for block in model.blocks:
            block.compile(backend="aot_eager")
            fully_shard(block)
        fully_shard(model)
        assert_agrees(pergrad.norms(losses_of(model, ids), model), norms, norms)


def test_compiled_blocks(tmp_path: Path) -> None:
    on_two_ranks(_compiled, tmp_path)


def _refused(rank: int) -> None:
    model, plain, ids = sharded(), build(), examples(rank)
    for verb in (pergrad.norms, pergrad.gradients):
        with pytest.raises(pergrad.UnsupportedError, match=r"fully_shard(.|\n)*create_graph out"):
            verb(losses_of(model, ids), model, create_graph=True)
    with pytest.raises(
        pergrad.UnsupportedError, match=r"`embed\.weight`(.|\n)*weights \* losses\)\.sum\(\)"
    ):
        pergrad.backward(losses_of(model, ids), model, weights=pergrad.clip(1.0))
    # the remedy: FSDP averages over ranks
    losses = losses_of(model, ids)
    weights = pergrad.clip(1.0)(pergrad.norms(losses, model, retain_graph=True))
    (weights * losses).sum().backward()
    pergrad.backward(losses_of(plain, ids), plain, weights=pergrad.clip(1.0))
    for name, p in plain.named_parameters():
        dist.all_reduce(p.grad)
        assert_agrees(grads_of(model)[name], p.grad / 2, 1.0, what=name)


def test_gradients_of_shards_are_left_to_fsdp(tmp_path: Path) -> None:
    on_two_ranks(_refused, tmp_path)


def _older(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    for names in (True, False):
        model = FullyShardedDataParallel(build(), device_id=torch.device("cpu"),
                                         use_orig_params=names)  # fmt: skip
        losses = losses_of(model, examples(rank))
        for params in (model, [losses.new_ones(2, requires_grad=True)]):
            with pytest.raises(
                pergrad.UnsupportedError, match=r"FullyShardedDataParallel(.|\n)*`fully_shard`"
            ):
                pergrad.norms(losses, params, retain_graph=True)


def test_the_first_fsdp(tmp_path: Path) -> None:
    on_two_ranks(_older, tmp_path)


def test_a_torch_whose_fsdp_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_fsdp, "_states", lambda: [object()])
    model = nn.Linear(3, 2)
    with pytest.raises(pergrad.UnsupportedError, match=r"fully_shard(.|\n)*version of torch"):
        pergrad.norms(model(torch.ones(4, 3)).sum(1), model)
