"""The table of ops: its declarations are true of the installed torch, and wrong ones are errors."""

from collections.abc import Iterator

import naive
import pytest
import torch
from helpers import assert_agrees
from torch import Tensor

import pergrad
from pergrad import ops
from pergrad.graph import nodes
from pergrad.graph import ops as table
from pergrad.graph.nodes import reading
from pergrad.ops.registry import check_imported, rule

# Ops of other releases and devices, and nodes of wrappers and compilers, which are Functions.
NOT_IN_THIS_TORCH = """
_DDPSink CompiledFunction RegisterPostBackwardFunction fft_c2_c fft_c2_r fft_r2_c flatten imag
kl_div real special_xlog1py take_along_dim
""".split()


@pytest.fixture
def an_op() -> Iterator[str]:
    """A name that is in the table for the length of a test."""
    yield "made_up"
    table._TABLE.pop("made_up", None)


@pytest.mark.parametrize("name", sorted(table.known_ops()))
def test_torch_saves_what_is_declared(name: str) -> None:
    assert nodes.has_op(name) or name in NOT_IN_THIS_TORCH
    nodes.check_saved(name, table.declared(name).needs)


def test_all_declarations_at_once(an_op: str) -> None:
    table.check_fields()
    table.declare(an_op, needs=["anything"])
    table.check_fields()  # an op that this torch lacks is no error


def test_a_field_that_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = table.declared("addmm")
    monkeypatch.setattr(entry, "needs", entry.needs | {"mat3"})
    with pytest.raises(pergrad.UnsupportedError, match=r"`mat3` with Addmm(.|\n)*Use a version"):
        table.check_fields()


