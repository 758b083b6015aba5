"""Nothing changes on the user's side: hooks, .grad, generators, modules, modes."""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
import zoo
from helpers import assert_agrees, assert_rows_agree
from torch import Tensor, nn

import pergrad
from pergrad.engine import user_state

B = 4
VERBS: dict[str, Callable] = {
    "norms": pergrad.norms,
    "norms_by_parameter": pergrad.norms_by_parameter,
    "gram": pergrad.gram,
    "dots": lambda losses, params, **more: pergrad.dots(
        losses, params, against=[p.detach() for p in naive.named(params).values()], **more
    ),
    "gradients": lambda losses, params, **more: pergrad.gradients(losses, params, **more).gram(),
    "backward": pergrad.backward,
    "backward_clipped": lambda losses, params, **more: pergrad.backward(
        losses, params, weights=pergrad.clip(0.1), **more
    ),
    "explain": pergrad.explain,
    "check": pergrad.check,
}
WITHOUT_BACKWARD = {n: v for n, v in VERBS.items() if not n.startswith("backward")}
EACH_VERB = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
EACH_BUT_BACKWARD = pytest.mark.parametrize("verb", WITHOUT_BACKWARD.values(), ids=WITHOUT_BACKWARD)
CHECKS = pytest.mark.parametrize("check_layout", ["once", "always"])


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    with zoo.settled(0), warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


class Opaque(torch.autograd.Function):
    """Of unknown structure, so that what lies below it has to be measured."""

    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return g.clone()


class Weighted(torch.autograd.Function):
    """Served by the fallback."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum((0, 1))


class Model(nn.Module):
    """Rules, a computed weight, an opaque op, a lookup by data, and the fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 4)
        self.a = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.norm, self.w = nn.LayerNorm(4), nn.Parameter(torch.randn(4))
        self.b = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        seen = [self.emb(ids)]
        seen.append(self.a(seen[-1]).tanh())
        seen.append(Opaque.apply(seen[-1]))
        seen.append(Weighted.apply(seen[-1], self.w))
        seen.append(self.norm(seen[-1])[:, [2, 0, 1]])
        seen.append(self.b(seen[-1]))
        seen.append(seen[-1].square().sum((1, 2)))
        return seen[-1], seen


def passed() -> tuple[Model, Tensor, list[Tensor]]:
    model = Model()
    losses, seen = model(torch.randint(6, (B, 3)))
    return model, losses, seen


# -- hooks of the user -----------------------------------------------------------------------------


@EACH_VERB
@CHECKS
def test_hooks_never_see_a_made_up_gradient(verb: Callable, check_layout: str) -> None:
    """Only the gradient of losses.sum(), or of one losses[b] (from `check`)."""
    model, losses, seen = passed()
    watched = [*seen, *model.parameters()]
    real: list[list[Tensor]] = []
    for out in [losses.sum(), *losses]:
        grads = torch.autograd.grad(out, watched, retain_graph=True, allow_unused=True)
        real.append(
            [torch.zeros_like(t) if g is None else g for t, g in zip(watched, grads, strict=True)]
        )
    strange: list[str] = []

    def watch(k: int) -> Callable[[Tensor], None]:
        def hook(g: Tensor) -> None:
            if not any(torch.allclose(g, row[k], rtol=1e-12, atol=1e-14) for row in real):
                strange.append(f"tensor {k} saw {g}")

        return hook

    for k, t in enumerate(watched):
        t.register_hook(watch(k))
    verb(losses, model, check_layout=check_layout, retain_graph=True)
    assert not strange


@EACH_VERB
def test_hooks_on_nodes_and_modules_never_see_a_made_up_gradient(verb: Callable) -> None:
    model = Model()
    ids = torch.randint(6, (B, 3))
    saw: list[Tensor] = []
    model.b.register_full_backward_hook(lambda m, g_in, g_out: saw.append(g_out[0].clone()))
    losses, seen = model(ids)
    seen[1].grad_fn.register_hook(lambda g_in, g_out: saw.append(g_out[0].clone()))
    seen[3].grad_fn.register_prehook(lambda g_out: saw.append(g_out[0].clone()))
    real = []
    for out in [losses.sum(), *losses]:
        real += torch.autograd.grad(out, [seen[5], seen[1], seen[3]], retain_graph=True)
    saw.clear()
    verb(losses, model, check_layout="always", retain_graph=True)
    for g in saw:
        assert any(g.shape == r.shape and torch.allclose(g, r, rtol=1e-12) for r in real)


