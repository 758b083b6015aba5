"""Rows in an order that the data decides: experts, packed documents, graphs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import case, loss
from zoo.sequences import heads


class Experts(nn.Module):
    """Top-k routing of tokens by index and index_add."""

    def __init__(self, k: int = 2, count: int = 3):
        super().__init__()
        self.router = nn.Linear(4, count)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 4)) for _ in range(count)
        )
        self.k = k

    def forward(self, x: Tensor) -> Tensor:  # (B, T, d)
        rows = x.flatten(0, 1)
        gates, chosen = self.router(rows).softmax(-1).topk(self.k, dim=-1)
        gates = gates / gates.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            row, slot = (chosen == e).nonzero(as_tuple=True)
            out = out.index_add(0, row, gates[row, slot, None] * expert(rows[row]))
        return out.view_as(x)


@case(batch=(0, 1, 3, 4))
def mixture_of_experts(B: int):
    """Each expert sees rows of any example, in any number."""
    model = nn.Sequential(Experts(), nn.Linear(4, 2))
    return model, lambda x: loss(model(x)), (torch.randn(B, 4, 4),)


@case(batch=(1, 3, 4))
def mixture_of_experts_top_1(B: int):
    """One expert per token, in place, with a residual."""
    model = Experts(k=1)

    def forward(x: Tensor) -> Tensor:
        return loss(x + model(x).tanh())

    return model, forward, (torch.randn(B, 3, 4),)


@case(batch=(1, 3))
def experts_sorted(B: int):
    """Tokens sorted by expert, cut in groups, and put back by the inverse permutation."""
    W = nn.Parameter(torch.randn(3, 4, 4))
    router = nn.Linear(4, 3)

    def forward(x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        gate, expert = router(rows).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        counts = expert.bincount(minlength=3).tolist()
        parts = rows[order].split(counts)
        out = torch.cat([part @ W[e] for e, part in enumerate(parts)])
        back = torch.empty_like(out).index_copy(0, order, out)
        return loss((back * gate[:, None]).view(x.shape))

    return {"W": W, **dict(router.named_parameters())}, forward, (torch.randn(B, 4, 4),)


@case(batch=(1, 3))
def experts_by_gathered_weights(B: int):
    """Each token takes its own weight matrix: W[expert], a lookup of whole matrices."""
    W, b = nn.Parameter(torch.randn(3, 4, 2)), nn.Parameter(torch.randn(3, 2))

    def forward(x: Tensor, e: Tensor) -> Tensor:
        return loss(torch.einsum("btd,btdp->btp", x, W[e]) + b[e])

    return [W, b], forward, (torch.randn(B, 3, 4), torch.randint(3, (B, 3)))


@case(batch=(1, 3, 4))
def soft_experts(B: int):
    """All experts for all tokens in one batched product, mixed by gates."""
    W, gate = nn.Parameter(torch.randn(3, 4, 2)), nn.Linear(4, 3)

    def forward(x: Tensor) -> Tensor:
        each = torch.einsum("btd,edp->btep", x, W)
        return loss((each * gate(x).softmax(-1)[..., None]).sum(2))

    return {"W": W, **dict(gate.named_parameters())}, forward, (torch.randn(B, 4, 4),)


# -- packed documents ------------------------------------------------------------------------------


class Packed(nn.Module):
    """Causal attention under a mask that keeps documents apart."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(4, 4)
        self.qkv, self.norm, self.head = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, 7)

    def forward(self, ids: Tensor, where: Tensor, docs: Tensor) -> Tensor:  # each (R, L)
        x = self.tokens(ids) + self.positions(where)
        q, k, v = (heads(y, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        same = (docs[:, :, None] == docs[:, None]).tril()
        scores = (q @ k.transpose(-1, -2)).masked_fill(~same[:, None], -1e30)
        return self.head(x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def documents(B: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and targets (B, 4), and lengths; what lies beyond the length is not packed."""
    lengths = torch.tensor([3, 2, 4, 1])[:B]
    return torch.randint(7, (B, 4)), torch.randint(7, (B, 4)), lengths


def packed(model: Packed, rows: int, ids: Tensor, targets: Tensor, n: Tensor) -> Tensor:
    """Document i goes to row i mod `rows`; losses are sums over each document's tokens."""
    count = ids.shape[0]
    parts: list[list[int]] = [[i for i in range(count) if i % rows == r] for r in range(rows)]
    parts = [part for part in parts if part]
    width = max(int(sum(n[i] for i in part)) for part in parts)
    table = torch.zeros(4, len(parts), width, dtype=torch.long)  # ids, targets, where, docs
    table[3] = -1
    for r, part in enumerate(parts):
        at = 0
        for i in part:
            end = at + int(n[i])
            table[0, r, at:end], table[1, r, at:end] = ids[i, : n[i]], targets[i, : n[i]]
            table[2, r, at:end], table[3, r, at:end] = torch.arange(int(n[i])), i
            at = end
    logits = model(table[0], table[2], table[3]).flatten(0, 1)
    each = F.cross_entropy(logits, table[1].flatten(), reduction="none")
    owner = table[3].flatten()
    real = owner >= 0
    return torch.zeros(count).index_add(0, owner[real], each[real])


@case(batch=(1, 3))
def packed_in_one_row(B: int):
    """Several documents one after the other in a single row: the batch dimension is 1."""
    model = Packed()
    return model, lambda *data: packed(model, 1, *data), documents(B)


@case(batch=(3, 4))
def packed_in_two_rows(B: int):
    """Several rows with several documents each, and padding."""
    model = Packed()
    return model, lambda *data: packed(model, 2, *data), documents(B)


@case(batch=(1, 3))
def ragged_by_mask(B: int):
    """Padding is cut out by a boolean mask before the layer, and put back after it."""
    model = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)])

    def forward(x: Tensor, n: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1])[None] < n[:, None]
        rows = model[1](model[0](x[keep]).tanh())
        out = torch.zeros(*x.shape[:2], 3).masked_scatter(keep[..., None].expand(-1, -1, 3), rows)
        return loss(out)

    return model, forward, (torch.randn(B, 4, 4), torch.tensor([2, 4, 1])[:B])


