"""Norm layers, and scales and shifts in every form of broadcasting."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import case, loss


def randomised(model: nn.Module) -> nn.Module:
    """Weights of norm layers that are not all ones and zeros."""
    for p in model.parameters():
        nn.init.normal_(p, 0.7, 0.5)
    return model


def normed(B: int, norm: nn.Module, *shape: int) -> tuple:
    norm = randomised(norm)
    return norm, lambda x: loss(norm(x)), (torch.randn(B, *shape),)


@case(rule=True)
def layer_norm_2d(B: int):
    """One row per example."""
    return normed(B, nn.LayerNorm(4), 4)


@case(batch=(0, 1, 3, 4), rule=True)
def layer_norm_3d(B: int):
    """Several rows per example."""
    return normed(B, nn.LayerNorm(4), 4, 4)


@case(rule=True)
def layer_norm_4d(B: int):
    """Normalised over the last two dimensions."""
    return normed(B, nn.LayerNorm((3, 4)), 2, 3, 4)


@case(rule=True)
def layer_norm_no_bias(B: int):
    """bias=False."""
    return normed(B, nn.LayerNorm(4, bias=False), 3, 4)


@case(batch=(0, 1, 3, 4), rule=True)
def layer_norm_sequence_major(B: int):
    """(T, B, d), not contiguous."""
    norm, lin = randomised(nn.LayerNorm(4)), nn.Linear(4, 4)

    def forward(x: Tensor) -> Tensor:
        return loss(lin(norm(lin(x.transpose(0, 1)))).transpose(0, 1))

    return nn.ModuleList([norm, lin]), forward, (torch.randn(B, 4, 4),)


@case()
def layer_norm_of_a_parameter(B: int):
    """Layer norm over a table of no example, then added to the data."""
    norm, table = randomised(nn.LayerNorm(4)), nn.Parameter(torch.randn(3, 4))
    model = nn.ModuleDict({"norm": norm})
    model.register_parameter("table", table)
    return model, lambda x: loss(x * norm(table)), (torch.randn(B, 3, 4),)


@case(rule=True)
def rms_norm(B: int):
    """nn.RMSNorm."""
    return normed(B, nn.RMSNorm(4), 3, 4)


@case(rule=True)
def rms_norm_by_hand(B: int):
    """x * rsqrt(mean(x^2)) * w, between linear layers."""
    a, b, w = nn.Linear(4, 4), nn.Linear(4, 2), nn.Parameter(torch.randn(4))
    model = nn.ModuleList([a, b])
    model.register_parameter("w", w)

    def forward(x: Tensor) -> Tensor:
        h = a(x)
        return loss(b(h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5) * w))

    return model, forward, (torch.randn(B, 3, 4),)


@case()
def rms_norm_of_gemma(B: int):
    """(1 + w) * normed."""
    w = nn.Parameter(torch.randn(4))

    def forward(x: Tensor) -> Tensor:
        return loss(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1.0 + w))

    return {"w": w}, forward, (torch.randn(B, 3, 4),)


@case()
def group_norm(B: int):
    """nn.GroupNorm after a convolution."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), randomised(nn.GroupNorm(2, 4)), nn.Tanh())
    return model, lambda x: loss(model(x)), (torch.randn(B, 2, 5, 4),)


@case()
def group_norm_2d(B: int):
    """nn.GroupNorm on (B, C)."""
    return normed(B, nn.GroupNorm(2, 4), 4)


@case()
def group_norm_one_group(B: int):
    """One group, and one with as many groups as channels."""
    model = nn.Sequential(randomised(nn.GroupNorm(1, 4)), nn.Tanh(), randomised(nn.GroupNorm(4, 4)))
    return model, lambda x: loss(model(x)), (torch.randn(B, 4, 3),)


@case(batch=(1, 3))
def instance_norm(B: int):
    """nn.InstanceNorm2d runs as a batch norm of B * C channels in training mode."""
    return normed(B, nn.InstanceNorm2d(3, affine=True), 3, 3, 2)


@case()
def batch_norm_eval(B: int):
    """nn.BatchNorm in evaluation mode, after a linear layer."""
    norm = randomised(nn.BatchNorm1d(5))
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 2)).eval()
    return model, lambda x: loss(model(x)), (torch.randn(B, 4),)


@case()
def batch_norm_2d_eval(B: int):
    """The same on images, without bias in the convolution."""
    norm = randomised(nn.BatchNorm2d(4))
    norm.running_var.uniform_(0.5, 2.0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), norm, nn.ReLU()).eval()
    return model, lambda x: loss(model(x)), (torch.randn(B, 2, 4, 4),)


@case()
def frozen_batch_norm_eval(B: int):
    """Only what lies below it is trained."""
    norm = randomised(nn.BatchNorm1d(5)).requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.Tanh(), nn.Linear(5, 2)).eval()
    return model, lambda x: loss(model(x)), (torch.randn(B, 4),)


@case(rule=True)
def layer_scale(B: int):
    """x + gamma * f(x)."""
    lin, gamma = nn.Linear(4, 4), nn.Parameter(torch.full((4,), 0.3))
    model = nn.ModuleDict({"lin": lin})
    model.register_parameter("gamma", gamma)
    return model, lambda x: loss(x + gamma * lin(x)), (torch.randn(B, 3, 4),)


