"""`Sum`, several uses of one parameter; `Placed`, some of the examples; `Beside`, all of them.

Owns: the three classes, and their products with others.
Does not know: which kinds there are, nor which parts become one (`Factor.joins`).
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from pergrad.factors.base import Factor, general_gram
from pergrad.factors.dense import Zero
from pergrad.factors.guard import SqNorms, cancels, held_against
from pergrad.factors.isometry import Isometry
from pergrad.factors.numeric import Index
from pergrad.factors.products import dots, grams

_FEW = 4  # so many parts may have a product with each other


class Sum(Factor):
    """G[b] = Σ_i factors[i][b]: tied and re-used weights, with every cross term.

    Parts of one kind become one part, where their kind says so: Dense and Dense, say.
    """

    def __init__(self, factors: Sequence[Factor]) -> None:
        if not factors:
            raise ValueError("A sum of no factors has no shape.")
        first = factors[0]
        for f in factors:
            if (f.batch, f.shape) != (first.batch, first.shape):
                raise ValueError(f"{first} and {f} cannot be added.")
        self.factors = self._parts(factors)
        dtype = first.dtype
        for f in factors:
            dtype = torch.promote_types(dtype, f.dtype)
        super().__init__(first.batch, first.shape, first.device, dtype)
        self.tiles = all(f.tiles for f in self.factors)

    @staticmethod
    def _parts(factors: Sequence[Factor]) -> tuple[Factor, ...]:
        return _merged(factors)

    @property
    def bytes_per_row(self) -> int:
        """One row of the sum and of one part."""
        return super().bytes_per_row + max(f.bytes_per_row for f in self.factors)

    def _total(self, of: Callable[[Factor], Tensor]) -> Tensor:
        total = of(self.factors[0]).to(self.dtype)
        for f in self.factors[1:]:
            total = total + of(f)
        return total

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self._total(lambda f: f.dense())

    def tile(self, lo: int, hi: int) -> Tensor:
        """The parts' tiles, added."""
        return self._total(lambda f: f.tile(lo, hi))

    def pick(self, rows: Tensor) -> Tensor | None:
        """The parts' rows, added."""
        total: Tensor | None = None
        for f in self.factors:
            part = f.pick(rows)
            if part is None:
                return None
            total = part if total is None else total + part
        return total

    def sq_norms(self) -> Tensor:
        """Σ_i ‖F_i‖² + 2 Σ_{i<j} F_i·F_j."""
        return self.sq_norms_and_doubts().settled()

    def sq_norms_and_doubts(self) -> SqNorms:
        """Parts that cancel are added up before they are squared."""
        if len(self.factors) == 1:
            return SqNorms(self.factors[0].sq_norms().to(self.dtype))
        norms = [f.sq_norms().to(self.dtype) for f in self.factors]
        total = torch.stack(norms).sum(0)
        examples = _examples(self.factors)
        for i, f in enumerate(self.factors):
            for k, h in enumerate(self.factors[:i]):
                if not examples or not examples[i].isdisjoint(examples[k]):
                    total = total + 2 * f.dot(h)
        # parts that cancel: as with a Gram, the error is that of the parts' sizes
        sizes = torch.stack(norms).sqrt().sum(0).square()
        return held_against(total, sizes, lambda rows: Factor.sq_norms(self._select(rows)))

    def matvec(self, v: Tensor) -> Tensor:
        """The parts', added."""
        return self._total(lambda f: f.matvec(v))

    def weighted_sum(self, c: Tensor) -> Tensor:
        """The parts', added."""
        return self._total(lambda f: f.weighted_sum(c))

    def weighted_gradient(self, c: Tensor) -> Tensor:
        """The parts', added: sparse if all of them are."""
        parts = [f.weighted_gradient(c).to(self.dtype) for f in self.factors]
        total, *rest = sorted(parts, key=lambda part: part.is_sparse)  # not sparse + dense
        for part in rest:
            total = total + part
        return total

    def weighted_sums(self, C: Tensor) -> Tensor:
        """The parts', added."""
        return self._total(lambda f: f.weighted_sums(C))

    def second_moment(self, c: Tensor) -> Tensor:
        """Of the parts added up: a square of a sum is no sum of squares."""
        only = len(self.factors) == 1
        return self.factors[0].second_moment(c) if only else super().second_moment(c)

    @property
    def norm_method(self) -> str:
        """Those of the parts."""
        return " + ".join(sorted({f.norm_method for f in self.factors}))

    @property
    def norm_cost(self) -> int:
        """Every part's, and as much again for each product of two."""
        return sum(f.norm_cost for f in self.factors) * len(self.factors)

    def absorb(self, chain: Isometry) -> "Sum":
        """The parts, each as it can."""
        return self._each(lambda f: f.absorb(chain))

    def materialized(self) -> "Sum":
        """The parts, formed."""
        return self._each(lambda f: f.materialized())

    def settled(self) -> Factor:
        """The parts, laid out."""
        parts = [f.settled() for f in self.factors]
        if len(parts) == 1:
            return parts[0]
        same = all(one is two for one, two in zip(parts, self.factors, strict=True))
        return self if same else Sum(parts)

    def _each(self, change: Callable[[Factor], Factor]) -> "Sum":
        return Sum([change(f) for f in self.factors])

    def scale(self, c: Tensor) -> "Sum":
        """The parts, scaled."""
        return self._each(lambda f: f.scale(c))

    def _times_diagonal(self, diagonal: Tensor) -> "Sum":
        return self._each(lambda f: f.times_diagonal(diagonal))

    def _kronecker(self, A: Tensor | None, S: Tensor | None) -> "Sum":
        return self._each(lambda f: f.kronecker(A, S))

    def _select(self, index: Index) -> "Sum":
        return self._each(lambda f: f._select(index))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Sum":
        return self._each(lambda f: f._map(change))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Sum":
        """The parts elsewhere."""
        return self._each(lambda f: f.to(device, dtype))

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of all parts."""
        return tuple(t for f in self.factors for t in f.tensors())


class Beside(Sum):
    """As `Sum`, of parts no two of which have an example in common: each row is one part's."""

    @staticmethod
    def _parts(factors: Sequence[Factor]) -> tuple[Factor, ...]:
        return tuple(factors)

    def sq_norms_and_doubts(self) -> SqNorms:
        """The parts', without a product of two."""
        return SqNorms(self._total(lambda f: f.sq_norms()))

    def second_moment(self, c: Tensor) -> Tensor:
        """The parts', added."""
        return self._total(lambda f: f.second_moment(c))

    @property
    def norm_cost(self) -> int:
        """The parts', added."""
        return sum(f.norm_cost for f in self.factors)

    def _each(self, change: Callable[[Factor], Factor]) -> "Beside":
        return Beside([change(f) for f in self.factors])


