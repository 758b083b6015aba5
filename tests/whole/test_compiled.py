"""Models under torch.compile: read off the backward graph that torch keeps, against the loop."""

import gc
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees, direction
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pergrad
from pergrad.graph import nodes
from pergrad.graph.nodes import compiled as nodes_of_regions

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
    """Tied, checkpointed, in one region or cut into three."""

    def __init__(self, *, tied: bool = False, cut: bool = False, again: bool = False) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.words.weight
        self.cut, self.again = cut, again

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
            if self.cut:
                torch._dynamo.graph_break()
        return self.head(self.norm(x))


class Derived(nn.Module):
    """Weights that are computed from parameters, and a scale that meets no matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
        self.left, self.right = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))
        self.norm, self.last = nn.RMSNorm(6), nn.Linear(6, 3, bias=False)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x) @ (self.left @ self.right))
        return self.last(self.norm(x) * self.scale).mean(1)


class Picked(nn.Module):
    """Rows by indices, within each example."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(18, 3)
        self.register_buffer("ends", torch.tensor([4, 2, 0, 3]))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        ends = x[torch.arange(4), self.ends]  # the last token of each
        twice = x[:, torch.tensor([0, 0, 2])].sum(1)
        kept = torch.zeros_like(x).copy_(x).cumsum(1)[:, -1]
        return self.last(torch.cat([ends, twice, kept], 1))


class Bags(nn.Module):
    """Tables of which sums, means and maxima of rows are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(11, 4, mode=mode, padding_idx=9) for mode in ("sum", "mean", "max")
        )
        self.last = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.cat([bag(ids) for bag in self.bags], 1))


class Resized(nn.Module):
    """Images made larger between two convolutions, by indices of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(self.one(x), size=(7, 7), mode="bilinear", align_corners=False)
        return self.two(F.interpolate(x.tanh(), size=(9, 5), mode="nearest")).mean((2, 3))


def images(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), norm(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip


CLASSES = torch.tensor([0, 2, 1, 2])
IDS = torch.tensor([[1, 2, 3, 1, 0, 9], [4, 4, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5], [9, 8, 9, 8, 7, 7]])
IMAGES = torch.linspace(-1, 1, 4 * 3 * 8 * 8).sin().reshape(4, 3, 8, 8)
ROWS = torch.linspace(-3, 3, 4 * 5 * 8).cos().reshape(4, 5, 8)

MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(40, 5), nn.ReLU(), nn.Linear(5, 3)), ROWS),
    "gpt": (Gpt, IDS),
    "tied": (lambda: Gpt(tied=True), IDS),
    "regions": (lambda: Gpt(cut=True), IDS),
    "tied across regions": (lambda: Gpt(tied=True, cut=True), IDS),
    "checkpointed": (lambda: Gpt(again=True), IDS),
    "group norm": (lambda: images(lambda c: nn.GroupNorm(2, c)), IMAGES),
    "batch norm": (lambda: images(nn.BatchNorm2d).eval(), IMAGES),
    "instance norm": (lambda: images(lambda c: nn.InstanceNorm2d(c, affine=True)), IMAGES),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
                              nn.Flatten(), nn.Linear(40, 3)), ROWS),
    "derived": (Derived, ROWS),
    "picked": (Picked, ROWS),
    "bags": (Bags, IDS),
    "resized": (Resized, IMAGES),
}  # fmt: skip


def losses(call: Callable[[Tensor], Tensor], data: Tensor) -> Tensor:
    out = call(data)
    if out.dim() == 3:  # a language model
        return F.cross_entropy(out.mT, data.roll(1, 1), reduction="none").mean(1)
    return F.cross_entropy(out, CLASSES, reduction="none")


def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    make, data = MODELS[name]
    return make().to(dtype), data.to(dtype) if data.is_floating_point() else data


