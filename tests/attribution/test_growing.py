"""Sketches of a data set that grows, and folders that another data set is refused by."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attributing import job

import pergrad
from pergrad import StoreError


@pytest.fixture(params=["curved", "plain"])
def case(request: Any, tmp_path: Path) -> tuple[pergrad.Job, dict[str, Any]]:
    task = job("perceptron", torch.float32, 20)
    small = replace(task, data=task.data[:12])
    fit = pergrad.curvature(small, tmp_path / "fit") if request.param == "curved" else None
    return task, {"curvature": fit, "size": 8, "batch_size": 5}


def counted(task: pergrad.Job) -> tuple[pergrad.Job, list[int]]:
    """The same job, which notes who is fetched."""
    seen: list[int] = []

    class Data:
        def __len__(self) -> int:
            return len(task.data)

        def __getitem__(self, i: int) -> Any:
            seen.append(i)
            return task.data[i]

    return replace(task, data=Data()), seen


def test_only_new_examples_are_added(case: Any, tmp_path: Path) -> None:
    task, options = case
    out = tmp_path / "index"
    pergrad.sketch(replace(task, data=task.data[:12]), out, **options)
    before = {p.name for p in out.glob("rows-*")}
    grown, seen = counted(task)
    index = pergrad.sketch(grown, out, **options)
    assert set(seen) == {0, 11, *range(12, 20)}
    assert len(index) == 20
    assert before < {p.name for p in out.glob("rows-*")}
    whole = pergrad.sketch(task, tmp_path / "whole", **options)
    near = 2e-3 * float(whole.scores(task.data[:3]).abs().max())
    torch.testing.assert_close(
        index.scores(task.data[:3]), whole.scores(task.data[:3]), rtol=0, atol=near
    )
    again = pergrad.open_sketch(out, task, curvature=options["curvature"])
    assert torch.equal(again.scores(task.data[:3]), index.scores(task.data[:3]))
    with pytest.raises(StoreError, match=r"examples was 20 and is 12"):
        pergrad.sketch(replace(task, data=task.data[:12]), out, **options)


def test_growing_goes_on_after_a_stop(case: Any, tmp_path: Path) -> None:
    task, options = case
    out = tmp_path / "index"
    pergrad.sketch(replace(task, data=task.data[:12]), out, **options)

    class Stops:
        def __len__(self) -> int:
            return 20

        def __getitem__(self, i: int) -> Any:
            if i == 18:
                raise KeyboardInterrupt
            return task.data[i]

    with pytest.raises(KeyboardInterrupt):
        pergrad.sketch(replace(task, data=Stops()), out, **options)
    with pytest.raises(StoreError, match="is not finished"):
        pergrad.open_sketch(out, task, curvature=options["curvature"])
    assert len(pergrad.sketch(task, out, **options)) == 20


def test_other_data_are_refused(case: Any, tmp_path: Path) -> None:
    task, options = case
    out = tmp_path / "index"
    small = replace(task, data=task.data[:12])
    pergrad.sketch(small, out, **options)
    shifted = replace(task, data=task.data[1:])
    for other in (shifted, replace(task, data=task.data[1:13])):
        with pytest.raises(StoreError, match=r"example 0 has another gradient now.*go to the end"):
            pergrad.sketch(other, out, **options)
    assert len(pergrad.sketch(small, out, **options)) == 12


def test_keys_of_what_was_there_stay(case: Any, tmp_path: Path) -> None:
    task, options = case
    out = tmp_path / "index"
    pergrad.sketch(replace(task, data=task.data[:12], key=lambda i: f"a{i}"), out, **options)
    with pytest.raises(StoreError, match="examples was 12 and is 20"):
        pergrad.sketch(replace(task, key=lambda i: f"b{i}"), out, **options)
    index = pergrad.sketch(replace(task, key=lambda i: f"a{i}"), out, **options)
    assert len(index) == 20


def test_a_curvature_of_other_data(tmp_path: Path) -> None:
    task = job("perceptron", torch.float32, 20)
    pergrad.curvature(task, tmp_path)
    other = replace(task, data=[*task.data[1:], task.data[0]])
    with pytest.raises(StoreError, match=r"losses were \[.*and are \[.*Give this one another fold"):
        pergrad.curvature(other, tmp_path)


def test_keys_twice_in_a_sketch(case: Any, tmp_path: Path) -> None:
    task, options = case
    with pytest.raises(pergrad.UsageError, match=r"examples 0 and 3 have the same key, '0'.*Give"):
        pergrad.sketch(replace(task, key=lambda i: str(i % 3)), tmp_path / "index", **options)


@pytest.mark.parametrize("as_job", [False, True])
def test_a_query_at_fault_is_called_a_query(as_job: bool, tmp_path: Path) -> None:
    task = job("perceptron", torch.float32)
    queries: Any = [task.data[0], (torch.full((6,), float("nan")), 1)]
    if as_job:
        queries = replace(task, data=queries)
    with pytest.raises(pergrad.UsageError, match=r"^Query 1 has a loss that is not finite.*Take"):
        pergrad.influence(task, queries, tmp_path)


def test_pieces_of_a_sketch(case: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, options = case
    index = pergrad.sketch(task, tmp_path / "index", **options)
    want = index.scores(task.data[:3])
    for piece, cached in ((7, 3), (4, 4), (20, 1)):
        monkeypatch.setattr("pergrad.attribution.shards.PIECE", piece)
        monkeypatch.setattr("pergrad.attribution.shards.IN_CACHE", cached)
        torch.testing.assert_close(index.scores(task.data[:3]), want)
