"""Segmentation heads, a diffusion UNet, a vision transformer, two towers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..registry import Problem, alive, architecture

BATCH = 3


def _pixels(number: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator)


def _labels(number: int, classes: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 + number)
    return torch.randint(0, classes, (BATCH, *shape), generator=generator)


def _block(inside: int, outside: int, size: int = 3, **how: int) -> nn.Sequential:
    padding = how.get("dilation", 1) * (size // 2)
    return nn.Sequential(
        nn.Conv2d(inside, outside, size, padding=padding, bias=False, **how),
        nn.BatchNorm2d(outside),
        nn.ReLU(),
    )


class PyramidPooling(nn.Module):
    """Atrous spatial pyramid pooling: dilated convolutions and one value per picture."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [_block(inside, outside, 1)] + [_block(inside, outside, dilation=d) for d in (2, 3)]
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), _block(inside, outside, 1))
        self.project = nn.Sequential(_block(4 * outside, outside, 1), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        whole = F.interpolate(self.pooled(x), x.shape[-2:], mode="bilinear", align_corners=False)
        return self.project(torch.cat([branch(x) for branch in self.branches] + [whole], 1))


class Segmentation(nn.Module):
    """A backbone with strides and dilation, a head, and an auxiliary head."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.stem = _block(3, 8, stride=2)
        self.early = _block(8, 12, stride=2)
        self.late = _block(12, 16, dilation=2)
        middle = PyramidPooling(16, 10) if head == "deeplab" else _block(16, 10)
        self.classifier = nn.Sequential(middle, nn.Conv2d(10, 5, 1))
        self.auxiliary = nn.Sequential(_block(12, 6), nn.Conv2d(6, 5, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.early(self.stem(x))
        wide = {"size": x.shape[-2:], "mode": "bilinear", "align_corners": False}
        return (F.interpolate(self.classifier(self.late(early)), **wide),
                F.interpolate(self.auxiliary(early), **wide))  # fmt: skip


def _segmentation(head: str) -> Problem:
    model = alive(Segmentation(head).double().eval())

    def losses(number: int) -> Tensor:
        labels = _labels(number, 5, 20, 24)
        labels[:, :2] = 255  # pixels without a label
        main, auxiliary = model(_pixels(number, 3, 20, 24))
        each = F.cross_entropy(main, labels, ignore_index=255, reduction="none")
        aside = F.cross_entropy(auxiliary, labels, ignore_index=255, reduction="none")
        return (each + 0.4 * aside).mean((1, 2))

    return Problem(model, losses)


@architecture("segmentation-fcn", "By hand", quick=True)
def fcn() -> Problem:
    return _segmentation("fcn")


@architecture("segmentation-deeplab", "By hand")
def deeplab() -> Problem:
    return _segmentation("deeplab")


class Residual(nn.Module):
    """Group norm, convolution, and the time added to every pixel."""

    def __init__(self, inside: int, outside: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, inside), nn.GroupNorm(2, outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
        self.time = nn.Linear(time, outside)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(time))[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Attention over pixels, and over the words of a prompt if there is one."""

    def __init__(self, width: int, context: int | None = None) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(context or width, width, bias=False)
        self.v = nn.Linear(context or width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        b, c, h, w = x.shape
        rows = self.norm(x).flatten(2).transpose(1, 2)
        words = rows if context is None else context
        heads = [
            f(y).unflatten(2, (2, -1)).transpose(1, 2)
            for f, y in ((self.q, rows), (self.k, words), (self.v, words))
        ]
        seen = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return x + self.out(seen).transpose(1, 2).reshape(b, c, h, w)


class DiffusionUNet(nn.Module):
    """Down, middle with cross-attention, up with skip connections: predicts the noise."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        time = 4 * width
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.prompt = nn.Embedding(17, 6)
        self.enter = nn.Conv2d(3, width, 3, padding=1)
        self.down1, self.shrink = Residual(width, width, time), nn.Conv2d(width, width, 3, 2, 1)
        self.down2 = Residual(width, 2 * width, time)
        self.own, self.cross = Attention(2 * width), Attention(2 * width, 6)
        self.middle = Residual(2 * width, 2 * width, time)
        self.up2 = Residual(4 * width, width, time)
        self.grow = nn.ConvTranspose2d(width, width, 4, 2, 1)
        self.up1 = Residual(2 * width, width, time)
        self.norm, self.leave = nn.GroupNorm(2, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, step: Tensor, words: Tensor) -> Tensor:
        half = self.width // 2
        speed = torch.exp(-math.log(1e4) * torch.arange(half, dtype=x.dtype) / half)
        angle = step[:, None] * speed
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1))
        first = self.down1(self.enter(x), time)
        second = self.down2(self.shrink(first), time)
        deep = self.cross(self.own(second), self.prompt(words))
        deep = self.middle(deep, time)
        up = self.grow(self.up2(torch.cat([deep, second], 1), time))
        up = self.up1(torch.cat([up, first], 1), time)
        return self.leave(F.silu(self.norm(up)))


@architecture("diffusion-unet", "By hand", quick=True)
def unet() -> Problem:
    model = alive(DiffusionUNet().double())

    def losses(number: int) -> Tensor:
        image, noise = _pixels(number, 3, 8, 8), _pixels(number + 50, 3, 8, 8)
        step = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
        mixed = (1 - step)[:, None, None, None].sqrt() * image
        mixed = mixed + step[:, None, None, None].sqrt() * noise
        guess = model(mixed, 1000 * step, _labels(number, 17, 4))
        return F.mse_loss(guess, noise, reduction="none").mean((1, 2, 3))

    return Problem(model, losses)


class VisionTransformer(nn.Module):
    """Patches by convolution, class token, position embeddings, torch's own encoder layers."""

    def __init__(self, width: int = 16, patches: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, patches + 1, width))
        layer = nn.TransformerEncoderLayer(width, 4, 32, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.patches(x).flatten(2).transpose(1, 2)
        rows = torch.cat([self.token.expand(len(x), -1, -1), rows], 1) + self.positions
        return self.head(self.norm(self.encoder(rows))[:, 0])


@architecture("vision-transformer", "By hand", quick=True)
def vision_transformer() -> Problem:
    model = alive(VisionTransformer().double().eval())

    def losses(number: int) -> Tensor:
        logits = model(_pixels(number, 3, 16, 16))
        return F.cross_entropy(logits, _labels(number, 10), reduction="none")

    return Problem(model, losses)


@architecture("weight-standardised-resnet", "By hand")
def weight_standardised() -> Problem:
    """Convolutions whose weights are normalised at every call, group norm, spectral norm."""

    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            w = self.weight
            w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
            return F.conv2d(x, w, self.bias, self.stride, self.padding)

    model = nn.Sequential(
        Conv(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), Conv(8, 8, 3, 2, 1),
        nn.InstanceNorm2d(8, affine=True), nn.PReLU(8), nn.Flatten(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(8 * 16, 12)), nn.Tanh(),
        nn.utils.parametrizations.weight_norm(nn.Linear(12, 10)),
    )  # fmt: skip
    model = alive(model.double().eval())

    def losses(number: int) -> Tensor:
        logits = model(_pixels(number, 3, 8, 8))
        return F.cross_entropy(logits, _labels(number, 10), reduction="none")

    return Problem(model, losses)


@architecture("resnet-batch-norm-training", "By hand", mixes=True)
def batch_norm_training() -> Problem:
    """Batch norm with the batch's statistics: the loss of an example depends on the others."""
    model = nn.Sequential(_block(3, 6), _block(6, 6, stride=2), nn.Flatten(), nn.Linear(96, 10))
    model = alive(model.double())

    def losses(number: int) -> Tensor:
        logits = model(_pixels(number, 3, 8, 8))
        return F.cross_entropy(logits, _labels(number, 10), reduction="none")

    return Problem(model, losses)


@architecture("volume-convnet", "By hand")
def volume() -> Problem:
    """Three-dimensional, grouped, dilated and transposed convolutions with padding modes."""
    model = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate"), nn.ReLU(),
        nn.Conv3d(4, 8, 3, stride=2, padding=1, groups=2), nn.GroupNorm(2, 8), nn.ELU(),
        nn.ConvTranspose3d(8, 4, 2, 2, groups=2), nn.LocalResponseNorm(2), nn.AvgPool3d(2),
        nn.Conv3d(4, 4, 2, dilation=2), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    model = alive(model.double())

    def losses(number: int) -> Tensor:
        logits = model(_pixels(number, 2, 6, 6, 6))
        return F.cross_entropy(logits, _labels(number, 5), reduction="none")

    return Problem(model, losses)
