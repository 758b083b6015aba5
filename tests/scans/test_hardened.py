"""What a disk, another scan or a data set may do to a scan: a named error, or nothing."""

import io
import json
import os
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scanning import Listed, data, job, scan

import pergrad
from pergrad import folders
from pergrad.command import main
from pergrad.scans import adding, writer
from pergrad.scans import store as stores
from pergrad.scans.previews import recall
from pergrad.scans.store import Store, digest_of
from pergrad.scans.text import message_of, printable, storable

HOSTILE = "\x1b[31mred\x1b[0m [bold]x[/x] \ud800 \x00 é"


class Mute(Exception):
    """Has no words."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


# --- the folder -----------------------------------------------------------------------------------


def test_parts_without_a_manifest_are_not_scored_beside(tmp_path: Path) -> None:
    whole = scan(job(), tmp_path, batch_size=8).table()
    kept = (tmp_path / "manifest.json").read_bytes()
    (tmp_path / "manifest.json").unlink()
    before = sorted((tmp_path / "parts").iterdir())
    with pytest.raises(pergrad.StoreError, match=r"no manifest.json(.|\n)*Bring manifest"):
        scan(job(), tmp_path, batch_size=8)
    assert sorted((tmp_path / "parts").iterdir()) == before
    (tmp_path / "manifest.json").write_bytes(kept)
    assert scan(job(), tmp_path, batch_size=8).table().equals(whole)


def changed(value: Any, *path: str) -> Any:
    """A change of a manifest: at a path, a value; without one, nothing there."""

    def change(manifest: dict[str, Any]) -> None:
        for name in path[:-1]:
            manifest = manifest[name]
        if value is KeyError:
            del manifest[path[-1]]
        else:
            manifest[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed([], "scored"), "no scored of the right kind"),
        (changed(KeyError, "settings"), "no settings"),
        (changed(0, "settings", "batch_size"), "below 1"),
        (changed(True, "settings", "batch_size"), "no batch_size"),
        (changed(-3, "scored", "examples"), "below 1"),
        (changed("many", "scored", "examples"), "no examples"),
        (changed([["a"]], "scored", "parameters"), "something else than"),
        (changed(7, "scored", "keys_hash"), "keys_hash"),
        (changed([], "settings", "groups"), "settings.groups"),
        (changed(3, "columns", "loss"), "column loss"),
        (changed("blob", "columns", "loss", "type"), "column loss has another type"),
        (changed(KeyError, "columns", "norm"), "no column norm"),
        (changed({"scored": -1}, "counts"), "counts.scored"),
        (changed(None, "finished"), "no finished"),
        (changed("\ud800", "columns", "loss", "unit"), "column loss has text that UTF-8 lacks"),
        (changed({"type": "float", "unit": "", "meaning": ""}, "columns", "\udcff"), "UTF-8 lacks"),
    ],
)
def test_a_manifest_of_another_form_is_one_named_error(
    change: Any, says: str, tmp_path: Path
) -> None:
    scan(job(), tmp_path, batch_size=8)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    for use in (lambda: scan(job(), tmp_path), lambda: pergrad.open_scores(tmp_path)):
        with pytest.raises(pergrad.StoreError, match=rf"manifest.json(.|\n)*{says}(.|\n)*copy"):
            use()


def test_a_manifest_without_keys_is_of_scores_without_keys(tmp_path: Path) -> None:
    whole = scan(job(), tmp_path, batch_size=8).table()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["scored"]["keys_hash"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert scan(job(), tmp_path).table().equals(whole)


@pytest.mark.parametrize("column", ["dot:m", "cosine:m", "norm:0"])
def test_a_manifest_that_lost_a_column_is_not_given_it_again(column: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"against": {"m": pergrad.MeanGradient(data(3))}, "groups": "layer"}
    scan(job(), tmp_path, batch_size=8, **more)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["columns"][column]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(pergrad.StoreError, match=r"the columns were(.|\n)*another folder"):
        scan(job(), tmp_path, **more)


def test_a_manifest_nested_without_end_or_a_fifo(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(pergrad.StoreError, match=r"did not write(.|\n)*folder of their own"):
        pergrad.open_scores(tmp_path)
    (tmp_path / "manifest.json").unlink()
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(pergrad.StoreError, match=r"not an ordinary file(.|\n)*Check"):
        pergrad.open_scores(tmp_path)


def forged(folder: Path, table: pa.Table, rows: int | None = None) -> None:
    """A part with a right checksum, in the place of the parts there are."""
    for path in (folder / "parts").iterdir():
        path.unlink()
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    name = f"part-{0:012d}-{len(table) if rows is None else rows}-{digest_of(content)}.parquet"
    (folder / "parts" / name).write_bytes(content)


def with_index(table: pa.Table, values: list[Any]) -> pa.Table:
    return table.set_column(0, "index", pa.array(values, pa.int64()))


def no_text(rows: int) -> pa.Array:
    """Strings that are no UTF-8."""
    ends = pa.py_buffer(np.arange(rows + 1, dtype=np.int32).tobytes())
    return pa.Array.from_buffers(pa.string(), rows, [None, ends, pa.py_buffer(b"\xff" * rows)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: with_index(t, [-1, *range(1, 40)]), "not among the 40"),
        (lambda t: with_index(t, [*range(39), 40]), "not among the 40"),
        (lambda t: with_index(t, [None, *range(1, 40)]), "not among the 40"),
        (lambda t: t.drop_columns(["norm"]), "cannot be read"),
        (lambda t: t.set_column(1, "loss", pa.array(["x"] * 40)), "column loss has string"),
        (lambda t: t.slice(0, 39), "has 39 rows, and its name says 40"),
        (lambda t: t.set_column(3, "error", no_text(40)), "cannot be read"),
    ],
)
def test_a_part_of_something_else_is_one_named_error(
    change: Any, says: str, tmp_path: Path
) -> None:
    table = scan(job(), tmp_path, batch_size=8).table()
    forged(tmp_path, change(table), rows=40)
    for use in (lambda: scan(job(), tmp_path), lambda: pergrad.open_scores(tmp_path).table()):
        with pytest.raises(pergrad.StoreError, match=rf"parts(.|\n)*{says}(.|\n)*move it"):
            use()


def test_a_part_that_is_no_parquet(tmp_path: Path) -> None:
    scan(job(), tmp_path, batch_size=8)
    for path in (tmp_path / "parts").iterdir():
        path.unlink()
    name = f"part-{0:012d}-40-{digest_of(b'no parquet')}.parquet"
    (tmp_path / "parts" / name).write_bytes(b"no parquet")
    with pytest.raises(pergrad.StoreError, match=r"cannot be read(.|\n)*move it elsewhere"):
        scan(job(), tmp_path)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", ["references", "shown"])
def test_references_and_previews_are_checked_as_parts_are(place: str, tmp_path: Path) -> None:
    task, more = job(show=str), {"against": {"mean": pergrad.MeanGradient(data(5))}}
    whole = scan(task, tmp_path, batch_size=8, **more).table()
    (path,) = (tmp_path / place).iterdir()
    damage(path)
    assert pergrad.open_scores(tmp_path).damaged() == [path.name]
    with pytest.raises(pergrad.StoreError, match=rf'{path.name}(.|\n)*rescore="damaged"'):
        scan(task, tmp_path, batch_size=8, **more)
    again = scan(task, tmp_path, batch_size=8, rescore="damaged", **more)
    assert again.table().equals(whole)
    assert again.damaged() == []
    assert [p.name for p in (tmp_path / "set-aside").iterdir()] == [path.name]
    assert recall(Store(tmp_path))[3].text == "3"


def test_a_damaged_preview_is_named_by_the_report(tmp_path: Path) -> None:
    scores = scan(job(show=str), tmp_path, batch_size=8)
    (path,) = (tmp_path / "shown").iterdir()
    damage(path)
    with pytest.raises(pergrad.StoreError, match=rf'{path.name}(.|\n)*rescore="damaged"'):
        scores.report(tmp_path / "report.html")


def test_renames_are_forced_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file before it gets its name, and after that the folder that has the name."""
    done: list[tuple[str, Any]] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (done.append(("sync", os.fstat(f).st_ino)), sync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (
        done.append(("rename", (os.stat(a).st_ino, os.stat(Path(b).parent).st_ino))),
        replace(a, b)))  # fmt: skip
    scan(job(show=str), tmp_path, batch_size=8, against={"m": pergrad.MeanGradient(data(5))})
    renames = [k for k, (what, _) in enumerate(done) if what == "rename"]
    assert len(renames) >= 4  # manifest, a part, the reference, the previews
    for k in renames:
        file, folder = done[k][1]
        assert ("sync", file) in done[:k]
        assert ("sync", folder) in done[k:]


