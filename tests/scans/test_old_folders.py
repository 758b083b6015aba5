"""Folders that an earlier build wrote are read, gone on with, reported and scored again."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import stored
import torch

import pergrad
from pergrad.factors import constants
from pergrad.scans.previews import recall

STORES = Path(__file__).parents[1] / "data" / "stores"
WITHOUT = [i for i in range(stored.COUNT) if i != stored.BROKEN]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of all of them."""
    return shutil.copytree(STORES, tmp_path / "stores")


def against() -> dict[str, Any]:
    few = pickle.loads((STORES / "matrix.pickle").read_bytes())
    return {**stored.against(), "few": few}


def scan(folder: Path, **more: Any) -> pergrad.Scores:
    options = {"against": against(), **stored.SETTINGS, **more}
    return pergrad.scan(stored.job(), folder, **options)


def check(scores: pergrad.Scores) -> None:
    """Every number is that of the loop."""
    items = stored.Data()
    net = stored.model()
    grads = naive.alone_grads(
        lambda k: stored.losses(net, (items[WITHOUT[k]][0][None], torch.tensor([WITHOUT[k] % 2]))),
        net,
        len(WITHOUT),
    )
    table = scores.table()
    assert table["index"].to_pylist() == list(range(stored.COUNT))
    assert table["key"].to_pylist() == [stored.key(i) for i in range(stored.COUNT)]
    assert scores.failures().to_pylist() == [
        {"index": 5, "key": "example 5", "error": "ValueError: cannot read 5.png"}
    ]
    norms = torch.tensor(table["norm"].to_pylist()[:5] + table["norm"].to_pylist()[6:]).double()
    assert torch.allclose(norms, naive.norms(grads).double(), rtol=1e-6)
    few = pickle.loads((STORES / "matrix.pickle").read_bytes())
    flat = torch.cat([part.flatten(1) for part in few.dense().values()], 1)
    mine = torch.cat([part.flatten(1) for part in grads.values()], 1)
    for k in range(2):
        dots = [v for v in table[f"dot:few:{k}"].to_pylist() if v is not None]
        assert torch.allclose(torch.tensor(dots).double(), mine @ flat[k], rtol=1e-6, atol=1e-9)
    assert scores.complete
    assert scores.manifest["counts"]["failed"] == 1
    assert scores.damaged() == []


def test_a_finished_folder_is_read_and_nothing_is_scored_again(folder: Path) -> None:
    check(pergrad.open_scores(folder / "finished"))
    before = {p: p.read_bytes() for p in (folder / "finished").rglob("*.parquet")}
    check(scan(folder / "finished"))
    after = {p: p.read_bytes() for p in (folder / "finished" / "parts").rglob("*.parquet")}
    assert after == {p: before[p] for p in after}


def test_a_half_finished_folder_is_gone_on_with(folder: Path) -> None:
    assert len(pergrad.open_scores(folder / "half")) == 7
    old = set((folder / "half" / "parts").iterdir())
    check(scan(folder / "half"))
    assert old < set((folder / "half" / "parts").iterdir())
    whole = pergrad.open_scores(folder / "finished").table()
    for name in whole.column_names:  # what went on and what was whole are the same but for rounding
        ours = pergrad.open_scores(folder / "half").table()[name]
        if name not in ("key", "error"):
            np.testing.assert_allclose(ours.to_numpy(), whole[name].to_numpy(), rtol=1e-6)


def test_failed_and_damaged_examples_are_scored_again(folder: Path) -> None:
    class Mended(stored.Data):
        def __getitem__(self, i: int) -> Any:
            return stored.numbers(3, start=3 * i), i % 2

    job = pergrad.Job(stored.model(), Mended(), stored.losses, key=stored.key, show=stored.show)
    part = next((folder / "finished" / "parts").glob("part-000000000000-*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(pergrad.StoreError, match='rescore="damaged"'):
        scan(folder / "finished")
    check(scan(folder / "finished", rescore="damaged"))
    mended = pergrad.scan(
        job, folder / "finished", rescore="failed", against=against(), **stored.SETTINGS
    )
    assert len(mended.failures()) == 0
    assert mended.complete


def test_its_reference_is_used_and_another_is_refused(folder: Path) -> None:
    kept = next((folder / "half" / "references").iterdir())
    before = kept.read_bytes()
    scan(folder / "half")
    assert kept.read_bytes() == before
    other = {**against(), "valid": pergrad.MeanGradient(stored.validation()[:2])}
    with pytest.raises(pergrad.StoreError, match="'valid' has other values"):
        scan(folder / "half", against=other)


def test_its_previews_are_reported(folder: Path, tmp_path: Path) -> None:
    scores = pergrad.open_scores(folder / "finished")
    shown = recall(scores._store)
    assert shown[3].text == "text 3"
    assert shown[4].more == {"size": "4"}
    page = scores.report(tmp_path / "page.html").read_text()
    assert "text 3" in page
    assert "cannot read 5.png" in page


def test_measured_costs_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(constants.FOLDER, str(folder / "costs"))
    kind = json.loads(next((folder / "costs").iterdir()).read_text())["measured on"]
    assert constants._read(kind).gram_overhead == 2.25
    assert constants._read("another machine") == constants.DEFAULT


def test_a_pickled_matrix_is_read() -> None:
    J = pickle.loads((STORES / "matrix.pickle").read_bytes())
    assert torch.allclose(J.gram(), stored.matrix().gram())
