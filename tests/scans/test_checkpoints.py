"""Losses and norms at several checkpoints in one folder: the numbers of a loop over them."""

import shutil
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import safetensors.torch
import torch
from scanning import Listed, data, job, losses, reference, scan
from torch import Tensor, nn

import pergrad
from pergrad.scans import adding, writer
from pergrad.scans.checkpoints import Checkpoint
from pergrad.scans.store import Store

NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "ROWS_PER_PART", 16)


def states(net: nn.Module, names: tuple[str, ...] = NAMES) -> dict[str, dict[str, Tensor]]:
    """Weights that differ from each other, and by name are always the same."""
    found = {}
    for name in names:
        generator = torch.Generator().manual_seed(ord(name))
        found[name] = {
            n: t + torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
            for n, t in net.state_dict().items()
        }
    return found


def broken(at: dict[int, Any] | None = None, dtype: torch.dtype = torch.float64) -> pergrad.Job:
    items = data(40, dtype)
    return job(data=Listed(items, {29: ValueError("broken"), **(at or {})}), dtype=dtype)


def columns(names: tuple[str, ...]) -> list[str]:
    both = [f"{kind}@{name}" for name in names for kind in ("loss", "norm")]
    return [*both, "loss@mean", "norm@mean"]


def at_once(out: Path, names: tuple[str, ...] = NAMES, **more: Any) -> pergrad.Scores:
    task = broken()
    return scan(task, out, batch_size=8, checkpoints=states(task.model, names), **more)


# --- the numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_loop_over_checkpoints(dtype: torch.dtype, tmp_path: Path) -> None:
    task, items = broken(dtype=dtype), data(40, dtype)
    task.model.train()
    before = {n: t.clone() for n, t in task.model.state_dict().items()}
    given = states(task.model)
    scores = scan(task, tmp_path, batch_size=8, groups="layer", checkpoints=given)
    assert all(torch.equal(t, before[n]) for n, t in task.model.state_dict().items())
    assert task.model.training
    good = [i for i in range(40) if i != 29]
    found = {}
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for name, state in {"": before, **given}.items():
        task.model.load_state_dict(state)
        with torch.no_grad():
            x, y = (torch.utils.data.default_collate(items)[k] for k in (0, 1))
            loss = losses(task.model.eval(), (x, y)).double()
        norm = naive.norms(reference(task.model, items))
        mark = f"@{name}" if name else ""
        found |= {f"loss{mark}": loss.numpy()[good], f"norm{mark}": norm.numpy()[good]}
    for kind in ("loss", "norm"):
        found[f"{kind}@mean"] = np.mean([found[f"{kind}@{name}"] for name in NAMES], axis=0)
    for column, want in found.items():
        assert np.allclose(scores[column][good], want, rtol=tolerance, atol=tolerance), column
        assert np.isnan(scores[column][29])
    assert scores.table().schema.names[-9:] == [*columns(NAMES), "error"]
    about = scores.manifest["columns"]["loss@mean"]
    assert about["meaning"] == "mean of the losses over the 3 checkpoints"
    assert about["type"] == ("double" if dtype == torch.float64 else "float")
    top = scores.top(1, by="loss@mean")
    assert top["index"].to_pylist() == [good[int(found["loss@mean"].argmax())]]


