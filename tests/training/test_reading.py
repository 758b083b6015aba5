"""Norms read in the user's own pass: those of a pass of its own, and nothing else is changed."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator

import naive
import pytest
import torch
import torch.nn.functional as F
import zoo
from helpers import assert_agrees
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pergrad
from pergrad.graph import nodes, plan


@pytest.fixture(autouse=True)
def _fallbacks_are_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


# -- the whole zoo ---------------------------------------------------------------------------------


def grads_after(params: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor | None]:
    for p in params.values():
        p.grad = None
    loss.backward()
    return {name: p.grad for name, p in params.items()}


def same_bits(one: dict[str, Tensor | None], two: dict[str, Tensor | None]) -> None:
    for name, grad in one.items():
        other = two[name]
        assert (grad is None) == (other is None), name
        if grad is not None and other is not None:
            assert torch.equal(grad.to_dense(), other.to_dense()), name


@pytest.mark.parametrize("given", ["losses", "scalar"])
@pytest.mark.parametrize(("case", "B"), zoo.each_batch(single_is_slow=True))
def test_the_zoo(case: zoo.Case, B: int, given: str) -> None:
    if B == 0 and (given == "scalar" or case.name == "vector_products"):
        return  # a sum of no rows; and torch's own backward of a product with an empty matrix fails
    weights = torch.linspace(0.5, 2.0, B, dtype=torch.float64)
    run, G = case.run(B), zoo.reference(case.name, B)
    params = {n: p for n, p in run.named.items() if p.is_leaf}
    plain = case.run(B)  # the same numbers, with a graph of its own
    theirs = {n: p for n, p in plain.named.items() if p.is_leaf}
    expected = grads_after(theirs, (plain.losses * weights).sum() / 4)
    losses = run.losses
    loss = (losses * weights).sum() / 4
    for p in params.values():
        p.grad = None
    if given == "losses":
        with pergrad.reading(losses, run.params, **case.options) as read:
            loss.backward()
        c = torch.ones(B, dtype=torch.float64)
    else:
        with pergrad.reading(loss, run.params, B, **case.options) as read:
            loss.backward()
        c = weights / 4
    same_bits({n: p.grad for n, p in params.items()}, expected)
    want = naive.norms(G)
    assert_agrees(read.norms, want * c, want * c, what="norms")
    assert_agrees(read.weighted_norms, want * weights / 4, want, what="weighted")
    parts = read.norms_by_parameter
    assert list(parts) == list(G)
    for name, each in naive.norms_by_parameter(G).items():
        assert_agrees(parts[name], each * c, want, what=name)


# -- set-ups ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention over positions and a perceptron, with residuals."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(width), nn.MultiheadAttention(width, 2)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).transpose(0, 1)
        x = x + self.attend(h, h, h, need_weights=False)[0].transpose(0, 1)
        return x + self.down(F.gelu(self.up(x)))


class Text(nn.Module):
    """A small language model whose table is tied to its head."""

    def __init__(self, width: int = 8, recompute: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.place = nn.Embedding(6, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.recompute = recompute

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            if self.recompute:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x @ self.table.weight.T


def text(dtype: torch.dtype = torch.float64, **options) -> tuple[Text, Tensor]:
    torch.manual_seed(0)
    plan.clear()
    return Text(**options).to(dtype), torch.randint(11, (4, 6))


def token_losses(model: nn.Module, ids: Tensor, reduction: str = "none") -> Tensor:
    scores, labels = model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].clone()
    labels[1, 2:] = -100
    values = F.cross_entropy(scores, labels.flatten(), reduction=reduction)
    return values.reshape(len(ids), -1) if reduction == "none" else values


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    assert_agrees(got, want, want, 1e-9 if dtype == torch.float64 else 1e-5)


def judged(model: nn.Module, losses: Tensor) -> Tensor:
    return naive.norms(naive.loop_grads(losses, model))


BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


@BOTH
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_language_model(reduction: str, recompute: bool, dtype: torch.dtype) -> None:
    """From the scalar alone: rows flattened, labels left out, weights tied, blocks recomputed."""
    model, ids = text(dtype, recompute=recompute)
    count = 4 * 5 - 3 if reduction == "mean" else 1
    want = judged(model, token_losses(model, ids).sum(1) / count)
    for _ in range(2):  # planned, and remembered
        loss = token_losses(model, ids, reduction)
        expected = grads_after(dict(model.named_parameters()), token_losses(model, ids, reduction))
        model.zero_grad()
        with pergrad.reading(loss, model, 4) as read:
            loss.backward()
        close(read.norms, want, dtype)
        same_bits({n: p.grad for n, p in model.named_parameters()}, expected)
        values = token_losses(model, ids).sum(1) / count
        close(read.losses, values.detach(), dtype)
        assert read.factor == 1


@BOTH
def test_what_a_trainer_multiplies_in(dtype: torch.dtype) -> None:
    """Accumulation and a scaler stand above the loss: `factor`, and are divided out."""
    model, ids = text(dtype)
    want = judged(model, token_losses(model, ids).sum(1) / 17)
    loss = token_losses(model, ids, "mean")
    with pergrad.reading(loss, model, 4) as read:
        (loss / 4 * 1024.0).backward()
    close(read.norms, want, dtype)
    close(read.weighted_norms, want * 256, dtype)
    assert read.factor == 256
    assert torch.equal(read.weights, torch.full((4,), 256.0, dtype=dtype))


def test_under_autocast() -> None:
    model, ids = text(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, loss = token_losses(model, ids).float().sum(1), token_losses(model, ids, "sum")
        want = pergrad.norms(losses, model)
        expected = grads_after(dict(model.named_parameters()), token_losses(model, ids, "sum"))
        model.zero_grad()
        with pergrad.reading(loss, model, 4) as read:
            loss.backward()  # under autocast as well, which torch advises against
    assert_agrees(read.norms, want, want, 1e-4)
    same_bits({n: p.grad for n, p in model.named_parameters()}, expected)


def test_two_micro_batches() -> None:
    """`.grad` accumulates, each pass is read by itself."""
    model, ids = text()
    want = judged(model, token_losses(model, ids).sum(1))
    for half in (slice(0, 2), slice(2, 4)):
        values = F.cross_entropy(
            model(ids[half])[:, :-1].flatten(0, 1), ids[half, 1:].flatten(), reduction="none"
        )
        loss = values.reshape(2, -1).sum(1)
        with pergrad.reading(loss, model) as read:
            loss.mean().backward()
        if half.start == 2:
            close(read.norms, want[half], torch.float64)


def test_weights_that_train_in_part() -> None:
    """Frozen layers, and an adapter of low rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model.requires_grad_(False)
    down, up = nn.Linear(4, 2, bias=False).double(), nn.Linear(2, 6, bias=False).double()
    params = nn.ModuleList([down, up])
    x = torch.randn(5, 4, dtype=torch.float64)

    def losses() -> Tensor:
        return model[2](torch.tanh(model[0](x) + up(down(x)))).square().sum(1)

    want = naive.norms(naive.loop_grads(losses(), params))
    loss = losses().mean()
    with pergrad.reading(loss, params) as read:
        loss.backward()
    close(read.norms * 5, want, torch.float64)


