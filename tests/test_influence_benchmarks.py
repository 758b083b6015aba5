"""The benchmark of influences: what pergrad is timed at is right, and what the tables say of it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import influences  # noqa: E402
import tables  # noqa: E402
from attributors import libraries, shown, workloads  # noqa: E402


def rows(work: Any, data: Any, names: list[str]) -> dict[str, Tensor]:
    """name -> (B, *shape), one backward pass for each example."""
    named = dict(work.model.named_parameters())
    found: dict[str, list[Tensor]] = {n: [] for n in names}
    for x, y in data:
        loss = work.losses(work.model, x[None], y[None]).sum()
        for n, g in zip(names, torch.autograd.grad(loss, [named[n] for n in names]), strict=True):
            found[n].append(g)
    return {n: torch.stack(parts) for n, parts in found.items()}


@pytest.mark.parametrize("name", list(workloads.WORKLOADS))
def test_what_is_timed_is_right(name: str, tmp_path: Path) -> None:
    work = workloads.build(name, tiny=True)
    names = [f"{n}.{p}" for n in work.layers for p in ("weight", "bias")]
    names = [n for n in names if n in dict(work.model.named_parameters())]
    G, K = (rows(work, data, names) for data in (work.data, work.queries))
    want = sum(torch.einsum("q...,b...->qb", K[n].flatten(1), G[n].flatten(1)) for n in names)
    found = libraries.pergrad(work, "identity", tmp_path / "identity")
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    solved = libraries.pergrad(work, "ekfac", tmp_path / "ekfac")
    assert solved.shape == want.shape
    assert float((solved * want).mean()) > 0
    assert not torch.allclose(solved, want)


def test_the_record_has_every_cell() -> None:
    record = tables.read_other("influences")
    assert record is not None
    assert list(record["workloads"]) == list(influences.TARGETS)
    assert set(record["versions"]) == {"kronfluence", "dattri-llm"}
    for work in record["workloads"].values():
        for method, each in work["methods"].items():
            assert tuple(each) == influences.LIBRARIES
            assert all(one["off"] <= influences.SAME[method] for one in each.values())
    text = shown.influences(record, tables._table, "a machine")
    assert text.count("\n|") == 2 + 6
    met = [ratio >= target for _, _, ratio, target in shown.faster(record)]
    assert text.count("| yes |") == sum(met)
    assert text.count("| **no** |") == len(met) - sum(met)
    short = json.loads(json.dumps(record))
    short["workloads"]["cnn"]["target"] = 1e9
    assert "| **no** |" in shown.influences(short, tables._table, "a machine")


def test_what_was_foretold() -> None:
    """The bounds that defaults have to meet on the digits."""
    record = tables.read_other("digits-lds")
    assert record is not None
    found = {name: each["lds"] for name, each in record["methods"].items()}
    assert min(found["kfac"], found["ekfac"]) >= 0.68
    assert found["ekfac-refined"] >= 0.75
    assert found["kernel"] >= 0.67
    assert abs(found["ekfac-terms-8"] - found["ekfac"]) <= 0.005
    assert abs(found["ekfac-sketch-1024"] - found["ekfac"]) <= 0.015
    assert abs(found["dots-sketch-1024"] - found["dots"]) <= 0.015
    assert "| ekfac-sketch-1024 | 0.680 |" in shown.foretold(record, tables._table)
