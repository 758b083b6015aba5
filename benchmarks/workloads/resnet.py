"""ResNets, group norm for batch norm: 18 for 32x32 images (stem of one 3x3 convolution), and 50."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.base import Step, Target, Workload, register


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Residual(nn.Module):
    """x through layers, and past them."""

    def __init__(
        self, inner: list[nn.Module], inputs: int, outputs: int, stride: int, groups: int
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.inner = nn.Sequential(*inner)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                conv(inputs, outputs, 1, stride), nn.GroupNorm(groups, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.shortcut(x))


def basic(inputs: int, width: int, stride: int, groups: int) -> Residual:
    """The block of a ResNet-18."""
    inner = [
        conv(inputs, width, 3, stride),
        nn.GroupNorm(groups, width),
        nn.ReLU(),
        conv(width, width, 3),
        nn.GroupNorm(groups, width),
    ]
    return Residual(inner, inputs, width, stride, groups)


def bottleneck(inputs: int, width: int, stride: int, groups: int) -> Residual:
    """The block of a ResNet-50."""
    inner = [
        conv(inputs, width, 1),
        nn.GroupNorm(groups, width),
        nn.ReLU(),
        conv(width, width, 3, stride),
        nn.GroupNorm(groups, width),
        nn.ReLU(),
        conv(width, 4 * width, 1),
        nn.GroupNorm(groups, 4 * width),
    ]
    return Residual(inner, inputs, 4 * width, stride, groups)


def network(
    stem: list[nn.Module], block: Callable[..., Residual], counts: tuple[int, ...], width: int,
    groups: int, classes: int,
) -> nn.Sequential:  # fmt: skip
    """A stem of `width` channels, stages of blocks twice as wide as those before, a head."""
    layers, inputs = stem, width
    for stage, count in enumerate(counts):
        for number in range(count):
            stride = 2 if stage and not number else 1
            residual = block(inputs, width << stage, stride, groups)
            layers.append(residual)
            inputs = residual.outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


def resnet18(width: int = 64, groups: int = 32, classes: int = 10) -> nn.Sequential:
    stem = [conv(3, width, 3), nn.GroupNorm(groups, width), nn.ReLU()]
    return network(stem, basic, (2, 2, 2, 2), width, groups, classes)


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
    stem = [conv(3, width, 7, 2), nn.GroupNorm(groups, width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    counts = (1, 1, 1, 1) if tiny else (3, 4, 6, 3)
    model = network(stem, bottleneck, counts, width, groups, 1000)
    return Step(model, images(examples, size, 1000), classify)


register(
    Workload(
        "W4-resnet",
        "ResNet-18 for 32x32 images, group norm, B=64, cross entropy",
        "norms",
        lambda tiny: resnet(64, tiny),
        (Target("time", 0.90), Target("memory", 1.15)),
    )
)
