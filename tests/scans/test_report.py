"""The report: its numbers by hand, its words, its previews, and the page in a browser."""

import base64
import csv
import hashlib
import io
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import pergrad
from pergrad.scans import previews as kept
from pergrad.scans.report import numbers, page, preview, write
from pergrad.scans.report.preview import Preview
from pergrad.scans.store import Store

HOSTILE = (
    "<script>alert(1)</script></script><!-- <img src=x onerror=alert(2)>{{7*7}} $$x$$ größe 例"
)
NAN, INF = math.nan, math.inf


def table(
    losses: Any, norms: Any, errors: Any = None, keys: Any = None, **columns: Any
) -> pa.Table:
    n = len(norms)
    parts: dict[str, Any] = {"index": pa.array(range(n), pa.int64())}
    if keys is not None:
        parts["key"] = pa.array(keys, pa.string())
    parts["loss"] = pa.array(losses, pa.float32())
    parts["norm"] = pa.array(norms, pa.float32())
    parts |= {name: pa.array(values, pa.float32()) for name, values in columns.items()}
    parts["error"] = pa.array(errors or [None] * n, pa.string())
    return pa.table(parts)


def manifest(**scored: Any) -> dict[str, Any]:
    return {
        "scored": {
            "model": "Net", "losses": "losses", "parameters": [["w", [2], "torch.float32"]],
            "weights_hash": "0123", "examples": 3, "torch": "2.13.0", "pergrad": "0.1.0", **scored,
        },
        "settings": {"mode": "eval"},
        "created": "2026-01-01T00:00:00+00:00",
        "command": "python scan.py",
        "job": None,
    }  # fmt: skip


def html(scores: pa.Table, previews: dict[int, Preview] | None = None, **scored: Any) -> str:
    return page.html(scores, manifest(**scored), previews or {}, title=None)


def data(text: str) -> dict[str, Any]:
    """What the page's script reads."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]


def words(text: str) -> str:
    """The page without scripts, styles and tags."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))


# --- numbers -------------------------------------------------------------------------------------


def test_summary_is_what_a_loop_counts() -> None:
    rng = np.random.default_rng(0)
    n = 1_234
    norms = np.exp(3 * rng.normal(size=n))
    losses = norms**0.5 + rng.random(n)
    norms[:50] = 0
    norms[50:53] = NAN, INF, NAN
    losses[53] = NAN
    failed = np.zeros(n, bool)
    failed[60:67] = True
    found = numbers.summary(losses, norms, failed)
    known = sorted(norms[i] for i in range(n) if math.isfinite(norms[i]) and not failed[i])
    squares = [v * v for v in known]
    rms = math.sqrt(math.fsum(squares) / len(known))
    top = math.ceil(len(known) / 100)
    assert (found.examples, found.failed, found.non_finite) == (n, 7, 4)
    assert found.scored == n - 11
    assert found.zero == 50
    assert found.small == sum(0 < v < 0.01 * rms for v in known)
    assert found.top == top == 13
    assert found.top_share == pytest.approx(math.fsum(squares[-top:]) / math.fsum(squares))
    quiet = math.fsum(s for s, v in zip(squares, known, strict=True) if v < 0.01 * rms)
    assert found.small_share == pytest.approx(quiet / math.fsum(squares))
    assert found.rms_norm == pytest.approx(rms)
    assert found.median_norm == pytest.approx(np.median(known))
    assert found.max_norm == known[-1]


def test_shares_of_huge_norms_do_not_overflow() -> None:
    found = numbers.summary(np.ones(3), np.array([1e200, 1e200, 0.0]), np.zeros(3, bool))
    assert found.top_share == 0.5
    assert found.rms_norm == pytest.approx(1e200 * math.sqrt(2 / 3))


@pytest.mark.parametrize("norms", [[], [0.0], [0.0, 0.0], [NAN, NAN], [INF]])
def test_summary_of_nothing_much(norms: list[float]) -> None:
    found = numbers.summary(np.ones(len(norms)), np.array(norms), np.zeros(len(norms), bool))
    assert math.isnan(found.top_share)
    assert page.headline(found)
    assert page.findings(found) is not None


def test_rank_correlation_shares_ranks_among_ties() -> None:
    a = np.array([1.0, 2.0, 2.0, 3.0])
    b = np.array([10.0, 30.0, 20.0, 30.0])
    by_hand = np.corrcoef([1, 2.5, 2.5, 4], [1, 3.5, 2, 3.5])[0, 1]
    assert numbers.rank_correlation(a, b) == pytest.approx(by_hand)
    assert numbers.rank_correlation(a, -a) == pytest.approx(-1)
    assert math.isnan(numbers.rank_correlation(a, np.ones(4)))


