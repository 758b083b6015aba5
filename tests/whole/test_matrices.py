"""Rows of several matrices put together, and matrices in files, against the loop."""

import json
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
import torch
import zoo
from helpers import assert_agrees

import pergrad
from pergrad import factors

CASES = pytest.mark.parametrize("case", zoo.CASES.values(), ids=str)


@pytest.fixture(autouse=True)
def _fallbacks_are_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


def check(J: pergrad.GradientMatrix, G: naive.Grads, tolerance: float) -> None:
    """Norms, products and rows of what was put together or read, against the loop's."""
    norms = naive.norms(G)
    assert_agrees(J.norms(), norms, norms, tolerance, "norms")
    assert_agrees(J.gram(), naive.gram(G), norms[:, None] * norms, tolerance, "gram")
    for name, part in J.dense().items():
        scale = norms.reshape(-1, *[1] * (part.dim() - 1))
        assert_agrees(part, G[name], scale, tolerance, name)


def twice(G: naive.Grads) -> naive.Grads:
    return {n: torch.cat([g, g]) for n, g in G.items()}


@CASES
def test_together_on_every_model(case: zoo.Case) -> None:
    B = max(case.batch)
    run, G = case.run(B), zoo.reference(case.name, B)
    J = pergrad.gradients(run.losses, run.params, **case.options)
    K = pergrad.concatenate([J, J[:0], J])
    assert K.shape == (2 * B, J.shape[1])
    check(K, twice(G), 1e-9)
    norms = naive.norms(G)
    scale = torch.cat([norms, norms])[:, None] * norms
    assert_agrees(K @ J.T, naive.gram(twice(G), G), scale, 1e-9, "K @ J.T")


@CASES
def test_in_a_file_on_every_model(case: zoo.Case, tmp_path: Path) -> None:
    B = max(case.batch)
    run, G = case.run(B), zoo.reference(case.name, B)
    J = pergrad.gradients(run.losses, run.params, **case.options)
    J.save(tmp_path / "J")
    K = pergrad.load_gradients(tmp_path / "J")
    assert (K.names, K.shapes, K.dtype, len(K)) == (J.names, J.shapes, J.dtype, B)
    check(K, G, 1e-9)
    assert (tmp_path / "J").stat().st_size < 2 * J.nbytes + J.flat().nbytes + 50_000


def small(rows: int = 4, dtype: torch.dtype = torch.float32) -> pergrad.GradientMatrix:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2).to(dtype)
        return pergrad.gradients(net(torch.randn(rows, 3, dtype=dtype)).sum(1), net)


def kinds() -> dict[str, factors.Factor]:
    """One factor of each kind, those that hold others around one that is cheap."""
    a, g = torch.randn(4, 2, 3), torch.randn(4, 2, 5)
    outer = factors.Outer(g, a)
    step = factors.Isometry((5, 3), (("permute", (1, 0)), ("view", (15,))))
    return {
        "outer": outer,
        "dense": factors.Dense(torch.randn(4, 3)),
        "half": factors.Dense(torch.randn(4, 3).half()),
        "none": factors.Zero(4, (2, 2), "cpu", torch.float32),
        "rows": factors.Rows(torch.tensor([[0, -1], [6, 6], [1, 2], [3, 0]]), torch.randn(4, 2, 2),
                             (7, 2)),
        "convolution": factors.Correlation(
            torch.randn(4, 2, 5), torch.randn(4, 3, 5), kernel=(3,), stride=(1,), padding=(1,),
            dilation=(1,)),
        "sum": factors.Sum([outer, factors.Placed(outer.select(slice(2)),
                                                  torch.tensor([1, 3]), 4)]),
        "mapped": factors.Mapped(outer, step),
        "embedded": factors.Embedded(factors.Dense(torch.randn(4, 2)), (5,), (0, 1, 3)),
        "scaled": factors.Scaled(outer, torch.rand(5, 3)),
        "computed": factors.Computed(4, (3,), lambda index: torch.ones(len(index), 3),
                                     torch.zeros(1)),
    }  # fmt: skip


def test_every_kind_of_factor_is_the_same_from_a_file(tmp_path: Path) -> None:
    J = pergrad.GradientMatrix(kinds(), 4)
    J.save(tmp_path / "J")
    K = pergrad.load_gradients(tmp_path / "J")
    for name, part in J.dense().items():
        assert torch.equal(K.dense()[name], part), name
    kept = ("outer", "half", "none", "rows", "convolution", "sum", "mapped", "embedded")
    for name in kept:
        assert type(K._factors[name]) is type(J._factors[name]), name


