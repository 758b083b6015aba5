"""ResNets, group norm for batch norm: 18 for 32x32 images (stem of one 3x3 convolution), and 50."""

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


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.inner = nn.Sequential(
            conv(inputs, width, 1),
            nn.GroupNorm(groups, width),
            nn.ReLU(),
            conv(width, width, 3, stride),
            nn.GroupNorm(groups, width),
            nn.ReLU(),
            conv(width, outputs, 1),
            nn.GroupNorm(groups, outputs),
        )
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                conv(inputs, outputs, 1, stride), nn.GroupNorm(groups, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.shortcut(x))


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


def resnet50(examples: int, tiny: bool = False) -> Step:
    """For images of 224x224, 1000 classes."""
    torch.manual_seed(0)
    width, groups, size, examples = (8, 4, 32, 3) if tiny else (64, 32, 224, examples)
    layers: list[nn.Module] = [
        conv(3, width, 7, 2), nn.GroupNorm(groups, width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    inputs = width
    for stage, blocks in enumerate((1, 1, 1, 1) if tiny else (3, 4, 6, 3)):
        for block in range(blocks):
            layers.append(
                Bottleneck(inputs, width << stage, 2 if stage and not block else 1, groups)
            )
            inputs = 4 * (width << stage)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return Step(nn.Sequential(*layers), images(examples, size, 1000), classify)


register(
    Workload(
        "W4-resnet",
        "ResNet-18 for 32x32 images, group norm, B=64, cross entropy",
        "norms",
        lambda tiny: resnet(64, tiny),
        (Target("time", 0.90), Target("memory", 1.15)),
    )
)