def test_concentration_is_a_cumulative_sum() -> None:
    norms = np.array([1.0, 3.0, 0.0, 2.0])
    x, y = numbers.concentration(norms)
    assert x.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert y == pytest.approx([9 / 14, 13 / 14, 1, 1])
    assert len(numbers.concentration(np.zeros(5))[0]) == 0
    x, y = numbers.concentration(np.ones(100_000))
    assert len(x) <= 200
    assert y == pytest.approx(x)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([], "linear"),
        ([0.0], "linear"),
        ([5.0], "linear"),
        ([1.0, 2.0, 3.0], "linear"),
        ([-3.0, 2.0], "linear"),
        ([1e-6, 1.0, 1e6], "log"),
        ([0.0, 1e-6, 1.0], "log"),
        ([0.0, 1e-40, 1e-39], "linear"),
        ([0.0, 1e-300, 1.0], "log"),
        ([-1e5, 1e-3, 2e-3, -1e-3], "symlog"),
        ([-1.7e308, 1.7e308], "symlog"),
        ([-1e-9, 1e9], "linear"),
        (np.linspace(0.001, 1, 500).tolist(), "linear"),
    ],
)
def test_a_scale_has_a_place_for_every_value(values: list[float], kind: str) -> None:
    array = np.array(values)
    scale = numbers.Scale.of(array)
    assert scale.kind == kind
    places = scale.place(array)
    assert np.isfinite(places).all()
    assert ((places >= scale.low) & (places <= scale.high)).all()
    order = np.argsort(array)
    assert (np.diff(places[order]) >= 0).all()
    for place, value in zip(places, values, strict=True):
        if place != scale.strip and abs(value) < 1e300:
            assert scale.value(place) == pytest.approx(value, rel=1e-6, abs=1e-300)
    ticks = scale.ticks()
    assert 1 <= len(ticks) <= 16
    assert all(scale.low <= place <= scale.high for place, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


def test_zeros_on_a_log_axis_have_a_strip_of_their_own() -> None:
    values = np.array([0.0, 0.0, 1e-3, 1.0, 10.0])
    scale = numbers.Scale.of(values)
    assert scale.strip is not None
    assert scale.strip < -3
    assert (scale.strip, "0") in scale.ticks()
    bars = numbers.histogram(values, scale)
    assert bars.label[0] == "exactly 0"
    assert bars.count[0] == 2
    assert numbers.Scale.of(np.array([1e-30, 1.0])).strip_label.startswith("< 10⁻")


@pytest.mark.parametrize(
    "values",
    [
        [1.0], [0.0], [0.0, 0.0], [2.0, 2.0, 2.0], [-1.0, 1.0], [0.0, 1e-9, 1e9], [1e-9, 1e9],
        [-1e9, 1e-9, -1e-9], list(range(1000)),
    ],
)  # fmt: skip
def test_a_histogram_counts_every_value_once(values: list[float]) -> None:
    array = np.array(values, float)
    scale = numbers.Scale.of(array)
    bars = numbers.histogram(array, scale)
    assert bars.count.sum() == len(values)
    assert (bars.left < bars.right).all()
    assert (bars.left[1:] >= bars.right[:-1] - 1e-9).all()
    cells = numbers.density(array, array, scale, scale)
    assert cells.count.sum() == len(values)


def test_a_histogram_of_a_linear_scale_is_numpys() -> None:
    values = np.random.default_rng(0).random(500)
    bars = numbers.histogram(values, numbers.Scale.of(values), bins=20)
    count, edges = np.histogram(values, 20)
    assert bars.count.tolist() == count.tolist()
    assert bars.left == pytest.approx(edges[:-1])


def test_groups_share_the_squared_norm() -> None:
    a, b = np.array([3.0, 4.0, 0.0]), np.array([0.0, NAN, 5.0])
    first, second = numbers.groups(iter([("a", a), ("b", b)]))
    # means of squares, so that a missing value does not count as a zero
    assert first.share == pytest.approx((25 / 3) / (25 / 3 + 25 / 2))
    assert first.share + second.share == pytest.approx(1)
    assert first.quantiles == pytest.approx(np.quantile(a, [0.05, 0.25, 0.5, 0.75, 0.95]))
    assert (first.zero, second.zero) == (pytest.approx(1 / 3), 0.5)


def test_largest_goes_by_position_among_ties() -> None:
    values = np.array([1.0, 5.0, NAN, 5.0, 1.0, 1.0])
    assert numbers.largest(values, 3).tolist() == [1, 3, 0]
    assert numbers.largest(values, 99).tolist() == [1, 3, 0, 4, 5]
    assert numbers.largest(values, 0).tolist() == []
    assert numbers.largest(-values, 2).tolist() == [0, 4]


@pytest.mark.parametrize(
    ("norms", "said"),
    [
        ([1.0, 1.0, 2.0], "No example is solved"),
        ([0.0, 1.0, 2.0], "1 example is solved: a gradient of exactly zero."),
        ([0.001, 1.0, 2.0], "1 example is as good as solved: a gradient under 1 % of the typical"),
        (
            [0.0, 0.001, 2.0],
            "a gradient exactly zero for 1, and under 1 % of the typical size for 1",
        ),
    ],
)
def test_what_is_solved_is_said_as_it_is(norms: list[float], said: str) -> None:
    found = numbers.summary(np.ones(3), np.array(norms), np.zeros(3, bool))
    assert said in " ".join(page.findings(found))


# --- previews ------------------------------------------------------------------------------------


def picture(width: int = 8, height: int = 8, mode: str = "L") -> Image.Image:
    return Image.new(mode, (width, height), 77 if mode in "LIF" else (10, 200, 30))


@pytest.mark.parametrize(
    ("shown", "kind"),
    [
        ("a text", "text"),
        (picture(), "image"),
        ({"image": picture(), "label": "seven"}, "image"),
        ({"text": "a text", "label": 7}, "text"),
        ({"text": "a text", "image": picture(), "predicted": 3}, "dict"),
        ({"label": "only"}, "dict"),
        ({}, "dict"),
        ("", "text"),
        ("lone \ud800 surrogate", "text"),
    ],
)
def test_a_preview_survives_the_store(shown: Any, kind: str) -> None:
    made = Preview.of(shown)
    stored = made.stored()
    assert stored[0] == kind
    assert Preview.from_stored(*stored) == made
    assert Preview.from_stored(*Preview(error="ValueError: no").stored()).error == "ValueError: no"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "F", "I;16"])
def test_pictures_of_every_mode_become_small_files(mode: str) -> None:
    image = Image.new(mode, (900, 300))
    made = Preview.of(image)
    assert made.image is not None
    opened = Image.open(io.BytesIO(made.image))
    assert opened.size == (192, 64)
    assert image.size == (900, 300)  # the user's own is untouched
    assert made.image_url().startswith("data:image/png;base64,")  # type: ignore[union-attr]


def test_numbers_beyond_a_byte_span_black_to_white() -> None:
    image = Image.fromarray(np.array([[0, 30_000], [60_000, 15_000]], np.uint16))
    opened = Image.open(io.BytesIO(Preview.of(image).image or b""))
    assert [opened.getpixel(at) for at in ((0, 0), (1, 0), (0, 1), (1, 1))] == [0, 128, 255, 64]


