"""Whose an element is, where a backward is no linear map, or where examples seem to meet."""

import warnings
from collections.abc import Callable, Iterator

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad
from pergrad.graph import plan
from pergrad.ops import rows

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


def agrees(losses: Callable[[], Tensor], params: nn.Module | list, **options: str) -> None:
    norms = naive.norms(naive.loop_grads(losses(), params))
    tolerance = 1e-9 if norms.dtype == losses().dtype else 1e-4
    assert_agrees(pergrad.norms(losses(), params, **options), norms, norms, tolerance)


# -- a backward that is no linear map --------------------------------------------------------------

BACKWARDS: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda g: g.clamp(-0.05, 0.05),
    "one-sided": lambda g: g.clamp(min=0),
    "sign": torch.sign,
    "round": lambda g: (8 * g).round() / 8,
    "quantised": lambda g: g.to(torch.bfloat16).to(g.dtype),
    "row": lambda g: F.normalize(g, dim=1),
    "row clipped": lambda g: g * (0.1 / g.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp(max=1),
    "largest of a row": lambda g: g * (g.abs() == g.abs().amax(1, keepdim=True)),
    "square": lambda g: g.abs() * g,
}
ACROSS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda g: g / g.norm().clamp_min(1e-12),
    "column": lambda g: F.normalize(g, dim=0),
    "summed": lambda g: g + g.sum(0) * 1e-3,
    "rolled in part": lambda g: g + 1e-6 * g.roll(1, 0),
    "constant": lambda g: g + 0.25,
    "threshold": lambda g: g * (g.abs() >= g.abs().max() / 2),
}


def function(backward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    class Fn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return backward(g)

    return Fn.apply


def net(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


@pytest.mark.parametrize("check_layout", ["once", "always"])
@pytest.mark.parametrize("name", BACKWARDS)
@DTYPES
def test_by_element_or_by_row(dtype: torch.dtype, name: str, check_layout: str) -> None:
    model, x, fn = net(dtype), torch.randn(7, 5, dtype=dtype), function(BACKWARDS[name])
    # linear layers above the Function and below it: their rows are verified as well
    agrees(
        lambda: model[2](model[1](fn(model[0](x)))).square().sum(1),
        model, check_layout=check_layout,
    )  # fmt: skip
    many = torch.randn(7, 4, 5, dtype=dtype)
    agrees(lambda: model[2](model[1](fn(model[0](many)))).square().sum((1, 2)), model)


@pytest.mark.parametrize("name", ACROSS)
def test_across_examples(name: str) -> None:
    model, x, fn = net(torch.float64), torch.randn(7, 5).double(), function(ACROSS[name])

    def losses() -> Tensor:
        return model[2](model[1](fn(model[0](x)))).square().sum(1)

    with pytest.raises(pergrad.MixedExamplesError, match=r"mixes examples(.|\n)*on_mixing"):
        pergrad.norms(losses(), model)


@DTYPES
def test_matrix_exponential(dtype: torch.dtype) -> None:
    layer, x = nn.Linear(5, 9).to(dtype), torch.randn(4, 5, dtype=dtype)
    scale = torch.tensor([1e-3, 0.1, 1.0, 3.0], dtype=dtype)[:, None, None]
    agrees(lambda: torch.linalg.matrix_exp(layer(x).view(4, 3, 3) * scale).sum((1, 2)), layer)


def test_denormal_gradients_below_what_has_to_be_measured() -> None:
    model, x = net(torch.float32), torch.randn(6, 5)
    weights, every = torch.tensor([1, 1, 1e-39, 1, 1e-42, 1]), torch.ones(6, 3, dtype=torch.bool)

    def losses() -> Tensor:
        return weights * model(x).masked_select(every).view(6, 3).square().sum(1)

    want = naive.norms(naive.loop_grads(losses(), model))
    got = pergrad.norms(losses(), model).double()
    # the square of such a norm is no number of single precision: zero, as torch has it
    assert_agrees(got, want, want + 1e-30, 1e-4)


# -- what stands beside the examples ---------------------------------------------------------------


def inducing() -> tuple[Callable[[], Tensor], list[Tensor]]:
    z, m, x = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(3)), torch.randn(4, 2)

    def losses() -> Tensor:
        a = torch.cat([z, x])
        k = torch.exp(-0.5 * (a[:, None] - a[None]).square().sum(-1))
        return (k[3:, :3] @ torch.linalg.solve(k[:3, :3] + 0.1 * torch.eye(3), m)).square()

    return losses, [z, m]


def support(last: bool) -> tuple[Callable[[], Tensor], list[Tensor]]:
    f = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6))
    s, x, y = torch.randn(6, 5), torch.randn(4, 5), torch.randint(3, (4,))

    def losses() -> Tensor:
        h = f(torch.cat([x, s] if last else [s, x]))
        queries, given = (h[:4], h[4:]) if last else (h[6:], h[:6])
        prototypes = given.view(3, 2, 6).mean(1)
        return F.cross_entropy(-torch.cdist(queries, prototypes), y, reduction="none")

    return losses, list(f.parameters())


