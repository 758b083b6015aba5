"""Columns added to finished scores: the numbers of one scan, and nothing scored again."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from scanning import Listed, data, job, scan

import pergrad
from pergrad.scans import adding, writer
from pergrad.scans.store import Store

MORE: dict[str, Any] = {
    "groups": "layer",
    "against": {"mean": pergrad.MeanGradient(data(5)), "few": pergrad.Gradients(data(2))},
}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ROWS_PER_PART", 16)


def broken(at: dict[int, Any] | None = None) -> pergrad.Job:
    return job(data=Listed(data(40), {29: ValueError("broken"), **(at or {})}))


def check(folder: Path, whole: pergrad.Scores) -> None:
    scores = pergrad.open_scores(folder)
    assert scores.complete
    assert scores.damaged() == []
    table = scores.table()
    for name in whole.table().column_names:
        got, want = table[name], whole.table()[name]
        assert got.is_null().equals(want.is_null())
        if name in ("index", "error"):
            assert got.equals(want)
        else:  # loss and norm were scored without the rest, so they may be rounded otherwise
            assert np.allclose(scores[name], whole[name], rtol=1e-12, atol=1e-14, equal_nan=True)
    assert table.schema.equals(whole.table().schema, check_metadata=True)
    assert scores.manifest["counts"] == whole.manifest["counts"]
    assert not list(folder.glob("adding-*"))
    frame = pl.read_parquet(folder / "parts" / "*.parquet")  # all parts are of one form
    assert frame.sort("index")["norm:3"].to_list() == table["norm:3"].to_pylist()


@pytest.fixture
def whole(tmp_path: Path) -> pergrad.Scores:
    return scan(broken(), tmp_path / "whole", batch_size=8, **MORE)


def test_columns_are_those_of_one_scan(tmp_path: Path, whole: pergrad.Scores) -> None:
    out = tmp_path / "s"
    scan(broken(), out, batch_size=8)
    scan(broken(), out, batch_size=8, groups="layer")
    added = scan(broken(), out, **MORE)
    assert added.manifest["columns"] == whole.manifest["columns"]
    check(out, whole)
    table = added.table()
    assert scan(broken(), out, **MORE).table().equals(table)
    assert added.failures()["index"].to_pylist() == [29]


def test_other_engines_may_add(tmp_path: Path, whole: pergrad.Scores) -> None:
    out = tmp_path / "s"
    scan(broken(), out, batch_size=8)
    scan(broken(), out, workers=1, **MORE)
    check(out, whole)


@pytest.mark.parametrize("at", [3, 17, 39])
def test_a_stop_while_they_are_scored(at: int, tmp_path: Path, whole: pergrad.Scores) -> None:
    out = tmp_path / "s"
    before = scan(broken(), out, batch_size=8).table()
    with pytest.raises(KeyboardInterrupt):
        scan(broken({at: KeyboardInterrupt()}), out, recheck=False, **MORE)
    scores = pergrad.open_scores(out)  # as they were
    assert scores.complete
    assert scores.table().equals(before)
    assert scan(broken(), out).table().equals(before)
    scan(broken(), out, **MORE)
    check(out, whole)


class Stop(BaseException):
    """As a kill would be, but for the process."""


@pytest.mark.parametrize("at", range(9))
def test_a_stop_while_they_are_put_beside(
    at: int, tmp_path: Path, whole: pergrad.Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each file is removed, and before the manifest is written."""
    out = tmp_path / "s"
    before = scan(broken(), out, batch_size=8).table()
    calls = 0

    def counted(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at + 1:
                raise Stop
            return real(*arguments)

        return call

    monkeypatch.setattr(adding, "_remove", counted(adding._remove))
    monkeypatch.setattr(adding.shutil, "rmtree", counted(adding.shutil.rmtree))
    try:
        scan(broken(), out, **MORE)
    except Stop:
        scores = pergrad.open_scores(out)
        assert scores.complete  # each example once, also where a part is there twice
        table = scores.table()
        assert table.select(before.column_names).equals(before) or len(table.column_names) > 4
        assert table["index"].to_pylist() == list(range(40))
    monkeypatch.undo()
    monkeypatch.setattr(writer, "ROWS_PER_PART", 16)
    scan(broken(), out, **MORE)
    assert Store(out).superseded() == []
    check(out, whole)


@pytest.mark.parametrize(("first", "once"), [(1, 1), (2, 1), (3, 1), (1, 64)])
@pytest.mark.parametrize("second", range(5))
def test_other_columns_after_a_stop_and_another(
    first: int, second: int, once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some parts have the columns of a checkpoint that nobody asks for any more."""
    out, state = tmp_path / "s", job().model.state_dict()
    before = scan(broken(), out, batch_size=8).table()
    points = [{n: t + k for n, t in state.items()} for k in range(3)]
    want = scan(broken(), tmp_path / "d", batch_size=8, checkpoints={"d": points[1]}).table()
    monkeypatch.setattr(adding, "PARTS_AT_ONCE", once)
    remove = adding._remove
    for name, point, at in (("c", points[0], first), ("d", points[1], second)):
        left = iter(range(at))

        def stopping(*arguments: Any, left: Any = left) -> None:
            if next(left, None) is None:
                raise Stop
            remove(*arguments)

        monkeypatch.setattr(adding, "_remove", stopping)
        try:
            scan(broken(), out, checkpoints={name: point})
        except Stop:
            assert pergrad.open_scores(out).table().equals(before)
    monkeypatch.setattr(adding, "_remove", remove)
    scores = scan(broken(), out, checkpoints={"d": points[1]})
    assert scores.complete
    assert scores.table().equals(want)
    # what was scored of the first is still there, for the very same
    with pytest.raises(pergrad.StoreError, match="checkpoint 'c' has other values"):
        scan(broken(), out, checkpoints={"d": points[1], "c": points[2]})
    scores = scan(broken(), out, checkpoints={"d": points[1], "c": points[0]})
    other = scan(broken(), tmp_path / "c", batch_size=8, checkpoints={"c": points[0]})
    assert np.array_equal(scores["norm@c"], other["norm@c"], equal_nan=True)


def test_parts_say_for_which_columns_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference of the same name, after the folder with the first one's scores was removed."""
    out = tmp_path / "s"
    scan(broken(), out, batch_size=8)
    monkeypatch.setattr(adding, "PARTS_AT_ONCE", 1)
    left, remove = iter(range(2)), adding._remove

    def stopping(*arguments: Any) -> None:
        if next(left, None) is None:
            raise Stop
        remove(*arguments)

    monkeypatch.setattr(adding, "_remove", stopping)
    with pytest.raises(Stop):
        scan(broken(), out, against={"m": pergrad.MeanGradient(data(5))})
    monkeypatch.setattr(adding, "_remove", remove)
    for folder in [*out.glob("adding-*"), out / "references"]:
        shutil.rmtree(folder, ignore_errors=True)
    against = {"m": pergrad.MeanGradient(data(7))}
    scores = scan(broken(), out, against=against)
    want = scan(broken(), tmp_path / "want", batch_size=8, against=against)
    assert np.array_equal(scores["dot:m"], want["dot:m"], equal_nan=True)
    assert scores.table().schema.metadata is None


def test_a_stop_while_the_rest_is_removed(tmp_path: Path, whole: pergrad.Scores) -> None:
    """The folder of the scan for the columns has lost its manifest, and still has parts."""
    out = tmp_path / "s"
    scan(broken(), out, batch_size=8)
    scan(broken(), out, **MORE)
    (out / "adding-cut-off" / "parts").mkdir(parents=True)
    (out / "adding-cut-off" / "parts" / "part-0.old").touch()
    scan(broken(), out, **MORE)
    check(out, whole)


def test_an_example_that_fails_now(tmp_path: Path, whole: pergrad.Scores) -> None:
    out = tmp_path / "s"
    before = scan(broken(), out, batch_size=8).table()
    away = broken({13: OSError("the disk is away")})
    says = r"1 examples have scores(.|\n)*13 raised OSError: the disk(.|\n)*Run the same scan again"
    with pytest.raises(pergrad.StoreError, match=says):
        scan(away, out, recheck=False, **MORE)
    assert pergrad.open_scores(out).table().equals(before)
    scan(broken(), out, **MORE)
    check(out, whole)


def test_what_is_not_only_more_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "s"
    scan(broken(), out, batch_size=8, against={"mean": pergrad.MeanGradient(data(5))})
    for more, says in (
        ({"groups": "layer"}, "'mean' is not given any more"),
        ({"groups": "layer", **MORE, "seed": 3}, "seed was 0"),
        ({"groups": "layer", "against": {"mean": pergrad.MeanGradient(data(4))}}, "other values"),
    ):
        with pytest.raises(pergrad.StoreError, match=rf"{says}(.|\n)*another folder"):
            scan(broken(), out, **more)


def test_unfinished_scores_get_no_columns(tmp_path: Path) -> None:
    out = tmp_path / "s"
    with pytest.raises(KeyboardInterrupt):
        scan(broken({20: KeyboardInterrupt()}), out, batch_size=8)
    with pytest.raises(pergrad.StoreError, match=r"groups was(.|\n)*first finish the scan"):
        scan(broken(), out, groups="layer")
    scan(broken(), out)
    with pytest.raises(pergrad.StoreError, match=r"new columns(.|\n)*as it was begun, then with"):
        scan(broken(), out, groups="layer", rescore="failed")
    next((out / "parts").iterdir()).unlink()
    with pytest.raises(pergrad.StoreError, match=r"norm:0(.|\n)*as it was begun, then with"):
        scan(broken(), out, groups="layer")