def test_steps_of_an_optimizer_are_the_same_to_the_bit() -> None:
    """Weights, its state and the random generator, after steps with dropout."""

    def train(watched: bool) -> tuple[list[Tensor], Tensor]:
        model, ids = text(torch.float32, recompute=True)
        model.blocks[0].down = nn.Sequential(model.blocks[0].down, nn.Dropout(0.2))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(2):
                loss = token_losses(model, ids, "mean")
                if watched:
                    with pergrad.reading(loss, model, 4) as read:
                        (loss / 2).backward()
                    assert read.norms.isfinite().all()
                else:
                    (loss / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values()]
        return [*[p.detach() for p in model.parameters()], *states], torch.get_rng_state()

    plain, rng = train(watched=False)
    watched, same = train(watched=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert torch.equal(rng, same)


def test_no_hook_stays_and_nothing_is_held() -> None:
    model, ids = text()
    hidden = model.table(ids)
    loss = (hidden @ model.table.weight.T).square().mean()
    node, memory = loss.grad_fn, weakref.ref(hidden)
    with pergrad.reading(loss, model, 4) as read:
        loss.backward()
    assert not nodes.hooks_of_node(node)
    del loss, node, hidden
    gc.collect()
    assert memory() is None  # though `read` is there
    assert read.norms.shape == (4,)


@pytest.mark.parametrize("scalar", [False, True])
def test_what_is_done_is_freed_at_once(small, scalar: bool) -> None:
    """Not first when Python looks for circles, which would keep a step's memory into the next."""
    model, losses = small

    def step() -> list[weakref.ref]:
        values = losses()
        loss = values.mean()
        with pergrad.reading(loss if scalar else values, model, 5) as read:
            loss.backward()
        assert read.norms.shape == (5,)
        return [weakref.ref(each) for each in (read, read.norms, values, loss)]

    gc.disable()
    try:
        assert [memory() for memory in step()] == [None] * 4
    finally:
        gc.enable()


# -- where a scalar comes from ---------------------------------------------------------------------


def picked(out: Tensor, y: Tensor) -> Tensor:
    """Rows with a label, picked by a mask: unequal shares."""
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1]]) == 1
    return F.cross_entropy(out[mask], y[mask])