def _merged(factors: Sequence[Factor]) -> tuple[Factor, ...]:
    """Nested sums flattened, zeros dropped, parts of one kind joined; at least one part."""
    groups: dict[Hashable, list[Factor]] = {}
    for factor in factors:
        for part in factor.factors if isinstance(factor, Sum) else (factor,):
            groups.setdefault(part.joins, []).append(part)
    zeros = groups.pop(Zero, [])
    if not groups:
        return (zeros[0],)
    parts = [group[0].joined(group[1:]) if group[1:] else group[0] for group in groups.values()]
    return tuple(_side_by_side(parts)) if len(parts) > _FEW else tuple(parts)


def _side_by_side(parts: list[Factor]) -> list[Factor]:
    """Parts with rows for different examples, as a loop over examples leaves them, made one.

    Else every part would have a product with every other.
    """
    rest = [f for f in parts if not isinstance(f, Placed)]
    same: dict[tuple[int, ...], list[Factor]] = {}
    for f in parts:
        if isinstance(f, Placed):
            same.setdefault(tuple(f.index.tolist()), []).append(f.factor)
    batch = parts[0].batch
    # Of each kind the parts so far, none with an example that an earlier one of its list has.
    lists: dict[Hashable, list[tuple[set[int], list[tuple[tuple[int, ...], Factor]]]]] = {}
    for index, factors in same.items():
        for part in _merged(factors):
            if part.stacks is None:
                rest.append(_placed(part, index, batch))
                continue
            for taken, members in lists.setdefault(part.stacks, []):
                if taken.isdisjoint(index):
                    taken.update(index)
                    members.append((index, part))
                    break
            else:
                lists[part.stacks].append((set(index), [(index, part)]))
    for several in lists.values():
        for _, members in several:
            first, *others = [part for _, part in members]
            whole = first.stacked(others) if others else first
            order = [i for index, _ in members for i in index]
            if others and order != sorted(order):
                by_example = sorted(range(len(order)), key=order.__getitem__)
                whole = whole.select(torch.tensor(by_example, device=whole.device))
            rest.append(_placed(whole, sorted(order), batch))
    return rest


