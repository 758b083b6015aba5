"""The ranks of torchrun do one call of attribution together."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from attributing import job
from crews import KINDS, Training, assert_same, options_of, queries, scores, task
from tests.ranks import free_port, on_ranks

import pergrad
from pergrad.attribution import ranking, together


class Calls:
    """The calls of one rank."""

    def __init__(self, out: Path, how: dict[str, Any]) -> None:
        self.out, self.how = out, how
        self.mine = job(how.get("name", "perceptron"))

    def curvature(self) -> object:
        kind = self.how.get("kind", "ekfac")
        return pergrad.curvature(self.mine, self.out / "fit", kind=kind, batch_size=2, **ON_RANKS)

    def influence(self) -> object:
        for kind in self.how["kinds"]:
            options = options_of(kind, self.mine, self.curvature())
            found = pergrad.influence(
                self.mine, queries(), self.out / kind, batch_size=2, **options, **ON_RANKS
            )
        return found

    def full(self) -> object:
        """The disk of the first rank takes no more, after the first file."""
        if int(os.environ["RANK"]) == 0:
            add = ranking.Folder.add

            def fails(self: object, kind: str, first: int, *rest: object) -> object:
                if first > 0:
                    raise pergrad.StoreError("no room")
                return add(self, kind, first, *rest)

            ranking.Folder.add = fails
        return self.influence()

    def sketch(self) -> object:
        for fit in (None, self.curvature()):
            place = self.out / f"index {fit is None}"
            index = pergrad.sketch(
                self.mine, place, curvature=fit, size=16, batch_size=2, **ON_RANKS
            )
        return index.size

    def evaluate(self) -> object:
        out = self.out / "e"
        return pergrad.evaluate(
            Training(), self.mine, queries(), scores(), out=out, subsets=20, **ON_RANKS
        )


ON_RANKS: Any = {"engine": "torchrun"}


def _rank(rank: int, ranks: int, port: int, out: Path, call: str, how: dict[str, Any]) -> None:
    names = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    together.MOST = 1
    ranking.SECONDS_BETWEEN_FILES = 0.0
    calls = Calls(out, how)
    if how.get("differ") and rank:
        with torch.no_grad():
            calls.mine.model[0].weight.add_(1)
    if how.get("nan"):
        calls.mine.data[7] = (calls.mine.data[7][0] * float("nan"), 0)
    try:
        said = repr(getattr(calls, call)())
    except pergrad.PergradError as error:
        said = f"{type(error).__name__}: {error}"
    Path(f"{out}.said.{rank}").write_text(said)
    # gloo's threads sometimes abort a process that takes them down in order, with or without us
    os._exit(0)


def torchrun(out: Path, call: str = "curvature", ranks: int = 2, **how: object) -> list[str]:
    """What the ranks say, each in the environment that torchrun makes for it."""
    out.mkdir(exist_ok=True)
    on_ranks(_rank, ranks, free_port(), out, call, how, count=ranks)
    return [Path(f"{out}.said.{rank}").read_text() for rank in range(ranks)]


@pytest.mark.parametrize(("name", "kind"), [("tied", "ekfac"), ("images", "shampoo")])
def test_ranks_get_what_one_process_gets(name: str, kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for told in torchrun(out, name=name, kind=kind):
        assert told.startswith(f"Curvature ({kind}, labels all)")
        assert "from 11 examples" in told
    mine = job(name)
    found = pergrad.curvature(mine, out / "fit", kind=kind)  # type: ignore[arg-type]  # opens it
    alone = pergrad.curvature(mine, tmp_path / "alone", kind=kind)  # type: ignore[arg-type]
    for weight, block in alone.blocks.items():
        own = found.blocks[weight]
        torch.testing.assert_close(own.Lambda.sum(), block.Lambda.sum())
        if block.A is not None:
            torch.testing.assert_close(own.A, block.A)
            torch.testing.assert_close(own.S, block.S)
    G = {n: torch.randn(3, *p.shape).double() for n, p in mine.model.named_parameters()}
    for n, part in alone.solve(G).items():
        torch.testing.assert_close(found.solve(G)[n], part, rtol=1e-5, atol=1e-6)
    assert not list((out / "fit").glob("state-*"))


def test_ranks_score_as_one_process_does(tmp_path: Path) -> None:
    out, mine = tmp_path / "out", task()
    said = torchrun(out, "influence", kinds=KINDS)
    assert said[0] == said[1]
    fit = pergrad.curvature(mine, out / "fit")  # opens it
    for kind in KINDS:
        alone = pergrad.influence(
            mine, queries(), tmp_path / kind, batch_size=2, **options_of(kind, mine, fit)
        )
        assert_same(pergrad.Influence(out / kind), alone)


def test_ranks_sketch_and_retrain(tmp_path: Path) -> None:
    out, mine = tmp_path / "out", task()
    assert torchrun(out, "sketch") == ["16", "16"]
    fit = pergrad.curvature(mine, out / "fit")  # opens it
    for each in (None, fit):
        found = pergrad.open_sketch(out / f"index {each is None}", mine, curvature=each)
        alone = pergrad.sketch(mine, tmp_path / f"{each is None}", curvature=each, size=16)
        torch.testing.assert_close(found.scores(queries()), alone.scores(queries()))
    said = torchrun(out, "evaluate")
    alone = pergrad.evaluate(
        Training(), mine, queries(), scores(), out=tmp_path / "e", subsets=20
    )  # fmt: skip
    assert said == [repr(alone)] * 2


def test_ranks_that_stop_are_gone_on_with_by_any_number(tmp_path: Path) -> None:
    """The first run ends where the disk is full: an error on the leader is one on all."""
    out, mine = tmp_path / "out", task()
    first, second = torchrun(out, "full", kinds=["dots"])
    assert first == "StoreError: no room"
    assert second.startswith("WorkerError: Rank 0 has failed")
    begun = list((out / "dots").glob("pairs0-*"))
    assert len(begun) == 1
    torchrun(out, "influence", 3, kinds=["dots"])
    assert begun[0] in (out / "dots").glob("pairs0-*")
    alone = pergrad.influence(mine, queries(), tmp_path / "alone", batch_size=2)
    assert_same(pergrad.Influence(out / "dots"), alone)


def test_ranks_that_differ(tmp_path: Path) -> None:
    for told in torchrun(tmp_path / "out", differ=True):
        assert told.startswith("UsageError: Rank 1 would compute something else than rank 0:")
        assert "weights_hash was" in told
        assert "Load the same weights" in told


def test_an_error_on_one_rank_is_one_on_all(tmp_path: Path) -> None:
    said = torchrun(tmp_path / "out", nan=True)
    assert sorted(each.split(":")[0] for each in said) == ["UsageError", "WorkerError"]
    assert all("Example 7 has a model output that is not finite" in each for each in said)


def test_engines_that_are_none(tmp_path: Path) -> None:
    mine = job("perceptron")
    with pytest.raises(pergrad.UsageError, match=r"engine is 'spark'; pass \"local\", \"ray\" or"):
        pergrad.curvature(mine, tmp_path, engine="spark")  # type: ignore[arg-type]
    with pytest.raises(pergrad.UsageError, match=r"workers is for engine=\"ray\".*Leave out"):
        pergrad.influence(mine, mine.data, tmp_path, workers=2)
    with pytest.raises(pergrad.UsageError, match=r"workers is 0; pass a positive number"):
        pergrad.influence(mine, mine.data, tmp_path, engine="ray", workers=0)
    with pytest.raises(pergrad.UsageError, match=r"Start the script with `torchrun"):
        pergrad.curvature(mine, tmp_path / "fit", engine="torchrun")
