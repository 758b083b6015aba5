"""Compiled steps: one graph for a forward pass and what is asked of it, against the loop."""

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees, direction
from torch import Tensor, nn

import pergrad

# Of torch's own while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    torch.manual_seed(0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.first(x)).view(B, T, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Gpt(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.block, self.norm = Block(8), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.block(x)))


class Unreached(nn.Module):
    """One layer of two is used."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.left = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4).eval(), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def classify(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y, reduction="none")


def next_tokens(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    def losses(ids: Tensor, mask: Tensor) -> Tensor:
        each = F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none")
        return (each * mask[:, 1:]).sum(1)

    return losses


def rows(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(4, *shape, dtype=dtype), torch.randint(3, (4,))


def tokens(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (4, 6)), (torch.rand(4, 6) < 0.7).to(dtype)


CASES: dict[str, tuple[Any, Any, Any]] = {
    "perceptron": (perceptron, classify, lambda dtype: rows((8,), dtype)),
    "several positions": (
        lambda: nn.Sequential(perceptron(), nn.AdaptiveAvgPool2d((1, 3)), nn.Flatten(1)),
        classify, lambda dtype: rows((5, 8), dtype),
    ),
    "images": (images, classify, lambda dtype: rows((3, 9, 9), dtype)),
    "language": (lambda: Gpt(tied=False), next_tokens, tokens),
    "tied": (lambda: Gpt(tied=True), next_tokens, tokens),
    "a layer unused": (Unreached, classify, lambda dtype: rows((8,), dtype)),
}  # fmt: skip


def case(name: str, dtype: torch.dtype) -> SimpleNamespace:
    make, losses, batch = CASES[name]
    model = make().to(dtype)
    return SimpleNamespace(model=model, function=losses(model), batch=lambda: batch(dtype))


def want(function: Callable[..., Tensor], model: nn.Module, *batch: Tensor) -> naive.Grads:
    """By the loop, on a float64 copy of everything."""
    twin = copy.deepcopy(model).double()
    losses = {classify(model).__code__: classify, next_tokens(model).__code__: next_tokens}
    again = losses[function.__code__](twin)
    wide = [t.double() if t.is_floating_point() else t for t in batch]
    return naive.loop_grads(again(*wide), twin)


@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", CASES)
def test_every_verb(name: str, dtype: torch.dtype) -> None:
    given = case(name, dtype)
    model, function, tolerance = given.model, given.function, TOLERANCE[dtype]
    step = pergrad.compiled(function, model, backend="eager")
    for _ in range(3):  # as any other, and twice from the record
        batch = given.batch()
        G = want(function, model, *batch)
        norms, scale = naive.norms(G), naive.norms(G)
        assert_agrees(step(*batch), norms, scale, tolerance, "norms")
        for n, found in step.norms_by_parameter(*batch).items():
            assert_agrees(found, naive.norms_by_parameter(G)[n], scale, tolerance, n)
        v = direction(naive.named(model))
        length = naive.flat({n: p[None] for n, p in v.items()}).norm()
        moved = {n: p.to(dtype) for n, p in v.items()}
        assert_agrees(
            step.dots(*batch, against=moved), naive.matvec(G, v), scale * length, tolerance, "dots"
        )
        for weights in (None, 0.5, torch.rand(4, dtype=dtype), pergrad.clip(0.3)):
            model.zero_grad()
            returned = step.backward(*batch, weights=weights)
            assert_agrees(returned, norms, scale, tolerance, "norms of backward")
            c = torch.ones(4, dtype=torch.float64)
            if isinstance(weights, float):
                c = c * weights
            elif isinstance(weights, Tensor):
                c = weights.double()
            elif weights is not None:
                c = naive.clip_weights(G, 0.3)
            sums = naive.weighted_sum(G, c)
            for n, p in naive.named(model).items():
                if p.grad is None:
                    assert n.startswith("left.")
                else:
                    assert_agrees(p.grad, sums[n], (c * norms).sum(), tolerance, n)
    assert repr(step).startswith("CompiledStep(<lambda>, 1 kind") or "losses, 1 kind" in repr(step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["perceptron", "several positions", "images"])
def test_gram(name: str, dtype: torch.dtype) -> None:
    given = case(name, dtype)
    step = pergrad.compiled(given.function, given.model, backend="eager")
    for _ in range(2):
        batch = given.batch()
        G = want(given.function, given.model, *batch)
        scale = torch.outer(naive.norms(G), naive.norms(G))
        assert_agrees(step.gram(*batch), naive.gram(G), scale, TOLERANCE[dtype])


@pytest.mark.parametrize("name", ["perceptron", pytest.param("tied", marks=pytest.mark.slow)])
def test_the_default_backend(name: str) -> None:
    given = case(name, torch.float32)
    step = pergrad.compiled(given.function, given.model)
    for _ in range(2):
        batch = given.batch()
        norms = naive.norms(want(given.function, given.model, *batch))
        assert_agrees(step(*batch), norms, norms, 5e-6)


def test_parameters_are_found_and_named() -> None:
    given = case("a layer unused", torch.float64)
    step, batch = pergrad.compiled(given.function, backend="eager"), given.batch()
    for _ in range(2):
        found = step.norms_by_parameter(*batch)
        assert list(found) == ["model.used.weight", "model.used.bias"]
        norms = naive.norms(want(given.function, given.model, *batch))
        assert_agrees(step(*batch), norms, norms)


def test_a_module_that_computes_its_losses() -> None:
    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = perceptron().double()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return classify(self.model)(x, y)

    task = Task()
    step, batch = pergrad.compiled(task, backend="eager"), rows((8,), torch.float64)
    norms = naive.norms(want(classify(task.model), task.model, *batch))
    for _ in range(2):
        assert_agrees(step(x=batch[0], y=batch[1]), norms, norms)
    assert next(iter(step.norms_by_parameter(*batch))) == "model.0.weight"


def test_other_sizes_values_and_modes() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    power = 1.0

    def function(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y, reduction="none") ** power

    step = pergrad.compiled(function, model, backend="eager")
    for size, exponent, training in [
        (4, 1.0, False), (6, 1.0, False), (4, 2.0, False), (4, 2.0, True), (4, 1.0, False),
        (1, 1.0, False),
    ]:  # fmt: skip
        power = exponent
        model.train(training)
        for seed in range(2):
            x, y = torch.randn(size, 8, dtype=torch.float64), torch.randint(3, (size,))
            torch.manual_seed(seed)
            G = naive.loop_grads(function(x, y), model)
            torch.manual_seed(seed)  # the same draws as without a compiler
            assert_agrees(step(x, y), naive.norms(G), naive.norms(G))
    frozen = model[0].weight.requires_grad_(False)
    model.eval()
    for _ in range(2):
        G = naive.loop_grads(function(x, y), model)
        assert_agrees(step(x, y), naive.norms(G), naive.norms(G))
    frozen.requires_grad_(True)
    model[0].weight = nn.Parameter(2 * frozen.detach())  # another tensor in its place
    for _ in range(2):
        G = naive.loop_grads(function(x, y), model)
        assert_agrees(step(x, y), naive.norms(G), naive.norms(G))


def test_more_kinds_than_torch_keeps() -> None:
    given = case("perceptron", torch.float64)
    step = pergrad.compiled(given.function, given.model, backend="eager")
    nameless = pergrad.compiled(given.function, backend="eager")
    sizes = range(2, 12)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", pergrad.FallbackWarning)
        for size in sizes:
            x, y = torch.randn(size, 8, dtype=torch.float64), torch.randint(3, (size,))
            norms = naive.norms(want(given.function, given.model, x, y))
            assert_agrees(step(x, y), norms, norms)
    (one,) = [w for w in told if w.category is pergrad.FallbackWarning]
    assert "Pad batches to few sizes" in str(one.message)
    for size in range(2, 10):
        nameless(torch.randn(size, 8, dtype=torch.float64), torch.randint(3, (size,)))
    with pytest.raises(pergrad.UnsupportedError, match="pass the parameters"):
        nameless(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_too_small_to_be_squared(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 1, bias=False).to(dtype)

    def function(x: Tensor) -> Tensor:
        return model(x).squeeze(1)

    step = pergrad.compiled(function, model, backend="eager")
    x = torch.randn(4, 4, dtype=dtype)
    step(x)
    for c in (1.0, 1e-25, 0.0, 1e25):
        small = x.clone()
        small[1] *= c
        norms = small.double().norm(dim=1)
        assert_agrees(step(small), norms, norms, TOLERANCE[dtype])
    small[2] = torch.nan
    assert step(small).isnan().tolist() == [False, False, True, False]


def test_tokens_whose_gram_cancels_are_taken_again() -> None:
    model = nn.Linear(16, 16, bias=False)

    def function(x: Tensor) -> Tensor:
        signs = torch.ones(6)
        signs[3:] = -1
        return (model(x).sum(2) * signs).sum(1)

    step = pergrad.compiled(function, model, backend="eager")
    step(torch.randn(3, 6, 16))
    x = torch.randn(3, 3, 16).repeat(1, 2, 1)  # each token once with either sign
    x[:, 5] += 1e-3 * torch.randn(3, 16)
    twin = copy.deepcopy(model).double()
    signs = torch.tensor([1.0, 1, 1, -1, -1, -1], dtype=torch.float64)
    G = naive.loop_grads((twin(x.double()).sum(2) * signs).sum(1), twin)
    assert_agrees(step(x), naive.norms(G), naive.norms(G), 1e-3)
    assert_agrees(step(x), pergrad.norms(function(x), model).double(), naive.norms(G), 1e-3)


def test_hooks_are_seen_whenever_they_come() -> None:
    given = case("perceptron", torch.float64)
    model, function = given.model, given.function
    step, batch = pergrad.compiled(function, model, backend="eager"), given.batch()
    step(*batch)
    handle = model[1].register_forward_hook(lambda module, args, out: 2 * out)
    for _ in range(2):
        G = naive.loop_grads(function(*batch), model)
        assert_agrees(step(*batch), naive.norms(G), naive.norms(G))
    handle.remove()
    G = want(function, model, *batch)
    assert_agrees(step(*batch), naive.norms(G), naive.norms(G))
    handle = model[0].weight.register_hook(lambda g: 3 * g)
    for _ in range(2):
        G = naive.loop_grads(function(*batch), model)
        assert_agrees(step(*batch), naive.norms(G), naive.norms(G))
    handle.remove()
    seen = []
    model[0].bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    step.backward(*batch)
    step.backward(*batch)
    first, second = seen
    assert torch.allclose(second, 2 * first)


def test_a_backward_hook_of_a_module() -> None:
    given = case("perceptron", torch.float64)
    model, function, batch = given.model, given.function, given.batch()
    step = pergrad.compiled(function, model, backend="eager")
    step(*batch)
    handle = model[1].register_full_backward_hook(lambda module, inner, outer: (5 * inner[0],))
    with pytest.raises(pergrad.UnsupportedError, match=r"ackwards? hooks.*Use `pergrad.norms"):
        step(*batch)
    handle.remove()
    G = want(function, model, *batch)
    assert_agrees(step(*batch), naive.norms(G), naive.norms(G))


def test_nothing_of_a_record_stays_behind() -> None:
    given = case("language", torch.float64)
    batch = given.batch()
    pergrad.compiled(given.function, given.model, backend="eager").norms(*batch)
    norms = naive.norms(want(given.function, given.model, *batch))
    for _ in range(2):
        assert_agrees(pergrad.norms(given.function(*batch), given.model), norms, norms)


def test_autocast_around_a_call() -> None:
    given = case("perceptron", torch.float32)
    step = pergrad.compiled(given.function, given.model, backend="eager")
    for _ in range(2):
        batch = given.batch()
        with torch.autocast("cpu", torch.bfloat16):
            found = step(*batch)
            plain = pergrad.norms(given.function(*batch), given.model)
        assert torch.equal(found, plain)
        assert not torch.equal(step(*batch), plain)


def test_one_step_trained() -> None:
    given = case("perceptron", torch.float32)
    model, twin = given.model, copy.deepcopy(given.model)
    step = pergrad.compiled(given.function, model, backend="eager")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    clip = pergrad.clip(0.5, mean=True)
    for _ in range(5):
        batch = given.batch()
        for optimizer in optimizers:
            optimizer.zero_grad()
        step.backward(*batch, weights=clip)
        pergrad.backward(classify(twin)(*batch), twin, weights=clip)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_agrees(p, q.detach(), q.detach().abs().max(), 1e-6)


def refused(function: Callable[..., Any], *batch: Any, params: Any = None) -> str:
    step = pergrad.compiled(function, params, backend="eager")
    with pytest.raises((pergrad.PergradError, ValueError)) as caught:
        step(*batch)
    return str(caught.value)


def test_refusals() -> None:
    model = perceptron()
    x, y = rows((8,), torch.float32)

    def guarded(x: Tensor) -> Tensor:
        with threading.Lock():
            return model(x).sum(1)

    told = refused(guarded, x)
    assert "cannot follow `guarded`" in told
    assert "pergrad.norms(guarded(...), model)" in told
    assert "test_compiled_steps.py:" in told

    def failing(x: Tensor) -> Tensor:
        if x.dim() == 2:
            raise ValueError("my own words")
        return model(x).sum(1)

    assert refused(failing, x) == "my own words"

    def read(x: Tensor) -> Tensor:
        return model(x).sum(1) if bool(x.sum() > 0) else -model(x).sum(1)

    assert "pergrad.norms(read(...), model)" in refused(read, x)
    assert "Return the losses alone" in refused(lambda x: (model(x).sum(1), x + 1), x)
    assert "wants the losses alone" in refused(lambda x: [model(x).sum(1)], x)
    assert "wants the losses alone" in refused(lambda x: 3, x)
    kept = []

    def keeping(x: Tensor) -> Tensor:
        kept.append(model(x))
        return kept[-1].sum(1)

    assert "keep nothing" in refused(keeping, x)
    assert 'reduction="none"' in refused(lambda x, y: F.cross_entropy(model(x), y), x, y)
    w = torch.randn(8, requires_grad=True)
    assert "`w` requires grad and is no nn.Parameter" in refused(
        lambda x: model(x).sum(1) + x @ w, x
    )
    assert "no nn.Parameter" in refused(lambda x: x.sum(1), x)
    assert "reach none of the parameters" in refused(
        lambda x: model(x).sum(1), x, params=[nn.Parameter(w)]
    )
    mixed = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6, track_running_stats=False))
    assert "`mixed.1` mixes examples" in refused(lambda x: mixed(x).sum(1), x)
    counting = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
    assert "(`model.eval()`)" in refused(lambda x: counting(x).sum(1), x)
    shared = torch.zeros(1)

    def writing(x: Tensor) -> Tensor:
        shared.add_(1)
        return model(x).sum(1) * shared

    told = refused(writing, x)
    assert "writes to `shared`" in told
    assert "keep it from writing" in told


def test_bad_arguments() -> None:
    model = perceptron()
    x, _ = rows((8,), torch.float32)
    with pytest.raises(pergrad.UsageError, match=r"Pass a function from a batch"):
        pergrad.compiled(x)  # type: ignore[arg-type]
    with pytest.raises(pergrad.UsageError, match=r"torch has .*inductor"):
        pergrad.compiled(lambda x: x, backend="indoctor")
    with pytest.raises(pergrad.UsageError, match=r"Pass dict"):
        pergrad.compiled(lambda x: model(x).sum(1), model.named_parameters())
    step = pergrad.compiled(lambda x: model(x).sum(1), backend="eager")
    with pytest.raises(pergrad.UsageError, match=r"pergrad.compiled\(function, model\)"):
        step.dots(x, against=torch.ones(3))
    step = pergrad.compiled(lambda x: model(x).sum(1), model, backend="eager")
    with pytest.raises(pergrad.UsageError, match=r"Pass a flat tensor"):
        step.dots(x, against=torch.ones(3))
    with pytest.raises(pergrad.UsageError, match=r"pergrad\.dots"):
        step.dots(x, against=pergrad.gradients(model(x).sum(1), model))
    with pytest.raises(pergrad.UsageError, match=r"norms = step\(x\)"):
        step.backward(x, weights=pergrad.clip(quantile=0.5))
    with pytest.raises(pergrad.UsageError, match=r"norms = step\(x\)"):
        step.backward(x, weights=lambda norms: norms)  # type: ignore[arg-type]
    for wrong, remedy in [
        (torch.ones(3), "one weight per example"),
        (torch.ones(4).int(), "float"),
    ]:
        with pytest.raises(pergrad.UsageError, match=remedy):
            step.backward(x, weights=wrong)
    assert all(p.grad is None for p in model.parameters())
