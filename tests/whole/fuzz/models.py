"""From an integer to a small random model: parameters, data and a function to one loss per example.

A model is a list of steps. Each step has its own random numbers, drawn from the seed and its number,
so that a step can be left out without changing the others: that is how failures are made small.
"""  # noqa: E501

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LARGEST = 700  # elements of one activation


class Unfit(Exception):
    """A step does not apply to the tensor it was given; it is left out."""


@dataclass(frozen=True)
class Act:
    """An activation and the dimension that holds the examples."""

    x: Tensor
    b: int

    @property
    def rank(self) -> int:
        return self.x.dim()

    @property
    def others(self) -> list[int]:
        return [d for d in range(self.rank) if d != self.b]


class Scaled(torch.autograd.Function):
    """An elementwise op of the user's, with a parameter."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x * w.tanh()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w.tanh(), (g * x * (1 - w.tanh() ** 2)).sum_to_size(w.shape)


class Turned(torch.autograd.Function):
    """The user's own reordering along one dimension."""

    @staticmethod
    def forward(ctx, x, order, dim):
        ctx.order, ctx.dim = order, dim
        return x.index_select(dim, order)

    @staticmethod
    def backward(ctx, g):
        back = torch.empty_like(ctx.order)
        back[ctx.order] = torch.arange(len(back))
        return g.index_select(ctx.dim, back), None, None


