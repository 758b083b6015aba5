"""One parameter used several times, not at all, or by some of the examples only."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.registry import case, loss


@case(rule=True)
def tied_embedding_and_head(B: int):
    """Lookup and product with one weight: cross terms between sparse rows and a dense factor."""
    emb, mid = nn.Embedding(6, 4), nn.Linear(4, 4)

    def forward(ids: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(mid(emb(ids)).tanh(), emb.weight)
        return F.cross_entropy(logits.transpose(1, 2), y, reduction="none").mean(1)

    data = (torch.randint(6, (B, 3)), torch.randint(6, (B, 3)))
    return nn.ModuleList([emb, mid]), forward, data


@case(rule=True)
def tied_autoencoder(B: int):
    """W and W.t()."""
    W, b = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(5))

    def forward(x: Tensor) -> Tensor:
        return (F.linear(F.linear(x, W).tanh(), W.t(), b) - x).square().sum(1)

    return {"W": W, "b": b}, forward, (torch.randn(B, 5),)


@case(rule=True)
def tied_autoencoder_3d(B: int):
    """W and W.t() on several positions each."""
    W = nn.Parameter(torch.randn(3, 5))

    def forward(x: Tensor) -> Tensor:
        return loss(F.linear(F.linear(x, W).tanh(), W.t()))

    return {"W": W}, forward, (torch.randn(B, 3, 5),)


@case(rule=True)
def called_twice(B: int):
    """A module called twice in a row: its gradient is a sum of two uses."""
    layer, head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(x: Tensor) -> Tensor:
        return loss(head(layer(layer(x).tanh()).tanh()))

    return nn.ModuleList([layer, head]), forward, (torch.randn(B, 4),)


@case(rule=True)
def called_with_other_shapes(B: int):
    """A module called on (B, T, d) and on (B, d)."""
    layer = nn.Linear(4, 4)

    def forward(x: Tensor) -> Tensor:
        return loss(layer(layer(x).tanh().mean(1)))

    return layer, forward, (torch.randn(B, 3, 4),)


@case(rule=True)
def shared_by_reference(B: int):
    """b.weight is a.weight: two modules, one tensor; the biases are their own."""
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight

    def forward(x: Tensor) -> Tensor:
        return loss(b(a(x).tanh()))

    return nn.ModuleList([a, b]), forward, (torch.randn(B, 3, 4),)


@case(rule=True)
def two_views_of_one_weight(B: int):
    """Slices of one tensor, used in two places."""
    W = nn.Parameter(torch.randn(7, 4))

    def forward(x: Tensor) -> Tensor:
        h = F.linear(x, W[:4]).tanh()
        return loss(F.linear(h, W[3:]))  # row 3 in both

    return [W], forward, (torch.randn(B, 3, 4),)


@case(rule=True)
def siamese(B: int):
    """Two inputs of each example through one network, one after the other."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return (net(x) - net(y)).square().sum(1)

    return net, forward, (torch.randn(B, 4), torch.randn(B, 4))


@case()
def chosen_and_rejected(B: int):
    """Pairs concatenated to one batch of 2B rows, then split: row r belongs to example r mod B."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(x: Tensor, y: Tensor) -> Tensor:
        good, bad = net(torch.cat([x, y])).squeeze(1).chunk(2)
        return -F.logsigmoid(good - bad)

    return net, forward, (torch.randn(B, 4), torch.randn(B, 4))


@case(batch=(1, 3))
def interleaved_pairs(B: int):
    """Pairs in neighbouring rows of one batch: row r belongs to example r // 2."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(x: Tensor) -> Tensor:  # (B, 2, d)
        scores = net(x.flatten(0, 1)).squeeze(1)
        return -F.logsigmoid(scores[0::2] - scores[1::2])

    return net, forward, (torch.randn(B, 2, 4),)


@case()
def unused_parameter(B: int):
    """A layer that never runs: its rows are zero."""
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    return model, lambda x: loss(model["used"](x)), (torch.randn(B, 4),)


@case(rule=True)
def frozen_parameters(B: int):
    """A frozen layer in the middle, a frozen bias, a frozen weight with a live bias."""
    model = nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 3)
    )
    model[2].requires_grad_(False)
    model[4].weight.requires_grad_(False)
    model[5].bias.requires_grad_(False)
    return model, lambda x: loss(model(x)), (torch.randn(B, 3, 4),)


@case(rule=True)
def frozen_below(B: int):
    """Only the head is trained."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    return model, lambda x: loss(model(x)), (torch.randn(B, 4),)


@case(rule=True)
def frozen_above(B: int):
    """Only the first layer is trained, through a frozen head."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].requires_grad_(False)
    return model, lambda x: loss(model(x)), (torch.randn(B, 3, 4),)


