"""`.grad` of tables looked up with `sparse=True` is sparse, as a plain backward pass leaves it."""

from collections.abc import Callable

import naive
import pytest
import torch
from helpers import assert_agrees
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pergrad

B = 5
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


class _Model(nn.Module):
    """Looked up once or twice, in bags or not; perhaps its table is the head as well."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        padding = 0 if kind == "padded" else None
        kind_of_table: Callable[..., nn.Module] = nn.EmbeddingBag if kind == "bag" else nn.Embedding
        self.table = kind_of_table(9, 3, sparse=True, padding_idx=padding)
        self.kind = kind
        self.head = nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        h = h if self.kind == "bag" else h.sum(1)
        if self.kind == "twice":
            h = h + self.table(ids[:, :1])[:, 0].sin()
        if self.kind == "one by one":
            h = torch.stack([self.table(row[: 1 + b % 3]).sum(0) for b, row in enumerate(ids)])
        if self.kind == "some":  # of the examples
            h = torch.cat([h[:2], torch.ones_like(h[2:])])
        out = self.head(h.tanh()).square().sum(1)
        return out + (h @ self.table.weight.T).square().sum(1) if self.kind == "tied" else out


KINDS = ("plain", "padded", "bag", "twice", "one by one", "some", "tied")


@DTYPES
@pytest.mark.parametrize("before", ["nothing", "zeros", "sparse"])
@pytest.mark.parametrize("kind", KINDS)
def test_as_a_plain_backward_pass(kind: str, before: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = _Model(kind).to(dtype)
    ids = torch.randint(9, (B, 4))
    c = torch.linspace(-1, 2, B, dtype=dtype)
    norms = naive.norms(naive.loop_grads(model(ids), model))

    def start() -> None:
        model.zero_grad()
        table = model.table.weight
        if before == "zeros":
            table.grad = torch.zeros_like(table)
        if before == "sparse":
            table.grad = torch.ones_like(table).to_sparse(1)

    start()
    (c * model(ids)).sum().backward()
    want = {name: p.grad for name, p in model.named_parameters()}
    start()
    got = pergrad.backward(model(ids), model, weights=c)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert_agrees(got, norms, norms, tolerance)
    for name, p in model.named_parameters():
        theirs = want[name]
        assert p.grad is not None
        assert theirs is not None
        assert p.grad.layout == theirs.layout
        assert p.grad.dtype == dtype
        scale = float((norms * c.abs()).sum()) + 1
        assert_agrees(p.grad.to_dense(), theirs.to_dense(), scale, tolerance, name)


def test_sparse_adam_takes_steps() -> None:
    torch.manual_seed(0)
    model, other = _Model("plain"), _Model("plain")
    other.load_state_dict(model.state_dict())
    ids = torch.randint(9, (B, 4))
    for net, run in (
        (model, lambda losses: pergrad.backward(losses, model)),
        (other, lambda losses: losses.sum().backward()),
    ):
        optimizer = torch.optim.SparseAdam([net.table.weight], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            run(net(ids))
            optimizer.step()
    torch.testing.assert_close(model.table.weight, other.table.weight, rtol=1e-4, atol=1e-5)


def test_a_wide_table_costs_its_rows() -> None:
    """One row for each look-up, of two million."""
    model = nn.Embedding(2_000_000, 2, sparse=True)
    ids = torch.arange(B)[:, None] * 7
    losses = model(ids).square().sum((1, 2))
    norms = pergrad.backward(losses, model, weights=pergrad.clip(0.1))
    grad = model.weight.grad
    assert grad is not None
    assert grad.is_sparse
    assert grad._values().shape == (B, 2)
    rows = 2 * model.weight[ids[:, 0]].detach()
    assert_agrees(norms, rows.norm(dim=1), rows.norm(dim=1), 1e-5)


def test_gather_with_a_sparse_gradient_has_the_loops_numbers() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(B, 9, dtype=torch.float64))
    ids = torch.randint(B, (B, 4))

    def losses() -> Tensor:
        return torch.gather(p, 1, ids, sparse_grad=True).square().sum(1)

    G = naive.loop_grads(losses(), [p])
    norms = naive.norms(G)
    assert_agrees(pergrad.norms(losses(), [p]), norms, norms)
    pergrad.backward(losses(), [p], weights=pergrad.clip(0.5))
    want = naive.weighted_sum(G, naive.clip_weights(G, 0.5))["0"]
    assert p.grad is not None
    assert_agrees(p.grad.to_dense(), want, norms.sum())


def test_one_batch_costs_no_dense_table() -> None:
    """Neither norms, nor a clipped sum, nor inner products make a tensor as large as the table."""
    table, head = nn.Embedding(50_000, 8, sparse=True), nn.Linear(8, 2)
    ids = torch.randint(50_000, (B, 4))
    model = nn.ModuleList([table, head])

    def losses() -> Tensor:
        return head(table(ids).sum(1)).square().sum(1)

    for run in (
        lambda: pergrad.norms(losses(), model),
        lambda: pergrad.gram(losses(), model),
        lambda: pergrad.backward(losses(), model, weights=pergrad.clip(0.1)),
    ):
        with _Largest() as made:
            run()
        assert 0 < made.most < table.weight.numel()


class _Largest(TorchDispatchMode):
    """How many numbers the largest dense tensor has that an op returns."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                # a view, such as the table's transpose or an alias, is no memory
                view = func._schema.returns and func._schema.returns[0].alias_info is not None
                self.most = max(self.most, 0 if view else x.numel())
        return out
