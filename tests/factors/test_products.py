"""The table of products: a kind of factor enters it from outside, and matrices of before load."""

import pickle
from collections.abc import Callable
from pathlib import Path

import naive
import pytest
import torch
from helpers import assert_agrees
from test_factors import ZOO, Sizes, Source
from torch import Tensor

from pergrad.factors import Dense, Factor, Outer, Sum, dots, grams, mapped
from pergrad.factors.products import Products
from pergrad.matrix import GradientMatrix

B, V, D, RANK = 4, 6, 4, 2


class LowRank(Factor):
    """G[b] = left @ (core[b] right): all that a kind has to say, and nothing more."""

    def __init__(self, left: Tensor, core: Tensor, right: Tensor) -> None:
        super().__init__(len(core), (len(left), right.shape[1]), core.device, core.dtype)
        self.left, self.core, self.right = left, core, right

    def dense(self) -> Tensor:
        return self.left @ self.core @ self.right

    def matvec(self, v: Tensor) -> Tensor:
        return (self.core * (self.left.mT @ v @ self.right.mT)).sum((1, 2))

    def weighted_sum(self, c: Tensor) -> Tensor:
        return self.left @ torch.tensordot(c, self.core, 1) @ self.right

    def scale(self, c: Tensor) -> "LowRank":
        return LowRank(self.left, self.core * c[:, None, None], self.right)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.left, self.core, self.right

    def _select(self, index: slice | Tensor) -> "LowRank":
        return LowRank(self.left, self.core[index], self.right)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "LowRank":
        return LowRank(change(self.left), change(self.core), change(self.right))


asked: list[str] = []  # the formulas of LowRank that have answered


def _core(f: LowRank, h: LowRank) -> Tensor:
    return f.left.mT @ h.left @ h.core @ (h.right @ f.right.mT)


@dots.register(LowRank, LowRank)
def _dot(f: LowRank, h: LowRank) -> Tensor:
    asked.append("dot")
    return (f.core * _core(f, h)).sum((1, 2))


@grams.register(LowRank, LowRank)
def _gram(f: LowRank, h: LowRank) -> Tensor:
    asked.append("gram")
    return f.core.flatten(1) @ _core(f, h).flatten(1).mT


@grams.register(LowRank, Outer)
def _gram_with_outer(f: LowRank, h: Outer) -> Tensor | None:
    if h.sizes[0] != 1 or not h.aligned:
        return None
    asked.append("gram with Outer")
    core = (h.g[:, 0] @ f.left).mT @ (h.a[:, 0] @ f.right.mT)
    return f.core.flatten(1) @ core.flatten(1).mT


def low_rank(seed: int, count: int = B) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    sizes = (V, RANK), (count, RANK, RANK), (RANK, D)
    return LowRank(*(torch.randn(x, generator=generator, dtype=torch.float64) for x in sizes))


@pytest.fixture(autouse=True)
def _nothing_asked():
    asked.clear()


