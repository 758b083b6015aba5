"""Hooks of the user's count as in the loop over examples, or an error names them."""

import functools
import gc
import warnings
from collections.abc import Callable, Iterator

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees, assert_rows_agree
from torch import Tensor, nn

import pergrad
from pergrad.engine import user_state

B = 4
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        warnings.simplefilter("ignore", FutureWarning)  # of torch, about old hooks on modules
        yield


# -- what a hook does ------------------------------------------------------------------------------


def halve(g: Tensor) -> Tensor:
    return 0.5 * g


def mask(g: Tensor) -> Tensor:
    return g * (torch.arange(g.numel()) % 3 > 0).reshape(g.shape)


def clip_by_its_norm(g: Tensor) -> Tensor:
    return g * (0.05 / g.norm()).clamp(max=1)


def unless_small(g: Tensor) -> Tensor | None:
    """Of the batch's gradient nothing is small, of some example's it is."""
    return None if g.norm() > 0.5 else torch.zeros_like(g)


def clamp(g: Tensor) -> Tensor:
    return g.clamp(-0.02, 0.02)


class Object:
    def __call__(self, g: Tensor) -> Tensor:
        return clip_by_its_norm(g)


class Bound:
    def hook(self, g: Tensor) -> Tensor:
        return clip_by_its_norm(g)


CHANGES: dict[str, Callable] = {
    "halve": halve,
    "mask": mask,
    "clip": clip_by_its_norm,
    "unless_small": unless_small,
    "clamp": clamp,
    "partial": functools.partial(torch.mul, torch.tensor(3.0)),
    "object": Object(),
    "method": Bound().hook,
    "builtin": torch.neg,
}
EACH_CHANGE = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


# -- where a hook may be ---------------------------------------------------------------------------


def on_every(values: tuple, change: Callable) -> tuple:
    changed = [None if g is None else change(g) for g in values]
    return tuple(g if c is None else c for g, c in zip(values, changed, strict=True))


class Net(nn.Module):
    """Two layers, the first with a computed weight; `place` says where the hook is."""

    def __init__(self, place: str, change: Callable) -> None:
        super().__init__()
        self.w, self.b, self.v = (nn.Parameter(torch.randn(s)) for s in ((6, 5), (6,), (6, 6)))
        self.last = nn.Linear(6, 3)
        self.place, self.change = place, change
        each = functools.partial(on_every, change=change)
        if place == "module, old":
            self.last.register_backward_hook(lambda m, g_in, g_out: each(g_in))
        if place == "module":
            self.last.register_full_backward_hook(lambda m, g_in, g_out: each(g_in))
        if place == "module, before":
            self.last.register_full_backward_pre_hook(lambda m, g_out: each(g_out))
        if place == "leaf":
            self.v.register_hook(change)

    def at(self, place: str, x: Tensor) -> Tensor:
        each = functools.partial(on_every, change=self.change)
        if self.place == place:
            x.register_hook(self.change)
        if self.place == place + ", node before":
            x.grad_fn.register_prehook(each)
        if self.place == place + ", node after":
            x.grad_fn.register_hook(lambda g_in, g_out: each(g_in))
        return x

    def forward(self, x: Tensor) -> Tensor:
        weight = self.at("transposed", self.w.t())
        weight = self.at("computed", self.at("cut", weight[:, :6]).sin())
        h = self.at("activation", torch.tanh(self.at("product", torch.addmm(self.b, x, weight))))
        h = self.at("parts", h.view(-1, 2, 6).unbind(1)[1]) + h.view(-1, 2, 6)[:, 0]
        h = h @ self.at("view", self.v.view(36)).view(6, 6).t()
        return self.last(self.at("shared", h)).square().sum(1)