def picked_after_flattening(out: Tensor, y: Tensor) -> Tensor:
    mask = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0, 1]) == 1
    return F.cross_entropy(out.reshape(-1, 5)[mask], y.flatten()[mask], reduction="sum")


SCALARS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean over (B, T)": lambda out, y: out.square().sum(2).mean(),
    "sum over (B,)": lambda out, y: out.square().sum((1, 2)).sum(),
    "mean of means": lambda out, y: out.square().mean(2).mean(1).mean(0),
    "masked": lambda out, y: (out.square().sum(2) * (y > 1)).sum() / (y > 1).sum(),
    "label smoothing": lambda out, y: F.cross_entropy(
        out.flatten(0, 1), y.flatten(), label_smoothing=0.1
    ),
    "two terms": lambda out, y: (
        0.5 * F.cross_entropy(out.flatten(0, 1), y.flatten()) - out.tanh().mean() / 3
    ),
    "stacked": lambda out, y: torch.stack([out.exp().mean(), out.square().mean()]).sum(),
    "pairs": lambda out, y: F.mse_loss(out, out.detach() + 1) + F.l1_loss(out, out.detach() * 2),
    "pointwise": lambda out, y: F.smooth_l1_loss(out, out.detach() - 0.3, beta=0.2),
    "weighted": lambda out, y: F.cross_entropy(
        out.flatten(0, 1), y.flatten(), weight=torch.arange(1.0, 6.0, dtype=out.dtype)
    ),
    "four dimensions": lambda out, y: F.cross_entropy(out.transpose(1, 2), y),
    "picked": picked,
    "picked after flattening": picked_after_flattening,
    "z loss": lambda out, y: (
        F.cross_entropy(out.flatten(0, 1), y.flatten()) + 1e-2 * out.logsumexp(2).square().mean()
    ),
}


