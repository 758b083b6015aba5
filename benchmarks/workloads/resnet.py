"""ResNet-18 for 32x32 images (stem of one 3x3 convolution), with group norm for batch norm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.base import Step, Target, Workload, register


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            conv(inputs, outputs, 3, stride),
            nn.GroupNorm(groups, outputs),
            nn.ReLU(),
            conv(outputs, outputs, 3),
            nn.GroupNorm(groups, outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                conv(inputs, outputs, 1, stride), nn.GroupNorm(groups, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.shortcut(x))


def resnet18(width: int = 64, groups: int = 32, classes: int = 10) -> nn.Sequential:
    layers: list[nn.Module] = [conv(3, width, 3), nn.GroupNorm(groups, width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        outputs = width << stage
        for block in range(2):
            stride = 2 if stage and not block else 1
            layers.append(Residual(inputs, outputs, stride, groups))
            inputs = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


def classify(call: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(call(x), y, reduction="none")


def images(examples: int, size: int, classes: int) -> tuple[Tensor, ...]:
    return torch.randn(examples, 3, size, size), torch.randint(classes, (examples,))


def resnet(examples: int, tiny: bool = False) -> Step:
    torch.manual_seed(0)
    model = resnet18(8, 4) if tiny else resnet18()
    size = 8 if tiny else 32
    examples, references = (3, 4) if tiny else (examples, 64)
    return Step(model, images(examples, size, 10), classify, images(references, size, 10))


register(
    Workload(
        "W4-resnet",
        "ResNet-18 for 32x32 images, group norm, B=64, cross entropy",
        "norms",
        lambda tiny: resnet(64, tiny),
        (Target("time", 0.90), Target("memory", 1.15)),
    )
)