def test_hooks_that_change_the_gradient_count() -> None:
    """A hook that clamps or scales belongs to the user's function: the loop runs it too."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    h = model[0](torch.randn(B, 3, 4))
    h.register_hook(lambda g: g * 0.5)
    losses = model[2](model[1](h)).square().sum((1, 2))
    norms = naive.norms(naive.loop_grads(losses, model))
    assert_agrees(pergrad.norms(losses, model), norms, norms)


# -- .grad -----------------------------------------------------------------------------------------


@EACH_BUT_BACKWARD
@CHECKS
def test_grad_is_untouched(verb: Callable, check_layout: str) -> None:
    model, losses, _ = passed()
    losses.sum().backward(retain_graph=True)
    before = {n: (p.grad, p.grad.clone(), p.grad._version) for n, p in model.named_parameters()}
    verb(losses, model, check_layout=check_layout, retain_graph=True)
    for n, p in model.named_parameters():
        same, value, version = before[n]
        assert p.grad is same
        assert torch.equal(p.grad, value)
        assert p.grad._version == version
    model.zero_grad(set_to_none=True)
    verb(losses, model, check_layout=check_layout)
    assert all(p.grad is None for p in model.parameters())


@EACH_VERB
@CHECKS
def test_retained_grad_is_untouched(verb: Callable, check_layout: str) -> None:
    for filled in (False, True):
        model, losses, seen = passed()
        for t in seen:
            t.retain_grad()
        if filled:
            losses.sum().backward(retain_graph=True)
        before = [None if t.grad is None else t.grad.clone() for t in seen]
        verb(losses, model, check_layout=check_layout)
        for t, value in zip(seen, before, strict=True):
            assert (t.grad is None) == (value is None)
            assert value is None or torch.equal(t.grad, value)
        assert all(t.retains_grad or t.is_leaf for t in seen)


@pytest.mark.parametrize("case", zoo.CASES.values(), ids=zoo.CASES)
@pytest.mark.parametrize("verb", ["norms", "gradients", "backward_clipped"])
def test_torch_records_nothing_that_a_verb_does(case: zoo.Case, verb: str) -> None:
    run = case.run(3)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        VERBS[verb](run.losses, run.params, **case.options)
    assert not saved


def test_backward_touches_only_what_it_was_asked_for() -> None:
    model, losses, _ = passed()
    inputs = torch.randn(3, requires_grad=True)
    pergrad.backward(losses + inputs.sum(), {"w": model.w})
    assert model.w.grad is not None
    assert inputs.grad is None
    assert all(p.grad is None for p in model.parameters() if p is not model.w)


def test_backward_is_plain_backward() -> None:
    """Where .grad exists it is added to in place, as by torch; where not, it is made."""
    model, losses, _ = passed()
    losses.sum().backward(retain_graph=True)
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    kept = model.w.grad
    pergrad.backward(losses, model, retain_graph=True)
    assert model.w.grad is kept
    model.emb.weight.grad = None
    pergrad.backward(losses, model)
    for n, p in model.named_parameters():
        times = 1 if n == "emb.weight" else 3
        assert_agrees(p.grad, times * want[n], want[n].norm(), what=n)
        assert not p.grad.requires_grad


# -- generators, modules, modes --------------------------------------------------------------------


DRAWING = [
    "dropout", "checkpointed_dropout", "multihead_batch_first", "lstm", "mixture_of_experts",
    "custom_with_weight", "encoder_layer_with_dropout",
]  # fmt: skip


@EACH_VERB
@CHECKS
@pytest.mark.parametrize("name", DRAWING)
def test_generator_is_untouched(verb: Callable, check_layout: str, name: str) -> None:
    run = zoo.CASES[name].run(3)
    before = torch.get_rng_state()
    verb(run.losses, run.params, check_layout=check_layout)
    assert torch.equal(torch.get_rng_state(), before)


def surroundings(model: nn.Module) -> dict:
    """All that can be attached to modules and parameters, and torch's settings."""
    found: dict = {}
    for name, module in model.named_modules():
        found[name, "module"] = {
            k: (dict(v) if isinstance(v, dict) else v) for k, v in vars(module).items()
        }
    for name, p in model.named_parameters():
        hooks = dict(p._backward_hooks or {})
        post = dict(getattr(p, "_post_accumulate_grad_hooks", None) or {})
        found[name, "parameter"] = (id(p), p.data_ptr(), p.requires_grad, p._version, hooks, post,
                                    dict(p.__dict__))  # fmt: skip
    found["settings"] = (
        torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled(),
        torch.get_num_threads(), torch.is_anomaly_enabled(), torch.is_autocast_enabled(),
        torch.are_deterministic_algorithms_enabled(), torch.is_autocast_cache_enabled(),
    )  # fmt: skip
    return found


