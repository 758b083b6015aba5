"""Curvature from per-example gradients, against the loop's gradients and dense algebra."""

import json
import os
import re
from pathlib import Path
from typing import Any

import filelock
import naive
import pytest
import torch
from attributing import BUILDERS, DTYPES, job, losses, tolerance
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad
from pergrad.attribution import curvature as curvature_module
from pergrad.attribution import estimate
from pergrad.errors import StoreError, UnsupportedError, UsageError


def label_grads(task: pergrad.Job) -> tuple[naive.Grads, Tensor, int]:
    """Gradients of -log p of every class for every example, by the loop, and the probabilities."""
    batch = torch.utils.data.default_collate(task.data)
    logits = task.outputs(task.model, batch)
    log_p = logits.log_softmax(1)
    G = naive.loop_grads(-log_p.reshape(-1), task.model)
    return G, log_p.detach().exp().reshape(-1).double(), len(task.data)


def fisher(task: pergrad.Job, names: tuple[str, ...], block: Any) -> Tensor:
    """(N, m, m): the exact expectation over labels, in the block's coordinates."""
    G, p, count = label_grads(task)
    M = block.matrix({n: G[n] for n in names}).flatten(2)  # (count C, N, m)
    return torch.einsum("b,bnm,bnk->nmk", p, M, M) / count