def test_parts_are_named_on_the_disk_before_the_manifest_says_so_and_old_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "ROWS_PER_PART", 8)
    scan(job(), tmp_path, batch_size=8)
    unsettled: set[Path] = set()
    replace, unlink, sync = os.replace, Path.unlink, folders.sync

    def replaced(a: Path, b: Path) -> None:
        replace(a, b)
        if b.name == "manifest.json":
            assert not unsettled
        elif b.parent.name == "parts":
            unsettled.add(b)

    def removed(path: Path, missing_ok: bool = False) -> None:
        assert not (path.name.startswith("part-") and unsettled)
        unlink(path, missing_ok=missing_ok)

    def synced(place: Path) -> None:
        sync(place)
        unsettled.difference_update([path for path in unsettled if path.parent == place])

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(Path, "unlink", removed)
    monkeypatch.setattr(folders, "sync", synced)
    monkeypatch.setattr(adding, "PARTS_AT_ONCE", 2)
    scan(job(), tmp_path, groups="layer")
    scan(job(), tmp_path / "another", batch_size=8)
    assert not unsettled


def test_names_of_parts_are_forced_to_the_disk_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the next part is far."""
    monkeypatch.setattr(writer, "ROWS_PER_PART", 8)
    scan(job(), tmp_path / "s", batch_size=8)
    table = pergrad.open_scores(tmp_path / "s").table()
    now, done = 100.0, []
    monkeypatch.setattr(writer.time, "monotonic", lambda: now)
    with (
        stores.locked(tmp_path / "s") as store,
        writer.Writer(store, np.ones(40, dtype=bool)) as out,
    ):
        for start, at, settled in (
            (0, 100.1, False), (8, 100.5, False), (16, 101.2, True), (24, 101.3, False)
        ):  # fmt: skip
            now = at
            out.add(table.slice(start, 8))
            out._wait()
            done.append(store.settled == settled)
        now = 102.4
        out.add(table.slice(32, 2))  # too few for a part
        out._wait()
        done.append(store.settled)
        out.flush()
        assert out.store.settled
    assert all(done), done


# --- who else writes ------------------------------------------------------------------------------


def test_the_scan_whose_lock_was_taken_stops_and_nothing_is_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is deleted and another scan goes to its end, in the middle of the first."""
    monkeypatch.setattr(writer, "ROWS_PER_PART", 8)
    items = data(40)

    class Raced(Listed):
        raced = False

        def __getitem__(self, i: int) -> Any:
            if i == 20 and not self.raced:
                self.raced = True
                (tmp_path / ".lock").unlink()
                scan(job(), tmp_path, batch_size=8)
            return self.items[i]

    with pytest.raises(pergrad.StoreError, match=r"Another scan has begun(.|\n)*start it again"):
        scan(job(data=Raced(items, {})), tmp_path, batch_size=8)
    scores = pergrad.open_scores(tmp_path)
    assert scores.table()["index"].to_pylist() == list(range(40))
    assert scores.complete
    assert not (tmp_path / ".owner").exists()


