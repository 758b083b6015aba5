"""ViT-tiny at 224: patches by a convolution, a class token, learned positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.base import Step, Target, Workload, register
from workloads.resnet import classify, images


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
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    def __init__(
        self, size: int, patch: int, width: int, layers: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


def vit(examples: int, tiny: bool = False) -> Step:
    torch.manual_seed(0)
    if tiny:
        return Step(ViT(16, 8, 16, 2, 2, 7), images(3, 16, 7), classify)
    return Step(ViT(224, 16, 192, 12, 3, 1000), images(examples, 224, 1000), classify)


register(
    Workload(
        "W5-vit",
        "ViT-tiny at 224 (12 layers, width 192, 197 positions), B=8, cross entropy",
        "norms",
        lambda tiny: vit(8, tiny),
        (Target("time", 0.97), Target("memory", 1.10)),
    )
)