PLACES = [
    "leaf", "module, old", "module", "module, before",
    *(f"{at}{how}" for how in ("", ", node before", ", node after")
      for at in ("transposed", "cut", "computed", "product", "activation", "parts", "view",
                 "shared")),
]  # fmt: skip
VERBS: dict[str, Callable] = {
    "norms": lambda losses, model, want, **more: assert_agrees(
        pergrad.norms(losses, model, **more).detach(), naive.norms(want), naive.norms(want), 1e-4
    ),
    "exact": lambda losses, model, want, **more: VERBS["norms"](
        losses, model, want, on_mixing="exact", **more
    ),
    "differentiable": lambda losses, model, want, **more: VERBS["norms"](
        losses, model, want, create_graph=True, **more
    ),
    "gradients": lambda losses, model, want, **more: assert_rows_agree(
        pergrad.gradients(losses, model, **more).dense(),
        want, norms=naive.norms(want), tolerance=1e-4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@DTYPES
def test_the_loop_s_number(dtype: torch.dtype, place: str) -> None:
    for change in CHANGES.values():
        model, x = Net(place, change).to(dtype), torch.randn(2 * B, 5, dtype=dtype)
        want = naive.loop_grads(model(x), model)
        for verb in VERBS.values() if change is clip_by_its_norm else [VERBS["norms"]]:
            verb(model(x), model, want)


@pytest.mark.parametrize("place", ["product", "activation, node before", "transposed", "module"])
def test_every_verb(place: str) -> None:
    model, x = Net(place, clip_by_its_norm).double(), torch.randn(2 * B, 5).double()
    want = naive.loop_grads(model(x), model)
    norms = naive.norms(want)
    gram = pergrad.gram(model(x), model)
    assert_agrees(gram, naive.gram(want), norms[:, None] * norms)
    assert pergrad.check(model(x), model, examples=B).ok
    pergrad.backward(model(x), model, weights=torch.arange(float(B)).double())
    for name, p in model.named_parameters():
        total = torch.tensordot(torch.arange(float(B)).double(), want[name], 1)
        assert_agrees(p.grad, total, 6 * norms.max())


# -- where examples meet, or the place is unusual --------------------------------------------------


def test_a_tensor_that_is_no_leaf_and_asked_for() -> None:
    for change in CHANGES.values():
        v = nn.Parameter(torch.randn(6, 5).double())
        w = v.tanh()
        w.register_hook(change)
        x = torch.randn(B, 5).double()
        want = naive.loop_grads(F.linear(x, w).square().sum(1), [w])
        norms = naive.norms(want)
        assert_agrees(pergrad.norms(F.linear(x, w).square().sum(1), [w]), norms, norms)


@EACH_CHANGE
@pytest.mark.parametrize("at", [0, 1, 2])
def test_examples_that_interact_on_request(change: Callable, at: int) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    x = torch.randn(B, 5).double()

    def losses() -> Tensor:
        h = x
        for k, layer in enumerate(model):
            h = layer(h)
            if k == at:
                h.register_hook(change)
        return h.square().sum(1)

    want = naive.loop_grads(losses(), model)
    norms = naive.norms(want)
    assert_agrees(pergrad.norms(losses(), model, on_mixing="exact"), norms, norms)
    with pytest.raises(pergrad.MixedExamplesError):
        pergrad.norms(losses(), model)


def test_a_tensor_changed_in_place_after_its_hook() -> None:
    """The hook stays with the tensor as it was, and the tensor has another node since."""
    layer, x = nn.Linear(5, 6).double(), torch.randn(B, 5).double()

    def losses() -> Tensor:
        h = layer(x)
        h.register_hook(clip_by_its_norm)
        h.mul_(3)
        return (h * torch.arange(6.0)).sum(1)

    norms = naive.norms(naive.loop_grads(losses(), layer))
    assert_agrees(pergrad.norms(losses(), layer), norms, norms)


def test_one_of_several_outputs() -> None:
    layer, x = nn.Linear(5, 6).double(), torch.randn(B, 5).double()

    def losses() -> Tensor:
        one, two, three = layer(x).split(2, dim=1)
        two.register_hook(clip_by_its_norm)
        return one.sum(1) + three.square().sum(1) + two.sin().sum(1)

    norms = naive.norms(naive.loop_grads(losses(), layer))
    assert_agrees(pergrad.norms(losses(), layer), norms, norms)


def test_two_graphs_at_once() -> None:
    """The hooks of another graph are left alone until it is that graph's turn."""
    net = Net("product", clip_by_its_norm).double()
    x, z = torch.randn(2, 2 * B, 5).double().unbind()
    first, second = net(x), net(z)
    for losses, data in ((second, z), (first, x)):
        norms = naive.norms(naive.loop_grads(net(data), net))
        assert_agrees(pergrad.norms(losses, net), norms, norms)


def test_hooks_registered_after_a_first_call() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    h = net[0](torch.randn(B, 5).double())
    losses = net[2](net[1](h)).square().sum(1)
    pergrad.norms(losses, net, retain_graph=True)
    handle = h.register_hook(halve)
    norms = naive.norms(naive.loop_grads(losses, net))
    assert_agrees(pergrad.norms(losses, net, retain_graph=True), norms, norms)
    handle.remove()
    pergrad.norms(losses, net, retain_graph=True)
    h.register_hook(clip_by_its_norm)
    norms = naive.norms(naive.loop_grads(losses, net))
    assert_agrees(pergrad.norms(losses, net), norms, norms)


# -- how often, and with what ----------------------------------------------------------------------


@pytest.mark.parametrize("verb", [pergrad.norms, pergrad.gram, pergrad.backward])
def test_a_hook_that_returns_nothing_sees_the_batch_once(verb: Callable) -> None:
    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(B, 5)
    seen: dict[str, Tensor] = {}
    calls: list[Tensor] = []

    def remember(g: Tensor) -> None:
        seen["h"] = g
        calls.append(g)

    h = net[0](x)
    h.register_hook(remember)
    h.register_hook(calls.append)
    losses = net[2](net[1](h)).square().sum(1)
    (want,) = torch.autograd.grad(losses.sum(), h, retain_graph=True)
    calls.clear()
    verb(losses, net)
    assert len(calls) == 2
    assert torch.allclose(seen["h"], want)


def test_a_hook_that_returns_something_sees_every_example_once() -> None:
    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(B, 5)
    seen: list[Tensor] = []

    def watch(g: Tensor) -> Tensor:
        seen.append(g.clone())
        return g

    h = net[0](x)
    h.register_hook(watch)
    losses = net[2](net[1](h)).square().sum(1)
    for loss in losses:
        torch.autograd.grad(loss, h, retain_graph=True)
    want = seen.copy()
    seen.clear()
    pergrad.norms(losses, net)
    assert len(seen) == B
    assert all(torch.allclose(g, w) for g, w in zip(seen, want, strict=True))


@pytest.mark.parametrize("mode", ["all", "any"])
def test_a_hook_on_many_tensors(mode: str) -> None:
    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(B, 5)
    h = net[0](x)
    out = net[2](net[1](h))
    calls: list = []
    hook = torch.autograd.graph.register_multi_grad_hook((h, out), calls.append, mode=mode)
    losses = out.square().sum(1)
    want = torch.autograd.grad(losses.sum(), [h, out], retain_graph=True)
    norms = naive.norms(naive.loop_grads(losses, net))
    calls.clear()
    assert_agrees(pergrad.norms(losses, net), norms, norms, 1e-5)
    assert len(calls) == 1
    if mode == "all":
        assert all(torch.allclose(g, w) for g, w in zip(calls[0], want, strict=True))
    hook.remove()  # it holds the graph that holds it


@pytest.mark.parametrize("place", ["transposed", "cut", "computed", "view"])
@pytest.mark.parametrize("changing", [False, True])
def test_hooks_of_computed_weights_see_real_gradients_alone(place: str, changing: bool) -> None:
    seen: list[Tensor] = []

    def watch(g: Tensor) -> None:
        seen.append(g.clone())

    def same(g: Tensor) -> Tensor:
        seen.append(g.clone())
        return g

    net, x = Net(place, same if changing else watch).double(), torch.randn(2 * B, 5).double()
    naive.loop_grads(net(x), net)
    want = seen.copy()
    seen.clear()
    pergrad.gradients(net(x), net)
    # who looks on is not called: that gradient is not formed
    assert len(seen) == (B if changing else 0)
    assert all(torch.allclose(g, w) for g, w in zip(seen, want, strict=False))


def test_a_module_s_hook_that_looks_on_costs_no_loop() -> None:
    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(B, 5)
    calls: list[tuple] = []

    def look(module: nn.Module, g_in: tuple, g_out: tuple) -> None:
        calls.append(g_out)

    net[2].register_full_backward_hook(look)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pergrad.FallbackWarning)
        pergrad.norms(net(x).square().sum(1), net)
    assert len(calls) == 1
    assert calls[0][0].shape == (B, 3)


def test_the_loop_is_announced_with_the_hook_and_the_remedy() -> None:
    net = Net("transposed", clip_by_its_norm)
    match = r"clip_by_its_norm` \(test_hooks\.py:\d+\)(.|\n)*`w`(.|\n)*4 examples(.|\n)*remove it"
    with pytest.warns(pergrad.FallbackWarning, match=match):
        pergrad.norms(net(torch.randn(2 * B, 5)), net)
    rows = pergrad.explain(net(torch.randn(2 * B, 5)), net).rows
    assert [row.how for row in rows if row.parameter == "w"] == ["fallback"]


def test_the_loop_in_groups_of_parameters() -> None:
    net, x = Net("shared, node after", clip_by_its_norm).double(), torch.randn(2 * B, 5).double()
    norms = naive.norms(naive.loop_grads(net(x), net))
    assert_agrees(pergrad.norms(net(x), net, chunk_bytes=100), norms, norms)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("place", ["transposed", "module"])
def test_the_graph_is_freed_as_without_hooks(place: str, keep: bool) -> None:
    net, x = Net(place, halve), torch.randn(2 * B, 5)
    losses = net(x)
    pergrad.norms(losses, net, retain_graph=keep)
    if keep:
        losses.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="second time"):
            losses.sum().backward()