@EACH_BUT_BACKWARD
def test_nothing_is_left_on_the_model(verb: Callable) -> None:
    model = Model().train()
    before = surroundings(model)
    for _ in range(2):
        verb(model(torch.randint(6, (B, 3)))[0], model)
    assert surroundings(model) == before


@EACH_VERB
def test_nothing_is_left_on_the_graph(verb: Callable) -> None:
    """A second backward pass through the same graph does what it did before."""
    model, losses, seen = passed()
    before = torch.autograd.grad(losses.sum(), [*seen, *model.parameters()], retain_graph=True)
    verb(losses, model, retain_graph=True)
    after = torch.autograd.grad(losses.sum(), [*seen, *model.parameters()], retain_graph=True)
    for one, two in zip(before, after, strict=True):
        assert torch.equal(one, two)
    assert not any(t._backward_hooks for t in seen)


@EACH_VERB
def test_after_an_exception(verb: Callable) -> None:
    """A hook of the user's raises in the middle of the pass."""
    model, losses, seen = passed()
    want = torch.autograd.grad(losses.sum(), list(model.parameters()), retain_graph=True)
    for t in seen:
        t.retain_grad()
    before, state = surroundings(model), torch.get_rng_state()

    class OurOwnError(Exception):
        pass

    def fail(g: Tensor) -> None:
        raise OurOwnError

    handle = seen[2].register_hook(fail)
    with pytest.raises(OurOwnError):
        verb(losses, model, retain_graph=True)
    handle.remove()
    assert surroundings(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(t.grad is None for t in seen)
    assert all(p.grad is None for p in model.parameters())
    after = torch.autograd.grad(losses.sum(), list(model.parameters()), retain_graph=True)
    for one, two in zip(want, after, strict=True):
        assert torch.equal(one, two)
    norms = naive.norms(naive.loop_grads(losses, model))
    assert_agrees(pergrad.norms(losses, model), norms, norms)


def test_after_a_refusal() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    losses = model(torch.randn(B, 4)).square().sum(1)
    before = surroundings(model)
    with pytest.raises(pergrad.MixedExamplesError):
        pergrad.norms(losses, model)
    assert surroundings(model) == before
    G = naive.loop_grads(losses, model)  # the graph is whole
    norms = naive.norms(G)
    assert_agrees(pergrad.norms(losses, model, on_mixing="exact"), norms, norms)


def test_running_statistics_are_untouched() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    losses = model(torch.randn(B, 4)).square().sum(1)
    before = {n: b.clone() for n, b in model.named_buffers()}
    pergrad.norms(losses, model, on_mixing="exact")
    for n, b in model.named_buffers():
        assert torch.equal(b, before[n])


def test_the_graph_is_not_kept_alive() -> None:
    """Neither plans nor matrices hold the losses' graph, or the model."""
    model, losses, seen = passed()
    J = pergrad.gradients(losses, model)
    gone = [weakref.ref(t) for t in (losses, model, model.b.weight)]
    nodes = [weakref.ref(seen[2].grad_fn)]
    del model, losses, seen
    gc.collect()
    assert all(ref() is None for ref in gone + nodes)
    assert J.norms().shape == (B,)


# -- retain_graph, grad mode, dtype ----------------------------------------------------------------


@EACH_VERB
def test_retain_graph(verb: Callable) -> None:
    """False frees what the pass used, as torch.autograd.grad does; True keeps it."""
    model, losses, _ = passed()
    verb(losses, model, retain_graph=True)
    verb(losses, model, retain_graph=True)
    losses.sum().backward()
    if verb not in (
        pergrad.explain,
        pergrad.check,
    ):  # these keep the graph, for the call they serve
        model, losses, _ = passed()
        verb(losses, model)
        with pytest.raises(
            pergrad.UsageError,
            match=r"freed(.|\n)*norms\(losses, model, retain_graph=True\)(.|\n)*pergrad\.backward",
        ):
            verb(losses, model)
        with pytest.raises(RuntimeError, match="second time"):
            losses.sum().backward()


def test_explain_and_check_keep_the_graph() -> None:
    """They come before the call that they are about."""
    model, losses, _ = passed()
    pergrad.explain(losses, model)
    pergrad.check(losses, model)
    pergrad.norms(losses, model)


@EACH_VERB
def test_under_no_grad(verb: Callable) -> None:
    """The graph was built with grad enabled; the call may be made without."""
    model, losses, _ = passed()
    with torch.no_grad():
        verb(losses, model)
        assert not torch.is_grad_enabled()


def test_results_need_no_grad() -> None:
    model, losses, _ = passed()
    options = {"retain_graph": True}
    assert not pergrad.norms(losses, model, **options).requires_grad
    assert not pergrad.gram(losses, model, **options).requires_grad
    J = pergrad.gradients(losses, model, **options)
    assert not J.norms().requires_grad
    assert not any(g.requires_grad for g in (J.T @ torch.ones(B)).values())
    assert not pergrad.backward(losses, model).requires_grad


def test_within_a_training_loop() -> None:
    """Scores before each step, and the steps are those of a run without scores."""

    def train(score: bool) -> list[Tensor]:
        with zoo.settled(1):
            model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 3))
            optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
            for _ in range(5):
                x, y = torch.randn(B, 4), torch.randint(3, (B,))
                losses = F.cross_entropy(model(x), y, reduction="none")
                if score:
                    pergrad.norms(losses, model, retain_graph=True)
                    pergrad.gradients(losses, model, retain_graph=True)
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
            return [p.detach() for p in model.parameters()]

    for with_scores, without in zip(train(True), train(False), strict=True):
        assert torch.equal(with_scores, without)


