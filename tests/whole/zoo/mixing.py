"""Examples that influence each other: refused by default, exact with on_mixing="exact"."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import case, loss


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@case(batch=(3,), mixes="yes")
def batch_norm_train(B: int):
    """Statistics of the batch."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    nn.init.normal_(model[1].weight)
    return model, lambda x: loss(model(x)), (torch.randn(B, 4),)


@case(batch=(3,), mixes="yes")
def batch_norm_train_convolutional(B: int):
    """The same in a convolutional network."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
    )
    return model, lambda x: loss(model(x)), (torch.randn(B, 1, 3, 3),)


class ResidualBlock(nn.Module):
    """A residual block whose last batch norm starts with gamma = `gamma`."""

    def __init__(self, gamma: float):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 1)
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)
        nn.init.constant_(self.bn2.weight, gamma)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.head((x + y).relu().mean((2, 3)))


@case(batch=(3,), mixes="yes")
def residual_block_zero_gamma(B: int):
    """Zero-initialised gamma: nothing below it has a gradient yet, and yet it mixes."""
    model = ResidualBlock(0.0)
    return model, lambda x: loss(model(x)), (torch.randn(B, 1, 3, 3),)


@case(batch=(3,), mixes="yes")
def residual_block_live_gamma(B: int):
    """The same once gamma has become non-zero."""
    model = ResidualBlock(0.5)
    return model, lambda x: loss(model(x)), (torch.randn(B, 1, 3, 3),)


@case(batch=(2, 3), mixes="yes")
def simclr(B: int):
    """One tower, two views of each example, all other views as negatives."""
    model = net()

    def forward(a: Tensor, b: Tensor) -> Tensor:
        z = F.normalize(model(torch.cat([a, b])), dim=1)
        n = a.shape[0]
        scores = (z @ z.t() / 0.5).masked_fill(torch.eye(2 * n, dtype=torch.bool), -1e30)
        partner = torch.arange(2 * n).roll(n)
        each = F.cross_entropy(scores, partner, reduction="none")
        return each[:n] + each[n:]

    return model, forward, (torch.randn(B, 4), torch.randn(B, 4))


def clip_model() -> nn.Module:
    model = nn.ModuleDict({"image": net(), "text": net()})
    model.register_parameter("scale", nn.Parameter(torch.tensor(0.7)))
    return model


@case(batch=(2, 3), mixes="yes")
def clip_both_directions(B: int):
    """Two towers and a learned temperature."""
    model = clip_model()

    def forward(a: Tensor, b: Tensor) -> Tensor:
        scores = model["image"](a) @ model["text"](b).t() * model.scale.exp()
        y = torch.arange(a.shape[0])
        return 0.5 * (
            F.cross_entropy(scores, y, reduction="none")
            + F.cross_entropy(scores.t(), y, reduction="none")
        )

    return model, forward, (torch.randn(B, 4), torch.randn(B, 4))


@case(batch=(2, 3), mixes="yes")
def clip_one_direction(B: int):
    """Only images choose among texts: the image tower's rows are separate, the text tower's not."""
    model = clip_model()

    def forward(a: Tensor, b: Tensor) -> Tensor:
        scores = model["image"](a) @ model["text"](b).t() * model.scale.exp()
        return F.cross_entropy(scores, torch.arange(a.shape[0]), reduction="none")

    return model, forward, (torch.randn(B, 4), torch.randn(B, 4))


@case(batch=(2, 3), mixes="yes")
def softmax_over_the_batch(B: int):
    """Weights of the examples that sum to one over the batch."""
    model, gate = net(), nn.Linear(4, 1)

    def forward(x: Tensor) -> Tensor:
        return loss(model(x)) * gate(x).squeeze(1).softmax(0)

    return nn.ModuleDict({"net": model, "gate": gate}), forward, (torch.randn(B, 4),)


@case(batch=(2, 3), mixes="yes")
def centred_by_the_batch(B: int):
    """x - x.mean(0), between two layers."""
    a, b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(x: Tensor) -> Tensor:
        h = a(x)
        return loss(b((h - h.mean(0)).tanh()))

    return nn.ModuleList([a, b]), forward, (torch.randn(B, 4),)


@case(batch=(2, 3), mixes="yes")
def attention_between_examples(B: int):
    """The batch is attended over, as by a retrieval layer or by a wrong batch_first."""
    model = nn.MultiheadAttention(4, 2)

    def forward(x: Tensor) -> Tensor:
        return loss(model(x, x, x)[0])

    return model, forward, (torch.randn(B, 3, 4),)


@case(batch=(2, 3), mixes="yes")
def neighbours_in_the_batch(B: int):
    """x - x.roll(1, 0): every example depends on one other."""
    a, b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(x: Tensor) -> Tensor:
        h = a(x)
        return loss(b(h * h.roll(1, 0)))

    return nn.ModuleList([a, b]), forward, (torch.randn(B, 4),)


@case(batch=(2, 3), mixes="yes")
def losses_relative_to_their_mean(B: int):
    """losses - losses.mean(), squared: mixed from the very top."""
    model = net()

    def forward(x: Tensor) -> Tensor:
        each = loss(model(x))
        return (each - each.mean()).square()

    return model, forward, (torch.randn(B, 4),)


@case(batch=(2, 3), mixes="yes")
def embedding_sparse_below_a_mean(B: int):
    """As above, with sparse=True: autograd's own gradients are sparse tensors."""
    emb = nn.Embedding(6, 3, sparse=True)

    def forward(ids: Tensor) -> Tensor:
        each = loss(emb(ids).tanh())
        return (each - each.mean()).square()

    return emb, forward, (torch.randint(6, (B, 4)),)


@case(batch=(2, 3), mixes="maybe")
def auxiliary_loss_of_the_batch(B: int):
    """A balancing term averaged over the batch, added to each example's loss."""
    a, b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(x: Tensor) -> Tensor:
        h = a(x)
        use = h.softmax(-1).mean(0)
        return loss(b(h.tanh())) + 0.1 * (use * use.log()).sum()

    return nn.ModuleList([a, b]), forward, (torch.randn(B, 4),)


@case(batch=(2, 3), mixes="yes")
def regularised_covariance(B: int):
    """Per-example errors scaled by a covariance of the batch (whitening)."""
    a, b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(x: Tensor) -> Tensor:
        h = a(x)
        cov = h.t() @ h / h.shape[0] + torch.eye(3)
        return loss(b(torch.linalg.solve(cov, h.t()).t()))

    return nn.ModuleList([a, b]), forward, (torch.randn(B, 4),)


@case(batch=(2, 3), mixes="yes")
def class_token_joined_then_centred(B: int):
    """A class token copied to each example beside its data, less the mean over the batch."""
    token, layer = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 3)

    def forward(x: Tensor) -> Tensor:
        h = torch.cat([token.expand(len(x), 1, 4), x], 1)
        return loss(layer((h - h.mean(0)).tanh()))

    return {"token": token, **dict(layer.named_parameters())}, forward, (torch.randn(B, 2, 4),)


@case(batch=(2, 3), mixes="maybe")
def kernel_of_joined_points(B: int):
    """A Gaussian process of the batch itself: its points stand beside inducing ones."""
    z, scale = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.rand(4) + 0.5)

    def forward(x: Tensor) -> Tensor:
        a = torch.cat([z, x]) * scale
        k = torch.exp(-0.5 * (a[:, None] - a[None]).square().sum(-1))
        return torch.linalg.solve(k + 0.1 * torch.eye(len(a)), x.new_ones(len(a)))[2:].square()

    return {"z": z, "scale": scale}, forward, (torch.randn(B, 4),)