@BOTH
@pytest.mark.parametrize("name", SCALARS)
def test_scalars(name: str, dtype: torch.dtype) -> None:
    """The judge cuts the output of all other examples off their graph."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)).to(dtype)
    x, y = torch.randn(4, 3, 3, dtype=dtype), torch.randint(5, (4, 3))
    rows = []
    for b in range(4):
        out = model(x)
        mine = torch.arange(4).reshape(4, 1, 1) == b
        rows.append(naive.one_grad(SCALARS[name](torch.where(mine, out, out.detach()), y),
                                   dict(model.named_parameters())))  # fmt: skip
    want = naive.norms({n: torch.stack([row[n] for row in rows]) for n in rows[0]})
    loss = SCALARS[name](model(x), y)
    with pergrad.reading(loss, model, 4) as read:
        loss.backward()
    scale = want.max()
    assert_agrees(read.norms, want, scale, 1e-9 if dtype == torch.float64 else 1e-5)


def test_sequence_first() -> None:
    """(T, B), apart and flattened into one dimension."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    x, y = torch.randn(3, 4, 3, dtype=torch.float64), torch.randint(5, (3, 4))
    losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
    want = judged(model, losses.reshape(3, 4).sum(0) / 12)
    flat = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    apart = F.cross_entropy(model(x).movedim(2, 1), y, reduction="none").mean()
    for loss in (flat, apart):
        with pergrad.reading(loss, model, 4, batch_dim=1) as read:
            loss.backward()
        close(read.norms, want, torch.float64)


def test_a_penalty_on_the_weights() -> None:
    """It belongs to no example: named, or left out on request."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)

    def loss() -> Tensor:
        return model(x).square().sum(1).mean() + 0.1 * model.weight.norm()

    want = judged(model, model(x).square().sum(1) / 4)
    total = loss()
    with pergrad.reading(total, model, 4) as read:
        total.backward()
    refused(read, pergrad.UsageError, r"linalg_vector_norm(.|\n)*weight(.|\n)*rest=True")
    total = loss()
    with pergrad.reading(total, model, 4, rest=True) as read:
        total.backward()
    close(read.norms, want, torch.float64)
    assert "without `linalg_vector_norm`" in read.how


# -- what cannot be read ---------------------------------------------------------------------------


def refused(read, error: type, match: str) -> None:
    """Every number raises; the words do not."""
    for name in ("norms", "norms_by_parameter", "weighted_norms", "weights", "factor", "losses"):
        with pytest.raises(error, match=match):
            getattr(read, name)
    assert "not read" in read.how
    assert isinstance(read.failure, error)


@pytest.fixture
def small() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    plan.clear()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    return model, lambda: model(x).square().sum(1)


def test_something_else_flows_in(small) -> None:
    model, losses = small
    x = torch.randn(5, 3, dtype=torch.float64)
    hidden = model[:2](x)
    values = model[2](hidden).square().sum(1)
    with pergrad.reading(values, model) as read:
        (values.mean() + hidden.abs().mean()).backward()
    refused(read, pergrad.UsageError, r"`abs` sends a gradient into `tanh`(.|\n)*pergrad\.norms")
    values = losses()
    with pergrad.reading(values, model) as read:  # this one comes by no use of a parameter
        (values.mean() + model[0].weight.square().sum()).backward()
    close(read.norms, judged(model, losses()), torch.float64)
    values, others = losses(), losses()
    with pergrad.reading(values, model) as read:  # nor does another forward pass
        (values.mean() + others.mean()).backward()
    close(read.norms, judged(model, losses()), torch.float64)


# -- pergrad.backward in the block -----------------------------------------------------------------


@pytest.mark.parametrize(("case", "B"), zoo.each_batch(single_is_slow=True))
def test_the_zoo_in_a_backward_of_ours(case: zoo.Case, B: int) -> None:
    """Its pass is not the user's: it tells what it finds."""
    run, plain = case.run(B), case.run(B)
    params = {n: p for n, p in run.named.items() if p.is_leaf}
    if len(params) < len(run.named):
        return  # `backward` has no .grad to write to
    theirs = {n: p for n, p in plain.named.items() if p.is_leaf}
    weights = torch.linspace(0.5, 2.0, B, dtype=torch.float64)
    for p in (*params.values(), *theirs.values()):
        p.grad = None
    norms = pergrad.backward(plain.losses, plain.params, weights=weights / 4, **case.options)
    losses = run.losses
    with pergrad.reading(losses, run.params, **case.options) as read:
        same = pergrad.backward(losses, run.params, weights=weights / 4, **case.options)
    assert torch.equal(norms, same)
    same_bits({n: p.grad for n, p in params.items()}, {n: p.grad for n, p in theirs.items()})
    G = zoo.reference(case.name, B)
    want = naive.norms(G)
    assert_agrees(read.norms, want, want, what="norms")
    assert_agrees(read.weighted_norms, want * weights / 4, want, what="weighted")
    for name, each in naive.norms_by_parameter(G).items():
        assert_agrees(read.norms_by_parameter[name], each, want, what=name)


