"""Embeddings and other lookups in tables of parameters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import case, loss


def tokens(B: int, n: int = 4, below: int = 6) -> Tensor:
    """Ids with repeats, within examples and between them."""
    ids = torch.randint(below, (B, n))
    ids[:, -1] = ids[:, 0]
    return ids


def looked_up(B: int, emb: nn.Module) -> tuple:
    head = nn.Linear(3, 2)

    def forward(ids: Tensor) -> Tensor:
        return loss(head(emb(ids)).tanh())

    return nn.ModuleList([emb, head]), forward, (tokens(B),)


@case(rule=True)
def embedding(B: int):
    """Repeated ids: their rows add up before the square."""
    return looked_up(B, nn.Embedding(6, 3))


@case(rule=True)
def embedding_of_one_id(B: int):
    """(B,) ids, one lookup per example."""
    emb = nn.Embedding(6, 3)
    return emb, lambda ids: loss(emb(ids)), (torch.randint(6, (B,)),)


@case(rule=True)
def embedding_3d_ids(B: int):
    """(B, 2, 2) ids, and the first ids twice."""
    emb = nn.Embedding(6, 3)
    return emb, lambda ids: loss(emb(ids).tanh()), (tokens(B).view(B, 2, 2),)


@case(batch=(0, 1, 3, 4), rule=True)
def embedding_sequence_major(B: int):
    """(T, B) ids."""
    emb = nn.Embedding(6, 3)

    def forward(ids: Tensor) -> Tensor:
        return loss(emb(ids.t()).tanh().transpose(0, 1))

    return emb, forward, (tokens(B),)


@case(rule=True)
def embedding_padding_idx(B: int):
    """The padding's row has no gradient."""
    emb = nn.Embedding(6, 3, padding_idx=2)
    head = nn.Linear(3, 2)
    ids = tokens(B)
    ids[:, 1] = 2
    return nn.ModuleList([emb, head]), lambda ids: loss(head(emb(ids)).tanh()), (ids,)


@case(batch=(1, 3))
def embedding_max_norm(B: int):
    """The forward pass rescales rows of the weight, in place."""
    emb = nn.Embedding(6, 3, max_norm=1.0)
    return emb, lambda ids: loss(emb(ids).tanh()), (tokens(B),)


@case(mixes="maybe")
def embedding_scaled_by_frequency(B: int):
    """Divided by how often the id occurs in the whole batch: right or refused."""
    return looked_up(B, nn.Embedding(6, 3, scale_grad_by_freq=True))


@case()
def embedding_sparse(B: int):
    """sparse=True: autograd's own gradient is a sparse tensor."""
    return looked_up(B, nn.Embedding(6, 3, sparse=True))


@case(rule=True)
def embeddings_summed(B: int):
    """Tokens, segments and positions, as in BERT; one table has two rows."""
    parts = nn.ModuleList([nn.Embedding(6, 3), nn.Embedding(2, 3), nn.Embedding(4, 3)])
    norm = nn.LayerNorm(3)

    def forward(ids: Tensor, segments: Tensor) -> Tensor:
        where = torch.arange(ids.shape[1])[None]
        return loss(norm(parts[0](ids) + parts[1](segments) + parts[2](where)))

    return nn.ModuleList([parts, norm]), forward, (tokens(B), torch.randint(2, (B, 4)))


def bag(B: int, mode: str, **more: object) -> tuple:
    model = nn.EmbeddingBag(6, 3, mode=mode, **more)
    return model, lambda ids: loss(model(ids)), (tokens(B),)


@case(batch=(1, 3))
def embedding_bag_sum(B: int):
    """nn.EmbeddingBag, sums of rows."""
    return bag(B, "sum")


@case(batch=(1, 3))
def embedding_bag_mean(B: int):
    """nn.EmbeddingBag, means of rows, with padding."""
    return bag(B, "mean", padding_idx=1)


@case(batch=(1, 3))
def embedding_bag_max(B: int):
    """nn.EmbeddingBag, maxima of rows."""
    return bag(B, "max")


@case(batch=(1, 3))
def embedding_bag_offsets(B: int):
    """Bags of different sizes in one list, one of them empty, with weights."""
    model = nn.EmbeddingBag(6, 3, mode="sum")
    counts = torch.tensor([2, 0, 3])[:B]

    def forward(ids: Tensor, w: Tensor, n: Tensor) -> Tensor:
        keep = torch.arange(ids.shape[1])[None] < n[:, None]
        offsets = n.cumsum(0) - n
        return loss(model(ids[keep], offsets, per_sample_weights=w[keep]))

    return model, forward, (tokens(B), torch.randn(B, 4), counts)


@case(rule=True)
def table_by_index(B: int):
    """W[ids] and W.index_select(0, ids)."""
    W, V = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(5, 3))

    def forward(ids: Tensor, more: Tensor) -> Tensor:
        return loss(W[ids] * V.index_select(0, more)[:, None])

    return [W, V], forward, (tokens(B), torch.randint(5, (B,)))


@case()
def table_by_two_indices(B: int):
    """W[i, j] and W[:, ids]."""
    W, V = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(3, 6))

    def forward(i: Tensor, j: Tensor, ids: Tensor) -> Tensor:
        return loss(W[i, j]) + loss(V[:, ids].transpose(0, 1))

    data = (torch.randint(4, (B, 3)), torch.randint(5, (B, 3)), tokens(B))
    return [W, V], forward, data