def test_from_another_thread() -> None:
    from concurrent.futures import ThreadPoolExecutor

    def work(seed: int) -> None:
        run = zoo.CASES["transformer_block"].build(3)
        params, forward, data = run
        losses = forward(*data)
        norms = naive.norms(naive.loop_grads(losses, params))
        assert_agrees(pergrad.norms(losses, params), norms, norms)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))


def test_within_a_hook_of_a_backward_pass() -> None:
    """Called while another backward pass runs."""
    model, losses, _ = passed()
    norms = naive.norms(naive.loop_grads(losses, model))
    x = torch.ones(2, requires_grad=True)
    found: list[Tensor] = []
    y = x * 2
    y.register_hook(lambda g: found.append(pergrad.norms(losses, model)))
    y.sum().backward()
    assert_agrees(found[0], norms, norms)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_pass_that_a_hook_runs_is_not_taken_for_ours(create_graph: bool) -> None:
    torch.manual_seed(0)
    first, last = nn.Linear(4, 4), nn.Linear(4, 3)
    model, x = nn.ModuleList([first, last]), torch.randn(5, 4)
    passes = []

    def losses() -> Tensor:
        h = torch.tanh(first(x))
        out = last(h)
        penalty, y = out.sin().sum(), out.square()

        def hook(g: Tensor) -> None:  # before the pass has come to `last`
            passes.append(torch.autograd.grad(penalty, h, retain_graph=True)[0])

        y.register_hook(hook)
        return y.sum(1)

    want = naive.loop_grads(losses(), model)
    norms = naive.norms(want)
    options = {"create_graph": create_graph}
    passes.clear()
    assert_agrees(pergrad.norms(losses(), model, **options).detach(), norms, norms, 1e-5)
    assert len(passes) == 1
    gram = pergrad.gram(losses(), model, **options).detach()
    assert_agrees(gram, naive.gram(want), norms[:, None] * norms, 1e-5)
    J = pergrad.gradients(losses(), model, **options)
    assert_rows_agree(J.detach().dense(), want, norms=norms, tolerance=1e-5)