@BOTH
@pytest.mark.parametrize(
    "weights",
    [None, 0.25, pergrad.clip(0.5, mean=True), lambda norms: 1 / (1 + norms)],
    ids=["ones", "number", "clip", "function"],
)
def test_weights_of_a_backward_of_ours(weights: object, dtype: torch.dtype) -> None:
    model, ids = text(dtype)
    losses = token_losses(model, ids).sum(1)
    want = judged(model, losses)
    with pergrad.reading(losses, model) as read:
        norms = pergrad.backward(losses, model, weights=weights)
    close(read.norms, want, dtype)
    close(norms, want, dtype)
    c = {"None": torch.ones(4), "0.25": torch.full((4,), 0.25)}.get(str(weights))
    c = weights(want) if c is None and callable(weights) else c
    close(read.weights, c, dtype)
    assert torch.equal(read.losses, losses.detach())


def test_an_example_that_a_backward_of_ours_leaves_out(small) -> None:
    model, losses = small
    values = losses() * torch.tensor([1.0, torch.inf, 1.0, 1.0, 1.0], dtype=torch.float64)
    with pergrad.reading(values, model) as read:
        pergrad.backward(values, model, weights=lambda n: n.isfinite().to(n.dtype))
    want = judged(model, losses())
    assert read.weights.tolist() == [1, 0, 1, 1, 1]
    assert read.weighted_norms[1] == 0
    assert read.norms.isnan().tolist() == [False, True, False, False, False]
    close(read.norms[[0, 2, 3, 4]], want[[0, 2, 3, 4]], torch.float64)


def test_a_backward_of_ours_that_cannot_be_read(small) -> None:
    model, losses = small
    values = losses()
    with pergrad.reading(values, model) as read:
        pergrad.backward(values, model, weights=pergrad.clip(1.0, by="layer"))
    refused(read, pergrad.UsageError, r"layer(.|\n)*Clip whole gradients(.|\n)*pergrad\.norms")
    values = losses()
    with pergrad.reading(values, model) as read:
        pergrad.backward(values, model[0])
    refused(read, pergrad.UsageError, r"other parameters(.|\n)*same model to both")
    for second in (pergrad.backward, lambda v, _: v.sum().backward()):
        values = losses()
        with pergrad.reading(values, model) as read:
            pergrad.backward(values, model, retain_graph=True)
            second(values, model)
        refused(read, pergrad.UsageError, r"Two backward passes(.|\n)*block of its own")
    values = losses()
    with pergrad.reading(values.mean(), model) as read:
        pergrad.backward(values, model)
    refused(read, pergrad.UsageError, r"`pergrad.backward` with these losses")
    values = losses()
    with pergrad.reading(values, model) as read, pytest.raises(ZeroDivisionError):
        pergrad.backward(values, model, weights=lambda n: 1 / 0)
    refused(read, pergrad.UsageError, r"No backward pass came by")
    assert not nodes.hooks_of_node(values.grad_fn)


def test_two_passes(small) -> None:
    model, losses = small
    values = losses()
    with pergrad.reading(values, model) as read:
        values.mean().backward(retain_graph=True)
        values.sum().backward()
    refused(read, pergrad.UsageError, r"Two backward passes(.|\n)*block of its own")


def test_no_pass(small) -> None:
    model, losses = small
    values = losses()
    with pergrad.reading(values, model) as read:
        losses().mean().backward()
    refused(read, pergrad.UsageError, r"No backward pass came by(.|\n)*inside")


