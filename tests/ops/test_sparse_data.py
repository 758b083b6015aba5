"""Sparse matrices of data, of parameters and of gradients, against the loop."""

import warnings
from collections.abc import Callable, Iterator

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees, assert_rows_agree
from torch import Tensor, nn

import pergrad

WORDS, OUT = 20, 3
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def _beta_state_of_csr() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CS. tensor support is in beta", UserWarning)
        yield


def bags(rows: int, dtype: torch.dtype) -> Tensor:
    """Counts of words: some rows empty, some words in several rows."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.rand(rows, WORDS, generator=generator) * 3
    kept = torch.rand(rows, WORDS, generator=generator) < 0.2
    data = torch.where(kept, counts, 0.0).to(dtype)
    if rows > 1:
        data[1] = 0
    return data


def repeated(data: Tensor) -> Tensor:
    """The same matrix with every number stored in two halves."""
    listed = data.to_sparse().coalesce()
    indices = torch.cat([listed.indices(), listed.indices()], 1)
    values = torch.cat([listed.values() / 2, listed.values() / 2])
    return torch.sparse_coo_tensor(indices, values, data.shape, check_invariants=True)


# (data (n, WORDS), weight (OUT, WORDS), bias (OUT,)) -> (n, OUT)
FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda d, w, b: F.linear(d.to_sparse(), w, b),
    "linear_without_bias": lambda d, w, b: F.linear(d.to_sparse(), w) + b,
    "repeated": lambda d, w, b: F.linear(repeated(d), w, b),
    "sparse_mm": lambda d, w, b: torch.sparse.mm(d.to_sparse(), w.T) * b,
    "sparse_addmm": lambda d, w, b: torch.sparse.addmm(
        b.expand(len(d), OUT), d.to_sparse(), w.T, alpha=0.5, beta=2.0
    ),
    "rows": lambda d, w, b: d.to_sparse_csr() @ w.T + b,
    "columns": lambda d, w, b: d.to_sparse_csc() @ w.T + b,
    "weight_on_the_left": lambda d, w, b: (w @ d.T.to_sparse_csr()).T + b,
    "vector": lambda d, w, b: (d.to_sparse() @ w[0])[:, None] * b,
}


@DTYPES
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_bags_of_words(form: str, batch: int, positions: int, dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.linspace(-1, 1, OUT * WORDS, dtype=dtype).view(OUT, WORDS).cos())
    params = {"w": w, "b": nn.Parameter(torch.ones(OUT, dtype=dtype))}
    data = bags(batch * positions, dtype)

    def losses() -> Tensor:
        out = FORMS[form](data, params["w"], params["b"])
        return torch.tanh(out).reshape(batch, positions, OUT).square().sum((1, 2))

    G = naive.loop_grads(losses(), params)
    norms = naive.norms(G)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert_agrees(pergrad.norms(losses(), params), norms, norms, tolerance, "norms")
    scale = norms[:, None] * norms
    assert_agrees(pergrad.gram(losses(), params), naive.gram(G), scale, tolerance, "gram")
    J = pergrad.gradients(losses(), params)
    assert_rows_agree(J.dense(), G, norms=norms, tolerance=tolerance)
    weights = torch.linspace(-1, 2, batch, dtype=dtype)
    pergrad.backward(losses(), params, weights=weights)
    for name, want in naive.weighted_sum(G, weights).items():
        bound = (weights.abs() * norms).sum()
        assert_agrees(params[name].grad, want, bound, tolerance, name)
    if batch:
        rows = pergrad.explain(losses(), params).rows
        assert {row.how for row in rows if row.parameter == "w"} == {"rule"}


def test_derivatives_of_norms_over_sparse_data() -> None:
    layer = nn.Linear(WORDS, OUT).double()
    data = bags(4, torch.float64).to_sparse()

    def losses() -> Tensor:
        return torch.tanh(layer(data)).square().sum(1)

    got = pergrad.norms(losses(), layer, create_graph=True).sum()
    want = naive.live_rows(losses(), layer).norm(dim=1).sum()
    for one, two in zip(torch.autograd.grad(got, layer.weight),
                        torch.autograd.grad(want, layer.weight), strict=True):  # fmt: skip
        assert_agrees(one, two, two.abs().max())


def test_a_large_vocabulary_is_never_made_dense() -> None:
    """4 by 2,000,000 numbers would be 64 MB a time; what is stored is 40 numbers."""
    count = 2_000_000
    indices = torch.stack([torch.arange(40) // 10, torch.arange(40) * 49_999])
    data = torch.sparse_coo_tensor(indices, torch.ones(40), (4, count), check_invariants=True)
    w = nn.Parameter(torch.ones(1, count))
    with torch.profiler.profile(profile_memory=True) as profile:
        norms = pergrad.norms(F.linear(data, w).square().sum(1), [w], check_layout="never")
    assert_agrees(norms, torch.full((4,), 2 * 10 * 10**0.5), norms, 1e-5)
    assert max(event.cpu_memory_usage for event in profile.events()) < count


# Sparse gradients and activations: each returns losses (4,), and its parameters.


def sparse_gather(dtype: torch.dtype) -> tuple[Callable[[], Tensor], list[Tensor]]:
    w, ids = nn.Parameter(torch.randn(7, 5, dtype=dtype)), torch.randint(7, (4, 5))
    return lambda: torch.gather(w, 0, ids, sparse_grad=True).square().sum(1), [w]


def sparse_values(dtype: torch.dtype) -> tuple[Callable[[], Tensor], list[Tensor]]:
    v, ids = nn.Parameter(torch.randn(9, dtype=dtype)), torch.randint(5, (2, 9))
    x = torch.randn(4, 5, dtype=dtype)

    def losses() -> Tensor:
        matrix = torch.sparse_coo_tensor(ids, v, (5, 5), check_invariants=True).coalesce()
        return torch.sparse.mm(matrix, x.t()).t().square().sum(1)

    return losses, [v]


def sparse_activation(dtype: torch.dtype) -> tuple[Callable[[], Tensor], list[Tensor]]:
    w, k = nn.Parameter(torch.randn(3, dtype=dtype)), torch.randn(3, 4, dtype=dtype)
    x = torch.randn(4, 3, dtype=dtype)
    return lambda: torch.sparse.mm((x * w).to_sparse(), k).square().sum(1), [w]


def sparse_gather_of_one(dtype: torch.dtype) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """One example owns all: the parameter's own sparse gradient is its row."""
    w, ids = nn.Parameter(torch.randn(7, 5, dtype=dtype)), torch.randint(7, (1, 5))
    return lambda: torch.gather(w, 0, ids, sparse_grad=True).square().sum(1), [w]


