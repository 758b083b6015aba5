"""Convolutions in one to three dimensions, and small networks of them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import case, loss


def convolved(B: int, model: nn.Module, *shape: int) -> tuple:
    return model, lambda x: loss(model(x)), (torch.randn(B, *shape),)


@case()
def conv1d(B: int):
    """Stride and padding."""
    return convolved(B, nn.Conv1d(2, 3, 3, stride=2, padding=1), 2, 6)


@case()
def conv2d(B: int):
    """Stride 1, padding, two layers."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False))
    return convolved(B, model, 2, 4, 5)


@case()
def conv2d_strided_dilated(B: int):
    """A kernel that is not square, with stride and dilation."""
    return convolved(B, nn.Conv2d(2, 4, (2, 3), stride=(1, 2), dilation=(2, 1)), 2, 5, 6)


@case()
def conv2d_groups(B: int):
    """groups=2: each half of the outputs sees half of the inputs."""
    return convolved(B, nn.Conv2d(4, 6, 3, groups=2, padding=1), 4, 3, 4)


@case()
def conv2d_depthwise(B: int):
    """groups = channels, two outputs for each, then 1 x 1."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Tanh(), nn.Conv2d(6, 2, 1))
    return convolved(B, model, 3, 4, 4)


@case()
def conv2d_padding_modes(B: int):
    """circular and reflect: padded by an op of their own."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(3, 2, 3, padding="same", padding_mode="reflect"),
    )
    return convolved(B, model, 2, 3, 4)


@case()
def conv2d_channels_last(B: int):
    """Memory order channels_last."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2))
    model = model.to(memory_format=torch.channels_last)

    def forward(x: Tensor) -> Tensor:
        return loss(model(x.contiguous(memory_format=torch.channels_last)))

    return model, forward, (torch.randn(B, 2, 4, 4),)


@case()
def conv3d(B: int):
    """Three dimensions."""
    return convolved(B, nn.Conv3d(2, 3, 2, padding=(1, 0, 0)), 2, 2, 3, 3)


@case()
def conv_transposed_1d(B: int):
    """Transposed: the weight is (in, out, k)."""
    return convolved(B, nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), 2, 4)


@case()
def conv_transposed_2d_groups(B: int):
    """Transposed with groups and dilation."""
    return convolved(B, nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, padding=1), 4, 3, 3)


@case()
def conv_transposed_3d(B: int):
    """Transposed in three dimensions."""
    return convolved(B, nn.ConvTranspose3d(2, 2, 2, stride=(1, 2, 1)), 2, 2, 2, 2)


@case(batch=(1, 3))
def conv_without_batch_dimension(B: int):
    """Each example on its own, (C, H, W)."""
    model = nn.Conv2d(2, 3, 2)

    def forward(x: Tensor) -> Tensor:
        return loss(torch.stack([model(image) for image in x]))

    return model, forward, (torch.randn(B, 2, 3, 3),)


@case(batch=(1, 3))
def conv_on_time_as_batch(B: int):
    """(B * T, C, H, W): frames of videos, then a temporal convolution."""
    frame, time = nn.Conv2d(2, 3, 2), nn.Conv1d(3, 2, 2)

    def forward(x: Tensor) -> Tensor:  # (B, T, C, H, W)
        h = frame(x.flatten(0, 1)).tanh().mean((2, 3)).unflatten(0, x.shape[:2])
        return loss(time(h.transpose(1, 2)))

    return nn.ModuleList([frame, time]), forward, (torch.randn(B, 3, 2, 3, 3),)


@case()
def convnet(B: int):
    """Convolutions, pooling and a linear head."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    x, y = torch.randn(B, 1, 4, 4), torch.randint(3, (B,))
    return model, lambda x, y: F.cross_entropy(model(x), y, reduction="none"), (x, y)


@case()
def weight_standardised_conv(B: int):
    """The weight is normalised per filter, by batch_norm as timm does it."""
    conv = nn.Conv2d(2, 3, 2)
    gain = nn.Parameter(torch.tensor([0.5, 1.0, 1.5]))

    def forward(x: Tensor) -> Tensor:
        w = F.batch_norm(
            conv.weight.reshape(1, 3, -1), None, None, gain, training=True, momentum=0.0
        )
        return loss(F.conv2d(x, w.view_as(conv.weight), conv.bias))

    return {**dict(conv.named_parameters()), "gain": gain}, forward, (torch.randn(B, 2, 3, 3),)


@case()
def patch_embedding(B: int):
    """A convolution with stride as large as its kernel, flattened to positions, with positions
    interpolated from a smaller grid.
    """
    conv, grid = nn.Conv2d(2, 4, 2, stride=2), nn.Parameter(torch.randn(1, 4, 2, 2))
    model = nn.ModuleDict({"conv": conv})
    model.register_parameter("grid", grid)

    def forward(x: Tensor) -> Tensor:
        where = F.interpolate(grid, size=(3, 3), mode="bicubic", align_corners=False)
        return loss((conv(x).flatten(2) + where.flatten(2)).transpose(1, 2).softmax(-1))

    return model, forward, (torch.randn(B, 2, 6, 6),)


@case()
def conv_by_unfold(B: int):
    """F.unfold and a matrix product with the weight on the left."""
    W = nn.Parameter(torch.randn(3, 8))
    return [W], lambda x: loss(W @ F.unfold(x, 2)), (torch.randn(B, 2, 3, 3),)
