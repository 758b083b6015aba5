"""Influence, streamed, against the loop's gradients and dense algebra."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from attributing import BUILDERS, DTYPES, job, losses, tolerance
from helpers import assert_agrees
from test_gauss_newton import dense_gauss_newton
from torch import Tensor, nn

import pergrad
from pergrad.attribution import kernel, ranking
from pergrad.attribution.folder import Folder
from pergrad.errors import StoreError, UsageError


def flat_grads(task: pergrad.Job, items: list[Any]) -> Tensor:
    """(B, P), by the loop, in float64."""
    batch = torch.utils.data.default_collate(items)
    return naive.flat(naive.loop_grads(task.losses(task.model, batch), task.model))


def queries_of(name: str, dtype: torch.dtype, count: int = 3) -> list[Any]:
    return job(name, dtype, 11 + count).data[11:]


def both(name: str, dtype: torch.dtype = torch.float64) -> tuple[pergrad.Job, list[Any]]:
    return job(name, dtype), queries_of(name, dtype)


def agrees(got: Tensor, want: Tensor, dtype: torch.dtype, what: str = "") -> None:
    assert got.dtype == dtype
    assert_agrees(got, want, float(want.abs().max()), tolerance(dtype), what)


# --- inner products -------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("size", [1, 4, None])
@pytest.mark.parametrize("name", BUILDERS)
def test_dots_and_cosines(name: str, size: int | None, dtype: torch.dtype, tmp_path: Path) -> None:
    task, queries = both(name, dtype)
    G, K = flat_grads(task, task.data), flat_grads(task, queries)
    dots = pergrad.influence(task, queries, tmp_path / "dots", batch_size=size)
    agrees(dots.scores, K @ G.mT, dtype)
    found = pergrad.influence(task, queries, tmp_path / "cos", cosine=True, batch_size=size)
    cosines = nn.functional.normalize(K) @ nn.functional.normalize(G).mT
    agrees(found.scores, cosines, dtype)
    assert found.sign == dots.sign == "the example helps: it lowers the query's loss"
    assert dots.unit == "inner product of gradients"
    assert found.unit == "cosine of gradients"


class Merged(nn.Module):
    """A weight that is a product of two, so that a gradient's factor holds a weight itself."""

    def __init__(self) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 6))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x @ (self.A @ self.B).mT)


def trained(task: pergrad.Job, steps: int, **adam: Any) -> tuple[list[dict[str, Tensor]], list]:
    """Checkpoints along a short run of Adam, and its states."""
    optimizer = torch.optim.Adam(task.model.parameters(), lr=0.05, **adam)
    batch = torch.utils.data.default_collate(task.data)
    states, moments = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        task.losses(task.model, batch).mean().backward()
        optimizer.step()
        states.append({n: t.clone() for n, t in task.model.state_dict().items()})
        state = optimizer.state_dict()
        moments.append({
            "param_groups": state["param_groups"],
            "state": {i: {k: v.clone() for k, v in s.items()} for i, s in state["state"].items()},
        })  # fmt: skip
    optimizer.zero_grad()
    return states, moments