def same(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("kind", ZOO)
def test_a_kind_entered_from_outside_has_products_with_every_kind(kind):
    n = Sizes(B=B, V=V, d=D)
    f, h = low_rank(0), ZOO[kind](Source(1, same, same), B, n)
    one, two = f.dense().flatten(1), h.dense().flatten(1)
    scale = one.norm(dim=1)[:, None] * two.norm(dim=1)
    assert_agrees(f.gram(h), one @ two.mT, scale)
    assert_agrees(h.gram(f), two @ one.mT, scale.mT)
    assert_agrees(f.dot(h), (one * two).sum(1), scale.diagonal())
    assert_agrees(h.dot(f), (one * two).sum(1), scale.diagonal())
    # it is a part of a sum, too, and its rows may be seen through any map
    total = Sum([f, h, f])
    assert_agrees(total.dense().flatten(1), 2 * one + two, scale.max().sqrt())
    c = torch.linspace(-1, 2, B, dtype=torch.float64)
    squares = (c @ (2 * one + two).square()).view(V, D)
    # entries of rows at most twice as long as all of them together
    assert_agrees(total.second_moment(c), squares, 8 * B * (one.norm() + two.norm()) ** 2)


def test_norms_products_and_directions_of_such_a_kind():
    J = GradientMatrix({"weight": low_rank(0)}, B)
    K = GradientMatrix({"weight": low_rank(1, 3)}, 3)
    rows, others = J.flat(), K.flat()
    v = torch.randn(V, D, dtype=torch.float64, generator=torch.manual_seed(0))
    c = torch.arange(1.0, 1 + B, dtype=torch.float64)
    size = rows.norm(dim=1)
    assert_agrees(J.norms(), size, size)
    assert_agrees(J @ {"weight": v}, rows @ v.flatten(), size * v.norm())
    assert_agrees((J.T @ c)["weight"], (c @ rows).view(V, D), size.sum() * B)
    squares = (c @ rows.square()).view(V, D)
    assert_agrees(J.second_moment(c)["weight"], squares, size.square().sum() * B)
    assert asked == []
    assert_agrees(J.gram(), rows @ rows.mT, size[:, None] * size)
    assert_agrees(J @ K.T, rows @ others.mT, size[:, None] * others.norm(dim=1))
    assert_agrees(J.row_dots(J.scale(c)), c * size**2, size**2 * B)
    assert asked == ["gram", "gram", "dot"]
    outer = Outer(torch.ones(B, 3, V).double(), torch.ones(B, 3, D).double())
    for one, two in ((low_rank(0), outer), (outer, low_rank(0))):
        one.gram(two)  # once as it is registered, once swapped
    assert asked[3:] == ["gram with Outer"] * 2
    for f in (low_rank(0), low_rank(0).detach(), mapped(low_rank(0), (("permute", (1, 0)),))):
        norms = f.dense().flatten(1).norm(dim=1)
        assert_agrees(f.sq_norms().sqrt(), norms, norms)
        by = f.times_diagonal(torch.full(f.shape, 2.0)).kronecker(torch.eye(f.shape[1]), 3.0)
        assert_agrees(by.dense(), 6 * f.dense(), 6 * norms[:, None, None])


def test_formulas_are_asked_from_the_most_special_on():
    class Kind: ...

    class Special(Kind): ...

    class Other(Kind): ...

    turns: list[str] = []
    table = Products("product", torch.neg)

    def says(name: str, answer: float | None) -> Callable[[Kind, Kind], Tensor | None]:
        def formula(f: Kind, h: Kind) -> Tensor | None:
            turns.append(name)
            return None if answer is None else torch.tensor(answer)

        return formula

    table.general(Kind)(says("general", 1.0))
    assert table(Other(), Special()) == 1
    table.register(Other, Kind)(says("other with any", 2.0))
    assert table(Other(), Special()) == 2  # what was remembered is forgotten
    table.register(Special, Other)(says("special with other", None))
    turns.clear()
    assert table(Special(), Other()) == -2
    assert turns == ["special with other", "other with any"]
    assert table(Special(), Special()) == 1
    turns.clear()
    assert table(Other(), Other()) == 2
    assert turns == ["other with any"]
    with pytest.raises(ValueError, match=r"product of Other and Kind has a formula.*answer None"):
        table.register(Other, Kind)
    silent = Products("product", torch.neg)
    silent.general(Kind)(says("general", None))
    with pytest.raises(NotImplementedError, match="No formula answers product"):
        silent(Other(), Kind())


def test_what_is_no_kind_of_factor_is_named():
    f = Dense(torch.zeros(2, 3))
    for product in (f.dot, f.gram):
        with pytest.raises(TypeError, match=r"Tensor is no kind of factor.*derives from Factor"):
            product(torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"dict is no kind of factor.*dots\.register"):
        dots(f, {})
    with pytest.raises(TypeError, match=r"int is no kind of factor.*grams\.register"):
        grams.register(Dense, int)


def test_kinds_that_do_not_join_say_so():
    with pytest.raises(NotImplementedError, match="LowRank joins no others"):
        low_rank(0).joined([low_rank(1)])


def test_matrices_that_were_pickled_before_the_table_load():
    """Every kind of factor by hand, and those of a model: see data/pickled_factors.py."""
    path = Path(__file__).parents[1] / "data" / "pickled_factors.pkl"
    for J, dense in pickle.loads(path.read_bytes()).values():
        norms = naive.norms(dense)
        for name, rows in J.dense().items():
            # not to the bit: another CPU than that of the file may sum in another order
            assert_agrees(rows, dense[name], float(norms.max()), what=name)
        assert_agrees(J.norms(), norms, norms)
        rows = naive.flat(dense)
        assert_agrees(J.gram(), rows @ rows.mT, norms[:, None] * norms)
        assert_agrees(J[1:].norms(), norms[1:], norms[1:])
        again = pickle.loads(pickle.dumps(J))
        assert_agrees(again.norms(), norms, norms)
