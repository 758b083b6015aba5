"""Decoder-only transformers as in GPT-2, with the token embedding tied to the head or not."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.base import Step, Target, Workload, register


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(
        self, vocabulary: int, width: int, layers: int, heads: int, length: int, tied: bool = False
    ) -> None:
        super().__init__()
        self.expand = False  # whether each example looks up its positions: see contestants/ghost.py
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            nn.init.normal_(self.token.weight, std=0.02)
            self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.token(ids) + self.position(
            positions.repeat(len(ids), 1) if self.expand else positions
        )
        return self.head(self.norm(self.blocks(x)))


def next_token(call: Callable[..., Tensor], ids: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy over the positions, for each example."""
    logits = call(ids)
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return each.view_as(targets).mean(1)


def tokens(examples: int, length: int, vocabulary: int) -> tuple[Tensor, ...]:
    ids = torch.randint(vocabulary, (examples, length + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def gpt(
    examples: int,
    length: int,
    *,
    vocabulary: int = 1000,
    width: int = 768,
    layers: int = 2,
    heads: int = 12,
    tied: bool = False,
    tiny: bool = False,
    references: int = 0,
) -> Step:
    torch.manual_seed(0)
    if tiny:
        examples, length, vocabulary, width, heads = 3, 6, 20, 16, 2
        references = min(references, 4)
    model = GPT(vocabulary, width, layers, heads, length, tied)
    batch = tokens(examples, length, vocabulary)
    reference = tokens(references, length, vocabulary) if references else None
    return Step(model, batch, next_token, reference)


register(
    Workload(
        "W0-gpt",
        "GPT-like: 4 layers, width 256, 4 heads, vocabulary 1000; T=128, B=16, mean cross entropy",
        "norms",
        lambda tiny: gpt(16, 128, width=256, layers=4, heads=4, tiny=tiny),
        (
            Target("time", 1.10, claim=True),
            Target("time", 0.95),
            Target("memory", 1.10, claim=True),
        ),
    )
)

for length, bound in ((128, 0.80), (512, 0.93), (1024, 1.02)):
    register(
        Workload(
            f"W2-gpt-T{length}",
            f"GPT-like: 2 layers, width 768, 12 heads, vocabulary 1000; T={length}, "
            f"B={1024 // length}",
            "norms",
            lambda tiny, length=length: gpt(1024 // length, length, tiny=tiny),
            (Target("time", bound), Target("memory", 1.10)),
        )
    )

for length in (128, 512):
    register(
        Workload(
            f"W3-tied-T{length}",
            f"GPT-like: 2 layers, width 768, 12 heads, vocabulary 16,000, embedding tied to the "
            f"head; T={length}, B={1024 // length}",
            "norms",
            lambda tiny, length=length: gpt(
                1024 // length, length, vocabulary=16_000, tied=True, tiny=tiny
            ),
            (Target("time", 0.95), Target("memory", 1.10)),
        )
    )