def check(values: Callable[[], Tensor], model: nn.Module, dtype: torch.dtype) -> None:
    """Every verb against the loop through the same graph, and all of it by rules."""
    rows = naive.loop_grads(values(), model)
    flat = torch.cat([g.double().flatten(1) for g in rows.values()], 1)
    lengths, tolerance = flat.norm(dim=1), TOLERANCE[dtype]
    with warnings.catch_warnings():
        warnings.simplefilter("error", pergrad.FallbackWarning)
        for _ in range(2):  # the first reads the region, the second finds it read
            assert_agrees(pergrad.norms(values(), model), lengths, lengths, tolerance, "norms")
        scale = lengths[:, None] * lengths
        assert_agrees(pergrad.gram(values(), model), flat @ flat.T, scale, tolerance, "gram")
        towards = direction(dict(model.named_parameters()))
        wanted = flat @ torch.cat([towards[name].flatten() for name in rows])
        got = pergrad.dots(values(), model, against=towards)
        size = sum(float(v.square().sum()) for v in towards.values()) ** 0.5
        assert_agrees(got, wanted, lengths * size, tolerance, "dots")
        matrix = pergrad.gradients(values(), model)
        for name, g in matrix.dense().items():
            scale = lengths.reshape(-1, *[1] * (g.dim() - 1))
            assert_agrees(g, rows[name], scale, tolerance, name)
        weights = torch.linspace(0.5, 2, len(lengths))
        model.zero_grad()
        pergrad.backward(values(), model, weights=weights)
        for name, p in model.named_parameters():
            total = torch.einsum("b,b...->...", weights.double(), rows[name].double())
            assert_agrees(p.grad, total, float(2 * lengths.sum()), tolerance, name)
    assert pergrad.explain(values(), model).exact_share == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_every_verb(name: str, dtype: torch.dtype) -> None:
    model, data = made(name, dtype)
    compiled = torch.compile(model, backend="aot_eager")
    check(lambda: losses(compiled, data), model, dtype)


@pytest.mark.parametrize("name", ["perceptron", "batch norm", "picked"])
def test_the_default_backend(name: str) -> None:
    """Another graph, of ops that are taken apart, and code made from what is left of it."""
    model, data = made(name, torch.float32)
    compiled = torch.compile(model)
    check(lambda: losses(compiled, data), model, torch.float32)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_constant_of_the_graph(backend: str) -> None:
    """torch keeps a small tensor in the graph itself, as an attribute."""
    table, last = nn.Embedding(5, 8), nn.Linear(40, 3)
    model = nn.ModuleList([table, last])

    def forward(x: Tensor) -> Tensor:
        places = table(torch.tensor([0, 2, 1, 4, 4]))
        return last((x * places).flatten(1).tanh())

    compiled = torch.compile(forward, backend=backend)
    check(lambda: losses(compiled, ROWS), model, torch.float32)


WARM = """
import sys, warnings
import torch
import torch.nn.functional as F
from torch import nn
import pergrad

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(30, 8), nn.LayerNorm(8), nn.Linear(8, 30))
ids, targets = torch.randint(30, (4, 6)), torch.randint(30, (4, 6))
compiled = torch.compile(model)

def losses(call):
    return F.cross_entropy(call(ids).transpose(1, 2), targets, reduction="none").sum(1)

if sys.argv[1] == "first":
    losses(compiled).mean().backward()
else:
    warnings.simplefilter("error", pergrad.FallbackWarning)
    found = pergrad.norms(losses(compiled), model)
    for norm, loss in zip(found, losses(model)):
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        torch.testing.assert_close(norm, torch.cat([g.flatten() for g in grads]).norm())
    from torch._dynamo.utils import counters
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1, counters["aot_autograd"]
"""


