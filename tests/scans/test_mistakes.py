"""Common mistakes: each is one error that says what it is and what to write instead."""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from scanning import data, job, losses, model, scan
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pergrad

X, Y = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
FRAME = {"a": [1.0, 2.0], "b": [3.0, 4.0]}


def remedies(cases: dict[str, tuple[Any, str]]) -> Any:
    return pytest.mark.parametrize(("given", "says"), cases.values(), ids=list(cases))


DATA = {
    "dict of tensors": ({"x": X, "y": Y}, r"items 'x', 'y', not by number(.|\n)*dict\(zip\(data"),
    "dict of data sets": ({"train": data(3)}, r"several data sets(.|\n)*data\[\"train\"\]"),
    "tuple of tensors": ((X, Y), r"tuple of tensors(.|\n)*TensorDataset\(\*data\)"),
    "pandas": (pd.DataFrame(FRAME), r"columns, not examples(.|\n)*to_dict\(\"records\"\)"),
    "polars": (pl.DataFrame(FRAME), r"columns, not examples(.|\n)*data.rows\(\)"),
    "pyarrow": (pa.table(FRAME), r"columns, not examples(.|\n)*data.to_pylist\(\)"),
    "loader": (DataLoader(TensorDataset(X, Y)), r"DataLoader(.|\n)*loader.dataset"),
    "path": ("train.csv", r"items are letters(.|\n)*Dataset that reads the file"),
}


@remedies(DATA)
def test_data_of_another_kind(given: Any, says: str) -> None:
    with pytest.raises(pergrad.UsageError, match=f"`data` (.|\n)*{says}"):
        job(data=given)
    with pytest.raises(pergrad.UsageError, match=f"`MeanGradient.data` (.|\n)*{says}"):
        pergrad.MeanGradient(given)


def test_a_mapping_by_number_is_data(tmp_path: Path) -> None:
    whole = scan(job(6), tmp_path / "list").table()
    assert scan(job(data=dict(enumerate(data(6)))), tmp_path / "dict").table().equals(whole)


@remedies({
    "x, y": (lambda net, x, y: x, r"missing a required argument: 'y'(.|\n)*x, y = batch"),
    "batch": (lambda batch: batch, r"too many positional(.|\n)*def losses\(model, batch\)"),
    "module": (nn.CrossEntropyLoss(), r"loss of outputs and targets(.|\n)*reduction=\"none\""),
    "function": (F.mse_loss, r"`losses` is mse_loss, a loss of outputs(.|\n)*def losses"),
})  # fmt: skip
def test_losses_of_another_form(given: Any, says: str) -> None:
    with pytest.raises(pergrad.UsageError, match=says):
        job(losses=given)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 0, 1)])
def test_a_job_in_another_order(order: tuple[int, ...]) -> None:
    own: list[Any] = [model(), data(3), losses]
    with pytest.raises(pergrad.UsageError, match=r"order is pergrad.Job\(model, data, losses\)"):
        pergrad.Job(*[own[k] for k in order])


def test_a_scan_in_another_order(tmp_path: Path) -> None:
    for given, says in (
        ((tmp_path, job()), r"order is pergrad.scan\(job, out\): swap"),
        ((lambda: job(), tmp_path), "that it returns: call it"),
        ((job(), None), r"is a NoneType(.|\n)*Pass its path"),
    ):
        with pytest.raises(pergrad.UsageError, match=says):
            pergrad.scan(*given)  # type: ignore[arg-type]
    with pytest.raises(pergrad.UsageError, match=r"is a Job(.|\n)*pergrad.scan\(job, folder\)"):
        pergrad.open_scores(job())  # type: ignore[arg-type]


def matrix() -> pergrad.GradientMatrix:
    net = model()
    return pergrad.gradients(losses(net, (X, Y)), net)


@remedies({
    "matrix": (matrix(), r'is a GradientMatrix(.|\n)*against=\{"valid": it\}'),
    "mean": (pergrad.MeanGradient(data(3)), r'a MeanGradient(.|\n)*against=\{"valid": it\}'),
    "data": (data(3), r'is a list(.|\n)*against=\{"valid": pergrad.MeanGradient\(it\)\}'),
    "named data": ({"v": data(3)}, r"against\['v'\] is a list(.|\n)*MeanGradient\(it\)"),
    "data set": ({"v": TensorDataset(X, Y)}, r"TensorDataset(.|\n)*MeanGradient\(it\)"),
    "number": ({"v": 3}, r"against\['v'\] is a int(.|\n)*direction: a mapping"),
    "text": ({"v": "valid"}, r"against\['v'\] is a str(.|\n)*pergrad.MeanGradient\(examples\)"),
})  # fmt: skip
def test_references_of_another_kind(given: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=says):
        scan(job(6), tmp_path, against=given)


