"""The folder of scores: going on, refusing, damage, disks that say no, and who can read it."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from scanning import Listed, data, environment, job, losses, model, scan
from torch import nn

import pergrad
from pergrad.scans import store, writer


def parts(folder: Path) -> list[Path]:
    return sorted((folder / "parts").iterdir())


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ROWS_PER_PART", 16)


class Stop(Exception):
    """What interrupts a scan in these tests."""


def interrupted(folder: Path, at: int = 25, **more: Any) -> None:
    """A scan of 40 examples that stops after some of them."""

    class Fuse(Listed):
        def __getitem__(self, i: int) -> Any:
            if i >= at:
                raise KeyboardInterrupt
            return self.items[i]

    with pytest.raises(KeyboardInterrupt):
        scan(job(data=Fuse(data(40), {})), folder, batch_size=8, **more)


# --- going on -------------------------------------------------------------------------------------


def test_going_on_ends_with_the_numbers_of_one_run(tmp_path: Path) -> None:
    whole = scan(job(), tmp_path / "whole", batch_size=8)
    interrupted(tmp_path / "s")
    half = pergrad.open_scores(tmp_path / "s")
    assert len(half) == 24
    assert not half.complete
    assert "24 of 40" in repr(half)
    assert not half.manifest["finished"]
    assert half.table().equals(whole.table().slice(0, 24))
    found = scan(job(), tmp_path / "s", batch_size=8)
    assert found.table().equals(whole.table())
    assert found.complete
    assert found.manifest["finished"]
    assert found.manifest["counts"] == whole.manifest["counts"]


def test_a_finished_scan_scores_nothing_again(tmp_path: Path) -> None:
    scan(job(), tmp_path, batch_size=8)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    seen = []

    def watched(net: nn.Module, batch: Any) -> torch.Tensor:
        seen.append(len(batch[1]))
        return losses(net, batch)

    found = scan(job(losses=watched), tmp_path)
    assert found.complete
    assert seen == [8, 8]  # the first and the last batch, to see whether they are still the same
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}


def test_resume_false_never_touches_scores(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(pergrad.StoreError, match=r"resume is False(.|\n)*another folder"):
        scan(job(), tmp_path, batch_size=8, resume=False)
    assert len(pergrad.open_scores(tmp_path)) == 24
    assert scan(job(), tmp_path / "new", resume=False).complete


def test_auto_goes_on_with_the_size_that_worked(tmp_path: Path) -> None:
    interrupted(tmp_path)
    assert scan(job(), tmp_path).manifest["settings"]["batch_size"] == 8


def test_another_batch_size_goes_on(tmp_path: Path) -> None:
    interrupted(tmp_path)
    found = scan(job(), tmp_path, batch_size=5)
    assert found.table()["index"].to_pylist() == list(range(40))


def test_a_part_that_is_gone_is_scored_again(tmp_path: Path, small_parts: None) -> None:
    whole = scan(job(), tmp_path, batch_size=8).table()
    parts(tmp_path)[1].unlink()
    assert not pergrad.open_scores(tmp_path).complete
    assert scan(job(), tmp_path, batch_size=8).table().equals(whole)


def test_a_manifest_without_parts_binds_nobody(tmp_path: Path) -> None:
    interrupted(tmp_path, at=0)
    assert scan(job(30), tmp_path).complete


def test_leftovers_of_a_killed_scan_are_cleared(tmp_path: Path) -> None:
    interrupted(tmp_path)
    left = [tmp_path / ".manifest.json.77.tmp", tmp_path / "parts" / ".part-0-8-ab.parquet.77.tmp"]
    for path in left:
        path.write_bytes(b"half")
    scan(job(), tmp_path, batch_size=8)
    assert not any(path.exists() for path in left)


# --- refusing -------------------------------------------------------------------------------------


def heavier() -> nn.Module:
    net = model()
    with torch.no_grad():
        net[0].bias[0] += 1
    return net


def other_losses(net: nn.Module, batch: Any) -> torch.Tensor:
    return 2 * losses(net, batch)


CHANGES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"model": heavier()}, {}, "weights or buffers have other values"),
    ({"model": nn.Linear(5, 3).double()}, {}, "class was Sequential and is Linear"),
    ({"model": nn.Sequential(nn.Linear(5, 3).double())}, {}, r"no longer there: `3.weight`"),
    ({"model": model(torch.float32), "data": data(40, torch.float32)}, {}, "other shape or dtype"),
    ({"params": model()[3]}, {}, r"parameters differ \(no longer there(.|\n)*new: `weight`"),
    ({"data": data(41)}, {}, "had 40 examples and has 41"),
    ({"data": data(40, seed=8)}, {}, r"loss of example \d+ was(.|\n)*or the data"),
    ({"losses": other_losses}, {}, r"loss of example \d+ was(.|\n)*loss function"),
    ({"key": str}, {}, "keys of the examples have changed"),
    ({}, {"mode": "train"}, "mode was 'eval' and is 'train'"),
    ({}, {"groups": "layer"}, "groups was"),
    ({}, {"seed": 3}, "seed was 0 and is 3"),
    ({}, {"on_mixing": "exact"}, "options was"),
    ({}, {"against": {"v": torch.ones(66).double()}}, "'v' is new"),
]


@pytest.mark.parametrize(("task", "settings", "says"), CHANGES, ids=lambda c: str(c)[:30])
def test_it_refuses_what_has_changed(
    task: dict[str, Any], settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    interrupted(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(pergrad.StoreError, match=rf"{says}(.|\n)*another folder"):
        scan(job(**task), tmp_path, batch_size=8, **settings)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_reference_that_changed_or_is_gone(tmp_path: Path) -> None:
    v = torch.ones(66).double()
    interrupted(tmp_path, against={"v": v})
    with pytest.raises(pergrad.StoreError, match="'v' has other values"):
        scan(job(), tmp_path, batch_size=8, against={"v": 2 * v})
    with pytest.raises(pergrad.StoreError, match="'v' is not given any more"):
        scan(job(), tmp_path, batch_size=8)
    assert scan(job(), tmp_path, batch_size=8, against={"v": v}).complete


def test_a_mean_gradient_is_recognised_whatever_its_rounding(tmp_path: Path) -> None:
    validation = data(13, seed=4)
    interrupted(tmp_path, against={"mean": pergrad.MeanGradient(validation)})
    kept = pergrad.open_scores(tmp_path).manifest["settings"]["against"]
    with pytest.raises(pergrad.StoreError, match="'mean' has other values"):
        scan(job(), tmp_path, against={"mean": pergrad.MeanGradient(validation[1:])})
    # other batches, so another order of summation
    mean = {"mean": pergrad.MeanGradient(validation)}
    found = scan(job(), tmp_path, batch_size=5, against=mean)
    assert found.manifest["settings"]["against"] == kept


def test_keys_that_changed(tmp_path: Path) -> None:
    scan(job(key=str), tmp_path)
    with pytest.raises(pergrad.StoreError, match="keys of the examples have changed"):
        scan(job(key=lambda i: f"{i}!"), tmp_path)


def test_batch_size_matters_where_examples_interact(tmp_path: Path) -> None:
    scan(job(), tmp_path, batch_size=8, on_mixing="exact")
    with pytest.raises(pergrad.StoreError, match="batch_size was 8 and is 4"):
        scan(job(), tmp_path, batch_size=4, on_mixing="exact")


def test_recheck_can_be_left_out(tmp_path: Path) -> None:
    interrupted(tmp_path)
    assert scan(job(losses=other_losses), tmp_path, batch_size=8, recheck=False).complete


def test_recheck_sees_an_example_that_now_fails(tmp_path: Path) -> None:
    interrupted(tmp_path)
    broken = Listed(data(40), {2: ValueError("gone")})
    with pytest.raises(pergrad.StoreError, match=r"example 2 was(.|\n)*now nan"):
        scan(job(data=broken), tmp_path, batch_size=8)


def test_recheck_allows_for_rounding(tmp_path: Path) -> None:
    scan(job(dtype=torch.float32), tmp_path, batch_size=8)

    def rounded(net: nn.Module, batch: Any) -> torch.Tensor:
        return losses(net, batch) * (1 + 1e-5)

    assert scan(job(dtype=torch.float32, losses=rounded), tmp_path, batch_size=8).complete


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(pergrad.StoreError, match=r"it has thesis.tex(.|\n)*a folder of their own"):
        scan(job(), tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(
        pergrad.StoreError, match=r"pergrad did not write(.|\n)*folder of their own"
    ):
        scan(job(), tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "pergrad sc')
    with pytest.raises(pergrad.StoreError, match=r"pergrad did not write"):
        pergrad.open_scores(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["manifest.json", "thesis.tex"]
    with pytest.raises(pergrad.StoreError, match=r"thesis.tex is a file(.|\n)*folder of their own"):
        scan(job(), tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("version", "says"), [(0, "Read it with the pergrad"), (2, "newer pergrad")]
)
def test_another_format_version(version: int, says: str, tmp_path: Path) -> None:
    interrupted(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": version}))
    for use in (lambda: scan(job(), tmp_path), lambda: pergrad.open_scores(tmp_path)):
        with pytest.raises(pergrad.StoreError, match=rf"format version {version}(.|\n)*{says}"):
            use()


def test_two_scans_at_the_same_time(tmp_path: Path) -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Slow(Listed):
        def __getitem__(self, i: int) -> Any:
            if i == 20:
                inside.set()
                go_on.wait(60)
            return self.items[i]

    first = threading.Thread(target=scan, args=(job(data=Slow(data(40), {})), tmp_path))
    first.start()
    try:
        assert inside.wait(60)
        with pytest.raises(pergrad.StoreError, match=r"Another scan is writing(.|\n)*Wait for it"):
            scan(job(), tmp_path)
        assert not pergrad.open_scores(tmp_path).complete  # reading is allowed
    finally:
        go_on.set()
        first.join()
    assert scan(job(), tmp_path).complete


def test_no_scores_there(tmp_path: Path) -> None:
    with pytest.raises(pergrad.StoreError, match=r"no scores in(.|\n)*pergrad.scan"):
        pergrad.open_scores(tmp_path / "nothing")


def test_a_manifest_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(pergrad.StoreError, match=r"Cannot read(.|\n)*permissions"):
        pergrad.open_scores(tmp_path)


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["truncated", "flipped", "emptied"])
def test_a_damaged_part_is_named_and_scored_again(
    harm: str, tmp_path: Path, small_parts: None
) -> None:
    whole = scan(job(), tmp_path, batch_size=8).table()
    victim = parts(tmp_path)[1]
    content = bytearray(victim.read_bytes())
    content[len(content) // 3] ^= 1
    victim.write_bytes({"truncated": content[:-100], "flipped": content, "emptied": b""}[harm])

    scores = pergrad.open_scores(tmp_path)
    assert scores.damaged() == [victim.name]
    says = rf'{victim.name}; 16 examples(.|\n)*rescore="damaged"'
    with pytest.raises(pergrad.StoreError, match=says):
        scores.table()
    with pytest.raises(pergrad.StoreError, match=says):
        scan(job(), tmp_path, batch_size=8)
    assert victim.exists()

    found = scan(job(), tmp_path, batch_size=8, rescore="damaged")
    assert found.table().equals(whole)
    assert found.damaged() == []
    assert (tmp_path / "set-aside" / victim.name).exists()


def test_failed_examples_are_tried_again_on_request(tmp_path: Path, small_parts: None) -> None:
    whole = scan(job(), tmp_path / "whole", batch_size=8).table()
    at = {4: OSError("away"), 5: OSError("away"), 30: OSError("away")}
    broken = job(data=Listed(data(40), at))
    first = scan(broken, tmp_path / "s", batch_size=8)
    assert first.failures()["index"].to_pylist() == [4, 5, 30]
    untouched = scan(broken, tmp_path / "s", batch_size=8)
    assert untouched.failures()["index"].to_pylist() == [4, 5, 30]

    still = scan(job(data=Listed(data(40), {5: OSError("away")})), tmp_path / "s", rescore="failed")
    assert still.failures()["index"].to_pylist() == [5]
    assert still.complete
    found = scan(job(), tmp_path / "s", rescore="failed")
    assert found.failures().num_rows == 0
    assert found.table()["index"].to_pylist() == list(range(40))
    assert found.table()["norm"].to_pylist() == pytest.approx(whole["norm"].to_pylist())
    assert found.manifest["counts"]["failed"] == 0


def centred(net: nn.Module, batch: Any) -> torch.Tensor:
    """Losses that depend on who else is in the batch."""
    x, y = batch
    return losses(net, (x - x.mean(0), y))


@pytest.mark.parametrize("mended", [False, True])
def test_a_failure_changes_nothing_for_its_neighbours_when_going_on(
    mended: bool, tmp_path: Path
) -> None:
    items = {16: OSError("away")}  # at the edge of its block
    broken = job(data=Listed(data(40), items), losses=centred)
    more: dict[str, Any] = {"batch_size": 8, "on_mixing": "exact"}
    whole = scan(broken, tmp_path / "whole", **more).table()
    scan(broken, tmp_path / "s", **more)
    good = max(parts(tmp_path / "s"), key=lambda path: path.stat().st_size)
    good.unlink()  # as if only the failures had been written
    if mended:
        items.clear()  # its failure stays listed, until it is asked for
    found = scan(broken, tmp_path / "s", **more)
    assert found.table()["index"].to_pylist() == list(range(40))
    assert found.failures()["index"].to_pylist() == [16]
    if not mended:
        assert found.table().equals(whole)


def test_files_of_another_scan_in_the_folder(tmp_path: Path) -> None:
    whole = scan(job(), tmp_path / "a", batch_size=8)
    scan(job(losses=other_losses), tmp_path / "b", batch_size=8)
    stray = parts(tmp_path / "b")[0]
    os.link(stray, tmp_path / "a" / "parts" / stray.name)
    with pytest.raises(pergrad.StoreError, match=r"example 0 twice(.|\n)*Take them out"):
        whole.table()
    (tmp_path / "a" / "parts" / stray.name).unlink()
    os.link(stray, tmp_path / "a" / "parts" / "mine.parquet")
    with pytest.raises(pergrad.StoreError, match=r"mine.parquet is not a part(.|\n)*move it"):
        whole.table()


# --- disks that say no ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only"), (errno.EACCES, "Permission")],
)
@pytest.mark.parametrize(("function", "most"), [("fsync", 4), ("replace", 2)])
def test_a_full_or_read_only_disk(
    number: int,
    says: str,
    function: str,
    most: int,
    tmp_path: Path,
    monkeypatch: Any,
    small_parts: None,
) -> None:
    whole = scan(job(), tmp_path / "whole", batch_size=8).table()
    calls = []
    real = getattr(os, function)

    def refuse(*args: Any) -> None:
        calls.append(args)
        if len(calls) > most:
            raise OSError(number, os.strerror(number))
        real(*args)

    folder = tmp_path / "s"
    with monkeypatch.context() as patch:
        patch.setattr(os, function, refuse)
        with pytest.raises(pergrad.StoreError, match=rf"{says}(.|\n)*goes on where it stopped"):
            scan(job(), folder, batch_size=8)
    assert not list(folder.rglob("*.tmp"))
    left = pergrad.open_scores(folder)
    assert 0 < len(left) < 40
    assert left.damaged() == []
    assert scan(job(), folder, batch_size=8).table().equals(whole)


LIMITED = """
import resource, signal, sys
import pergrad
from pergrad.scans import writer
from scanning import job, scan

