"""Weights computed from parameters, custom functions, dropout, checkpointing."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from zoo.registry import case, loss


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.7)


@case()
def functions_of_weights(B: int):
    """exp, sigmoid, clamp, 1 + w, rsub, square, softmax, cumsum, tril of parameters."""
    p = {n: weights(4, 4) for n in ("exp", "sigmoid", "clamp", "plus", "soft", "tril")}
    p |= {"steps": weights(4), "mix": weights(3)}

    def forward(x: Tensor) -> Tensor:
        x = (x @ (-p["exp"].exp())).tanh() @ p["sigmoid"].sigmoid()
        x = F.linear(x, p["clamp"].clamp(-0.5, 0.5)) * (1 + p["plus"])[0] + (2 - p["plus"][1])
        x = x @ p["soft"].softmax(-1) + x @ p["tril"].tril()
        x = (x - F.softplus(p["steps"]).cumsum(0)).tanh()
        mix = p["mix"].softmax(0)
        return loss(mix[0] * x + mix[1] * x.sin() + mix[2] * x.square())

    return p, forward, (torch.randn(B, 3, 4),)


@case()
def rearranged_weights(B: int):
    """roll, flip, permute, repeat, cat, stack, index, pad and a copy of parameters."""
    p = {"a": weights(4, 4), "b": weights(2, 4), "c": weights(2, 4), "d": weights(4, 2, 2)}
    p["last"] = weights(4, 4)

    def forward(x: Tensor) -> Tensor:
        x = (x @ p["a"].roll(1, 0).flip(1)).tanh()
        x = F.linear(x, torch.cat([p["b"], p["c"]])).tanh()
        x = F.linear(x, torch.stack([p["b"], p["c"]], 1).flatten(0, 1)[[3, 0, 0, 1]]).tanh()
        x = x @ p["d"].permute(2, 0, 1).reshape(4, 4)
        x = x @ p["c"].repeat(2, 1) + x @ F.pad(p["b"], (0, 0, 1, 1))
        return loss(x @ p["last"].t().contiguous())

    return p, forward, (torch.randn(B, 3, 4),)


@case()
def weight_norm(B: int):
    """parametrizations.weight_norm."""
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(5, 3), dim=1),
    )  # fmt: skip
    return model, lambda x: loss(model(x)), (torch.randn(B, 3, 4),)


@case()
def weight_norm_old(B: int):
    """nn.utils.weight_norm, computed by a hook before each forward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    return model, lambda x: loss(model(x)), (torch.randn(B, 4),)


@case()
def weight_norm_conv(B: int):
    """Weight norm of a convolution."""
    model = parametrizations.weight_norm(nn.Conv2d(2, 3, 2))
    return model, lambda x: loss(model(x)), (torch.randn(B, 2, 3, 3),)


@case()
def spectral_norm_eval(B: int):
    """Divided by the largest singular value, in evaluation mode."""
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)
    )
    model.eval()
    return model, lambda x: loss(model(x)), (torch.randn(B, 4),)


@case()
def orthogonal(B: int):
    """A weight that is a matrix exponential."""
    model = parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="matrix_exp")
    return model, lambda x: loss(model(x)), (torch.randn(B, 2, 3),)


@case()
def pruned(B: int):
    """prune: W * mask; entries that are masked have no gradient."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    prune.random_unstructured(model[0], "weight", 0.5)
    prune.ln_structured(model[2], "weight", 0.4, n=2, dim=1)
    return model, lambda x: loss(model(x)), (torch.randn(B, 3, 4),)


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).transpose(-1, -2)


@case()
def parametrised(B: int):
    """parametrize: a symmetric weight."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    return model, lambda x: loss(model(x)), (torch.randn(B, 4),)


@case()
def lora_merged(B: int):
    """W + s B A, with W frozen: a product of two parameters."""
    W, A, C = torch.randn(5, 4), weights(2, 4), weights(5, 2)
    head = nn.Linear(5, 3)

    def forward(x: Tensor) -> Tensor:
        return loss(head(F.linear(x, W + 0.5 * C @ A).tanh()))

    return {"A": A, "C": C, **dict(head.named_parameters())}, forward, (torch.randn(B, 3, 4),)


@case(rule=True)
def lora_beside(B: int):
    """x W + s (x A) B, with W frozen."""
    W, A, C = nn.Parameter(torch.randn(5, 4), requires_grad=False), weights(2, 4), weights(5, 2)

    def forward(x: Tensor) -> Tensor:
        return loss((F.linear(x, W) + 0.5 * F.linear(F.linear(x, A), C)).tanh())

    return {"W": W, "A": A, "C": C}, forward, (torch.randn(B, 3, 4),)


@case()
def low_rank_and_live(B: int):
    """W + A B with all three trained, and A used once more by itself."""
    W, A, C = weights(4, 4), weights(2, 4), weights(4, 2)

    def forward(x: Tensor) -> Tensor:
        h = F.linear(x, W + C @ A).tanh()
        return loss(F.linear(h, A))

    return {"W": W, "A": A, "C": C}, forward, (torch.randn(B, 3, 4),)