def test_float32_and_float64_together() -> None:
    J, K = small(), small(3, torch.float64)
    both = pergrad.concatenate([J, K])
    assert both.dtype == torch.float64
    assert torch.allclose(both.norms(), torch.cat([J.norms().double(), K.norms()]))
    assert torch.allclose(both.flat()[4:], K.flat())


def test_what_was_put_together_does_not_follow_later_changes() -> None:
    x = torch.randn(4, 3)
    net = torch.nn.Linear(3, 1, bias=False)
    J = pergrad.gradients(net(x).squeeze(1), net)
    K = pergrad.concatenate([J, J])
    want = K.norms().clone()
    x.zero_()
    assert torch.equal(K.norms(), want)
    with pytest.raises(pergrad.UsageError, match=r"changed in place(.|\n)*Compute"):
        pergrad.concatenate([J, J])
    with pytest.raises(pergrad.UsageError, match=r"changed in place(.|\n)*Compute"):
        J.save("nowhere")


def test_what_cannot_be_put_together() -> None:
    J = small()
    for given, says in (
        (J, r"list of GradientMatrix(.|\n)*\[J, K\]"),
        ([J, J.flat()], r"list of GradientMatrix(.|\n)*\[J, K\]"),
        ([], r"no matrix(.|\n)*at least one"),
        ([J, pergrad.GradientMatrix(kinds(), 4)], r"same selection of parameters"),
    ):
        with pytest.raises(pergrad.UsageError, match=says):
            pergrad.concatenate(given)


def test_sizes_and_places() -> None:
    J = small()
    assert len(J) == 4
    assert J.nbytes == sum(t.nbytes for t in J._unique_tensors()) > 0
    assert torch.equal(J.cpu().flat(), J.flat())
    with pytest.raises(pergrad.UsageError, match=r"torch(.|\n)*sees(.|\n)*Leave it out"):
        J.cuda(99)


def test_numpy_is_told_what_to_write() -> None:
    with pytest.raises(pergrad.UsageError, match=r"factors, not gradients(.|\n)*J.flat\(\).numpy"):
        np.asarray(small())


# --- files ----------------------------------------------------------------------------------------


def spoilt(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The file with something else in what pergrad says of it."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    about = json.loads(header["__metadata__"]["pergrad gradients"])
    change(about)
    header["__metadata__"]["pergrad gradients"] = json.dumps(about)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda about: about.update(format="x"), r"something else(.|\n)*J.save"),
        (lambda about: about.update(version=2), r"version 2(.|\n)*pergrad that wrote it"),
        (lambda about: about.update(examples=5), r"different examples(.|\n)*from a copy"),
        (lambda about: about.update(factors=[]), r"different examples(.|\n)*from a copy"),
        (lambda about: about.pop("factors"), r"KeyError(.|\n)*from a copy"),
        (lambda about: about["factors"][0][1].update(kind="os.system"), r"kind 'os(.|\n)*copy"),
        (lambda about: about["factors"][0][1].update(shape=[9, 9]), r"ValueError(.|\n)*copy"),
        (lambda about: about["factors"][0][1].update(g="7"), r"KeyError(.|\n)*from a copy"),
    ],
)
def test_a_file_of_something_else_is_one_named_error(
    change: Any, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "J"
    small().save(path)
    path.write_bytes(spoilt(path.read_bytes(), change))
    with pytest.raises(pergrad.StoreError, match=rf"{path}(.|\n)*{says}"):
        pergrad.load_gradients(path)


def test_rows_that_a_table_does_not_have(tmp_path: Path) -> None:
    rows = factors.Rows(torch.tensor([[0], [9]]), torch.randn(2, 1, 2), (7, 2))
    pergrad.GradientMatrix({"table": rows}, 2).save(tmp_path / "J")
    with pytest.raises(pergrad.StoreError, match=r"rows that the table(.|\n)*from a copy"):
        pergrad.load_gradients(tmp_path / "J")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"\x80\x04K\x01."])
def test_a_file_that_is_no_safetensors(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "J").write_bytes(content)
    for path in (tmp_path / "J", tmp_path / "none", tmp_path):
        with pytest.raises(pergrad.StoreError, match=r"Cannot read(.|\n)*Check the path"):
            pergrad.load_gradients(path)


def test_where_a_file_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=r"Cannot write(.|\n)*folder that exists"):
        small().save(tmp_path / "none" / "J")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(pergrad.UsageError, match=r"not an ordinary file(.|\n)*Pass the path"):
        small().save(tmp_path / "link")