def test_a_part_written_as_the_other_scan_began_is_taken_back(tmp_path: Path) -> None:
    scan(job(), tmp_path, batch_size=8)
    table = pergrad.open_scores(tmp_path).table()
    with stores.locked(tmp_path) as store:
        real = store._write

        def late(path: Path, content: bytes, **more: Any) -> None:
            (tmp_path / ".owner").write_text("another")
            real(path, content, **more)

        store._write = late  # type: ignore[method-assign]
        before = sorted((tmp_path / "parts").iterdir())
        with pytest.raises(pergrad.StoreError, match="Another scan has begun"):
            store.add(table.slice(3, 2))
        assert sorted((tmp_path / "parts").iterdir()) == before


def test_a_part_removed_as_the_other_scan_began_is_no_disk_that_is_full(tmp_path: Path) -> None:
    scan(job(), tmp_path, batch_size=8)
    table = pergrad.open_scores(tmp_path).table()
    with stores.locked(tmp_path) as store:

        def removed(path: Path, content: bytes, **more: Any) -> None:
            (tmp_path / ".owner").write_text("another")
            raise pergrad.StoreError("Cannot write")

        store._write = removed  # type: ignore[method-assign]
        with pytest.raises(
            pergrad.StoreError, match=r"Another scan has begun(.|\n)*start it again"
        ):
            store.add(table.slice(3, 2))


def test_without_locks_the_mark_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(stores.filelock.FileLock, "acquire", refuse)
    assert scan(job(), tmp_path, batch_size=8).complete


def test_a_mark_is_written_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / ".owner").symlink_to(tmp_path / "precious")
    assert scan(job(), folder, batch_size=8).complete
    assert (tmp_path / "precious").read_text() == "mine"


# --- what a data set says -------------------------------------------------------------------------