@case(rule=True)
def broadcast_arithmetic(B: int):
    """add, sub, mul and div on either side, in several shapes, alpha included."""
    shapes = {"a": (4,), "b": (3, 4), "c": (1, 3, 1), "d": (), "e": (1,), "f": (3, 1), "g": (4,)}
    p = {n: nn.Parameter(torch.rand(s) + 0.5) for n, s in shapes.items()}

    def forward(x: Tensor) -> Tensor:
        x = torch.add(x, p["a"], alpha=0.7)
        x = torch.sub(p["b"], x, alpha=1.3)
        x = x * p["c"] + p["d"]
        x = x / p["e"] - p["f"]
        return loss(x * p["g"])

    return p, forward, (torch.randn(B, 3, 4),)


@case()
def broadcast_over_heads(B: int):
    """A parameter broadcast over dimensions in the middle of the other operand."""
    a, b = nn.Parameter(torch.randn(2, 1, 4)), nn.Parameter(torch.randn(3, 1, 1, 4))

    def forward(x: Tensor) -> Tensor:
        return loss(x[:, None] * a + b)

    return [a, b], forward, (torch.randn(B, 2, 3, 4),)


@case()
def parameter_divided_by_data(B: int):
    """w / x, w - x, w ** x and x ** w."""
    p = {n: nn.Parameter(torch.rand(4) + 0.5) for n in "abcd"}

    def forward(x: Tensor) -> Tensor:
        return loss(p["a"] / x) + loss(p["b"] - x) + loss(p["c"] ** x) + loss(x ** p["d"])

    return p, forward, (torch.rand(B, 4) + 0.5,)


@case()
def parameter_larger_than_data(B: int):
    """The data is broadcast against the parameter."""
    W, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5, 1))

    def forward(x: Tensor) -> Tensor:
        return loss(x[:, :, None] * W) + loss(x[:, None] + b)

    return [W, b], forward, (torch.randn(B, 3),)


@case()
def elementwise_of_two(B: int):
    """lerp, addcmul, addcdiv, where, maximum, clamp, atan2, hypot with parameters."""
    p = {n: nn.Parameter(torch.randn(4)) for n in "abcdefgh"}
    gate = nn.Parameter(torch.tensor(0.3))

    def forward(x: Tensor, on: Tensor) -> Tensor:
        y = torch.lerp(x, p["a"], gate) + torch.addcmul(p["b"], x, p["c"], value=0.5)
        y = y + torch.addcdiv(x, p["d"], x.square() + 1, value=1.5)
        y = torch.where(on, y, p["e"])
        y = y + torch.maximum(x, p["f"]) + torch.clamp(x, min=p["g"])
        return loss(y + torch.atan2(x, p["h"]) + torch.hypot(x, p["a"]))

    return {**p, "gate": gate}, forward, (torch.randn(B, 3, 4), torch.rand(B, 3, 4) < 0.5)


@case()
def masked_tokens(B: int):
    """A mask token put in place of some positions: by where, by arithmetic, by assignment."""
    token, lin = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 3)
    model = nn.ModuleDict({"lin": lin})
    model.register_parameter("token", token)

    def forward(x: Tensor, on: Tensor) -> Tensor:
        keep = on[..., None].to(x.dtype)
        y = torch.where(on[..., None], token, x) + (x * (1 - keep) + token * keep)
        z = x.clone()
        z[on] = token[0, 0]
        return loss(lin(y + z))

    return model, forward, (torch.randn(B, 3, 4), torch.rand(B, 3) < 0.5)


@case()
def filled_in_place(B: int):
    """A parameter copied into a slice of a buffer of the examples."""
    start, lin = nn.Parameter(torch.randn(4)), nn.Linear(4, 3)

    def forward(x: Tensor) -> Tensor:
        buffer = x.new_zeros(x.shape[0], 4, 4)
        buffer[:, 0] = start
        buffer[:, 1:] = x
        buffer[:, 2] *= start
        return loss(lin(buffer))

    return {"start": start, **dict(lin.named_parameters())}, forward, (torch.randn(B, 3, 4),)


@case()
def prelu(B: int):
    """nn.PReLU with one slope and with one per channel."""
    model = nn.ModuleList([nn.PReLU(), nn.PReLU(3, init=0.1)])
    return model, lambda x: loss(model[1](model[0](x) - 0.2)), (torch.randn(B, 3, 4),)


@case(rule=True)
def temperature(B: int):
    """Logits times exp(t), plus a scalar: parameters without dimensions."""
    lin, t, b = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(-0.1))
    named = {**dict(lin.named_parameters()), "t": t, "b": b}

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(lin(x) * t.exp() + b * x[:, :3], y, reduction="none")

    return named, forward, (torch.randn(B, 4), torch.randint(3, (B,)))


@case()
def squeeze_and_excite(B: int):
    """Gates per channel from the pooled example."""
    conv, gate = nn.Conv2d(2, 4, 1), nn.Linear(4, 4)

    def forward(x: Tensor) -> Tensor:
        h = conv(x)
        return loss(h * gate(h.mean((2, 3))).sigmoid()[:, :, None, None])

    return nn.ModuleList([conv, gate]), forward, (torch.randn(B, 2, 3, 3),)


@case()
def film(B: int):
    """Scale and shift predicted from a condition of each example."""
    net, cond = nn.Linear(4, 5), nn.Linear(3, 10)

    def forward(x: Tensor, c: Tensor) -> Tensor:
        scale, shift = cond(c)[:, None].chunk(2, -1)
        return loss(net(x) * (1 + scale) + shift)

    return nn.ModuleList([net, cond]), forward, (torch.randn(B, 3, 4), torch.randn(B, 3))