def test_a_photograph_is_kept_as_jpeg() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    made = Preview.of(Image.fromarray(noise))
    assert made.image_url().startswith("data:image/jpeg;base64,")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("array", "size", "corner"),
    [
        (np.full((4, 6), 9, np.uint8), (6, 4), 9),
        (np.array([[0.0, 1.0], [0.5, 0.25]]), (2, 2), 0),
        (torch.linspace(-1, 1, 12).reshape(1, 3, 4), (4, 3), 0),
        (torch.zeros(3, 5, 7, requires_grad=True), (7, 5), (0, 0, 0)),
        (np.zeros((5, 7, 3), bool), (7, 5), (0, 0, 0)),
        (np.array([[NAN, 1.0]]), (2, 1), 0),
        (np.array([[True, False]]), (2, 1), 255),
    ],
)
def test_arrays_are_pictures(array: Any, size: tuple[int, int], corner: Any) -> None:
    image = Image.open(io.BytesIO(Preview.of({"image": array}).image or b""))
    assert image.size == size
    assert image.getpixel((0, 0)) == corner


@pytest.mark.parametrize("shown", [7, None, object(), np.zeros(3), np.array([["a"]]), [picture()]])
def test_what_cannot_be_drawn_is_refused(shown: Any) -> None:
    with pytest.raises(pergrad.UsageError, match=r"(?s)cannot draw.*Return a PIL image"):
        Preview.of(shown)


def test_long_texts_are_cut_and_say_so() -> None:
    made = Preview.of({"text": "x" * 10_000, "label": "y" * 1_000, "k" * 500: "v" * 500})
    assert made.text is not None
    assert made.text.endswith("… (6,000 more characters)")
    assert made.label is not None
    assert made.label.endswith("… (800 more characters)")
    assert all(len(part) < 250 for pair in made.more.items() for part in pair)


# --- a scan keeps previews, and reports them -----------------------------------------------------


def job(n: int = 12, show: Any = None, key: Any = None) -> pergrad.Job:
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(n, 3, generator=generator)
    model = torch.nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.fill_(0.1)

    def losses(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum(1)

    return pergrad.Job(model, [xs[i] for i in range(n)], losses, show=show, key=key)


def test_a_scan_keeps_what_a_report_shows(tmp_path: Path) -> None:
    def show(i: int) -> Any:
        if i == 3:
            raise KeyError("no such file")
        return None if i == 4 else f"text of {i}"

    pergrad.scan(job(show=show), tmp_path / "out", progress=False, groups="layer")
    found = kept.recall(Store(tmp_path / "out"))
    assert sorted(found) == list(range(12))
    assert found[5].text == "text of 5"
    assert found[3].error == "KeyError: 'no such file'"
    assert "cannot draw" in (found[4].error or "")
    moved = tmp_path / "elsewhere"  # needs neither the job nor the path it was scanned to
    shutil.move(tmp_path / "out", moved)
    path = pergrad.open_scores(moved).report(tmp_path / "report.html", title="My scores")
    text = path.read_text(encoding="utf-8")
    assert "<title>My scores</title>" in text
    shown = data(text)["previews"]
    assert shown["5"]["text"] == "text of 5"
    assert "no such file" in shown["3"]["error"]
    assert data(text)["examples"]["norm"] == pytest.approx(
        pergrad.open_scores(moved).table()["norm"].to_pylist(), rel=1e-5
    )


def test_show_is_asked_again_by_the_next_scan(tmp_path: Path) -> None:
    pergrad.scan(job(), tmp_path, progress=False)
    assert kept.recall(Store(tmp_path)) == {}
    pergrad.scan(job(show=lambda i: "old"), tmp_path, progress=False)
    pergrad.scan(job(show=lambda i: f"new {i}"), tmp_path, progress=False)
    assert kept.recall(Store(tmp_path))[7].text == "new 7"
    pergrad.scan(job(), tmp_path, progress=False)
    assert kept.recall(Store(tmp_path))[7].text == "new 7"


def test_of_many_examples_the_remarkable_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "ALL", 50)
    monkeypatch.setattr(kept, "EACH_END", 5)
    monkeypatch.setattr(kept, "EACH_REFERENCE", 4)
    monkeypatch.setattr(kept, "SPREAD", 3)
    many = job(300, show=str)
    against = {"mean": pergrad.MeanGradient(many.data)}
    scores = pergrad.scan(many, tmp_path, progress=False, against=against)
    shown = set(kept.recall(Store(tmp_path)))
    norms = scores.table()["norm"].to_numpy()
    losses = scores.table()["loss"].to_numpy()
    cosines = scores.table()["cosine:mean"].to_numpy()
    for order in (norms, -norms, losses):
        assert set(np.argsort(-order, kind="stable")[:5].tolist()) <= shown
    for order in (cosines, -cosines):
        assert set(np.argsort(-order, kind="stable")[:4].tolist()) <= shown
    assert {0, 299} <= shown
    assert len(shown) <= 15 + 8 + 3


def test_previews_that_cannot_be_written_leave_the_scores(tmp_path: Path) -> None:
    pergrad.scan(job(), tmp_path, progress=False)
    (tmp_path / "shown").write_text("in the way")
    with pytest.raises(pergrad.StoreError, match=r"(?s)scores are whole.*run the same scan again"):
        pergrad.scan(job(show=str), tmp_path, progress=False)
    assert len(pergrad.open_scores(tmp_path).table()) == 12


def test_a_report_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    with pytest.raises(pergrad.UsageError, match=r"(?s)Cannot write.*folder that exists"):
        write(table([1], [1]), manifest(), {}, tmp_path / "none" / "report.html")
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_line_to_install_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pergrad.extras.find_spec", lambda name: None if name == "bokeh" else name)
    with pytest.raises(pergrad.MissingExtraError, match=r"pip install 'pergrad\[report\]'"):
        write(table([1], [1]), manifest(), {}, tmp_path / "report.html")


# --- the page's text -----------------------------------------------------------------------------


def test_the_page_says_what_the_numbers_are() -> None:
    norms = [100.0] + [1.0] * 150 + [0.0] * 49
    text = words(html(table(np.arange(200.0), norms)))
    share = numbers.percent((100**2 + 1) / (100**2 + 150))  # two examples are 1 % of 200
    assert "A few examples dominate: the 2 examples with the largest gradients" in text
    assert f"carry {share} of the total squared gradient norm" in text
    assert "49 examples are solved: a gradient of exactly zero." in text
    assert "200 examples" in text
    assert "Network" not in text


