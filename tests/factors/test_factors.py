"""One contract for all factors: the algebra of each is that of its dense()."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import naive
import pytest
import torch
from helpers import only
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import pergrad
from pergrad.factors import (
    Beside,
    Both,
    Computed,
    Correlation,
    Dense,
    Embedded,
    Factor,
    Isometry,
    Mapped,
    Outer,
    Placed,
    Pulled,
    Rows,
    Scaled,
    Sum,
    Summed,
    Zero,
    costs,
    mapped,
)
from pergrad.factors.constants import DEFAULT
from pergrad.factors.correlation import factor as correlation
from pergrad.factors.correlation import norms as correlation_norms
from pergrad.factors.guard import cancels
from pergrad.factors.methods import choice
from pergrad.factors.methods import grams as gram_norms
from pergrad.factors.methods.fused import kernel_for
from pergrad.factors.outer import norms as outer_norms
from pergrad.factors.workspace import (
    CACHE_BYTES,
    HEAP_END_BYTES,
    lent,
    limit,
    pass_begins,
    workspace,
)
from pergrad.graph.layout import NOBODY
from pergrad.ops.rows import Partition
from pergrad.ops.strewn import StrewnOuter, StrewnSum

Cast = Callable[[Tensor], Tensor]
CONTRACT = settings(max_examples=100, derandomize=True, deadline=None, database=None)


def assert_agrees(got: Tensor, ref: Tensor, *, scale: Tensor, terms: int) -> None:
    """|got - ref| <= 8 eps sqrt(terms) scale; `scale` bounds the sum before anything cancels.

    8 leaves room for a product of sums (their errors add up) and for the order of a BLAS' sums.
    """
    assert got.shape == ref.shape, (got.shape, ref.shape)
    bound = 8 * torch.finfo(got.dtype).eps * max(1, terms) ** 0.5 * scale
    error = (got.double() - ref).abs()
    assert (error <= bound).all(), (error.max(), bound.min(), got.dtype)


# -- the zoo: every kind of factor of one parameter of shape (V, d) --------------------------------


@dataclass(frozen=True)
class Sizes:
    """B rows of one side and K of the other, T positions, a parameter (V, d)."""

    B: int = 4
    K: int = 3
    T: int = 3
    V: int = 6
    d: int = 4


class Source:
    """Random tensors, always the same for one seed, seen through `cast`."""

    def __init__(self, seed: int, cast: Cast, wide: Cast, poison: float | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.cast, self.wide, self.poison = cast, wide, poison
        self.leaves: list[Tensor] = []

    def rows(self, *shape: int, in_turns: bool = False) -> Tensor:
        """Values of examples, which lie one after the other in memory or take turns."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.poison is not None:
            x[1] = self.poison
        if in_turns:
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        self.leaves.append(self.cast(x))
        return self.leaves[-1]

    def ids(self, *shape: int, below: int) -> Tensor:
        """Lookups, some of them of no row."""
        return torch.randint(-1, max(0, below), shape, generator=self.generator)

    def constant(self, *shape: int) -> Tensor:
        """What belongs to no example: diagonals and maps."""
        return self.wide(torch.randn(shape, generator=self.generator, dtype=torch.float64))


def _outer(s: Source, B: int, n: Sizes) -> Factor:
    return Outer(s.rows(B, n.T, n.V), s.rows(B, n.T, n.d))


def _in_turns(s: Source, B: int, n: Sizes) -> Factor:
    return Outer(s.rows(B, n.T, n.V, in_turns=True), s.rows(B, n.T, n.d, in_turns=True))