writer.ROWS_PER_PART = 8
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, limit = sys.argv[1], int(sys.argv[2])
scan(job(8), folder + "/before", batch_size=8)  # imports everything
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    scan(job(), folder + "/s", batch_size=8, groups="parameter")
except pergrad.StoreError as error:
    print(error)
"""


def test_the_operating_system_refuses_a_write(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path), "4000"],
        check=True, capture_output=True, text=True, env=environment(),
        cwd=Path(__file__).parent,  # where `scanning` is
    )  # fmt: skip
    assert "Cannot write to" in done.stdout
    assert "goes on where it stopped" in done.stdout
    assert not list((tmp_path / "s").rglob("*.tmp"))
    assert scan(job(), tmp_path / "s", groups="parameter", batch_size=8).complete


def test_a_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(pergrad.StoreError, match=r"Cannot write to(.|\n)*that can be written to"):
        scan(job(), tmp_path / "s")


# --- reading --------------------------------------------------------------------------------------


def test_top_and_tables(tmp_path: Path) -> None:
    scores = scan(job(), tmp_path, batch_size=8, groups="layer")
    table = scores.table().to_pandas()
    want = table.sort_values("norm", ascending=False).head(5)
    assert scores.top(5)["index"].to_pylist() == want["index"].tolist()
    want = table.sort_values("loss").head(3)
    assert scores.top(3, by="loss", smallest=True)["index"].to_pylist() == want["index"].tolist()
    assert scores.top(100).num_rows == 40
    assert scores.table(["norm"]).schema.names == ["norm"]
    assert scores.table(["norm", "index"]).schema.names == ["norm", "index"]
    assert scores.folder == tmp_path
    with pytest.raises(pergrad.UsageError, match=r"rank by 'speed'(.|\n)*norm:0"):
        scores.top(3, by="speed")
    with pytest.raises(pergrad.UsageError, match="rank by 'error'"):
        scores.top(3, by="error")
    with pytest.raises(pergrad.UsageError, match="at least one"):
        scores.top(0)
    with pytest.raises(pergrad.StoreError, match=r"no column speed(.|\n)*norm:0"):
        scores.table(["speed"])


def test_an_empty_store_has_an_empty_table(tmp_path: Path) -> None:
    interrupted(tmp_path, at=0)
    assert pergrad.open_scores(tmp_path).table().schema.names == ["index", "loss", "norm", "error"]


def test_the_manifest_says_what_was_scored(tmp_path: Path) -> None:
    task = job(key=str)
    manifest = scan(task, tmp_path, groups="layer", source="jobs.py:digits", command="me").manifest
    assert json.loads((tmp_path / "manifest.json").read_text()) == manifest
    assert (manifest["format"], manifest["version"]) == ("pergrad scores", 1)
    about = manifest["scored"]
    assert about["model"] == "Sequential"
    assert about["parameters"][0] == ["0.weight", [7, 5], "torch.float64"]
    assert about["examples"] == 40
    assert about["torch"] == torch.__version__
    assert about["pergrad"] == pergrad.__version__
    assert len(about["weights_hash"]) == len(about["keys_hash"]) == 32
    assert (manifest["job"], manifest["command"]) == ("jobs.py:digits", "me")
    assert manifest["settings"]["groups"] == {
        "0": ["0.weight", "0.bias"],
        "3": ["3.weight", "3.bias"],
    }
    for column in manifest["columns"].values():
        assert set(column) == {"type", "unit", "meaning"}
    assert manifest["columns"]["norm"]["unit"] == "loss per unit of parameter"
    field = pergrad.open_scores(tmp_path).table().schema.field("loss")
    assert field.metadata[b"unit"] == b"loss"


def test_weights_are_told_apart_in_any_form() -> None:
    from pergrad.scans.tensors import hash_of_tensors

    x = torch.arange(6.0).reshape(2, 3)
    forms = {
        "as it is": x, "cut": x[:, :2], "transposed": x.T, "half": x.half(),
        "bfloat16": x.bfloat16(), "complex": x + 1j, "conjugated": (x + 1j).conj(),
        "sparse": torch.eye(2).to_sparse(),
        "number": torch.tensor(1.0), "none": torch.zeros(0), "mask": x > 2,
    }  # fmt: skip
    hashes = {hash_of_tensors([("w", t)]) for t in forms.values()}
    assert len(hashes) == len(forms)
    assert hash_of_tensors([("w", x)]) == hash_of_tensors([("w", x.clone().requires_grad_())])
    assert hash_of_tensors([("w", x)]) != hash_of_tensors([("v", x)])
    assert hash_of_tensors([("w", x.T.contiguous().T)]) == hash_of_tensors([("w", x)])


def test_an_example_takes_few_bytes(tmp_path: Path) -> None:
    count = 50_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 3, generator=generator)
    net = nn.Linear(3, 1)
    task = pergrad.Job(net, torch.utils.data.TensorDataset(x), lambda m, b: m(b[0]).squeeze(1) ** 2)
    scan(task, tmp_path, batch_size=1024)
    assert sum(p.stat().st_size for p in parts(tmp_path)) < 15 * count


# --- other readers --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, small_parts: None) -> Path:
    broken = Listed(data(40), {7: ValueError("unreadable")})
    scan(job(data=broken, key=lambda i: f"k{i}"), tmp_path / "s", batch_size=8, groups="layer")
    assert len(parts(tmp_path / "s")) > 2
    return tmp_path / "s"


def check_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """The same as pergrad reads, in any order."""
    want = pergrad.open_scores(folder).table().to_pylist()
    assert sorted(rows, key=lambda row: row["index"]) == want
    assert want[7]["error"] == "ValueError: unreadable"
    assert want[7]["norm"] is None


def test_pandas_reads_it(folder: Path) -> None:
    import pandas as pd

    frame = pd.read_parquet(folder / "parts")
    assert frame["norm"].dtype == "float64"
    assert frame["norm"].isna().sum() == 1
    rows = frame.astype(object).where(frame.notna(), None).to_dict("records")
    check_rows(rows, folder)


def test_polars_reads_it(folder: Path) -> None:
    import polars as pl

    check_rows(pl.read_parquet(folder / "parts" / "*.parquet").to_dicts(), folder)
    lazy = pl.scan_parquet(folder / "parts" / "*.parquet").filter(pl.col("norm:0") > 0)
    assert lazy.collect().height == 39


def test_duckdb_reads_it(folder: Path) -> None:
    import duckdb

    found = duckdb.sql(f"select * from '{folder}/parts/*.parquet'")
    check_rows([dict(zip(found.columns, row, strict=True)) for row in found.fetchall()], folder)
    best = duckdb.sql(f"select key from '{folder}/parts/*.parquet' order by norm desc limit 1")
    assert best.fetchall()[0][0] == pergrad.open_scores(folder).top(1)["key"][0].as_py()


def test_hugging_face_datasets_reads_it(folder: Path, tmp_path: Path) -> None:
    import datasets

    found = datasets.load_dataset(
        "parquet", data_files=str(folder / "parts" / "*.parquet"), split="train",
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    check_rows(found.to_list(), folder)


def test_store_messages_list_a_few_parts_only(tmp_path: Path) -> None:
    many = [store.Part(tmp_path / f"p{i}", i, 10, "") for i in range(7)]
    assert "p4 and 2 more; 70 examples" in store.say_damaged(tmp_path, many)
