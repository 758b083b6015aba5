"""A scalar loss taken apart: sums by example against the same loss of each example alone."""

import re
import subprocess
import sys
from collections.abc import Callable

import naive
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad

BOTH = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
B, T, V = 4, 3, 5


def data(dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, V)).to(dtype)
    x = torch.randn(B, T, 3, dtype=dtype)
    return model, x, torch.randint(V, (B, T)), torch.rand(B, T, V, dtype=dtype)


Loss = Callable[..., Tensor]
# (name, loss of (out, labels, targets, reduction)): rows are (B * T) or (B, ...), in order
EXACT: dict[str, Loss] = {
    "CrossEntropyLoss": lambda o, y, t, r: F.cross_entropy(
        o.flatten(0, 1), y.flatten(), reduction=r, ignore_index=2
    ),
    "CrossEntropyLoss, weighted": lambda o, y, t, r: F.cross_entropy(
        o.flatten(0, 1), y.flatten(), torch.arange(1, V + 1).to(o), reduction=r
    ),
    "CrossEntropyLoss, (B, C, T)": lambda o, y, t, r: F.cross_entropy(
        o.transpose(1, 2), y, reduction=r, ignore_index=2
    ),
    "NLLLoss": lambda o, y, t, r: F.nll_loss(
        o.flatten(0, 1).log_softmax(1), y.flatten(), reduction=r
    ),
    "MSELoss": lambda o, y, t, r: F.mse_loss(o, t, reduction=r),
    "SmoothL1Loss": lambda o, y, t, r: F.smooth_l1_loss(o, t, beta=0.3, reduction=r),
    "HuberLoss": lambda o, y, t, r: F.huber_loss(o, t, delta=0.3, reduction=r),
    "BCELoss": lambda o, y, t, r: F.binary_cross_entropy(o.sigmoid(), t, reduction=r),
    "BCEWithLogitsLoss": lambda o, y, t, r: F.binary_cross_entropy_with_logits(
        o, t, pos_weight=torch.arange(1, V + 1).to(o), reduction=r
    ),
    "SoftMarginLoss": lambda o, y, t, r: F.soft_margin_loss(o, t.round() * 2 - 1, reduction=r),
    "MultiMarginLoss": lambda o, y, t, r: F.multi_margin_loss(
        o.flatten(0, 1), y.flatten(), p=2, margin=0.7, reduction=r
    ),
    "MultiLabelMarginLoss": lambda o, y, t, r: F.multilabel_margin_loss(
        o.flatten(0, 1), torch.tensor([0, 3, -1, 0, 0]).expand(B * T, V), reduction=r
    ),
}
# These end in a mean or a sum of rows, which saves no values.
NO_VALUES: dict[str, Loss] = {
    "L1Loss": lambda o, y, t, r: F.l1_loss(o, t, reduction=r),
    "KLDivLoss": lambda o, y, t, r: F.kl_div(
        o.log_softmax(-1), t.softmax(-1), reduction="batchmean" if r == "mean" else r
    ),
    "PoissonNLLLoss": lambda o, y, t, r: F.poisson_nll_loss(o, t, reduction=r),
    "GaussianNLLLoss": lambda o, y, t, r: F.gaussian_nll_loss(o, t, t + 1, reduction=r),
    "MultiLabelSoftMarginLoss": lambda o, y, t, r: F.multilabel_soft_margin_loss(
        o.flatten(1), t.flatten(1).round(), reduction=r
    ),
    "HingeEmbeddingLoss": lambda o, y, t, r: F.hinge_embedding_loss(
        o, t.round() * 2 - 1, reduction=r
    ),
    "CosineEmbeddingLoss": lambda o, y, t, r: F.cosine_embedding_loss(
        o.flatten(1), t.flatten(1), torch.ones(B), reduction=r
    ),
    "MarginRankingLoss": lambda o, y, t, r: F.margin_ranking_loss(
        o, t, torch.ones_like(t), reduction=r
    ),
    "TripletMarginLoss": lambda o, y, t, r: F.triplet_margin_loss(
        o.flatten(1), t.flatten(1), -t.flatten(1), reduction=r
    ),
    "CrossEntropyLoss, label smoothing": lambda o, y, t, r: F.cross_entropy(
        o.flatten(0, 1), y.flatten(), label_smoothing=0.1, reduction=r
    ),
    "CTCLoss": lambda o, y, t, r: F.ctc_loss(
        o.log_softmax(2).transpose(0, 1), torch.full((B, 2), 3), torch.full((B,), T),
        torch.tensor([1, 2, 1, 1]), reduction=r,
    ),
}  # fmt: skip


