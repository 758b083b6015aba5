"""Every verb against the loop, on every model of the zoo."""

import pickle
import warnings
from collections.abc import Iterator

import naive
import pytest
import torch
import zoo
from helpers import assert_agrees, assert_rows_agree, direction
from torch import Tensor, nn

import pergrad
from pergrad.graph import plan
from pergrad.precondition import Diagonal, Kronecker

EVERYTHING = pytest.mark.parametrize(("case", "B"), zoo.each_batch())
# What follows from the same factors as norms, Grams and sums: one example alone is for `-m slow`.
EACH_CASE = pytest.mark.parametrize(("case", "B"), zoo.each_batch(single_is_slow=True))
# What depends on the kind of factor rather than on the model.
SOME_CASES = pytest.mark.parametrize(("case", "B"), zoo.each_batch(single_is_slow=True, every=3))


@pytest.fixture(autouse=True)
def _fallbacks_are_fine() -> Iterator[None]:
    """A fallback is exact. That it warns is tested below."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        yield


@EVERYTHING
def test_norms(case: zoo.Case, B: int) -> None:
    run, G = case.run(B), zoo.reference(case.name, B)
    scale = naive.norms(G)
    got = pergrad.norms(run.losses, run.params, retain_graph=True, **case.options)
    assert_agrees(got, scale, scale, what="norms")
    assert got.dtype == torch.float64
    assert not got.requires_grad
    parts = pergrad.norms_by_parameter(run.losses, run.params, **case.options)
    assert list(parts) == list(G)
    for name, want in naive.norms_by_parameter(G).items():
        assert_agrees(parts[name], want, scale, what=name)


@EACH_CASE
def test_norms_in_pieces(case: zoo.Case, B: int) -> None:
    """The size of the buffers and repeated measurement change nothing."""
    run, scale = case.run(B), naive.norms(zoo.reference(case.name, B))
    for more in ({"chunk_bytes": 1}, {"chunk_bytes": 1024, "check_layout": "always"}):
        options = {**case.options, **more}
        got = pergrad.norms(run.losses, run.params, retain_graph=True, **options)
        assert_agrees(got, scale, scale, what=str(more))


@SOME_CASES
def test_another_default_device(case: zoo.Case, B: int) -> None:
    """Everything is made where it belongs, whatever `torch.set_default_device` says."""
    run, G = case.run(B), zoo.reference(case.name, B)
    scale = naive.norms(G)
    plan.clear()
    with torch.device("meta"):
        got = pergrad.norms(run.losses, run.params, retain_graph=True, **case.options)
        J = pergrad.gradients(run.losses, run.params, **case.options)
        own = J.norms()
    assert_agrees(got, scale, scale, what="norms")
    assert_agrees(own, scale, scale, what="norms of the matrix")


@EVERYTHING
def test_gram(case: zoo.Case, B: int) -> None:
    run, G = case.run(B), zoo.reference(case.name, B)
    norms = naive.norms(G)
    got = pergrad.gram(run.losses, run.params, **case.options)
    assert_agrees(got, naive.gram(G), norms[:, None] * norms[None], what="gram")


@EACH_CASE
def test_dots(case: zoo.Case, B: int) -> None:
    """Against the gradients of another model and batch, and against a direction, in all forms."""
    run, G = case.run(B), zoo.reference(case.name, B)
    norms = naive.norms(G)
    options = {**case.options, "retain_graph": True}

    other, H = case.run(B, seed=1), zoo.reference(case.name, B, seed=1)
    K = pergrad.gradients(other.losses, other.params, **case.options)
    scale = norms[:, None] * naive.norms(H)[None]
    got = pergrad.dots(run.losses, run.params, against=K, **options)
    assert_agrees(got, naive.gram(G, H), scale, what="dots with a matrix")
    if B:
        got = pergrad.dots(run.losses, run.params, against=K[:1], **options)
        assert_agrees(got, naive.gram(G, H)[:, :1], scale[:, :1], what="dots with one row")

    v = direction(run.named)
    flat = torch.cat([part.reshape(-1) for part in v.values()])
    for form in (v, list(v.values()), flat):
        got = pergrad.dots(run.losses, run.params, against=form, **options)
        assert_agrees(got, naive.matvec(G, v), norms * flat.norm(), what=type(form).__name__)


@EVERYTHING
def test_backward(case: zoo.Case, B: int) -> None:
    """Weights of every kind; `.grad` accumulates; the norms are those of unweighted gradients."""
    run, G = case.run(B), zoo.reference(case.name, B)
    norms = naive.norms(G)
    random = torch.linspace(-1.0, 2.0, B, dtype=torch.float64)
    if B > 1:
        random[1] = 0.0  # a weight of zero does not lose the norm
    limit = float(norms.median()) * 0.9 + 1e-3 if B else 1.0
    expected = {n: torch.zeros_like(p) for n, p in run.named.items()}
    for weights, c in (
        (None, torch.ones(B, dtype=torch.float64)),
        (random, random),
        (pergrad.clip(limit), naive.clip_weights(G, limit)),
        (lambda norms: norms * 0.5, norms * 0.5),
    ):
        got = pergrad.backward(
            run.losses, run.params, weights=weights, retain_graph=True, **case.options
        )
        assert_agrees(got, norms, norms, what="norms")
        for name, part in naive.weighted_sum(G, c).items():
            expected[name] += part
    scale = (norms * (2 + random.abs() + norms)).sum()
    for name, p in run.named.items():
        grad = torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        assert_agrees(grad, expected[name], scale, what=f"{name}.grad")


@EACH_CASE
def test_second_moments(case: zoo.Case, B: int) -> None:
    """Weighted and not, by the verb and of the matrix."""
    run, G = case.run(B), zoo.reference(case.name, B)
    c = torch.linspace(-1.5, 1.0, B, dtype=torch.float64)
    options = {**case.options, "retain_graph": True}
    J = pergrad.gradients(run.losses, run.params, **options)
    squares = naive.norms(G).square()
    for weights, w in ((None, torch.ones_like(c)), (0.5, 0 * c + 0.5), (c, c)):
        scale = (squares * w.abs()).sum()
        got = pergrad.second_moments(run.losses, run.params, weights, **options)
        own = J.second_moment(weights)
        assert list(got) == list(own) == list(G)
        for name, g in G.items():
            want = torch.einsum("b,b...->...", w, g.square())
            assert_agrees(got[name], want, scale, what=f"second moment of {name}")
            assert_agrees(own[name], want, scale, what=f"the matrix' second moment of {name}")


@EACH_CASE
def test_matrix(case: zoo.Case, B: int) -> None:
    """What a GradientMatrix says about itself, its rows and its products."""
    run, G = case.run(B), zoo.reference(case.name, B)
    J = pergrad.gradients(run.losses, run.params, **case.options)
    norms, names = naive.norms(G), list(G)
    del run

    assert J.shape == (B, naive.flat(G).shape[1])
    assert len(J) == B
    assert list(J.names) == names
    assert J.dtype == torch.float64
    assert J.device.type == "cpu"
    assert str(B) in repr(J)

    assert_agrees(J.norms(), norms, norms, what="norms")
    for name, want in naive.norms_by_parameter(G).items():
        assert_agrees(J.norms_by_parameter()[name], want, norms, what=name)
    square = norms[:, None] * norms[None]
    assert_agrees(J.gram(), naive.gram(G), square, what="gram")
    assert_rows_agree(J.dense(), G, norms=norms, what="dense")
    assert_agrees(J.flat(), naive.flat(G), norms[:, None], what="flat")
    assert_agrees(J.detach().norms(), norms, norms, what="detach")

    half = J.to(torch.float32)
    assert half.dtype == torch.float32
    assert half.norms().dtype == torch.float32
    assert_agrees(half.norms(), norms, norms, tolerance=1e-5, what="to float32")
    assert_agrees(J.to("cpu").norms(), norms, norms, what="to cpu")

    v = {n: torch.randn(g.shape[1:], dtype=torch.float64) for n, g in G.items()}
    flat = torch.cat([part.reshape(-1) for part in v.values()])
    for form in (v, list(v.values()), flat):
        assert_agrees(J @ form, naive.matvec(G, v), norms * flat.norm(), what="J @ v")

    c = torch.linspace(-1.5, 1.0, B, dtype=torch.float64)
    got, scale = J.T @ c, (norms * c.abs()).sum()
    assert list(got) == names
    for name, want in naive.weighted_sum(G, c).items():
        assert_agrees(got[name], want, scale, what=f"J.T @ c {name}")
    scaled = J.scale(c)
    assert_agrees(scaled.norms(), norms * c.abs(), norms * c.abs(), what="scale")
    assert_rows_agree(scaled.dense(), naive.scale(G, c), norms=norms * c.abs(), what="scale")


@SOME_CASES
def test_a_matrix_travels(case: zoo.Case, B: int) -> None:
    """What is pickled in one process and loaded in another gives the same bits."""
    run = case.run(B)
    J = pergrad.gradients(run.losses, run.params, **case.options)
    K = pickle.loads(pickle.dumps(J))
    for name, got in K.dense().items():
        torch.testing.assert_close(got, J.dense()[name], rtol=0, atol=0)
    torch.testing.assert_close(K @ K.T, J @ J.T, rtol=0, atol=0)


def test_a_matrix_that_is_out_of_date_does_not_travel() -> None:
    layer, x = nn.Linear(2, 1), torch.ones(3, 2)
    J = pergrad.gradients(layer(x).squeeze(1), layer)
    x.add_(1)
    with pytest.raises(pergrad.UsageError, match=r"changed in place(.|\n)*clone that tensor"):
        pickle.dumps(J)


@EACH_CASE
def test_rows_of_a_matrix(case: zoo.Case, B: int) -> None:
    run, G = case.run(B), zoo.reference(case.name, B)
    J = pergrad.gradients(run.losses, run.params, **case.options)
    norms = naive.norms(G)
    mask = torch.arange(B) % 2 == 0
    picks: list[tuple[object, object]] = [
        (slice(0, 2), slice(0, 2)),
        (slice(1, None), slice(1, None)),
        (slice(0, 0), slice(0, 0)),
        (slice(None, None, 2), slice(None, None, 2)),
        (mask, mask),
        (torch.arange(B).flip(0), torch.arange(B).flip(0)),
    ]
    if B:
        picks += [(0, slice(0, 1)), (-1, slice(B - 1, B))]
        picks += [(torch.tensor([B - 1, 0, 0]), torch.tensor([B - 1, 0, 0]))]
    for index, same in picks:
        part, want = J[index], naive.take(G, same)
        assert len(part) == len(norms[same])
        assert_agrees(part.norms(), norms[same], norms[same], what=f"norms {index}")
        assert_rows_agree(part.dense(), want, norms=norms[same], what=f"dense {index}")
        scale = norms[same][:, None] * norms[None]
        assert_agrees(part @ J.T, naive.gram(want, G), scale, what=f"J[{index}] @ J.T")
        assert_agrees(part.gram(), naive.gram(want), scale[:, same], what=f"gram {index}")


@SOME_CASES
def test_two_matrices(case: zoo.Case, B: int) -> None:
    """Products of the gradients of two models: all rows with all, and row with row."""
    one, G = case.run(B), zoo.reference(case.name, B)
    two, H = case.run(B, seed=1), zoo.reference(case.name, B, seed=1)
    J = pergrad.gradients(one.losses, one.params, **case.options)
    K = pergrad.gradients(two.losses, two.params, **case.options)
    rows, columns = naive.norms(G), naive.norms(H)
    scale = rows[:, None] * columns[None]
    assert_agrees(J @ K.T, naive.gram(G, H), scale, what="J @ K.T")
    assert_agrees(J.row_dots(K), naive.row_dots(G, H), rows * columns, what="row_dots")
    assert_agrees(J.cosines(K), naive.cosines(G, H), (scale > 0).double(), what="cosines")


@EACH_CASE
def test_preconditioned(case: zoo.Case, B: int) -> None:
    run, G = case.run(B), zoo.reference(case.name, B)
    J = pergrad.gradients(run.losses, run.params, **case.options)
    norms = naive.norms(G)

    diagonal = {n: torch.rand(g.shape[1:], dtype=torch.float64) for n, g in list(G.items())[::2]}
    P = J.precondition(Diagonal(diagonal))
    want = {n: g * diagonal[n] if n in diagonal else g for n, g in G.items()}
    _assert_preconditioned(P, J, want, G, norms)

    forms: dict[str, tuple] = {}
    for n, g in G.items():
        if g.dim() >= 3 and g.shape[1:].numel():
            p, d = g.shape[1], g.shape[2:].numel()
            A, S = torch.rand(d, d, dtype=torch.float64), torch.rand(p, p, dtype=torch.float64)
            forms[n] = [(A, S), (A.diag(), S), (A, 0.5), (2.0, S.diag())][len(forms) % 4]
    if forms:
        P = J.precondition(Kronecker(forms))
        want = {n: naive.kronecker(g, *forms[n]) if n in forms else g for n, g in G.items()}
        _assert_preconditioned(P, J, want, G, norms)


def _assert_preconditioned(
    P: pergrad.GradientMatrix,
    J: pergrad.GradientMatrix,
    want: naive.Grads,
    G: naive.Grads,
    norms: Tensor,
) -> None:
    # The scale is that of the terms: A and S are small, and their sizes are at most these.
    sizes = norms * max(1.0, *(g.shape[1:].numel() * 4.0 for g in G.values()))
    assert_rows_agree(P.dense(), want, norms=sizes, what="dense")
    assert_agrees(P.norms(), naive.norms(want), sizes, what="norms")
    scale = sizes[:, None] * norms[None]
    assert_agrees(P @ J.T, naive.gram(want, G), scale, what="P @ J.T")
    assert_agrees(J @ P.T, naive.gram(G, want), scale.T, what="J @ P.T")
    assert_agrees(P.row_dots(J), naive.row_dots(want, G), sizes * norms, what="row_dots")


@EVERYTHING
def test_explain(case: zoo.Case, B: int) -> None:
    run = case.run(B)
    coverage = pergrad.explain(run.losses, run.params)
    names = [row.parameter for row in coverage.rows]
    assert list(dict.fromkeys(names)) == list(run.named)
    for row in coverage.rows:
        assert row.how in {"rule", "fallback", "mixed", "unreached"}
        assert row.cost >= 0
        assert row.parameter in str(coverage)
        assert row.parameter.startswith(row.module)
    assert 0 <= coverage.exact_share <= 1
    if B:
        hows = {row.how for row in coverage.rows}
        if case.mixes == "yes":
            assert "mixed" in hows
        if case.mixes == "no":
            assert "mixed" not in hows
        if case.rule:
            assert coverage.exact_share + coverage.unreached_share == 1, coverage


@EACH_CASE
def test_check(case: zoo.Case, B: int) -> None:
    run = case.run(B)
    rerun = run.alone if case.deterministic and case.mixes == "no" else None
    report = pergrad.check(run.losses, run.params, examples=2, rerun=rerun, **case.options)
    assert report.ok, report
    assert report.max_error <= min(report.noise, 1e-9)
    assert list(report.by_parameter) == list(run.named)
    assert str(report)


@pytest.mark.parametrize(("case", "B"), zoo.each_batch(mixes=("yes",)))
def test_refused_by_default(case: zoo.Case, B: int) -> None:
    for verb in (pergrad.norms, pergrad.norms_by_parameter, pergrad.gram, pergrad.gradients):
        run = case.run(B)
        with pytest.raises(pergrad.MixedExamplesError, match=r"mix(.|\n)*on_mixing"):
            verb(run.losses, run.params)
    run = case.run(B)
    with pytest.raises(pergrad.MixedExamplesError, match=r"mix(.|\n)*on_mixing"):
        pergrad.backward(run.losses, run.params)
    with pytest.raises(pergrad.MixedExamplesError, match=r"mix(.|\n)*on_mixing"):
        pergrad.dots(run.losses, run.params, against=direction(run.named))
    assert all(p.grad is None for p in run.named.values())


@pytest.mark.parametrize(("case", "B"), zoo.each_batch(mixes=("maybe",)))
def test_refused_or_exact_where_nobody_can_tell(case: zoo.Case, B: int) -> None:
    run = case.run(B)
    norms = naive.norms(zoo.reference(case.name, B))
    try:
        got = pergrad.norms(run.losses, run.params)
    except pergrad.MixedExamplesError:
        return
    assert_agrees(got, norms, norms)


def test_the_fallback_warns_with_op_place_and_cost() -> None:
    run = zoo.CASES["custom_with_weight"].run(3)
    with pytest.warns(pergrad.FallbackWarning, match=r"Product(.|\n)*\bW\b(.|\n)*3 examples"):
        pergrad.norms(run.losses, run.params)


@pytest.mark.parametrize(("kind", "more"), [(nn.LSTM, {}), (nn.LSTM, {"num_layers": 2})])
def test_a_fused_recurrent_layer_is_served_by_a_rule(kind: type, more: dict) -> None:
    """In float32 the whole layer is one op on CPUs that have one (in float64 it never is)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), kind(3, 4, batch_first=True, **more))
        x = torch.randn(3, 5, 3)
    losses = model(x)[0].square().sum((1, 2))
    G = naive.loop_grads(losses, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        J = pergrad.gradients(losses, model, retain_graph=True)
    told = [w for w in caught if issubclass(w.category, pergrad.FallbackWarning)]
    assert not told
    norms = naive.norms(G)
    assert_agrees(J.norms(), norms, norms, tolerance=1e-5, what="norms")
    assert_rows_agree(J.dense(), G, norms=norms, tolerance=1e-5, what="dense")
    scale = norms[:, None] * norms[None]
    got = pergrad.gram(losses, model)
    assert_agrees(got, naive.gram(G), scale, tolerance=1e-5, what="gram")


def test_norms_are_exactly_zero_where_the_gradient_is() -> None:
    for name in ("dead_relu", "zero_losses"):
        run = zoo.CASES[name].run(3)
        got = pergrad.norms(run.losses, run.params)
        assert got[1] == 0
        assert (got[[0, 2]] > 0).all()


def test_a_batch_norm_is_named_with_a_remedy() -> None:
    run = zoo.CASES["residual_block_zero_gamma"].run(3)
    with pytest.raises(pergrad.MixedExamplesError, match=r"bn[12](.|\n)*eval\(\)(.|\n)*GroupNorm"):
        pergrad.norms(run.losses, run.params)


def test_clip() -> None:
    norms = torch.tensor([0.0, 0.5, 2.0, 4.0])
    assert torch.equal(pergrad.clip(2.0)(norms), torch.tensor([1.0, 1.0, 1.0, 0.5]))


def test_names() -> None:
    """Of a module, of a mapping, of a list; tied tensors under their first name."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    x = torch.ones(3, 2)

    def names(params: object) -> list[str]:
        return list(pergrad.norms_by_parameter(model(x).sum(1), params))

    assert names(model) == ["0.weight", "0.bias", "1.bias"]
    assert names({"w": model[0].weight, "b": model[0].bias, "again": model[1].weight}) == ["w", "b"]
    assert names(model.parameters()) == ["0", "1", "2"]
    assert names([model[1].bias]) == ["0"]