def test_hooks_are_as_before_afterwards() -> None:
    for place in PLACES:
        net, x = Net(place, clip_by_its_norm), torch.randn(2 * B, 5)
        losses = net(x)
        want = torch.autograd.grad(losses.sum(), list(net.parameters()), retain_graph=True)
        pergrad.norms(losses, net, retain_graph=True)
        after = torch.autograd.grad(losses.sum(), list(net.parameters()), retain_graph=True)
        assert all(map(torch.equal, after, want)), place


# -- refused ---------------------------------------------------------------------------------------


def test_a_hook_that_moves_other_examples() -> None:
    def shift(g: Tensor) -> Tensor:
        return g + 0.1

    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(B, 5)
    h = net[0](x)
    h.register_hook(shift)
    losses = net[2](net[1](h)).square().sum(1)
    match = r"shift` \(test_hooks.py:\d+\)(.|\n)*`0\.bias`|`0\.weight`(.|\n)*remove the hook"
    with pytest.raises(pergrad.UnsupportedError, match=match):
        pergrad.norms(losses, net)


def test_a_hook_that_changes_the_gradient_in_place() -> None:
    def scale(g: Tensor) -> None:
        g.mul_(0.5 / g.norm())

    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(B, 5)
    h = net[0](x)
    h.register_hook(scale)
    match = r"scale` \(test_hooks.py:\d+\)(.|\n)*in place(.|\n)*Return the new gradient"
    with pytest.raises(pergrad.UsageError, match=match):
        pergrad.norms(net[2](net[1](h)).square().sum(1), net)


