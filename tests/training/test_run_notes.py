"""A second run that a folder refuses leaves a note there, and the first run's rows as they were."""

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pergrad
from pergrad.command import main, runs
from pergrad.training import run_notes


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "pergrad.watch")


def train(
    folder: Path, steps: Any, seed: int = 0, width: int = 3, *, number: bool = True
) -> pergrad.Watch:
    torch.manual_seed(seed)
    model = nn.Linear(width, 1)
    generator = torch.Generator().manual_seed(seed)
    watch = pergrad.Watch(folder, every=1)
    for step in steps:
        losses = model(torch.randn(8, width, generator=generator)).square().squeeze(1)
        with watch(losses, model, keys=range(8), step=step if number else None):
            losses.mean().backward()
        model.zero_grad()
    watch.close()
    return watch


def words(page: Path) -> str:
    text = re.sub(r"<script.*?</script>|<style.*?</style>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text)).replace("\u00a0", " ")


REFUSED = {
    "other losses": ({"seed": 1}, "has another run: in step 0, the loss of its row"),
    "other model": ({"width": 4}, "has another run: its parameters was"),
    "the same seed": ({}, "has step 0 of this run already"),
    "counted on": ({"number": False}, "has 3 watched steps already, so these are counted on from"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_run_that_is_refused_leaves_a_note(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other, said = REFUSED[kind]
    folder = tmp_path / "run"
    train(folder, range(3))
    first = pergrad.open_watch(folder)
    assert first.notes() == []
    assert "notes()" not in repr(first)
    before, files = first.examples(), set(os.listdir(folder / "examples"))
    watch = train(folder, range(3), **other)
    run = pergrad.open_watch(folder)
    assert files <= set(os.listdir(folder / "examples"))
    assert run.examples().slice(0, len(before)).equals(before)
    (note,) = run.notes()
    assert said in note["words"]
    assert watch.failures == [note["words"]]
    assert note["rank"] == 0
    assert "see its 1 notes()" in repr(run)
    page = words(run.report(tmp_path / "run.html"))
    assert page.count(said) == 1
    assert "Said at 2" in page

    for arguments in (["report", folder], ["top", folder], ["top", folder, "--json"]):
        monkeypatch.setattr("sys.argv", ["pergrad", *map(str, arguments)])
        assert main() == 0
        out, err = capsys.readouterr()
        assert said not in out
        assert " ".join(err.split()).count(said) == 1

    train(folder, range(3), **other)  # once more: one note, of the latest time
    assert len(pergrad.open_watch(folder).notes()) == (2 if kind == "counted on" else 1)


def test_a_run_behind_a_checkpoint_leaves_none(tmp_path: Path) -> None:
    train(tmp_path, range(4))
    train(tmp_path, range(2, 6))
    assert pergrad.open_watch(tmp_path).notes() == []
    assert len(pergrad.open_watch(tmp_path).steps()) == 6


def test_another_that_writes_at_this_moment_leaves_a_note(tmp_path: Path) -> None:
    train(tmp_path, range(2))
    from pergrad.training.run_folder import RunFolder

    writes = RunFolder(tmp_path)
    writes.take(0)
    watch = train(tmp_path, range(2, 4))
    writes.leave()
    (note,) = pergrad.open_watch(tmp_path).notes()
    assert "Another run is writing" in note["words"]
    assert watch.failures == [note["words"]]


def test_ranks_say_it_once_and_the_latest_is_first(tmp_path: Path) -> None:
    run_notes.leave(tmp_path, 0, "one")
    run_notes.leave(tmp_path, 1, "other")
    (path,) = (p for p in (tmp_path / "notes").iterdir() if p.name.startswith("0001"))
    note = {"time": "2999-01-01T00:00:00+00:00", "rank": 1, "words": "one"}
    content = json.dumps(note).encode()
    name = f"0001-{run_notes.digest_of(content)}.json"
    (path.parent / name).write_bytes(content)
    assert [(n["words"], n["time"][:4] == "2999") for n in run_notes.notes(tmp_path)] == [
        ("one", True), ("other", False),
    ]  # fmt: skip
    assert run_notes.as_sentence(note) == "Said at 2999-01-01 00:00:00+00:00: one"


@pytest.mark.parametrize("content", [b"", b"no json", b"[1]", b'{"words": 3}'])
def test_damage_is_seen(tmp_path: Path, content: bytes) -> None:
    train(tmp_path, range(2))
    run_notes.leave(tmp_path, 0, "something")
    (path,) = (tmp_path / "notes").iterdir()
    for name in (path.name, f"0000-{run_notes.digest_of(content)}.json"):
        (path.parent / name).write_bytes(content)
        with pytest.raises(pergrad.StoreError, match=r"not what was written(.|\n)*read without it"):
            pergrad.open_watch(tmp_path).notes()
        (path.parent / name).unlink()
    run_notes.leave(tmp_path, 0, "something")
    assert len(pergrad.open_watch(tmp_path).notes()) == 1


def test_a_folder_that_takes_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, range(2))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_notes.folders, "write", full)
    watch = train(tmp_path, range(2), seed=1)
    assert len(watch.failures) == 1  # it is said all the same
    assert pergrad.open_watch(tmp_path).notes() == []


def test_a_note_is_news_to_the_page_that_is_rewritten(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, range(2))

    def wait(_: float) -> None:
        train(folder, range(2), seed=1)

    pages: Iterator[Path] = runs.pages(folder, tmp_path / "run.html", 7, None, wait)
    assert "has another run" not in words(next(pages))
    assert "has another run" in words(next(pages))