@case()
def weights_summed(B: int):
    """One weight is the sum of two, the other a scaled copy: one use, two parameters."""
    a, b, s = weights(3, 4), weights(3, 4), nn.Parameter(torch.tensor(0.7))

    def forward(x: Tensor) -> Tensor:
        return loss(F.linear(F.linear(x, a + b).tanh(), (a * s).t()))

    return {"a": a, "b": b, "s": s}, forward, (torch.randn(B, 3, 4),)


@case()
def hypernetwork(B: int):
    """A network on constants makes the weights of another."""
    codes = torch.randn(3, 2)
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 5))

    def forward(x: Tensor) -> Tensor:
        made = net(codes)  # (3, 5)
        return loss(F.linear(x, made[:, :4], made[:, 4]))

    return net, forward, (torch.randn(B, 2, 4),)


@case()
def hypernetwork_of_the_example(B: int):
    """The weights are made from each example: no use of theirs is parameter-only."""
    net = nn.Linear(3, 8)

    def forward(x: Tensor, c: Tensor) -> Tensor:
        return loss(torch.bmm(x, net(c).view(-1, 4, 2)))

    return net, forward, (torch.randn(B, 3, 4), torch.randn(B, 3))


@case()
def latents_per_example(B: int):
    """A parameter (B, d) whose row b is example b's own input."""
    z, dec = nn.Parameter(torch.randn(B, 3)), nn.Linear(3, 4)

    def forward(x: Tensor, which: Tensor) -> Tensor:
        mine = z if x.shape[0] == B else z[which]
        return (dec(mine).tanh() - x).square().sum(1)

    return {"z": z, **dict(dec.named_parameters())}, forward, (torch.randn(B, 4), torch.arange(B))


@case()
def latents_by_lookup(B: int):
    """The same through nn.Embedding, in another order."""
    z, dec = nn.Embedding(B + 2, 3), nn.Linear(3, 4)

    def forward(x: Tensor, which: Tensor) -> Tensor:
        return (dec(z(which)).tanh() - x).square().sum(1)

    return nn.ModuleList([z, dec]), forward, (torch.randn(B, 4), torch.arange(B).flip(0) + 1)


@case()
def losses_of_latents_alone(B: int):
    """The losses depend on a parameter (B, d) and nothing else."""
    z = nn.Parameter(torch.randn(B, 3))
    return {"z": z}, lambda: loss(z.sin()), (), lambda i: loss(z[i : i + 1].sin())


@case()
def scalar_per_example(B: int):
    """A parameter (B,) of weights, one for each example's loss."""
    w, lin = nn.Parameter(torch.rand(B)), nn.Linear(4, 3)

    def forward(x: Tensor, which: Tensor) -> Tensor:
        mine = w if x.shape[0] == B else w[which]
        return loss(lin(x)) * mine.exp()

    return {"w": w, **dict(lin.named_parameters())}, forward, (torch.randn(B, 4), torch.arange(B))


@case()
def losses_are_a_parameter(B: int):
    """The losses are the parameter itself, times one."""
    w = nn.Parameter(torch.rand(B))
    return {"w": w}, lambda: w * 1.0, (), lambda i: w[i : i + 1] * 1.0


@case()
def weight_decay_term(B: int):
    """wd * |W|^2, added to every example's loss."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(x: Tensor) -> Tensor:
        decay = sum(p.square().sum() for p in model.parameters())
        return loss(model(x)) + 0.1 * decay

    return model, forward, (torch.randn(B, 3, 4),)


@case()
def prior_alone(B: int):
    """Some parameters appear only in a term that all examples share."""
    lin, scale = nn.Linear(4, 3), nn.Parameter(torch.randn(3))

    def forward(x: Tensor) -> Tensor:
        shared = scale.square().sum().expand(x.shape[0])
        return loss(lin(x)) + shared * (1 + x[:, 0].square())

    return {"scale": scale, **dict(lin.named_parameters())}, forward, (torch.randn(B, 4),)


@case()
def variational(B: int):
    """mu + exp(rho) * eps, the same weights for all examples, and a Kullback-Leibler term."""
    mu, rho = weights(3, 4), weights(3, 4)

    def forward(x: Tensor) -> Tensor:
        w = mu + (0.3 * rho).exp() * torch.randn(3, 4)
        kl = (mu.square() + (0.6 * rho).exp() - 0.6 * rho).sum()
        return loss(F.linear(x, w)) + 0.01 * kl

    return {"mu": mu, "rho": rho}, forward, (torch.randn(B, 4),)


# -- custom functions ------------------------------------------------------------------------------


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s + x * s * (1 - s))


class Product(torch.autograd.Function):
    """x @ W.t() + b, with an output more that nobody uses and an argument that is no tensor."""

    @staticmethod
    def forward(ctx, x, W, scale, b):
        ctx.save_for_backward(x, W)
        ctx.scale = scale
        out = scale * (x @ W.t()) + b
        return out, out.square()

    @staticmethod
    def backward(ctx, g, _):
        x, W = ctx.saved_tensors
        rows = g.flatten(0, -2)
        return ctx.scale * g @ W, ctx.scale * rows.t() @ x.flatten(0, -2), None, rows.sum(0)


class Shuffle(torch.autograd.Function):
    """Rows in reverse order."""

    @staticmethod
    def forward(ctx, x):
        return x.flip(0)

    @staticmethod
    def backward(ctx, g):
        return g.flip(0)


@case()
def custom_elementwise(B: int):
    """A custom function between two layers."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))

    def forward(x: Tensor) -> Tensor:
        return loss(model[1](Swish.apply(model[0](x))))

    return model, forward, (torch.randn(B, 3, 4),)


