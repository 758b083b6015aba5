"""Private training: the bound on each example, the noise, what Opacus does, and what is refused."""

import io
import warnings
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same
from private_models import ARCHITECTURES, READ_AS_WORDS
from torch import Tensor, nn

import pergrad


class Rows(torch.utils.data.Dataset):
    def __init__(self, n: int = 60, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 4, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randint(3, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def made(model: nn.Module, data: Any, **more: Any) -> pergrad.Private:
    optimizer = more.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.5)
    settings = {"clip": 0.3, "noise": 0.7, "rate": 0.2, "most": 32} | more
    settings.setdefault("generator", torch.Generator().manual_seed(5))
    return pergrad.Private(model, optimizer, data=data, **settings)


def trained(epochs: int = 3, dtype: torch.dtype = torch.float64, **more: Any) -> list[Tensor]:
    model = network(dtype)
    private = made(model, Rows(dtype=dtype), **more)
    for _ in range(epochs):
        for batch in private:
            private.backward(losses(model, batch))
    assert private.steps == 5 * epochs
    return [p.detach() for p in model.parameters()]


def test_a_private_step_is_not_read() -> None:
    """What is written of single examples is not private, and `.grad` is gone at once."""
    model = network()
    private = made(model, Rows())
    for batch in private:
        values = losses(model, batch)
        with pergrad.reading(values, model) as read:
            private.backward(values)
        with pytest.raises(pergrad.UsageError, match="Train without the watch"):
            _ = read.norms
    assert private.steps == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_step_is_the_loops(dtype: torch.dtype) -> None:
    data, model = Rows(dtype=dtype), network(dtype)
    private = made(model, data, most=5)
    want = [p.detach().clone() for p in model.parameters()]
    generator = torch.Generator().manual_seed(5)
    epoch = iter(private)
    plain = network(dtype)
    for step in range(2):
        rows = (torch.rand(60, generator=generator) < 0.2).nonzero().flatten()
        for _ in range(-(-len(rows) // 5)):
            private.backward(losses(model, next(epoch)))
        assert private.steps == step + 1
        for p, value in zip(plain.parameters(), want, strict=True):
            p.data.copy_(value)
        grads = naive.loop_grads(losses(plain, (data.x[rows], data.y[rows])), plain)
        weights = (0.3 / naive.norms(grads)).clamp(max=1)
        for k, (name, p) in enumerate(plain.named_parameters()):
            total = torch.einsum("b,b...->...", weights.to(grads[name].dtype), grads[name])
            noise = torch.normal(0.0, 0.7 * 0.3, p.shape, generator=generator, dtype=dtype)
            want[k] = (want[k] - 0.5 * (total + noise) / 12).to(dtype)
        for p, value in zip(model.parameters(), want, strict=True):
            close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {}
            torch.testing.assert_close(p.detach(), value, **close)


def test_physical_batches_are_logical_ones() -> None:
    whole = trained(most=60)
    for most in (1, 7):
        for a, b in zip(whole, trained(most=most), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_step_without_examples() -> None:
    data = Rows(2)
    model = network()
    private = made(model, data, rate=0.02)
    seen = sum(len(batch[1]) for batch in counted(private, model))
    assert private.steps == 50
    assert seen < 10  # most steps had none, and all were taken
    still = network()
    assert not torch.equal(model[0].weight, still[0].weight)


def counted(private: pergrad.Private, model: nn.Module) -> Any:
    for batch in private:
        private.backward(losses(model, batch))
        yield batch


@pytest.mark.integrations
@pytest.mark.parametrize("accountant", ["rdp", "prv"])
def test_opacus(accountant: str) -> None:
    """45 Poisson steps: the same weights, and the same epsilon to the digit."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus import GradSampleModule
        from opacus.accountants import create_accountant
        from opacus.optimizers import DPOptimizer
        from opacus.utils.uniform_sampler import UniformWithReplacementSampler

        data, plain = Rows(dtype=torch.float32), network(torch.float32)
        generator = torch.Generator().manual_seed(5)
        wrapped = GradSampleModule(plain)
        theirs = DPOptimizer(
            torch.optim.SGD(wrapped.parameters(), lr=0.5), noise_multiplier=0.7, max_grad_norm=0.3,
            expected_batch_size=12, generator=generator,
        )  # fmt: skip
        account = create_accountant(accountant)
        for _ in range(9):
            sampler = UniformWithReplacementSampler(
                num_samples=60, sample_rate=0.2, generator=generator
            )
            for rows in sampler:
                assert rows
                theirs.zero_grad()
                F.cross_entropy(wrapped(data.x[rows]), data.y[rows]).backward()
                theirs.step()
                account.step(noise_multiplier=0.7, sample_rate=0.2)
        model = network(torch.float32)
        private = made(model, data, accountant=accountant, most=8)
        for _ in range(9):
            for batch in private:
                private.backward(losses(model, batch))
        assert private.steps == 45
        for a, b in zip(plain.parameters(), model.parameters(), strict=True):
            assert float((a - b).norm() / a.norm()) < 1e-6
        assert private.epsilon(1e-5) == account.get_epsilon(delta=1e-5)


def test_epsilon_at_the_ends() -> None:
    private = made(network(), Rows(), noise=0.0)
    assert private.epsilon(1e-5) == 0
    private.steps = 3
    assert private.epsilon(1e-5) == float("inf")
    with pytest.raises(pergrad.UsageError, match="as 1e-5"):
        private.epsilon(2.0)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"clip": 0.0}, "pass a positive number"),
        ({"clip": pergrad.clip(quantile=0.5)}, "gives no privacy"),
        ({"noise": -1.0}, "as 1.1"),
        ({"rate": 1.5}, "such as 64 / len"),
        ({"most": 0}, "at least 1"),
        ({"accountant": "gdp"}, '"prv" or "rdp"'),
        ({"data": []}, "not a DataLoader"),
        ({"data": iter([1])}, "not a DataLoader"),
    ],
)
def test_arguments(more: dict[str, Any], match: str) -> None:
    with pytest.raises(pergrad.UsageError, match=match):
        made(network(), more.pop("data", Rows()), **more)


def test_optimizers_of_other_parameters() -> None:
    model, other = network(), network()
    with pytest.raises(pergrad.UsageError, match=r"lacks the parameter `2.weight`(.|\n)*freeze"):
        made(model, Rows(), optimizer=torch.optim.SGD(model[0].parameters(), lr=1.0))
    both = [*model.parameters(), *other.parameters()]
    with pytest.raises(pergrad.UsageError, match="this model's parameters alone"):
        made(model, Rows(), optimizer=torch.optim.SGD(both, lr=1.0))
    with pytest.raises(pergrad.UsageError, match="no trainable parameter"):
        made(model.requires_grad_(False), Rows())


def test_what_would_not_be_private_is_refused() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    private = made(model, Rows())
    with pytest.raises(pergrad.UsageError, match="once in `for batch in private:`"):
        private.backward(losses(model, (private.data.x, private.data.y)))
    batches = iter(private)
    batch = next(batches)
    with pytest.raises(pergrad.UsageError, match=r"one loss for each(.|\n)*none"):
        private.backward(losses(model, batch).mean())
    with pytest.raises(pergrad.UsageError, match=r"Leave `optimizer.step\(\)` out"):
        private.optimizer.step()
    losses(model, batch).sum().backward()
    with pytest.raises(pergrad.UsageError, match=r"set \.grad to None"):
        private.backward(losses(model, batch))
    model.zero_grad()
    model[0].weight.requires_grad_(False)
    with pytest.raises(pergrad.UsageError, match=r"`0.weight` was frozen(.|\n)*new Private"):
        private.backward(losses(model, batch))
    model[0].weight.requires_grad_(True)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(pergrad.UsageError, match="once for every batch"):
        next(batches)
    for a, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, p)


def test_batch_norm_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    private = made(model, Rows())
    with pytest.raises(pergrad.MixedExamplesError):
        private.backward(losses(model, next(iter(private))))
    model.eval()
    private.backward(losses(model, next(iter(private))))


def test_a_new_private_goes_on() -> None:
    """With other parameters frozen, and the steps of the old one."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    old = made(model, Rows(), optimizer=optimizer)
    model[0].requires_grad_(False)
    new = made(model, Rows(), optimizer=optimizer)
    new.steps = old.steps + 7
    for batch in new:
        new.backward(losses(model, batch))
    assert new.steps == 12
    with pytest.raises(pergrad.UsageError, match="was told to step"):
        optimizer.step()


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [
        (float("nan"), torch.float64),
        (float("inf"), torch.float32),
        pytest.param(float("inf"), torch.float64, marks=pytest.mark.slow),
        pytest.param(float("nan"), torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in READ_AS_WORDS])
def test_what_is_not_finite_is_left_out(name: str, bad: float, dtype: torch.dtype) -> None:
    """The step is that of the others, to rounding; it is said once, and counted."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64).to(dtype)
    x[1] = bad
    y, others = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 2, 3, 4])
    want, expected = stepped(name, dtype, x[others], y[others], 4)
    with pytest.warns(
        RuntimeWarning, match=r"example 1 of this batch(.|\n)*guarantee holds"
    ) as said:
        got, private = stepped(name, dtype, x, y, 4)
    assert len(said) == 1
    assert (private.left_out, expected.left_out) == (2, 0)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


def stepped(
    name: str, dtype: torch.dtype, x: Tensor, y: Tensor, expected: int
) -> tuple[list[Tensor], pergrad.Private]:
    """Two steps on all the data, without noise."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    private = pergrad.Private(model, optimizer, 0.1, 0.0, list(zip(x, y, strict=True)), 1.0)
    private.expected = expected
    for _ in range(2):
        for batch in private:
            private.backward(losses(model, batch))
    return [p.detach() for p in model.parameters()], private


def test_a_step_of_nothing_finite() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    data = [(torch.full((4,), float("nan"), dtype=torch.float64), torch.tensor(0))] * 3
    private = made(model, data, noise=0.0, rate=1.0)
    batches = iter(private)
    batch = next(batches)
    with pytest.warns(RuntimeWarning, match="left out of step 0"):
        norms = private.backward(losses(model, batch))
    assert not norms.isfinite().any()
    assert list(batches) == []
    assert (private.steps, private.left_out) == (1, 3)
    for a, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, p)


def started(dropout: float) -> tuple[nn.Module, torch.optim.Optimizer, pergrad.Private]:
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    return model, optimizer, made(model, Rows(), optimizer=optimizer, most=4, rate=0.2)


def everything(run: tuple[nn.Module, torch.optim.Optimizer, pergrad.Private]) -> bytes:
    file = io.BytesIO()
    torch.save([*(part.state_dict() for part in run), torch.get_rng_state()], file)
    return file.getvalue()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_resumed_run_is_the_same_to_the_bit(dropout: float) -> None:
    """From any batch on; with dropout, from any step on."""
    run = started(dropout)
    saved: list[tuple[int, bytes]] = []
    for epoch in range(2):
        for batch in run[2]:
            before = run[2].steps
            run[2].backward(losses(run[0], batch))
            if run[2].steps > before or not dropout:
                saved.append((epoch, everything(run)))
        saved.append((epoch + 1, everything(run)))
    assert run[2].steps == 10
    assert len(saved) > (20 if not dropout else 10)
    want = torch.load(io.BytesIO(saved[-1][1]))
    for epoch, state in saved:
        run = started(dropout)
        *states, random = torch.load(io.BytesIO(state))
        for part, own in zip(run, states, strict=True):
            part.load_state_dict(own)
        torch.set_rng_state(random)
        for _ in range(epoch, 2):
            for batch in run[2]:
                run[2].backward(losses(run[0], batch))
        assert_same(torch.load(io.BytesIO(everything(run))), want)


def test_no_sum_without_noise_is_stored() -> None:
    """The state of a step that is under way is that of its beginning."""
    model = network()
    private = made(model, Rows(), most=1)
    before = private.state_dict()
    batches = iter(private)
    private.backward(losses(model, next(batches)))
    assert_same(before, private.state_dict())
    assert set(before) == {"steps", "epoch_steps", "left_out", "settings", "generator"}


def test_states_that_do_not_fit() -> None:
    private = made(network(), Rows())
    state = private.state_dict()
    for other, name in [
        ({"noise": 0.8}, "noise"),
        ({"clip": 1.0}, "clip"),
        ({"rate": 0.5}, "rate"),
    ]:
        with pytest.raises(pergrad.UsageError, match=rf"{name} 0(.|\n)*set its `steps`"):
            made(network(), Rows(), **other).load_state_dict(state)
    with pytest.raises(pergrad.UsageError, match=r"data 60, this one has 61"):
        made(network(), Rows(61)).load_state_dict(state)
    for wrong in (None, {"steps": 3}):
        with pytest.raises(pergrad.UsageError, match=r"`state_dict\(\)` returned"):
            private.load_state_dict(wrong)


def test_two_loops_at_once() -> None:
    model = network()
    private = made(model, Rows(), most=1)
    one = iter(private)
    private.backward(losses(model, next(one)))
    other = iter(private)
    private.backward(losses(model, next(other)))
    with pytest.raises(pergrad.UsageError, match="with `break`"):
        next(one)
    private.load_state_dict(private.state_dict())
    with pytest.raises(pergrad.UsageError, match="with `break`"):
        next(other)
