"""Further steps of random models: hooks of all kinds, sparse data, packed sequences, loops over
examples, gradients inside the loss. Models of seeds from FIRST on draw from these as well, so that
what older seeds build stays as it is.
"""

import torch
import torch.nn.functional as F
from tests.whole.fuzz.models import Act, Unfit
from torch import Tensor, nn

FIRST = 1_000_000


def _need(condition: bool) -> None:
    if not condition:
        raise Unfit


# --- hooks: what they return for a gradient of zeros is zeros, as a loop's other examples need ----


def _changing(m, shape: tuple[int, ...]):
    """A function of one gradient: a factor, a mask, a threshold, a look at all of it."""
    kind = m.rng.choice(["factor", "mask", "clamp", "sign", "norm", "row", "in part"])
    m.log.append(kind)
    mask = (m.const(*shape) > 0).double() if kind in ("mask", "in part") else None
    return {
        "factor": lambda g: -2 * g,
        "mask": lambda g: g * mask,
        "clamp": lambda g: g.clamp(-0.05, 0.05),
        "sign": lambda g: g.sign() * 0.1,
        "norm": lambda g: g * (0.5 / (g.norm() + 1)),
        "row": lambda g: g / (1 + g.norm(dim=-1, keepdim=True)) if g.dim() else g,
        "in part": lambda g: torch.where(mask > 0, g, 0.5 * g),
    }[kind]


def hooked_tensor(m, a, pool, data):
    y = a.x.sin()
    change = _changing(m, tuple(y.shape))
    if m.hooks and y.requires_grad:
        y.register_hook(change)
    return Act(y, a.b)


def hooked_before(m, a, pool, data):
    y = a.x * m.param(a.x.shape[-1]) if m.rng.random() < 0.7 else a.x.tanh()
    change = _changing(m, tuple(y.shape))
    if m.hooks and y.requires_grad:
        y.grad_fn.register_prehook(lambda gs: tuple(None if g is None else change(g) for g in gs))
    return Act(y, a.b)


def hooked_after(m, a, pool, data):
    y = F.linear(a.x, m.param(m.size(), a.x.shape[-1])) if a.b != a.rank - 1 else a.x.tanh()
    factor = m.rng.choice([-2.0, 0.5])
    if m.hooks and y.requires_grad:
        y.grad_fn.register_hook(lambda gi, go: tuple(None if g is None else factor * g for g in gi))
    return Act(y, a.b)


def hooked_weight(m, a, pool, data):
    """On a rearranged, cut or computed weight."""
    _need(a.rank >= 2 and a.b != a.rank - 1)
    n, k = m.size(), a.x.shape[-1]
    v = m.raw(n, k)
    kind = m.rng.choice(["t", "view", "tanh", "cut"])
    v = {"t": v.t, "view": lambda: v.reshape(-1), "tanh": v.tanh, "cut": lambda: v[:, :k]}[kind]()
    change = _changing(m, tuple(v.shape))
    if m.hooks and v.requires_grad:
        v.register_hook(change)
    w = v.t() if kind == "t" else v.reshape(n, k)
    return Act(F.linear(a.x, w), a.b)


def hooked_leaf(m, a, pool, data):
    _need(a.rank >= 2 and a.b != a.rank - 1)
    w = m.raw(m.size(), a.x.shape[-1])
    known = m.__dict__.setdefault("leaves_with_hooks", {})
    if w.requires_grad and w.is_leaf and id(w) not in known:
        change = _changing(m, tuple(w.shape))
        known[id(w)] = w.register_hook(lambda g: change(g) if m.hooks else None)
    return Act(F.linear(a.x, w), a.b)


def hooked_module(m, a, pool, data):
    module = nn.Tanh()
    change = _changing(m, tuple(a.x.shape))
    if m.hooks:
        if m.rng.random() < 0.5:
            module.register_full_backward_hook(lambda _, gi, go: (change(gi[0]),))
        else:
            module.register_full_backward_pre_hook(lambda _, go: (change(go[0]),))
    return Act(module(a.x), a.b)


def watched(m, a, pool, data):
    """Hooks that look on."""
    y = a.x.cos()
    seen: list[Tensor] = []

    def look(g: Tensor) -> None:
        seen.append(g)

    if m.hooks and y.requires_grad:
        y.register_hook(look)
        other = pool[m.rng.randrange(len(pool))].x
        if other.requires_grad:
            torch.autograd.graph.register_multi_grad_hook([y, other], lambda gs: None)
    return Act(y, a.b)


# --- data ---------------------------------------------------------------------------------------