@pytest.mark.parametrize(
    ("norms", "losses", "errors", "said"),
    [
        ([], [], None, "There are no scores yet."),
        ([2.0], [1.0], None, "One example was scored."),
        ([0.0] * 5, [1.0] * 5, None, "Every gradient is exactly zero"),
        ([NAN] * 5, [1.0] * 5, None, "No example has a finite loss and norm."),
        ([INF, 1.0, 2.0], [1.0, NAN, 3.0], None, "2 have a loss or norm that is not finite"),
        ([None, 1.0, 2.0], [None, 2.0, 3.0], ["Err: x", None, None], "1 could not be scored"),
        ([None] * 2, [None] * 2, ["Err: x"] * 2, "No example has a finite loss and norm."),
        ([1.0] * 300, [2.0] * 300, None, "spread evenly"),
        (np.geomspace(1e-38, 1e30, 50), np.geomspace(1e-38, 1e38, 50), None, "dominate"),
        (np.ones(50), -np.geomspace(1e-5, 1e5, 50), None, "50 examples"),
    ],
)
def test_a_page_for_every_case(norms: Any, losses: Any, errors: Any, said: str) -> None:
    text = html(table(losses, norms, errors))
    assert said in words(text)
    assert data(text)["complete"]


def test_layers_references_and_failures_are_listed() -> None:
    n = 60
    rng = np.random.default_rng(0)
    cosines = rng.uniform(-0.9, 0.9, n)
    cosines[5], cosines[6], cosines[7] = 0.999, -0.98, 0.0
    norms = rng.random(n)
    norms[7] = 0
    errors = [None] * (n - 1) + [f"ValueError: {HOSTILE}"]
    columns = {f"norm:layer.{k}": rng.random(n) * (k + 1) for k in range(300)}
    scores = table(rng.random(n), norms, errors, **columns, **{"cosine:val": cosines})
    text = html(scores)
    assert "Show all 300 layers" in text
    squares = [
        float(np.square(scores[f"norm:layer.{k}"].to_numpy().astype(float)).sum())
        for k in range(300)
    ]
    shares = [float(share) for share in re.findall(r'<tr data-share="([^"]*)"', text)]
    assert shares == pytest.approx([square / sum(squares) for square in squares])
    reference = data(text)["references"][0]
    assert reference["similar"][0] == [5, pytest.approx(0.999, rel=1e-5)]
    assert reference["conflicting"][0] == [6, pytest.approx(-0.98, rel=1e-5)]
    assert sum(reference["bars"]["count"]) == n - 1  # a zero gradient has no direction
    assert "ValueError" in words(text)


def test_nothing_that_came_from_a_user_is_markup(tmp_path: Path) -> None:
    n = 30
    rng = np.random.default_rng(0)
    errors: list[str | None] = [None] * n
    errors[3] = HOSTILE
    scores = table(
        rng.random(n), rng.random(n), errors, keys=[f"{HOSTILE}{i}" for i in range(n)],
        **{f"norm:{HOSTILE}": rng.random(n), f"cosine:{HOSTILE}": rng.random(n)},
    )  # fmt: skip
    shown = {i: Preview.of({"text": HOSTILE, "label": HOSTILE, HOSTILE: HOSTILE}) for i in range(9)}
    shown[9] = Preview(error=HOSTILE)
    about = manifest(model=HOSTILE, losses=HOSTILE)
    about |= {"command": HOSTILE, "job": HOSTILE, "created": HOSTILE}
    text = page.html(scores, about, shown, title=HOSTILE)
    assert "<script>alert" not in text
    assert "<img" not in text
    # a script runs only if the policy knows it: nothing but the page's own two
    allowed = re.findall(r"'sha256-([^']+)'", text)
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    own = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert own == allowed
    assert len(own) == 2
    assert data(text)["previews"]["0"]["text"] == HOSTILE
    assert data(text)["references"][0]["name"] == HOSTILE


def test_a_million_examples_are_aggregated() -> None:
    n = 1_000_000
    rng = np.random.default_rng(0)
    losses = np.exp(rng.normal(size=n))
    norms = losses * np.exp(rng.normal(size=n))
    norms[rng.random(n) < 0.1] = 0
    rows = np.argsort(-norms.astype(np.float32), kind="stable")[:96]
    text = html(
        table(losses, norms, keys=[f"example/{i:07d}" for i in range(n)], **{"cosine:val": losses}),
        {int(i): Preview.of(f"text {i} " * 400) for i in rows},
    )
    assert len(text.encode()) < 15_000_000
    found = data(text)
    assert not found["complete"]
    assert found["total"] == n
    top = [found["examples"]["index"][at] for at in found["lists"]["norm"]]
    assert top == rows.tolist()
    assert found["previews"][str(found["lists"]["norm"][0])]["text"].startswith(f"text {rows[0]}")
    assert len(found["examples"]["index"]) < page.LISTED


def test_previews_stop_when_the_page_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PREVIEW_BYTES", 1_000)
    shown = {i: Preview.of("x" * 90) for i in range(50)}
    text = html(table(np.zeros(50), np.arange(50.0)), shown)
    found = data(text)["previews"]
    assert sorted(int(at) for at in found) == list(range(39, 50))  # those with the largest norms
    assert "39 pictures or texts are left out" in words(text)


# --- in a browser --------------------------------------------------------------------------------

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1280,1000"
)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    assert all(found.values()), "no Chromium here: say `make browser`, which installs it"
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"] or ""
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(found["chromedriver"]))
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def digits() -> tuple[pa.Table, dict[int, Preview]]:
    """As many examples as the digits have, with pictures of their size."""
    rng = np.random.default_rng(0)
    n = 1_797
    losses = np.exp(2 * rng.normal(size=n))
    norms = losses**0.7 * np.exp(0.5 * rng.normal(size=n))
    norms[:70] = 0
    pictures = rng.integers(0, 256, (n, 8, 8), dtype=np.uint8)
    shown = {
        i: Preview.of({"image": pictures[i], "label": f"label {i % 10}", "predicted": i % 7})
        for i in range(n)
    }
    columns = {f"norm:layer.{k}": norms * rng.random(n) for k in range(50)}
    columns |= {f"cosine:{name}": rng.uniform(-1, 1, n) for name in ("validation", "the 3s")}
    errors = [None] * (n - 2) + ["ValueError: broken file"] * 2
    norms[-2:], losses[-2:], norms[100] = NAN, NAN, INF
    return table(losses, norms, errors, **columns), shown