@pytest.mark.parametrize("field", ["mat1", "alpha"])
def test_a_field_of_another_name_is_one_line(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    """As if this torch had renamed what pergrad knows as `before`."""
    entry = table.declared("addmm")
    monkeypatch.setattr(entry, "needs", entry.needs | {"before"})
    monkeypatch.setitem(reading.RENAMED, ("addmm", "before"), field)
    table.check_fields()
    x = torch.ones(2, 3)
    node = torch.addmm(torch.ones(4), x, torch.ones(3, 4, requires_grad=True), alpha=3).grad_fn
    assert torch.equal(nodes.saved(node, "before"), x) if field == "mat1" else (
        nodes.attribute(node, "before") == 3
    )  # fmt: skip
    with pytest.raises(pergrad.UnsupportedError, match=r"`after`(.|\n)*Use a version"):
        nodes.saved(node, "after")


def test_an_undeclared_field_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = table.declared("addmm")
    monkeypatch.setattr(entry, "needs", entry.needs - {"alpha"})
    weight = torch.ones(3, 4, requires_grad=True)
    losses = torch.addmm(torch.ones(4), torch.ones(2, 3), weight).sum(1)
    with pytest.raises(pergrad.UsageError, match=r"`addmm` reads the field `alpha`(.|\n)*`needs`"):
        pergrad.norms(losses, {"weight": weight})


def test_an_op_is_declared_once() -> None:
    with pytest.raises(pergrad.UsageError, match=r"`bmm` is declared twice(.|\n)*once"):
        table.declare("bmm")


@pytest.mark.parametrize("register", [table.owners, table.owners_of_all, table.steps, rule])
def test_an_op_that_no_family_declares(register) -> None:
    with pytest.raises(pergrad.UsageError, match=r"declares an op `bmn`(.|\n)*`declare` it first"):
        register("bmn")(lambda *_: None)


@pytest.mark.parametrize(
    ("register", "what"),
    [(table.owners, "owners"), (table.owners_of_all, "owners"), (rule, "gradients")],
)
def test_an_op_has_one_function_for_each_purpose(register, what: str) -> None:
    before = table.declared("bmm").owners
    with pytest.raises(
        pergrad.UsageError, match=rf"`bmm` has two functions for its {what}(.|\n)*Register one"
    ):
        register("bmm")(lambda *_: None)
    assert table.declared("bmm").owners is before
    with pytest.raises(pergrad.UsageError, match=r"two functions for its steps"):
        table.steps("view")(lambda *_: None)


def test_a_family_that_nobody_imports() -> None:
    with pytest.raises(pergrad.UsageError, match=r"ops/quantised.py(.|\n)*Add `quantised`"):
        check_imported(["matmul", "quantised"], vars(ops))


# --- A user's Function with the name of an op of torch's ----------------------------------------


def _function(name: str) -> type:
    def forward(ctx, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
        return 3 * first + second - third

    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return 3 * g.sum(0), g, -g

    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (torch.autograd.Function,), body)


@pytest.mark.parametrize("name", ["add", "mul", "expand", "view", "mm", "embedding", "relu", "cat"])
def test_a_function_is_not_the_op_of_its_name(name: str) -> None:
    torch.manual_seed(0)
    scale = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    h = torch.randn(5, 4, dtype=torch.float64) @ weight
    losses = _function(name).apply(scale, h, h.sin()).square().sum(1)
    params = {"scale": scale, "weight": weight}
    want = naive.norms(naive.loop_grads(losses, params))
    with pytest.warns(pergrad.FallbackWarning, match=rf"`{name}\.apply`"):
        assert_agrees(pergrad.norms(losses, params), want, want)


# --- addr ---------------------------------------------------------------------------------------

ADDR = {
    "row": lambda p, x, h: torch.addr(h, x, p["row"]),
    "row of two positions": lambda p, x, h: torch.addr(
        h.repeat_interleave(2, 0), x.repeat_interleave(2), p["row"], alpha=3
    ).unflatten(0, (len(x), 2)),
    "positions first": lambda p, x, h: torch.addr(h.repeat(2, 1), x.repeat(2), p["row"])
    .unflatten(0, (2, len(x))).movedim(1, 0),
    "column": lambda p, x, h: torch.addr(h.mT, p["row"], x, beta=2, alpha=0.5).mT,
    "matrix": lambda p, x, h: torch.addr(p["row"], x, h.mean(0).detach(), beta=2),
    "all": lambda p, x, h: torch.addr(p["matrix"], x * p["scale"], p["row"], beta=2, alpha=-3),
    "all three times": lambda p, x, h: torch.addr(
        p["matrix"], x, p["row"], alpha=3) * torch.addr(p["row"], h[:, 0], p["row"]),
    "no matrix": lambda p, x, h: torch.addr(p["matrix"], x, p["row"], beta=0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("form", ADDR)
def test_addr(form: str, batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    params = {
        "row": torch.randn(4, dtype=dtype, requires_grad=True),
        "matrix": torch.randn(1, 4, dtype=dtype, requires_grad=True),
        "scale": torch.randn((), dtype=dtype, requires_grad=True),
        "weight": torch.randn(3, 4, dtype=dtype, requires_grad=True),
    }
    h = torch.randn(batch, 3, dtype=dtype) @ params["weight"]
    out = ADDR[form](params, torch.randn(batch, dtype=dtype), h)
    losses = (out.sin() * torch.linspace(0.5, 1, 4, dtype=dtype)).flatten(1).sum(1)
    want = naive.loop_grads(losses, params)
    norms, tolerance = naive.norms(want), 1e-9 if dtype == torch.float64 else 1e-5
    coverage = pergrad.explain(losses, params)
    assert {row.how for row in coverage.rows} <= {"rule", "unreached"}, str(coverage)
    assert_agrees(pergrad.norms(losses, params, retain_graph=True), norms, norms, tolerance)
    flat = naive.flat(want)
    got = pergrad.gram(losses, params, retain_graph=True)
    assert_agrees(got, flat @ flat.T, norms[:, None] * norms, tolerance)
    live = pergrad.norms(losses, params, create_graph=True)
    assert_agrees(live.detach(), norms, norms, tolerance)
