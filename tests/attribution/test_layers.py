"""Scores in parts, one for each layer: against dense gradients, and on the page."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from crews import options_of, queries, task

import pergrad
from pergrad.errors import UsageError


def dense(own: pergrad.Job, items: list) -> dict[str, torch.Tensor]:
    """(B, n) of each layer's parameters."""
    batch = torch.utils.data.default_collate(items)
    rows = pergrad.gradients(own.losses(own.model, batch), own.model).dense()
    layers: dict[str, list[torch.Tensor]] = {}
    for n, t in rows.items():
        layers.setdefault(n.rpartition(".")[0], []).append(t.flatten(1))
    return {layer: torch.cat(parts, 1) for layer, parts in layers.items()}


def parts_of(found: pergrad.Influence, query: int) -> dict[int, dict[str, float]]:
    parts: dict[int, dict[str, float]] = {}
    for row in found.by_layer(query).to_pylist():
        parts.setdefault(row["index"], {})[row["layer"]] = row["score"]
    return parts


@pytest.mark.parametrize("kind", ["dots", "cosines", "checkpoints", "solve", "terms", "refined"])
def test_parts_add_up_to_the_score(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pergrad.attribution.queries.MOST_QUERY_BYTES", 3000)
    own = task()
    fit = pergrad.curvature(own, tmp_path / "fit")
    options = options_of(kind, own, fit)
    found = pergrad.influence(
        own, queries(), tmp_path / "found", groups="layer", batch_size=2, **options
    )
    assert found.by_layer(0).schema.metadata[b"sign"] == found.sign.encode()
    for q in range(3):
        parts = parts_of(found, q)
        for table in (found.top(q, 3), found.bottom(q, 3)):
            for row in table.to_pylist():
                assert set(parts[row["index"]]) == {"0", "2"}
                total = sum(parts[row["index"]].values())
                np.testing.assert_allclose(total, row["score"], rtol=1e-9, atol=1e-13)
    assert not list((tmp_path / "found").glob("solved*"))


@pytest.mark.parametrize("solved", [False, True])
def test_a_part_is_that_of_the_layers_gradients(solved: bool, tmp_path: Path) -> None:
    own = task()
    fit = pergrad.curvature(own, tmp_path / "fit")
    options = options_of("solve" if solved else "dots", own, fit)
    found = pergrad.influence(own, queries(), tmp_path / "found", groups="layer", **options)
    G = dense(own, own.data)
    batch = torch.utils.data.default_collate(queries())
    K = pergrad.gradients(own.losses(own.model, batch), own.model)
    rows = (K.precondition(fit) if solved else K).dense()
    for q in range(3):
        for i, parts in parts_of(found, q).items():
            for layer, part in parts.items():
                names = [n for n in rows if n.rpartition(".")[0] == layer]
                k = torch.cat([rows[n][q].flatten() for n in names])
                want = float(G[layer][i] @ k) / (fit.examples if solved else 1)
                np.testing.assert_allclose(part, want, rtol=1e-9, atol=1e-13)


def test_a_finished_folder_gets_them_and_the_page_shows_them(tmp_path: Path) -> None:
    own = task()
    fit = pergrad.curvature(own, tmp_path / "fit")
    options = options_of("refined", own, fit)
    found = pergrad.influence(own, queries(), tmp_path / "found", **options)
    for ask in (lambda: found.by_layer(0), lambda: found.report(tmp_path / "p.html", by="layer")):
        with pytest.raises(UsageError, match=r"has no scores by layer.*groups=\"layer\""):
            ask()
    before = {path.name for path in (tmp_path / "found").iterdir()}
    found = pergrad.influence(own, queries(), tmp_path / "found", groups="layer", **options)
    new = {path.name for path in (tmp_path / "found").iterdir()} - before
    assert [name.partition("-")[0] for name in new] == ["layers"]
    text = found.report(tmp_path / "page.html", by="layer").read_text()
    drawn = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert drawn["layers"] == ["0", "2"]
    index, score = drawn["queries"][1]["high"][0]
    shown = drawn["queries"][1]["layers"][str(index)]
    assert abs(shown[0][1]) >= abs(shown[1][1])
    assert sum(part for _, part in shown) == pytest.approx(score, rel=1e-3)
    assert "layers" not in json.loads(
        re.search(
            r'id="data">(.*?)</script>', found.report(tmp_path / "p.html").read_text(), re.DOTALL
        )[1]
    )


def test_what_cannot_be_taken_apart(tmp_path: Path) -> None:
    own = task()
    with pytest.raises(UsageError, match=r"groups is 'parameter'; pass \"layer\", or None"):
        pergrad.influence(own, queries(), tmp_path, groups="parameter")
    with pytest.raises(UsageError, match=r"method 'kernel' is none\. Leave out groups"):
        pergrad.influence(own, queries(), tmp_path, groups="layer", method="kernel")
    found = pergrad.influence(own, queries(), tmp_path / "found", groups="layer")
    with pytest.raises(UsageError, match=r"of query 3: pass a number from 0 to 2"):
        found.by_layer(3)
    with pytest.raises(UsageError, match=r"by is 'parameter'; pass \"layer\", or None"):
        found.report(tmp_path / "p.html", by="parameter")