def test_asked_too_early(small) -> None:
    model, losses = small
    values = losses()
    with pergrad.reading(values, model) as read:
        with pytest.raises(pergrad.UsageError, match=r"behind"):
            read.norms  # noqa: B018
        values.mean().backward()
    assert read.norms.shape == (5,)


def test_an_exception_in_the_block(small) -> None:
    model, losses = small
    values = losses()
    reading = pergrad.reading(values, model)
    with pytest.raises(KeyError), reading as read:
        raise KeyError("theirs")
    refused(read, pergrad.UsageError, r"left by KeyError(.|\n)*next")
    assert not nodes.hooks_of_node(values.grad_fn)


def test_a_pass_that_stops_early(small) -> None:
    model, losses = small
    values = losses()
    with pergrad.reading(values, model) as read:
        values.mean().backward(inputs=list(model[2].parameters()))
    refused(read, pergrad.UnsupportedError, r"did not come by every use(.|\n)*inputs=")
    values = losses()
    with pergrad.reading(values, model[2]) as read:
        values.mean().backward(inputs=list(model[2].parameters()))
    close(read.norms, judged(model[2], losses()), torch.float64)


def test_an_lstm_in_a_pass_that_stops_early() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 1)]).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    values = model[1](model[0](x)[0][:, -1]).squeeze(1)
    with pergrad.reading(values, model) as read:
        values.mean().backward(inputs=[*model[1].parameters(), model[0].weight_hh_l0])
    with pytest.raises(pergrad.UnsupportedError, match=r"did not come by every use(.|\n)*inputs="):
        read.norms  # noqa: B018


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_a_failure_of_ours_leaves_the_step(small, error: type, monkeypatch) -> None:
    from pergrad.engine.pass_ import Pass

    model, losses = small
    expected = grads_after(dict(model.named_parameters()), losses().mean())
    model.zero_grad()
    calls = []

    def fails(self, use, cotangents) -> None:
        calls.append(use)
        if len(calls) == 2:
            raise error("no room")

    monkeypatch.setattr(Pass, "serve", fails)
    values = losses()
    with pergrad.reading(values, model) as read:
        values.mean().backward()
    refused(read, error, "no room")
    assert len(calls) == 2
    same_bits({n: p.grad for n, p in model.named_parameters()}, expected)


def test_mixed_examples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    values = model(torch.randn(5, 3, dtype=torch.float64)).square().sum(1)
    with pergrad.reading(values, model) as read:
        values.mean().backward()
    refused(read, pergrad.MixedExamplesError, r"batch_norm(.|\n)*eval\(\)")
    assert model[0].weight.grad is not None


def test_a_compiled_model(small) -> None:
    model, _ = small
    compiled = torch.compile(model, backend="aot_eager")
    values = compiled(torch.randn(5, 3, dtype=torch.float64)).square().sum(1)
    with pergrad.reading(values, model) as read:
        values.mean().backward()
    refused(read, pergrad.UnsupportedError, r"torch\.compile(.|\n)*force_eager")
    assert model[0].weight.grad is not None
    torch.compiler.reset()


class Hides(torch.autograd.Function):
    """Runs a pass of its own inside, as reversible layers do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer(x).detach()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.layer(x).backward(g)
        return x.grad, None


def test_an_op_that_hides_parameters(small) -> None:
    model, _ = small
    x = torch.randn(5, 3, dtype=torch.float64)
    for _ in range(2):
        values = Hides.apply(model[:2](x), model[2]).square().sum(1)
        with pergrad.reading(values, model, check_layout="never") as read:
            values.mean().backward()
        with pytest.raises((pergrad.UnsupportedError, pergrad.UsageError)):
            read.norms  # noqa: B018
    assert model[2].weight.grad is not None


def test_weights_of_zero(small) -> None:
    """Nothing arrives, and so nothing is known of that example's own gradient."""
    model, losses = small
    want, values = judged(model, losses()), losses()
    with pergrad.reading(values, model) as read:
        (values * torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])).sum().backward()
    assert read.norms[1].isnan()
    assert read.weighted_norms[1] == 0
    keep = torch.tensor([0, 2, 3, 4])
    close(read.norms[keep], want[keep], torch.float64)
    assert "weight of 1 of 5 examples is 0" in read.how