def test_nothing_that_a_data_set_says_stops_a_scan(tmp_path: Path) -> None:
    says = {3: ValueError(HOSTILE), 17: Mute(), 21: KeyError("\udcff")}
    scores = scan(
        job(data=Listed(data(40), says), key=lambda i: f"{i} {HOSTILE}", show=lambda i: HOSTILE),
        tmp_path,
        batch_size=8,
        groups={HOSTILE: ["0.weight"]},
        against={HOSTILE: pergrad.MeanGradient(data(5))},
        source=HOSTILE,
        command=HOSTILE,
    )
    assert scores.complete
    failed = {row["index"]: row["error"] for row in scores.failures().to_pylist()}
    assert failed[3] == f"ValueError: {storable(HOSTILE)}"
    assert failed[17] == "Mute: (its message cannot be had: str() raised RuntimeError)"
    assert failed[21].startswith("KeyError")
    assert scores.table()["key"][5].as_py() == f"5 {storable(HOSTILE)}"
    assert f"norm:{storable(HOSTILE)}" in scores.table().column_names
    assert scores.manifest["command"] == HOSTILE
    page = scores.report(tmp_path / "page.html", title=HOSTILE).read_text(encoding="utf-8")
    assert "\\ud800" in page
    assert not {"\x1b", "\x00"} & set(page)
    assert "\x1b" not in repr(scores)
    again = scan(  # and it is recognised
        job(data=Listed(data(40), says), key=lambda i: f"{i} {HOSTILE}"),
        tmp_path, groups={HOSTILE: ["0.weight"]}, against={HOSTILE: pergrad.MeanGradient(data(5))},
    )  # fmt: skip
    assert again.table().equals(scores.table())


def test_show_without_words_is_a_preview_with_an_error(tmp_path: Path) -> None:
    def show(i: int) -> str:
        raise Mute

    scan(job(show=show), tmp_path, batch_size=8)
    assert "cannot be had" in (recall(Store(tmp_path))[7].error or "")


@pytest.mark.parametrize("name", ["[bold]s", "[/x]", "a\x1b[31mb"])  # the second: a folder in one
def test_folders_are_shown_as_they_are_called(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / name
    scan(job(), folder, batch_size=8, progress=True)
    said = capfd.readouterr().err
    assert printable(folder) in said
    assert "\x1b" not in said


def test_an_error_drives_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pergrad", "top", str(tmp_path / "a\x1b[2Jb")])
    said = io.StringIO()
    with redirect_stderr(said):
        assert main() == 1
    assert "a\\x1b[2Jb" in said.getvalue()
    assert "\x1b" not in said.getvalue()


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=r"have one name as text(.|\n)*Rename one"):
        scan(job(), tmp_path, groups={1: ["0.weight"], "1": ["0.bias"]})
    mean = pergrad.MeanGradient(data(3))
    with pytest.raises(pergrad.UsageError, match=r"references(.|\n)*one name as text(.|\n)*Rename"):
        scan(job(), tmp_path, against={1: mean, "1": mean})
    task = job()
    batch = torch.utils.data.default_collate(data(2))
    few = pergrad.gradients(task.losses(task.model, batch), task.model)
    with pytest.raises(pergrad.UsageError, match=r"Two columns would be called(.|\n)*Rename one"):
        scan(task, tmp_path, against={"few": few, "few:0": pergrad.MeanGradient(data(3))})
    assert not (tmp_path / "manifest.json").exists()
    scores = scan(job(), tmp_path / "one", batch_size=8, against={1: mean})
    assert "dot:1" in scores.manifest["columns"]


def test_message_of_is_bounded() -> None:
    assert len(message_of(ValueError("x" * 10_000))) == 2000


# --- the report's file ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "link", "folder", "device"])
def test_a_report_replaces_nothing_but_a_file(kind: str, tmp_path: Path) -> None:
    scores = scan(job(), tmp_path / "s", batch_size=8)
    target = tmp_path / "out"
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "link":
        (tmp_path / "precious").write_text("mine")
        target.symlink_to(tmp_path / "precious")
    elif kind == "folder":
        target.mkdir()
    else:
        target = Path("/dev/null")
    before = target.lstat()
    with pytest.raises(pergrad.UsageError, match=r"not an ordinary file(.|\n)*Pass the path"):
        scores.report(target)
    assert target.lstat().st_ino == before.st_ino
    if kind == "link":
        assert (tmp_path / "precious").read_text() == "mine"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_report_replaces_nothing_but_a_page(tmp_path: Path) -> None:
    scores = scan(job(), tmp_path / "s", batch_size=8)
    kept = (tmp_path / "s" / "manifest.json").read_bytes()
    with pytest.raises(pergrad.UsageError, match=r"no page of a report(.|\n)*another path"):
        scores.report(tmp_path / "s" / "manifest.json")
    assert (tmp_path / "s" / "manifest.json").read_bytes() == kept
    page = tmp_path / "page.html"
    page.touch()
    assert scores.report(scores.report(page)).read_text("utf-8").startswith("<!doctype html>")


def test_the_path_of_a_report_drives_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scan(job(), tmp_path / "s", batch_size=8)
    words = ["report", str(tmp_path / "s"), "--out", str(tmp_path / "\x1b[31m.html")]
    monkeypatch.setattr("sys.argv", ["pergrad", *words])
    assert main() == 0
    assert capsys.readouterr().out.endswith("/\\x1b[31m.html\n")
