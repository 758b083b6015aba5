"""Cheap scores: BM25 by its formula. `make integrations` installs what it needs and runs these."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pergrad
from pergrad.attribution.baselines import bm25

pytestmark = pytest.mark.integrations

TEXTS = ["The king is dead, long live the king!", "", "A storm at sea: the sea, the SEA.", "king"]


def by_formula(query: str, texts: list[str]) -> list[float]:
    """Lucene's BM25 with k1 = 1.5 and b = .75; words have two letters or more."""
    words = [re.findall(r"\b\w\w+\b", text.lower()) for text in texts]
    mean, found = sum(map(len, words)) / len(words), []
    for own in words:
        score = 0.0
        for word in re.findall(r"\b\w\w+\b", query.lower()):
            there = sum(word in each for each in words)
            rare = math.log(1 + (len(words) - there + 0.5) / (there + 0.5))
            often = own.count(word)
            score += rare * often / (often + 1.5 * (0.25 + 0.75 * len(own) / mean))
        found.append(score)
    return found


def test_bm25_is_its_formula() -> None:
    queries = ["the King of the sea", "nothing known", "", "dead dead king"]
    found = bm25(queries, TEXTS)
    assert found.shape == (4, 4)
    for row, query in zip(found, queries, strict=True):
        assert row == pytest.approx(by_formula(query, TEXTS), rel=1e-5)
    assert not bm25(["king"], ["", "?"]).any()


def test_it_stands_beside_influences_of_texts(tmp_path: Path) -> None:
    """A model that counts words: what says the same words is what drives a prediction."""
    names = ["king", "storm", "sea", "ghost", "island"]
    data = [(f"{names[i % 5]} {names[(i * 2) % 5]}", float(i % 5)) for i in range(20)]

    def collate(items: list[Any]) -> Any:
        rows = [[text.split().count(n) for n in names] for text, _ in items]
        return torch.tensor(rows, dtype=torch.float64), torch.tensor([y for _, y in items])

    def losses(net: nn.Module, batch: Any) -> torch.Tensor:
        return (net(batch[0])[:, 0] - batch[1]).square()

    def train(indices: list[int], seed: int) -> nn.Module:
        x, y = collate([data[i] for i in indices])
        net = nn.Linear(5, 1, bias=False, dtype=torch.float64)
        w = torch.linalg.solve(x.mT @ x + torch.eye(5), x.mT @ y.double())
        with torch.no_grad():
            net.weight.copy_(w[None])
        return net

    job = pergrad.Job(train(list(range(20)), 0), data, losses, collate=collate)
    asked = replace(job, data=data[:3])
    found = pergrad.influence(job, asked, tmp_path / "found", method="kernel")
    result = pergrad.evaluate(
        train, job, asked, found, out=tmp_path / "lds", subsets=20, seeds=1,
        text=lambda item: item[0],
    )  # fmt: skip
    assert set(result.scores) == {"influence", "random", "last layer's neighbours", "BM25"}
    assert np.isfinite(result.scores["BM25"].lds)
    with pytest.raises(pergrad.UsageError, match=r"text returned a float for item 0. Return its"):
        pergrad.evaluate(
            train, job, asked, found, out=tmp_path / "lds", subsets=20, seeds=1,
            text=lambda item: item[1],
        )  # fmt: skip
