"""What a model, a data set or the system do to a scan while it runs."""

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from helpers import assert_agrees
from scanning import Listed, data, job, losses, model, numbers, reference, scan
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

import pergrad
from pergrad.scans import model_state, scorer, writer
from pergrad.scans.tensors import all_finite, same

X = torch.tensor([[1.0, 0.0], [0.0, 2.0]])


# Of each layout and kind that plain code stumbles over.
TENSORS: dict[str, Callable[[], Tensor]] = {
    "coo": lambda: X.to_sparse(),
    "csr": lambda: X.to_sparse_csr(),
    "csc": lambda: X.to_sparse_csc(),
    "jagged": lambda: torch.nested.nested_tensor(
        [torch.ones(2), torch.ones(3)], layout=torch.jagged
    ),
    "mkldnn": lambda: X.to_mkldnn(),
    "meta": lambda: torch.zeros(3, device="meta"),
    "float8": lambda: X.to(torch.float8_e4m3fn),
    "float4": lambda: torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "complex": lambda: X.to(torch.complex64).conj(),
    "bool": lambda: X > 0,
}
ODD = pytest.mark.parametrize("kind", list(TENSORS))
QUIET = pytest.mark.filterwarnings("ignore:Sparse C:UserWarning", "ignore:The PyTorch API of nes")


class Holding(nn.Module):
    """A model with something beside its weights."""

    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        self.inner = model()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@ODD
@QUIET
def test_buffers_of_any_kind(kind: str, tmp_path: Path) -> None:
    net = Holding(odd=TENSORS[kind]())
    net.train()
    before, buffer = states(), net.odd
    table = scan(job(12, model=net), tmp_path).table()
    want = naive.norms(reference(net, data(12)))
    assert_agrees(numbers(table, "norm"), want, want)
    assert net.training
    assert net.odd is buffer
    assert states() == before
    assert scan(job(12, model=net), tmp_path).table().equals(table)


@ODD
@QUIET
def test_frozen_parameters_of_any_kind(kind: str, tmp_path: Path) -> None:
    net = Holding()
    net.odd = nn.Parameter(TENSORS[kind](), requires_grad=False)
    table = scan(job(12, model=net), tmp_path).table()
    want = naive.norms(reference(net, data(12)))
    assert_agrees(numbers(table, "norm"), want, want)


@ODD
@QUIET
def test_tensors_of_any_kind_are_compared(kind: str) -> None:
    x, y = TENSORS[kind](), TENSORS[kind]()
    assert same(x, y)
    assert all_finite([x])
    if kind == "coo":
        assert not same(x, (2 * X).to_sparse())
        assert not same(x, torch.zeros(2, 2).to_sparse())
        assert not all_finite([(X / 0).to_sparse()])
    if kind == "float8":
        assert not same(x, (2 * X).to(torch.float8_e4m3fn))
        assert not all_finite([torch.tensor([torch.nan]).to(torch.float8_e4m3fn)])


def test_lazy_modules_are_refused_before_the_first_example(tmp_path: Path) -> None:
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(pergrad.UsageError, match=r"parameter `0.weight` has no shape(.|\n)*Call"):
        scan(job(model=lazy), tmp_path)
    net = Holding()
    net.register_buffer("wait", UninitializedBuffer())
    with pytest.raises(pergrad.UsageError, match=r"buffer `wait` has no shape(.|\n)*one batch"):
        scan(job(model=net), tmp_path)


def test_the_model_is_put_back_where_comparing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(a: Tensor, b: Tensor) -> bool:
        raise NotImplementedError("nothing to compare with")

    monkeypatch.setattr(model_state, "same", refuse)
    net = Holding(count=torch.zeros(2))
    net.train()
    before = states()

    def counting(net: Any, batch: Any) -> Tensor:
        net.count += 1
        torch.rand(1)
        return losses(net, batch)

    scan(job(12, model=net, losses=counting), tmp_path, recheck=False)
    assert net.count.tolist() == [0, 0]
    assert net.training
    assert states() == before


# --- memory ---------------------------------------------------------------------------------------


class Hungry(torch.utils.data.Dataset):
    """Some examples for which memory never suffices."""

    def __init__(self, count: int, bad: set[int]) -> None:
        self.items, self.bad = data(count), bad

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        if i in self.bad:
            raise MemoryError("an image of a million pixels")
        return self.items[i]


@pytest.mark.parametrize("workers", [0, 1])
def test_examples_too_large_alone_halve_nothing_for_the_others(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pergrad.scans.driver.sensible_batch_size", lambda job, seed: 32)
    bad = {7, 40, 41, 199}
    seen: list[int] = []

    def counted(net: nn.Module, batch: Any) -> Tensor:
        seen.append(len(batch[0]))
        return losses(net, batch)

    scores = scan(job(data=Hungry(200, bad), losses=counted), tmp_path, workers=workers)
    assert set(scores.failures()["index"].to_pylist()) == bad
    assert scores.manifest["settings"]["batch_size"] == 32
    assert len(seen) < 40
    want = naive.norms(reference(model(), data(200)))
    good = [i for i in range(200) if i not in bad]
    assert_agrees(torch.from_numpy(scores["norm"].copy())[good], want[good], want[good])


class Narrow(nn.Module):
    """Has room for few examples at first, and for more later."""

    def __init__(self, later: int) -> None:
        super().__init__()
        self.inner, self.calls, self.later = model(), 0, later
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) > (4 if self.calls < self.later else 1000):
            raise torch.OutOfMemoryError("out of memory")
        self.sizes.append(len(x))
        return self.inner(x)