def sparse_rows(m, a, pool, data):
    """Sparse data into a product: constants, or the activation itself made sparse."""
    if m.rng.random() < 0.5:
        counts = m.const(m.batch, m.size()).relu()
        matrix = counts.to_sparse() if m.rng.random() < 0.5 else counts.to_sparse_csr()
        return Act(matrix @ m.param(counts.shape[1], m.size()), 0)
    _need(a.rank == 2 and a.b == 0)
    return Act(torch.sparse.mm(a.x.to_sparse(), m.param(a.x.shape[1], m.size())), 0)


def sparse_mixture(m, a, pool, data):
    """A constant sparse matrix over a dimension that is not the examples'."""
    _need(a.rank == 2)
    x = a.x if a.b == 1 else a.x.t()
    matrix = m.const(m.size(), x.shape[0]).relu().to_sparse()
    return Act(torch.sparse.mm(matrix, x), 1)


def gathered(m, a, pool, data):
    table = m.param(4, m.size())
    ids = data["ids"] if m.rng.random() < 0.5 else m.ids(4, m.batch, 3)
    _need(table.shape[1] >= 1)
    wide = ids[:, :1].expand(m.batch, table.shape[1])
    return Act(torch.gather(table, 0, wide, sparse_grad=m.rng.random() < 0.5), 0)


# --- sequences and loops ------------------------------------------------------------------------


def packed_sequence(m, a, pool, data):
    _need(a.rank == 3 and a.b == 0)
    steps, k = a.x.shape[1], a.x.shape[2]
    lengths = 1 + m.ids(steps, m.batch)
    sequence = nn.utils.rnn.pack_padded_sequence(
        a.x, lengths, batch_first=True, enforce_sorted=False
    )
    if m.rng.random() < 0.5:
        h = m.size()
        cell = nn.RNN(k, h, batch_first=True).double()
        weights = {"weight_ih_l0": m.param(h, k), "weight_hh_l0": m.param(h, h),
                   "bias_ih_l0": m.param(h), "bias_hh_l0": m.param(h)}  # fmt: skip
        out, last = torch.func.functional_call(cell, weights, (sequence,))
        if m.rng.random() < 0.5:
            return Act(last[0], 0)
    else:
        out = sequence._replace(data=(sequence.data @ m.param(k, m.size())).tanh())
    padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=steps)
    return Act(padded, 0)


def loop(m, a, pool, data):
    """One call for each example; of different lengths, as trees and graphs are."""
    x = a.x.movedim(a.b, 0)
    _need(x.dim() >= 2)
    w = m.param(x.shape[-1], m.size())
    kind = m.rng.choice(["stack", "cat", "ragged"])
    m.log.append(kind)
    rows = []
    for i in range(m.batch):
        y = (x[i] @ w).tanh()
        if kind == "ragged" and y.dim() > 1:
            y = y[: 1 + i % y.shape[0]].sum(0)
        rows.append(y)
    return Act(torch.cat([r[None] for r in rows]) if kind == "cat" else torch.stack(rows), 0)


def unrolled(m, a, pool, data):
    """A cell over some steps."""
    x = a.x.movedim(a.b, 0).reshape(m.batch, -1)
    k = x.shape[1]
    _need(k <= 6)
    w, u, h = m.param(k, k), m.param(k, k), x
    for _ in range(m.rng.randint(2, 7)):
        h = torch.tanh(x @ w + h @ u)
    return Act(h, 0)


def gradient_inside(m, a, pool, data):
    """A gradient by the activation: penalties, forces."""
    _need(a.x.requires_grad)
    kind = m.rng.choice(["linear", "conv", "norm"])
    m.log.append(kind)
    if kind == "linear":
        _need(a.b != a.rank - 1)
        y = F.linear(a.x, m.param(m.size(), a.x.shape[-1])).tanh()
    elif kind == "conv":
        _need(a.rank == 3 and a.b == 0)
        y = F.conv1d(a.x, m.param(m.size(), a.x.shape[1], 1)).tanh()
    else:
        _need(a.b != a.rank - 1)
        y = F.layer_norm(a.x, a.x.shape[-1:], m.param(a.x.shape[-1])).sin()
    (g,) = torch.autograd.grad(y.square().sum(), a.x, create_graph=True)
    return Act(g, a.b)


TABLE = {
    hooked_tensor: 4, hooked_before: 3, hooked_after: 3, hooked_weight: 3, hooked_leaf: 2,
    hooked_module: 3, watched: 3, sparse_rows: 4, sparse_mixture: 3, gathered: 2,
    packed_sequence: 4, loop: 5, unrolled: 3, gradient_inside: 4,
}  # fmt: skip