@DTYPES
@pytest.mark.parametrize("size", [1, 4, 11])
@pytest.mark.parametrize("name", BUILDERS)
def test_eigenvalues_are_those_of_the_loop(
    name: str, size: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Lambda is the diagonal of the exact Fisher matrix in the block's own orthonormal basis."""
    task = job(name, dtype)
    for kind in ("ekfac", "shampoo", "diagonal"):
        fit = pergrad.curvature(task, tmp_path / kind, kind=kind, labels="all", batch_size=size)
        for c in fit.curved:
            F_ = fisher(task, c.block.names, c.block)
            N, p, d = c.Lambda.shape
            eye = (
                torch.eye(p * d, dtype=torch.float64).reshape(p * d, 1, p, d).expand(-1, N, -1, -1)
            )
            Q = c.rotate(eye).flatten(2).transpose(0, 1)  # (N, m, m), columns of the basis
            assert_agrees(Q.mT @ Q, torch.eye(p * d).expand(N, -1, -1), 1.0, tolerance(dtype))
            want = torch.einsum("nmk,nml,nlk->nk", Q, F_, Q).reshape(N, p, d)
            assert_agrees(c.Lambda, want, float(want.max()), tolerance(dtype), c.block.weight)


@DTYPES
def test_every_parameter_is_in_one_block(dtype: torch.dtype, tmp_path: Path) -> None:
    want = {
        "perceptron": {("0.weight", "0.bias"): "outer", ("2.weight", "2.bias"): "outer"},
        "images": {
            ("0.weight", "0.bias"): "outer", ("2.weight",): "outer", ("3.weight",): "vector",
            ("3.bias",): "vector", ("5.weight", "5.bias"): "outer",
        },
        "tied": {
            ("table.weight",): "shared", ("norm.weight",): "vector", ("norm.bias",): "vector",
            ("inner.weight", "inner.bias"): "outer",
        },
    }  # fmt: skip
    for name, blocks in want.items():
        fit = pergrad.curvature(job(name, dtype), tmp_path / name)
        assert {c.block.names: c.block.how for c in fit.curved} == blocks
    table = pergrad.curvature(job("tokens", dtype), tmp_path / "tokens").blocks["table.weight"]
    assert table.block.how == "table"
    assert table.left is None  # the covariance of looked-up rows is diagonal, exactly


@DTYPES
@pytest.mark.parametrize("size", [1, 4, 11])
def test_sides_are_those_of_the_loop(size: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """A and S of a perceptron, from its activations by hand, and K-FAC's eigenvalues from them."""
    task = job("perceptron", dtype)
    fit = pergrad.curvature(task, tmp_path / "k", kind="kfac", labels="all", batch_size=size)
    x = torch.stack([x for x, _ in task.data])
    first, last = task.model[0], task.model[2]
    hidden = first(x)
    logits = last(hidden.tanh())
    p = logits.softmax(1).detach().double()
    log_p = logits.log_softmax(1)
    count = len(x)

    def ones(a: Tensor) -> Tensor:
        return torch.cat([a.detach().double(), torch.ones(count, 1)], 1)

    for name, a, out in (("0.weight", x, hidden), ("2.weight", hidden.tanh(), logits)):
        g = [torch.autograd.grad(log_p[:, c].sum(), out, retain_graph=True)[0] for c in range(3)]
        S = sum((p[:, c, None] * g[c].double()).mT @ g[c].double() for c in range(3)) / count
        A = ones(a).mT @ ones(a) / count
        c = fit.blocks[name]
        assert_agrees(c.A, A[None], float(A.norm()), tolerance(dtype))
        assert_agrees(c.S, S[None], float(S.norm()), tolerance(dtype))
        want = torch.kron(S, A)
        m = want.shape[0]
        Q = c.rotate(torch.eye(m, dtype=torch.float64).reshape(m, 1, *c.Lambda.shape[1:]))
        Q = Q.flatten(1)
        got = Q @ c.Lambda.double().reshape(-1).diag() @ Q.mT
        assert_agrees(got, want, float(want.norm()), tolerance(dtype))


@pytest.mark.parametrize("name", BUILDERS)
def test_solving_is_the_dense_solve(name: str, tmp_path: Path) -> None:
    task = job(name)
    fit = pergrad.curvature(task, tmp_path / "f", damping=0.3)
    batch = torch.utils.data.default_collate(task.data[:4])
    G = naive.loop_grads(losses(task.model, batch), task.model)
    J = pergrad.gradients(losses(task.model, batch), task.model)
    got = J.precondition(fit).dense()
    assert list(got) == list(G)
    for c in fit.curved:
        N, p, d = c.Lambda.shape
        eye = torch.eye(p * d, dtype=torch.float64).reshape(-1, 1, p, d).expand(-1, N, -1, -1)
        Q = c.rotate(eye).flatten(2).transpose(0, 1)
        added = 0.3 * c.Lambda.mean()
        M = Q @ (c.Lambda.flatten(1) + added).diag_embed() @ Q.mT
        rhs = c.block.matrix({n: G[n] for n in c.block.names}).flatten(2)
        want = torch.linalg.solve(M, rhs.permute(1, 2, 0)).permute(2, 0, 1)
        mine = c.block.matrix({n: got[n] for n in c.block.names}).flatten(2)
        assert_agrees(mine, want, float(want.norm()), 1e-8, c.block.weight)
    solved = fit.solve({n: g[0] for n, g in G.items()})
    for n, part in fit.solve(dict(G)).items():
        assert_agrees(part, got[n], float(got[n].abs().max()), 1e-9)
        assert_agrees(solved[n], got[n][0], float(got[n].abs().max()), 1e-9)
    other = fit.damped(3.0).solve(J).dense()
    assert all((other[n] - got[n]).norm() > 0 for n in got)


class Packed(nn.Module):
    """An LSTM over sequences of several lengths, packed."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 2 + torch.arange(len(x)) % 3
        packed = nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(packed)[1][0][0])


class Routed(nn.Module):
    """Two experts, each of which sees some of the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = (
            nn.ModuleList([nn.Linear(6, 4) for _ in range(2)]),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 4)
        for k, expert in enumerate(self.experts):
            own = (x[:, 0] > 0) == bool(k)
            out[own] = expert(x[own])
        return self.head(out.tanh())


@pytest.mark.parametrize("name", ["packed", "routed"])
def test_examples_that_are_not_everywhere(name: str, tmp_path: Path) -> None:
    """Uses that see only some examples of the batch: their biases and their squares."""
    BUILDERS["packed"] = (Packed, lambda: torch.randn(4, 3, dtype=torch.float64))
    BUILDERS["routed"] = (Routed, lambda: torch.randn(6, dtype=torch.float64))
    task = job(name)
    fit = pergrad.curvature(task, tmp_path / "f", labels="all")
    for c in fit.curved:
        assert len(c.block.names) == 2
        F_ = fisher(task, c.block.names, c.block)
        eye = torch.eye(c.Lambda.numel(), dtype=torch.float64)
        Q = c.rotate(eye.reshape(-1, *c.Lambda.shape)).flatten(1)
        want = (Q.mT @ F_[0] @ Q).diagonal().reshape(c.Lambda.shape)
        assert_agrees(c.Lambda, want, float(want.max()), 1e-9, c.block.weight)


def test_drawn_labels_depend_on_the_example_alone(tmp_path: Path) -> None:
    task = job("perceptron")
    fits = [
        pergrad.curvature(task, tmp_path / str(size), labels=3, batch_size=size) for size in (2, 11)
    ]
    for a, b in zip(*(fit.curved for fit in fits), strict=True):
        assert_agrees(a.Lambda, b.Lambda, float(b.Lambda.max()), 1e-9)
        assert_agrees(a.S, b.S, float(b.S.norm()), 1e-9)
    other = pergrad.curvature(task, tmp_path / "seed", labels=3, seed=1)
    assert (other.curved[0].Lambda - fits[0].curved[0].Lambda).norm() > 0


def test_all_labels_of_many_classes_say_their_price(tmp_path: Path) -> None:
    """It is done, and exact; the default takes draws, and says nothing."""
    torch.manual_seed(0)
    model = nn.Linear(3, 70).double()
    data = [(torch.randn(3, dtype=torch.float64), i) for i in range(4)]
    task = pergrad.Job(model, data, losses, outputs=lambda m, b: m(b[0]))
    price = r"70 classes takes 140 backward passes.*, 9 times those of 8 draws.*pass labels=8, or"
    with pytest.warns(UserWarning, match=price) as said:
        fit = pergrad.curvature(task, tmp_path / "all", labels="all")
    assert said[0].filename == __file__
    G, p, count = label_grads(task)
    rows = torch.cat([G["weight"].flatten(1), G["bias"]], 1)
    whole = (p[:, None] * rows).mT @ rows / count
    got = sum(float(each.Lambda.sum()) for each in fit.curved)
    assert_agrees(torch.tensor(got), whole.trace(), float(whole.trace()), 1e-6)
    pergrad.curvature(task, tmp_path / "all", labels="all")  # opened: nothing to pay, or to say
    assert pergrad.curvature(task, tmp_path / "own").about["settings"]["labels"] == 8
    with pytest.warns(UserWarning, match=r"takes 70 backward passes"):
        pergrad.curvature(task, tmp_path / "kfac", labels="all", kind="kfac")


def test_many_draws_come_near_the_expectation(tmp_path: Path) -> None:
    task = job("perceptron")
    exact = pergrad.curvature(task, tmp_path / "all", kind="diagonal", labels="all").curved[0]
    drawn = pergrad.curvature(task, tmp_path / "draws", kind="diagonal", labels=400).curved[0]
    off = (drawn.Lambda - exact.Lambda).norm() / exact.Lambda.norm()
    assert off < 0.1


def test_positions_count_by_their_weights(tmp_path: Path) -> None:
    """A Gaussian over positions: the Fisher matrix is the sum of weight times J'J."""
    net = nn.Linear(3, 2, bias=False, dtype=torch.float64)
    data = [torch.randn(4, 3, dtype=torch.float64) for _ in range(5)]
    weights = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    task = pergrad.Job(
        net, data, lambda m, x: (weights * m(x).square().sum(2)).sum(1) / 2,
        outputs=lambda m, x: m(x), likelihood="gaussian",
        weights=lambda x: weights.expand(len(x), 4),
    )  # fmt: skip
    fit = pergrad.curvature(task, tmp_path / "f", kind="diagonal", labels=4000)
    want = sum((weights[:, None] * x.square()).sum(0) for x in data) / 5
    assert_agrees(fit.curved[0].Lambda[0], want.expand(2, 3), float(want.max()), 0.1)


def test_given_labels_are_the_empirical_fisher(tmp_path: Path) -> None:
    task = job("perceptron", outputs=None)
    fit = pergrad.curvature(task, tmp_path / "f", kind="diagonal")
    assert fit.about["settings"]["labels"] == "given"
    batch = torch.utils.data.default_collate(task.data)
    G = naive.loop_grads(losses(task.model, batch), task.model)
    for c in fit.curved:
        want = c.block.matrix({n: G[n] for n in c.block.names}).square().mean(0)
        assert_agrees(c.Lambda, want, float(want.max()), 1e-9)


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in every batch of both passes, and the same to the last bit."""
    task = job("tied")
    whole = pergrad.curvature(task, tmp_path / "whole", batch_size=4)
    monkeypatch.setattr(curvature_module, "SECONDS_BETWEEN_STATES", -1.0)
    keep, stops = curvature_module._Run._keep, []

    def stop(self: Any, *args: Any) -> None:
        keep(self, *args)
        stops.append(args[:2])
        raise KeyboardInterrupt

    monkeypatch.setattr(curvature_module._Run, "_keep", stop)
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            pergrad.curvature(task, tmp_path / "stopped", batch_size=4)
    assert stops == [(0, 4), (0, 8), (0, 11), (1, 4), (1, 8), (1, 11)]
    got = pergrad.curvature(task, tmp_path / "stopped", batch_size=4)
    for a, b in zip(got.curved, whole.curved, strict=True):
        assert torch.equal(a.Lambda, b.Lambda)
    assert not list((tmp_path / "stopped").glob("state-*"))


def test_it_prints(tmp_path: Path) -> None:
    text = repr(pergrad.curvature(job("tokens"), tmp_path / "f"))
    assert re.search(r"Curvature \(ekfac, labels all\) of \d+ parameters from 11 examples", text)
    assert re.search(r"inner.weight \+ inner.bias +outer +4 x 5", text)
    assert "100.0 % of the parameters in blocks" in text


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"damping": 0.0}, "damping is 0.0; pass a positive number"),
        ({"damping": float("nan")}, "damping is nan; pass a positive number"),
        ({"kind": "kfca"}, "kind is 'kfca'; pass one of 'kfac'"),
        ({"mode": "train"}, 'mode is \'train\'; pass "eval" or "as is"'),
        ({"labels": "some"}, "labels is 'some'; pass \"all\", a positive number of draws"),
        ({"labels": 0}, "labels is 0; pass"),
        ({"batch_size": 0}, "batch_size is 0; pass a positive number"),
    ],
)
def test_arguments(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        pergrad.curvature(job("perceptron"), tmp_path / "f", **more)


def test_outputs_and_weights(tmp_path: Path) -> None:
    wide = lambda m, b: m(b[0])[:, None].expand(-1, 2, -1)  # noqa: E731
    cases = {
        r"the job has none: pass `Job\(outputs=": ({"outputs": None}, {"labels": "all"}),
        r"`outputs` returned \(11,\).*Return the logits": (
            {"outputs": lambda m, b: m(b[0])[:, 0]}, {}),
        r"\(11, 3\), without graph.*attached to their graph": (
            {"outputs": lambda m, b: m(b[0]).detach()}, {}),
        r"for every one of them: 2 x 3. Pass a number of draws": (
            {"outputs": wide}, {"labels": "all"}),
        r"`weights` returned \(11, 1\).*Return \(B, T\)": (
            {"outputs": wide, "weights": lambda b: torch.ones(len(b[0]), 1)}, {}),
        r"`weights` has negative numbers.*Return 0": (
            {"outputs": wide, "weights": lambda b: -torch.ones(len(b[0]), 2)}, {}),
    }  # fmt: skip
    for i, (message, (of_job, more)) in enumerate(cases.items()):
        with pytest.raises(UsageError, match=message):
            pergrad.curvature(job("perceptron", **of_job), tmp_path / str(i), batch_size=11, **more)
    with pytest.raises(UsageError, match=r'`likelihood` is .*Pass "categorical" or "gaussian"'):
        job("perceptron", likelihood="poisson")
    with pytest.raises(UsageError, match=r"`job` is a Linear. Pass a pergrad.Job"):
        pergrad.curvature(nn.Linear(2, 2), tmp_path / "no")  # type: ignore[arg-type]


def test_examples_at_fault_are_named(tmp_path: Path) -> None:
    bad = job("perceptron")
    bad.data[7][0][2] = float("nan")
    with pytest.raises(
        UsageError, match=r"Example 7 has a model output that is not finite.*Take it"
    ):
        pergrad.curvature(bad, tmp_path / "nan", batch_size=4)
    with pytest.raises(UsageError, match=r"Example 7 has a loss that is not finite"):
        pergrad.curvature(bad, tmp_path / "loss", labels="given", batch_size=4)
    infinite = job("perceptron", outputs=lambda m, b: (m(b[0]) * 0).sqrt() + m(b[0]))
    with pytest.raises(
        UsageError, match=r"Example 0 has a gradient for `0.weight` that is not fin"
    ):
        pergrad.curvature(infinite, tmp_path / "inf", batch_size=4)
    raising = job("perceptron", collate=lambda items: 1 / 0)
    with pytest.raises(UsageError, match=r"could not be fetched: ZeroDivisionError.*mend the data"):
        pergrad.curvature(raising, tmp_path / "raises", batch_size=4)


def test_another_model_is_refused(tmp_path: Path) -> None:
    fit = pergrad.curvature(job("perceptron"), tmp_path / "f")
    changed = job("perceptron")
    with torch.no_grad():
        changed.model[0].bias.add_(1)
    for other in (changed, job("perceptron", torch.float32), job("perceptron", count=10)):
        with pytest.raises(StoreError, match=r"of something else.*another folder, or bring back"):
            pergrad.curvature(other, tmp_path / "f")
    with pytest.raises(StoreError, match=r'kind was "ekfac" and is "kfac"'):
        pergrad.curvature(job("perceptron"), tmp_path / "f", kind="kfac")
    net = nn.Linear(6, 7).double()
    J = pergrad.gradients(net(torch.ones(2, 6).double()).sum(1), net)
    with pytest.raises(
        UsageError, match=r"other parameters: `0.weight`.*Pass gradients for the same"
    ):
        J.precondition(fit)
    narrow = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    J = pergrad.gradients(narrow(torch.ones(2, 5).double()).sum(1), narrow)
    with pytest.raises(
        UsageError, match=r"shape \(7, 6\) for `0.weight`.*Estimate it for this one"
    ):
        J.precondition(fit)
    with pytest.raises(UsageError, match=r"damping is -1; pass a positive number"):
        fit.damped(-1)


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"is a file. Give the results a folder of their own"):
        pergrad.curvature(job("perceptron"), tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(StoreError, match=r"it has thesis.tex and no manifest.json.*of their own"):
        pergrad.curvature(job("perceptron"), tmp_path / "full")
    pergrad.curvature(job("perceptron"), tmp_path / "f")
    stored = next((tmp_path / "f").glob("fit-*"))
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=r"not what was written.*Remove this file"):
        pergrad.curvature(job("perceptron"), tmp_path / "f")
    path = tmp_path / "f" / "manifest.json"
    old = json.loads(path.read_text())
    path.write_text(json.dumps({**old, "version": 99}))
    with pytest.raises(
        StoreError, match=r"format version 99; this pergrad reads version 1.*make it"
    ):
        pergrad.curvature(job("perceptron"), tmp_path / "f")
    path.write_text("{}")
    with pytest.raises(StoreError, match=r"manifest.json of something else.*of their own"):
        pergrad.curvature(job("perceptron"), tmp_path / "f")


def test_batches_that_go_through_other_ops(tmp_path: Path) -> None:
    def elsewhere(net: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) == 4:
            return losses(net, batch)
        return losses(net, batch) + net[0].weight.square().sum() * batch[0].sum(1)

    def twice(net: nn.Module, batch: Any) -> Tensor:
        if len(batch[0]) == 4:
            return losses(net, batch)
        return losses(net, batch) + (net[0].bias * batch[0][:, :1]).sum(1)

    cases = {"of `0.weight` come in another form": elsewhere, "`0.bias` is added to": twice}
    for message, of in cases.items():
        with pytest.raises(UnsupportedError, match=message + '.*Use kind="diagonal"'):
            pergrad.curvature(
                job("perceptron", losses=of), tmp_path / message[1:3], labels="given", batch_size=4
            )
    fit = pergrad.curvature(
        job("perceptron", outputs=None), tmp_path / "d", kind="diagonal", batch_size=4
    )
    assert fit.curved


def test_what_the_disk_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pergrad.curvature(job("perceptron"), tmp_path / "f")
    with (
        filelock.FileLock(tmp_path / "f" / ".lock"),
        pytest.raises(StoreError, match=r"Another run is writing.*Wait for it to end"),
    ):
        pergrad.curvature(job("perceptron"), tmp_path / "f")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match=r"No space left.*Make room.*goes on where it stopped"):
        pergrad.curvature(job("perceptron"), tmp_path / "g")
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(StoreError, match=r"Cannot write.*a folder that can be made"):
        pergrad.curvature(job("perceptron"), tmp_path / "h")


def test_batch_norm_in_training_mode(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)).double()
    with pytest.raises(UsageError, match=r"`1` is in training mode.*model.eval\(\)"):
        pergrad.curvature(job("perceptron", model=net), tmp_path / "t", mode="as is")
    assert pergrad.curvature(job("perceptron", model=net), tmp_path / "e").curved
    assert net.training


@DTYPES
@pytest.mark.parametrize("wide", [5, 256, 257, 600, 1030])
def test_half_of_a_second_moment_is_the_other_half(wide: int, dtype: torch.dtype) -> None:
    rows = torch.randn(2, 140, wide, dtype=dtype)
    whole = rows.mT @ rows
    got = estimate._gram(rows, full=True)
    assert_agrees(got, whole, float(whole.abs().max()), tolerance(dtype))
    torch.testing.assert_close(got, got.mT)
    assert_agrees(estimate._gram(rows, full=False), whole.diagonal(dim1=1, dim2=2),
                  float(whole.abs().max()), tolerance(dtype))  # fmt: skip