@case(rule=True)
def some_of_the_parameters(B: int):
    """Asked about the middle layer alone, though all require grad."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    return model[2], lambda x: loss(model(x)), (torch.randn(B, 4),)


@case()
def used_by_some_masked(B: int):
    """A branch multiplied by 0 for some examples: their rows are zero there."""
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(x: Tensor, on: Tensor) -> Tensor:
        return loss(a(x) + b(x) * on[:, None])

    on = (torch.arange(B) % 2).to(torch.get_default_dtype())
    return nn.ModuleList([a, b]), forward, (torch.randn(B, 4), on)


@case()
def used_by_some_indexed(B: int):
    """A branch that runs for a subset of the rows."""
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(x: Tensor, on: Tensor) -> Tensor:
        out = a(x)
        rows = on.nonzero().squeeze(1)
        return loss(out.index_add(0, rows, b(x[rows])))

    return nn.ModuleList([a, b]), forward, (torch.randn(B, 4), torch.arange(B) % 2 == 0)


@case()
def used_by_some_boolean(B: int):
    """The same by boolean mask and masked assignment in place."""
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(x: Tensor, on: Tensor) -> Tensor:
        out = a(x)
        out[on] = b(x[on]).tanh()
        return loss(out)

    return nn.ModuleList([a, b]), forward, (torch.randn(B, 4), torch.arange(B) % 2 == 1)


@case()
def used_by_some_in_python(B: int):
    """if and else for each example."""
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(x: Tensor, on: Tensor) -> Tensor:
        rows = [
            a(row) if flag else b(a(row)[:, [0, 1, 2, 0]]) for row, flag in zip(x, on, strict=True)
        ]
        return loss(torch.stack(rows)) if rows else x.sum((1, 2)) * a.bias.sum()

    return nn.ModuleList([a, b]), forward, (torch.randn(B, 2, 4), torch.arange(B) % 2 == 1)


@case(rule=True)
def dead_relu(B: int):
    """The second example's units are all dead: its norm is exactly zero."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1, bias=False))
    x = torch.randn(B, 4)

    def forward(x: Tensor, shift: Tensor) -> Tensor:
        return model[2](model[1](model[0](x) + shift)).squeeze(1)

    shift = torch.tensor([0.0, -100.0, 0.0])[:B, None]
    return model, forward, (x, shift)


@case()
def zero_losses(B: int):
    """Hinge losses, zero for some examples, or weights of zero."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return (model(x).squeeze(1).square() * w - 1e-3 * (w == 0)).clamp(min=0)

    return model, forward, (torch.randn(B, 4), torch.tensor([1.0, 0.0, 2.0])[:B])


@case()
def all_gradients_zero(B: int):
    """No example has a gradient."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
    return model, lambda x: model(x).squeeze(1) * 0.0, (torch.randn(B, 4),)