def _grouped(s: Source, B: int, n: Sizes) -> Factor:
    N = 2 if n.V % 2 == 0 else 1
    return Outer(s.rows(B, N, n.T, n.V // N), s.rows(B, N, n.T, n.d))


def _experts(s: Source, B: int, n: Sizes) -> Factor:
    """One matrix for each first index: (V, 1, d) seen as (V, d)."""
    return Outer(s.rows(B, n.V, n.T, 1), s.rows(B, n.V, n.T, n.d), (n.V, n.d))


def _misfit(s: Source, B: int, n: Sizes) -> Factor:
    """The matrix of the Outer is not that of the parameter."""
    return Outer(s.rows(B, n.T, n.d), s.rows(B, n.T, n.V), (n.V, n.d))


def _rows(s: Source, B: int, n: Sizes) -> Factor:
    return Rows(s.ids(B, n.T, below=n.V), s.rows(B, n.T, n.d), (n.V, n.d))


def _dense(s: Source, B: int, n: Sizes) -> Factor:
    return Dense(s.rows(B, n.V, n.d))


def _zero(s: Source, B: int, n: Sizes) -> Factor:
    return Zero(B, (n.V, n.d), dtype=s.wide(torch.zeros((), dtype=torch.float64)).dtype)


def _sum(s: Source, B: int, n: Sizes) -> Factor:
    parts = [make(s, B, n) for make in (_outer, _rows, _misfit, _rows, _transposed)]
    return Sum([Sum(parts[:2]), *parts[2:]])


def _placed(s: Source, B: int, n: Sizes) -> Factor:
    index = torch.arange(B)[1::2] if B > 1 else torch.arange(B)
    return Placed(_outer(s, B, n).select(index), index, B)


def _beside(s: Source, B: int, n: Sizes) -> Factor:
    """No two parts have an example in common."""
    even, odd = torch.arange(B)[::2], torch.arange(B)[1::2]
    return Beside([
        Placed(_outer(s, B, n).select(even), even, B), Placed(_rows(s, B, n).select(odd), odd, B),
    ])  # fmt: skip


def _mapped(s: Source, B: int, n: Sizes) -> Factor:
    inner = Outer(s.rows(B, n.T, n.d), s.rows(B, n.T, n.V))
    return mapped(inner, (("view", (n.d, n.V, 1)), ("permute", (1, 2, 0)), ("view", (n.V, n.d))))


def _transposed(s: Source, B: int, n: Sizes) -> Factor:
    return mapped(Outer(s.rows(B, n.T, n.d), s.rows(B, n.T, n.V)), (("permute", (1, 0)),))


def _embedded(s: Source, B: int, n: Sizes) -> Factor:
    lo, hi = n.V // 3, n.V - n.V // 4
    inner = Outer(s.rows(B, n.T, hi - lo), s.rows(B, n.T, n.d))
    return Embedded(inner, (n.V, n.d), (0, lo, hi))


def _embedded_first(s: Source, B: int, n: Sizes) -> Factor:
    """Overlaps `_embedded`, not `_embedded_last`."""
    inner = Rows(s.ids(B, n.T, below=n.V // 2), s.rows(B, n.T, n.d), (n.V // 2, n.d))
    return Embedded(inner, (n.V, n.d), (0, 0, n.V // 2))


def _embedded_last(s: Source, B: int, n: Sizes) -> Factor:
    """Disjoint from `_embedded`."""
    inner = Outer(s.rows(B, n.T, n.V // 4), s.rows(B, n.T, n.d))
    return Embedded(inner, (n.V, n.d), (0, n.V - n.V // 4, n.V))


def _embedded_columns(s: Source, B: int, n: Sizes) -> Factor:
    lo = n.d // 2
    inner = Outer(s.rows(B, n.T, n.V), s.rows(B, n.T, n.d - lo))
    return Embedded(inner, (n.V, n.d), (1, lo, n.d))


def _pulled(s: Source, B: int, n: Sizes) -> Factor:
    M = s.constant(3, n.V * n.d)
    return Pulled(
        Dense(s.rows(B, 3)),
        lambda x: (x @ M.to(x.dtype)).reshape(len(x), n.V, n.d),
        (n.V, n.d),
    )


def _scaled(s: Source, B: int, n: Sizes) -> Factor:
    return Scaled(_outer(s, B, n), s.constant(n.V, n.d))


def _convolution(s: Source, B: int, n: Sizes) -> Factor:
    """A strided line of T positions; kernel d, one channel of x, V channels of g."""
    T, d = max(1, n.T), n.d
    x = s.rows(B, min(1, d), 2 * T + d)
    return Correlation(s.rows(B, n.V, T), x, kernel=(max(1, d),), stride=(2,),
                       padding=(1,), dilation=(1,), shape=(n.V, d))  # fmt: skip


def _image(s: Source, B: int, n: Sizes) -> Factor:
    """A picture, a group for each channel of g, kernel (1, d)."""
    T, d = max(1, n.T), n.d
    x = s.rows(B, n.V * min(1, d), T, d + 1)
    return Correlation(s.rows(B, n.V, T, 2), x, kernel=(1, max(1, d)),
                       stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=max(1, n.V),
                       shape=(n.V, d))  # fmt: skip


def _computed(s: Source, B: int, n: Sizes) -> Factor:
    values = s.rows(B, n.V, n.d)
    return Computed(B, (n.V, n.d), lambda index: values[index], values)


def _bias(s: Source, B: int, n: Sizes) -> Factor:
    """By itself; `test_a_bias_...` is about those whose weight tells their norms."""
    g = s.rows(B, 1, n.T, n.V * n.d)
    return Summed(g, (n.V, n.d))


def _order(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def _strewn(s: Source, B: int, n: Sizes) -> Factor:
    """Rows as they lie, in two parts that are joined; those of nobody are no part of it."""
    g, a = s.rows(B, n.T, n.V).flatten(0, 1), s.rows(B, n.T, n.d).flatten(0, 1)
    owners = torch.arange(B).repeat_interleave(n.T)
    owners[::5] = NOBODY
    order = _order(len(owners))
    return Sum([
        StrewnOuter((g[rows], a[rows]), Partition(owners[rows], B), (n.V, n.d))
        for rows in (order[: n.T], order[n.T :])
    ])  # fmt: skip


def _strewn_transposed(s: Source, B: int, n: Sizes) -> Factor:
    g, a = s.rows(B, n.T, n.V).flatten(0, 1), s.rows(B, n.T, n.d).flatten(0, 1)
    rows = _order(len(g))
    owners = torch.arange(B).repeat_interleave(n.T)[rows]
    return mapped(
        StrewnOuter((a[rows], g[rows]), Partition(owners, B), (n.d, n.V)), (("permute", (1, 0)),)
    )


def _strewn_sum(s: Source, B: int, n: Sizes) -> Factor:
    g = s.rows(B, n.T, n.V * n.d).flatten(0, 1)
    owners = torch.arange(B).repeat_interleave(n.T)
    order = _order(len(owners))
    return Sum([
        StrewnSum((g[rows],), Partition(owners[rows], B), (n.V, n.d))
        for rows in (order[: n.T], order[n.T :])
    ])  # fmt: skip


ZOO = {
    make.__name__[1:]: make
    for make in (
        _outer, _in_turns, _grouped, _experts, _misfit, _rows, _dense, _zero, _sum, _placed,
        _beside, _mapped, _transposed, _embedded, _embedded_first, _embedded_last,
        _embedded_columns, _pulled, _scaled, _convolution, _image, _computed, _bias,
        _strewn, _strewn_transposed, _strewn_sum,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Specimen:
    """A factor, its rows in float64, and a bound on the sums that lead to each element."""

    factor: Factor
    G: Tensor
    size: Tensor

    @classmethod
    def draw(cls, kind: str, B: int, n: Sizes, seed: int, dtype: torch.dtype) -> "Specimen":
        wide = torch.promote_types(dtype, torch.float32)
        narrowed: Cast = lambda x: x.to(dtype)  # noqa: E731
        exact = Source(seed, lambda x: x.to(dtype).double(), lambda x: x.to(wide).double())
        sizes = Source(
            seed, lambda x: x.to(dtype).double().abs(), lambda x: x.to(wide).double().abs()
        )
        make = ZOO[kind]
        return cls(
            make(Source(seed, narrowed, lambda x: x.to(wide)), B, n),
            make(exact, B, n).dense(),
            make(sizes, B, n).dense(),
        )


@contextmanager
def choices(method: str | None, budget: int | None) -> Iterator[None]:
    """Every cost choice made one way, and a memory budget."""
    with ExitStack() as stack:
        stack.enter_context(workspace(budget))
        if method is not None:
            gram = method in ("gram", "fused")
            direct = "gram" if gram else "direct"
            tiles = "gram" if gram else "tiles"
            stack.enter_context(only(method))
            for name, chosen in (
                ("outer_dot_method", lambda T, S, p, d, by: direct),
                ("outer_gram_method", lambda *sizes, same=False, by: tiles),
                ("join_is_cheaper", lambda *sizes: gram),
                ("gram_blocks", lambda T: 2 if T > 1 else 1),
            ):
                stack.enter_context(mock.patch.object(costs, name, chosen))
        yield


SIZES = st.builds(
    Sizes,
    B=st.integers(0, 4),
    K=st.integers(0, 3),
    T=st.integers(0, 4),
    V=st.integers(0, 6),
    d=st.integers(0, 4),
)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
CHOICES = st.builds(
    choices, st.sampled_from([None, "gram", "direct", "fused"]), st.sampled_from([None, 1, 300])
)
KINDS = pytest.mark.parametrize("kind", ZOO)


# -- the contract ----------------------------------------------------------------------------------


@KINDS
@CONTRACT
@given(n=SIZES, dtype=DTYPES, chosen=CHOICES, seed=st.integers(0, 99))
def test_algebra_is_that_of_dense(kind, n, dtype, chosen, seed):
    x = Specimen.draw(kind, n.B, n, seed, dtype)
    f, G, size = x.factor, x.G, x.size
    other = Source(seed + 1, lambda t: t, lambda t: t.to(f.dtype))
    terms = 4 * n.B * n.T * n.V * n.d + n.V + n.d
    c, v, D = other.constant(n.B), other.constant(n.V, n.d), other.constant(n.V, n.d)
    A, S = other.constant(n.d, n.d), other.constant(n.V, n.V)
    with chosen:
        assert f.dtype == torch.promote_types(dtype, torch.float32)
        assert (f.batch, f.shape) == (n.B, (n.V, n.d))
        assert_agrees(f.dense(), G, scale=size, terms=terms)
        assert_agrees(
            f.sq_norms(), G.square().sum((1, 2)), scale=size.square().sum((1, 2)), terms=terms
        )
        assert_agrees(
            f.matvec(v), (G * v).sum((1, 2)), scale=(size * v.abs()).sum((1, 2)), terms=terms
        )
        weigh = torch.einsum("b,bij->ij", c.double(), G)
        assert_agrees(
            f.weighted_sum(c),
            weigh,
            scale=torch.einsum("b,bij->ij", c.abs().double(), size),
            terms=terms,
        )
        assert_agrees(
            f.second_moment(c),
            torch.einsum("b,bij->ij", c.double(), G.square()),
            scale=torch.einsum("b,bij->ij", c.abs().double(), size.square()),
            terms=terms,
        )
        C = torch.stack([c, other.constant(n.B)], 1)
        for sets in (C, C[:, :1], C[:, :0]):
            assert_agrees(
                f.weighted_sums(sets),
                torch.einsum("bq,bij->qij", sets.double(), G),
                scale=torch.einsum("bq,bij->qij", sets.abs().double(), size),
                terms=terms,
            )
        pairs = torch.einsum("bij,kij->bk", size, size)
        products = torch.einsum("bij,kij->bk", G, G)
        assert_agrees(f.gram(f), products, scale=pairs, terms=terms)
        assert_agrees(
            f.scale(c).dense(),
            G * c.double()[:, None, None],
            scale=size * c.double().abs()[:, None, None],
            terms=terms,
        )
        assert_agrees(
            f.times_diagonal(D).dense(), G * D.double(), scale=size * D.abs(), terms=terms
        )
        for right, left in ((A, S), (A[:, :1].reshape(-1), None), (2.0, S[:, :1].reshape(-1))):
            if n.d == 0 or n.V == 0:
                continue
            want, bound = G, size
            if isinstance(right, float):
                want, bound = want * right, bound * right
            else:
                R = torch.diag(right) if right.dim() == 1 else right
                want, bound = want @ R.double(), bound @ R.abs().double()
            if left is not None:
                L = torch.diag(left) if left.dim() == 1 else left
                want, bound = L.double() @ want, L.abs().double() @ bound
            changed = f.kronecker(right, left)
            assert_agrees(changed.dense(), want, scale=bound, terms=terms)
            assert_agrees(
                changed.sq_norms(),
                want.square().sum((1, 2)),
                scale=bound.square().sum((1, 2)),
                terms=terms * 4,
            )
        lo, hi = n.V // 3, n.V - n.V // 3
        assert_agrees(
            f.tile(lo, hi), G[:, lo:hi].flatten(1), scale=size[:, lo:hi].flatten(1), terms=terms
        )
        for index in (
            slice(1, 3),
            slice(None, None, 2),
            torch.arange(n.B - 1, -1, -1),
            torch.arange(n.B) % 2 == 0,
            torch.tensor([-1, 0, -1][: 3 if n.B else 0], dtype=torch.long),
        ):
            chosen_rows = f.select(index)
            assert chosen_rows.batch == len(G[index])
            assert_agrees(chosen_rows.dense(), G[index], scale=size[index], terms=terms)
            assert_agrees(
                chosen_rows.sq_norms(),
                G[index].square().sum((1, 2)),
                scale=size[index].square().sum((1, 2)),
                terms=terms,
            )


@KINDS
def test_second_moments_at_sizes_that_are_cut(kind):
    """Some examples at a time, and parts of one; torch's own gradient of a convolution, too."""
    n = Sizes(B=9, T=7, V=40, d=24)
    for dtype in (torch.float32, torch.float64):
        x = Specimen.draw(kind, n.B, n, 5, dtype)
        c = torch.linspace(-1, 2, n.B, dtype=x.factor.dtype)
        want = torch.einsum("b,bij->ij", c.double(), x.G.square())
        scale = torch.einsum("b,bij->ij", c.double().abs(), x.size.square())
        for budget in (None, 1, 700, 3000, 20_000):
            with workspace(budget):
                assert_agrees(x.factor.second_moment(c), want, scale=scale, terms=1000)


@pytest.mark.parametrize("torch_forms", [True, False])
def test_second_moments_of_convolutions_by_either_way(torch_forms, monkeypatch):
    monkeypatch.setattr(correlation_norms, "torch_forms_faster", lambda n, by: torch_forms)
    x = Specimen.draw("image", 4, Sizes(), 5, torch.float32)
    assert x.factor.callable
    got = x.factor.second_moment(torch.ones(4))
    assert_agrees(got, x.G.square().sum(0), scale=x.size.square().sum(0), terms=1000)


@KINDS
@CONTRACT
@given(
    second=st.sampled_from(list(ZOO)),
    n=SIZES,
    dtype=DTYPES,
    chosen=CHOICES,
    seed=st.integers(0, 99),
)
def test_products_of_any_two_kinds(kind, second, n, dtype, chosen, seed):
    x = Specimen.draw(kind, n.B, n, seed, dtype)
    y = Specimen.draw(second, n.B, n, seed + 100, dtype)
    z = Specimen.draw(second, n.K, n, seed + 200, dtype)
    terms = 16 * (n.T + 1) * (n.V + 1) * (n.d + 1)
    with chosen:
        assert_agrees(
            x.factor.dot(y.factor),
            (x.G * y.G).sum((1, 2)),
            scale=(x.size * y.size).sum((1, 2)),
            terms=terms,
        )
        products = torch.einsum("bij,kij->bk", x.G, z.G)
        scale = torch.einsum("bij,kij->bk", x.size, z.size)
        assert_agrees(x.factor.gram(z.factor), products, scale=scale, terms=terms)
        assert_agrees(z.factor.gram(x.factor), products.mT, scale=scale.mT, terms=terms)


@pytest.mark.parametrize("second", ZOO)
@KINDS
def test_every_pair_at_one_size(kind, second):
    n = Sizes()
    x = Specimen.draw(kind, n.B, n, 1, torch.float64)
    y = Specimen.draw(second, n.B, n, 2, torch.float64)
    for method in (None, "gram", "direct"):
        with choices(method, 500):
            assert_agrees(
                x.factor.gram(y.factor),
                torch.einsum("bij,kij->bk", x.G, y.G),
                scale=torch.einsum("bij,kij->bk", x.size, y.size),
                terms=1000,
            )
            assert_agrees(
                x.factor.dot(y.factor),
                (x.G * y.G).sum((1, 2)),
                scale=(x.size * y.size).sum((1, 2)),
                terms=1000,
            )


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 2)])
def test_parameters_of_any_rank(shape):
    size = torch.Size(shape).numel()
    values = torch.randn(4, *shape, dtype=torch.float64, generator=torch.manual_seed(0))
    g, a = values.reshape(4, 1, 1, size), torch.ones(4, 1, 1, 1, dtype=torch.float64)
    S = torch.randn(shape[:1] * 2 or (1, 1), dtype=torch.float64)
    factors = [
        Dense(values),
        Outer(g, a, shape),
        Pulled(Dense(values), torch.neg, shape).scale(-torch.ones(4)),
        Scaled(Dense(values), torch.ones(shape, dtype=torch.float64)),
    ]
    flat = values.reshape(4, size)
    for f in factors:
        torch.testing.assert_close(f.dense(), values)
        torch.testing.assert_close(f.sq_norms(), flat.square().sum(1))
        torch.testing.assert_close(f.second_moment(torch.ones(4)), values.square().sum(0))
        want = (S @ values.reshape(4, len(S), size // len(S))).reshape(values.shape)
        torch.testing.assert_close(f.kronecker(None, S).dense(), want)
        for h in factors:
            torch.testing.assert_close(f.gram(h), flat @ flat.T)
            torch.testing.assert_close(f.dot(h), flat.square().sum(1))


def test_room_is_lent_to_one_at_a_time_and_renewed_for_every_large_pass():
    cpu = torch.device("cpu")
    count, many = 2**18, HEAP_END_BYTES // 2
    with torch.inference_mode():
        pass_begins(cpu, many)
        with lent(count, torch.float32, cpu) as kept:
            assert kept.shape == (count,)
            before = kept.data_ptr()
    pass_begins(cpu, many - 1)
    with lent(count, torch.float32, cpu) as same:
        assert same.data_ptr() == before
    pass_begins(cpu, many)
    with lent(count, torch.float32, cpu) as first, lent(5, torch.float64, cpu) as second:
        first.fill_(1)  # a buffer made in inference mode could not be written here
        second.fill_(2)
        assert first.shape == (count,)
        assert (first == 1).all()
        assert first.data_ptr() != before
        pass_begins(cpu, many)  # of another pass within this one: not under its feet
        assert (first == 1).all()
    with lent(3, torch.float64, cpu) as again, torch.inference_mode():
        assert again.data_ptr() == first.data_ptr()
        again.fill_(3)
    with lent(CACHE_BYTES, torch.float32, cpu) as large:
        assert large.data_ptr() != first.data_ptr()


def test_a_thread_without_a_pass_has_a_buffer_too():
    cpu, found = torch.device("cpu"), []

    def ask() -> None:
        for _ in range(2):
            with lent(1000, torch.float32, cpu) as room:
                found.append(room.data_ptr())

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found[0] == found[1]


@pytest.mark.parametrize("T", [1, 3, 400])
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # torch's own, in forward mode
def test_products_with_weights_and_directions_within_transforms(T):
    """vmap and forward mode hand in tensors that stand for others, and no buffer takes them."""
    torch.manual_seed(0)
    g, a, c, v = (
        torch.randn(size, dtype=torch.float64) for size in ((4, T, 5), (4, T, 6), (3, 4), (3, 5, 6))
    )
    f = Outer(g, a)
    G = f.dense()
    for budget in (None, 1000):
        with workspace(budget):
            sums, along = torch.vmap(f.weighted_sum)(c), torch.vmap(f.matvec)(v)
            torch.testing.assert_close(sums, torch.einsum("kb,bij->kij", c, G))
            squares = torch.vmap(f.second_moment)(c)
            torch.testing.assert_close(squares, torch.einsum("kb,bij->kij", c, G.square()))
            torch.testing.assert_close(along, torch.einsum("kij,bij->kb", v, G))
            for function, at, want in ((f.weighted_sum, c, sums), (f.matvec, v, along)):
                _, change = torch.func.jvp(function, (at[0],), (at[1],))
                torch.testing.assert_close(change, want[1])
                with forward_ad.dual_level():
                    out = function(forward_ad.make_dual(at[0], at[1]))
                    torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, want[1])


def test_a_bias_that_was_summed_keeps_no_cotangents():
    g, a = torch.randn(4, 1, 50, 3), torch.randn(4, 1, 50, 2)
    both = Both(g, a, 0)
    weight, bias = Outer(g, a, both=both), Summed(g, (3,), both)
    assert isinstance(weight.formed(), Dense)  # 50 positions of 5, or one matrix of 6
    kept = bias.formed()
    assert [t.shape for t in kept.tensors()] == [(4, 3)]
    torch.testing.assert_close(kept.dense(), g.sum((1, 2)))
    with choices("gram", None):
        assert bias.formed() is bias  # a Gram tells its norm


def test_chunks_never_change_a_result():
    n = Sizes(B=7, T=5)
    for kind in ZOO:
        x = Specimen.draw(kind, n.B, n, 3, torch.float32)
        scale = torch.einsum("bij,kij->bk", x.size, x.size)
        for budget in (1, 64, 1000, 10**7):
            with workspace(budget):
                assert limit() == budget
                assert_agrees(
                    x.factor.gram(x.factor),
                    torch.einsum("bij,kij->bk", x.G, x.G),
                    scale=scale,
                    terms=200,
                )
                assert_agrees(
                    x.factor.sq_norms(),
                    x.G.square().sum((1, 2)),
                    scale=scale.diagonal(),
                    terms=200,
                )
    with pytest.raises(ValueError, match="must be positive"), workspace(0):
        pass


def test_gram_of_itself_is_symmetric():
    for kind in ZOO:
        f = Specimen.draw(kind, 9, Sizes(), 4, torch.float32).factor
        for method in ("gram", "direct"):
            with choices(method, None):
                G = f.gram(f)
                torch.testing.assert_close(G, G.mT, rtol=1e-5, atol=1e-5)


# -- one example's trouble is its own --------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@KINDS
def test_a_bad_example_stays_alone(kind, value):
    if kind == "zero":
        return
    n = Sizes()
    same: Cast = lambda x: x  # noqa: E731
    good = ZOO[kind](Source(5, same, same), n.B, n)
    bad = ZOO[kind](Source(5, same, same, poison=value), n.B, n)
    others = [0, 2, 3]
    v = torch.ones(n.V, n.d, dtype=torch.float64)
    for method in (None, "gram", "direct"):
        with choices(method, None):
            for ask in (
                lambda f: f.sq_norms(),
                lambda f: f.matvec(v),
                lambda f: f.dense(),
                lambda f: f.gram(f)[:, others],
                lambda f: f.dot(f.scale(torch.ones(n.B))),
            ):
                torch.testing.assert_close(ask(bad)[others], ask(good)[others])
                assert not ask(bad)[1].isfinite().all()
            for second in ZOO:
                h = ZOO[second](Source(6, same, same), n.B, n)
                torch.testing.assert_close(bad.dot(h)[others], good.dot(h)[others])
                torch.testing.assert_close(bad.gram(h)[others], good.gram(h)[others])
                torch.testing.assert_close(h.gram(bad)[:, others], h.gram(good)[:, others])


def test_a_lookup_of_no_row_is_not_read():
    g = torch.randn(2, 3, 4, dtype=torch.float64)
    g[:, 1] = float("nan")
    ids = torch.tensor([[0, -1, 2], [2, -1, 2]])
    f, clean = Rows(ids, g, (5, 4)), Rows(ids[:, ::2], g[:, ::2], (5, 4))
    head = Outer(torch.randn(2, 2, 5, dtype=torch.float64), torch.ones(2, 2, 4).double())
    D = torch.randn(5, 4, dtype=torch.float64)
    for a, b in ((f, clean), (f.times_diagonal(D), clean.times_diagonal(D))):
        torch.testing.assert_close(a.sq_norms(), b.sq_norms())
        torch.testing.assert_close(a.weighted_sum(torch.ones(2)), b.weighted_sum(torch.ones(2)))
        torch.testing.assert_close(a.matvec(D), b.matvec(D))
        torch.testing.assert_close(a.dot(head), b.dot(head))
        torch.testing.assert_close(a.gram(head), b.gram(head))


# -- numerics --------------------------------------------------------------------------------------


def _cancelling(mean: float) -> tuple[Tensor, Tensor]:
    """Inputs that share a mean, cotangents that sum to zero: a key projection below softmax."""
    torch.manual_seed(0)
    g, a = torch.randn(2, 256, 48), torch.randn(2, 256, 64)
    g[1], a[1] = torch.randn(256, 48), torch.randn(256, 64)  # this one stays as it is
    a[0] += mean
    g[0] -= g[0].mean(0)
    return g, a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_that_cancels_is_taken_directly(dtype):
    g, a = _cancelling(300.0)
    if dtype == torch.bfloat16:  # round, and restore the zero sum in pairs of opposite sign
        g[:, 128:], a = -g[:, :128], a / 100
    f = Outer(g.to(dtype), a.to(dtype))
    exact = f.to(dtype=torch.float64).dense().square().sum((1, 2))
    with choices("gram", None):
        plain, sizes = gram_norms.gram(f.g, f.a)
        assert cancels(plain, sizes)[0]
        if dtype == torch.float32:
            assert ((plain.double() - exact) / exact).abs().max() > 1e-4
        assert ((f.sq_norms().double() - exact) / exact).abs().max() < 1e-4
        assert ((f.gram(f).diagonal().double() - exact) / exact).abs().max() < 1e-4
        again = Outer(f.g.clone(), f.a.clone())
        assert ((f.dot(again).double() - exact) / exact).abs().max() < 1e-4
        assert ((f.gram(again).diagonal().double() - exact) / exact).abs().max() < 1e-4


def test_a_gram_that_overflows_is_taken_directly():
    f = Outer(torch.full((1, 4, 3), 1e15), torch.tensor([1e10, -1e10, 1.0, 1.0]).view(1, 4, 1))
    with choices("gram", None):
        torch.testing.assert_close(f.sq_norms(), torch.tensor([1.2e31]))


def test_parts_of_a_sum_that_cancel():
    torch.manual_seed(0)
    values = torch.randn(3, 6, 4)
    small = 1e-4 * torch.randn(3, 6, 4)
    eye = torch.eye(4).expand(3, 4, 4)
    f = Sum([Dense(values + small), Outer(-values.mT.contiguous(), eye)])
    exact = f.to(dtype=torch.float64).dense().square().sum((1, 2))
    for got in (f.sq_norms(), f.gram(f).diagonal()):
        assert ((got.double() - exact) / exact).abs().max() < 1e-5


# -- autograd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "gram", "direct"])
@KINDS
def test_everything_can_be_differentiated(kind, method):
    n = Sizes()
    source = Source(7, lambda x: x.clone().requires_grad_(), lambda x: x)
    f = ZOO[kind](source, n.B, n)
    if not source.leaves:
        return
    h = ZOO["sum"](Source(8, lambda x: x, lambda x: x), n.B, n)
    v, c = torch.randn(n.V, n.d).double(), torch.randn(n.B).double()
    G, H = f.dense(), h.dense()
    with choices(method, 700):
        for got, want in (
            (f.sq_norms(), G.square().sum((1, 2))),
            (f.dot(h), (G * H).sum((1, 2))),
            (f.gram(h), torch.einsum("bij,kij->bk", G, H)),
            (f.gram(f), torch.einsum("bij,kij->bk", G, G)),
            (f.matvec(v), (G * v).sum((1, 2))),
            (f.weighted_sum(c), torch.einsum("b,bij->ij", c, G)),
            (f.second_moment(c), torch.einsum("b,bij->ij", c, G.square())),
            (f.times_diagonal(v).sq_norms(), (G * v).square().sum((1, 2))),
            (f.scale(c).dense(), G * c[:, None, None]),
        ):
            weights = torch.randn_like(want)
            ours = torch.autograd.grad(
                (got * weights).sum(), source.leaves, create_graph=True, materialize_grads=True
            )
            theirs = torch.autograd.grad(
                (want * weights).sum(), source.leaves, retain_graph=True, materialize_grads=True
            )
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("method", ["gram", "direct"])
def test_norms_can_be_differentiated_twice(method):
    torch.manual_seed(0)
    g = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    with choices(method, None):
        assert torch.autograd.gradgradcheck(lambda g, a: Outer(g, a).sq_norms(), (g, a))


def test_a_zero_gradient_has_a_finite_derivative():
    g = torch.zeros(1, 2, 3, requires_grad=True)
    for method in ("gram", "direct"):
        with choices(method, None):
            (slope,) = torch.autograd.grad(Outer(g, torch.ones(1, 2, 2)).sq_norms().sum(), g)
            assert torch.equal(slope, torch.zeros_like(g))


# -- moving, keeping -------------------------------------------------------------------------------


@KINDS
def test_moved_and_detached(kind):
    n = Sizes()
    source = Source(9, lambda x: x.clone().requires_grad_(), lambda x: x)
    f = ZOO[kind](source, n.B, n)
    assert f.to("cpu", torch.float32).dtype == torch.float32
    assert not f.detach().dense().requires_grad
    held = {t.data_ptr() for t in f.tensors() if t.is_floating_point()}
    if kind not in (
        "sum",
        "placed",
        "beside",
        "computed",
        "strewn",
        "strewn_transposed",
        "strewn_sum",
    ):  # these copy, or leave it to a function to hold
        assert all(t.data_ptr() in held for t in source.leaves)
    assert kind in ("zero", "computed") or held
    assert f"B={n.B}" in repr(f)
    narrow = f.to(dtype=torch.float32).dense()
    torch.testing.assert_close(narrow.double(), f.dense(), rtol=1e-4, atol=1e-4)
    assert f.dot(f.to(dtype=torch.float32)).dtype == torch.float64


# -- what becomes of what --------------------------------------------------------------------------


def test_sums_join_parts_of_one_kind():
    n = Sizes()
    s = Source(0, lambda x: x, lambda x: x)
    outer = Sum([_outer(s, 4, n), Sum([_outer(s, 4, n), _zero(s, 4, n)])])
    assert [type(f) for f in outer.factors] == [Outer]
    assert outer.factors[0].sizes == (1, 2 * n.T, n.V, n.d)
    assert [type(f) for f in Sum([_rows(s, 4, n), _rows(s, 4, n)]).factors] == [Rows]
    assert [type(f) for f in Sum([_dense(s, 4, n), _dense(s, 4, n)]).factors] == [Dense]
    assert [type(f) for f in Sum([_mapped(s, 4, n), _mapped(s, 4, n)]).factors] == [Mapped]
    assert [type(f) for f in Sum([_zero(s, 4, n), _zero(s, 4, n)]).factors] == [Zero]
    assert len(Sum([_outer(s, 4, n), _misfit(s, 4, n), _rows(s, 4, n)]).factors) == 3


def test_steps_are_absorbed():
    s = Source(0, lambda x: x, lambda x: x)
    outer = Outer(s.rows(2, 3, 6), s.rows(2, 3, 4))
    assert mapped(outer, ()) is outer
    assert mapped(outer, (("view", (6, 4)), ("permute", (0, 1)))) is outer
    assert mapped(outer, (("permute", (1, 0)), ("permute", (1, 0)))) is outer
    swapped = mapped(outer, (("permute", (1, 0)),))
    assert isinstance(swapped, Outer)
    assert swapped.g is outer.a
    viewed = mapped(outer, (("view", (2, 3, -1)),))
    assert isinstance(viewed, Outer)
    assert viewed.shape == (2, 3, 4)
    turned = mapped(viewed, (("permute", (2, 0, 1)),))
    assert isinstance(turned, Mapped)
    assert mapped(turned, (("permute", (1, 2, 0)),)).shape == viewed.shape
    assert isinstance(mapped(turned, (("permute", (1, 2, 0)),)), Outer)
    batched = Outer(s.rows(2, 5, 3, 6), s.rows(2, 5, 3, 4), (5, 6, 4))
    assert isinstance(mapped(batched, (("permute", (0, 2, 1)),)), Outer)
    dense = mapped(Dense(s.rows(2, 6, 4)), (("permute", (1, 0)),))
    assert isinstance(dense, Dense)
    for wrong in ((("permute", (0, 0)),), (("view", (5, 5)),), (("flip", (0, 1)),)):
        with pytest.raises(ValueError, match=r"isometric|viewed"):
            mapped(outer, wrong)


@settings(derandomize=True, deadline=None, database=None)
@given(seed=st.integers(0, 999))
def test_steps_together_do_what_they_do_one_by_one(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 3, 2, 1), (6, 2), (2, 6), (12,), (3, 4), (4, 3), (1, 12), (2, 2, 3)]

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    x = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64)
    f: Factor = Outer(x, torch.ones(2, 3, 1, dtype=torch.float64), (3, 4))
    want, steps = f.dense(), []
    for _ in range(pick(5)):
        if pick(2):
            steps.append(("view", shapes[pick(len(shapes))]))
            want = want.reshape(2, *steps[-1][1])
        else:
            order = tuple(torch.randperm(want.dim() - 1, generator=generator).tolist())
            steps.append(("permute", order))
            want = want.permute(0, *(i + 1 for i in order))
    got = mapped(f, steps)
    assert torch.equal(got.dense(), want)
    if isinstance(got, Mapped):
        iso = got.isometry
        assert torch.equal(iso.invert(want), got.factor.dense())
        assert hash(iso) == hash(Isometry(iso.source, iso.steps))


# -- costs -----------------------------------------------------------------------------------------


def test_costs_choose_by_arithmetic():
    def chosen(*sizes: int, **more: int) -> choice.Method:
        return choice.cheapest(outer_norms.METHODS, outer_norms.Sizes(*sizes, **more), DEFAULT)

    def count(name: str, *sizes: int) -> int:
        (method,) = (m for m in outer_norms.METHODS if m.name == name)
        return method.count(outer_norms.Sizes(*sizes), DEFAULT)

    assert chosen(1, 10, 10).name == "rows"
    assert count("rows", 1, 10, 20) == 30
    assert chosen(16, 512, 512).name == "gram"
    assert chosen(128, 3072, 768).name == "gram"
    assert chosen(1024, 64, 64).name == "direct"
    assert chosen(4096, 50257, 768).name == "direct"  # storage would say "gram"
    assert count("gram", 16, 512, 512) == 16 * 16 * 1024
    assert count("direct", 1024, 64, 64) == 1025 * 64 * 64
    assert costs.gram_norm_cost(512, 8, 8) == 512 * 512 * 16 * 5 // 8
    assert costs.outer_dot_method(1, 1, 64, 64) == "rows"
    assert costs.outer_dot_method(4, 4, 1024, 1024) == "gram"
    assert costs.outer_dot_method(2048, 2048, 256, 256) == "direct"
    assert costs.outer_gram_method(512, 512, 1, 1, 512, 512) == "rows"
    assert costs.outer_gram_method(32, 32, 1024, 1024, 1024, 1024) == "tiles"
    assert costs.outer_gram_method(8, 8, 4, 4, 1024, 1024) == "gram"
    assert chosen(100, 192, 192).name == "direct"
    assert chosen(197, 192, 192, fused=True).name == "direct"
    assert chosen(197, 192, 192, fused=True, summed=192).name == "fused"  # and its bias
    assert count("fused", 128, 256, 256) == 128 * (128 + 16) * 512 // 2
    assert costs.join_is_cheaper(10, 100, 100, 100, 8)
    assert not costs.join_is_cheaper(1000, 10, 10, 10, 8)


def test_a_new_method_for_norms_is_one_entry(monkeypatch):
    """It is chosen where it costs the least, shown by `explain`, and tells nobody else's norms."""
    torch.manual_seed(0)
    calls = []

    def norms(g: Tensor, a: Tensor, side: int | None, kernel: object) -> outer_norms.Pairs:
        calls.append(side)
        return (torch.einsum("bntp,bntd->bnpd", g, a).square().sum((1, 2, 3)), None), None

    entry = choice.Method(
        "einsum",
        available=lambda n: n.T > 1,
        time=lambda n, by: 0.0,
        count=lambda n, by: n.T * n.p * n.d,
        norms=norms,
    )
    monkeypatch.setattr(outer_norms, "METHODS", (*outer_norms.METHODS, entry))
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    x = torch.randn(2, 6, 4)

    def losses() -> Tensor:
        return model(x).square().sum((1, 2))

    want = naive.norms(naive.loop_grads(losses(), model))
    torch.testing.assert_close(
        pergrad.norms(losses(), model), want, rtol=1e-5, atol=0, check_dtype=False
    )
    assert len(calls) == 2
    rows = {row.parameter: row for row in pergrad.explain(losses(), model).rows}
    assert [rows[f"{i}.weight"].method for i in (0, 2)] == ["einsum"] * 2
    assert rows["0.weight"].cost == 2 * 6 * 5 * 4
    plain = Outer(torch.randn(3, 1, 4), torch.randn(3, 1, 5))
    assert plain.norm_method == "rows"  # where it is not available


# -- refusals --------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused():
    f = Dense(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="do not meet"):
        f.dot(Dense(torch.zeros(2, 4, 3)))
    with pytest.raises(ValueError, match="do not meet"):
        f.gram(Dense(torch.zeros(2, 12)))
    with pytest.raises(ValueError, match="equally many rows"):
        f.dot(Dense(torch.zeros(3, 3, 4)))
    with pytest.raises(ValueError, match="do not fit"):
        Outer(torch.zeros(2, 3, 4), torch.zeros(2, 2, 4))
    with pytest.raises(ValueError, match="is no parameter of shape"):
        Outer(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), (4, 5))
    with pytest.raises(ValueError, match="do not fit a table"):
        Rows(torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3, 4), (5, 5))
    with pytest.raises(ValueError, match="looked up in a table"):
        Rows(torch.full((2, 3), 5), torch.zeros(2, 3, 4), (5, 4)).sq_norms()
    with pytest.raises(ValueError, match="cannot be added"):
        Sum([f, Dense(torch.zeros(2, 12))])
    with pytest.raises(ValueError, match="no factors"):
        Sum([])
    with pytest.raises(ValueError, match="cannot go to"):
        Placed(f, torch.arange(3), 5)
    with pytest.raises(ValueError, match="is not the slice"):
        Embedded(f, (3, 8), (1, 2, 7))
    with pytest.raises(ValueError, match="cannot map"):
        Mapped(f, Isometry((4, 3), ()))
    with pytest.raises(ValueError, match="A diagonal for"):
        f.times_diagonal(torch.ones(3))
    with pytest.raises(ValueError, match="A diagonal for"):
        Scaled(f, torch.ones(3))
    with pytest.raises(ValueError, match="must be a number"):
        f.kronecker(torch.ones(3, 3), None)
    with pytest.raises(ValueError, match="returned"):
        Pulled(f, lambda x: x, (12,)).dense()
    with pytest.raises(ValueError, match="A mask over 2"):
        f.select(torch.tensor([True]))
    with pytest.raises(ValueError, match="1-D and integer"):
        f.select(torch.tensor([0.5]))
    with pytest.raises(IndexError, match="out of range"):
        f.select(torch.tensor([2]))


# -- the methods of an Outer ----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gram", "fused", "direct"])
@pytest.mark.parametrize("budget", [None, 1, 20_000])
@pytest.mark.parametrize("N", [1, 2])
@pytest.mark.parametrize("T", [1, 5, 130, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_method_of_an_outer(dtype, T, N, budget, method):
    """The same numbers however examples and positions are cut, and those of either side's sums."""
    generator = torch.Generator().manual_seed(T)
    a, g = (torch.randn(3, N, T, n, generator=generator).to(dtype) for n in (20, 30))
    wanted = torch.einsum("bntp,bntd->bnpd", g.double(), a.double()).square().sum((1, 2, 3))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    there = "gram" if method == "fused" and kernel_for(g, a) is None else method
    for left, right in ((g, a), (a, g)):
        with only(method), workspace(budget):
            assert Outer(left, right).norm_method == ("rows" if T == 1 else there)
            norms, told = outer_norms.sq_norms(left, right, 0 if N == 1 else None)
        got = norms.settled().double()
        assert norms.values.dtype == torch.promote_types(dtype, torch.float32)
        assert ((got - wanted).abs() <= tolerance * wanted).all()
        assert (told is not None) == (N == 1 and (T == 1 or method != "direct"))
        if told is not None:
            sums = left[:, 0].double().sum(1).square().sum(1)
            assert ((told.settled().double() - sums).abs() <= 10 * tolerance * sums).all()


# -- a bias and the weight above it ---------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "gram", "direct"])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("T", [1, 5, 130])
def test_a_bias_has_its_norms_from_the_weight(T, swapped, method):
    generator = torch.Generator().manual_seed(T)
    g, a = (torch.randn(3, 1, T, n, generator=generator, dtype=torch.float64) for n in (6, 4))
    g[2] -= g[2].mean(1, keepdim=True)  # a bias of nothing but rounding: the guard must see it
    both = Both(a, g, 1) if swapped else Both(g, a, 0)
    weight = Outer(both.g, both.a, both=both)
    weight = mapped(weight, (("permute", (1, 0)),))
    bias = Summed(g, (6,), both)
    want = weight.dense().square().sum((1, 2))
    wanted = g[:, 0].sum(1).square().sum(1)
    for first in (weight, bias):  # whoever is asked first
        both._taken = None
        with choices(method, None):
            first.sq_norms()
            assert (both.of_sum() is not None) == both.tells
            if method == "gram" or T == 1:
                assert both.tells
            assert ((bias.sq_norms() - wanted).abs() <= 1e-12 * wanted).all()
            torch.testing.assert_close(weight.sq_norms(), want)


def test_a_sum_in_doubt_takes_the_dtype_of_what_is_noted():
    g = torch.ones(2, 1, 4, 6)
    g[1, 0, 0] = -3 + 1e-3
    both = Both(g, torch.ones(2, 1, 4, 3, dtype=torch.float64), 0)
    with choices("gram", None):
        got = Summed(g, (6,), both).sq_norms()
    assert got.dtype == torch.float64
    torch.testing.assert_close(
        got, torch.tensor([96.0, 6e-6], dtype=torch.float64), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("method", ["gram", "fused"])
def test_a_doubtful_gram_is_taken_directly(method):
    a = torch.randn(2, 1, 64, 200, dtype=torch.float64)
    a -= a.mean(2, keepdim=True)
    ones = torch.ones(2, 1, 64, 200, dtype=torch.float64)
    for g in (ones + 1e-9 * torch.randn_like(ones), ones):
        want = (g.mT @ a).square().sum((1, 2, 3))
        with choices(method, None):
            got = Outer(g, a).sq_norms()
        assert ((got - want).abs() <= 1e-9 * want + 1e-20).all()


def test_parts_of_a_bias_become_one_part():
    g = torch.randn(3, 1, 2, 4)
    total = Sum([Summed(g, (4,)), Dense(torch.ones(3, 4))])
    assert len(total.factors) == 1
    assert torch.equal(total.dense(), g[:, 0].sum(1) + 1)


# -- the methods of a convolution -----------------------------------------------------------------

WINDOWS = [  # spatial sizes, kernel, stride, padding, dilation
    ((9,), (3,), (1,), (1,), (1,)),
    ((9,), (4,), (2,), (0,), (2,)),
    ((7, 6), (3, 2), (1, 2), (1, 0), (1, 1)),
    ((8, 8), (2, 2), (2, 2), (0, 0), (1, 1)),
    ((4, 5, 6), (2, 3, 1), (1, 1, 2), (1, 1, 0), (1, 2, 1)),
]


@pytest.mark.parametrize("method", ["direct", "gram", "shift", "convolution"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", WINDOWS)
def test_every_method_of_a_convolution(window, dtype, groups, method):
    size, kernel, stride, padding, dilation = window
    generator = torch.Generator().manual_seed(0)
    out = [
        (n + 2 * p - e * (k - 1) - 1) // s + 1
        for n, k, s, p, e in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    x = torch.randn(3, 4, *size, generator=generator).to(dtype)
    g = torch.randn(3, 6, *out, generator=generator).to(dtype)

    def factor(g: Tensor, x: Tensor) -> Correlation:
        return Correlation(
            g, x, kernel=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups
        )  # fmt: skip

    plain = factor(g.double(), x.double()).dense()
    f = factor(g, x)
    assert f.callable
    with (
        only(method),
        workspace(None),
    ):
        got, rows = f.sq_norms(), f.dense()
    wanted = plain.flatten(1).square().sum(1)
    assert ((got - wanted).abs() <= 1e-5 * wanted).all()
    assert (rows - plain).abs().max() <= 1e-5 * plain.abs().max()


def test_a_convolution_doubts_some_of_its_pieces_alone():
    """The kernel says of each piece of the batch whether its Grams are to be trusted."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(4, 4, 5, 5, generator=generator)
    x = torch.randn(4, 4, 7, 7, generator=generator)
    g[1] -= g[1].mean((1, 2), keepdim=True) - 1e-4
    x[1] = x[1, :, :1, :1]
    f = Correlation(g, x, kernel=(3, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1))
    against = mock.Mock(wraps=correlation.held_against)
    with (
        only("fused"),
        mock.patch.object(correlation_norms, "scratch", return_value=1),
        mock.patch.object(correlation, "held_against", against),
    ):
        got = f.sq_norms()
    wanted = f.to(dtype=torch.float64).dense().flatten(1).square().sum(1)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=0)
    ((norms, sizes, _), _) = against.call_args
    assert len(norms) == 4
    assert sizes.tolist()[1] > 0  # of the piece that is in doubt
    if f._kernel is not None:
        assert sizes[[0, 2, 3]].tolist() == [0, 0, 0]


def test_a_convolution_of_many_examples_is_cut():
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(9, 3, n, generator=generator) for n in (4, 6))
    f = Correlation(g, x, kernel=(3,), stride=(1,), padding=(0,), dilation=(1,))
    with workspace(2 * f.bytes_per_row):
        cut = [rows for rows, _ in f.kernels()]
        assert len(cut) == 5
        norms = correlation_norms.by_convolutions(f)[0]
    wanted = f.outer(slice(None)).dense().double().flatten(1).square().sum(1)
    assert ((norms - wanted).abs() <= 1e-5 * wanted).all()


def test_rows_are_kept_where_norms_form_them_and_they_are_smaller():
    long = Outer(torch.randn(2, 1, 1000, 3), torch.randn(2, 1, 1000, 4))
    kept = long.formed()
    assert isinstance(kept, Dense)
    assert torch.equal(kept.dense(), long.dense())
    wide = Outer(torch.randn(2, 1, 10, 40), torch.randn(2, 1, 10, 50))
    with choices("direct", None):
        assert wide.formed() is wide
    with choices("gram", None):
        assert long.formed() is long


def test_a_convolution_is_called_only_where_it_fits():
    g, x = torch.randn(2, 3, 4), torch.randn(2, 3, 9)
    sizes = {"kernel": (3,), "stride": (1,), "padding": (0,), "dilation": (1,)}
    assert not Correlation(g, x, **sizes).callable  # x goes on beyond what the kernel sees
    assert Correlation(g, x[..., :6], **sizes).callable
    assert Correlation(g, x[..., :6], groups=3, **sizes).callable
    assert not Correlation(g.double(), x[..., :6].double(), **sizes).callable
