"""Rules of ops in all their forms, against the loop; that they are rules, and no fallback."""

import warnings
from collections.abc import Callable, Mapping

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees, assert_rows_agree, direction
from torch import Tensor, nn

import pergrad
from pergrad.ops import rows as positions

Params = nn.Module | Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def agrees(losses: Tensor, params: Params, *, rule: bool = True, tolerance: float = 1e-9) -> None:
    """Norms, Gram, inner products and gradients are the loop's, and by rule if `rule`."""
    tensors = naive.named(params)
    want = naive.loop_grads(losses, params)
    flat = naive.flat(want)
    norms = naive.norms(want)
    coverage = pergrad.explain(losses, params)
    if rule:
        assert {row.how for row in coverage.rows} <= {"rule", "unreached"}, str(coverage)
    J = pergrad.gradients(losses, params, retain_graph=True)
    assert_rows_agree(J.dense(), want, norms=norms, tolerance=tolerance)
    got = pergrad.norms(losses, params, retain_graph=True)
    assert_agrees(got, norms, norms, tolerance)
    got = pergrad.gram(losses, params, retain_graph=True)
    assert_agrees(got, flat @ flat.T, norms[:, None] * norms, tolerance)
    v = direction(tensors)
    got = pergrad.dots(losses, params, against={n: v[n].to(p.dtype) for n, p in tensors.items()},
                       retain_graph=True)  # fmt: skip
    length = naive.norms({n: t[None] for n, t in v.items()})
    wanted = flat @ torch.cat([t.reshape(-1) for t in v.values()])
    assert_agrees(got, wanted, norms * length, tolerance)
    live = pergrad.norms(losses, params, create_graph=True)
    assert_agrees(live.detach(), norms, norms, tolerance)


# --- Numbers as operands -------------------------------------------------------------------------