# -- after accumulation ----------------------------------------------------------------------------


def test_an_optimizer_that_steps_in_the_backward_pass() -> None:
    def build(step: bool) -> nn.Sequential:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        net.calls = []
        for p in net.parameters():
            optimizer = torch.optim.SGD([p], 0.1)

            def hook(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                net.calls.append(id(p))
                optimizer.step()
                optimizer.zero_grad()

            if step:
                p.register_post_accumulate_grad_hook(hook)
        return net

    x = torch.randn(B, 5).double()
    plain, ours, still = build(True), build(True), build(False)
    plain(x).square().sum().backward()
    norms = pergrad.backward(ours(x).square().sum(1), ours)
    assert_agrees(norms, pergrad.norms(still(x).square().sum(1), still), norms)
    assert sorted(ours.calls) == sorted(id(p) for p in ours.parameters())
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        assert_agrees(q.detach(), p.detach(), p.detach().norm())
        assert q.grad is None


# -- what it costs where there are none ------------------------------------------------------------


def test_nobody_looks_where_no_hook_was_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(B, 5)
    net.register_forward_hook(lambda *_: None)  # is not on a graph
    gc.collect()  # the graphs of other tests
    pergrad.norms(net(x).square().sum(1), net)
    pergrad.norms(net(x).square().sum(1), net)
    looked: list = []
    monkeypatch.setattr(user_state, "_hook_dicts", lambda objects: looked.append(1) or [])
    pergrad.norms(net(x).square().sum(1), net)
    gc.collect(1)
    assert not looked