@DTYPES
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("name", ["tied", "images", "merged"])
def test_sums_over_checkpoints(name: str, cosine: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    BUILDERS["merged"] = (Merged, BUILDERS["perceptron"][1])
    task, queries = both(name, dtype)
    states, _ = trained(task, 3)
    task.model.eval()
    before = {n: t.clone() for n, t in task.model.state_dict().items()}
    rates, want = [0.5, 0.0, 2.0], 0.0
    for state, rate in zip(states, rates, strict=True):
        task.model.load_state_dict(state)
        G, K = flat_grads(task, task.data), flat_grads(task, queries)
        if cosine:
            G, K = nn.functional.normalize(G), nn.functional.normalize(K)
        want = want + rate * K @ G.mT
    task.model.load_state_dict(before)
    torch.save(states[1], tmp_path / "1.pt")
    other = job(name, dtype).model
    other.load_state_dict(states[2])
    if not cosine:
        task.model.load_state_dict(states[2])
        other = task.model.state_dict()  # the model's own memory, which others are put into
        before = {n: t.clone() for n, t in other.items()}
    sources = [states[0], tmp_path / "1.pt", other]
    found = pergrad.influence(
        task, queries, tmp_path / "f", checkpoints=sources, rates=rates, cosine=cosine,
        batch_size=4,
    )  # fmt: skip
    agrees(found.scores, want, dtype)
    assert found.unit.endswith("times its rate, summed over checkpoints")
    for n, t in task.model.state_dict().items():
        assert torch.equal(t, before[n]), n


@DTYPES
def test_less_is_cosines_with_adams_steps(dtype: torch.dtype, tmp_path: Path) -> None:
    """Adam's step for an example: the optimizer itself, made to take that step."""
    task, queries = both("tied", dtype)
    task.model.inner.bias.requires_grad_(False)
    states, moments = trained(task, 3, betas=(0.7, 0.9))
    rates, want = [1.0, 0.1, 3.0], 0.0
    batch = torch.utils.data.default_collate(task.data)
    for state, moment, rate in zip(states, moments, rates, strict=True):
        task.model.load_state_dict(state)
        K = flat_grads(task, queries)
        steps = []
        names = {n: p for n, p in task.model.named_parameters() if p.requires_grad}
        for i in range(len(task.data)):
            task.model.load_state_dict(state)
            optimizer = torch.optim.Adam(task.model.parameters(), lr=1.0)
            optimizer.load_state_dict(copy.deepcopy(moment))
            optimizer.param_groups[0]["lr"] = 1.0
            optimizer.zero_grad()
            task.losses(task.model, batch)[i].backward()
            for p in names.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            old = [p.detach().double().clone() for p in names.values()]
            optimizer.step()
            step = [a - p.detach().double() for a, p in zip(old, names.values(), strict=True)]
            steps.append(torch.cat([s.flatten() for s in step]))
        both_ = nn.functional.normalize(K), nn.functional.normalize(torch.stack(steps))
        want = want + rate * both_[0] @ both_[1].mT
    task.model.zero_grad()
    found = pergrad.influence(
        task, queries, tmp_path / "f", checkpoints=states, rates=rates, adam=moments, batch_size=4
    )
    # the optimizer's float32 steps of size 1 lose digits that ours keep
    assert found.scores.dtype == dtype
    assert_agrees(found.scores, want, 1.0, 1e-9 if dtype == torch.float64 else 2e-4)


# --- with a curvature -----------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("name", BUILDERS)
def test_a_curvature(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    task, queries = both(name, dtype)
    fit = pergrad.curvature(task, tmp_path / "fit", damping=0.3)
    found = pergrad.influence(task, queries, tmp_path / "f", curvature=fit, refine=0, batch_size=4)
    G, K = flat_grads(task, task.data), flat_grads(task, queries)
    batch = torch.utils.data.default_collate(queries)
    rows = naive.loop_grads(losses(task.model, batch), task.model)
    solved = naive.flat(fit.solve(dict(rows)))
    assert solved.shape == K.shape
    agrees(found.scores, solved @ G.mT / len(task.data), dtype)
    assert "(1/N)" in found.unit
    assert found.residuals is None


@DTYPES
@pytest.mark.parametrize("name", ["perceptron", "tied"])
def test_refined(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Five steps by default, nearer to the exact solve than none; many steps reach it."""
    task, queries = both(name, dtype)
    fit = pergrad.curvature(task, tmp_path / "fit")
    G, K = flat_grads(task, task.data), flat_grads(task, queries)
    strong = fit.damped(1.0)
    added = torch.cat([
        torch.full((p.numel(),), strong.added[n], dtype=torch.float64)
        for n, p in task.model.named_parameters()
    ])  # fmt: skip
    H = dense_gauss_newton(task) + added.diag()
    want = torch.linalg.solve(H, K.mT).mT @ G.mT / len(task.data)
    off = {}
    for steps in (0, None, 60):
        more = {"damping": 1.0} if steps == 0 else {}
        found = pergrad.influence(
            task, queries, tmp_path / str(steps), curvature=fit, refine=steps, **more
        )
        off[steps] = float((found.scores.double() - want).norm() / want.norm())
        if steps is None:
            assert found.manifest["settings"]["refine"] == 5
            assert found.manifest["settings"]["damping"] == 1.0
    assert off[None] < off[0] / 2
    assert off[60] < (1e-9 if dtype == torch.float64 else 1e-3)
    residuals = found.residuals
    assert residuals is not None
    assert residuals.shape == (3,)
    assert float(residuals.max()) < (1e-8 if dtype == torch.float64 else 1e-3)


def test_the_residual_is_the_true_one(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    fit = pergrad.curvature(task, tmp_path / "fit", damping=0.7)
    found = pergrad.influence(task, queries, tmp_path / "f", curvature=fit, refine=2)
    assert found.manifest["settings"]["damping"] == 0.7
    # two steps of conjugate gradients by hand, in dense algebra
    K = flat_grads(task, queries)
    names = dict(task.model.named_parameters())
    added = torch.cat(
        [torch.full_like(p.flatten(), fit.added[n]) for n, p in names.items()]
    ).detach()
    H = dense_gauss_newton(task) + added.diag()
    eye = torch.eye(K.shape[1], dtype=torch.float64)
    parts = torch.split(eye, [p.numel() for p in names.values()], 1)
    rows = {n: x.reshape(-1, *p.shape) for x, (n, p) in zip(parts, names.items(), strict=True)}
    M = naive.flat(fit.solve(rows))
    for q, k in enumerate(K):
        x, r = torch.zeros_like(k), k.clone()
        z = M @ r
        d = z.clone()
        for _ in range(2):
            Hd = H @ d
            alpha = (r @ z) / (d @ Hd)
            x, new = x + alpha * d, r - alpha * Hd
            beta = (new @ (M @ new)) / (r @ z)
            r, z = new, M @ new
            d = z + beta * d
        assert found.residuals is not None
        want = float((k - H @ x).norm() / k.norm())
        assert float(found.residuals[q]) == pytest.approx(want, rel=1e-6)
        agrees(found.scores[q], flat_grads(task, task.data) @ x / 11, torch.float64)


def test_given_labels_refine_on_the_empirical_fisher(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    task = job("perceptron", outputs=None)
    fit = pergrad.curvature(task, tmp_path / "fit", damping=0.5)
    found = pergrad.influence(task, queries, tmp_path / "f", curvature=fit, refine=40)
    G, K = flat_grads(task, task.data), flat_grads(task, queries)
    names = dict(task.model.named_parameters())
    added = torch.cat(
        [torch.full_like(p.flatten(), fit.added[n]) for n, p in names.items()]
    ).detach()
    want = K @ torch.linalg.solve(G.mT @ G / 11 + added.diag(), G.mT) / 11
    agrees(found.scores, want, torch.float64)


def test_another_pool_is_scored_with_the_curvature(tmp_path: Path) -> None:
    """1/N is that of the data the curvature is of; both are named."""
    task, queries = both("perceptron")
    fit = pergrad.curvature(task, tmp_path / "fit")
    pool = pergrad.Job(task.model, task.data[:4] * 2, losses)
    found = pergrad.influence(pool, queries, tmp_path / "f", curvature=fit)
    want = pergrad.influence(task, queries, tmp_path / "g", curvature=fit).scores[:, :4]
    agrees(found.scores, want.repeat(1, 2), torch.float64)
    assert found.manifest["curvature"]["scored"]["examples"] == 11
    assert found.manifest["scored"]["examples"] == 8


@DTYPES
@pytest.mark.parametrize("name", BUILDERS)
def test_the_kernel_is_the_dense_solve(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """(1/N) C (J'J/N + d)^-1 J', P x P, with d of the mean squared norm."""
    task, queries = both(name, dtype)
    G, K = flat_grads(task, task.data), flat_grads(task, queries)
    N, P = G.shape
    for damping in (None, 0.1):
        d = (damping or 0.5) * float(G.square().sum()) / N / N
        F_ = G.mT @ G / N + d * torch.eye(P, dtype=torch.float64)
        want = K @ torch.linalg.solve(F_, G.mT) / N
        out = tmp_path / str(damping)
        found = pergrad.influence(
            task, queries, out, method="kernel", damping=damping, batch_size=4
        )
        agrees(found.scores, want, dtype)
    ranked = pergrad.influence(task, queries, tmp_path / "top", method="kernel", top=4, damping=0.1)
    top = [ranked.top(q, 4)["score"].to_pylist() for q in range(3)]
    scores = torch.tensor(top, dtype=dtype)
    agrees(scores, want.topk(4).values, dtype)


def test_the_kernel_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With factors of a few batches held at a time, and stopped between them."""
    task, queries = both("tied")
    want = pergrad.influence(task, queries, tmp_path / "f", method="kernel", batch_size=2).scores
    monkeypatch.setattr(kernel, "HELD_BYTES", 0)
    got = pergrad.influence(task, queries, tmp_path / "g", method="kernel", batch_size=2).scores
    agrees(got, want, torch.float64)


# --- signs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dots", "curvature", "kernel"])
def test_positive_helps(method: str, tmp_path: Path) -> None:
    """More weight on an example with a positive score lowers the query's loss, by as much as it
    says; and it raises a measurement, whose gradient is that of minus the loss.
    """
    x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    data = [(row, row.sum() + (-1) ** i) for i, row in enumerate(x)]

    def half_squares(m: nn.Module, batch: Any) -> Tensor:
        return (m(batch[0])[:, 0] - batch[1]).square() / 2

    more: dict[str, Any] = {"outputs": lambda m, b: m(b[0]), "likelihood": "gaussian"}
    task = pergrad.Job(net, data[:7], half_squares, **more)
    X, y = x[:7], torch.stack([d[1] for d in data[:7]])
    how: dict[str, Any] = {}
    if method == "curvature":
        how = {"curvature": pergrad.curvature(task, tmp_path / "fit", damping=1e-9), "refine": 50}
        with torch.no_grad():
            net.weight.copy_(torch.linalg.lstsq(X, y).solution[None])
        how["curvature"] = pergrad.curvature(task, tmp_path / "fit2", damping=1e-9)
    elif method == "kernel":
        how = {"method": "kernel"}
    found = pergrad.influence(task, data[7:], tmp_path / "f", **how)
    measured = pergrad.Job(net, data[7:], lambda m, b: -half_squares(m, b))
    same = pergrad.influence(task, measured, tmp_path / "m", **how)
    agrees(same.scores, found.scores, torch.float64)
    assert same.sign == "the example raises the measurement"

    def query_loss(weights: Tensor) -> Tensor:
        """After a step of gradient descent, or at the optimum of the weighted loss."""
        if method == "curvature":
            w = weights.sqrt()
            best = torch.linalg.lstsq(w[:, None] * X, w * y).solution
        else:
            r = X @ net.weight[0].detach() - y
            best = net.weight[0].detach() - 1e-5 * (weights * r) @ X
        q = x[7:] @ best - torch.stack([d[1] for d in data[7:]])
        return q.square() / 2

    eps = 1e-5
    for i in range(7):
        up, down = torch.ones(7, dtype=torch.float64), torch.ones(7, dtype=torch.float64)
        up[i] += eps
        down[i] -= eps
        slope = -(query_loss(up) - query_loss(down)) / (2 * eps)
        if method == "curvature":
            assert torch.allclose(slope, found.scores[:, i], rtol=1e-3, atol=1e-6)
        elif method == "dots":
            assert torch.allclose(slope, 1e-5 * found.scores[:, i], rtol=1e-3, atol=1e-8)


# --- what is kept ---------------------------------------------------------------------------------


def test_the_strongest_are_those_of_the_full_matrix(tmp_path: Path) -> None:
    task, queries = both("tied")
    keyed = pergrad.Job(task.model, task.data, losses, key=lambda i: f"picture {i}")
    whole = pergrad.influence(keyed, queries, tmp_path / "all", batch_size=3)
    some = pergrad.influence(keyed, queries, tmp_path / "top", batch_size=3, top=4)
    assert whole.shape == some.shape == (3, 11)
    for q in range(3):
        for end, sign in (("top", 1), ("bottom", -1)):
            order = sorted(range(11), key=lambda i: -sign * float(whole.scores[q, i]))[:4]
            for found in (whole, some):
                table = getattr(found, end)(q, 4)
                assert table["index"].to_pylist() == order
                assert table["rank"].to_pylist() == [0, 1, 2, 3]
                assert table["key"].to_pylist() == [f"picture {i}" for i in order]
                assert table["score"].to_pylist() == whole.scores[q, order].tolist()
                assert b"lowers the query's loss" in table.schema.metadata[b"sign"]
                assert table.schema.metadata[b"unit"] == b"inner product of gradients"
    table = whole.table()
    assert table.schema.names == ["query", "index", "key", "score"]
    assert len(table) == 33
    want = whole.scores[table["query"].to_pylist(), table["index"].to_pylist()]
    assert table["score"].to_pylist() == want.tolist()
    ends = some.table()
    assert len(ends) == 24
    assert sorted(ends["score"].to_pylist()[:8], reverse=True) == ends["score"].to_pylist()[:8]
    with pytest.raises(UsageError, match=r"Only the 4 strongest.*top=None"):
        _ = some.scores
    with pytest.raises(UsageError, match=r"Only the 4 strongest.*top=5"):
        some.top(0, 5)
    with pytest.raises(UsageError, match=r"no query 3: pass a number from 0 to 2"):
        some.top(3)
    with pytest.raises(UsageError, match=r"n is 0; pass a positive number"):
        some.bottom(0, 0)


def test_more_are_asked_than_there_are(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    found = pergrad.influence(task, queries, tmp_path / "f", top=50)
    assert str(found.top(1, 50)).split()[:3] == ["rank", "index", "score"]
    assert len(found.top(1, 50)) == len(found.bottom(1, 50)) == 11
    assert found.bottom(1, 50)["index"].to_pylist() == found.top(1, 50)["index"].to_pylist()[::-1]
    assert len(found.table()) == 33


def test_equal_scores_are_ranked_by_their_place(tmp_path: Path) -> None:
    """Whatever pieces they come in, and also where a stop lies between them."""
    scores = np.array([[2.0], [1.0], [2.0], [0.0], [2.0], [0.0], [0.0], [1.0]])
    for size in (1, 3, 8):
        folder = Folder(tmp_path / str(size), "test")
        with folder.locked():
            for first in range(0, 8, size):
                kept = ranking.Ends(folder, "ends", 1, 2, "float64")
                kept.add(scores[first : first + size])
                kept.flush()
        assert kept.high[1].tolist() == [[0, 2]]
        assert kept.low[1].tolist() == [[3, 5]]


def same_pairs(got: pergrad.Influence, want: pergrad.Influence) -> int:
    """How many pairs both have; their scores are the same. Of twins either may come first."""
    rows = [
        {(r["query"], r["index"]): r["score"] for r in found.table().to_pylist()}
        for found in (got, want)
    ]
    both_ = rows[0].keys() & rows[1].keys()
    assert len(rows[0]) == len(rows[1])
    scores = (torch.tensor([row[pair] for pair in both_], dtype=torch.float64) for row in rows)
    agrees(*scores, torch.float64)
    return len(both_)


ASKED: dict[str, Callable[[pergrad.Job, Path], dict[str, Any]]] = {
    "dots": lambda task, path: {},
    "top": lambda task, path: {"top": 3},
    "checkpoints": lambda task, path: {"checkpoints": [task.model, _moved(task)], "cosine": True},
    "refined": lambda task, path: {"curvature": pergrad.curvature(task, path / "fit"), "top": 2},
    "kernel": lambda task, path: {"method": "kernel"},
    "kernel top": lambda task, path: {"method": "kernel", "top": 3},
}


def _moved(task: pergrad.Job) -> dict[str, Tensor]:
    return {n: t + 0.1 if t.is_floating_point() else t for n, t in task.model.state_dict().items()}


@pytest.mark.parametrize("name", ASKED)
def test_it_goes_on_where_it_stopped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each file that is written, and the same to the last bit (or digit)."""
    task, queries = both("tied")
    how = ASKED[name](task, tmp_path)
    monkeypatch.setattr(ranking, "SECONDS_BETWEEN_FILES", -1.0)
    monkeypatch.setattr(kernel, "HELD_BYTES", 0)
    monkeypatch.setattr("pergrad.attribution.influence.BATCHES_PER_CHECKPOINT", 1)
    before = {n: t.clone() for n, t in task.model.state_dict().items()}
    whole = pergrad.influence(task, queries, tmp_path / "whole", batch_size=3, **how)
    add = Folder.add

    def stop(self: Folder, *args: Any) -> Path:
        add(self, *args)
        raise KeyboardInterrupt

    stops = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Folder, "add", stop)
            try:
                got = pergrad.influence(task, queries, tmp_path / "part", batch_size=3, **how)
                break
            except KeyboardInterrupt:
                stops += 1
                assert stops < 40
        for n, t in task.model.state_dict().items():
            assert torch.equal(t, before[n]), n
    assert stops >= 4
    if name == "refined":  # even two runs without a stop differ there in the last digit, by BLAS
        assert same_pairs(got, whole) >= 10
        assert got.residuals is not None
        assert whole.residuals is not None
        assert_agrees(got.residuals, whole.residuals, 1.0)
    else:
        assert got.table().equals(whole.table())
    left = {path.name.split("-")[0] for path in (tmp_path / "part").iterdir()}
    assert left <= {"manifest.json", "pairs0", "ranked", ".lock"}


def test_blocks_of_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, queries go in blocks, and nothing else differs."""
    task, queries = both("tied")
    fit = pergrad.curvature(task, tmp_path / "fit")
    for i, how in enumerate(({}, {"curvature": fit}, {"method": "kernel"}, {"top": 3})):
        want = pergrad.influence(task, queries, tmp_path / f"one{i}", **how)
        with monkeypatch.context() as patch:
            patch.setattr("pergrad.attribution.queries.MOST_QUERY_BYTES", 1)
            got = pergrad.influence(task, queries, tmp_path / f"many{i}", **how)
        assert got.manifest["blocks"] == [[0, 1], [1, 2], [2, 3]]
        assert same_pairs(got, want) >= 15


def test_it_prints(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    fit = pergrad.curvature(task, tmp_path / "fit")
    text = repr(pergrad.influence(task, queries, tmp_path / "f", curvature=fit))
    assert "Influence (refined) of 11 examples on 3 queries" in text
    assert "positive: the example helps: it lowers the query's loss; unit: how far the" in text
    assert "damping 1 x mean" in text
    assert "5 steps of conjugate gradients; residuals" in text
    assert "would lower them" not in text
    rough = pergrad.influence(
        task, queries, tmp_path / "rough", curvature=fit, refine=1, damping=0.01
    )
    assert "(refine=4 would lower them)" in repr(rough)
    more = pergrad.influence(
        task, queries, tmp_path / "more", curvature=fit, refine=4, damping=0.01
    )
    assert more.residuals.max() < rough.residuals.max()


def test_the_unit_is_what_it_says(tmp_path: Path) -> None:
    """Against models fitted anew with a little more weight of an example, in closed form."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, dtype=torch.float64, generator=g)
    y = x.sum(1) + torch.randn(30, dtype=torch.float64, generator=g)
    items = list(zip(x, y, strict=True))

    def fitted(weights: Tensor) -> nn.Module:
        net = nn.Linear(4, 1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            solved = torch.linalg.solve(x[:25].mT @ (weights[:, None] * x[:25]),
                                        x[:25].mT @ (weights * y[:25]))  # fmt: skip
            net.weight.copy_(solved[None])
        return net

    def squares(m: nn.Module, batch: Any) -> Tensor:
        return (m(batch[0])[:, 0] - batch[1]).square() / 2

    task = pergrad.Job(fitted(torch.ones(25, dtype=torch.float64)), items[:25], squares,
                       outputs=lambda m, b: m(b[0]), likelihood="gaussian")  # fmt: skip
    measured = pergrad.Job(task.model, items[25:], lambda m, b: m(b[0])[:, 0])
    fit = pergrad.curvature(task, tmp_path / "fit")
    exact: dict[str, Any] = {"curvature": fit, "refine": 20, "damping": 1e-9}
    found = pergrad.influence(task, items[25:], tmp_path / "data", **exact)
    margin = pergrad.influence(task, measured, tmp_path / "job", **exact)
    assert "how far the query's loss falls" in found.unit
    assert "how far the measurement rises" in margin.unit
    for i in range(3):
        more = torch.ones(25, dtype=torch.float64)
        more[i] += 1e-6
        batch = (x[25:], y[25:])
        before, after = (squares(m, batch).detach() for m in (task.model, fitted(more)))
        torch.testing.assert_close(
            (before - after) / 1e-6, found.scores[:, i], rtol=1e-4, atol=1e-6
        )
        rise = fitted(more)(x[25:])[:, 0] - task.model(x[25:])[:, 0]
        torch.testing.assert_close(rise.detach() / 1e-6, margin.scores[:, i], rtol=1e-4, atol=1e-6)


# --- bad input ------------------------------------------------------------------------------------


def test_arguments(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    fit = pergrad.curvature(task, tmp_path / "fit")
    state = task.model.state_dict()
    _, moments = trained(job("perceptron"), 2)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "krenel"}, r"method is 'krenel'; pass \"kernel\", or None"),
        ({"curvature": fit, "cosine": True}, "curvature and cosine do not go together.*Leave out"),
        ({"curvature": fit, "checkpoints": [state]}, "belongs to the weights of one checkpoint"),
        ({"curvature": fit, "adam": moments[0]}, "LESS takes Adam's steps in the place"),
        ({"curvature": fit, "method": "kernel"}, "the kernel is a curvature of its own"),
        ({"method": "kernel", "cosine": True}, "cosine and method.*Leave out one"),
        ({"method": "kernel", "checkpoints": [state]}, "checkpoints and method.*Leave out one"),
        ({"method": "kernel", "adam": moments[0]}, "adam and method.*Leave out one"),
        ({"top": 0}, "top is 0; pass a positive number, or None"),
        ({"curvature": "fit"}, "curvature is a str. Pass what pergrad.curvature ret.*again, which"),
        ({"curvature": fit, "refine": -1}, "refine is -1; pass a number of steps"),
        ({"refine": 3}, "refine takes steps.*pass curvature="),
        ({"curvature": fit, "damping": 0}, "damping is 0; pass a positive number"),
        ({"method": "kernel", "damping": -1.0}, "damping is -1.0; pass a positive number"),
        ({"damping": 0.1}, 'damping is added to a curvature.*pass curvature=, or method="kernel"'),
        ({"checkpoints": "a.pt"}, "checkpoints is a str. Pass a list of state dicts"),
        ({"checkpoints": state}, "checkpoints is a OrderedDict. Pass a list"),
        ({"checkpoints": []}, "checkpoints is empty. Pass at least one"),
        ({"checkpoints": [3]}, r"checkpoints\[0\] is a int. Pass a state dict"),
        ({"checkpoints": [{"model": state}]}, r"with `model`, not all of them tensors. Pass a st"),
        ({"checkpoints": [{**state, "x": state["0.bias"]}]}, "which the model has not. Pass state"),
        ({"checkpoints": [{"0.bias": state["0.bias"]}]}, r"checkpoints\[0\] is of another.*lacks"),
        ({"checkpoints": [{**state, "0.bias": torch.ones(1)}]}, r"shape \(1,\) for `0.bias`.*Pass"),
        ({"checkpoints": [tmp_path / "no.pt"]}, "cannot be read: FileNotFoundError.*Pass a file"),
        ({"checkpoints": [tmp_path / "no.safetensors"]}, "cannot be read.*Pass a file"),
        ({"rates": [1.0]}, "rates are those of checkpoints.*pass checkpoints="),
        ({"checkpoints": [state], "rates": [1.0, 2.0]}, "2 rates for 1 checkpoints. Pass one for"),
        ({"checkpoints": [state], "rates": [math.nan]}, r"rates\[0\] is nan; pass a learning rate"),
        ({"checkpoints": [state], "rates": [-1.0]}, r"rates\[0\] is -1.0; pass a learning rate"),
        ({"adam": moments}, "adam has 2 states for 1 checkpoints. Pass `optimizer.state_dict"),
        ({"adam": {}}, r"adam\[0\] is a dict without `state`.*Pass `optimizer.state_dict\(\)`"),
        ({"adam": {"state": {}, "param_groups": [{"params": [0]}]}}, "about 1 parameters, and the"),
        ({"checkpoints": [state] * 2, "adam": [moments[0]] * 2},
         r"adam\[1\] is of step 1, as adam\[0\] is.*Pass the state that was saved with each"),
        ({"batch_size": 0}, "batch_size is 0; pass a positive number"),
        ({"mode": "train"}, 'mode is \'train\'; pass "eval" or "as is"'),
    ]  # fmt: skip
    for i, (how, message) in enumerate(cases):
        with pytest.raises(UsageError, match=message):
            pergrad.influence(task, queries, tmp_path / f"bad{i}", **how)
        assert not (tmp_path / f"bad{i}" / "manifest.json").exists()
    with pytest.raises(UsageError, match=r"`job` is a Linear. Pass a pergrad.Job"):
        pergrad.influence(nn.Linear(2, 2), queries, tmp_path / "no")  # type: ignore[arg-type]


def test_adams_state_of_other_steps(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    _, (state, _) = trained(task, 2)
    state["state"][1]["step"] += 1
    with pytest.raises(UsageError, match=r"of several steps: `0.weight` at 1, `0.bias` at 2. Pass"):
        pergrad.influence(task, queries, tmp_path / "a", adam=state)
    del state["state"][1]
    with pytest.raises(UsageError, match=r"no moments of `0.bias` in its shape \(7,\). Pass"):
        pergrad.influence(task, queries, tmp_path / "b", adam=state)


def test_queries_that_cannot_be_asked(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    with pytest.raises(UsageError, match=r"There are no queries.*Pass at least one"):
        pergrad.influence(task, [], tmp_path / "a")
    scalar = pergrad.Job(task.model, queries, lambda m, b: m(b[0]).sum())
    with pytest.raises(UsageError, match=r"one loss per example|one per example"):
        pergrad.influence(task, scalar, tmp_path / "b")
    narrow = pergrad.Job(nn.Linear(6, 3).double(), queries, losses)
    with pytest.raises(UsageError, match=r"about other parameters than the job.*the same `params`"):
        pergrad.influence(task, narrow, tmp_path / "c")
    steep = pergrad.Job(task.model, queries, lambda m, b: (m(b[0]) * 0).sqrt().sum(1))
    with pytest.raises(UsageError, match=r"Query 0 has a gradient that is not finite.*Take it out"):
        pergrad.influence(task, steep, tmp_path / "d")


def test_examples_at_fault_are_named(tmp_path: Path) -> None:
    """Nothing of them is written; what came before is kept."""
    task, queries = both("perceptron")

    def steep(m: nn.Module, b: Any) -> Tensor:
        z = m(b[0])
        off = torch.where(b[0][:, 0] == 77, 0.0, 1.0)
        return (z.square().sum(1) * off).sqrt()

    task.data[7][0][0] = 77
    bad = pergrad.Job(task.model, task.data, steep)
    asking = pergrad.Job(task.model, queries, losses)
    with pytest.raises(UsageError, match=r"Example 7 has a gradient that is not finite.*Take|kept"):
        pergrad.influence(bad, asking, tmp_path / "a", batch_size=2)
    with pytest.raises(UsageError, match=r"Example 7 has a gradient that is not finite"):
        pergrad.influence(bad, asking, tmp_path / "b", batch_size=2, method="kernel")
    task.data[7][0][0] = math.nan
    with pytest.raises(UsageError, match=r"Example 7 has a loss that is not finite.*Take it out"):
        pergrad.influence(task, queries, tmp_path / "c", batch_size=2)


def test_no_gradient_at_all(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    flat = pergrad.Job(task.model, task.data, lambda m, b: losses(m, b) * 0)
    with pytest.raises(UsageError, match=r"All training gradients are 0.*Check the losses"):
        pergrad.influence(flat, queries, tmp_path / "k", method="kernel")
    assert float(pergrad.influence(flat, queries, tmp_path / "c", cosine=True).scores.norm()) == 0


def test_keys_twice(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    same = pergrad.Job(task.model, task.data, losses, key=lambda i: str(i // 2))
    with pytest.raises(UsageError, match=r"examples 0 and 1 have the same key.*Give `key` a name"):
        pergrad.influence(same, queries, tmp_path / "f")


def test_too_many_examples_for_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, queries = both("perceptron")
    monkeypatch.setattr(kernel, "free_bytes", lambda _: 1000)
    with pytest.raises(UsageError, match=r"11 x 11, which takes 2,904 bytes.*1,000 are.*curvature"):
        pergrad.influence(task, queries, tmp_path / "f", method="kernel")


def test_a_curvature_of_something_else(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    fit = pergrad.curvature(task, tmp_path / "fit")
    moved = job("perceptron")
    with torch.no_grad():
        moved.model[0].bias.add_(1)
    with pytest.raises(UsageError, match=r"other weights or buffers. Estimate it for this one"):
        pergrad.influence(moved, queries, tmp_path / "a", curvature=fit)
    single = job("perceptron", torch.float32)
    asked = [(x.float(), y) for x, y in queries]
    with pytest.raises(
        UsageError, match=r"`0.weight` in torch.float64, and it is torch.float32 now"
    ):
        pergrad.influence(single, asked, tmp_path / "b", curvature=fit)
    some = pergrad.Job(task.model, task.data, losses, params=task.model[0])
    with pytest.raises(UsageError, match=r"about other parameters.*Pass gradients for the same"):
        pergrad.influence(some, queries, tmp_path / "c", curvature=fit)


def test_one_example_in_the_place_of_queries(tmp_path: Path) -> None:
    task, _ = both("perceptron")
    with pytest.raises(UsageError, match=r"`queries` is a tuple of tensors.*pass \[queries\]"):
        pergrad.influence(task, (torch.zeros(3), torch.zeros(3)), tmp_path / "f")
    loader = torch.utils.data.DataLoader([1.0, 2.0])
    with pytest.raises(UsageError, match=r"`queries` is a DataLoader(.|\n)*loader\.dataset"):
        pergrad.influence(task, loader, tmp_path / "f")


def test_another_call_in_the_same_folder(tmp_path: Path) -> None:
    task, queries = both("perceptron")
    pergrad.influence(task, queries, tmp_path / "f")
    files = {p.name: p.read_bytes() for p in (tmp_path / "f").iterdir()}
    others: list[tuple[Any, Any, dict[str, Any], str]] = [
        (task, queries, {"cosine": True}, 'method was "dots" and is "cosines"'),
        (task, queries, {"top": 2}, "top was null and is 2"),
        (task, queries[:2], {}, "examples was 3 and is 2"),
        (task, queries[::-1], {}, r"the queries have other losses: they were"),
        (job("perceptron", count=10), queries, {}, "examples was 11 and is 10"),
    ]
    for other, asking, how, message in others:
        with pytest.raises(StoreError, match=message + ".*Give these another folder, or bring"):
            pergrad.influence(other, asking, tmp_path / "f", **how)
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "f").iterdir()}


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, queries = both("perceptron")
    with pytest.raises(StoreError, match=r"has no influences. Make the same call"):
        pergrad.Influence(tmp_path / "none")
    monkeypatch.setattr(ranking, "SECONDS_BETWEEN_FILES", -1.0)
    found = pergrad.influence(task, queries, tmp_path / "f", batch_size=4)
    first = found._folder.files("pairs0")[0][2]
    kept = first.read_bytes()
    first.write_bytes(kept[:-1] + b"x")
    with pytest.raises(StoreError, match=r"not what was written.*Remove this file"):
        _ = found.scores
    first.unlink()
    with pytest.raises(StoreError, match=r"begins at example 4, where 0 is missing.*make the same"):
        ranking.Pairs(found._folder, "pairs0")
    manifest = found._folder.manifest()
    assert manifest is not None
    found._folder.save_manifest({**manifest, "finished": False})
    with pytest.raises(StoreError, match=r"is not finished. Make the same call"):
        pergrad.Influence(tmp_path / "f")


def test_batch_norm_in_training_mode(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double()
    task = job("perceptron", model=net)
    with pytest.raises(UsageError, match=r"`1` is in training mode.*model.eval\(\)"):
        pergrad.influence(task, task.data[:2], tmp_path / "t", mode="as is")
    assert pergrad.influence(task, task.data[:2], tmp_path / "e").shape == (2, 11)
    assert net.training
