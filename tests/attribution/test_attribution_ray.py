"""Workers of Ray do the tasks of a call: the numbers of one process, whatever happens to them."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from crews import (
    Deadly,
    Training,
    assert_same,
    measured,
    options_of,
    queries,
    scores,
    task,
)

import pergrad
from pergrad.attribution import ranking, together
from pergrad.scans.runners import ray_workers


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Ray, initialised by the caller."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with other things is no reason for a warning here."""
    monkeypatch.setattr(ray_workers, "PATIENCE", 3600.0)
    monkeypatch.setattr(together, "MOST", 1)  # many small tasks
    monkeypatch.setattr(ranking, "SECONDS_BETWEEN_FILES", 0.0)


@pytest.fixture
def deaths(tmp_path: Path) -> Path:
    """Where those who die are counted."""
    folder = tmp_path / "deaths"
    folder.mkdir()
    return folder


ON_RAY = {"engine": "ray", "workers": 2, "batch_size": 2}


def test_a_curvature_and_what_is_solved_with_it(cluster: None, tmp_path: Path) -> None:
    mine = replace(task(), key=lambda i: f"example {i}", show=lambda i: threading.Lock())
    fit = pergrad.curvature(mine, tmp_path / "ray", **ON_RAY)
    alone = pergrad.curvature(mine, tmp_path / "alone", batch_size=2)
    for weight, block in alone.blocks.items():
        torch.testing.assert_close(fit.blocks[weight].A, block.A)
        torch.testing.assert_close(fit.blocks[weight].Lambda.sum(), block.Lambda.sum())
    options = options_of("refined", mine, alone)
    found = pergrad.influence(mine, queries(), tmp_path / "found", **options, **ON_RAY)
    assert_same(found, pergrad.influence(mine, queries(), tmp_path / "one", **options))


@pytest.mark.parametrize("kind", ["checkpoints", pytest.param("kernel", marks=pytest.mark.slow)])
def test_scores_are_those_of_one_process(cluster: None, kind: str, tmp_path: Path) -> None:
    mine = task()
    options = options_of(kind, mine, None)
    asked = measured(mine)
    found = pergrad.influence(mine, asked, tmp_path / "ray", **options, **ON_RAY)
    assert_same(found, pergrad.influence(mine, asked, tmp_path / "one", batch_size=2, **options))


def test_a_worker_that_dies_costs_its_task(cluster: None, tmp_path: Path, deaths: Path) -> None:
    mine = task()
    alone = pergrad.influence(mine, queries(), tmp_path / "one", batch_size=2)
    killing = replace(mine, data=Deadly(mine.data, 7, deaths))
    with pytest.warns(pergrad.WorkerWarning, match=r"examples .*6 to 7.* handed out again"):
        found = pergrad.influence(killing, queries(), tmp_path / "ray", **ON_RAY)
    assert len(list(deaths.iterdir())) == 1
    assert_same(found, alone)


def test_what_a_worker_cannot_survive_is_named_and_gone_on_with(
    cluster: None, tmp_path: Path, deaths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "DEATHS", 2)
    mine = task()
    killing = replace(mine, data=Deadly(mine.data, 7, deaths, times=2))
    with (
        pytest.warns(pergrad.WorkerWarning),
        pytest.raises(pergrad.WorkerError, match=r"on examples 6 to 7\.(.|\n)*Make the same call"),
    ):
        pergrad.influence(killing, queries(), tmp_path / "ray", **ON_RAY)
    begun = sorted(each.name for each in (tmp_path / "ray").glob("pairs0-*"))
    assert [each[:21] for each in begun] == [
        f"pairs0-{first:012d}-0"[:21] for first in range(0, 6, 2)
    ]
    found = pergrad.influence(
        killing, queries(), tmp_path / "ray", engine="ray", workers=1, batch_size=2
    )
    assert set(begun) < {each.name for each in (tmp_path / "ray").glob("pairs0-*")}
    assert_same(found, pergrad.influence(mine, queries(), tmp_path / "one", batch_size=2))


def test_what_is_raised_on_a_worker_is_raised_here(cluster: None, tmp_path: Path) -> None:
    mine = task()
    mine.data[7] = (mine.data[7][0] * float("nan"), 0)
    with pytest.raises(pergrad.UsageError, match="Example 7 has a loss that is not finite"):
        pergrad.influence(mine, queries(), tmp_path, **ON_RAY)


def test_queries_that_cannot_be_sent_are_named(cluster: None, tmp_path: Path) -> None:
    mine, guard = task(), threading.Lock()
    asked = replace(mine, losses=lambda net, batch: guard and net(batch[0])[:, 0])
    match = r"`queries\.losses -> guard` \(_thread\.lock\)(.|\n)*engine=\"local\""
    with pytest.raises(pergrad.UsageError, match=match):
        pergrad.influence(mine, asked, tmp_path, **ON_RAY)


@pytest.mark.parametrize("fitted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_sketch_is_that_of_one_process(cluster: None, fitted: bool, tmp_path: Path) -> None:
    mine = task()
    fit = pergrad.curvature(mine, tmp_path / "fit") if fitted else None
    found = pergrad.sketch(mine, tmp_path / "ray", curvature=fit, size=16, **ON_RAY)
    alone = pergrad.sketch(mine, tmp_path / "one", curvature=fit, size=16, batch_size=2)
    torch.testing.assert_close(found.scores(queries()), alone.scores(queries()))


def evaluated(train: object, out: Path, **more: object) -> pergrad.Evaluation:
    return pergrad.evaluate(train, task(), queries(), scores(), out=out, subsets=20, **more)


def test_a_worker_that_dies_costs_its_retraining(
    cluster: None, tmp_path: Path, deaths: Path
) -> None:
    alone = evaluated(Training(), tmp_path / "one")
    at = int(alone.members[3].nonzero()[0][0]), 1
    with pytest.warns(pergrad.WorkerWarning, match=r"retrainings on subset \d+ with seed 1, which"):
        found = evaluated(Training(at, deaths), tmp_path / "ray", engine="ray", workers=2)
    assert len(list(deaths.iterdir())) == 1
    assert repr(found) == repr(alone)
    np.testing.assert_array_equal(found.outputs, alone.outputs)


@pytest.mark.slow
def test_a_retraining_that_kills_is_named_when_all_others_are_done(
    cluster: None, tmp_path: Path, deaths: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_workers, "DEATHS", 2)
    alone = evaluated(Training(), tmp_path / "one")
    at = int(alone.members[0].nonzero()[0][0]), 0
    match = r"on subset \d+ with seed 0\. All other(.|\n)*Make the same call again"
    with (
        pytest.warns(pergrad.WorkerWarning) as said,
        pytest.raises(pergrad.WorkerError, match=match),
    ):
        evaluated(Training(at, deaths, 2), tmp_path / "ray", engine="ray", workers=1)
    assert "with seed 0, which are set aside" in str(said[-1].message)
    done = list((tmp_path / "ray").glob("outputs-*"))
    assert len(done) == 39
    found = evaluated(Training(), tmp_path / "ray")
    assert set(done) < set((tmp_path / "ray").glob("outputs-*"))
    np.testing.assert_array_equal(found.outputs, alone.outputs)


def test_a_training_that_cannot_be_sent_is_named(cluster: None, tmp_path: Path) -> None:
    guard = threading.Lock()
    match = r"`train -> guard` \(_thread\.lock\)(.|\n)*engine=\"local\""
    with pytest.raises(pergrad.UsageError, match=match):
        evaluated(lambda indices, seed: guard, tmp_path, engine="ray", workers=1)
