"""Recommenders: bags of categories, interactions, factorisation."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import Problem, alive, architecture

BATCH = 4


class DeepRecommender(nn.Module):
    """Dense features by an MLP, categories by embedding bags, and their pairwise products."""

    def __init__(self, modes: tuple[str, ...], width: int = 6) -> None:
        super().__init__()
        self.bottom = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, width))
        self.bags = nn.ModuleList([nn.EmbeddingBag(11, width, mode=mode) for mode in modes])
        fields = len(modes) + 1
        pairs = fields * (fields - 1) // 2
        self.register_buffer("pairs", torch.tril_indices(fields, fields, -1), persistent=False)
        self.top = nn.Sequential(nn.Linear(width + pairs, 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, dense: Tensor, ids: list[Tensor], offsets: Tensor, weights: Any) -> Tensor:
        low = self.bottom(dense)
        fields = [low]
        for bag, chosen in zip(self.bags, ids, strict=True):
            given = weights if bag.mode == "sum" else None
            fields.append(bag(chosen, offsets, per_sample_weights=given))
        stacked = torch.stack(fields, 1)
        products = torch.bmm(stacked, stacked.mT)[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([low, products], 1))[:, 0]


def _recommender(modes: tuple[str, ...]) -> Problem:
    model = alive(DeepRecommender(modes).double())

    def losses(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        dense = torch.randn(BATCH, 5, dtype=torch.float64, generator=generator)
        ids = [torch.randint(0, 11, (9,), generator=generator) for _ in modes]
        weights = torch.rand(9, dtype=torch.float64, generator=generator)
        offsets = torch.tensor([0, 2, 2, 5])  # the second bag is empty
        clicks = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)
        logits = model(dense, ids, offsets, weights)
        return F.binary_cross_entropy_with_logits(logits, clicks, reduction="none")

    return Problem(model, losses)


@architecture("recommender-embedding-bags", "By hand", quick=True)
def recommender() -> Problem:
    return _recommender(("sum", "mean", "sum"))


@architecture("recommender-embedding-bags-max", "By hand")
def recommender_max() -> Problem:
    return _recommender(("max", "mean"))


@architecture("factorisation-machine", "By hand")
def factorisation() -> Problem:
    """Users and items with biases, looked up by index; a bilinear form between them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.users = nn.Parameter(torch.randn(7, 4))
            self.items = nn.Embedding(9, 4, padding_idx=0)
            self.bias = nn.Parameter(torch.randn(9))
            self.form = nn.Bilinear(4, 4, 2)

        def forward(self, user: Tensor, history: Tensor, item: Tensor) -> Tensor:
            u = self.users[user] + self.items(history).mean(1)
            v = self.items(item)
            return (u * v).sum(1) + self.bias[item] + self.form(u, v).tanh().sum(1)

    model = alive(Model().double())

    def losses(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        user = torch.randint(0, 7, (BATCH,), generator=generator)
        item = torch.randint(1, 9, (BATCH,), generator=generator)
        history = torch.randint(0, 9, (BATCH, 3), generator=generator)
        return F.softplus(-model(user, history, item))

    return Problem(model, losses)


@architecture("two-towers", "By hand", quick=True)
def two_towers() -> Problem:
    """Text by an embedding bag, image by convolutions; each pair has a loss of its own."""

    class Model(nn.Module):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.words = nn.EmbeddingBag(23, width, mode="mean", padding_idx=0)
            self.text = nn.Linear(width, width, bias=False)
            self.image = nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Flatten(),
                                       nn.Linear(54, width, bias=False))  # fmt: skip
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, words: Tensor, image: Tensor) -> Tensor:
            one = F.normalize(self.text(self.words(words)), dim=1)
            two = F.normalize(self.image(image), dim=1)
            return (one * two).sum(1) * self.scale.exp()

    model = alive(Model().double())

    def losses(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        words = torch.randint(0, 23, (BATCH, 5), generator=generator)
        image = torch.randn(BATCH, 3, 8, 8, dtype=torch.float64, generator=generator)
        return F.softplus(-model(words, image))

    return Problem(model, losses)
