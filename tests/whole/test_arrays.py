"""Arrays, lists and numpy's integers in the place of tensors and numbers: the same results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pergrad
from pergrad.errors import UsageError

B = 5
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "array": lambda t: t.numpy(),
    "lists": lambda t: t.tolist(),
    "not contiguous": lambda t: t.numpy().T.copy().T,
    "backwards": lambda t: t.numpy()[::-1].copy()[::-1],
    "float32": lambda t: t.float().numpy(),
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def losses_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(B, 4, dtype=torch.float64, generator=generator)
    return F.cross_entropy(model(x), torch.arange(B) % 3, reduction="none")


def same(got: Any, want: Any, form: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6 if form == "float32" else 1e-12, atol=1e-6)


@forms
def test_weights(model: nn.Module, form: str) -> None:
    weights = torch.rand(B, dtype=torch.float64)
    given = FORMS[form](weights)
    grads = []
    for each in (weights, given, lambda norms: given):
        model.zero_grad()
        pergrad.backward(losses_of(model), model, weights=each)
        grads.append([p.grad.clone() for p in model.parameters()])
    same(grads[1], grads[0], form)
    same(grads[2], grads[0], form)
    J = pergrad.gradients(losses_of(model), model)
    same(J.T @ given, J.T @ weights, form)
    same(J.scale(given).flat(), J.scale(weights).flat(), form)
    same(J.second_moment(given), J.second_moment(weights), form)
    got = pergrad.second_moments(losses_of(model), model, given)
    same(got, J.second_moment(weights), form)
    C = torch.rand(B, 2, dtype=torch.float64)
    same(J.T @ FORMS[form](C), J.T @ C, form)


def test_whole_numbers_in_a_list_are_weights(model: nn.Module) -> None:
    J = pergrad.gradients(losses_of(model), model)
    torch.testing.assert_close(J.T @ [1, 0, 2, 0, 1], J.T @ torch.tensor([1.0, 0, 2, 0, 1]))
    with pytest.raises(UsageError, match=r"J.T @ c takes one number per row, shape \(5,\)"):
        J.T @ [1, 0]
    with pytest.raises(UsageError, match=r"takes floating point numbers, not torch.int64"):
        J.T @ np.arange(B)


@forms
def test_directions(model: nn.Module, form: str) -> None:
    params = dict(model.named_parameters())
    parts = {n: torch.randn_like(p) for n, p in params.items()}
    v = torch.cat([p.flatten() for p in parts.values()])
    J = pergrad.gradients(losses_of(model), model)
    want, change = J @ v, FORMS[form]
    for given in (
        change(v), {n: change(p) for n, p in parts.items()}, [change(p) for p in parts.values()],
    ):  # fmt: skip
        same(J @ given, want, form)
        same(pergrad.dots(losses_of(model), model, against=given), want, form)
    V = {n: torch.stack([p, 2 * p]) for n, p in parts.items()}
    same(J @ {n: change(p) for n, p in V.items()}, torch.stack([want, 2 * want], 1), form)
    if form != "lists":
        same(J @ change(torch.stack([v, 2 * v], 1)), torch.stack([want, 2 * want], 1), form)
    with pytest.raises(UsageError, match=r"has shape \(3,\).*Pass a flat tensor \(51,\)"):
        J @ change(v[:3])


@forms
def test_preconditioners(model: nn.Module, form: str) -> None:
    J, change = pergrad.gradients(losses_of(model), model), FORMS[form]
    entry, A = torch.rand(6, 4, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    both = (A, A.new_tensor(2.0))
    kinds = pergrad.precondition.Diagonal, pergrad.precondition.Kronecker
    for kind, want in zip(kinds, (entry, both), strict=True):
        given = change(want) if isinstance(want, Tensor) else (change(want[0]), np.float32(2))
        one, other = (J.precondition(kind({"0.weight": e})).flat() for e in (want, given))
        same(other, one, form)


def test_rows_by_numbers_of_numpy(model: nn.Module) -> None:
    J = pergrad.gradients(losses_of(model), model)
    for index in (np.int64(2), torch.tensor(2), np.array([2]), np.arange(B) == 2):
        torch.testing.assert_close(J[index].flat(), J[2].flat())
    with pytest.raises(UsageError, match=r"indexed by row: a number"):
        J[np.True_]


def test_masks_and_ids() -> None:
    values, mask = torch.rand(3, 4), torch.tensor([[1, 1, 0, 1]] * 3)
    want = pergrad.per_example(values, mask)
    torch.testing.assert_close(pergrad.per_example(values, mask.numpy()), want)
    torch.testing.assert_close(pergrad.per_example(values, mask.tolist()), want)
    ids = torch.tensor([0, 0, 1])
    want = pergrad.per_example(values[:, 0], ids=ids)
    torch.testing.assert_close(pergrad.per_example(values[:, 0], ids=ids.numpy()), want)


def test_norms_of_a_noise_scale() -> None:
    norms, weights = torch.rand(B) + 1, torch.rand(B)
    for given in (norms, norms.numpy(), norms.tolist()):
        noise = pergrad.NoiseScale()
        noise.add(given, 0.7, weights.numpy() if given is not norms else weights)
        if given is norms:
            want = noise.trace
        assert noise.trace == pytest.approx(want, rel=1e-6)
    with pytest.raises(UsageError, match=r"`norms` is not a tensor or an array \(B,\)"):
        noise.add(["a"], 1.0)
    with pytest.raises(UsageError, match=r"`weights` is not \(5,\), as `norms` is"):
        noise.add(norms, 1.0, [1.0])


def test_a_scan_against_an_array(model: nn.Module, tmp_path: Path) -> None:
    data = [(torch.randn(4, dtype=torch.float64), i % 3) for i in range(4)]
    job = pergrad.Job(model, data, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    v = torch.randn(51, dtype=torch.float64)
    found = [
        pergrad.scan(job, tmp_path / str(k), against={"v": given}, progress=False)["dot:v"]
        for k, given in enumerate((v, v.numpy()))
    ]
    np.testing.assert_allclose(found[1], found[0])


def test_influences_by_numbers_of_numpy(model: nn.Module, tmp_path: Path) -> None:
    data = [(torch.randn(4, dtype=torch.float64), i % 3) for i in range(6)]
    job = pergrad.Job(model, data, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    options = {"progress": False, "groups": "layer"}
    found = pergrad.influence(job, data[:3], tmp_path / "found", **options)
    one, two = np.array([1, 2])
    assert found.top(one, two).to_pylist() == found.top(1, 2).to_pylist()
    assert found.bottom(one, two).to_pylist() == found.bottom(1, 2).to_pylist()
    assert found.by_layer(one) == found.by_layer(1)
    with pytest.raises(UsageError, match=r"There is no query 7: pass a number from 0 to 2"):
        found.top(np.int64(7))
    with pytest.raises(UsageError, match=r"There is no query 1.5: pass a number"):
        found.top(1.5)
    index = pergrad.sketch(job, tmp_path / "index", size=9, progress=False)
    answer = index.query(data[:3], np.int64(4), rerank=job)
    assert answer.top(one, two).to_pylist() == answer.top(1, 2).to_pylist()
    assert answer.recall(two) == pytest.approx(answer.recall(2))


def test_scores_of_an_evaluation(tmp_path: Path) -> None:
    data = [(torch.zeros(1), 2.0**i) for i in range(8)]

    def train(indices: list[int], seed: int) -> nn.Module:
        model = nn.Linear(1, 1)
        with torch.no_grad():
            model.bias.fill_(sum(data[i][1] for i in indices) / len(indices))
        return model

    job = pergrad.Job(train(list(range(8)), 0), data, lambda m, b: (m(b[0])[:, 0] - b[1]) ** 2)
    scores = torch.randn(2, 8)
    named = {"tensor": scores, "array": scores.numpy(), "lists": scores.tolist(),
             "float64": scores.numpy().astype(float)}  # fmt: skip
    asked = {"out": tmp_path, "subsets": 20, "seeds": 1, "progress": False}
    found = pergrad.evaluate(train, job, data[:2], named, **asked).scores
    assert found["tensor"] == found["array"] == found["lists"] == found["float64"]
    for wrong, match in (
        (scores.numpy().T, r"'influence' are \(8, 2\), for 2 queries and 8 examples"),
        ([["a"] * 8] * 2, r"'influence' are list.*a tensor, an array or lists"),
        (scores.numpy() * np.nan, r"not all finite"),
        (scores.numpy() * 1j, r"complex numbers\. Pass real ones"),
    ):
        with pytest.raises(UsageError, match=match):
            pergrad.evaluate(train, job, data[:2], wrong, **asked)