def test_not_a_number(small) -> None:
    model, losses = small
    loss = losses().mean() * float("nan")
    with pergrad.reading(loss, model, 5) as read:
        loss.backward()
    assert read.norms.isnan().all()


def test_all_labels_ignored() -> None:
    model = nn.Linear(3, 2)
    loss = F.cross_entropy(model(torch.randn(4, 3)), torch.full((4,), -100), reduction="sum")
    with pergrad.reading(loss, model, 4) as read:
        loss.backward()
    assert torch.equal(read.norms, torch.zeros(4))
    assert torch.equal(read.losses, torch.zeros(4))


@pytest.mark.parametrize("B", [0, 1])
def test_few_examples(B: int) -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(B, 3, dtype=torch.float64)
    values = model(x).square().sum(1)
    with pergrad.reading(values, model) as read:
        values.sum().backward()
    close(read.norms, judged(model, model(x).square().sum(1)), torch.float64)


@pytest.mark.parametrize(
    ("examples", "match"),
    [(3, r"5 rows(.|\n)*3 examples do not divide(.|\n)*per_example"), (-1, r"examples(.|\n)*-1"),
     (True, r"examples"), ("5", r"examples"), (0, r"0 examples")],
)  # fmt: skip
def test_examples_that_do_not_fit(small, examples: object, match: str) -> None:
    model, losses = small
    loss = losses().mean()
    with pergrad.reading(loss, model, examples) as read:
        loss.backward()
    refused(read, pergrad.UsageError, match)


def test_wrong_input(small) -> None:
    model, losses = small
    values = losses()
    cases: list[tuple[tuple, dict, str]] = [
        ((values, model, 4), {}, r"5 entries(.|\n)*examples is 4"),
        ((values.detach(), model), {}, r"no graph"),
        ((values.sum().detach(), model), {}, r"no graph(.|\n)*before backward"),
        ((values.reshape(5, 1), model), {}, r"shape \(5, 1\)"),
        ((values, nn.Linear(2, 2).requires_grad_(False)), {}, r"requires grad"),
        ((values, model), {"retain_graph": True}, r"no option retain_graph(.|\n)*on_mixing"),
        (
            (values.sum(), model, 5),
            {"batch_dim": 0, "rest": False, "chunk_bytes": 0},
            "chunk_bytes",
        ),
        (((values[0] * 1.0).exp(), model), {}, r"`exp`(.|\n)*losses \(B,\)"),
    ]
    for arguments, options, match in cases:
        with pergrad.reading(*arguments, **options) as read:
            pass
        refused(read, pergrad.UsageError, match)
    values = losses()
    with pergrad.reading(values[:1].sum()[None].sum(), model) as read:
        values.sum().backward()
    assert read.failure is not None


def test_a_pass_that_cannot_be_seen(small, monkeypatch) -> None:
    """Should torch start passes in another way one day, that is said."""
    from pergrad.graph import nodes

    model, losses = small
    monkeypatch.setattr(nodes, "starts_under_way", list)
    values = losses()
    with pergrad.reading(values, model) as read:
        values.mean().backward()
    refused(read, pergrad.UnsupportedError, r"cannot see(.|\n)*pergrad\.norms")


def test_an_auxiliary_loss_over_the_batch(small) -> None:
    """A summand that goes through the activations as the examples do cannot be told apart."""
    model, _ = small
    hidden = model[:2](torch.randn(5, 3, dtype=torch.float64))
    loss = model[2](hidden).square().sum(1).mean() + (hidden.mean(0) ** 2).sum().sqrt()
    with pergrad.reading(loss, model, 5, rest=True) as read:
        loss.backward()
    refused(read, pergrad.UnsupportedError, r"`sqrt`(.|\n)*belongs to no example(.|\n)*tanh")


