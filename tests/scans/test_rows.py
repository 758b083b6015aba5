"""Scores in the hand: arrays, data frames, tables that a person reads."""

import copy
import os
import pickle
import re
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from scanning import Listed, data, job, scan

import pergrad
from pergrad.command import main
from pergrad.scans.rows import MOST_ROWS, Rows, as_table


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> pergrad.Scores:
    broken = Listed(data(90), {41: OSError("cannot read 41.png")})
    return scan(
        job(data=broken, key=lambda i: f"train/{i}"),
        tmp_path_factory.mktemp("scores"),
        groups="parameter",
    )


def test_a_column_is_an_array(scores: pergrad.Scores) -> None:
    norms = scores["norm"]
    assert isinstance(norms, np.ndarray)
    assert norms.dtype == np.float64
    assert np.isnan(norms[41])
    assert norms[7] == scores.table()["norm"][7].as_py()
    assert np.array_equal(scores["index"], np.arange(90))
    assert scores["key"][3] == "train/3"
    with pytest.raises(pergrad.StoreError, match=r"no column speed(.|\n)*columns are: index"):
        scores["speed"]
    with pytest.raises(pergrad.UsageError, match=r"column's name(.|\n)*table\(\).slice"):
        scores[3]  # type: ignore[index]
    with pytest.raises(pergrad.UsageError, match=r"column's name"):
        list(scores)  # type: ignore[call-overload]


def test_data_frames(scores: pergrad.Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = scores.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert frame["norm"][7] == scores["norm"][7]
    lazy = scores.to_polars(["index", "norm"])
    assert isinstance(lazy, pl.DataFrame)
    assert lazy["norm"][7] == scores["norm"][7]
    assert lazy.columns == ["index", "norm"]
    monkeypatch.setattr("pergrad.scans.results.find_spec", lambda name: None)
    for call, name in ((scores.to_pandas, "pandas"), (scores.to_polars, "polars")):
        with pytest.raises(pergrad.MissingExtraError, match=f"pip install {name}"):
            call()


def test_top_is_a_table_to_read(scores: pergrad.Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    top = scores.top(5)
    lines = str(top).splitlines()
    assert repr(top) == str(top)
    assert len(lines) == 7
    assert re.match(r"index +key +loss +norm", lines[0])
    assert lines[1].split()[1] == f"train/{int(np.nanargmax(scores['norm']))}"
    assert max(map(len, lines)) <= 60
    assert re.fullmatch(r"\d more: .*norm:3.bias", lines[-1])
    by = str(scores.top(5, by="norm:3.bias"))
    assert "norm:3.bias" in by.splitlines()[0]


def test_top_is_still_a_pyarrow_table(scores: pergrad.Scores) -> None:
    top = scores.top(5)
    table = top.arrow
    assert isinstance(table, pa.Table)
    assert (top.num_rows, len(top), top.schema) == (5, 5, table.schema)
    assert top == table
    assert top == scores.top(5)
    assert top.to_pylist() == table.to_pylist()
    assert top.slice(1, 2).equals(table.slice(1, 2))
    assert pa.table(top).equals(table)
    assert pl.DataFrame(top)["norm"].to_list() == table["norm"].to_pylist()
    assert top.to_pandas()["norm"][0] == table["norm"][0].as_py()
    assert pickle.loads(pickle.dumps(top)) == copy.copy(top) == top
    assert "to_pylist" in dir(top)
    with pytest.raises(AttributeError):
        top.nothing  # noqa: B018


def test_top_with_some_columns(scores: pergrad.Scores) -> None:
    assert scores.top(2, columns=["key"]).column_names == ["index", "key", "norm"]
    with pytest.raises(pergrad.StoreError, match=r"no column speed(.|\n)*columns are"):
        scores.top(2, columns=["speed"])
    with pytest.raises(pergrad.UsageError, match=r"Cannot rank by 'speed'(.|\n)*rank by: loss"):
        scores.top(2, by="speed", columns=["key"])


def test_failures_are_read_as_well(scores: pergrad.Scores) -> None:
    assert "OSError: cannot read 41.png" in str(scores.failures())


def test_many_rows_are_not_all_printed() -> None:
    text = str(Rows(pa.table({"index": range(1000)})))
    assert len(text.splitlines()) == MOST_ROWS + 2
    assert text.endswith("and 940 more rows")
    assert str(Rows(pa.table({"index": pa.array([], pa.int64())}))) == "none"


@pytest.mark.parametrize("width", range(1, 130, 7))
def test_a_table_is_as_wide_as_the_terminal_at_most(width: int) -> None:
    row = {"index": 3, "key": "a long name of an example, " * 4, "loss": 1.0, "norm": 2.0}
    row |= {f"norm:layer {k}": 0.1 * k for k in range(9)}
    lines = as_table([row, row], width, ["index", "norm"]).splitlines()
    table = [line for line in lines if "more: " not in line]
    assert len(table) == 3
    assert max(map(len, table)) <= max(width, len("index"))
    if width > 15:
        assert "norm" in table[0].split()


def test_a_table_drives_no_terminal() -> None:
    assert "\x1b" not in as_table([{"a\x1b[2J": "b\x1b[31m\nc"}])


def said(capsys: pytest.CaptureFixture[str], monkeypatch: Any, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["pergrad", *words])
    assert main() == 0
    return capsys.readouterr().out


def test_the_command_line_has_columns_and_fits(
    scores: pergrad.Scores, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(scores.folder)
    chosen = said(capsys, monkeypatch, "top", folder, "-n", "3", "--columns", "key,loss")
    assert chosen.splitlines()[0].split() == ["index", "key", "loss", "norm"]
    whole = said(capsys, monkeypatch, "top", folder, "-n", "3")  # into a pipe
    assert "norm:3.bias" in whole
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(
        "pergrad.command.app.shutil.get_terminal_size", lambda *_: os.terminal_size((50, 20))
    )
    fitted = said(capsys, monkeypatch, "top", folder, "-n", "3")
    assert max(len(line) for line in fitted.splitlines()[:-1]) <= 50
    assert "more: " in fitted.splitlines()[-1]