@case()
def detached_for_some(B: int):
    """Some examples are detached from the graph, by where."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(x: Tensor, on: Tensor) -> Tensor:
        out = model(x)
        return loss(torch.where(on[:, None], out, out.detach()))

    return model, forward, (torch.randn(B, 4), torch.arange(B) % 2 == 0)


# -- ways from the outputs to the losses -----------------------------------------------------------


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@case()
def permuted_losses(B: int):
    """losses[perm]: row r of every layer belongs to example perm.index(r)."""
    model = net()
    perm = torch.tensor([2, 0, 1])[:B] if B == 3 else torch.arange(B)
    x = torch.randn(B, 3, 4)

    def forward(x: Tensor) -> Tensor:
        return loss(model(x))[perm]

    return model, forward, (x,), lambda i: loss(model(x[perm[i : i + 1]]))


@case()
def permuted_inputs(B: int):
    """The rows are shuffled, go through the model, and are shuffled back."""
    model = net()

    def forward(x: Tensor) -> Tensor:
        perm = torch.randperm(x.shape[0])
        return loss(model(x[perm])[perm.argsort()])

    return model, forward, (torch.randn(B, 4),)


@case()
def flipped_batch(B: int):
    """flip along the examples."""
    model, x = net(), torch.randn(B, 3, 4)

    def forward(x: Tensor) -> Tensor:
        return loss(model(x).flip(0))

    return model, forward, (x,), lambda i: loss(model(x[[B - 1 - i]]))


@case()
def rolled_batch(B: int):
    """roll along the examples."""
    model, x = net(), torch.randn(B, 4)

    def forward(x: Tensor) -> Tensor:
        return loss(model(x).roll(1, 0))

    return model, forward, (x,), lambda i: loss(model(x[[i - 1]]))


@case(batch=(0, 1, 3, 4))
def rolled_and_flipped_features(B: int):
    """roll and flip along positions and features: the owner stays."""
    model = net()

    def forward(x: Tensor) -> Tensor:
        h = model[0](x).roll(1, 1).flip(2)
        return loss(model[2](h.roll(2, -1)).roll(-1, (1,)))

    return model, forward, (torch.randn(B, 4, 4),)


@case(batch=(0, 1, 3, 4))
def views_splits_and_gathers(B: int):
    """Through view, split, unbind, cat, stack, narrow, gather, index, unfold and pad."""
    model = nn.ModuleList([nn.Linear(4, 6), nn.Linear(3, 4), nn.Linear(4, 2)])

    def forward(x: Tensor, pick: Tensor) -> Tensor:  # (B, 4, 4)
        a, b = model[0](x).view(x.shape[0], 4, 2, 3).unbind(2)
        h = torch.cat([model[1](a), model[1](b)], 1).tanh()  # (B, 8, 4)
        first, second = h.split([5, 3], 1)
        h = torch.stack([first[:, 1:4], second], 3).flatten(2)  # (B, 3, 8)
        h = F.pad(h, (1, 1), value=0.5).unfold(2, 4, 3)  # (B, 3, 3, 4)
        h = h.gather(1, pick[:, :, None, None].expand(-1, -1, 3, 4))
        return loss(model[2](h[:, [1, 0, 1]].narrow(2, 1, 2)))

    return model, forward, (torch.randn(B, 4, 4), torch.randint(3, (B, 3)))


@case()
def last_token_by_length(B: int):
    """x[arange(B), length]: advanced indexing along examples and positions together."""
    model = nn.ModuleList([nn.Linear(4, 5), nn.Linear(5, 3)])

    def forward(x: Tensor, n: Tensor) -> Tensor:
        h = model[0](x).tanh()
        return loss(model[1](h[torch.arange(x.shape[0]), n]))

    return model, forward, (torch.randn(B, 4, 4), torch.randint(4, (B,)))


@case()
def maxima_and_sorting(B: int):
    """max, topk, sort, cumsum and median along positions."""
    model = net()

    def forward(x: Tensor) -> Tensor:
        h = model(x)
        top = h.topk(2, dim=1).values.cumsum(1)
        return loss(torch.cat([top, h.sort(dim=1).values, h.amax(1, keepdim=True)], 1))

    return model, forward, (torch.randn(B, 4, 4),)


@case()
def python_loop(B: int):
    """Losses computed one by one and stacked; the weights are used B times."""
    model = net()

    def forward(x: Tensor) -> Tensor:
        each = [loss(model(row[None]))[0] for row in x]
        return torch.stack(each) if each else loss(model(x))

    return model, forward, (torch.randn(B, 3, 4),)


@case()
def python_loop_of_lengths(B: int):
    """Examples of different lengths, one by one."""
    model = net()
    lengths = [3, 1, 2][:B]

    def forward(x: Tensor, n: Tensor) -> Tensor:
        each = [loss(model(row[: int(k)])[None].sum(1)) for row, k in zip(x, n, strict=True)]
        return torch.cat(each) if each else loss(model(x))

    return model, forward, (torch.randn(B, 3, 4), torch.tensor(lengths, dtype=torch.long))


@case()
def two_halves(B: int):
    """The batch in two forward passes, their losses put together."""
    model = net()

    def forward(x: Tensor) -> Tensor:
        middle = (x.shape[0] + 1) // 2
        return torch.cat([loss(model(x[:middle])), loss(model(x[middle:]))])

    return model, forward, (torch.randn(B, 4),)


@case()
def masked_mean_of_tokens(B: int):
    """A sum over the tokens that count, divided by their number."""
    model = net()

    def forward(x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        each = F.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
        return each.masked_fill(~mask, 0.0).sum(1) / mask.sum(1).clamp(min=1)

    mask = torch.arange(4)[None] < torch.tensor([4, 0, 2])[:B, None]
    return model, forward, (torch.randn(B, 4, 4), torch.randint(3, (B, 4)), mask)


@case(rule=True)
def losses_with_a_plain_sum(B: int):
    """A term that needs no gradient, a detached one, and a factor of -1 and 1e-6."""
    model = net()

    def forward(x: Tensor, w: Tensor) -> Tensor:
        out = loss(model(x))
        return x.sum(1) + out * w + out.detach().exp().sin()

    return model, forward, (torch.randn(B, 4), torch.tensor([1.0, -1.0, 1e-6])[:B])


@case()
def losses_in_place(B: int):
    """In-place ops and slices assigned to a buffer."""
    model = net()

    def forward(x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], 3, 4)
        out[:, :, 1:] = model(x)
        out[:, 0].mul_(2.0)
        out.add_(0.1).sin_()
        return loss(out)

    return model, forward, (torch.randn(B, 3, 4),)


@case()
def gradient_as_a_loss(B: int):
    """A loss made of a gradient (a gradient penalty): the graph holds backward ops."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return (g.square().sum(1) + 1e-3).sqrt() + model(x).squeeze(1)

    return model, forward, (torch.randn(B, 4),)