def test_gradients_that_lie_apart_and_have_hooks() -> None:
    """One parameter entry for each example: exact in the pass; with a tensor hook, refused."""
    latents = nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    losses = latents.square().sum(1)
    want = naive.norms(naive.loop_grads(losses, [latents]))
    with pergrad.reading(losses, [latents]) as read:
        losses.mean().backward()
    close(read.norms, want, torch.float64)
    handle = latents.register_hook(lambda g: g * 2)
    losses = latents.square().sum(1)
    with pergrad.reading(losses, [latents]) as read:
        losses.mean().backward()
    handle.remove()
    refused(read, pergrad.UnsupportedError, r"`0` has a tensor hook(.|\n)*pergrad\.norms")


def test_tensor_hooks_on_parameters(small) -> None:
    """Called with each example's gradient, as in a loop; and in the pass as ever."""
    model, losses = small
    handle = model[0].weight.register_hook(lambda g: g.clamp(-0.1, 0.1))
    want = judged(model, losses() / 5)
    expected = grads_after(dict(model.named_parameters()), losses().mean())
    model.zero_grad()
    loss = losses().mean()
    with pergrad.reading(loss, model, 5) as read:
        loss.backward()
    handle.remove()
    close(read.norms, want, torch.float64)
    same_bits({n: p.grad for n, p in model.named_parameters()}, expected)


def test_tokens_and_units() -> None:
    """losses / (unit * tokens) are the examples' own mean losses, however rows are reduced."""
    torch.manual_seed(0)
    model = nn.Linear(3, 5).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(5, (8,))
    y[1] = -100
    each = F.cross_entropy(model(x), y, reduction="none").detach().reshape(4, 2)
    own = each.sum(1) / torch.tensor([1, 2, 2, 2])
    scores = model(x)
    for loss in (
        F.cross_entropy(scores, y),
        F.cross_entropy(scores, y, reduction="sum") / 21,
        -2 * F.cross_entropy(scores, y) + 0,
    ):
        with pergrad.reading(loss, model, 4) as read:
            loss.backward(retain_graph=True)
        assert read.tokens.tolist() == [1, 2, 2, 2]
        close(read.losses / (read.unit * read.tokens), own, torch.float64)
    loss = F.mse_loss(model(x), torch.zeros_like(scores))
    with pergrad.reading(loss, model) as read:
        loss.backward()
    assert read.tokens.tolist() == [5] * 8
    assert read.unit == pytest.approx(1 / 40)
    values = model(x).square().sum(1)
    with pergrad.reading(values, model) as read:
        values.sum().backward()
    assert read.tokens.tolist() == [1] * 8
    assert read.unit == 1


@pytest.mark.parametrize("how", ["masked_fill", "product", "label smoothing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_under_a_mask(how: str, dtype: torch.dtype) -> None:
    """Rows that a mask takes out are not counted: a padded text has fewer tokens."""
    torch.manual_seed(0)
    model = nn.Linear(3, 5).to(dtype)
    x, y = torch.randn(4, 6, 3, dtype=dtype), torch.randint(5, (4, 6))
    keep = torch.arange(6) < torch.tensor([[6], [2], [1], [4]])
    logs = -model(x).log_softmax(-1)
    each = logs.gather(-1, y.unsqueeze(-1))
    if how == "product":
        loss = (each.squeeze(-1) * keep).sum() / keep.sum()
    else:
        each = each.masked_fill(~keep.unsqueeze(-1), 0.0)
        loss = each.sum() / keep.sum()
    if how == "label smoothing":
        smooth = logs.sum(-1, keepdim=True).masked_fill_(~keep.unsqueeze(-1), 0.0)
        loss = 0.9 * loss + 0.1 * smooth.sum() / (5 * keep.sum())
    with pergrad.reading(loss, model, examples=4) as read:
        loss.backward()
    assert read.tokens.tolist() == [6, 2, 1, 4]
    assert read.unit == pytest.approx((0.9 if how == "label smoothing" else 1) / 13)