@pytest.mark.parametrize(("later", "ends"), [(20, 16), (10**6, 4)])
def test_batches_grow_again_when_memory_is_there(
    later: int, ends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pergrad.scans.driver.sensible_batch_size", lambda job, seed: 16)
    monkeypatch.setattr(scorer, "PATIENCE", 4)
    net = Narrow(later)
    scores = scan(job(800, model=net), tmp_path)
    assert scores.table()["error"].null_count == 800
    assert scores.manifest["settings"]["batch_size"] == ends
    assert net.sizes[-1] == ends
    assert net.calls - len(net.sizes) < 12  # each time that more is tried it takes twice as long
    want = naive.norms(reference(model(), data(800)))
    assert_agrees(numbers(scores.table(), "norm"), want, want)


def test_another_batch_size_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pergrad.scans.driver.sensible_batch_size", lambda job, seed: 16)
    scan(job(40, model=Narrow(10**6)), tmp_path, progress=True)
    assert "Memory ran out: batches had 16 examples, and have 4 now." in capsys.readouterr().err


# --- processes that fetch -------------------------------------------------------------------------


class Deadly(torch.utils.data.Dataset):
    """Kills the process that fetches one of its examples, so many times."""

    def __init__(self, at: int, times: int, deaths: Path) -> None:
        self.items, self.at, self.times, self.deaths = data(64), at, times, deaths
        self.home = os.getpid()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        if i == self.at and os.getpid() != self.home and len(os.listdir(self.deaths)) < self.times:
            (self.deaths / str(len(os.listdir(self.deaths)))).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.items[i]


@pytest.mark.parametrize("at", [0, 21, 63])
def test_a_process_that_dies_once_costs_nothing(at: int, tmp_path: Path) -> None:
    (tmp_path / "deaths").mkdir()
    task = job(data=Deadly(at, 1, tmp_path / "deaths"))
    with pytest.warns(pergrad.WorkerWarning, match=r"died(.|\n)*fetched again, one batch"):
        scores = scan(task, tmp_path / "s", workers=2, batch_size=4)
    assert scores.table().equals(scan(job(64), tmp_path / "whole", batch_size=4).table())


def test_examples_that_kill_twice_are_named(tmp_path: Path) -> None:
    (tmp_path / "deaths").mkdir()
    task = job(data=Deadly(21, 9, tmp_path / "deaths"))
    with (
        pytest.warns(pergrad.WorkerWarning, match="died"),
        pytest.raises(pergrad.WorkerError, match=r"examples 20 to 23 died twice(.|\n)*workers=0"),
    ):
        scan(task, tmp_path / "s", workers=2, batch_size=4)
    kept = pergrad.open_scores(tmp_path / "s").table()["index"].to_pylist()
    assert kept == list(range(20))
    assert scan(task, tmp_path / "s", batch_size=4).complete


# --- data that do what data should not ------------------------------------------------------------


def test_data_that_change_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Moving(Listed):
        def __getitem__(self, i: int) -> Any:
            os.chdir("/")
            return self.items[i]

    monkeypatch.chdir(tmp_path)
    scores = scan(job(data=Moving(data(40), {})), "here", batch_size=8)
    assert scores.folder == tmp_path / "here"
    assert scores.complete
    assert scores.report(tmp_path / "page.html").exists()


@pytest.mark.parametrize("given", [False, True])
def test_parameters_that_change_meanwhile(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No scores of two models under one name."""
    monkeypatch.setattr(writer, "ROWS_PER_PART", 8)
    net = model()
    params = {"first": net[0].weight} if given else None

    class Training(Listed):
        def __getitem__(self, i: int) -> Any:
            if i == 20:
                net[0].weight.data.mul_(2)
            return self.items[i]

    task = job(model=net, params=params, data=Training(data(40), {}))
    with pytest.raises(pergrad.UsageError, match=r"changed while(.|\n)*copy.deepcopy"):
        scan(task, tmp_path, batch_size=8)
    assert len(pergrad.open_scores(tmp_path)) == 0
    assert list((tmp_path / "set-aside").iterdir())
    again = scan(job(model=net, params=params), tmp_path, batch_size=8).table()
    assert again.equals(scan(job(model=net, params=params), tmp_path / "new", batch_size=8).table())


def test_an_embedding_that_shortens_its_rows_is_scored(tmp_path: Path) -> None:
    table = nn.Embedding(4, 3, max_norm=0.1)
    task = job(
        model=table, data=[i % 4 for i in range(20)], losses=lambda net, i: net(i).square().sum(1)
    )
    assert scan(task, tmp_path, batch_size=8).complete


def test_too_few_items_are_the_fault_of_the_data(tmp_path: Path) -> None:
    class Short(Listed):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            return [self.items[i] for i in indices[1:]]

    with pytest.raises(pergrad.UsageError, match=r"returned 7 items for 8(.|\n)*one for each"):
        scan(job(data=Short(data(40), {})), tmp_path, batch_size=8)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "parts").write_text("a file")
    with pytest.raises(pergrad.StoreError, match=r"File exists \(.*/parts\)(.|\n)*Make room"):
        scan(job(), tmp_path, batch_size=8)