# -- tensors that retain their gradient, wherever the collector has them --------------------------


def passes(h: Tensor, losses: Tensor, model: nn.Module) -> None:
    """h.grad stays what it is."""
    before = h.grad if h.retains_grad else None
    pergrad.norms(losses, model, retain_graph=True)
    assert not h.retains_grad or h.grad is before


@pytest.mark.parametrize("generation", [0, 1, 2])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_old_tensors_that_retain_their_gradient(known: bool, late: bool, generation: int) -> None:
    """Old for Python's collector before or after pergrad looked; retained before or after that."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    user_state._old.stop()
    if known:
        pergrad.norms(model(torch.randn(2, 3)).squeeze(1), model)
    h = model[:2](torch.randn(2, 3))
    losses = model[2](h).squeeze(1)
    if not late:
        h.retain_grad()
    gc.collect(generation)
    passes(h, losses, model)
    if late:
        h.retain_grad()
    passes(h, losses, model)
    gc.collect(generation)
    gc.collect(generation)
    passes(h, losses, model)
    losses.sum().backward(retain_graph=True)
    assert h.grad is not None
    passes(h, losses, model)


class Wilful(Tensor):
    """A tensor of another class, at whose gradient nobody may look once it is closed."""

    closed = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if cls.closed and getattr(func, "__self__", None) in (Tensor.retains_grad, Tensor.grad):
            raise RuntimeError("Do not look at me.")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("generation", [None, 0, 2])
@pytest.mark.parametrize("cls", [Wilful, type("Plain", (Tensor,), {})])
def test_tensors_of_other_classes_that_retain_their_gradient(
    cls: type, generation: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    h = model[:2](torch.randn(2, 3).as_subclass(cls))
    assert type(h) is cls
    h.retain_grad()
    losses = model[2](h).squeeze(1).as_subclass(Tensor)
    if generation is not None:
        gc.collect(generation)
    monkeypatch.setattr(cls, "closed", True, raising=False)
    pergrad.norms(losses, model)
    with torch._C.DisableTorchFunctionSubclass():
        assert h.retains_grad
        assert h.grad is None


class NoHash(type):
    """The class of classes that can be compared, and so have no hash."""

    def __eq__(cls, other: object) -> bool:
        return cls is other


@pytest.mark.parametrize("generation", [None, 0, 2])
def test_retained_tensors_beside_objects_whose_class_has_no_hash(generation: int | None) -> None:
    user_state._old.stop()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    other = NoHash("Other", (), {})()
    with pytest.raises(TypeError, match="unhashable"):
        {type(other)}
    h = model[:2](torch.randn(2, 3).as_subclass(Wilful))
    h.retain_grad()
    losses = model[2](h).squeeze(1).as_subclass(Tensor)
    if generation is not None:
        gc.collect(generation)
    for _ in range(2):
        passes(h, losses, model)


class Kind(Tensor):
    """As DTensor, a class of tensors, in which parameters come, too."""


@pytest.mark.parametrize("generation", [0, 1, 2])
def test_parameters_can_be_moved_whatever_was_collected(generation: int) -> None:
    """torch swaps those of other classes, and does not if anybody has a weak reference."""
    user_state._old.stop()
    model = nn.Linear(3, 1)
    pergrad.norms(model(torch.randn(2, 3)).squeeze(1), model)
    sharded = nn.Linear(3, 1)
    sharded.weight = nn.Parameter(torch.randn(1, 3).as_subclass(Kind))
    assert type(sharded.weight) is Kind
    gc.collect(generation)
    pergrad.norms(model(torch.randn(2, 3)).squeeze(1), model)
    assert weakref.getweakrefs(sharded.weight) == []
    torch.utils.swap_tensors(sharded.weight, nn.Parameter(torch.randn(1, 3).as_subclass(Kind)))


def test_all_objects_are_looked_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 1)
    user_state._old.stop()
    searched: list[int] = []
    objects = gc.get_objects

    def counted(generation: int) -> list:
        searched.append(generation)
        return objects(generation)

    monkeypatch.setattr(gc, "get_objects", counted)
    for _ in range(4):
        pergrad.norms(model(torch.randn(2, 3)).squeeze(1), model)
        gc.collect(1)
    assert searched.count(2) == 1


@pytest.mark.parametrize("watching", [False, True])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_tensors_that_age_during_the_search(
    after: int, watching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search makes objects itself, and so may start a collection."""
    model = nn.Linear(3, 1)
    user_state._old.stop()
    if watching:
        pergrad.norms(model(torch.randn(2, 3)).squeeze(1), model)
    h = model(torch.randn(2, 3))
    h.retain_grad()
    objects = gc.get_objects

    def then_collected(generation: int) -> list:
        found = objects(generation)
        if generation == after:
            monkeypatch.setattr(gc, "get_objects", objects)
            gc.collect(1)
        return found

    monkeypatch.setattr(gc, "get_objects", then_collected)
    passes(h, h.squeeze(1), model)