NUMBERS = {  # torch's own C++ adds and multiplies by numbers without making tensors of them
    "added": lambda h: F.poisson_nll_loss(h, torch.ones_like(h), log_input=False, reduction="none"),
    "subtracted": lambda h: h[:, None] @ h[:, :, None] - torch.logit(h.sigmoid(), eps=1e-6),
    "multiplied": lambda h: torch.trapezoid(h.unflatten(1, (2, 2)), dx=3.0),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_an_operand(name):
    """Above the mixed output of a layer, the op with the number is where the parameters enter."""
    model, x = nn.Linear(4, 4), torch.rand(5, 4)
    with torch.no_grad():
        model.weight.abs_()
        model.bias.abs_()

    def losses() -> Tensor:
        h = model(x)
        return NUMBERS[name](h).flatten(1).sum(1) + h.mean()

    with pytest.raises(pergrad.MixedExamplesError, match="on_mixing"):
        pergrad.norms(losses(), model)
    want = naive.norms(naive.loop_grads(losses(), model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        got = pergrad.norms(losses(), model, on_mixing="exact")
    assert_agrees(got, want, want)


# --- Embedding bags ------------------------------------------------------------------------------

OFFSETS = torch.tensor([0, 2, 2, 5])  # the second bag is empty
IDS = torch.tensor([1, 4, 4, 0, 4, 3, 2, 1])


def bag_losses(out: Tensor) -> Tensor:
    return out.mul(torch.arange(1.0, out.shape[1] + 1)).sum(1).sin()


@pytest.mark.parametrize("padding", [None, 4])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode: str, padding: int | None) -> None:
    bag = nn.EmbeddingBag(6, 3, mode=mode, padding_idx=padding)
    with torch.no_grad():
        bag.weight[4] = 1.0  # zeros under padding would hide a gradient that should not be there
    agrees(bag_losses(bag(IDS, OFFSETS)), bag)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag_of_fixed_size(mode: str) -> None:
    bag = nn.EmbeddingBag(6, 3, mode=mode)
    agrees(bag_losses(bag(IDS.view(4, 2))), bag)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bag_with_last_offset(mode: str) -> None:
    bag = nn.EmbeddingBag(6, 3, mode=mode, include_last_offset=True)
    agrees(bag_losses(bag(IDS, torch.tensor([0, 2, 2, 5, 8]))), bag)


def test_embedding_bag_with_weights_that_are_computed() -> None:
    """Importance of categories, looked up by the same indices: both sides of the product train."""
    table, importance = nn.EmbeddingBag(6, 3, mode="sum"), nn.Embedding(6, 1)
    given = importance(IDS)[:, 0].exp()
    losses = bag_losses(table(IDS, OFFSETS, per_sample_weights=given))
    agrees(losses, nn.ModuleList([table, importance]))


def test_embedding_bag_with_weights_by_position() -> None:
    """A parameter for each entry of the batch: no rule, exact all the same."""
    table, given = nn.EmbeddingBag(6, 3, mode="sum"), nn.Parameter(torch.rand(8))
    losses = bag_losses(table(IDS, OFFSETS, per_sample_weights=given))
    agrees(losses, {"table": table.weight, "given": given}, rule=False)


def test_embedding_bag_scaled_by_frequency() -> None:
    bag = nn.EmbeddingBag(6, 3, mode="sum", scale_grad_by_freq=True)
    agrees(bag_losses(bag(IDS, OFFSETS)), bag, rule=False)


def test_no_bags_at_all() -> None:
    bag, layer = nn.EmbeddingBag(6, 3), nn.Linear(2, 2)
    empty = torch.zeros(0, dtype=torch.long)
    losses = layer(torch.randn(3, 2)).square().sum(1) + bag(empty, empty).sum()
    agrees(losses, nn.ModuleList([bag, layer]), rule=False)


def test_several_bags_of_one_example() -> None:
    bag = nn.EmbeddingBag(6, 3, mode="mean")
    out = bag(IDS, OFFSETS).reshape(2, 2, 3)
    agrees(bag_losses(out.flatten(1)), bag)
    agrees(bag_losses(bag(IDS, OFFSETS).reshape(2, 2, 3).transpose(0, 1).flatten(1)), bag)


# --- Bilinear forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2, 7])
@pytest.mark.parametrize("positions", [(), (3,)])
def test_bilinear(outputs: int, positions: tuple[int, ...]) -> None:
    form, first = nn.Bilinear(4, 5, outputs), nn.Linear(4, 4)
    left, right = torch.randn(3, *positions, 4), torch.randn(3, *positions, 5)
    out = form(first(left), right)
    agrees(out.sin().flatten(1).sum(1), nn.ModuleList([form, first]))


def test_bilinear_below_both_inputs() -> None:
    """The layout goes through to both sides."""
    form, left, right = nn.Bilinear(4, 5, 2), nn.Linear(3, 4), nn.Linear(3, 5)
    x = torch.randn(6, 3)
    out = form(left(x), right(x)).reshape(2, 3, 2).transpose(0, 1)  # position-major
    agrees(out.tanh().flatten(1).sum(1), nn.ModuleList([form, left, right]))


# --- Grouped products ----------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [[2, 2, 6], [0, 6, 6], [1, 3, 6]])
def test_grouped_product(ends: list[int]) -> None:
    """Rows sorted by expert; an expert without rows; examples in any order."""
    torch.set_default_dtype(torch.float32)  # torch has no other here
    weight = nn.Parameter(torch.randn(3, 4, 8))
    first = nn.Linear(4, 4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    rows = first(torch.randn(6, 4))[order]
    out = F.grouped_mm(rows, weight, offs=torch.tensor(ends, dtype=torch.int32))
    losses = torch.zeros(3).index_add(0, order // 2, out.sin().sum(1))
    params = {"weight": weight, "first": first.weight}
    agrees(losses, params, tolerance=1e-5)


def test_grouped_product_of_a_transposed_weight() -> None:
    torch.set_default_dtype(torch.float32)
    weight = nn.Parameter(torch.randn(2, 8, 4))
    ends = torch.tensor([4, 6], dtype=torch.int32)
    out = F.grouped_mm(torch.randn(6, 4), weight.transpose(1, 2), offs=ends)
    agrees(out.sin().sum(1).reshape(3, 2).sum(1), {"weight": weight}, tolerance=1e-5)


# --- Tiles and copies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tile",
    [
        lambda p: p.repeat(3, 1, 1),
        lambda p: p.repeat(3, 1, 1, 1)[:, 0],
        lambda p: p.repeat(3, 2, 1)[:, ::2],
        lambda p: p.exp().repeat(3, 1, 2)[..., :4],
        lambda p: p.repeat_interleave(3, 0).reshape(3, 2, 4),
    ],
)
def test_repeat(tile: Callable[[Tensor], Tensor]) -> None:
    p = nn.Parameter(torch.randn(2, 4))
    agrees((tile(p) * torch.randn(3, 2, 4)).sin().sum((1, 2)), {"p": p})


def test_repeat_with_the_examples_inside() -> None:
    p = nn.Parameter(torch.randn(2, 1))
    agrees((p.repeat(1, 3) * torch.randn(2, 3)).sin().sum(0), {"p": p})


def test_matrices_tiled_for_a_batched_product() -> None:
    """As in attention with relative positions: one matrix per head, tiled over the examples."""
    p = nn.Parameter(torch.randn(2, 5, 4))
    tiled = p.tanh().repeat(3, 1, 1)  # (examples * heads, ...)
    out = torch.bmm(torch.randn(6, 7, 4), tiled.transpose(1, 2))
    agrees(out.sin().reshape(3, -1).sum(1), {"p": p})
    out = torch.bmm(tiled, torch.randn(6, 4, 7))
    agrees(out.sin().reshape(3, -1).sum(1), {"p": p})


def test_instance_norm() -> None:
    """Its scale and shift are tiled over the examples by torch itself."""
    norm = nn.InstanceNorm2d(4, affine=True)
    agrees(norm(torch.randn(3, 4, 5, 5)).sin().flatten(1).sum(1), norm)


# --- Rows of which only some columns are used ----------------------------------------------------


def test_product_of_which_one_column_is_used() -> None:
    """Elsewhere no gradient arrives; the rows are no less the examples'."""
    layer = nn.Linear(4, 3)
    agrees(layer(torch.randn(5, 4))[:, 1].sin(), layer)


def test_derivative_with_respect_to_one_input() -> None:
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(5, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    agrees(slope[:, 1].square(), model)


def test_columns_of_one_row_that_belong_to_different_examples() -> None:
    """(1, d) @ (d, B): the rows of the weight's input are shared, its columns are not."""
    p = nn.Parameter(torch.randn(4, 3))
    agrees((torch.randn(1, 4) @ p)[0].sin(), {"p": p}, rule=False)


# --- Positions: a table looked up by the same indices for every example ---------------------------

POSITIONS = {
    "from the start": torch.arange(4),
    "further on": torch.arange(3, 7),
    "backwards": torch.arange(4).flip(0),
    "again": torch.tensor([2, 2, 3, 4]),
    "up to the padding": torch.arange(5, 9),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("which", POSITIONS)
def test_positions(which: str, scaled: bool) -> None:
    table = nn.Embedding(9, 6, padding_idx=8, scale_grad_by_freq=scaled)
    with torch.no_grad():
        table.weight[8] = torch.randn(6)
    ids, x = POSITIONS[which], torch.randn(3, 4, 6)
    agrees((x + table(ids)).sin().sum((1, 2)), table)
    agrees((x + table(ids[None])).sin().sum((1, 2)), table)
    agrees((x * table(ids).reshape(2, 2, 6).flatten(0, 1)).sin().sum((1, 2)), table)


def test_positions_of_which_a_slice_is_trained_elsewhere() -> None:
    """Two uses of one table, of which one is a slice and the other any rows."""
    table = nn.Embedding(7, 4)
    words = torch.tensor([[0, 5, 5], [1, 2, 6]])
    agrees((table(words) + table(torch.arange(2, 5))).sin().sum((1, 2)), table)


@pytest.mark.parametrize(
    ("owners", "shape", "order"),
    [
        (torch.arange(3).repeat_interleave(5), (3, 5, 4), (0, 1, 2)),  # one after the other
        (torch.arange(3).repeat(5), (5, 3, 4), (1, 0, 2)),  # in turn
    ],
)
def test_rows_of_examples_are_folded_in_place(owners, shape, order) -> None:
    rows, values = positions.Partition(owners, 3), torch.randn(15, 4)
    assert rows.foldable
    assert torch.equal(rows.fold(values), values.view(shape).permute(order))
    assert rows.fold(values).data_ptr() == values.data_ptr()


@pytest.mark.parametrize(
    "owners", [torch.tensor([0, 0, 1, 1]).repeat(2), torch.tensor([0, 1, 1]), torch.tensor([-1])]
)
def test_other_rows_are_not_folded(owners) -> None:
    assert not positions.Partition(owners, 2).foldable


# --- Normalisations -------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 2, 5, 6), (3, 0, 6), (3, 2**15, 6)])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norm_over_the_last_dimension(norm, shape, frozen) -> None:
    layer = norm(6)
    for name, p in layer.named_parameters():
        nn.init.normal_(p)
        p.requires_grad_(name != frozen)
    if any(p.requires_grad for p in layer.parameters()):
        agrees(layer(torch.randn(shape)).sin().flatten(1).sum(1), layer)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norm_of_a_sequence_major_input(norm) -> None:
    layer = norm((2, 3))
    agrees(layer(torch.randn(5, 3, 2, 3)).sin().sum((0, 2, 3)), layer)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_norm_over_nothing(norm) -> None:
    layer = norm(0)
    agrees(layer(torch.randn(3, 5, 0)).sum((1, 2)), layer)


def test_norm_far_from_zero() -> None:
    """A mean far larger than the deviation must not cost digits."""
    layer = nn.LayerNorm(6)
    agrees(layer(torch.randn(3, 5, 6) + 1e4).sin().flatten(1).sum(1), layer)


EMPTY = {  # activations without elements above and below: each layer with its own shape of data
    "linear": (lambda: nn.Linear(0, 3), (4, 2, 0)),
    "linear_of_none": (lambda: nn.Linear(5, 3), (4, 0, 5)),
    # torch's own backward of a group norm gives nan there, the mean of no numbers
    "layer_norm": (lambda: nn.LayerNorm(3), (4, 0, 3)),
    "rms_norm": (lambda: nn.RMSNorm(3), (4, 0, 3)),
    "batch_norm": (lambda: nn.BatchNorm1d(3).eval(), (4, 3, 0)),
    "prelu": (lambda: nn.PReLU(3), (4, 3, 0)),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
def test_activations_without_elements(name: str) -> None:
    """A batch without boxes: nothing arrives at the layer, and its gradient is zero."""
    build, shape = EMPTY[name]
    layer, v = build().double(), nn.Parameter(torch.ones(3, dtype=torch.float64))
    x = torch.randn(4, 3, dtype=torch.float64)

    def losses() -> Tensor:
        return layer(torch.zeros(shape, dtype=torch.float64)).flatten(1).sum(1) + (x * v).sum(1)

    params = {**dict(layer.named_parameters()), "v": v}
    G = naive.loop_grads(losses(), params)
    norms = naive.norms(G)
    assert_agrees(pergrad.norms(losses(), params), norms, norms)
    J = pergrad.gradients(losses(), params)
    assert_rows_agree(J.dense(), G, norms=norms)