@remedies({
    "absent": ("cuda:99", r"'cuda:99', and torch(.|\n)*Leave it out"),
    "unknown": ("gpu", r"'gpu', which names no device(.|\n)*cuda:1"),
    "number": (1.5, r"1.5, which names no device(.|\n)*cpu"),
})  # fmt: skip
def test_devices_that_are_not_there(given: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=says):
        scan(job(6), tmp_path, device=given)
    assert not list(tmp_path.iterdir())


@remedies({
    "ragged": ([torch.ones(k) for k in range(1, 4)], r"different sizes(.|\n)*`collate` that pads"),
    "numbers": ([[1.0, 2.0]] * 4, r"list of numbers(.|\n)*collate=torch.tensor"),
    "columns": ([X, Y], r"list of 2 tensors(.|\n)*TensorDataset\(\*data\)"),
})  # fmt: skip
def test_what_collates_to_something_else(given: Any, says: str, tmp_path: Path) -> None:
    def strict(net: nn.Module, batch: Any) -> Any:
        if not isinstance(batch, torch.Tensor) or batch.dim() != 2:
            raise ValueError("not a matrix")
        return net(batch).sum(1)

    ragged = says.startswith("different")
    task = job(losses=strict, data=[torch.ones(5, dtype=torch.float64)] * 4 if ragged else given)
    against = {"v": pergrad.MeanGradient(given)} if ragged else None
    with pytest.raises(pergrad.UsageError, match=says):
        scan(task, tmp_path, against=against)


def test_a_mean_with_a_dimension(tmp_path: Path) -> None:
    mean = job(losses=lambda net, batch: losses(net, batch).mean()[None])
    with pytest.raises(pergrad.UsageError, match=r"1 numbers(.|\n)*no mean(.|\n)*\"none\""):
        scan(mean, tmp_path)


@pytest.mark.parametrize("spread", [
    lambda mean, count: mean.expand(count), lambda mean, count: mean.repeat(count),
])  # fmt: skip
def test_a_mean_for_each(spread: Any, tmp_path: Path) -> None:
    mean = job(losses=lambda net, batch: spread(losses(net, batch).mean(), len(batch[0])))
    with pytest.raises(pergrad.UsageError, match=r"given to all of them(.|\n)*reduction=\"none\""):
        scan(mean, tmp_path / "s", batch_size=8)
    alike = job(data=data(1) * 5)  # of examples that are all the same the losses are, too
    assert scan(alike, tmp_path / "alike", batch_size=8).complete


OPTIMIZER = torch.optim.SGD(model().parameters(), 0.1)


@remedies({
    "optimizer": (OPTIMIZER, r"is an optimizer \(SGD\)(.|\n)*for group in optimizer.param_groups"),
    "groups": (OPTIMIZER.param_groups, r"holds a dict(.|\n)*for group in optimizer.param_groups"),
    "state": (model().state_dict(), r"is a state_dict\(\)(.|\n)*model.named_parameters\(\)"),
})  # fmt: skip
def test_params_of_another_kind(given: Any, says: str, tmp_path: Path) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: pergrad.norms(losses(model(), (X, Y)), given),
        lambda: scan(job(params=given), tmp_path),
    ]
    for call in calls:
        with pytest.raises(pergrad.UsageError, match=f"`params` {says}"):
            call()


@remedies({
    "model": (model(), r"losses come first(.|\n)*pergrad.norms\(losses, model\)"),
    "parameters": (list(model().parameters()), r"losses come first(.|\n)*norms\(losses, params\)"),
    "scalars": (list(losses(model(), (X, Y))), r"list of scalars: torch.stack\(losses\)"),
    "output": ({"loss": X.mean()}, r"mean over the batch(.|\n)*from its logits"),
})  # fmt: skip
def test_losses_of_another_kind(given: Any, says: str) -> None:
    with pytest.raises(pergrad.UsageError, match=says):
        pergrad.norms(given, model())


@remedies({
    "model": (model(), r"is a Sequential(.|\n)*dict\(model.named_parameters\(\)\)"),
    "number": (3, r"is a int(.|\n)*a flat tensor \(66,\)"),
})  # fmt: skip
def test_directions_of_another_kind(given: Any, says: str) -> None:
    net = model()
    with pytest.raises(pergrad.UsageError, match=says):
        pergrad.dots(losses(net, (X, Y)), net, against=given)


@pytest.mark.parametrize(("wrong", "right"), [("loss", "losses"), ("dataset", "data")])
def test_a_job_with_a_misspelt_argument(wrong: str, right: str) -> None:
    given = {"model": nn.Linear(2, 1), "data": [1], "losses": lambda m, b: b}
    given[wrong] = given.pop(right)
    with pytest.raises(
        pergrad.UsageError, match=rf"no argument {wrong}\. Did you mean `{right}`\?"
    ):
        pergrad.Job(**given)
    assert list(inspect.signature(pergrad.Job).parameters)[:3] == ["model", "data", "losses"]
    job = pergrad.Job(nn.Linear(2, 1), [1], print)
    assert dataclasses.replace(job, data=[1, 2]).data == [1, 2]