BESIDE = {
    "inducing points": inducing,
    "support first": lambda: support(False),
    "support last": lambda: support(True),
}


@pytest.mark.parametrize("build", BESIDE.values(), ids=BESIDE)
@DTYPES
def test_joined_with_the_batch_and_cut_off_again(build: Callable, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        losses, params = build()
        agrees(losses, params)
        agrees(losses, params)
    finally:
        torch.set_default_dtype(torch.float32)


def test_rows_that_other_losses_read_are_no_support() -> None:
    """Causal statistics: each example has a row of its own only if nothing comes after it."""
    layer, x = nn.Linear(5, 6), torch.randn(4, 5)
    losses = layer(x).cumsum(0).square().sum(1)
    with pytest.raises(pergrad.MixedExamplesError, match="`cumsum`"):
        pergrad.norms(losses, layer)


def test_a_graph_that_cannot_tell_says_so() -> None:
    f, g = nn.Linear(5, 6), nn.Linear(5, 6)
    model, x, y = nn.ModuleList([f, g]), torch.randn(4, 5), torch.randn(4, 5)

    def losses() -> Tensor:
        return F.cross_entropy(f(x) @ g(y).tanh().T, torch.arange(4), reduction="none")

    match = r"cannot tell(.|\n)*prototypes(.|\n)*on_mixing=\"exact\"(.|\n)*4 backward passes"
    with pytest.raises(pergrad.MixedExamplesError, match=match):
        pergrad.norms(losses(), model)
    agrees(losses, model, on_mixing="exact")


def test_a_table_that_may_be_the_examples_own_says_so() -> None:
    """Rows computed from constants, which several examples look up."""
    w, fixed, ids = nn.Parameter(torch.randn(2, 3)), torch.randn(8, 2), torch.randint(8, (4, 5))

    def losses() -> Tensor:
        return (fixed @ w)[ids].tanh().square().sum((1, 2))

    match = r"8 rows where there are 4 examples(.|\n)*cannot tell(.|\n)*table that all of them read"
    with pytest.raises(pergrad.MixedExamplesError, match=match):
        pergrad.norms(losses(), [w])
    agrees(losses, [w], on_mixing="exact")


def test_rows_of_others_are_called_so() -> None:
    layer, x = nn.Linear(5, 6), torch.randn(4, 5)

    def losses() -> Tensor:
        h = layer(x)
        return (h - h.mean(0)).square().sum(1)

    with pytest.raises(
        pergrad.MixedExamplesError, match=r"`mean_dim`(.|\n)*rows of the others too"
    ):
        pergrad.norms(losses(), layer)
    agrees(losses, layer, on_mixing="exact")


def test_a_loss_per_token() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x, y = torch.randn(2, 5, 8), torch.randint(8, (10,))

    def losses() -> Tensor:
        h = attention(x, x, x)[0]
        return F.cross_entropy(h.reshape(10, 8), y, reduction="none")

    match = r"2 x 5 positions(.|\n)*losses per token(.|\n)*view\(2, 5\)(.|\n)*5 backward passes"
    with pytest.raises(pergrad.MixedExamplesError, match=match):
        pergrad.norms(losses(), attention)
    agrees(lambda: losses().view(2, 5).sum(1), attention)


# -- nothing to measure ----------------------------------------------------------------------------


def test_activations_without_elements() -> None:
    w, v, x = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3)), torch.randn(6, 3)
    fn = function(lambda g: g.clone())
    empty = torch.randn(6, 0, 3)
    agrees(lambda: fn(empty * w).sum((1, 2)) + (x * v).sum(1), [w, v])
    agrees(lambda: fn(empty.transpose(0, 1) * w).sum((0, 2)) + (x * v).sum(1), [w, v])


