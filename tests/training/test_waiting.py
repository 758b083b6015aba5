"""Rows that wait for the disk: all of them, in order, in whatever blocks they lie."""

import logging
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from torch import nn

import pergrad
from pergrad.training import recorder, waiting
from pergrad.training.waiting import EXAMPLES, Waiting


def columns(count: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ("loss", "weight", "norm", "score", "ratio")
    found = {n: torch.randn(count, generator=generator, dtype=torch.float64) for n in names}
    tokens = torch.randint(9, (count,), generator=generator)
    return {**found, "tokens": tokens, "outlier": tokens > 4}


@pytest.mark.parametrize("sizes", [[3], [4], [9, 1, 0, 4, 2], [1, 12, 5]])
def test_rows_are_those_that_came(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "ROWS", 4)
    rows, expected = Waiting(), []
    for _ in range(2):  # the second time in room that was used before
        expected.clear()
        for step, size in enumerate(sizes):
            given = columns(size, step)
            keys = [None if i % 3 == 2 else f"{step}/{i}" for i in range(size)]
            rows.add(step, keys, given)
            for i in range(size):
                numbers = {name: column[i].item() for name, column in given.items()}
                expected.append({"step": step, "rank": 7, "row": i, "key": keys[i], **numbers})
        assert len(rows) == sum(sizes)
        assert rows.first_step == 0
        whole = pa.concat_tables(list(rows.tables(7)))
        assert whole.schema == EXAMPLES
        assert whole.to_pylist() == [{n: row[n] for n in EXAMPLES.names} for row in expected]
        rows.clear()
        assert len(rows) == 0
        assert list(rows.tables(7)) == []


def test_many_rows_are_written_before_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A long run of a small model writes a part every minute, and may have read millions."""
    caplog.set_level(logging.ERROR, "pergrad.watch")
    monkeypatch.setattr(recorder, "SECONDS_PER_PART", 1e9)
    monkeypatch.setattr(recorder, "ROWS_PER_PART", 16)
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    most = 0
    with pergrad.Watch(tmp_path, every=1) as watch:
        for step in range(9):
            loss = model(torch.randn(6, 3)).square().mean()
            with watch(loss, model, 6, step=step):
                loss.backward()
            model.zero_grad()
            most = max(most, len(watch._recorder._examples))
    assert most == 12
    assert len(list((tmp_path / "examples").iterdir())) == 4  # the first at once
    run = pergrad.open_watch(tmp_path)
    assert run.examples()["step"].to_pylist() == [step for step in range(9) for _ in range(6)]
    assert run.examples()["row"].to_pylist() == list(range(6)) * 9
