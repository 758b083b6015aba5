"""Sketches against the maps that they are of, by loops, and against exact influences."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
from attributing import BUILDERS, DTYPES, Tokens, job, losses, outputs, tolerance
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad
from pergrad.attribution import projection, shards
from pergrad.attribution.projection import Coordinates, TensorSketch, plain_blocks
from pergrad.errors import StoreError, UsageError


def gradients(task: pergrad.Job) -> tuple[pergrad.GradientMatrix, Tensor]:
    """As factors; and (B, P), by the loop, in float64."""
    batch = torch.utils.data.default_collate(task.data)
    flat = naive.flat(naive.loop_grads(task.losses(task.model, batch), task.model))
    return pergrad.gradients(task.losses(task.model, batch), task.model), flat


def by_name(task: pergrad.Job, flat: Tensor) -> dict[str, Tensor]:
    found, at = {}, 0
    for n, p in task.model.named_parameters():
        found[n] = flat[:, at : at + p.numel()].reshape(-1, *p.shape)
        at += p.numel()
    return found


def routed(dtype: torch.dtype) -> pergrad.Job:
    """Some examples go through another layer, so that its gradients are of these alone."""

    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(6, 3, dtype=dtype), nn.Linear(6, 3, dtype=dtype)

        def forward(self, x: Tensor) -> Tensor:
            there = (x[:, 0] > 0).nonzero()[:, 0]
            out = self.one(x)
            return out.index_add(0, there, self.other(x[there]))

    torch.manual_seed(5)
    return replace(job("perceptron", dtype), model=Routed())


TASKS: dict[str, Callable[[torch.dtype], pergrad.Job]] = {
    **{name: lambda dtype, name=name: job(name, dtype) for name in BUILDERS},
    "routed": routed,
}
EACH = pytest.mark.parametrize("name", TASKS)


# --- the maps -------------------------------------------------------------------------------------


@EACH
@DTYPES
def test_a_tensor_sketch_is_the_map_that_it_says(name: str, dtype: torch.dtype) -> None:
    task = TASKS[name](dtype)
    J, flat = gradients(task)
    how = TensorSketch(plain_blocks(J), 5, 3)  # so small that products go by FFT
    want = torch.zeros(len(flat), 5, dtype=torch.float64)
    for block, ((h, s), (k, t)) in zip(how.blocks, how.tables, strict=True):
        G = block.matrix(by_name(task, flat))
        for n in range(block.groups):
            for i in range(block.rows):
                for j in range(block.columns):
                    place = int(h[n, i] + k[n, j]) % 5
                    want[:, place] += int(s[n, i] * t[n, j]) * G[:, n, i, j]
    scale = float(flat.norm(dim=1).max())
    assert_agrees(how.project(J).double(), want, scale, 2e-5, name)
    large = TensorSketch(plain_blocks(J), 2000, 3)  # so large that products are formed
    formed = [
        large._formed(block.matrix(by_name(task, flat)), sides)
        for block, sides in zip(large.blocks, large.tables, strict=True)
    ]
    assert_agrees(large.project(J).double(), torch.stack(formed).sum(0), scale, 2e-5, name)


def test_a_tensor_sketch_is_unbiased_within_its_variance() -> None:
    J, flat = gradients(job("images", count=2))
    exact = float(flat[0] @ flat[1])
    norms = flat.norm(dim=1)
    found = []
    for seed in range(600):
        x = TensorSketch(plain_blocks(J), 16, seed).project(J).double()
        found.append(float(x[0] @ x[1]))
    bound = projection.DEGREE / 16 * float(norms[0] * norms[1]) ** 2
    variance = float(np.var(found))
    assert variance <= bound
    assert abs(np.mean(found) - exact) < 4 * (variance / len(found)) ** 0.5
    assert variance > bound / 100  # the bound says something


@EACH
@DTYPES
@pytest.mark.parametrize("kind", ["ekfac", "diagonal"])
def test_coordinates_are_those_of_the_basis(
    name: str, dtype: torch.dtype, kind: Any, tmp_path: Path
) -> None:
    task = TASKS[name](dtype)
    fit = pergrad.curvature(task, tmp_path / "fit", kind=kind)
    J, flat = gradients(task)
    rows = by_name(task, flat)
    whole = torch.cat([
        (c.rotate(c.block.matrix(rows)) / (c.Lambda.double() + fit.added[c.block.weight]).sqrt())
        .flatten(1)
        for c in fit.curved
    ], 1)  # fmt: skip
    energy = torch.cat([
        (c.Lambda.double() / (c.Lambda.double() + fit.added[c.block.weight])).reshape(-1)
        for c in fit.curved
    ])  # fmt: skip
    scale = float(whole.norm(dim=1).max())
    everything = Coordinates(fit, whole.shape[1])
    assert everything.share == pytest.approx(1)
    assert_agrees(everything.project(J).double(), whole, scale, 10 * tolerance(torch.float32))
    exact = whole @ whole.mT
    assert_agrees((J.precondition(fit) @ J.T).double(), exact, scale**2, 10 * tolerance(dtype))

    how = Coordinates(fit, 9)
    kept = energy.topk(9).indices.sort().values
    got = how.project(J).double()
    assert_agrees(got.norm(dim=1), whole[:, kept].norm(dim=1), scale, 1e-4)
    assert how.share == pytest.approx(float(energy[kept].sum() / energy.sum()))
    vectors, left_out = how.of_rows(rows)
    assert_agrees(vectors.double(), got, scale, 1e-4)
    others = torch.ones(len(energy), dtype=torch.bool)
    others[kept] = False
    want = whole[:, others].square() @ energy[others]
    assert_agrees(left_out, want, scale**2, 1e-4)


# --- folders --------------------------------------------------------------------------------------


def curved(path: Path, name: str = "perceptron") -> tuple[pergrad.Job, list[Any], pergrad.Fit]:
    task = job(name, torch.float32)
    return task, job(name, torch.float32, 14).data[11:], pergrad.curvature(task, path / "fit")


def test_estimates_are_exact_where_all_is_kept(tmp_path: Path) -> None:
    task, queries, fit = curved(tmp_path)
    total = sum(p.numel() for p in task.model.parameters())
    index = pergrad.sketch(task, tmp_path / "index", curvature=fit, size=total)
    exact = pergrad.influence(task, queries, tmp_path / "f", curvature=fit, refine=0).scores
    half = 2.0**-11  # rows are kept in half precision
    assert_agrees(index.scores(queries), exact, float(exact.abs().max()), 4 * half)
    assert len(index) == 11
    assert index.size == total
    assert "100.0 % of the energy, by the basis of a ekfac curvature" in repr(index)
    margin = replace(task, data=queries, losses=lambda m, b: m(b[0])[:, 0] - m(b[0])[:, 1])
    found = pergrad.influence(task, margin, tmp_path / "m", curvature=fit, refine=0).scores
    assert_agrees(index.scores(margin), found, float(found.abs().max()), 4 * half)


def test_ranked_by_exact_scores(tmp_path: Path) -> None:
    task, queries, fit = curved(tmp_path)
    task = replace(task, key=lambda i: f"train/{i}")
    index = pergrad.sketch(task, tmp_path / "index", curvature=fit, size=12, batch_size=4)
    exact = pergrad.influence(task, queries, tmp_path / "f", curvature=fit, refine=0)
    few = index.query(queries, top=3)
    estimates = index.scores(queries)
    for q in range(3):
        table = few.top(q, 3)
        want = estimates[q].topk(3)
        assert table["index"].to_pylist() == want.indices.tolist()
        assert table["score"].to_pylist() == table["estimate"].to_pylist()
        low = few.bottom(q, 3)["index"].to_pylist()
        assert low == (-estimates[q]).topk(3).indices.tolist()
    ranked = index.query(queries, top=11, rerank=task)
    assert ranked.candidates.tolist() == list(range(11))
    for q in range(3):
        for got, want in ((ranked.top(q, 11), exact.top(q, 11)),
                          (ranked.bottom(q, 11), exact.bottom(q, 11))):  # fmt: skip
            assert got["index"].to_pylist() == want["index"].to_pylist()
            assert got["key"].to_pylist() == want["key"].to_pylist()
            assert got["score"].to_pylist() == pytest.approx(want["score"].to_pylist(), rel=1e-4)
    assert ranked.recall(5).tolist() == [1, 1, 1]
    assert (
        ranked.top(0, 1).schema.metadata[b"sign"]
        == b"the example helps: it lowers the query's loss"
    )
    refined = index.query(queries, top=11, rerank=task, refine=2)
    want = pergrad.influence(
        task, queries, tmp_path / "r", curvature=fit, refine=2, damping=fit.damping
    )
    assert refined.top(1, 11)["index"].to_pylist() == want.top(1, 11)["index"].to_pylist()
    assert "ranked by exact scores" in repr(ranked)
    assert "ranked by estimates" in repr(few)


def test_without_a_curvature_dots_are_estimated_within_the_error(tmp_path: Path) -> None:
    task, queries, _ = curved(tmp_path, "images")
    index = pergrad.sketch(task, tmp_path / "index", size=64)
    exact = pergrad.influence(task, queries, tmp_path / "dots")
    found = index.query(queries, top=11, rerank=task)
    for q in range(3):
        rows = found.top(q, 11).to_pylist()
        assert [row["index"] for row in rows] == exact.top(q, 11)["index"].to_pylist()
        for row in rows:
            assert abs(row["score"] - row["estimate"]) < 3 * row["error"]
    assert "TensorSketch" in repr(index)
    _, K = gradients(replace(task, data=queries))
    _, G = gradients(task)
    bound = (8 / 64) ** 0.5 * K.norm(dim=1)[:, None] * G.norm(dim=1)[None]
    assert_agrees(found.errors, bound, float(bound.max()), 1e-4)


def test_recall_counts_what_may_be_missed(tmp_path: Path) -> None:
    task = job("perceptron", torch.float32, 400)
    queries = job("perceptron", torch.float32, 403).data[400:]
    fit = pergrad.curvature(task, tmp_path / "fit")
    index = pergrad.sketch(task, tmp_path / "index", curvature=fit, size=8)
    exact = pergrad.influence(task, queries, tmp_path / "f", curvature=fit, refine=0).scores
    found = index.query(queries, top=40, rerank=task)
    told = found.recall(20)
    best = exact.topk(20, 1).indices
    true = torch.isin(best, found.candidates).double().mean(1)
    assert ((told > 0.2) & (told < 1)).all()
    assert float(told.mean()) == pytest.approx(float(true.mean()), abs=0.25)
    more = index.query(queries, top=200, rerank=task).recall(20)
    assert (more > told).all()


def test_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BYTES_PER_FILE", 4 * 2 * 8)  # four examples
    task, queries, fit = curved(tmp_path)

    class Stops:
        def __len__(self) -> int:
            return 11

        def __getitem__(self, i: int) -> Any:
            if i == 9 and stop:
                raise KeyboardInterrupt
            return task.data[i]

    stop = True
    stopping = replace(task, data=Stops())
    for how, curve in (("curved", fit), ("plain", None)):
        out, options = tmp_path / how, {"curvature": curve, "size": 8, "batch_size": 2}
        stop = True
        with pytest.raises(KeyboardInterrupt):
            pergrad.sketch(stopping, out, **options)
        with pytest.raises(StoreError, match=r"is not finished. Make the same call of pergrad.ske"):
            pergrad.open_sketch(out, stopping, curvature=curve)
        assert len(list(out.glob("rows-*"))) == 2
        next(out.glob("rows-000000000004*")).unlink()  # killed after the scales
        stop = False
        index = pergrad.sketch(stopping, out, **options)
        again = pergrad.open_sketch(out, stopping, curvature=curve)
        whole = pergrad.sketch(stopping, tmp_path / f"{how} whole", **options)
        for each in (index, again):
            assert torch.equal(each.scores(queries), whole.scores(queries))
        names = [sorted(p.name for p in f.glob("[rs]*")) for f in (out, tmp_path / f"{how} whole")]
        assert names[0] == names[1]  # which certify the content
        assert len(names[0]) == 6


def test_batches_change_nothing_but_rounding(tmp_path: Path) -> None:
    task, queries, _ = curved(tmp_path)
    found = [
        pergrad.sketch(task, tmp_path / str(size), size=16, batch_size=size).scores(queries)
        for size in (1, 4, 11)
    ]
    scale = float(found[0].abs().max())
    for other in found[1:]:
        assert_agrees(other, found[0], scale, 2e-3)


def test_damage_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BYTES_PER_FILE", 4 * 2 * 8)
    task, queries, _ = curved(tmp_path)
    pergrad.sketch(task, tmp_path / "index", size=8, batch_size=4)
    files = sorted((tmp_path / "index").glob("rows-*"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-1] + b"?")
    with pytest.raises(StoreError, match=r"its checksum differs. Remove this file and make"):
        pergrad.open_sketch(tmp_path / "index", task)
    files[1].unlink()
    with pytest.raises(StoreError, match=r"where 4 is missing: a file before it is gone. Remove"):
        pergrad.open_sketch(tmp_path / "index", task)
    files[2].unlink()
    index = pergrad.sketch(task, tmp_path / "index", size=8, batch_size=4)  # makes it anew
    assert index.scores(queries).shape == (3, 11)
    next((tmp_path / "index").glob("scales-*")).unlink()
    with pytest.raises(StoreError, match=r"The scales of .* are gone. Remove it and what comes"):
        pergrad.open_sketch(tmp_path / "index", task)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    task, _, fit = curved(tmp_path)
    out = tmp_path / "index"
    pergrad.sketch(task, out, curvature=fit, size=8)
    for options, what in (
        ({"size": 9, "curvature": fit}, "settings: size was 8 and is 9"),
        ({"size": 8, "curvature": fit.damped(0.5)}, "curvature: damping was 0.1 and is 0.5"),
        ({"size": 8, "curvature": fit, "seed": 1}, "settings: seed was 0 and is 1"),
        ({"size": 8}, "projection was"),
    ):
        with pytest.raises(StoreError, match=rf"{re.escape(what)}.*Nothing was changed"):
            pergrad.sketch(task, out, **options)
    with pytest.raises(UsageError, match=r"in the basis of the curvature in .*Pass curvature="):
        pergrad.open_sketch(out, task)
    with pytest.raises(StoreError, match=r"has no sketch. Make the same call of pergrad.sketch"):
        pergrad.open_sketch(tmp_path / "nothing", task)
    with torch.no_grad():
        task.model[0].weight.add_(1)
    with pytest.raises(UsageError, match=r"other weights or buffers. Estimate it for this one"):
        pergrad.open_sketch(out, task, curvature=fit)


def test_wrong_arguments(tmp_path: Path) -> None:
    task, queries, _ = curved(tmp_path)
    out = tmp_path / "index"
    for size in (0, 2.5, True):
        with pytest.raises(UsageError, match=r"size is .*; pass a positive number"):
            pergrad.sketch(task, out, size=size)
    with pytest.raises(UsageError, match=r"gradient has 73 numbers.*pergrad.influence, which is"):
        pergrad.sketch(task, out, size=74)
    with pytest.raises(UsageError, match=r"curvature is a str. Pass what pergrad.curvature"):
        pergrad.sketch(task, out, curvature="fit")
    with pytest.raises(UsageError, match=r'mode is \'train\'; pass "eval"'):
        pergrad.sketch(task, out, mode="train")
    bad = [*task.data[:4], (torch.full((6,), torch.inf), 0), *task.data[4:]]
    with pytest.raises(UsageError, match=r"Example 4 has .*not finite"):
        pergrad.sketch(replace(task, data=bad), tmp_path / "bad", size=8)

    def root(net: nn.Module, batch: Any) -> Tensor:  # a finite loss with a gradient that is not
        return losses(net, batch) * 0 + (net(batch[0])[:, 0] * batch[0][:, 0]).abs().sqrt()

    zero = [*task.data[:4], (torch.zeros(6), 0)]
    with pytest.raises(UsageError, match=r"Example 4 has a gradient that is not finite.*mend the"):
        pergrad.sketch(replace(task, data=zero, losses=root), tmp_path / "root", size=8)
    index = pergrad.sketch(task, out, size=8)
    with pytest.raises(UsageError, match=r"top is 0; pass a positive number of candidates"):
        index.query(queries, top=0)
    with pytest.raises(UsageError, match=r"rerank is a list; pass the Job that was sketched, of"):
        index.query(queries, rerank=queries)
    with pytest.raises(UsageError, match=r"rerank is a Job of 3 examples; pass the Job that was"):
        index.query(queries, rerank=replace(task, data=queries))
    with pytest.raises(UsageError, match=r"refine is for exact scores with a curvature: pass rera"):
        index.query(queries, rerank=task, refine=2)
    with pytest.raises(UsageError, match=r"There are no queries"):
        index.query([])
    found = index.query(queries, top=4)
    with pytest.raises(UsageError, match=r"There is no query 3: pass a number from 0 to 2"):
        found.top(3)
    with pytest.raises(UsageError, match=r"n is 5, and there are 4 candidates at each end. Ask"):
        found.top(0, 5)
    with pytest.raises(UsageError, match=r"pass rerank=job and refine=0"):
        found.recall(2)
    task.model.train()
    with torch.no_grad():
        normed = replace(task, model=nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)))
    with pytest.raises(UsageError, match=r"batch norm `1` is in training mode"):
        pergrad.sketch(normed, tmp_path / "normed", size=8, mode="as is")


def test_a_large_table_is_never_formed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are looked up are sketched as rows."""
    task = job("tokens", torch.float32)
    monkeypatch.setattr("pergrad.attribution.blocks.MOST_SIDE", 4)
    fit = pergrad.curvature(task, tmp_path / "fit")
    assert fit.blocks["table.weight"].left is None
    J, _ = gradients(task)
    want = Coordinates(fit, 9).project(J)
    monkeypatch.setattr(projection, "_same", lambda block, factor: False)
    assert_agrees(want, Coordinates(fit, 9).project(J), float(want.abs().max()), 1e-5)
    assert isinstance(task.model, Tokens)
    assert task.outputs is outputs
