"""Retraining on subsets: the score against scipy-free algebra, going on, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attributing import job
from torch import Tensor, nn

import pergrad
from pergrad import extras
from pergrad.attribution import evaluation
from pergrad.attribution.folder import Folder
from pergrad.errors import MissingExtraError, StoreError, UsageError

N, D = 12, 3


def linear_data(count: int = N) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, D, dtype=torch.float64, generator=g)
    y = x.sum(1) + torch.randn(count, dtype=torch.float64, generator=g)
    return list(zip(x, y, strict=True))


def squares(m: nn.Module, batch: Any) -> Tensor:
    return (m(batch[0])[:, 0] - batch[1]).square() / 2


DATA = linear_data(N + 4)
CALLS: list[tuple[list[int], int]] = []


def train(indices: list[int], seed: int) -> nn.Module:
    """Ridge regression in closed form, with a little noise by the seed."""
    CALLS.append((indices, seed))
    X, y = torch.stack([DATA[i][0] for i in indices]), torch.stack([DATA[i][1] for i in indices])
    net = nn.Linear(D, 1, bias=False, dtype=torch.float64)
    w = torch.linalg.solve(X.mT @ X + torch.eye(D), X.mT @ y)
    noise = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        net.weight.copy_((w + 1e-3 * noise)[None])
    return net


def problem(path: Path) -> tuple[pergrad.Job, list[Any], pergrad.Influence]:
    task = pergrad.Job(train(list(range(N)), 0), DATA[:N], squares)
    return task, DATA[N:], pergrad.influence(task, DATA[N:], path / "found", method="kernel")


def brute(members: np.ndarray, outputs: np.ndarray, scores: np.ndarray) -> float:
    """The definition, by loops."""
    found = []
    for q in range(outputs.shape[1]):
        told = [sum(scores[q, i] for i in range(N) if row[i]) for row in members]
        ranks = [np.argsort(np.argsort(v)) for v in (told, outputs[:, q])]
        found.append(np.corrcoef(*ranks)[0, 1])
    return float(np.mean(found))


def test_the_score_is_its_definition(tmp_path: Path) -> None:
    task, queries, found = problem(tmp_path)
    result = pergrad.evaluate(
        train, task, queries, {"kernel": found, "negative": -found.scores},
        out=tmp_path / "e", subsets=20, seeds=2, share=0.5,
    )  # fmt: skip
    assert result.members.sum(1).tolist() == [6] * 20
    outputs = np.zeros((20, 4))
    for m, row in enumerate(result.members):
        for seed in range(2):
            net = train(np.flatnonzero(row).tolist(), seed)
            batch = torch.utils.data.default_collate(queries)
            outputs[m] -= squares(net, batch).detach().numpy() / 2
    assert np.allclose(result.outputs, outputs)
    scores = found.scores.numpy()
    want = brute(result.members, outputs, scores)
    assert result.scores["kernel"].lds == pytest.approx(want, abs=1e-9)
    assert result.scores["negative"].lds == pytest.approx(-want, abs=1e-9)
    assert set(result.scores) == {"kernel", "negative", "random", "last layer's neighbours"}
    for s in result.scores.values():
        assert -1 <= s.low <= s.lds <= s.high <= 1
    assert result.ceiling is not None
    assert result.best == "kernel"
    assert 0.9 < result.ceiling <= 1
    text = repr(result)
    assert "20 subsets with a share of 0.5 of the examples, 2 models each, 4 queries" in text
    assert "kernel" in text.splitlines()[2]
    assert "ceiling" in text.splitlines()[-1]


def test_a_measurement_is_taken_as_it_is(tmp_path: Path) -> None:
    task, queries, _ = problem(tmp_path)
    measured = pergrad.Job(task.model, queries, lambda m, b: -squares(m, b))
    more: dict[str, Any] = {"subsets": 20, "seeds": 1}
    scores = torch.randn(4, N)
    a = pergrad.evaluate(train, task, queries, scores, out=tmp_path / "a", **more)
    b = pergrad.evaluate(train, task, measured, scores, out=tmp_path / "b", **more)
    assert np.allclose(a.outputs, b.outputs)
    assert a.ceiling is None
    assert "ceiling" not in repr(a)
    with pytest.raises(StoreError, match=r"of something else: measured was.*another folder"):
        pergrad.evaluate(train, task, measured, scores, out=tmp_path / "a", **more)


def test_the_last_layers_inputs_are_what_is_compared(tmp_path: Path) -> None:
    task = job("tokens", count=15)
    queries, task = task.data[11:], job("tokens")
    models = iter([job("tokens").model for _ in range(40)])

    def moved(indices: list[int], seed: int) -> nn.Module:
        net = next(models)
        with torch.no_grad():
            net.inner.bias += sum(indices) / 100
        return net

    scores = torch.zeros(4, 11, dtype=torch.float64)
    result = pergrad.evaluate(moved, task, queries, scores, out=tmp_path / "e", subsets=20, seeds=1)
    # constant scores foretell nothing
    assert result.scores["influence"].lds == 0
    seen = []
    with task.model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        for items in (queries, task.data):
            task.model(torch.stack([x for x, _ in items]))
    a, b = (x.detach() - seen[1].detach().mean(0) for x in seen)
    want = nn.functional.normalize(a) @ nn.functional.normalize(b).mT
    again = pergrad.evaluate(moved, task, queries, want, out=tmp_path / "e", subsets=20, seeds=1)
    mine = again.scores["last layer's neighbours"]
    assert again.scores["influence"].lds == pytest.approx(mine.lds)


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, queries, found = problem(tmp_path)
    more: dict[str, Any] = {"subsets": 20, "seeds": 2}
    whole = pergrad.evaluate(train, task, queries, found, out=tmp_path / "whole", **more)
    add, count = Folder.add, 0

    def stop(self: Folder, *args: Any) -> Path:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            pergrad.evaluate(train, task, queries, found, out=tmp_path / "part", **more)
    CALLS.clear()
    part = pergrad.evaluate(train, task, queries, found, out=tmp_path / "part", **more)
    assert len(CALLS) == 40 - 7
    assert np.array_equal(part.outputs, whole.outputs)
    assert part.scores == whole.scores
    CALLS.clear()
    pergrad.evaluate(train, task, queries, -found.scores, out=tmp_path / "part", **more)
    assert not CALLS


def test_ranks_share_ties() -> None:
    got = evaluation.ranks(np.array([[2.0, 1.0], [1.0, 1.0], [2.0, 0.0], [5.0, 1.0]]))
    assert got.T.tolist() == [[1.5, 0.0, 1.5, 3.0], [2.0, 2.0, 0.0, 2.0]]


def test_the_interval_covers(tmp_path: Path) -> None:
    """Of random scores, whose expectation is 0, about 95 % of the intervals hold it."""
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        members = random.random((40, 30)) < 0.5
        outputs = random.standard_normal((40, 25))
        s = evaluation.lds(members, outputs, random.standard_normal((25, 30)))
        inside += s.low <= 0 <= s.high
    assert inside >= 88


def test_the_ceiling_is_the_correlation_with_endless_seeds() -> None:
    random = np.random.default_rng(0)
    truth = random.standard_normal((400, 30))
    by_seed = truth + random.standard_normal((4, 400, 30))
    want = evaluation.spearman(by_seed.mean(0), truth).mean()
    assert evaluation.ceiling(by_seed) == pytest.approx(want, abs=0.02)


def test_what_is_refused(tmp_path: Path) -> None:
    task, queries, found = problem(tmp_path)
    some = pergrad.influence(task, queries, tmp_path / "top", top=2)
    diverged = train([0, 1], 0)
    with torch.no_grad():
        diverged.weight.fill_(float("inf"))
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        ("train.py", found, {}, "train is a str. Pass a function"),
        (lambda i: i, found, {}, r"cannot be called so.*def train\(indices, seed\)"),
        (train, found, {"subsets": 19}, "subsets is 19; pass at least 20"),
        (train, found, {"share": 1.0}, "share is 1.0; pass a number between 0 and 1"),
        (train, found, {"share": 0.01}, "is 0: nothing would differ.*Pass another share"),
        (train, found, {"seeds": 0}, "seeds is 0; pass a positive number"),
        (train, found.scores.mT, {}, r"are \(12, 4\), for 4 queries and 12.*Pass what"),
        (train, [1.0], {}, r"are \(1,\), for 4 queries.*an array or lists"),
        (train, found.scores * float("nan"), {}, "not all finite. Leave these out"),
        (train, some, {}, "Only the 2 strongest.*top=None"),
        (lambda i, s: None, found, {}, "returned a NoneType. Return the trained model"),
        (lambda i, s: diverged, found, {}, "subset 0 with seed 0 gives query 0.*Check `train`"),
        (lambda i, s: task.model, found, {}, "ignore the examples.*Train on those alone"),
    ]
    for i, (training, scores, how, message) in enumerate(cases):
        more = {"subsets": 20, "seeds": 1, **how}
        with pytest.raises(UsageError, match=message):
            pergrad.evaluate(training, task, queries, scores, out=tmp_path / f"{i}", **more)
    pergrad.evaluate(train, task, queries, found, out=tmp_path / "e", subsets=20, seeds=1)
    with pytest.raises(StoreError, match=r"share was 0.5 and is 0.4.*another folder"):
        pergrad.evaluate(
            train, task, queries, found, out=tmp_path / "e", subsets=20, seeds=1, share=0.4
        )


def test_a_text_is_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, queries, found = problem(tmp_path)
    with pytest.raises(UsageError, match=r"text is a str. Pass a function from an item"):
        pergrad.evaluate(train, task, queries, found, out=tmp_path / "lds", text="words")
    there = extras.find_spec
    monkeypatch.setattr(extras, "find_spec", lambda n: None if n == "bm25s" else there(n))
    with pytest.raises(MissingExtraError, match=r"needs bm25s.*pip install 'pergrad\[texts\]'"):
        pergrad.evaluate(train, task, queries, found, out=tmp_path / "lds", text=str)
