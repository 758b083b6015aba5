"""Linear layers and matrix products, in every form that they are written."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import case, loss


def weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.7)


@case(rule=True)
def mlp(B: int):
    """Linear layers, one row per example."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(B, 4), torch.randint(3, (B,))
    return model, lambda x, y: F.cross_entropy(model(x), y, reduction="none"), (x, y)


@case(rule=True)
def mlp_squared_error(B: int):
    """A last layer (B, 1) and a squared error: the last op is a squeeze, the output one wide."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
    x, y = torch.randn(B, 4), torch.randn(B, 1)
    return model, lambda x, y: (model(x) - y).square().squeeze(1), (x, y)


@case(rule=True)
def linear_only(B: int):
    """The losses are the view of one layer's output, with nothing between."""
    model = nn.Linear(4, 1)
    return model, lambda x: model(x).view(-1), (torch.randn(B, 4),)


@case(rule=True)
def linear_3d(B: int):
    """(B, T, d): the bias' gradient is a sum over positions before the square."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, lambda x: loss(model(x)), (torch.randn(B, 3, 4),)


@case(rule=True)
def linear_3d_no_bias(B: int):
    """(B, T, d) without bias goes through mm instead of addmm."""
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    return model, lambda x: loss(model(x)), (torch.randn(B, 3, 4),)


@case(rule=True)
def linear_4d(B: int):
    """(B, H, W, d)."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))
    return model, lambda x: loss(model(x)), (torch.randn(B, 2, 3, 4),)


@case(rule=True)
def linear_5d_strided(B: int):
    """Five dimensions, of a permuted tensor: no view makes rows of it."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))

    def forward(x: Tensor) -> Tensor:
        return loss(model(x.permute(0, 3, 1, 4, 2)))

    return model, forward, (torch.randn(B, 2, 4, 3, 2),)


@case()
def one_dimensional_in_a_loop(B: int):
    """Each example on its own through the layer, one-dimensional, then stacked."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(x: Tensor) -> Tensor:
        return loss(torch.stack([model(row) for row in x]) if len(x) else model(x))

    return model, forward, (torch.randn(B, 4),)


@case(batch=(0, 1, 3, 4), rule=True)
def linear_sequence_major(B: int):
    """(T, B, d): the rows of the layer are sequence-major, and T may be B."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(x: Tensor) -> Tensor:
        return loss(model(x.transpose(0, 1)).transpose(0, 1))

    return model, forward, (torch.randn(B, 4, 4),)


@case(batch=(0, 1, 3, 4), rule=True)
def linear_feature_major(B: int):
    """The layer works on a transposed tensor, over positions instead of features (a mixer)."""
    mix, out = nn.Linear(4, 4), nn.Linear(3, 2)

    def forward(x: Tensor) -> Tensor:
        return loss(out(mix(x.transpose(1, 2)).transpose(1, 2).tanh()))

    return nn.ModuleList([mix, out]), forward, (torch.randn(B, 4, 3),)


@case()
def linear_batch_in_the_middle(B: int):
    """(H, B, T, d): the examples' dimension is neither the first nor next to the last."""
    model = nn.Linear(4, 3)

    def forward(x: Tensor) -> Tensor:
        return loss(model(x.permute(1, 0, 2, 3)).tanh().permute(1, 0, 2, 3))

    return model, forward, (torch.randn(B, 2, 3, 4),)