def _examples(parts: Sequence[Factor]) -> list[set[int]]:
    """Which examples each of many parts has rows of; nothing where they are few."""
    if len(parts) <= _FEW:
        return []
    everyone = set(range(parts[0].batch))
    return [set(f.index.tolist()) if isinstance(f, Placed) else everyone for f in parts]


def _placed(factor: Factor, index: Sequence[int], batch: int) -> Factor:
    """The factor itself, if it has all examples."""
    if len(index) == batch:
        return factor
    return Placed(factor, torch.tensor(index, dtype=torch.int64, device="cpu"), batch)


def placed_one_by_one(factors: Sequence[Factor]) -> Factor:
    """The examples of several factors, one after the other: of one kind, one factor."""
    some = [f for f in factors if f.batch] or list(factors[:1])
    first, *others = some
    stackable = first.stacks is not None and all(f.stacks == first.stacks for f in others)
    if stackable or not others:
        return first.stacked(others) if others else first
    batch, places, start = sum(f.batch for f in some), [], 0
    for f in some:
        index = torch.arange(start, start + f.batch, device=f.device)
        places.append(Placed(f, index, batch))
        start += f.batch
    return Sum(places)


class Placed(Factor):
    """Rows index[i] = factor[i] of a batch of `batch` examples; all others are zero.

    Args:
        factor: the rows that there are.
        index: (factor.batch,), ascending, without repetition.
        batch: how many examples there are in all.
    """

    def __init__(self, factor: Factor, index: Tensor, batch: int) -> None:
        if index.shape != (factor.batch,):
            raise ValueError(f"{factor.batch} rows cannot go to {tuple(index.shape)} places.")
        super().__init__(batch, factor.shape, factor.device, factor.dtype)
        self.factor = factor
        self.index = index.to(factor.device)
        self.tiles = factor.tiles

    @property
    def bytes_per_row(self) -> int:
        """The inner row's, and the row."""
        return super().bytes_per_row + self.factor.bytes_per_row

    def spread(self, rows: Tensor) -> Tensor:
        """Results for the inner rows as results for all: zeros elsewhere."""
        out = rows.new_zeros((self.batch, *rows.shape[1:]))
        return out.index_copy(0, self.index, rows)

    def dense(self) -> Tensor:
        """(B, *shape)."""
        return self.spread(self.factor.dense())

    def tile(self, lo: int, hi: int) -> Tensor:
        """The inner tile, spread."""
        return self.spread(self.factor.tile(lo, hi))

    def pick(self, rows: Tensor) -> Tensor | None:
        """The inner rows, spread."""
        picked = self.factor.pick(rows)
        return None if picked is None else self.spread(picked)

    def sq_norms(self) -> Tensor:
        """The inner norms, and zeros."""
        return self.spread(self.factor.sq_norms())

    def matvec(self, v: Tensor) -> Tensor:
        """The inner products, and zeros."""
        return self.spread(self.factor.matvec(v))

    def weighted_sum(self, c: Tensor) -> Tensor:
        """The inner sum with the inner rows' weights."""
        return self.factor.weighted_sum(c.to(self.device)[self.index])

    def weighted_sums(self, C: Tensor) -> Tensor:
        """The inner sums with the inner rows' weights."""
        return self.factor.weighted_sums(C.to(self.device)[self.index])

    def weighted_gradient(self, c: Tensor) -> Tensor:
        """The inner one with the inner rows' weights."""
        return self.factor.weighted_gradient(c.to(self.device)[self.index])

    def second_moment(self, c: Tensor) -> Tensor:
        """The inner one with the inner rows' weights: other rows are zero."""
        return self.factor.second_moment(c.to(self.device)[self.index])

    def _inside(self, factor: Factor) -> "Placed":
        return Placed(factor, self.index, self.batch)

    @property
    def norm_method(self) -> str:
        """That of the inner factor."""
        return self.factor.norm_method

    @property
    def norm_cost(self) -> int:
        """That of the inner factor."""
        return self.factor.norm_cost

    def absorb(self, chain: Isometry) -> "Placed":
        """The inner factor, as it can."""
        return self._inside(self.factor.absorb(chain))

    def materialized(self) -> "Placed":
        """The inner factor, formed."""
        return self._inside(self.factor.materialized())

    def scale(self, c: Tensor) -> "Placed":
        """The inner rows, scaled."""
        return self._inside(self.factor.scale(c.to(self.device)[self.index]))

    def _times_diagonal(self, diagonal: Tensor) -> "Placed":
        return self._inside(self.factor.times_diagonal(diagonal))

    def _kronecker(self, A: Tensor | None, S: Tensor | None) -> "Placed":
        return self._inside(self.factor.kronecker(A, S))

    def _select(self, index: Index) -> "Placed":
        place = torch.full((self.batch,), -1, device=self.device)
        place[self.index] = torch.arange(self.factor.batch, device=self.device)
        place = place[index]
        present = (place >= 0).nonzero()[:, 0]
        return Placed(self.factor._select(place[present]), present, len(place))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Placed":
        return self._inside(self.factor._map(change))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Placed":
        """The inner rows elsewhere."""
        return self._inside(self.factor.to(device, dtype))

    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the inner factor, and the index."""
        return (*self.factor.tensors(), self.index)


@dots.register(Placed, Factor)
def _dot_placed(f: Placed, h: Factor) -> Tensor:
    return f.spread(f.factor.dot(h.select(f.index)))


@grams.register(Placed, Factor)
def _gram_placed(f: Placed, h: Factor) -> Tensor:
    if f is h:
        return f.spread(f.spread(f.factor.gram(f.factor)).mT).mT
    return f.spread(f.factor.gram(h))


@dots.register(Sum, Factor)
def _dot_sum(f: Sum, h: Factor) -> Tensor:
    return f._total(lambda part: part.dot(h))


@grams.register(Sum, Factor)
def _gram_sum(f: Sum, h: Factor) -> Tensor:
    return _self_gram(f) if f is h else f._total(lambda part: part.gram(h))


def _self_gram(f: Sum) -> Tensor:
    """Σ_ij F_i F_jᵀ, where F_j F_iᵀ is the transpose of F_i F_jᵀ."""
    own = [part.gram(part).to(f.dtype) for part in f.factors]
    total = own[0]
    for i, part in enumerate(f.factors[1:], 1):
        total = total + own[i]
        for other in f.factors[:i]:
            cross = part.gram(other)
            total = total + cross + cross.mT
    if len(own) > 1:
        sizes = torch.stack([x.detach().diagonal().clamp_min(0).sqrt() for x in own]).sum(0)
        lost = cancels(total.diagonal(), sizes.square()) & ~sizes.isnan()
        if bool(lost.any()):  # parts that cancel: add them up first
            return general_gram(f, f)
    return total