def rows_of(loss: Loss, model: nn.Module, x: Tensor, y: Tensor, t: Tensor, r: str) -> naive.Grads:
    """The gradient through one example's output at a time, the others' cut off their graph."""
    named = dict(model.named_parameters())
    found = []
    for b in range(B):
        out = model(x)
        mine = torch.arange(B).reshape(B, 1, 1) == b
        found.append(naive.one_grad(loss(torch.where(mine, out, out.detach()), y, t, r), named))
    return {n: torch.stack([row[n] for row in found]) for n in named}


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", EXACT)
def test_values(name: str, reduction: str, dtype: torch.dtype) -> None:
    """Each part is the sum of the example's own rows; their gradients are those of the judge."""
    model, x, y, t = data(dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    loss = EXACT[name](model(x), y, t, reduction) / 3
    parts = pergrad.parts(loss, B)
    assert_agrees(parts.sum(), loss.detach(), loss.detach().abs(), tolerance)
    assert float(parts.rest.detach().abs()) <= tolerance * float(loss.detach())
    each = EXACT[name](model(x), y, t, "none")
    count = {"sum": 1.0, "mean": float(each.detach().sum() / (3 * loss.detach()))}[reduction]
    own = each.reshape(B, -1).sum(1) / (3 * count)
    assert_agrees(parts, own.detach(), parts.detach().max(), tolerance)
    want = naive.norms(rows_of(EXACT[name], model, x, y, t, reduction)) / 3
    assert_agrees(pergrad.norms(parts, model), want, want.max(), tolerance)
    loss = EXACT[name](model(x), y, t, reduction) / 3
    with pergrad.reading(loss, model, B) as read:
        loss.backward()
    assert_agrees(read.norms, want, want.max(), tolerance)
    assert_agrees(read.losses, own.detach(), own.detach().max(), tolerance)


@BOTH
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", NO_VALUES)
def test_no_values(name: str, reduction: str, dtype: torch.dtype) -> None:
    """Refused by the node's name; its norms are read all the same."""
    model, x, y, t = data(dtype)
    loss = NO_VALUES[name](model(x), y, t, reduction)
    with pytest.raises(pergrad.UnsupportedError, match=r"`(mean|sum)\w*`(.|\n)*pergrad\.reading"):
        pergrad.parts(loss, B)
    want = naive.norms(rows_of(NO_VALUES[name], model, x, y, t, reduction))
    with pergrad.reading(loss, model, B) as read:
        loss.backward()
    assert_agrees(read.norms, want, want.max(), 1e-9 if dtype == torch.float64 else 1e-5)
    with pytest.raises(pergrad.UnsupportedError, match="saves no values"):
        read.losses  # noqa: B018


def test_how_and_rest() -> None:
    model, x, y, _ = data(torch.float64)
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) + 0.5 * model[0].weight.norm()
    with pytest.raises(pergrad.UsageError, match=r"`linalg_vector_norm`(.|\n)*rest=True"):
        pergrad.parts(loss, B)
    parts = pergrad.parts(loss, B, rest=True)
    assert_agrees(parts.rest, 0.5 * model[0].weight.detach().norm(), 1.0)
    assert parts.how == "`nll_loss` over 12 rows of 4 examples + without `linalg_vector_norm`"


def test_a_constant_was_added() -> None:
    """Its value is nowhere in the graph, so the sum is not the loss: seen, never passed over."""
    model, x, y, _ = data(torch.float64)
    with pytest.raises(pergrad.UnsupportedError, match=r"sum up to(.|\n)*something else"):
        pergrad.parts(F.cross_entropy(model(x).flatten(0, 1), y.flatten()) + 1.0, B)


def test_a_loss_changed_in_value() -> None:
    model, x, y, _ = data(torch.float64)
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    with torch.no_grad():
        loss.add_(1.0)
    with pytest.raises(pergrad.UnsupportedError, match=r"sum up to(.|\n)*changed in place"):
        pergrad.parts(loss, B)


def test_half_precision() -> None:
    model, x, _, _ = data(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x), torch.zeros(B, T, V, dtype=torch.bfloat16))
    parts = pergrad.parts(loss, B)
    assert_agrees(parts.sum(), loss.detach(), 1.0, 1e-2)


@pytest.mark.parametrize(
    ("loss", "examples", "match"),
    [
        (lambda m, x: m(x).square().mean(2), B, r"\(4, 3\)(.|\n)*scalar"),
        (lambda m, x: 1.0, B, r"float(.|\n)*scalar"),
        (lambda m, x: m(x).mean().detach(), B, r"no graph(.|\n)*before backward"),
        (lambda m, x: F.mse_loss(m(x), x.new_zeros(B, T, V)), 3, r"4 rows(.|\n)*3 examples"),
        (lambda m, x: F.mse_loss(m(x), x.new_zeros(B, T, V)).sqrt(), B, r"`sqrt`"),
        (lambda m, x: F.mse_loss(m(x), x.new_zeros(B, T, V)) * m[0].bias.sum(), B, r"`mul`"),
    ],
)
def test_bad_input(loss: Callable, examples: int, match: str) -> None:
    model, x, _, _ = data(torch.float64)
    with pytest.raises(pergrad.UsageError, match=re.compile(match)):
        pergrad.parts(loss(model, x), examples)


def test_batch_dim_that_is_not_there() -> None:
    model, x, _, t = data(torch.float64)
    with pytest.raises(pergrad.UsageError, match=r"batch_dim is 5"):
        pergrad.parts(F.mse_loss(model(x), t), B, batch_dim=5)


def test_a_single_number() -> None:
    w = nn.Parameter(torch.tensor(2.0))
    with pytest.raises(pergrad.UnsupportedError, match=r"single number(.|\n)*losses \(B,\)"):
        pergrad.parts(F.mse_loss(w, torch.tensor(1.0)), 1)


def test_alone_in_a_process() -> None:
    """Nothing else has to be called before."""
    program = (
        "import torch, pergrad; x = torch.ones(4, 2, requires_grad=True); "
        "loss = torch.nn.functional.mse_loss(x, torch.full((4, 2), 3.0)) / 2; "
        "assert float(pergrad.parts(loss).sum()) == 2"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