def sparse_embedding_twice(dtype: torch.dtype) -> tuple[Callable[[], Tensor], list[Tensor]]:
    table, ids = nn.Embedding(9, 3, sparse=True).to(dtype), torch.randint(9, (4, 5))

    def losses() -> Tensor:
        return (table(ids).tanh() * table(ids.flip(0))).square().sum((1, 2))

    return losses, list(table.parameters())


@DTYPES
@pytest.mark.parametrize(
    "build",
    [sparse_gather, sparse_gather_of_one, sparse_values, sparse_activation, sparse_embedding_twice],
)
@pytest.mark.filterwarnings("ignore::pergrad.FallbackWarning")
def test_sparse_gradients(build: Callable, dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses, params = build(dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    G = naive.loop_grads(losses(), params)
    norms = naive.norms(G)
    assert_agrees(pergrad.norms(losses(), params), norms, norms, tolerance, "norms")
    J = pergrad.gradients(losses(), params)
    assert_rows_agree(J.dense(), G, norms=norms, tolerance=tolerance)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_named(layout: torch.layout) -> None:
    layer, lengths = nn.Linear(5, 6), (2, 4, 1, 3)
    xs = torch.nested.nested_tensor([torch.randn(n, 5) for n in lengths], layout=layout)
    losses = torch.tanh(layer(xs)).to_padded_tensor(0.0).square().sum((1, 2))
    with pytest.raises(pergrad.UnsupportedError, match=r"nested tensor(.|\n)*to_padded_tensor"):
        pergrad.norms(losses, layer)