def test_the_warm_cache_of_another_process(tmp_path: Path) -> None:
    """Its graph is another: what torch could compute beforehand is a constant in it."""
    for which in ("first", "second"):
        subprocess.run(
            [sys.executable, "-c", WARM, which], check=True, timeout=300,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
                 "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip


def test_a_model_and_its_losses_compiled_together() -> None:
    model, data = made("gpt", torch.float64)
    compiled = torch.compile(lambda: losses(model, data), backend="aot_eager")
    check(compiled, model, torch.float64)


def test_sizes_left_open() -> None:
    """One compiled region serves batches and lengths of any size."""
    model, data = made("gpt", torch.float64)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for part in (data, data[:3, :5], data[:2, :4], data):
        truth = naive.norms(naive.loop_grads(losses(model, part), model))
        values = losses(compiled, part)
        assert pergrad.explain(values, model, retain_graph=True).exact_share == 1
        torch.testing.assert_close(pergrad.norms(values, model), truth)


def test_autocast_inside() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Flatten(), nn.Linear(40, 8), nn.GELU(), nn.Linear(8, 3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(x).float()

    model = Mixed()
    values = losses(torch.compile(model, backend="aot_eager"), ROWS)
    truth = naive.norms(naive.loop_grads(values, model))
    assert pergrad.explain(values, model, retain_graph=True).exact_share == 1
    assert_agrees(pergrad.norms(values, model), truth, truth, 2**-7)


def test_batch_norm_in_training_is_left_to_the_fallback() -> None:
    """By parameter: what lies above it has rules, and the reason stands in the table."""
    model = images(nn.BatchNorm2d).double()
    compiled = torch.compile(model, backend="aot_eager")
    values = losses(compiled, IMAGES.double())
    truth = naive.norms_by_parameter(naive.loop_grads(values, model))
    with pytest.warns(pergrad.FallbackWarning, match=r"CompiledFunction(.|\n)*force_eager"):
        parts = pergrad.norms_by_parameter(values, model, retain_graph=True)
    for name, want in truth.items():
        torch.testing.assert_close(parts[name], want)
    rows = {row.parameter: row for row in pergrad.explain(values, model).rows}
    assert rows["0.weight"].how == "fallback"
    assert "native_batch_norm_backward" in rows["0.weight"].op
    assert rows["4.weight"].how == rows["7.bias"].how == "rule"


def test_rows_moved_between_examples_are_left_to_the_fallback() -> None:
    """Which ones is data: what was read for one batch would not hold for the next."""
    one, two = nn.Linear(8, 6).double(), nn.Linear(6, 3).double()
    model = nn.Sequential(one, two)

    def sent(x: Tensor, order: Tensor) -> Tensor:
        x = one(x).tanh()
        return two(torch.zeros_like(x).index_add(0, order, x))

    compiled = torch.compile(sent, backend="aot_eager")
    for order in (torch.arange(4), torch.tensor([2, 0, 3, 1])):
        values = losses(lambda x, order=order: compiled(x, order), ROWS[:, 0].double())
        truth = naive.norms(naive.loop_grads(values, model))
        with pytest.warns(pergrad.FallbackWarning, match="index_select"):
            norms = pergrad.norms(values, model, retain_graph=True)
        torch.testing.assert_close(norms, truth)
        rows = {row.parameter: row.how for row in pergrad.explain(values, model).rows}
        assert rows == {"0.weight": "fallback", "0.bias": "fallback",
                        "1.weight": "rule", "1.bias": "rule"}  # fmt: skip


class _Squared(torch.autograd.Function):
    """A backward that is not linear in its cotangent."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * g.abs()


def test_what_does_not_grow_with_the_cotangents_is_not_read() -> None:
    """Owners follow through any elementwise op; the check by powers of two finds it out."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(_Squared.apply(self.one(x))).mean(1)

    model = Odd().double()
    values = losses(torch.compile(model, backend="aot_eager"), ROWS.double())
    truth = naive.norms(naive.loop_grads(values, model))
    with pytest.warns(pergrad.FallbackWarning, match="does not hold"):
        norms = pergrad.norms(values, model)
    torch.testing.assert_close(norms, truth)


FLAT = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class _Reused(nn.Module):
    """Its backward, compiled for one run, writes over what it saved."""

    def __init__(self, *, read: bool) -> None:
        super().__init__()
        self.one, self.two, self.read = nn.Linear(8, 6), nn.Linear(6, 3), read

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if not self.read:  # pergrad does not follow examples through indices of examples
            x = torch.zeros_like(x).index_add(0, torch.tensor([3, 1, 0, 2, 4]), x)
        return self.two(x).sigmoid() * 2


@pytest.mark.parametrize(
    ("looped", "read", "dynamic"),
    [(False, True, None), (False, False, True), (True, True, None), (True, False, True)],
)
def test_a_region_whose_backward_was_compiled_to_run_once(
    looped: bool, read: bool, dynamic: bool | None
) -> None:
    """By a plain step before. It runs again and again, and then in the user's own pass."""
    model: nn.Module = _Reused(read=read)
    model = nn.Sequential(model, nn.BatchNorm1d(3)) if looped else model

    def values(call: Callable[[Tensor], Tensor]) -> Tensor:
        return call(FLAT).square().sum(1)

    truth = naive.norms(naive.loop_grads(values(model), model))
    compiled = torch.compile(model, dynamic=dynamic)
    values(compiled).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    kept = values(compiled)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        for _ in range(2):
            norms = pergrad.norms(kept, model, retain_graph=True, on_mixing="exact")
            assert_agrees(norms, truth, truth, 5e-6)
    kept.sum().backward()
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name]), name