@case()
def custom_with_weight(B: int):
    """A custom function that holds a weight and a bias, above and below ordinary layers."""
    below, above, W, b = nn.Linear(4, 4), nn.Linear(5, 2), weights(5, 4), weights(5)
    model = nn.ModuleList([below, above])
    model.register_parameter("W", W)
    model.register_parameter("b", b)

    def forward(x: Tensor) -> Tensor:
        return loss(above(Product.apply(below(x).tanh(), W, 0.5, b)[0].tanh()))

    return model, forward, (torch.randn(B, 3, 4),)


@case()
def custom_permuting(B: int):
    """A custom function that reverses the batch, between two layers, and once more at the end."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    x = torch.randn(B, 3, 4)

    def forward(x: Tensor) -> Tensor:
        return Shuffle.apply(loss(model[1](Shuffle.apply(model[0](x)).tanh()))).flip(0)

    return model, forward, (x,), lambda i: forward(x[[B - 1 - i]])


@case()
def custom_of_a_weight(B: int):
    """A custom function of a parameter alone: straight-through rounding."""
    W = weights(3, 4)

    def forward(x: Tensor) -> Tensor:
        return loss(F.linear(x, Swish.apply(W)))

    return [W], forward, (torch.randn(B, 3, 4),)


# -- randomness and recomputation ------------------------------------------------------------------


@case(deterministic=False)
def dropout(B: int):
    """Dropout in training mode: the mask that was drawn counts, in every verb."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Tanh(), nn.Linear(6, 3))
    return model, lambda x: loss(model(x)), (torch.randn(B, 3, 4),)


@case(deterministic=False, batch=(3, 4))
def dropout_of_weights(B: int):
    """DropConnect, the same mask for all examples, and dropout of whole examples."""
    W, V = weights(5, 4), weights(3, 5)

    def forward(x: Tensor) -> Tensor:
        h = F.linear(x, F.dropout(W, 0.5)).tanh()
        keep = (torch.rand(x.shape[0], 1, 1) < 0.9).to(x.dtype)
        return loss(F.linear(h, V) * keep + x[..., :3])

    return {"W": W, "V": V}, forward, (torch.randn(B, 3, 4),)


@case(deterministic=False, batch=(1, 3, 4))
def encoder_layer_with_dropout(B: int):
    """nn.TransformerEncoderLayer in training mode."""
    model = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
    return model, lambda x: loss(model(x)), (torch.randn(B, 4, 4),)


@case()
def checkpointed(B: int):
    """Activation checkpointing: what a node has saved may be unpacked once."""
    blocks = nn.ModuleList(
        [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4)) for _ in range(2)]
    )
    head = nn.Linear(4, 3)

    def forward(x: Tensor) -> Tensor:
        for block in blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return loss(head(x))

    return nn.ModuleList([*blocks, head]), forward, (torch.randn(B, 3, 4),)


@case()
def checkpointed_with_norms_and_lookups(B: int):
    """Lookups, layer norm, a class token and a convolution inside a checkpoint."""
    emb, norm, conv = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Conv1d(4, 3, 2)
    cls = nn.Parameter(torch.randn(1, 1, 4))
    model = nn.ModuleList([emb, norm, conv])
    model.register_parameter("cls", cls)

    def block(ids: Tensor) -> Tensor:
        h = torch.cat([cls.expand(ids.shape[0], -1, -1), emb(ids)], 1)
        return conv(norm(h).transpose(1, 2))

    def forward(ids: Tensor) -> Tensor:
        return loss(checkpoint(block, ids, use_reentrant=False))

    return model, forward, (torch.randint(6, (B, 3)),)


@case(deterministic=False, batch=(1, 3))
def checkpointed_dropout(B: int):
    """The recomputation draws the same mask, and leaves the generator alone."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.4), nn.Linear(6, 4))
    head = nn.Linear(4, 3)

    def forward(x: Tensor) -> Tensor:
        return loss(head(checkpoint(model, x, use_reentrant=False)))

    return nn.ModuleList([model, head]), forward, (torch.randn(B, 3, 4),)