# -- what needs no measurement ---------------------------------------------------------------------


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a layout was measured")

    monkeypatch.setattr(plan, "measure", never)


@DTYPES
@pytest.mark.parametrize("cell", [nn.GRU, nn.RNN, nn.LSTM], ids=lambda c: c.__name__)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.usefixtures("unmeasured")
def test_packed_sequences(cell: type, dtype: torch.dtype, batch_first: bool) -> None:
    """Steps with 5, 4, 2, 2 and 1 sequences: single rows are cut off, and several."""
    cells = cell(3, 4, 2, batch_first=batch_first).to(dtype)
    before, after = nn.Linear(3, 3).to(dtype), nn.Linear(4, 3).to(dtype)
    x = torch.randn(5, 5, 3, dtype=dtype)
    lengths = torch.tensor([2, 5, 1, 4, 2])

    def losses() -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            before(x), lengths, batch_first=batch_first, enforce_sorted=False
        )
        state = cells(packed)[1]
        last = (state[0] if isinstance(state, tuple) else state)[-1]
        return after(last).square().sum(1)

    agrees(losses, nn.ModuleList([before, cells, after]))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("cut", [
    lambda h, i: h[i], lambda h, i: h[i : i + 1], lambda h, i: h.narrow(0, i, 1),
    lambda h, i: h[i, :3],
], ids=["select", "slice", "narrow", "in two dimensions"])  # fmt: skip
@pytest.mark.parametrize("examples", [2, 5])
def test_a_loop_over_rows_of_an_activation(
    examples: int, cut: Callable[[Tensor, int], Tensor]
) -> None:
    """Also of two rows, each half of what it is cut out of."""
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), torch.randn(examples, 3).double()
    weight = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def losses() -> Tensor:
        h = net(x)
        cuts = [cut(h, i) for i in range(examples)]
        return torch.stack([(row * weight[: row.shape[-1]]).square().sum() for row in cuts])

    agrees(losses, [*net.parameters(), weight])


@pytest.mark.usefixtures("unmeasured")
def test_rows_that_two_examples_read_are_not_cut_apart() -> None:
    """What is claimed is exact, and still two examples meet in the middle row."""
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double(), torch.randn(3, 3).double()
    weight = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def losses() -> Tensor:
        h = net(x)
        return torch.stack([(h[i : i + 2] * weight).square().sum() for i in range(2)])

    with pytest.raises(AssertionError, match="was measured"):
        pergrad.norms(losses(), [*net.parameters(), weight])


def test_rows_are_grouped_once_for_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many uses there are: a cell of 300 steps."""
    cell, x = nn.RNNCell(2, 3), torch.randn(2, 300, 2)

    def losses() -> Tensor:
        h = torch.zeros(2, 3)
        for t in range(300):
            h = cell(x[:, t], h)
        return h.square().sum(1)

    pergrad.norms(losses(), cell)
    grouped: list[int] = []
    real = rows.Partition.__init__

    def counted(self: rows.Partition, owners: Tensor, batch: int) -> None:
        grouped.append(batch)
        real(self, owners, batch)

    monkeypatch.setattr(rows.Partition, "__init__", counted)
    pergrad.norms(losses(), cell)
    assert not grouped