def test_the_collector_is_left_alone_when_nobody_asks() -> None:
    model = nn.Linear(3, 1)
    count = len(gc.callbacks)
    pergrad.norms(model(torch.randn(2, 3)).squeeze(1), model)
    user_state._old.stop()
    without = len(gc.callbacks)
    pergrad.norms(model(torch.randn(2, 3)).squeeze(1), model)
    assert len(gc.callbacks) == without + 1
    for _ in range(user_state._PATIENCE + 1):
        gc.collect(0)
    assert len(gc.callbacks) == without + 1  # the youngest are collected all the time
    for _ in range(user_state._PATIENCE + 1):
        gc.collect(1)
    assert len(gc.callbacks) == without <= count
    h = model(torch.randn(2, 3))
    h.retain_grad()
    gc.collect()
    passes(h, h.squeeze(1), model)


def test_new_objects_do_not_pile_up_where_old_ones_are_freed() -> None:
    model = nn.Linear(3, 1)
    threshold = gc.get_threshold()[0]
    old: list[list] = [[] for _ in range(10 * threshold)]
    gc.collect()
    kept = []
    while old:  # each that is freed lowers Python's count of new ones by one
        kept.append([old.pop()])
        kept[-1].clear()
    assert len(gc.get_objects(0)) > 5 * threshold
    h = model(torch.randn(2, 3))
    h.retain_grad()
    passes(h, h.squeeze(1), model)
    assert len(gc.get_objects(0)) < 2 * threshold
    passes(h, h.squeeze(1), model)  # it is an old one now


def test_a_collector_that_is_disabled_stays_so() -> None:
    model = nn.Linear(3, 1)
    gc.disable()
    try:
        kept: list[list] = [[] for _ in range(3 * gc.get_threshold()[0])]
        pergrad.norms(model(torch.randn(2, 3)).squeeze(1), model)
        assert len(gc.get_objects(0)) > len(kept)
    finally:
        gc.enable()


def test_dead_tensors_are_not_remembered() -> None:
    model = nn.Linear(3, 1)
    made = []  # a tensor has one weak reference: these are the remembered ones themselves
    for _ in range(5):
        losses = model(torch.randn(2, 3)).squeeze(1)
        made.append(weakref.ref(losses))
        gc.collect(1)
        pergrad.norms(losses, model)
    assert any(ref is made[-1] for ref in user_state._old._known)
    del losses
    gc.collect()
    assert all(ref() is None for ref in made)
    assert {id(ref) for ref in made}.isdisjoint(map(id, user_state._old._known))
