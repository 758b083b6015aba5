"""Whatever comes, training is what it is without a watch: weights, optimizer and random state.

Every way to train, and every way in which a step can go wrong, runs twice, plain and watched.
"""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same, random_states
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pergrad


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "pergrad.watch")


def test_a_difference_is_noticed() -> None:
    """The comparison that all of these rest on."""
    nan = torch.tensor(float("nan"))
    assert_same([nan, {"a": (1, 2.0, float("nan"))}], [nan.clone(), {"a": (1, 2.0, float("nan"))}])
    assert_same(random_states(), random_states())
    one = torch.tensor([1.0, 0.0])
    for a, b in [
        (one, one + 1e-7), (one, one.double()), (one, torch.tensor([1.0, -0.0])), (one, one[:1]),
        ({"a": 1}, {"a": 1, "b": 2}), ({"a": 1}, {"a": 2}), ([1], [1, 2]), (1, 1.0),
    ]:  # fmt: skip
        with pytest.raises(AssertionError):
            assert_same(a, b)


class Unwatched:
    """Stands where a Watch would."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        return nullcontext()


class Text(nn.Module):
    """A small language model: a tied head, attention, dropout."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm, self.attend = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.drop, self.recompute = nn.Dropout(0.2), recompute

    def block(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.drop(self.attend(h, h, h, need_weights=False)[0])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return x @ self.table.weight.T


class Adapter(nn.Module):
    """A frozen table and head, and a change of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Text().requires_grad_(False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.inner.block(self.inner.table(ids))
        return (x + self.up(self.down(x))) @ self.inner.table.weight.T


def text_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def rows_loss(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), x[:, 0].gt(0).long())


class Loop:
    """A model, its optimizer, and everything that must not differ."""

    def __init__(self, watch: Any, model: nn.Module, scale: float | None = None) -> None:
        self.watch, self.model = watch, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        self.scaler = torch.amp.GradScaler(
            "cpu", enabled=scale is not None, init_scale=scale or 1.0, growth_interval=2
        )
        self.generator = torch.Generator().manual_seed(3)
        self.done = 0
        self.losses: list[Tensor] = []

    def ids(self, n: int = 4) -> Tensor:
        return torch.randint(11, (n, 6), generator=self.generator)

    def x(self, n: int = 6) -> Tensor:
        return torch.randn(n, 4, generator=self.generator)

    def backward(self, loss: Tensor, examples: int | None, **more: Any) -> None:
        with self.watch(loss, self.model, examples, step=self.done, **more):
            self.scaler.scale(loss).backward()
        self.losses.append(loss.detach())

    def step(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.done += 1

    def state(self) -> list[Any]:
        return [
            self.model.state_dict(), self.optimizer.state_dict(), self.scaler.state_dict(),
            [p.grad for p in self.model.parameters()], random_states(), self.losses,
        ]  # fmt: skip


Script = Callable[[Any], Loop]


def both(script: Script, folder: Path, **more: Any) -> pergrad.Watch:
    """Run a script plain and watched, and compare all that it leaves."""
    states = []
    watch = pergrad.Watch(folder / "run", **{"every": 1} | more)
    for by in (Unwatched(), watch):
        torch.manual_seed(0)
        states.append(script(by).state())
    watch.close()
    assert_same(*states)
    return watch


def stored(watch: pergrad.Watch) -> list[dict[str, Any]]:
    return pergrad.open_watch(watch.out).steps().to_pylist()


# -- ways to train ---------------------------------------------------------------------------------


def trained(
    watch: Any, micro: int = 1, scale: float | None = None, autocast: bool = False,
    recompute: bool = False, adapter: bool = False,
) -> Loop:  # fmt: skip
    loop = Loop(watch, Adapter() if adapter else Text(recompute), scale)
    for _ in range(4):
        for _ in range(micro):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = text_loss(loop.model, loop.ids()) / micro
            loop.backward(loss, 4)
        loop.scaler.unscale_(loop.optimizer)
        nn.utils.clip_grad_norm_(loop.model.parameters(), 0.5)
        loop.step()
    return loop


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"micro": 3},
    "scaled": {"scale": 2.0**16},
    "bf16": {"autocast": True},
    "checkpointing": {"recompute": True},
    "adapter": {"adapter": True},
    "adapter, accumulation, bf16": {"adapter": True, "micro": 2, "autocast": True},
    "all": {"micro": 2, "scale": 2.0**16, "autocast": True, "recompute": True},
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_train(tmp_path: Path, way: str, every: int) -> None:
    watch = both(lambda by: trained(by, **WAYS[way]), tmp_path, every=every, groups="layer")
    assert watch.failures == []
    rows = stored(watch)
    assert [row["step"] for row in rows] == list(range(0, 4, every))
    assert all(row["examples"] == 4 * WAYS[way].get("micro", 1) for row in rows)
    assert all(row["noise_scale"] is not None and row["p50"] > 0 for row in rows)


# -- what goes wrong in a step ---------------------------------------------------------------------


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2))


def everything_frozen(watch: Any) -> Loop:
    """What is trained is the input, as for a prompt or an adversarial example."""
    model = network().requires_grad_(False)
    loop = Loop(watch, model)
    x = loop.x().requires_grad_()
    loop.backward(rows_loss(model, x), 6)
    loop.losses.append(x.grad)
    return loop


def shorter_last_batch(watch: Any) -> Loop:
    loop = Loop(watch, network())
    for n in (6, 6, 4):
        loop.backward(rows_loss(loop.model, loop.x(n)), 6)
        loop.step()
    return loop


def shorter_last_batch_of_texts(watch: Any) -> Loop:
    """Its rows happen to be a multiple of the number that is wrong."""
    loop = Loop(watch, nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11)))
    for n in (4, 4, 2):
        loop.backward(
            F.cross_entropy(loop.model(ids := loop.ids(n)).flatten(0, 1), ids.flatten()), 4
        )
        loop.step()
    return loop


def unknown_root(watch: Any) -> Loop:
    loop = Loop(watch, network())
    for _ in range(2):
        loop.backward(rows_loss(loop.model, loop.x()).exp(), 6)
        loop.step()
    return loop


def no_label(watch: Any) -> Loop:
    """A mean over no rows is NaN, and so is all that comes of it."""
    loop = Loop(watch, network())
    for k in range(2):
        y = torch.full((6,), -100) if k else torch.zeros(6, dtype=torch.long)
        loop.backward(F.cross_entropy(loop.model(loop.x()), y, reduction="sum"), 6)
        loop.step()
    loop.backward(F.cross_entropy(loop.model(loop.x()), torch.full((6,), -100)), 6)
    loop.step()
    return loop


def not_a_number(watch: Any) -> Loop:
    loop = Loop(watch, network())
    for k in range(2):
        x = loop.x()
        x[2] = float("nan") if k else 1.0
        loop.backward(rows_loss(loop.model, x), 6)
        loop.step()
    return loop


def one_example(watch: Any) -> Loop:
    loop = Loop(watch, network())
    for _ in range(3):
        loop.backward(rows_loss(loop.model, loop.x(1)), 1)
        loop.step()
    return loop


def two_losses(watch: Any) -> Loop:
    """Of one forward pass, in one block that was told of one of them."""
    loop = Loop(watch, network())
    hidden = loop.model[:3](loop.x())
    loss, other = F.cross_entropy(loop.model[3](hidden), torch.ones(6).long()), hidden.exp().mean()
    with watch(loss, loop.model, 6, step=0):
        (loss + other).backward()
    loop.step()
    return loop


def two_blocks(watch: Any) -> Loop:
    """Two losses, each with a pass and a block of its own: one step of twelve examples."""
    loop = Loop(watch, network())
    for _ in range(2):
        loop.backward(rows_loss(loop.model, loop.x()), 6)
        loop.backward(loop.model(loop.x()).square().sum(1).mean(), 6)
        loop.step()
    return loop


def backward_twice(watch: Any) -> Loop:
    loop = Loop(watch, network())
    loss = rows_loss(loop.model, loop.x())
    with watch(loss, loop.model, 6, step=0):
        loss.backward(retain_graph=True)
        loss.backward()
    loop.step()
    return loop


def no_backward(watch: Any) -> Loop:
    """A batch that the user's loop skips inside the block."""
    loop = Loop(watch, network())
    loss = rows_loss(loop.model, loop.x())
    for skip in (True, False):
        with watch(loss, loop.model, 6, step=loop.done):
            if not skip:
                loss.backward()
        loop.step()
    return loop


MISHAPS: list[tuple[Script, str, list[int]]] = [  # with what is said, and examples by step
    (everything_frozen, r"None of the parameters requires grad", [0]),
    (
        shorter_last_batch,
        r"4 rows, which 6 examples do not divide(.|\n)*this very batch",
        [6, 6, 0],
    ),
    (
        shorter_last_batch_of_texts,
        r"12 rows, which were \(2, 6\)(.|\n)*pieces of sequences(.|\n)*this very batch",
        [4, 4, 0],
    ),
    (unknown_root, r"`exp`(.|\n)*losses \(B,\)", [0, 0]),
    (no_label, "", [6, 6, 6]),
    (not_a_number, "", [6, 6]),
    (one_example, "", [1, 1, 1]),
    (two_losses, r"sends a gradient into(.|\n)*pergrad\.norms", [0]),
    (two_blocks, "", [12, 12]),
    (backward_twice, r"Two backward passes(.|\n)*block of its own", [0]),
    (no_backward, r"No backward pass came by(.|\n)*inside", [0, 6]),
]


@pytest.mark.parametrize(
    ("script", "match", "examples"), MISHAPS, ids=lambda m: getattr(m, "__name__", "")
)
def test_mishaps(tmp_path: Path, script: Script, match: str, examples: list[int]) -> None:
    watch = both(script, tmp_path)
    assert len(watch.failures) == bool(match), watch.failures
    for words in watch.failures:
        with pytest.raises(pergrad.UsageError, match=match):
            raise pergrad.UsageError(words)
    if script is everything_frozen:
        return  # there is nothing to describe a run by, and so none was stored
    rows = stored(watch)
    assert [row["examples"] for row in rows] == examples
    assert all((row["note"] is None) == (row["examples"] > 0) for row in rows)


@pytest.mark.parametrize("apart", [True, False])
def test_a_step_that_a_scaler_skips(tmp_path: Path, apart: bool) -> None:
    """Where each gradient is finite and their sum is not, norms are right all the same."""
    too_large = 1.0 if apart else 1e8
    skipped: list[int] = []

    def script(watch: Any) -> Loop:
        model = nn.Linear(1, 1, bias=False)
        loop = Loop(watch, model, scale=2.0**126)
        for step in range(5):
            x = torch.full((6, 1), 3.0 * too_large if step in (1, 3) else 0.5)
            before = loop.scaler.get_scale()
            loop.backward(model(x).sum(1).sum(), 6)
            loop.step()
            if loop.scaler.get_scale() < before:
                skipped.append(step)
        return loop

    watch = both(script, tmp_path)
    assert skipped == [1, 3] * 2  # plain and watched
    rows = stored(watch)
    if apart:
        assert watch.failures == []
        assert [row["p50"] for row in rows] == pytest.approx([0.5, 3.0, 0.5, 3.0, 0.5])
        assert watch.noise.steps == 3  # those whose sum is finite
        return
    assert all("A GradScaler skips such a step" in words for words in watch.failures)
    assert [row["examples"] for row in rows] == [6, 0, 6, 0, 6]
    assert watch.spikes == []
    assert not any(pergrad.open_watch(watch.out).examples()["outlier"].to_pylist())


def test_a_loss_without_a_gradient(tmp_path: Path) -> None:
    """All frozen, the input too: torch's own error, with and without."""
    model = network().requires_grad_(False)
    loss = rows_loss(model, torch.randn(6, 4))
    with pergrad.Watch(tmp_path / "run") as watch:
        with pytest.raises(RuntimeError, match="does not require grad"), watch(loss, model, 6):
            loss.backward()
        assert "requires grad" in watch.failures[0]


def test_a_folder_that_cannot_be_written_to() -> None:
    """/proc takes no folder, whoever asks."""
    watch = None

    def script(by: Any) -> Loop:
        loop = Loop(by, network())
        for _ in range(2):
            loop.backward(rows_loss(loop.model, loop.x()), 6)
            loop.step()
        return loop

    states = []
    watch = pergrad.Watch("/proc/pergrad", every=1)
    for by in (Unwatched(), watch):
        torch.manual_seed(0)
        states.append(script(by).state())
    watch.close()
    assert_same(*states)
    assert len(watch.failures) == 1
    assert "Cannot write to" in watch.failures[0]
    assert "a folder that can be written to" in watch.failures[0]
