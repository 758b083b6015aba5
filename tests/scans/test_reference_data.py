"""References made of examples: in the mode of the scan, and the same when it goes on."""

import re
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from helpers import assert_agrees
from scanning import Listed, data, job, numbers, reference, scan

import pergrad
from pergrad.command import main
from pergrad.scans.references import _alike


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 8])
def test_gradients_of_examples_against_the_loop(
    dtype: torch.dtype, size: int, tmp_path: Path
) -> None:
    """In one batch and in several, of a model with dropout that is in training mode."""
    task, few = job(12, dtype), data(5, dtype, seed=7)
    task.model.train()
    table = scan(task, tmp_path, batch_size=size, against={"few": pergrad.Gradients(few)}).table()
    G, K = reference(task.model, task.data), reference(task.model, few)
    want, scale = naive.gram(G, K), naive.norms(G)[:, None] * naive.norms(K)
    for k in range(5):
        tolerance = 1e-6 if dtype == torch.float32 else 1e-12
        assert_agrees(numbers(table, f"dot:few:{k}"), want[:, k], scale[:, k], tolerance, "dot")
    assert task.model.training


def test_an_example_is_like_itself_whatever_the_mode_of_the_model(tmp_path: Path) -> None:
    task = job(8)
    task.model.train()
    table = scan(task, tmp_path, against={"own": pergrad.Gradients(task.data)}).table()
    own = torch.stack([numbers(table, f"cosine:own:{k}")[k] for k in range(8)])
    assert torch.allclose(own, torch.ones(8, dtype=torch.float64))


def test_a_single_example_has_a_column_of_the_plain_name(tmp_path: Path) -> None:
    scores = scan(job(), tmp_path, against={"it": pergrad.Gradients(data(1))})
    assert {"dot:it", "cosine:it"} <= set(scores.table().column_names)


def test_the_scan_goes_on_with_the_same_gradients(tmp_path: Path) -> None:
    items, few = data(40), {"few": pergrad.Gradients(data(3, seed=7))}
    whole = scan(job(), tmp_path / "whole", batch_size=8, against=few).table()
    stopped = job(data=Listed(items, {29: KeyboardInterrupt()}))
    with pytest.raises(KeyboardInterrupt):
        scan(stopped, tmp_path / "half", batch_size=8, against=few)
    # as another machine would have made them: other bits, the same numbers
    (kept,) = (tmp_path / "half" / "references").iterdir()
    before = kept.read_bytes()
    again = scan(job(), tmp_path / "half", batch_size=8, against=few)
    assert again.table().equals(whole)
    assert kept.read_bytes() == before
    other = {"few": pergrad.Gradients(data(3, seed=8))}
    with pytest.raises(pergrad.StoreError, match=r"reference 'few' has other values(.|\n)*bring"):
        scan(job(), tmp_path / "half", batch_size=8, against=other)


def test_gradients_are_recognised_whatever_their_rounding() -> None:
    task = job(6)
    x, y = torch.utils.data.default_collate(task.data)
    J = pergrad.gradients(task.losses(task.model.eval(), (x, y)), task.model).detach()
    rounded = J.scale(torch.full((6,), 1 + 1e-7, dtype=torch.float64))
    other = J.scale(torch.tensor([1, 1, 1, 1, 1, 1.01], dtype=torch.float64))
    assert _alike(rounded, J)
    assert not _alike(other, J)
    assert not _alike(J[:5], J)
    assert not _alike(J.to(torch.float32), J)


def test_what_gradients_cannot_be_made_of(tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=r"empty data set(.|\n)*at least one"):
        pergrad.Gradients([])
    broken = Listed(data(8), {5: ValueError("broken")})
    with pytest.raises(pergrad.UsageError, match=r"gradients needs every(.|\n)*4 to 7(.|\n)*Take"):
        scan(job(), tmp_path, batch_size=4, against={"few": pergrad.Gradients(broken)})
    ragged = [(torch.ones(k + 1), 0) for k in range(3)]
    with pytest.raises(pergrad.UsageError, match=r"different sizes(.|\n)*`collate` that pads"):
        scan(job(), tmp_path, against={"few": pergrad.Gradients(ragged)})


JOB = """
import sys
sys.path.insert(0, {tests!r})
import torch
from scanning import data, job as made, losses
import pergrad

def job():
    task = made(6)
    task.model.train()
    return task

def own(job):
    assert not job.model.training
    x, y = torch.utils.data.default_collate(job.data)
    return pergrad.gradients(losses(job.model, (x, y)), job.model)

def few(job):
    return pergrad.Gradients(job.data)
"""


@pytest.mark.parametrize("name", ["own", "few"])
def test_references_of_the_command_line_are_in_the_mode_of_the_scan(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"jobs_{name}.py"
    file.write_text(JOB.format(tests=str(Path(__file__).parent)))
    out = tmp_path / "scores"
    said = ["pergrad", "scan", f"{file}:job", "--out", str(out), "-q", "--against",
            f"r={file}:{name}"]  # fmt: skip
    monkeypatch.setattr("sys.argv", said)
    assert main() == 0
    table: Any = pergrad.open_scores(out).table()
    for k in range(6):
        assert table[f"cosine:r:{k}"][k].as_py() == pytest.approx(1)


def test_a_device_that_is_not_there_is_named_before_a_reference_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "jobs_device.py"
    file.write_text(JOB.format(tests=str(Path(__file__).parent)))
    said = ["pergrad", "scan", f"{file}:job", "--out", str(tmp_path / "s"), "-q", "--device",
            "cuda:99", "--against", f"r={file}:few"]  # fmt: skip
    monkeypatch.setattr("sys.argv", said)
    assert main() == 1
    assert re.search(r"`device` is 'cuda:99'.*Leave it out", capsys.readouterr().err)