@case()
def linear_of_expanded_input(B: int):
    """All positions of an example share their memory."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(x: Tensor) -> Tensor:
        steps = torch.arange(3.0)[None, :, None]
        return loss(model[1:](model[0](x[:, None].expand(-1, 3, -1)) * (1 + steps)))

    return model, forward, (torch.randn(B, 4),)


@case(rule=True)
def bare_matmul(B: int):
    """Parameters in no module: x @ W, F.linear(x, W, b)."""
    params = {"W": weights(4, 5), "V": weights(3, 5), "b": weights(3)}

    def forward(x: Tensor) -> Tensor:
        return loss(F.linear((x @ params["W"]).tanh(), params["V"], params["b"]))

    return params, forward, (torch.randn(B, 4),)


@case(rule=True)
def bare_matmul_3d(B: int):
    """x @ W and F.linear on (B, T, d); the parameters are a list, so their names are numbers."""
    W, V = weights(4, 5), weights(3, 5)

    def forward(x: Tensor) -> Tensor:
        return loss(F.linear((x @ W).tanh(), V))

    return [W, V], forward, (torch.randn(B, 3, 4),)


@case(rule=True)
def bare_matmul_transposed(B: int):
    """x @ W.t() and (W @ x.t()).t(): the weight on either side."""
    W, V = weights(5, 4), weights(3, 5)

    def forward(x: Tensor) -> Tensor:
        return loss((V @ (x @ W.t()).tanh().t()).t())

    return [W, V], forward, (torch.randn(B, 4),)


@case()
def einsum_forms(B: int):
    """einsum lowers to bmm, after permutations of both operands."""
    p = {"a": weights(4, 5), "b": weights(2, 5, 3), "c": weights(3, 3), "d": weights(6, 2, 3)}

    def forward(x: Tensor) -> Tensor:
        h = torch.einsum("btd,dh->bth", x, p["a"]).tanh()
        h = torch.einsum("bth,khe->btke", h, p["b"]).tanh()
        h = torch.einsum("ef,btkf->bkte", p["c"], h).tanh()  # the weight on the left
        return loss(torch.einsum("bkte,oke->bto", h, p["d"]))

    return p, forward, (torch.randn(B, 3, 4),)


@case()
def einsum_three_operands(B: int):
    """A bilinear form in one einsum."""
    W = weights(4, 3, 2)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.einsum("bi,ijk,bj->bk", x, W, y))

    return [W], forward, (torch.randn(B, 4), torch.randn(B, 3))


@case()
def einsum_without_sum(B: int):
    """An index of the weight that no sum runs over: a batched product of vectors."""
    W, v = weights(3, 4, 5), weights(3, 5)

    def forward(x: Tensor) -> Tensor:
        h = torch.einsum("btd,tdp->btp", x, W).tanh()
        return loss(torch.einsum("btp,tp->bt", h, v))

    return [W, v], forward, (torch.randn(B, 3, 4),)


@case(rule=True)
def matmul_weight_left(B: int):
    """W @ X with X (B, d, n): matmul expands the weight over the batch and calls bmm."""
    W, V = weights(5, 4), weights(2, 5)

    def forward(x: Tensor) -> Tensor:
        return loss(torch.matmul(V, torch.matmul(W, x).tanh()))

    return [W, V], forward, (torch.randn(B, 4, 3),)


@case()
def matmul_batched_weight(B: int):
    """x (B, H, T, d) @ W (H, d, p): a weight per head, expanded over the batch."""
    W = weights(2, 4, 5)
    return [W], lambda x: loss(torch.matmul(x, W)), (torch.randn(B, 2, 3, 4),)


@case()
def matmul_weight_with_unit_batch(B: int):
    """W (1, d, p): its own dimension of one is broadcast against the examples."""
    W = weights(1, 4, 5)
    return [W], lambda x: loss(torch.matmul(x, W)), (torch.randn(B, 3, 4),)


@case()
def bmm_per_head(B: int):
    """(H, B*T, d) with weights (H, d, p): the examples are in the middle of the rows."""
    W = weights(2, 4, 5)

    def forward(x: Tensor) -> Tensor:  # (B, T, H, d)
        n, T, H, d = x.shape
        out = torch.bmm(x.permute(2, 0, 1, 3).reshape(H, n * T, d), W)
        return loss(out.reshape(H, n, T, 5).permute(1, 2, 0, 3))

    return [W], forward, (torch.randn(B, 3, 2, 4),)


@case()
def bmm_expanded(B: int):
    """W.expand(B, d, p) written by hand."""
    W = weights(4, 5)

    def forward(x: Tensor) -> Tensor:
        return loss(torch.bmm(x, W.expand(x.shape[0], 4, 5)))

    return [W], forward, (torch.randn(B, 3, 4),)


@case()
def baddbmm_forms(B: int):
    """A bias per output inside the batched product, with factors on both."""
    W, b = weights(4, 5), weights(1, 1, 5)

    def forward(x: Tensor) -> Tensor:
        wide = W.expand(x.shape[0], 4, 5)
        return loss(torch.baddbmm(b, x, wide, beta=0.5, alpha=1.7))

    return {"W": W, "b": b}, forward, (torch.randn(B, 3, 4),)


@case()
def addmm_factors(B: int):
    """addmm with alpha and beta, and with a bias (1, p) or (p,)."""
    p = {"W": weights(4, 5), "b": weights(5), "V": weights(5, 3), "c": weights(1, 3)}

    def forward(x: Tensor) -> Tensor:
        h = torch.addmm(p["b"], x, p["W"], beta=2.0, alpha=0.3).tanh()
        return loss(torch.addmm(p["c"], h, p["V"], beta=-1.5))

    return p, forward, (torch.randn(B, 4),)


@case()
def vector_products(B: int):
    """mv, addmv, dot, inner, outer and addr."""
    p = {"w": weights(4), "b": weights(1), "u": weights(3), "v": weights(4), "A": weights(3, 4)}

    def forward(x: Tensor) -> Tensor:
        first = torch.addmv(p["b"], x, p["w"], beta=0.5, alpha=2.0) + torch.mv(x, p["v"])
        loops = [
            torch.dot(row, p["v"])
            + torch.outer(p["u"], row).sin().sum()
            + torch.addr(p["A"], p["u"], row).cos().sum()
            for row in x
        ]
        loops = torch.stack(loops) if loops else x.sum(1)
        return first.sin() + loops + torch.inner(x, p["A"]).square().sum(1)

    return p, forward, (torch.randn(B, 4),)


@case(batch=(1, 3))
def addbmm_and_tensordot(B: int):
    """addbmm sums over its batch, here positions; tensordot over two dimensions at once."""
    W, b, V = weights(3, 4, 5), weights(5), weights(3, 4, 2)

    def forward(x: Tensor) -> Tensor:  # (B, T, d)
        h = torch.addbmm(b, x.transpose(0, 1), W, beta=0.7, alpha=1.3)
        return loss(h) + loss(torch.tensordot(x, V, 2))

    return {"W": W, "b": b, "V": V}, forward, (torch.randn(B, 3, 4),)


@case()
def bilinear(B: int):
    """nn.Bilinear: two inputs meet one weight."""
    model = nn.Bilinear(4, 3, 2)
    return model, lambda x, y: loss(model(x, y)), (torch.randn(B, 4), torch.randn(B, 3))


@case()
def factorised_machine(B: int):
    """Pairwise interactions of features: a square of a sum less a sum of squares."""
    V, w, b = weights(4, 3), weights(4), weights(1)

    def forward(x: Tensor) -> Tensor:
        pairs = (x @ V).square().sum(1) - (x.square() @ V.square()).sum(1)
        return (b + x @ w + 0.5 * pairs).sin()

    return {"V": V, "w": w, "b": b}, forward, (torch.randn(B, 4),)


@case()
def distance_to_prototypes(B: int):
    """cdist to learned centres, an op whose batched backward is wrong in torch.vmap."""
    C = weights(5, 4)
    return {"C": C}, lambda x: loss(torch.cdist(x, C)), (torch.randn(B, 4),)


@case()
def cosine_classifier(B: int):
    """Normalised weights and a learned temperature."""
    W, t = weights(5, 4), nn.Parameter(torch.tensor(0.5))

    def forward(x: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(F.normalize(x, dim=1), F.normalize(W, dim=1)) * t.exp()
        return F.cross_entropy(logits, y, reduction="none")

    return {"W": W, "t": t}, forward, (torch.randn(B, 4), torch.randint(5, (B,)))


@case(rule=True)
def residual(B: int):
    """Branches that meet again, and an input that needs grad itself."""
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        h = x + a(x).tanh()
        return loss(h + b(h).tanh() * h)

    return nn.ModuleList([a, b]), forward, (torch.randn(B, 3, 4),)


@case()
def high_dimensional_output_unused(B: int):
    """Only a slice of a layer's output reaches the loss; another output is thrown away."""
    model, dead = nn.Linear(4, 6), nn.Linear(4, 3)

    def forward(x: Tensor) -> Tensor:
        dead(x)
        first, _, third = model(x).split(2, dim=-1)
        return loss(first * third)

    return nn.ModuleDict({"model": model, "dead": dead}), forward, (torch.randn(B, 3, 4),)