class Model:
    """`forward(data)` gives the losses; parameters come into being in its first run."""

    def __init__(self, seed: int, skip: frozenset[int] = frozenset()) -> None:
        self.seed, self.skip = seed, skip
        rng = random.Random(seed)
        self.batch = rng.choice([1, 2, 2, 3, 3, 3, 4, 5])
        self.mixing = rng.random() < 0.12
        self.count = rng.randint(1, 9)
        self.input_grad = rng.random() < 0.2
        self.frozen = rng.choice([0, 0, 0.3])
        sizes = [self.batch, self.batch, rng.randint(1, 4), rng.randint(2, 4)]
        self.sizes = sizes
        self.shape = [rng.choice(sizes) for _ in range(rng.choice([1, 1, 2, 2, 2, 3]))]
        self.params: dict[str, Tensor] = {}
        self.hidden: dict[str, Tensor] = {}
        self.log: list[str] = []
        self.position = (0, 0)
        self.again = False  # a checkpoint runs a step for the second time
        self.hooks = True
        self.nudges: dict[str, Tensor] = {}  # what is added to tensors that are asked for
        self.steps, self.weights = _steps(seed)

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Without the user's hooks, with which a gradient is not that of any function."""
        self.hooks = False
        try:
            yield
        finally:
            self.hooks = True

    def data(self, version: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 7 + version)
        x = torch.randn(self.batch, *self.shape, generator=generator, dtype=torch.float64)
        ids = torch.randint(0, 4, (self.batch, 3), generator=generator)
        return {"x": x.requires_grad_(self.input_grad), "ids": ids}

    def changed(self, data: dict[str, Tensor], example: int) -> dict[str, Tensor]:
        """The data with one example's replaced."""
        other = self.data(77)
        mine = torch.arange(self.batch) == example
        return {k: torch.where(mine.reshape(-1, *[1] * (v.dim() - 1)), other[k], v).detach()
                for k, v in data.items()}  # fmt: skip

    # --- what steps draw from ------------------------------------------------------------------

    def size(self) -> int:
        return self.rng.choice(self.sizes)

    def const(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def ids(self, high: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randint(0, high, shape, generator=generator)

    def order(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randperm(n, generator=generator)

    def raw(self, *shape: int) -> Tensor:
        """A parameter, new or used before."""
        rng = self.rng
        numel = torch.Size(shape).numel()
        values = self.const(*shape) * 0.7
        if rng.random() < 0.3:
            alike = [p for p in self._old() if p.numel() == numel]
            if alike:
                p = rng.choice(alike)
                self.log.append("(used again)")
                if p.dim() == 2 and tuple(p.shape[::-1]) == shape and rng.random() < 0.7:
                    return p.t()
                return p.view(shape) if rng.random() < 0.5 else p.reshape(shape)
        step, n = self.position
        self.position = (step, n + 1)
        name = f"p{step}_{n}"
        if rng.random() < self.frozen:
            if rng.random() < 0.5:
                return values
            return self.hidden.setdefault(name, values.requires_grad_())
        return self.params.setdefault(name, values.requires_grad_())

    def _old(self) -> list[Tensor]:
        """Parameters of earlier steps, the same in every run."""
        step = self.position[0]
        return [p for name, p in self.params.items()
                if int(name[1:].split("_")[0]) < step and p.is_leaf]  # fmt: skip

    def param(self, *shape: int) -> Tensor:
        """A tensor computed from parameters alone."""
        rng = self.rng
        if rng.random() < 0.6:
            return self.raw(*shape)
        kind = rng.choice(CHAINS)
        self.log.append(f"[{kind.__name__.strip('_')}]")
        made = kind(self, shape)
        if rng.random() < 0.04 and made.grad_fn is not None and not self.again:
            self.log.append("(requested)")
            name = f"p{self.position[0]}_m{self.position[1]}"
            made = made + self.nudges[name] if name in self.nudges else made
            self.params[name] = made
        return made

    # --- running -------------------------------------------------------------------------------

    def forward(self, data: dict[str, Tensor]) -> Tensor:
        self.log = []
        pool = [Act(data["x"], 0)]
        for i in range(self.count):
            self.rng = random.Random(self.seed * 1000 + i)
            step = self.rng.choices(self.steps, self.weights)[0]
            if i in self.skip:
                continue
            self.position = (i, 0)
            mark = len(self.log)
            self.log.append(f"{i}: {step.__name__}")
            source = pool[-1] if self.rng.random() < 0.75 else self.rng.choice(pool)
            known = set(self.params)
            wrap = self.rng.random() < 0.08
            try:
                act = (self._checkpointed if wrap else step)(
                    *((step, i, source, list(pool), data) if wrap else (self, source, pool, data))
                )
                if (
                    act.x.numel() > LARGEST
                    or act.x.numel() == 0
                    or act.x.shape[act.b] != self.batch
                ):
                    raise Unfit
            except (Unfit, RuntimeError, IndexError):  # torch refuses some shapes
                for name in set(self.params) - known:
                    del self.params[name]
                del self.log[mark:]
                continue
            self.log.append(f"{tuple(source.x.shape)}b{source.b} -> {tuple(act.x.shape)}b{act.b};")
            pool.append(act)
        self.rng = random.Random(self.seed * 1000 + 999)
        self.position = (999, 0)
        return self._losses(pool, data)

    def _checkpointed(self, step: Callable, i: int, a: Act, pool: list[Act], data: dict) -> Act:
        """A step inside a checkpoint: its random numbers are the same when it is run again."""
        self.log.append("(checkpoint)")
        places: list[int] = []

        def block(x: Tensor) -> Tensor:
            before = self.rng, self.position, self.log
            self.rng, self.position = random.Random(self.seed * 1000 + i + 500), (i, 0)
            if places:
                self.log, self.again = [], True
            try:
                act = step(self, Act(x, a.b), pool, data)
            finally:
                self.rng, self.position, self.log = before
                self.again = False
            places.append(act.b)
            return act.x

        y = checkpoint(block, a.x, use_reentrant=False)
        return Act(y, places[0])

    def _losses(self, pool: list[Act], data: dict[str, Tensor]) -> Tensor:
        rng = self.rng
        heads = [pool[-1]]
        if len(pool) > 2 and rng.random() < 0.4:
            heads.append(rng.choice(pool))
        total = None
        for head in heads:
            loss = self._reduce(head)
            total = loss if total is None else total + rng.choice([1.0, -0.5]) * loss
        assert total is not None
        if rng.random() < 0.15:
            self.log.append("losses permuted")
            total = total[self.order(self.batch)]
        elif rng.random() < 0.08:
            self.log.append("losses rolled")
            total = total.flip(0).roll(1)
        elif rng.random() < 0.05:
            self.log.append("some of the losses")
            total = total[self.order(self.batch)[: rng.randint(1, self.batch)]]
        elif rng.random() < 0.05:
            self.log.append("losses one by one")
            total = torch.stack([part * 2 for part in total.unbind(0)])
        elif rng.random() < 0.05:
            self.log.append("losses assigned")
            out = torch.zeros(self.batch, dtype=torch.float64)
            for i in range(self.batch):
                out[i] = total[i]
            total = out
        elif rng.random() < 0.02:
            self.log.append("losses twice")
            total = torch.cat([total, total.sin()])
        return total

    def _reduce(self, head: Act) -> Tensor:
        rng = self.rng
        x = head.x.movedim(head.b, 0) if rng.random() < 0.5 else head.x.transpose(head.b, 0)
        if x.dim() == 1:
            return x * x if rng.random() < 0.5 else x.sin()
        kind = rng.choice(["square", "sum", "lse", "norm", "ce", "softplus", "flat_mean", "vec",
                           "bce", "einsum", "mse"])  # fmt: skip
        self.log.append(f"loss {kind}")
        rest = list(range(1, x.dim()))
        if kind == "square":
            return x.square().sum(rest)
        if kind == "sum":
            return x.sin().sum(rest)
        if kind == "lse":
            return x.logsumexp(rest)
        if kind == "norm":
            return torch.linalg.vector_norm(x + 0.1, dim=rest)
        if kind == "ce":
            logits = x.reshape(self.batch, -1)
            target = self.ids(logits.shape[1], self.batch)
            return F.cross_entropy(logits, target, reduction="none")
        if kind == "softplus":
            return F.softplus(x).mean(rest)
        if kind == "flat_mean":
            return x.cos().flatten(1).mean(-1)
        if kind == "vec":
            flat = x.reshape(self.batch, -1)
            return flat.tanh() @ self.param(flat.shape[1])
        if kind == "bce":
            return F.binary_cross_entropy_with_logits(
                x, torch.ones_like(x) * 0.3, reduction="none").sum(rest)  # fmt: skip
        if kind == "einsum":
            flat = x.reshape(self.batch, -1)
            return torch.einsum("bi,bi->b", flat, flat.cos())
        if x.dim() == 3:  # the cross entropy of transposed logits
            target = self.ids(x.shape[2], self.batch, x.shape[1])
            return F.cross_entropy(x.transpose(1, 2), target, reduction="none").mean(1)
        return F.mse_loss(x, self.const(*x.shape), reduction="none").flatten(1).sum(1)


# --- chains of parameters alone ------------------------------------------------------------------


def _transposed(m: Model, shape: tuple) -> Tensor:
    return m.raw(*shape[::-1]).permute(*reversed(range(len(shape)))) if shape else m.raw()


def _viewed(m: Model, shape: tuple) -> Tensor:
    return m.raw(torch.Size(shape).numel()).view(shape)


def _exp(m: Model, shape: tuple) -> Tensor:
    return m.rng.choice([torch.exp, torch.sigmoid, torch.tanh])(m.raw(*shape))


def _weight_norm(m: Model, shape: tuple) -> Tensor:
    if len(shape) < 2:
        return 1 + m.raw(*shape)
    v, g = m.raw(*shape), m.raw(shape[0], *[1] * (len(shape) - 1))
    if m.rng.random() < 0.5:
        return torch._weight_norm(v, g, 0)
    return v * (g / torch.linalg.vector_norm(v, dim=list(range(1, len(shape))), keepdim=True))


def _joined(m: Model, shape: tuple) -> Tensor:
    if not shape or shape[0] < 2:
        return m.raw(*shape) + m.raw(*shape)
    n = m.rng.randint(1, shape[0] - 1)
    second = m.raw(shape[0] - n, *shape[1:])
    if m.rng.random() < 0.3:
        second = torch.zeros(shape[0] - n, *shape[1:], dtype=torch.float64)
    return torch.cat([m.raw(n, *shape[1:]), second], 0)


def _masked(m: Model, shape: tuple) -> Tensor:
    return m.raw(*shape) * (m.const(*shape) > 0)


def _low_rank(m: Model, shape: tuple) -> Tensor:
    if len(shape) != 2:
        return m.raw(*shape) * 0.5
    return m.raw(shape[0], 2) @ m.raw(2, shape[1]) + m.raw(*shape)


def _repeated(m: Model, shape: tuple) -> Tensor:
    if not shape:
        return m.raw(3).sum()
    return m.raw(1, *shape[1:]).repeat(shape[0], *[1] * (len(shape) - 1))


def _shifted(m: Model, shape: tuple) -> Tensor:
    return 1 + m.raw(*shape)


def _sliced(m: Model, shape: tuple) -> Tensor:
    if not shape:
        return m.raw(4)[2]
    dim = m.rng.randrange(len(shape))
    wide = list(shape)
    wide[dim] += 2
    packed = m.raw(*wide)
    return m.rng.choice([lambda: packed.narrow(dim, 1, shape[dim]),
                         lambda: packed.split([shape[dim], 2], dim)[0],
                         lambda: packed.split([2, shape[dim]], dim)[1]])()  # fmt: skip


def _selected(m: Model, shape: tuple) -> Tensor:
    dim = m.rng.randrange(len(shape) + 1)
    wide = [*shape[:dim], 3, *shape[dim:]]
    packed = m.raw(*wide)
    return packed.select(dim, -1) if m.rng.random() < 0.5 else packed.unbind(dim)[1]


def _expanded(m: Model, shape: tuple) -> Tensor:
    dims = [s if m.rng.random() < 0.6 else 1 for s in shape]
    return m.raw(*dims).expand(shape)


def _looked_up(m: Model, shape: tuple) -> Tensor:
    if not shape:
        return m.raw()
    return m.raw(3, *shape[1:])[m.ids(3, shape[0])]


def _normed(m: Model, shape: tuple) -> Tensor:
    if not shape:
        return m.raw()
    p = m.raw(*shape)
    return m.rng.choice([lambda: p - p.mean(0), lambda: p.softmax(-1), lambda: p.cumsum(0),
                         lambda: p.flip(0), lambda: p.roll(1, 0), lambda: p.clone(),
                         lambda: p.sort(0).values, lambda: p.tril() if p.dim() > 1 else -p,
                         lambda: p.to(torch.float64).contiguous()])()  # fmt: skip


CHAINS = [_transposed, _viewed, _exp, _weight_norm, _joined, _masked, _low_rank, _repeated, _shifted,  # noqa: E501
          _sliced, _selected, _expanded, _looked_up, _normed]  # fmt: skip


# --- steps: (model, activation, pool, data) -> activation ----------------------------------------


def _need(condition: bool) -> None:
    if not condition:
        raise Unfit


def _features_last(m: Model, a: Act) -> Act:
    """The same, with the examples anywhere but last."""
    _need(a.rank >= 2)
    if a.b == a.rank - 1:
        d = m.rng.randrange(a.rank - 1)
        return Act(a.x.transpose(d, a.b), d)
    return a


def linear(m, a, pool, data):
    a = _features_last(m, a)
    bias = m.rng.random() < 0.5
    n, k = m.size(), a.x.shape[-1]
    return Act(F.linear(a.x, m.param(n, k), m.param(n) if bias else None), a.b)


def matmul(m, a, pool, data):
    a = _features_last(m, a)
    n, k = m.size(), a.x.shape[-1]
    return Act(a.x @ m.param(k, n), a.b)


def weight_first(m, a, pool, data):
    """W @ x: the contracted dimension is the last but one, the examples may be last."""
    _need(a.rank >= 2)
    x, b = a.x, a.b
    if b == a.rank - 2:
        x, b = x.transpose(-1, -2), a.rank - 1
    return Act(m.param(m.size(), x.shape[-2]) @ x, b)


def einsum(m, a, pool, data):
    letters = "abcdef"[: a.rank]
    _need(a.rank >= 2)
    d = m.rng.choice(a.others)
    out = [c for i, c in enumerate(letters) if i != d] + ["z"]
    m.rng.shuffle(out)
    with_batch = m.rng.random() < 0.2  # a parameter that has its own row for every example
    w = m.param(*([m.batch] if with_batch else []), a.x.shape[d], m.size())
    spec = f"{letters},{letters[a.b] if with_batch else ''}{letters[d]}z->{''.join(out)}"
    m.log.append(spec)
    return Act(torch.einsum(spec, a.x, w), out.index(letters[a.b]))


def bmm(m, a, pool, data):
    """A batched product: over examples or over another dimension, the weight expanded or not."""
    _need(a.rank == 3)
    x, n = a.x, m.size()
    lead, kind = x.shape[0], m.rng.choice(["own", "expand", "repeat"])
    left = m.rng.random() < 0.3
    contracted = 1 if left else 2
    _need(a.b != contracted)
    matrix = (n, x.shape[1]) if left else (x.shape[2], n)
    if kind == "own":
        w = m.param(lead, *matrix)
    elif kind == "expand":
        w = m.param(*matrix).expand(lead, *matrix)
    else:
        w = m.param(1, *matrix).repeat(lead, 1, 1)
    m.log.append(f"{kind}{' left' if left else ''}")
    if m.rng.random() < 0.3:
        shape = (lead, n, x.shape[2]) if left else (lead, x.shape[1], n)
        bias = m.param(*m.rng.choice([shape, shape[1:], shape[2:], (1, shape[1], 1)]))
        one, two = (w, x) if left else (x, w)
        return Act(torch.baddbmm(bias, one, two, alpha=0.7, beta=m.rng.choice([1, 1.5])), a.b)
    return Act(torch.bmm(w, x) if left else torch.bmm(x, w), a.b)


def addmm(m, a, pool, data):
    _need(a.rank == 2)
    x = a.x
    n = m.size()
    left = a.b == 1
    shape = (n, x.shape[1]) if left else (x.shape[0], n)
    bias = m.param(*m.rng.choice([shape, shape[1:], (shape[0], 1), (1, shape[1]), ()]))
    w = m.param(n, x.shape[0]) if left else m.param(x.shape[1], n)
    one, two = (w, x) if left else (x, w)
    return Act(
        torch.addmm(bias, one, two, alpha=m.rng.choice([1, 2.5]), beta=m.rng.choice([1, 0.3])), a.b
    )


def expanded_matmul(m, a, pool, data):
    """A weight with broadcast dimensions against data with more."""
    a = _features_last(m, a)
    _need(a.rank >= 3 and a.b != a.rank - 1)
    lead = [m.rng.choice([1, s]) for s in a.x.shape[:-2]]
    if m.rng.random() < 0.3:
        lead = lead[1:]
    return Act(a.x @ m.param(*lead, a.x.shape[-1], m.size()), a.b)


def mv(m, a, pool, data):
    _need(a.rank == 2)
    x = a.x if a.b == 0 else a.x.t()
    v = m.param(x.shape[1])
    y = torch.addmv(m.param(*m.rng.choice([(), (1,), (m.batch,)])), x, v, alpha=0.5, beta=2) \
        if m.rng.random() < 0.4 else torch.mv(x, v)  # fmt: skip
    return Act(y.unsqueeze(-1) if m.rng.random() < 0.7 else y, 0)


def outer_product(m, a, pool, data):
    _need(a.rank == 2)
    x = a.x.movedim(a.b, 0)
    s = x.sum(1)
    return Act(torch.outer(s, m.param(m.size())), 0)


def merged_linear(m, a, pool, data):
    """Examples and positions in one dimension of rows, in either order."""
    _need(a.rank == 3)
    x, b = a.x, a.b
    if b == 2:
        x, b = x.movedim(2, m.rng.randrange(2)), None
    if b is None:
        b = [d for d in range(2) if x.shape[d] == m.batch and x.stride(d) == a.x.stride(a.b)][0]  # noqa: RUF015
    s = x.shape
    rows = x.reshape(s[0] * s[1], s[2])
    kind = m.rng.choice(["linear", "norm", "add", "bias", "embed", "gate"])
    m.log.append(kind)
    n = s[2]
    if kind == "linear":
        n = m.size()
        rows = F.linear(rows, m.param(n, s[2]), m.param(n))
    elif kind == "norm":
        rows = F.layer_norm(rows, (n,), m.param(n), m.param(n))
    elif kind == "add":
        rows = rows + m.param(rows.shape[0], 1)
    elif kind == "bias":
        rows = rows + m.param(n)
    elif kind == "embed":
        rows = rows + F.embedding(m.ids(3, rows.shape[0]), m.param(3, n))
    else:
        rows = rows * m.param(rows.shape[0], n).sigmoid()
    if m.rng.random() < 0.2:
        order = m.order(rows.shape[0])
        rows = rows[order] if m.rng.random() < 0.5 else rows.index_select(0, order)
        rows = (rows * m.param(1))[torch.argsort(order)]
    return Act(rows.view(s[0], s[1], n), b)


def conv(m, a, pool, data):
    x = a.x.movedim(a.b, 0)
    _need(2 <= a.rank <= 4)
    if x.dim() == 2:
        x = x.unsqueeze(m.rng.choice([1, 2]))
    one = x.dim() == 3
    rng = m.rng
    channels = x.shape[1]
    groups = rng.choice([g for g in (1, 1, 2, 3, channels) if channels % g == 0])
    out = groups * rng.randint(1, 2)
    rank = x.dim() - 2
    kernel = [rng.randint(1, min(3, s)) for s in x.shape[2:]]
    bias = m.param(out) if rng.random() < 0.6 else None
    how = {"stride": rng.choice([1, 1, 2]), "groups": groups}
    if rng.random() < 0.3:
        f = F.conv_transpose1d if one else F.conv_transpose2d
        w = m.param(channels, out // groups, *kernel)
        y = f(x, w, bias, **how)
    else:
        f = F.conv1d if one else F.conv2d
        how["padding"] = rng.choice([0, 1])
        w = m.param(out, channels // groups, *kernel)
        y = f(x, w, bias, **how)
    m.log.append(f"{f.__name__} k{kernel} {how}")
    _need(rank > 0)
    return Act(y, 0)


def odd_conv(m, a, pool, data):
    """A convolution whose first dimension is not the examples' alone."""
    _need(a.rank == 4)
    x, b = a.x, a.b
    _need(b in (0, 1))
    s = x.shape
    rows = x.reshape(s[0] * s[1], 1, s[2], s[3]) if m.rng.random() < 0.5 else \
        x.reshape(s[0] * s[1], s[2], s[3])  # fmt: skip
    if rows.dim() == 4:
        y = F.conv2d(rows, m.param(1, 1, 1, 1), m.param(1))
    else:
        y = F.conv1d(rows, m.param(s[2], s[2], 1), m.param(s[2]))
    return Act(y.reshape(s), b)


def embedding(m, a, pool, data):
    ids = data["ids"]
    n = m.size()
    if m.rng.random() < 0.3:
        ids, b = ids.t(), 1
    else:
        b = 0
    table = m.param(4, n)
    kind = m.rng.choice(["F", "pad", "index", "select", "freq", "onehot", "sparse"])
    m.log.append(kind)
    if kind == "F":
        y = F.embedding(ids, table)
    elif kind == "pad":
        y = F.embedding(ids, table, padding_idx=1)
    elif kind == "freq":
        y = F.embedding(ids, table, scale_grad_by_freq=True)
    elif kind == "sparse":
        y = F.embedding(ids, table, sparse=table.is_leaf)
    elif kind == "index":
        y = table[ids]
    elif kind == "onehot":
        y = F.one_hot(ids, 4).to(table.dtype) @ table
    else:
        y = table.index_select(0, ids.reshape(-1)).view(*ids.shape, n)
    return Act(y, b)


def tokens(m, a, pool, data):
    """One id for each example, added along the examples."""
    column = data["ids"][:, 0]
    table = m.param(4, *m.rng.choice([(), (m.size(),)]))
    y = table[column]
    z = y.reshape(m.batch, -1).sum(1)
    return Act(a.x * _beside(z, a), a.b)


def _beside(v: Tensor, a: Act) -> Tensor:
    """(B,) shaped to broadcast along the examples."""
    shape = [1] * a.rank
    shape[a.b] = -1
    return v.reshape(shape)


def bag(m, a, pool, data):
    mode = m.rng.choice(["sum", "mean"])
    return Act(F.embedding_bag(data["ids"], m.param(4, m.size()), mode=mode), 0)


def layer_norm(m, a, pool, data):
    a = _features_last(m, a)
    k = m.rng.randint(1, a.rank - 1 - a.b) if a.b < a.rank - 1 else 0
    _need(k > 0)
    shape = tuple(a.x.shape[a.rank - k :])
    bias = m.param(*shape) if m.rng.random() < 0.6 else None
    return Act(F.layer_norm(a.x, shape, m.param(*shape), bias), a.b)


def rms_norm(m, a, pool, data):
    a = _features_last(m, a)
    shape = a.x.shape[-1:]
    return Act(F.rms_norm(a.x, tuple(shape), m.param(*shape)), a.b)


def group_norm(m, a, pool, data):
    _need(a.rank >= 2)
    x = a.x.movedim(a.b, 0)
    c = x.shape[1]
    groups = m.rng.choice([g for g in (1, 2, c) if c % g == 0])
    _need(x[0].numel() // groups > 1)
    return Act(F.group_norm(x, groups, m.param(c), m.param(c)), 0)


def batch_norm(m, a, pool, data):
    """In eval mode the examples may be anywhere, in training mode they mix."""
    _need(a.rank >= 2)
    x, b = a.x, a.b
    c = x.shape[1]
    train = m.mixing and m.rng.random() < 0.5 and x.numel() // c > 1
    m.log.append("train" if train else "eval")
    return Act(F.batch_norm(x, m.const(c), m.const(c) ** 2 + 0.5, m.param(c), m.param(c),
                            training=train), b)  # fmt: skip


def channels_are_examples(m, a, pool, data):
    """A batch norm over (1, C * examples): how instance norm does it."""
    _need(a.rank >= 3)
    x = a.x.movedim(a.b, 0)
    c = x.shape[1]
    _need(x[0, 0].numel() > 1)
    if m.rng.random() < 0.6:
        return Act(F.instance_norm(x, None, None, m.param(c), m.param(c)), 0)
    flat = x.reshape(1, m.batch * c, -1)
    w = m.param(m.batch * c)
    return Act(
        F.batch_norm(flat, None, None, w, m.param(m.batch * c), training=True).reshape(x.shape), 0
    )


def along(m, a, pool, data):
    dims = list(range(a.rank)) if m.mixing and m.rng.random() < 0.4 else a.others
    _need(bool(dims))
    d = m.rng.choice(dims)
    sign = m.rng.choice([d, d - a.rank])
    x = a.x
    kind = m.rng.choice(["softmax", "log_softmax", "cumsum", "sort", "topk", "max", "mean", "sum",
                         "amax", "var", "logsumexp", "center", "cummax", "prod", "median", "glu",
                         "norm"])  # fmt: skip
    m.log.append(f"{kind} {sign}")
    if kind in ("softmax", "log_softmax", "cumsum"):
        return Act(getattr(x, kind)(sign), a.b)
    if kind in ("sort", "cummax"):
        return Act(getattr(x, kind)(sign)[0], a.b)
    if kind == "topk":
        k = x.shape[d] if d == a.b else m.rng.randint(1, x.shape[d])
        return Act(x.topk(k, sign).values, a.b)
    if kind == "center":
        return Act(x - x.mean(sign, keepdim=True), a.b)
    if kind == "norm":
        return Act(F.normalize(x + 0.1, dim=sign), a.b)
    if kind == "glu":
        _need(x.shape[d] % 2 == 0 and d != a.b)
        return Act(F.glu(x, sign), a.b)
    if kind == "var":
        y = x.var(sign, unbiased=False, keepdim=True)
    elif kind in ("max", "median"):
        y = getattr(x, kind)(sign, keepdim=True).values
    else:
        y = getattr(x, kind)(sign, keepdim=True)
    if d == a.b:
        return Act(x * y, a.b)
    if m.rng.random() < 0.5:
        return Act(x - y, a.b)
    if a.rank > 1 and m.rng.random() < 0.7:
        return Act(y.squeeze(sign), a.b - (d < a.b))
    return Act(y, a.b)


def reduce_several(m, a, pool, data):
    _need(a.rank >= 3)
    dims = m.rng.sample(a.others, 2)
    y = m.rng.choice([a.x.sum, a.x.mean, a.x.logsumexp, a.x.amax])(dims)
    return Act(y, a.b - sum(d < a.b for d in dims))


ELEMENTWISE = {
    "tanh": torch.tanh, "sin": torch.sin, "gelu": F.gelu, "relu": torch.relu, "silu": F.silu,
    "exp": lambda x: x.tanh().exp(), "square": torch.square, "abs": torch.abs,
    "sqrt": lambda x: (x.square() + 0.1).sqrt(), "clamp": lambda x: x.clamp(-0.5, 0.8),
    "double": lambda x: x * x, "leaky": F.leaky_relu, "plus": F.softplus,
    "contiguous": lambda x: x.contiguous(), "clone": lambda x: x.clone(),
    "half": lambda x: x / 2 + 1, "where": lambda x: torch.where(x > 0, x, x * 0.1),
    "nan": lambda x: x.masked_fill(x > 1, 0.5), "tril": lambda x: x.tril() if x.dim() > 1 else x,
}  # fmt: skip


def elementwise(m, a, pool, data):
    name = m.rng.choice(list(ELEMENTWISE))
    m.log.append(name)
    return Act(ELEMENTWISE[name](a.x), a.b)


def broadcast(m, a, pool, data):
    """A parameter broadcast from any side, against the examples or with a row for each."""
    x = a.x
    shape = [s if m.rng.random() < 0.5 else 1 for s in x.shape]
    while shape and (shape[0] == 1 and m.rng.random() < 0.6):
        shape = shape[1:]
    p = m.param(*shape)
    kind = m.rng.choice(["add", "radd", "mul", "rmul", "sub", "rsub", "div", "addcmul", "lerp",
                         "where", "maximum", "max", "add_alpha", "iadd", "imul", "addcdiv", "atan2",
                         "hypot", "prelu", "wider", "pow", "custom"])  # fmt: skip
    m.log.append(f"{kind} {tuple(shape)}")
    if kind == "add":
        y = x + p
    elif kind == "radd":
        y = p + x
    elif kind == "mul":
        y = x * p
    elif kind == "rmul":
        y = p * x
    elif kind == "sub":
        y = x - p
    elif kind == "rsub":
        y = p - x
    elif kind == "div":
        y = x / (p.square() + 0.5)
    elif kind == "addcmul":
        y = torch.addcmul(x, p, m.param(*shape), value=0.5)
    elif kind == "addcdiv":
        y = torch.addcdiv(p, x, p.square() + 1)
    elif kind == "lerp":
        y = torch.lerp(x, p, 0.3) if m.rng.random() < 0.5 else torch.lerp(x, x.sin(), p.sigmoid())
    elif kind == "where":
        y = torch.where(x > 0, x, p)
    elif kind == "maximum":
        y = torch.maximum(x, p)
    elif kind == "max":
        y = x.clamp(max=p + 1)
    elif kind == "add_alpha":
        y = torch.add(x, p, alpha=-2) if m.rng.random() < 0.5 else torch.sub(p, x, alpha=3)
    elif kind == "iadd":
        y = x.clone().add_(p)
    elif kind == "imul":
        y = x.clone().mul_(p)
    elif kind == "atan2":
        y = torch.atan2(x, p + 3)
    elif kind == "hypot":
        y = torch.hypot(x, p + 0.2)
    elif kind == "prelu":
        _need(a.rank >= 2)
        y = F.prelu(x, m.param(x.shape[1]))
    elif kind == "wider":  # a new dimension in front, from the parameter
        n = m.size()
        y = (x.unsqueeze(0) + m.param(n, *[1] * a.rank)).sum(0)
    elif kind == "pow":
        y = (x.square() + 0.5) ** p
    else:
        y = Scaled.apply(x, p)
    return Act(y, a.b)


def permute(m, a, pool, data):
    dims = list(range(a.rank))
    m.rng.shuffle(dims)
    return Act(a.x.permute(dims), dims.index(a.b))


def transpose(m, a, pool, data):
    _need(a.rank >= 2)
    one, two = m.rng.sample(range(a.rank), 2)
    b = {one: two, two: one}.get(a.b, a.b)
    return Act(a.x.transpose(one, two - a.rank), b)


def unsqueeze(m, a, pool, data):
    _need(a.rank < 5)
    d = m.rng.randint(0, a.rank)
    y = a.x.unsqueeze(d)
    if m.rng.random() < 0.5:
        sizes = [-1] * y.dim()
        sizes[d] = m.size()
        y = y.expand(sizes)
        if m.rng.random() < 0.5:
            y = y * m.param(*[s if i == d else 1 for i, s in enumerate(y.shape)])
    return Act(y, a.b + (d <= a.b))


def squeeze(m, a, pool, data):
    ones = [d for d in a.others if a.x.shape[d] == 1]
    _need(bool(ones))
    if m.batch > 1 and m.rng.random() < 0.3:
        return Act(a.x.squeeze(), a.b - sum(d < a.b for d in ones))
    d = m.rng.choice(ones)
    return Act(a.x.squeeze(d), a.b - (d < a.b))


def split_dim(m, a, pool, data):
    many = [d for d in a.others if a.x.shape[d] in (4, 6)]
    _need(bool(many) and a.rank < 5)
    d = m.rng.choice(many)
    return Act(a.x.unflatten(d, (2, -1)), a.b + (d < a.b))


def merge_dims(m, a, pool, data):
    pairs = [d for d in range(a.rank - 1) if a.b not in (d, d + 1)]
    _need(bool(pairs))
    d = m.rng.choice(pairs)
    return Act(a.x.flatten(d, d + 1), a.b - (d < a.b))


def rearrange(m, a, pool, data):
    """Cut, turn, join: what is done along dimensions other than the examples'."""
    dims = a.others
    _need(bool(dims))
    d = m.rng.choice(dims)
    n = a.x.shape[d]
    x = a.x
    kind = m.rng.choice(["flip", "roll", "narrow", "step", "split", "chunk", "unbind", "cat", "stack",  # noqa: E501
                         "pad", "unfold", "repeat", "select", "gather", "index_select", "index",
                         "mask", "repeat_interleave", "tile", "diagonal", "cat_param", "take",
                         "stack_param", "class_token", "circular"])  # fmt: skip
    m.log.append(f"{kind} {d}")
    less = a.b - (d < a.b)
    if kind == "flip":
        return Act(x.flip(d), a.b)
    if kind == "roll":
        return Act(x.roll(m.rng.choice([1, -1, 2]), d), a.b)
    if kind == "narrow":
        k = m.rng.randint(1, n)
        return Act(x.narrow(d, m.rng.randint(0, n - k), k), a.b)
    if kind == "step":
        return Act(x.index_select(d, torch.arange(0, n, 2)) if m.rng.random() < 0.3 else
                   x[(slice(None),) * d + (slice(None, None, 2),)], a.b)  # fmt: skip
    if kind == "split":
        parts = x.split(m.rng.randint(1, n), d)
        return Act(parts[m.rng.randrange(len(parts))], a.b)
    if kind == "chunk":
        parts = x.chunk(2, d)
        return Act(parts[0] * parts[-1].sum(d, keepdim=True), a.b)
    if kind == "unbind":
        parts = x.unbind(d)
        return Act(parts[0] + parts[-1].sin(), less)
    if kind == "cat":
        return Act(torch.cat([x, x.sin()], d), a.b)
    if kind == "stack":
        at = m.rng.randint(0, a.rank)
        _need(a.rank < 5)
        return Act(torch.stack([x, x.cos()], at), a.b + (at <= a.b))
    if kind == "pad":
        pad = [0, 0] * (a.rank - 1 - d) + [
            m.rng.choice([0, 1]),
            m.rng.choice([1, -1] if n > 1 else [1]),
        ]
        return Act(F.pad(x, pad), a.b)
    if kind == "circular":
        order = torch.arange(-1, n + 1) % n
        return Act(x.index_select(d, order), a.b)
    if kind == "unfold":
        _need(a.rank < 5)
        k = m.rng.randint(1, n)
        return Act(x.unfold(d, k, 1), a.b)
    if kind in ("repeat", "tile"):
        times = [2 if i == d else 1 for i in range(a.rank)]
        return Act(x.repeat(times), a.b)
    if kind == "repeat_interleave":
        return Act(x.repeat_interleave(2, d), a.b)
    if kind == "select":
        return Act(x.select(d, m.rng.choice([0, -1])), less)
    if kind == "gather":
        index = x.detach().argsort(d)
        return Act(x.gather(d, index.narrow(d, 0, m.rng.randint(1, n))), a.b)
    if kind == "take":
        return Act(x.take_along_dim(x.detach().argmax(d, keepdim=True), d), a.b)
    if kind == "index_select":
        return Act(x.index_select(d, m.ids(n, m.size())), a.b)
    if kind == "index":
        return Act(x[(slice(None),) * d + (m.ids(n, m.size()),)], a.b)
    if kind == "mask":
        keep = m.const(n) > -0.3
        keep[0] = True
        return Act(x[(slice(None),) * d + (keep,)], a.b)
    if kind == "diagonal":
        others = [o for o in a.others if o != d]
        _need(bool(others))
        e = m.rng.choice(others)
        return Act(x.diagonal(0, d, e), a.b - (d < a.b) - (e < a.b))
    shape = list(x.shape)
    if kind == "cat_param":
        shape[d] = m.rng.randint(1, 2)
        p = m.param(*[1 if i == a.b else s for i, s in enumerate(shape)]).expand(shape)
        return Act(torch.cat([p, x] if m.rng.random() < 0.5 else [x, p, x.sin()], d), a.b)
    if kind == "class_token":
        shape[d] = 1
        p = m.param(*shape)  # one for each example
        return Act(torch.cat([p, x], d), a.b)
    p = m.param(*shape)
    _need(a.rank < 5)
    return Act(torch.stack([x, p], 0), a.b + 1)


def shuffle_examples(m, a, pool, data):
    """Examples reordered along their dimension, some work done, and put back."""
    x, b = a.x, a.b
    order = m.order(m.batch)
    back = torch.argsort(order)
    kind = m.rng.choice(["index_select", "index", "flip", "roll", "cat", "stack", "loop", "custom",
                         "gather", "scatter", "index_add", "index_copy", "unbind", "chunks",
                         "index_put", "split_cat", "select_loop", "repeat"])  # fmt: skip
    m.log.append(kind)
    scale = m.param(
        *m.rng.choice([(), (1,) * a.rank, tuple(1 if d == b else s for d, s in enumerate(x.shape))])
    )
    if kind in ("index_select", "index"):
        pick = (slice(None),) * b
        y = x.index_select(b, order) if kind == "index_select" else x[(*pick, order)]
        return Act((y * scale).index_select(b, back), b)
    if kind == "flip":
        return Act((x.flip(b) + scale).sin().flip(b), b)
    if kind == "roll":
        return Act((x.roll(1, b) * scale).roll(-1, b), b)
    if kind == "custom":
        return Act(Turned.apply(Turned.apply(x, order, b) * scale, back, b), b)
    if kind in ("cat", "split_cat"):
        n = m.rng.randint(0, m.batch)
        one, two = x.narrow(b, 0, n), x.narrow(b, n, m.batch - n)
        if kind == "split_cat":
            one, two = x.split([n, m.batch - n], b)
        return Act(torch.cat([one * scale, two.sin()], b), b)
    if kind in ("stack", "loop", "unbind", "select_loop"):
        rows = (
            list(x.unbind(b)) if kind != "select_loop" else [x.select(b, i) for i in range(m.batch)]
        )
        if kind == "loop":
            w = m.param(*rows[0].shape)
            rows = [row * w if i % 2 else row + w for i, row in enumerate(rows)]
        elif kind == "select_loop":
            rows = [row.sin() * m.param() for row in rows]
        at = m.rng.randint(0, a.rank - 1)
        return Act(torch.stack(rows, at), at)
    if kind == "chunks":
        parts = x.chunk(2, b)
        return Act(torch.cat([p * scale for p in reversed(parts)][::-1], b), b)
    shape = [1] * a.rank
    shape[b] = -1
    index = order.reshape(shape).expand(x.shape)
    if kind == "gather":
        return Act((x.gather(b, index) * scale).gather(b, back.reshape(shape).expand(x.shape)), b)
    if kind == "scatter":
        base = m.param(*x.shape) if m.rng.random() < 0.5 else torch.zeros_like(x)
        return Act(base.scatter(b, index, x).gather(b, index) * scale, b)
    if kind == "index_add":
        y = torch.zeros_like(x).index_add(b, order, x * scale)
        return Act(y.index_select(b, order), b)
    if kind == "index_copy":
        return Act(torch.zeros_like(x).index_copy(b, order, x).index_select(b, order) * scale, b)
    if kind == "index_put":
        y = torch.zeros_like(x).movedim(b, 0).contiguous()
        y[order] = x.movedim(b, 0) * 2
        return Act((y[order] + m.param()), 0)
    y = x.repeat([2 if d == b else 1 for d in range(a.rank)])
    return Act((y * scale).unflatten(b, (2, m.batch)).sum(b), b)


def in_place(m, a, pool, data):
    y = a.x.clone()
    dims = a.others
    kind = m.rng.choice(["slice", "select", "examples", "fill", "add_slice", "mask", "relu"])
    m.log.append(kind)
    if kind == "examples":
        v = y.movedim(a.b, 0)
        v[: max(1, m.batch // 2)] *= m.param(*v.shape[1:])
        return Act(y, a.b)
    if kind == "relu":
        return Act(y.relu_(), a.b)
    if kind == "mask":
        return Act(y.masked_fill_(m.const(*y.shape) > 0.5, 0.1), a.b)
    _need(bool(dims))
    d = m.rng.choice(dims)
    if kind == "slice":
        view = y.narrow(d, 0, max(1, y.shape[d] // 2))
        view.copy_(
            m.param(*[1 if i == a.b else s for i, s in enumerate(view.shape)]).expand(view.shape)
        )
    elif kind == "select":
        view = y.select(d, 0)
        view.mul_(m.param())
    elif kind == "fill":
        y.select(d, -1).fill_(0.3)
    else:
        view = y.narrow(d, 0, 1)
        view.add_(m.param(*[1 if i == a.b else s for i, s in enumerate(view.shape)]))
    return Act(y * 1.5, a.b)


def attention(m, a, pool, data):
    _need(a.rank == 3)
    x = a.x.movedim(a.b, 0)
    e = x.shape[2]
    odd = m.rng.random() < 0.3
    heads = 1
    if m.rng.random() < 0.4:
        qkv = F.linear(x, m.param(3 * e, e), m.param(3 * e))
        q, k, v = qkv.chunk(3, -1)
    else:
        q, k, v = (x @ m.param(e, e) for _ in range(3))
    if odd:  # the examples in the dimension of the heads
        q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    elif m.rng.random() < 0.5:
        heads = 2 if e % 2 == 0 else 1
        q, k, v = (t.reshape(m.batch, -1, heads, e // heads).transpose(1, 2) for t in (q, k, v))
    kind = m.rng.choice(["hand", "sdpa", "sdpa", "bias"])
    m.log.append(f"{kind}{' odd' if odd else ''}")
    if kind == "hand":
        y = (q @ k.mT / e**0.5).softmax(-1) @ v
    elif kind == "sdpa":
        y = F.scaled_dot_product_attention(q, k, v, is_causal=m.rng.random() < 0.3)
    else:
        t = q.shape[-2]
        bias = m.param(
            *m.rng.choice(
                [
                    (t, t),
                    (1,) * (q.dim() - 2) + (t, t),
                    (q.shape[0],) + (1,) * (q.dim() - 3) + (t, t),
                ]
            )
        )
        y = F.scaled_dot_product_attention(q, k, v, bias)
    if odd:
        y = y.squeeze(0)
    elif y.dim() == 4:
        y = y.transpose(1, 2).reshape(x.shape)
    return Act(y, 0)


def two_branches(m, a, pool, data):
    other = m.rng.choice(pool)
    if other.x.shape == a.x.shape and other.b == a.b:
        return Act(m.rng.choice([torch.add, torch.mul, torch.sub])(a.x, other.x.sin()), a.b)
    per_example = other.x.movedim(other.b, 0).flatten(1).mean(1) if other.rank > 1 else other.x
    return Act(
        a.x * _beside(per_example, a) if m.rng.random() < 0.5 else a.x + _beside(per_example, a),
        a.b,
    )


def data_products(m, a, pool, data):
    """Examples' own matrices multiplied with each other."""
    _need(a.rank == 3 and a.b == 0)
    x = a.x
    kind = m.rng.choice(["gram", "bmm", "cdist", "cos"])
    m.log.append(kind)
    if kind == "gram":
        return Act(x @ x.mT, 0)
    if kind == "bmm":
        return Act(torch.bmm(x.mT, x.sin()), 0)
    if kind == "cdist":
        return Act(torch.cdist(x, x.sin() + 2), 0)
    return Act(F.cosine_similarity(x.unsqueeze(1), x.sin().unsqueeze(2) + 0.1, dim=-1), 0)


def checkpointed(m, a, pool, data):
    a = _features_last(m, a)
    n = a.x.shape[-1]
    w, c = m.param(n, n), m.param(n)

    def block(x: Tensor) -> Tensor:
        return torch.tanh(x @ w) * c + x

    return Act(checkpoint(block, a.x, use_reentrant=False), a.b)


def pooling(m, a, pool, data):
    _need(a.rank >= 3)
    x = a.x.movedim(a.b, 0)
    if x.dim() == 3:
        return Act(m.rng.choice([lambda: F.avg_pool1d(x, 1), lambda: F.max_pool1d(x, x.shape[-1]),
                                 lambda: F.adaptive_avg_pool1d(x, 2),
                                 lambda: F.interpolate(x, scale_factor=2)])(), 0)  # fmt: skip
    _need(x.dim() == 4)
    return Act(m.rng.choice([lambda: F.adaptive_max_pool2d(x, 1), lambda: F.avg_pool2d(x, 1),
                             lambda: F.interpolate(x, scale_factor=2),
                             lambda: F.unfold(x, 1)])(), 0)  # fmt: skip


def unbatched_pooling(m, a, pool, data):
    """The examples taken for channels."""
    _need(a.rank in (2, 3))
    x = a.x.movedim(a.b, 0)
    if a.rank == 2:
        return Act(F.adaptive_avg_pool1d(x, 2) * m.param(m.batch, 1), 0)
    return Act(F.adaptive_avg_pool2d(x, 2) + m.param(2), 0)


def depthwise_over_examples(m, a, pool, data):
    """A grouped convolution whose groups are the examples."""
    _need(a.rank == 2)
    x = a.x.movedim(a.b, 0).unsqueeze(0)
    w = m.param(1, 1, 1).expand(m.batch, 1, 1) if m.rng.random() < 0.5 else m.param(m.batch, 1, 1)
    return Act(F.conv1d(x, w, groups=m.batch).squeeze(0), 0)


def mix(m, a, pool, data):
    _need(m.mixing)
    x = a.x
    kind = m.rng.choice(["center", "softmax", "product", "cumsum", "sort", "matrix", "max"])
    m.log.append(kind)
    if kind == "center":
        return Act(x - x.mean(a.b, keepdim=True), a.b)
    if kind == "softmax":
        return Act(x.softmax(a.b), a.b)
    if kind == "cumsum":
        return Act(x.cumsum(a.b), a.b)
    if kind == "sort":
        return Act(x.sort(a.b).values, a.b)
    if kind == "max":
        return Act(x / (x.amax(a.b, keepdim=True).abs() + 1), a.b)
    flat = x.movedim(a.b, 0).reshape(m.batch, -1)
    if kind == "product":
        return Act(flat @ flat.t(), 0)
    return Act(m.param(m.batch, m.batch) @ flat, 0)


def parameter_only(m, a, pool, data):
    """A branch that no data enters, shaped like a batch."""
    shape = list(a.x.shape)
    p = m.param(*shape)
    p = m.rng.choice([lambda: p.softmax(a.b), lambda: p - p.mean(), lambda: p, lambda: p.cumsum(a.b),  # noqa: E501
                      lambda: p @ m.param(shape[-1], shape[-1]) if a.rank > 1 else p])()  # fmt: skip  # noqa: E501
    return Act(a.x + p, a.b)


def regularised(m, a, pool, data):
    """The same function of the parameters in every example."""
    old = m._old()
    _need(bool(old))
    p = m.rng.choice(old)
    return Act(a.x + m.rng.choice([p.square().sum, p.norm, p.sin().mean])(), a.b)


def spectral(m, a, pool, data):
    _need(bool(a.others))
    d = m.rng.choice(a.others)
    n = a.x.shape[d]
    f = torch.fft.rfft(a.x, dim=d)
    shape = [1] * a.rank
    shape[d] = f.shape[d]
    p = m.param(*shape, 2) if m.rng.random() < 0.5 else m.param(*shape)
    f = f * (torch.view_as_complex(p.contiguous()) if p.dim() > a.rank else p)
    return Act(torch.fft.irfft(f, n=n, dim=d) if m.rng.random() < 0.6 else f.abs() + f.real, a.b)


def recurrent(m, a, pool, data):
    a = _features_last(m, a)
    _need(a.rank == 3)
    x, n = a.x.movedim(a.b, 0), m.rng.randint(1, 3)
    k = x.shape[2]
    weights = [m.param(3 * n, k), m.param(3 * n, n), m.param(3 * n), m.param(3 * n)]
    start = m.param(1, 1, n).expand(1, m.batch, n).contiguous()
    if m.rng.random() < 0.5:
        h = start[0]
        for t in range(x.shape[1]):
            h = torch.gru_cell(x[:, t], h, *weights)
        return Act(h, 0)
    y = torch._VF.gru(x, start, weights, True, 1, 0.0, False, False, True)[0]
    return Act(y, 0)


def multi_head(m, a, pool, data):
    """torch's own, sequence-major."""
    _need(a.rank == 3)
    b = 1
    x = a.x.transpose(a.b, 1)
    e = x.shape[2]
    y, _ = F.multi_head_attention_forward(
        x, x, x, e, 1, m.param(3 * e, e), m.param(3 * e),
        m.param(1, 1, e) if (more := m.rng.random() < 0.3) else None,
        m.param(1, 1, e) if more else None, m.rng.random() < 0.2, 0.0, m.param(e, e), m.param(e),
        need_weights=m.rng.random() < 0.5)  # fmt: skip
    return Act(y, b)


def mapped(m, a, pool, data):
    """torch.vmap over the examples or over positions."""
    _need(a.rank >= 2)
    d = m.rng.randrange(a.rank)
    rest = [s for i, s in enumerate(a.x.shape) if i != d]
    w = m.param(rest[-1])
    f = m.rng.choice([lambda r: r * w, lambda r: (r * w).softmax(-1) + r, lambda r: r + w.sin()])
    if a.b == d or a.b != a.rank - 1:
        return Act(torch.vmap(f, d, d)(a.x), a.b)
    raise Unfit


def packed(m, a, pool, data):
    """Ragged rows in one tensor, and back."""
    _need(a.rank == 3)
    x = a.x.movedim(a.b, 0) if m.rng.random() < 0.7 or a.b == 2 else a.x
    b = a.b if x is a.x else 0
    keep = m.const(*x.shape[:2]) > -0.4
    keep[0, 0] = True
    rows = x[keep]
    n = m.size()
    rows = F.linear(rows, m.param(n, x.shape[2]), m.param(n))
    if m.rng.random() < 0.3:
        order = m.order(len(rows))
        rows = (rows[order].tanh() * m.param(n))[torch.argsort(order)]
    kind = m.rng.choice(["put", "scatter", "index_add", "inplace"])
    m.log.append(kind)
    if kind == "put":
        y = torch.zeros(*x.shape[:2], n, dtype=x.dtype)
        y[keep] = rows
        return Act(y, b)
    if kind == "scatter":
        mask = keep.unsqueeze(-1).expand(*x.shape[:2], n)
        return Act(torch.zeros(*x.shape[:2], n, dtype=x.dtype).masked_scatter(mask, rows), b)
    if kind == "inplace":
        base = m.param(n).expand(*x.shape[:2], n).clone()
        base[keep] += rows
        return Act(base, b)
    place = keep.nonzero()[:, b]
    return Act(torch.zeros(m.batch, n, dtype=x.dtype).index_add(0, place, rows), 0)


def experts(m, a, pool, data):
    """Each row to the expert that the data chooses."""
    _need(a.rank >= 2)
    x = a.x.movedim(a.b, 0)
    rows = x.reshape(-1, x.shape[-1])
    n = x.shape[-1]
    choice = (rows.detach() @ m.const(n, 2)).argmax(-1)
    y = torch.zeros_like(rows)
    for e in range(2):
        mine = (choice == e).nonzero()[:, 0]
        w = m.param(n, n)
        if len(mine) == 0:
            continue
        y = y.index_add(0, mine, rows[mine] @ w)
    if m.rng.random() < 0.3:  # a weight gathered for every row
        tables = m.param(2, n, n)
        y = y + torch.bmm(rows.unsqueeze(1), tables[choice]).squeeze(1)
    return Act(y.reshape(x.shape), 0)


def bilinear(m, a, pool, data):
    a = _features_last(m, a)
    n, k = m.size(), a.x.shape[-1]
    return Act(
        F.bilinear(a.x, a.x.sin(), m.param(n, k, k), m.param(n) if m.rng.random() < 0.5 else None),
        a.b,
    )


def tiled(m, a, pool, data):
    """A parameter copied to every row of a batch, in front of or behind other dimensions."""
    _need(a.rank == 3)
    x = a.x.movedim(a.b, 0) if m.rng.random() < 0.5 else a.x.movedim(a.b, 1)
    b = 0 if x.shape[0] == m.batch and x.stride(0) == a.x.stride(a.b) else 1
    s = x.shape
    inner = s[1 - b]
    rows = x.reshape(s[0] * s[1], s[2])
    p = m.param(inner, s[2])
    kind = m.rng.choice(["repeat", "interleave", "expand", "index", "tile", "gather"])
    m.log.append(f"{kind} {b}")
    if b == 0:  # rows are (example, position)
        wide = {
            "repeat": lambda: p.repeat(m.batch, 1),
            "tile": lambda: p.tile(m.batch, 1),
            "expand": lambda: p.expand(m.batch, inner, s[2]).reshape(-1, s[2]),
            "index": lambda: p[torch.arange(inner).repeat(m.batch)],
            "gather": lambda: p.gather(
                0, torch.arange(inner).repeat(m.batch)[:, None].expand(-1, s[2])
            ),
            "interleave": lambda: p.unsqueeze(0).repeat_interleave(m.batch, 0).flatten(0, 1),
        }
    else:
        wide = {
            "repeat": lambda: p.repeat_interleave(m.batch, 0),
            "tile": lambda: p.unsqueeze(1).tile(1, m.batch, 1).flatten(0, 1),
            "expand": lambda: p[:, None].expand(inner, m.batch, s[2]).reshape(-1, s[2]),
            "index": lambda: p[torch.arange(inner).repeat_interleave(m.batch)],
            "gather": lambda: p.index_select(0, torch.arange(inner).repeat_interleave(m.batch)),
            "interleave": lambda: p.repeat_interleave(m.batch, 0),
        }
    rows = rows * wide[kind]() if m.rng.random() < 0.5 else rows + wide[kind]()
    return Act(rows.reshape(s), b)


def own_weights(m, a, pool, data):
    """Every example, or every position, has weights made from data and parameters."""
    a = _features_last(m, a)
    _need(a.rank == 3)
    x = a.x.movedim(a.b, 0)
    n, k = m.rng.randint(1, 3), x.shape[2]
    made = (x.mean(1) @ m.param(k, k * n)).reshape(m.batch, k, n)
    if m.rng.random() < 0.5:
        return Act(torch.bmm(x, made), 0)
    y = F.conv1d(x.transpose(1, 2).reshape(1, m.batch * k, -1), made.transpose(1, 2).reshape(m.batch * n, k, 1),  # noqa: E501
                 groups=m.batch)  # fmt: skip
    return Act(y.reshape(m.batch, n, -1), 0)


def stopped(m, a, pool, data):
    return Act(a.x * a.x.detach().cos() + a.x.detach(), a.b)


def hooked(m, a, pool, data):
    """A tensor hook of the user's that scales the gradient."""
    y = a.x.sin()
    if m.hooks and y.requires_grad:
        y.register_hook(lambda g: -2 * g)
    return Act(y, a.b)


TABLE = {
    spectral: 2, recurrent: 2, multi_head: 2, mapped: 2, packed: 3, experts: 2, bilinear: 1,
    tiled: 4, own_weights: 2, stopped: 1, hooked: 1,
    linear: 4, matmul: 3, weight_first: 3, einsum: 3, bmm: 4, addmm: 3, expanded_matmul: 3, mv: 1,
    outer_product: 1, merged_linear: 4, conv: 4, odd_conv: 2, embedding: 3, tokens: 1, bag: 1,
    layer_norm: 3, rms_norm: 1, group_norm: 2, batch_norm: 3, channels_are_examples: 2, along: 5,
    reduce_several: 1, elementwise: 3, broadcast: 8, permute: 4, transpose: 3, unsqueeze: 4,
    squeeze: 2, split_dim: 1, merge_dims: 2, rearrange: 8, shuffle_examples: 6, in_place: 3,
    attention: 4, two_branches: 3, data_products: 2, checkpointed: 1, pooling: 1,
    unbatched_pooling: 1, depthwise_over_examples: 1, mix: 3, parameter_only: 2, regularised: 1,
}  # fmt: skip
STEPS: list[Callable] = list(TABLE)
WEIGHTS = list(TABLE.values())


def _steps(seed: int) -> tuple[list[Callable], list[int]]:
    """What a model of this seed draws its steps from."""
    from tests.whole.fuzz import more  # it builds on what stands here

    if seed < more.FIRST:
        return STEPS, WEIGHTS
    return [*STEPS, *more.TABLE], [*WEIGHTS, *(5 * weight for weight in more.TABLE.values())]