class Page:
    """A report opened in the browser."""

    def __init__(self, browser: webdriver.Chrome, path: Path) -> None:
        self.browser = browser
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
        self.theme("light")
        self.open(path)

    def open(self, path: Path) -> None:
        for log in ("browser", "performance"):
            self.browser.get_log(log)  # type: ignore[no-untyped-call]
        self.browser.get(path.as_uri())
        self.until("return document.documentElement.dataset.ready")

    def run(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)  # type: ignore[no-untyped-call]

    def until(self, script: str) -> Any:
        return self.read_until(lambda: self.run(script), bool, script)

    def read_until(
        self, read: Callable[[], Any], good: Callable[[Any], Any], what: str = ""
    ) -> Any:
        for _ in range(600):
            found = read()
            if good(found):
                return found
            time.sleep(0.05)
        raise AssertionError(f"still {found!r}: {what}; console: {self.complaints()}")

    def one(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> Any:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def theme(self, scheme: str) -> None:
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def complaints(self) -> list[str]:
        return [
            entry["message"]
            for entry in self.browser.get_log("browser")  # type: ignore[no-untyped-call]
            if entry["level"] in ("WARNING", "SEVERE")
        ]

    def requests(self) -> list[str]:
        """Addresses asked for, other than the page itself and what it carries."""
        entries = self.browser.get_log("performance")  # type: ignore[no-untyped-call]
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        urls = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        assert urls  # the page itself: the log is on
        return [url for url in urls if not url.startswith(("file:", "data:", "blob:"))]

    def pixel(self, row: int) -> tuple[float, float]:
        """Where the mark of an example is, from the centre of the plot's element."""
        return self.run(
            """
            const view = [...Bokeh.index].map((e) => e[1] || e)
              .find((v) => v.model && v.model.name === "plane");
            const source = view.model.document.get_model_by_name("points");
            const k = [...source.get_column("row")].indexOf(arguments[0]);
            const frame = view.frame_view;
            const box = document.getElementById("figure-plane").getBoundingClientRect();
            return [frame.x_scale.compute(source.get_column("x")[k]) - box.width / 2,
                    frame.y_scale.compute(source.get_column("y")[k]) - box.height / 2];
            """,
            row,
        )

    def colour(self, figure: str) -> str:
        """Of the marks of a figure, as drawn."""
        return self.run(
            """
            const view = [...Bokeh.index].map((e) => e[1] || e)
              .find((v) => v.model && v.model.name === arguments[0]);
            return view.model.renderers[0].glyph.fill_color.value;
            """,
            figure,
        )


@pytest.fixture(scope="module")
def digits_page(
    digits: tuple[pa.Table, dict[int, Preview]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("report") / "digits.html"
    return write(digits[0], manifest(), digits[1], path)


@pytest.fixture
def opened(chromium: webdriver.Chrome, digits_page: Path) -> Page:
    return Page(chromium, digits_page)


def test_a_report_of_the_digits_is_small(digits_page: Path) -> None:
    assert digits_page.stat().st_size < 8_000_000


def test_the_page_opens_in_peace(opened: Page) -> None:
    for figure in ("plane", "norms", "losses", "curve", "cosines"):
        assert opened.one(f"#figure-{figure}").size["height"] >= 200
        assert opened.run(
            "return document.getElementById(arguments[0]).children.length", f"figure-{figure}"
        )
    assert len(opened.all("#top-cards .card")) == 12
    assert opened.complaints() == []
    assert opened.requests() == []


def test_pointing_at_a_mark_shows_the_example(
    opened: Page, digits: tuple[pa.Table, dict[int, Preview]]
) -> None:
    norms = digits[0]["norm"].to_numpy()
    lonely = int(np.nanargmin(np.where(norms > 0, norms, NAN)))
    plot = opened.one("#figure-plane")
    opened.run("arguments[0].scrollIntoView({block: 'center'})", plot)
    x, y = opened.pixel(lonely)
    ActionChains(opened.browser).move_to_element_with_offset(plot, int(x), int(y)).perform()
    opened.until(
        "return [...document.querySelectorAll('#inspector dd')]"
        f".some((e) => e.textContent === '{lonely}')"
    )
    inspector = opened.one("#inspector")
    assert f"label {lonely % 10}" in inspector.text
    picture = opened.one("#inspector img")
    assert picture.get_attribute("src").startswith("data:image/png;base64,")
    assert picture.get_attribute("naturalWidth") == "8"


def test_dragging_over_a_region_lists_it(
    opened: Page, digits: tuple[pa.Table, dict[int, Preview]]
) -> None:
    plot = opened.one("#figure-plane")
    opened.run("arguments[0].scrollIntoView({block: 'center'})", plot)
    corners = opened.run(
        """
        const view = [...Bokeh.index].map((e) => e[1] || e)
          .find((v) => v.model && v.model.name === "plane");
        const frame = view.frame_view;
        const box = document.getElementById("figure-plane").getBoundingClientRect();
        const at = (x, y) => [frame.x_scale.compute(x) - box.width / 2,
                              frame.y_scale.compute(y) - box.height / 2];
        return [at(0.5, 0.25), at(1.5, 2)];  // powers of ten
        """
    )
    (x0, y0), (x1, y1) = [(round(x), round(y)) for x, y in corners]
    ActionChains(opened.browser).move_to_element_with_offset(
        plot, x0, y0
    ).click_and_hold().move_to_element_with_offset(
        plot, (x0 + x1) // 2, (y0 + y1) // 2
    ).move_to_element_with_offset(plot, x1, y1).release().perform()
    text = opened.until("return document.getElementById('selection-count').textContent")
    count = int(text.split()[0].replace(",", ""))
    losses, norms = (digits[0][name].to_numpy() for name in ("loss", "norm"))

    def within(slack: float) -> int:
        inside = (abs(np.log10(losses) - 1) < 0.5 + slack) & (norms < 10 ** (2 + slack))
        return int((inside & (np.log10(norms) > 0.25 - slack)).sum())

    with np.errstate(divide="ignore", invalid="ignore"):
        assert within(-0.03) <= count <= within(0.03)  # a pixel is a hundredth of a decade
    assert 5 < count < 500
    shown = [card.get_attribute("data-row") for card in opened.all("#selection-cards .card")]
    assert len(shown) == min(count, 12)
    opened.one("#clear").click()
    assert not opened.one("#selection").is_displayed()
    assert opened.complaints() == []


def test_a_region_by_numbers_is_exact(
    opened: Page, digits: tuple[pa.Table, dict[int, Preview]]
) -> None:
    losses, norms = (digits[0][name].to_numpy() for name in ("loss", "norm"))
    opened.one(".region summary").click()
    for name, value in (("loss-from", "0.2"), ("loss-to", "0.9"), ("norm-to", "0.5")):
        opened.one(f"input[name={name}]").send_keys(value)
    opened.one("#region button").click()
    with np.errstate(invalid="ignore"):
        inside = np.flatnonzero((losses >= 0.2) & (losses <= 0.9) & (norms <= 0.5))
    assert opened.one("#selection-count").text == f"{len(inside):,} examples selected"
    assert len(inside) > 60
    listed = opened.run(
        "return [...document.querySelectorAll('#selection-cards .card')].map((c) => c.dataset.row)"
    )
    assert int(listed[0]) == inside[np.argmax(norms[inside])]
    opened.one("#selection-more").click()
    assert len(opened.all("#selection-cards .card")) == 60
    opened.run(
        "const s = document.getElementById('selection-order'); s.value = 'index';"
        "s.dispatchEvent(new Event('change'))"
    )
    first = opened.run("return document.querySelector('#selection-cards .card').dataset.row")
    assert int(first) == inside[0]
    opened.one("input[name=loss-from]").clear()
    opened.one("input[name=loss-from]").send_keys("99999")
    opened.one("#region button").click()
    assert "No example" in opened.one("#selection-count").text


def test_the_keyboard_is_enough(opened: Page, digits: tuple[pa.Table, dict[int, Preview]]) -> None:
    losses, norms = (digits[0][name].to_numpy().astype(float) for name in ("loss", "norm"))
    finite = np.flatnonzero(np.isfinite(losses) & np.isfinite(norms))

    def tab() -> Any:
        ActionChains(opened.browser).send_keys(Keys.TAB).perform()
        return opened.run("return document.activeElement")

    reached = []
    for _ in range(8):
        reached.append(tab().get_attribute("id") or "")
        if reached[-1] == "figure-plane":
            break
    assert reached[-1] == "figure-plane", reached

    def press(key: str) -> str:
        ActionChains(opened.browser).send_keys(key).perform()
        return opened.run(
            "const t = [...document.querySelectorAll('#inspector dt')];"
            "return t.find((e) => e.textContent === 'index').nextSibling.textContent"
        )

    by_norm = finite[np.argsort(norms[finite], kind="stable")]
    by_loss = finite[np.argsort(losses[finite], kind="stable")]
    assert int(press(Keys.END)) == by_norm[-1]
    assert int(press(Keys.ARROW_DOWN)) == by_norm[-2]
    assert int(press(Keys.ARROW_DOWN)) == by_norm[-3]
    assert int(press(Keys.ARROW_UP)) == by_norm[-2]
    at = by_loss.tolist().index(by_norm[-2])
    assert int(press(Keys.ARROW_LEFT)) == by_loss[at - 1]
    press(Keys.ENTER)
    assert opened.one("#full").is_displayed()
    assert f"{by_loss[at - 1]}" in opened.one("#full").text
    ActionChains(opened.browser).send_keys(Keys.ESCAPE).perform()
    opened.until("return !document.getElementById('full').open")
    tab()  # on to the region, the rankings, ...
    assert tab().tag_name in ("summary", "input", "button")


def test_rankings_references_and_layers_change(opened: Page) -> None:
    before = [c.text for c in opened.all("#top-cards .numbers")]
    opened.one("input[name=ranking]").send_keys(Keys.ARROW_RIGHT)
    after = [c.text for c in opened.all("#top-cards .numbers")]
    assert before != after
    similar = [c.text for c in opened.all("#similar-cards .numbers")]
    opened.one("input[name=reference]").send_keys(Keys.ARROW_DOWN)
    assert opened.one("#reference-name").text == "the 3s"
    assert [c.text for c in opened.all("#similar-cards .numbers")] != similar
    visible = "return [...document.querySelectorAll('#groups tbody tr')].filter((r) => !r.hidden)"
    assert len(opened.run(visible)) == 40
    opened.run("document.getElementById('sort-groups').click()")
    shares = opened.run(f"{visible}.map((r) => Number(r.dataset.share))")
    assert shares == sorted(shares, reverse=True)
    opened.run("document.getElementById('groups-more').click()")
    assert len(opened.run(visible)) == 50
    assert opened.complaints() == []


def listed(opened: Page, where: str = "top") -> list[int]:
    """The rows of the cards of a list."""
    cards = opened.all(f"#{where}-cards .card")
    return [int(card.get_attribute("data-row")) for card in cards]


def test_filter_by_label_key_words_and_wrong_only(
    opened: Page, digits: tuple[pa.Table, dict[int, Preview]]
) -> None:
    """Over all examples of the page, not only those that were ranked highest."""
    norms = digits[0]["norm"].to_numpy().astype(float)
    norms[~np.isfinite(norms)] = -1
    rows = np.arange(len(norms))

    def first(these: Any) -> list[int]:
        kept = np.flatnonzero(these & (norms >= 0))
        return kept[np.argsort(-norms[kept], kind="stable")][:12].tolist()

    def choose(which: str, value: str) -> None:
        opened.run(
            "const s = document.getElementById('filter-form')[arguments[0]];"
            "s.value = arguments[1]; s.dispatchEvent(new Event('input', {bubbles: true}))",
            which, value,
        )  # fmt: skip

    everything = listed(opened)
    opened.one("#filter summary").click()
    choose("key", "label")
    assert listed(opened) == everything  # by which key, and not yet which value
    choose("value", "=label 3")
    assert listed(opened) == first(rows % 10 == 3)
    assert opened.one("#filter-count").text == "180 of 1,797 examples"
    choose("key", "predicted")
    choose("value", "=5")
    assert listed(opened) == first(rows % 7 == 5)
    opened.one("#filter-form button[type=reset]").click()
    opened.read_until(lambda: listed(opened), everything.__eq__)
    opened.one("#filter-form input[name=words]").send_keys("1234")
    assert listed(opened) == [1234]
    opened.one("#filter-form button[type=reset]").click()
    opened.read_until(lambda: listed(opened), everything.__eq__)
    opened.one("#filter-form input[name=wrong]").click()  # the label is "label 3", not "3"
    assert listed(opened) == everything
    assert opened.complaints() == []


def test_what_does_not_pass_cannot_be_selected(
    opened: Page, digits: tuple[pa.Table, dict[int, Preview]]
) -> None:
    opened.one("#filter summary").click()
    opened.run(
        "const f = document.getElementById('filter-form'); f.key.value = 'label';"
        "f.key.dispatchEvent(new Event('input', {bubbles: true})); f.value.value = '=label 3';"
        "f.colour.checked = true; f.colour.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert len(opened.all("#legend li")) == 10
    kinds = opened.run(
        "const s = Bokeh.documents.map((d) => d.get_model_by_name('points')).find(Boolean);"
        "const of = (name) => [...new Set(s.get_column(name))];"
        "return [of('alpha').length, of('colour').length]"
    )
    assert kinds == [2, 10]
    opened.one(".region summary").click()
    opened.one("input[name=loss-from]").send_keys("0")
    opened.one("#region button").click()
    norms, losses = (digits[0][name].to_numpy() for name in ("norm", "loss"))
    passing = np.isfinite(norms) & np.isfinite(losses) & (np.arange(len(norms)) % 10 == 3)
    assert opened.one("#selection-count").text == f"{int(passing.sum())} examples selected"
    opened.theme("dark")
    assert opened.complaints() == []


@pytest.mark.parametrize("told", [{"wrong": True}, {"label": 3, "predicted": 5}, {}], ids=str)
def test_wrong_only(chromium: webdriver.Chrome, tmp_path: Path, told: dict[str, Any]) -> None:
    right = {name: {"wrong": False, "label": 3, "predicted": 3}[name] for name in told}
    shown = {i: Preview.of({"text": "x", **(told if i % 4 == 0 else right)}) for i in range(20)}
    scores = table(np.arange(20.0), np.arange(20.0) + 1)
    opened = Page(chromium, write(scores, manifest(), shown, tmp_path / "a.html"))
    opened.one("#filter summary").click()
    box = opened.one("#filter-form input[name=wrong]")
    assert box.is_displayed() == bool(told)
    if told:
        box.click()
        assert listed(opened) == [16, 12, 8, 4, 0]


def test_keys_are_searched(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    scores = table(np.arange(9.0), np.arange(9.0), keys=[f"Img_{i}.png" for i in range(9)])
    opened = Page(chromium, write(scores, manifest(), {}, tmp_path / "a.html"))
    opened.one("#filter summary").click()
    opened.one("#filter-form input[name=words]").send_keys("img_4")
    assert listed(opened) == [4]
    opened.one("#filter-form input[name=words]").send_keys("nothing")
    assert "There are none." in opened.one("#top-cards").text


def test_a_reference_is_ranked_by_inner_product_and_by_cosine(
    chromium: webdriver.Chrome, tmp_path: Path
) -> None:
    """The inner product finds who moves it, the cosine who is like it."""
    rng = np.random.default_rng(0)
    n = 60
    norms, cosines = np.exp(2 * rng.normal(size=n)), rng.uniform(-1, 1, n)
    columns = {"cosine:test 7": cosines, "dot:test 7": 3 * norms * cosines}
    path = write(table(norms, norms, **columns), manifest(), {}, tmp_path / "a.html")
    opened = Page(chromium, path)
    assert opened.one("#h-references").text == "With and against test 7"
    products = norms * cosines
    assert listed(opened, "similar") == np.argsort(-products)[:12].tolist()
    assert listed(opened, "conflicting") == np.argsort(products)[:12].tolist()
    assert "inner product" in opened.one("#similar-cards .card").text
    opened.one("input[name=measure]").send_keys(Keys.ARROW_RIGHT)
    assert listed(opened, "similar") == np.argsort(-cosines)[:12].tolist()
    assert listed(opened, "conflicting") == np.argsort(cosines)[:12].tolist()
    assert "cosine" in opened.one("#similar-cards .card").text
    assert opened.complaints() == []


def test_arrows_go_from_card_to_card(opened: Page) -> None:
    """A list is one stop of the tab key."""
    opened.run("document.querySelector('#top-cards .card').focus()")
    for key in (Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_LEFT):
        ActionChains(opened.browser).send_keys(key).perform()
    cards = listed(opened)
    focused = "return document.activeElement.dataset.row || document.activeElement.id"
    assert int(opened.run(focused)) == cards[1]
    ActionChains(opened.browser).send_keys(Keys.TAB).perform()
    assert opened.run(focused) == "top-more"


@pytest.mark.parametrize("figure", ["norms", "losses", "curve", "cosines"])
def test_pointing_at_a_figure_reads_it_out(opened: Page, figure: str) -> None:
    plot, reading = opened.one(f"#figure-{figure}"), opened.one(f"#reading-{figure}")
    opened.run("arguments[0].scrollIntoView({block: 'center'})", plot)
    before = reading.text
    ActionChains(opened.browser).move_to_element(plot).move_by_offset(3, 2).perform()
    text = opened.until(
        f"const t = document.getElementById('reading-{figure}').textContent;"
        f"return t !== {json.dumps(before)} && t"
    )
    assert re.search(r"\d+ examples?$" if figure != "curve" else r"^The top .* carry .*%$", text)


def test_dark_and_light_follow_the_reader(opened: Page) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"

    def colours() -> list[str]:
        return [opened.run(paper), opened.colour("plane"), opened.colour("norms")]

    light = colours()
    opened.theme("dark")
    # the plots are told a frame after the page is
    dark = opened.read_until(colours, lambda now: all(map(str.__ne__, now, light)))
    red, green, blue = map(int, re.findall(r"\d+", dark[0]))
    assert max(red, green, blue) < 60


def test_a_phone_needs_no_sideways_scrolling(opened: Page, tmp_path: Path) -> None:
    browser = opened.browser
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    browser.refresh()
    opened.until("return document.documentElement.dataset.ready")
    assert opened.run("return document.documentElement.scrollWidth") <= 390
    plot = opened.one("#figure-plane")
    opened.run("arguments[0].scrollIntoView({block: 'center'})", plot)
    # a finger scrolls the page unless a tool is on
    touch = (
        "function find(root) { for (const e of root.querySelectorAll('*')) {"
        "if (e.classList.contains('bk-events')) return e;"
        "const deep = e.shadowRoot && find(e.shadowRoot); if (deep) return deep; } }"
        "return find(document.getElementById('figure-plane')).style.touchAction"
    )
    assert "pan-y" in opened.run(touch)
    opened.one("#tool-box").click()
    opened.read_until(lambda: opened.run(touch), "none".__eq__)
    opened.one("#tool-box").click()
    x, y = opened.pixel(200)
    box = opened.run("const b = arguments[0].getBoundingClientRect(); return [b.x + b.width / 2, "
                     "b.y + b.height / 2]", plot)  # fmt: skip
    point = [{"x": box[0] + x, "y": box[1] + y}]
    browser.execute_cdp_cmd(
        "Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": point}
    )
    browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    opened.until("return !document.getElementById('selection').hidden")
    assert "selected" in opened.one("#selection-count").text
    assert opened.complaints() == []


def test_a_screenshot_shows_the_marks(opened: Page) -> None:
    opened.run("document.getElementById('figure-plane').scrollIntoView({block: 'center'})")
    image = Image.open(io.BytesIO(opened.one("#figure-plane").screenshot_as_png)).convert("RGB")
    pixels = np.asarray(image).astype(int)
    blue = (pixels[..., 2] - pixels[..., 0] > 60).mean()
    assert 0.01 < blue < 0.5  # a cloud of marks on paper


def test_a_script_in_an_example_is_text(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    n = 40
    rng = np.random.default_rng(0)
    scores = table(
        rng.random(n), rng.random(n), keys=[f"{HOSTILE}{i}" for i in range(n)],
        **{f"norm:{HOSTILE}": rng.random(n), f"cosine:{HOSTILE}": rng.uniform(-1, 1, n)},
    )  # fmt: skip
    shown = {i: Preview.of({"text": HOSTILE, "label": HOSTILE, HOSTILE: HOSTILE}) for i in range(n)}
    path = write(scores, manifest(model=HOSTILE), shown, tmp_path / "a.html", title=HOSTILE)
    opened = Page(chromium, path)
    assert opened.browser.title == HOSTILE
    opened.one("#top-cards .card").click()
    for selector in ("#full .text", "#full .label", "#inspector .text", "#similar-cards .text"):
        text = opened.run("return document.querySelector(arguments[0]).textContent", selector)
        assert text == HOSTILE
    assert opened.one("#groups tbody th").text == HOSTILE
    assert opened.run("return document.querySelectorAll('main img').length") == 0
    assert opened.run("return document.querySelectorAll('script').length") == 3
    assert opened.complaints() == []  # an alert would also have stopped every command before
    assert opened.requests() == []


@pytest.mark.parametrize(
    ("norms", "losses"),
    [
        ([], []),
        ([1.0], [2.0]),
        ([0.0] * 9, [1.0] * 9),
        ([NAN] * 9, [1.0] * 9),
        (np.geomspace(1e-30, 1e30, 99), -np.geomspace(1e-5, 1e5, 99)),
    ],
    ids=["none", "one", "zeros", "nan", "range"],
)
def test_odd_pages_open_in_peace(
    chromium: webdriver.Chrome, tmp_path: Path, norms: Any, losses: Any
) -> None:
    path = write(table(losses, norms), manifest(), {}, tmp_path / "a.html")
    opened = Page(chromium, path)
    assert opened.one("h1").text
    assert opened.complaints() == []


def test_a_density_page_opens_in_peace(
    chromium: webdriver.Chrome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "LISTED", 2_000)
    monkeypatch.setattr(page, "SPREAD", 100)
    monkeypatch.setattr(page, "RANKED", 100)
    rng = np.random.default_rng(0)
    losses = np.exp(rng.normal(size=30_000))
    path = write(table(losses, losses**2), manifest(), {}, tmp_path / "a.html")
    opened = Page(chromium, path)
    assert "The shade says" in opened.one("#content").text
    opened.one(".region summary").click()
    opened.one("input[name=norm-from]").send_keys("1")
    opened.one("#region button").click()
    assert "in this page" in opened.one("#selection-count").text
    assert opened.complaints() == []


def test_the_limits_are_those_the_documentation_states() -> None:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    for number in (kept.ALL, page.LISTED, preview.TEXT_CHARACTERS):
        assert f"{number:,}" in text
    assert f"{preview.IMAGE_PIXELS} pixels" in text


def test_what_is_saved_is_text_in_a_spreadsheet(chromium: webdriver.Chrome, tmp_path: Path) -> None:
    """No cell begins as a formula would, and quotes, commas and lines end no cell."""
    keys = [
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        'a "b", c\n=d',
        "plain",
    ]
    scored = table(np.arange(8.0), np.arange(8.0) + 1, keys=keys)
    shown = {i: Preview.of({"text": "x", "label": key}) for i, key in enumerate(keys)}
    found = Page(chromium, write(scored, manifest(), shown, tmp_path / "page.html"))
    found.run(
        """
        URL.createObjectURL = (blob) => { window.saved = blob.text(); return "blob:none"; };
        HTMLAnchorElement.prototype.click = () => {};
        document.querySelector(".region").open = true;
        document.querySelector("#region button").click();
        document.getElementById("save").click();
        """
    )
    text = chromium.execute_async_script("window.saved.then(arguments[0])")  # type: ignore[no-untyped-call]
    rows = sorted(csv.DictReader(io.StringIO(text, newline="")), key=lambda row: int(row["index"]))
    for field in ("key", "label"):
        cells = [row[field] for row in rows]
        assert [cell.removeprefix("'") for cell in cells] == keys
        assert not any(cell[0] in "=+-@\t\r" for cell in cells)
        assert cells[-2:] == keys[-2:]
