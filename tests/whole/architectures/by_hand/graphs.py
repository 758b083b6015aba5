"""Graph networks: several graphs in one batch, rows of any order."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import Problem, alive, architecture

NODES = (4, 6, 3)


def _batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features of all nodes, edges (2, E) and the graph of every node; the nodes are shuffled."""
    generator = torch.Generator().manual_seed(number)
    graph = torch.repeat_interleave(torch.arange(3), torch.tensor(NODES))
    edges, start = [], 0
    for count in NODES:
        edges.append(start + torch.randint(0, count, (2, 2 * count), generator=generator))
        start += count
    order = torch.randperm(start, generator=generator)
    place = torch.argsort(order)
    x = torch.randn(start, 5, dtype=torch.float64, generator=generator)
    return x, place[torch.cat(edges, 1)], graph[order]


class Messages(nn.Module):
    """Messages along edges, summed at their ends."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU())
        self.update, self.norm = nn.Linear(2 * width, width), nn.LayerNorm(width)
        self.epsilon = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        sent = self.message(torch.cat([x[source], x[target]], 1))
        received = torch.zeros_like(x).index_add(0, target, sent)
        return self.norm((1 + self.epsilon) * x + self.update(torch.cat([x, received], 1)))


class GraphNetwork(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter = nn.Linear(5, width)
        self.layers = nn.ModuleList([Messages(width), Messages(width)])
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x, edges)
        total = torch.zeros(len(NODES), x.shape[1], dtype=x.dtype).index_add(0, graph, x)
        return self.head(total / torch.bincount(graph)[:, None])[:, 0]


@architecture("graph-network", "By hand", quick=True)
def graph_network() -> Problem:
    model = alive(GraphNetwork().double())

    def losses(number: int) -> Tensor:
        return model(*_batch(number)).square()

    return Problem(model, losses)


class GraphAttention(nn.Module):
    """Weights of messages normalised over the edges that arrive at a node."""

    def __init__(self, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.map = nn.Linear(5, heads * width, bias=False)
        self.left = nn.Parameter(torch.randn(1, heads, width))
        self.right = nn.Parameter(torch.randn(1, heads, width))
        self.kind = nn.Embedding(3, heads)
        self.head = nn.Linear(heads * width, 4)

    def forward(self, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        count, (source, target) = len(x), edges
        h = self.map(x).view(count, self.heads, -1)
        score = (h * self.left).sum(-1)[source] + (h * self.right).sum(-1)[target]
        score = F.leaky_relu(score + self.kind((source + target) % 3), 0.2)
        top = torch.full((count, self.heads), float("-inf"), dtype=x.dtype).scatter_reduce(
            0, target[:, None].expand(-1, self.heads), score.detach(), "amax"
        )
        weight = (score - top[target]).exp()
        norm = torch.zeros(count, self.heads, dtype=x.dtype).index_add(0, target, weight)
        weight = weight / norm[target]
        out = torch.zeros_like(h).index_add(0, target, weight[..., None] * h[source])
        pooled = torch.zeros(len(NODES), h[0].numel(), dtype=x.dtype).scatter_add(
            0, graph[:, None].expand(-1, h[0].numel()), out.flatten(1)
        )
        return self.head(F.elu(pooled))


@architecture("graph-attention", "By hand")
def graph_attention() -> Problem:
    model = alive(GraphAttention().double())

    def losses(number: int) -> Tensor:
        logits = model(*_batch(number))
        return F.cross_entropy(logits, torch.tensor([1, 0, 3]), reduction="none")

    return Problem(model, losses)
