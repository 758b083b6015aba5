"""A BERT-like encoder made of `nn.TransformerEncoder`."""

import torch
from torch import Tensor, nn

from workloads.base import Step, Target, Workload, register
from workloads.gpt import next_token, tokens


class Encoder(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.expand = False  # whether each example looks up its positions: see contestants/ghost.py
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)
        x = self.token(ids) + self.position(
            positions.repeat(len(ids), 1) if self.expand else positions
        )
        return self.head(self.layers(self.norm(x)))


def encoder(examples: int, length: int, tiny: bool = False) -> Step:
    torch.manual_seed(0)
    if tiny:
        return Step(Encoder(20, 16, 2, 2, 6), tokens(3, 6, 20), next_token)
    return Step(Encoder(1000, 256, 4, 4, length), tokens(examples, length, 1000), next_token)


register(
    Workload(
        "W6-encoder",
        "BERT-like `nn.TransformerEncoder`: 4 layers, width 256, vocabulary 1000; T=64, B=32",
        "norms",
        lambda tiny: encoder(32, 64, tiny),
        (Target("time", 0.85), Target("memory", 1.10)),
    )
)