@case(batch=(1, 3))
def losses_by_segment(B: int):
    """Token losses added up by scatter_add and by segment means."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(x: Tensor, n: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1])[None] < n[:, None]
        owner = keep.nonzero()[:, 0]
        each = model(x[keep]).squeeze(1).square()
        total = torch.zeros(x.shape[0]).scatter_add(0, owner, each)
        return total + torch.zeros(x.shape[0]).scatter_reduce(0, owner, each, "mean")

    return model, forward, (torch.randn(B, 4, 4), torch.tensor([2, 4, 1])[:B])


# -- graphs ----------------------------------------------------------------------------------------


class Messages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(8, 4), nn.GRUCell(4, 4)
        self.read = nn.Linear(4, 2)

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        for _ in range(2):
            sent = self.message(torch.cat([x[source], x[target]], 1)).tanh()
            x = self.update(torch.zeros_like(x).index_add(0, target, sent), x)
        return self.read(x)


@case(batch=(1, 3))
def graph_network(B: int):
    """A batch of graphs as one graph: messages by index and index_add, a sum per graph."""
    model = Messages()
    sizes = torch.tensor([3, 2, 4])[:B]

    def forward(x: Tensor, edges: Tensor, n: Tensor) -> Tensor:  # (B, 4, d), (B, E, 2), (B,)
        keep = torch.arange(4)[None] < n[:, None]
        owner = keep.nonzero()[:, 0]
        start = n.cumsum(0) - n
        both = (edges % n[:, None, None] + start[:, None, None]).flatten(0, 1)
        out = model(x[keep], both[:, 0], both[:, 1])
        return loss(torch.zeros(x.shape[0], 2).index_add(0, owner, out))

    return model, forward, (torch.randn(B, 4, 4), torch.randint(12, (B, 5, 2)), sizes)


@case(batch=(1, 3, 4))
def graph_convolution_dense(B: int):
    """A normalised adjacency matrix per example, times the features."""
    a, b = nn.Linear(4, 5), nn.Linear(5, 2, bias=False)

    def forward(x: Tensor, A: Tensor) -> Tensor:
        return loss(A @ b((A @ a(x)).relu()))

    return nn.ModuleList([a, b]), forward, (torch.randn(B, 4, 4), torch.rand(B, 4, 4))


@case(batch=(1, 3))
def deep_sets(B: int):
    """Points of all examples in one list, mean and max per example."""
    point, whole = nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(x: Tensor, n: Tensor) -> Tensor:
        keep = torch.arange(x.shape[1])[None] < n[:, None]
        h = point(x[keep]).tanh()
        parts = h.split(n.tolist())
        pooled = torch.stack([torch.cat([p.mean(0), p.amax(0)]) for p in parts])
        return loss(whole(pooled))

    return (
        nn.ModuleList([point, whole]),
        forward,
        (torch.randn(B, 4, 3), torch.tensor([2, 4, 1])[:B]),
    )


@case(batch=(1, 3))
def detection_proposals(B: int):
    """Boxes of all images in one list: features gathered by image and position."""
    conv, head = nn.Conv2d(2, 4, 1), nn.Linear(4, 3)

    def forward(x: Tensor, where: Tensor) -> Tensor:  # (B, 2, 3, 3), (B, 2, 2)
        features = conv(x)
        image = torch.arange(x.shape[0])[:, None].expand(-1, 2).flatten()
        rows, columns = where.flatten(0, 1).unbind(1)
        scores = head(features[image, :, rows, columns])
        return loss(scores.view(x.shape[0], 2, 3))

    return (
        nn.ModuleList([conv, head]),
        forward,
        (torch.randn(B, 2, 3, 3), torch.randint(3, (B, 2, 2))),
    )