@case()
def table_by_gather(B: int):
    """gather from an expanded table, and take."""
    W, v = nn.Parameter(torch.randn(1, 6)), nn.Parameter(torch.randn(6))

    def forward(ids: Tensor) -> Tensor:
        return loss(W.expand(ids.shape[0], -1).gather(1, ids)) + loss(v.take(ids))

    return [W, v], forward, (tokens(B),)


@case(rule=True)
def table_by_one_hot(B: int):
    """one_hot(ids) @ W."""
    W = nn.Parameter(torch.randn(6, 3))

    def forward(ids: Tensor) -> Tensor:
        return loss(F.one_hot(ids, 6).to(W.dtype) @ W)

    return [W], forward, (tokens(B),)


@case()
def table_of_a_function(B: int):
    """A lookup in a function of the parameter: exp(W)[ids], softmax(V)[ids]."""
    W, V = nn.Parameter(torch.randn(6, 3)), nn.Parameter(torch.randn(6, 3))

    def forward(ids: Tensor) -> Tensor:
        return loss(W.exp()[ids]) + loss(F.embedding(ids, V.softmax(0)))

    return {"W": W, "V": V}, forward, (tokens(B),)


@case()
def codebook(B: int):
    """Vector quantisation: nearest code by argmin, straight-through gradient, commitment loss."""
    emb, enc, dec = nn.Embedding(6, 3), nn.Linear(4, 3), nn.Linear(3, 4)

    def forward(x: Tensor) -> Tensor:
        z = enc(x)
        ids = (z.detach()[:, :, None] - emb.weight.detach()).square().sum(-1).argmin(-1)
        q = emb(ids)
        pulled = (q - z.detach()).square().sum((1, 2)) + 0.3 * (z - q.detach()).square().sum((1, 2))
        return loss(dec(z + (q - z).detach())) + pulled

    return nn.ModuleList([emb, enc, dec]), forward, (torch.randn(B, 3, 4),)


@case()
def conditional_random_field(B: int):
    """A table of transitions, read by index for the path and by broadcast for the partition."""
    emit, table = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 3))

    def forward(x: Tensor, y: Tensor) -> Tensor:
        scores = emit(x)  # (B, T, 3)
        path = scores.gather(2, y[..., None]).sum((1, 2)) + table[y[:, :-1], y[:, 1:]].sum(1)
        alpha = scores[:, 0]
        for t in range(1, x.shape[1]):
            alpha = torch.logsumexp(alpha[:, :, None] + table[None], 1) + scores[:, t]
        return torch.logsumexp(alpha, 1) - path

    return (
        {**dict(emit.named_parameters()), "table": table},
        forward,
        (
            torch.randn(B, 4, 4),
            torch.randint(3, (B, 4)),
        ),
    )


# Constants beside parameters, in sizes that could as well be a batch's.


def beside_zeros(rows: int, width: int) -> tuple[nn.Parameter, Tensor]:
    """All but the last row learnt."""
    w = nn.Parameter(torch.randn(rows - 1, width))
    return w, torch.zeros(1, width)


@case(batch=(1, 3))
def weight_joined_with_zeros(B: int):
    """A layer with a row that is fixed, and as many outputs as there are examples."""
    w, fixed = beside_zeros(3, 3)
    return [w], lambda x: loss((x @ torch.cat([w, fixed]).t()).tanh()), (torch.randn(B, 3),)


@case(batch=(1, 3))
def table_joined_with_zeros(B: int):
    """A padding row joined to a table, in which several examples look up the same rows."""
    w, fixed = beside_zeros(6, 4)
    ids = torch.randint(6, (B, 5))
    return [w], lambda ids: loss(torch.cat([w, fixed])[ids].tanh()), (ids,)


@case(batch=(1, 3))
def table_selected_by_rows(B: int):
    """The same by `index_select`, rows of several examples in one vector."""
    w, fixed = beside_zeros(6, 4)

    def forward(ids: Tensor) -> Tensor:
        rows = torch.cat([fixed, w]).index_select(0, ids.reshape(-1))
        return loss(rows.view(len(ids), 5, 4).tanh())

    return [w], forward, (torch.randint(6, (B, 5)),)


@case(batch=(3,))
def centred_table(B: int):
    """A row for each place of the batch, less the mean of all."""
    w, fixed = beside_zeros(3, 4)

    def forward(x: Tensor) -> Tensor:
        table = torch.cat([w, fixed])
        return loss((x + table - table.mean(0)).tanh())

    def alone(i: int) -> Tensor:
        table = torch.cat([w, fixed])
        return loss((x[i : i + 1] + table[i : i + 1] - table.mean(0)).tanh())

    x = torch.randn(B, 4)
    return [w], forward, (x,), alone


@case(batch=(3,))
def cumulative_table(B: int):
    """Cumulative sums over rows of a table that stand for the places of the batch."""
    w, fixed = beside_zeros(3, 4)
    x = torch.randn(B, 4)

    def forward(x: Tensor) -> Tensor:
        return loss((x + torch.stack([*w, *fixed]).cumsum(0)).tanh())

    def alone(i: int) -> Tensor:
        return loss((x[i : i + 1] + torch.stack([*w, *fixed]).cumsum(0)[i : i + 1]).tanh())

    return [w], forward, (x,), alone
