"""What a person sees of a long call: a bar for each pass, on stderr, as of a scan."""

import io
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attributing import job
from torch import nn

import pergrad
from pergrad.attribution.progress import bars, listening, tell
from pergrad.scans.progress import passes

TASK = job("perceptron")
QUERIES = TASK.data[:2]


def train(indices: list[int], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = job("perceptron").model
    with torch.no_grad():
        next(model.parameters()).add_(sum(indices) / 100)
    return model


def evaluated(out: Path, **options: Any) -> None:
    scores = torch.randn(2, len(TASK.data), dtype=torch.float64)
    pergrad.evaluate(train, TASK, QUERIES, scores, out=out, subsets=20, seeds=1, **options)


CALLS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "curvature": (
        lambda out, **o: pergrad.curvature(TASK, out, **o),
        ["covariances", "eigenvalues"],
    ),
    "influence": (lambda out, **o: pergrad.influence(TASK, QUERIES, out, **o), ["queries 0 to 1"]),
    "kernel": (
        lambda out, **o: pergrad.influence(TASK, QUERIES, out, method="kernel", **o),
        ["rows of the kernel"],
    ),
    "sketch": (lambda out, **o: pergrad.sketch(TASK, out, size=8, **o), ["sketched examples"]),
    "evaluate": (evaluated, ["retrained models"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_bars_are_shown(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call, named = CALLS[name]
    call(tmp_path / "quiet", progress=False)
    assert capfd.readouterr().err == ""
    call(tmp_path / "shown")
    said = capfd.readouterr().err
    assert all(each in said and "100%" in said for each in named)
    call(tmp_path / "shown")  # there is nothing left to do
    assert capfd.readouterr().err == ""


def test_who_listens_already_sees_them_alone(capfd: pytest.CaptureFixture[str]) -> None:
    heard = []
    with listening(lambda *each: heard.append(each)), bars(True):
        tell("passes", 1, 2)
    assert heard == [("passes", 1, 2)]
    assert capfd.readouterr().err == ""


def test_the_users_random_numbers_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        n for n in sys.modules if n.split(".")[0] == "rich" or n.endswith("scans.progress")
    ]:
        monkeypatch.delitem(sys.modules, name)
    random.seed(3)
    before = random.getstate()
    with bars(True):
        pass
    assert random.getstate() == before


def test_what_a_user_prints_into_a_file_goes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where stderr is a terminal, on which the bar is."""
    screen, file = io.StringIO(), io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, for rich
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", file)
    with passes() as told:
        told("passes", 1, 2)
        sys.stdout.write("mine\n")
    assert file.getvalue() == "mine\n"
    assert "passes" in screen.getvalue()
    assert "mine" not in screen.getvalue()