def test_what_a_region_saved_keeps_its_place_in_memory() -> None:
    """Part of a tensor, with gaps: compiled code checks its strides."""
    one, two = nn.Linear(8, 6), nn.Linear(6, 3)
    model = nn.Sequential(one, two)

    def forward(x: Tensor) -> Tensor:
        x = one(x).tanh()
        x = torch.zeros_like(x).index_add(0, torch.tensor([3, 1, 0, 2]), x)
        return two((x * 2)[:, 0])

    truth = naive.norms(naive.loop_grads(losses(forward, ROWS), model))
    values = losses(torch.compile(forward), ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        assert_agrees(pergrad.norms(values, model, retain_graph=True), truth, truth, 5e-6)
    for x in (torch.randn(3, 17, 16)[:, 0], torch.randn(4, 1, 5).expand(4, 6, 5)[:, :, 1:],
              torch.randn(5, 4).t(), torch.tensor(2.0), torch.randn(0, 3)):  # fmt: skip
        copy = nodes_of_regions._copied(x)
        assert torch.equal(copy, x)
        assert copy.stride() == x.stride()
        assert copy.numel() == 0 or copy.data_ptr() != x.data_ptr()


def test_losses_whose_backward_was_compiled_to_run_once() -> None:
    """The region has no parameters, and lies between the losses and what has to be measured."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    order = torch.tensor([3, 1, 0, 2, 4])

    @torch.compile
    def each(x: Tensor) -> Tensor:
        x = torch.zeros_like(x).index_add(0, order, x)
        return (x.sigmoid() * 2).square().sum(1)

    truth = naive.norms(naive.loop_grads(each(model(FLAT)), model))
    torch.compiler.reset()
    each(model(FLAT)).sum().backward()
    kept = each(model(FLAT))
    for _ in range(2):
        assert_agrees(pergrad.norms(kept, model, retain_graph=True), truth, truth, 5e-6)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how:UserWarning")
def test_a_collection_in_the_middle_of_a_forward_that_is_compiled() -> None:
    """Python calls pergrad then; torch traced that, and the process died now and then."""
    from torch._dynamo.convert_frame import register_bytecode_hook

    model = nn.Linear(8, 3)
    pergrad.norms(model(FLAT).square().sum(1), model)  # from here on collections are looked at
    compiled_files = []
    handle = register_bytecode_hook(lambda old, new: compiled_files.append(old.co_filename))

    def forward(x: Tensor) -> Tensor:
        x = model(x)
        torch._dynamo.graph_break()
        gc.collect()
        return x.square().sum(1)

    try:
        values = torch.compile(forward, backend="aot_eager")(FLAT)
    finally:
        handle.remove()
    assert __file__ in compiled_files
    package = str(Path(pergrad.__file__).parent)
    assert not [name for name in compiled_files if name.startswith(package)]
    truth = naive.norms(naive.loop_grads(values, model))
    assert_agrees(pergrad.norms(values, model), truth, truth, 5e-6)


def test_a_torch_that_runs_regions_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = made("perceptron", torch.float64)
    values = losses(torch.compile(model, backend="aot_eager"), data)
    node = values.grad_fn
    while not nodes.is_compiled(node):
        node = node.next_functions[0][0]
    monkeypatch.delattr(nodes.region_class(node), "metadata")
    with pytest.raises(pergrad.UnsupportedError, match=r"set_stance\(\"force_eager\"\)"):
        pergrad.norms(values, model)


def test_a_freed_region() -> None:
    model, data = made("perceptron", torch.float64)
    values = losses(torch.compile(model, backend="aot_eager"), data)
    values.sum().backward()
    with pytest.raises(pergrad.UsageError, match="retain_graph=True"):
        pergrad.norms(values, model)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_step_before_and_after(backend: str) -> None:
    """The user's own backward gets the same gradients, whether pergrad came by or not."""
    model, data = made("regions", torch.float64)
    compiled = torch.compile(model, backend=backend)
    losses(compiled, data).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    truth = naive.norms(naive.loop_grads(losses(model, data), model))
    model.zero_grad()
    values = losses(compiled, data)
    torch.testing.assert_close(pergrad.norms(values, model, retain_graph=True), truth)
    values.sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, before[name])


def test_a_derivative_through_a_compiled_region() -> None:
    """torch has a node there that refuses; it is no region that could be read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    compiled = torch.compile(model, backend="aot_eager")

    def slopes() -> Tensor:
        x = FLAT.double().requires_grad_()
        (slope,) = torch.autograd.grad(compiled(x).sum(), x, create_graph=True)
        return slope.square().sum(1)

    with pytest.raises(RuntimeError, match="double backward"):
        slopes().sum().backward()
    with pytest.raises(pergrad.UnsupportedError, match=r"set_stance\(\"force_eager\"\)"):
        pergrad.norms(slopes(), model)
    with torch.compiler.set_stance("force_eager"):
        truth = naive.norms(naive.loop_grads(slopes(), model))
        torch.testing.assert_close(pergrad.norms(slopes(), model), truth)


def test_a_region_called_within_a_pass_sees_torchs_settings() -> None:
    """It is run in a thread of its own, and a thread begins without the caller's settings."""
    import torch._functorch.config as config

    x, seen = torch.ones(2, requires_grad=True), []
    y = 2 * x
    y.register_hook(lambda g: seen.append(nodes.outside_pass(lambda: config.donated_buffer)))
    for value in (False, True):
        with config.patch(donated_buffer=value):
            y.sum().backward(retain_graph=True)
        assert seen[-1] is value