def test_batch_norm_in_training_mode(tmp_path: Path) -> None:
    """Its buffers are a checkpoint's, change in every batch, and are the model's own afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)).double()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    early = {n: t + 1 for n, t in before.items()}
    task = job(model=net)
    how: dict[str, Any] = {"batch_size": 8, "mode": "train", "on_mixing": "exact"}
    found = scan(task, tmp_path / "both", checkpoints={"early": early}, **how)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    net.load_state_dict(early)
    alone = scan(task, tmp_path / "early", **how)
    for kind in ("loss", "norm"):
        assert np.array_equal(found[f"{kind}@early"], alone[kind])
        assert np.array_equal(found[f"{kind}@mean"], alone[kind])


def test_losses_that_change_their_batch(tmp_path: Path) -> None:
    """And batches that cannot be copied."""

    class Batch(dict):
        def __deepcopy__(self, memo: object) -> None:
            raise RuntimeError("no copies of this")

    def changing(net: nn.Module, batch: Any) -> Tensor:
        x = batch.pop("x")
        return losses(net, (x.mul_(2), batch["y"]))

    for collated in (dict, Batch):

        def collate(items: list[Any], kind: type = collated) -> Any:
            x, y = torch.utils.data.default_collate(items)
            return kind(x=x, y=y)

        task = job(losses=changing, collate=collate)
        state = states(task.model, ("a",))
        found = scan(task, tmp_path / collated.__name__, batch_size=8, checkpoints=state)
        task.model.load_state_dict(state["a"])
        alone = scan(task, tmp_path / f"{collated.__name__}-alone", batch_size=8)
        assert np.array_equal(found["loss@a"], alone["loss"])
        assert np.array_equal(found["norm@a"], alone["norm"])


def test_an_example_that_fails_at_one_checkpoint(tmp_path: Path) -> None:
    def picky(net: nn.Module, batch: Any) -> Tensor:
        if float(net[0].bias.detach()[0]) == 7.0 and bool((batch[0] == items[11][0]).all(1).any()):
            raise ValueError("not with these weights")
        return losses(net, batch)

    items = data(40)
    task = job(losses=picky)
    given = states(task.model, ("a", "b"))
    given["b"]["0.bias"][0] = 7.0
    scores = scan(task, tmp_path, batch_size=8, checkpoints=given)
    assert scores.failures()["index"].to_pylist() == [11]
    assert np.isnan(scores["loss@a"][11])


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    """They are that of a checkpoint alone; no example is looked at alone because of them."""
    calls = 0

    def counted(net: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return losses(net, batch)

    task = job(losses=counted)
    given = states(task.model, ("a", "b"))
    given["b"]["0.bias"][0] = torch.nan
    scores = scan(task, tmp_path, batch_size=8, checkpoints=given)
    assert calls <= 3 * 5 + 1  # and once for the size of a batch
    assert np.isfinite(scores["norm"]).all()
    assert np.isfinite(scores["norm@a"]).all()
    assert np.isnan(scores["norm@b"]).all()
    assert np.isnan(scores["loss@mean"]).all()


# --- what a checkpoint may be ---------------------------------------------------------------------


def test_forms_of_checkpoints(tmp_path: Path) -> None:
    task = job()
    given = states(task.model, ("a", "b", "c", "d"))
    torch.save(given["a"], tmp_path / "epoch-1.pt")
    safetensors.torch.save_file(given["b"], tmp_path / "epoch-2.safetensors")
    other = job().model
    other.load_state_dict(given["c"])
    live = task.model.state_dict()  # is overwritten while the others are in the model
    mixed = [tmp_path / "epoch-1.pt", str(tmp_path / "epoch-2.safetensors"), other,
             lambda: given["d"], live]  # fmt: skip
    scores = scan(task, tmp_path / "mixed", batch_size=8, checkpoints=mixed)
    names = ("epoch-1", "epoch-2", "2", "3", "4")
    assert list(scores.manifest["settings"]["checkpoints"]) == list(names)
    plain = scan(job(), tmp_path / "plain", batch_size=8, checkpoints=given)
    for name, like in zip(names, "abcd", strict=False):
        assert np.array_equal(scores[f"norm@{name}"], plain[f"norm@{like}"])
    assert np.array_equal(scores["norm@4"], scores["norm"])
    assert scan(task, tmp_path / "mixed", checkpoints=mixed).table().equals(scores.table())


class Copying(nn.Linear):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {n: t.clone() for n, t in super().state_dict(*args, **kwargs).items()}


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    task = job()
    state = states(task.model, ("a",))["a"]
    for given, says in (
        (state, "checkpoints is a dict. Pass a list"),
        ("epoch.pt", "checkpoints is a str. Pass a list"),
        ([], "checkpoints is empty. Pass at least one"),
        ({"mean": state}, "name 'mean'(.|\n)*Pass a mapping from other names"),
        ({"": state}, "the name ''(.|\n)*Pass a mapping from other names"),
        (["x/1.pt", "y/1.pt"], "Two checkpoints have the name '1'(.|\n)*from other names"),
        ({1: state, "1": state}, "Two checkpoints have the name '1'"),
        ({"a": tmp_path / "no.pt"}, r"checkpoints\['a'\], .* cannot be read(.|\n)*Pass a file"),
        ({"a": {"x": torch.ones(1)}}, r"checkpoints\['a'\] is of another model: it lacks"),
        ({"a": {**state, "0.bias": torch.ones(1)}}, r"has shape \(1,\) for `0.bias`"),
        ({"a": 3}, r"checkpoints\['a'\] is a int. Pass a state dict"),
    ):
        with pytest.raises(pergrad.UsageError, match=says):
            scan(task, tmp_path / "s", checkpoints=given)
    assert not (tmp_path / "s" / "manifest.json").exists()
    copying = pergrad.Job(Copying(5, 3), data(4, torch.float32), losses)
    with pytest.raises(pergrad.UsageError, match=r"`weight`(.|\n)*Scan once for each checkpoint"):
        scan(copying, tmp_path / "s", checkpoints={"a": copying.model.state_dict()})


def test_a_checkpoint_that_changes_meanwhile(tmp_path: Path) -> None:
    task = job()
    state = states(task.model, ("a",))["a"]
    calls = 0

    def source() -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        return {n: t + (calls > 1) for n, t in state.items()}

    with pytest.raises(pergrad.UsageError, match=r"point a has changed(.|\n)*and scan again"):
        scan(task, tmp_path, batch_size=8, checkpoints={"a": source})
    assert Checkpoint(state, "a").apart([task.model]).source is state  # no copy where none is due


# --- more of them, later --------------------------------------------------------------------------


def test_only_what_is_missing_is_scored(tmp_path: Path) -> None:
    whole = at_once(tmp_path / "whole", groups="layer")
    scan(broken(), tmp_path / "s", batch_size=8)
    for names in (("a",), ("a", "b", "c")):
        scores = at_once(tmp_path / "s", names)
        assert [n for n in scores.table().column_names if "@" in n] == columns(names)
    scores = at_once(tmp_path / "s", groups="layer")
    for name in columns(NAMES):
        assert scores.table()[name].equals(whole.table()[name])
    for name in ("norm", "norm:0", "norm:3"):  # with groups a norm may be rounded otherwise
        assert np.allclose(scores[name], whole[name], rtol=1e-12, equal_nan=True)
    assert scores.manifest["columns"] == whole.manifest["columns"]
    assert scores.complete
    assert scores.damaged() == []
    assert not list((tmp_path / "s").glob("adding-*"))
    passes = 0

    def counted(net: nn.Module, batch: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return losses(net, batch)

    task = job(losses=counted)
    given = states(task.model)
    for k in (2, 3):
        passes = 0
        scan(task, tmp_path / "t", batch_size=8, recheck=False,
             checkpoints={name: given[name] for name in NAMES[:k]})  # fmt: skip
    assert passes == 2 * 5  # the model as it is, and the one that is new


def test_another_checkpoint_of_the_same_name(tmp_path: Path) -> None:
    out = tmp_path / "s"
    at_once(out, ("a", "b"))
    before = pergrad.open_scores(out).table()
    task = broken()
    given = states(task.model)
    for other, says in (
        ({"a": given["a"], "b": given["c"]}, "the checkpoint 'b' has other values"),
        ({"a": given["a"], "b": given["c"], "c": given["c"]}, "the checkpoint 'b' has other"),
        ({"a": given["a"]}, "the checkpoint 'b' is not given any more"),
        (None, "the checkpoint 'a' is not given any more"),
    ):
        with pytest.raises(pergrad.StoreError, match=rf"{says}(.|\n)*another folder"):
            scan(task, out, checkpoints=other)
    # also where it has been scored only in part: at once, and beside finished scores
    for kind in ("at once", "later"):
        part = tmp_path / kind
        if kind == "later":
            scan(broken(), part, batch_size=8)
        with pytest.raises(KeyboardInterrupt):
            scan(broken({20: KeyboardInterrupt()}), part, batch_size=8, recheck=False,
                 checkpoints={"a": given["a"]})  # fmt: skip
        with pytest.raises(pergrad.StoreError, match=r"checkpoint 'a' has other values"):
            scan(broken(), part, checkpoints={"a": given["b"]})
        scores = scan(broken(), part, checkpoints={"a": given["a"]})
        assert np.array_equal(scores["norm@a"], pergrad.open_scores(out)["norm@a"], equal_nan=True)
    assert pergrad.open_scores(out).table().equals(before)


@pytest.mark.parametrize("at", [3, 17, 39])
def test_a_stop_while_they_are_scored(at: int, tmp_path: Path) -> None:
    whole = at_once(tmp_path / "whole").table()
    for later in (False, True):
        out = tmp_path / f"s{later}"
        if later:
            before = at_once(out, ("a",)).table()
        task = broken({at: KeyboardInterrupt()})
        with pytest.raises(KeyboardInterrupt):
            scan(task, out, batch_size=8, recheck=False, checkpoints=states(task.model))
        if later:
            assert pergrad.open_scores(out).table().equals(before)
        assert at_once(out).table().equals(whole)


class Stop(BaseException):
    """As a kill would be, but for the process."""


@pytest.mark.parametrize("names", [NAMES, ("a",)])
def test_a_stop_while_they_are_put_beside(
    names: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written or removed. Nobody reads a mean over some of the checkpoints, and
    then either more of them or those there were may be asked for.
    """
    monkeypatch.setattr(adding, "PARTS_AT_ONCE", 1)
    whole = at_once(tmp_path / "whole").table()
    few = at_once(tmp_path / "few", ("a",)).table()
    at = 0
    while True:
        out = tmp_path / f"s{at}"
        shutil.copytree(tmp_path / "few", out)
        calls = 0

        def counted(real: Any, at: int = at) -> Any:
            def call(*arguments: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == at + 1:
                    raise Stop
                return real(*arguments)

            return call

        real = adding.put_beside

        def beside(*arguments: Any, real: Any = real, counted: Any = counted) -> None:
            with pytest.MonkeyPatch.context() as within:
                within.setattr(adding, "_remove", counted(adding._remove))
                within.setattr(adding.shutil, "rmtree", counted(adding.shutil.rmtree))
                within.setattr(Store, "save", counted(Store.save))
                within.setattr(Store, "put", counted(Store.put))
                real(*arguments)

        stopped = False
        with monkeypatch.context() as within:
            within.setattr("pergrad.scans.driver.put_beside", beside)
            try:
                at_once(out)
            except Stop:
                stopped = True
        table = pergrad.open_scores(out).table()
        assert table.num_rows == 40
        wanted = whole if "loss@c" in table.column_names else few
        assert table.equals(wanted.select(table.column_names))
        assert {"loss@mean", "loss@a"} & set(table.column_names)
        if names == ("a",) and "loss@c" in table.column_names:
            break  # all were there: nothing goes back
        assert at_once(out, names).table().equals(whole if names == NAMES else few)
        assert Store(out).superseded() == []
        if names == ("a",):
            assert at_once(out).table().equals(whole)
        assert not list(out.glob("adding-*"))
        if not stopped:
            break
        at += 1
    assert at > 8


def test_damaged_parts_are_scored_with_all_columns(tmp_path: Path) -> None:
    whole = at_once(tmp_path / "s").table()
    part = sorted((tmp_path / "s" / "parts").iterdir())[0]
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(pergrad.StoreError, match='rescore="damaged"'):
        at_once(tmp_path / "s")
    assert at_once(tmp_path / "s", rescore="damaged").table().equals(whole)


def test_processes_that_fetch(tmp_path: Path) -> None:
    whole = at_once(tmp_path / "whole").table()
    assert at_once(tmp_path / "s", workers=1).table().equals(whole)
