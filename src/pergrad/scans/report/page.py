"""The page: numbers, figures and previews put together as one HTML file.

Owns: what the page says in words, which examples are listed in it, and that everything that came
from a user is escaped.
Does not know: the store, models, data sets.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bokeh.embed import json_item
from bokeh.model import Model

from pergrad.scans.report import figures, shell
from pergrad.scans.report.compared import Reference, compare, floats, rounded
from pergrad.scans.report.numbers import (
    Floats,
    Group,
    Ints,
    Scale,
    Summary,
    concentration,
    density,
    groups,
    histogram,
    largest,
    number,
    percent,
    squared_shares,
    summary,
)
from pergrad.scans.report.preview import Preview

LISTED = (
    20_000  # up to so many examples, each is in the page; with more, a density and some of them
)
RANKED = 500  # with more: so many of the largest norms and losses, and of the smallest norms
SPREAD = 2_000  # and so many evenly over the data set
CARDS = 96  # of each ranking, as cards
ROWS = 500  # of the table of examples without scores
PREVIEW_BYTES = 5_000_000  # of pictures and texts, in the page


def html(
    table: pa.Table, manifest: dict[str, Any], previews: dict[int, Preview], *, title: str | None
) -> str:
    """The page's text; see `pergrad.scans.report.write`."""
    scores = _Columns.of(table)
    found = summary(scores.loss, scores.norm, scores.failed)
    references = list(compare(table))
    compared = sum(name.startswith("cosine:") for name in table.schema.names)
    listed, lists = _listed(scores, references, previews)
    place = {int(row): at for at, row in enumerate(listed)}
    shown, without = _previews(scores, listed, lists, references, previews)
    drawn = _figures(scores, listed, references)
    model = manifest.get("scored", {}).get("model", "a model")
    data = {
        "figures": {name: json_item(plot) for name, plot in drawn.items()},
        "examples": {
            "index": scores.index[listed].tolist(),
            "key": None if scores.key is None else scores.key.take(pa.array(listed)).to_pylist(),
            "loss": _plain(scores.loss[listed]),
            "norm": _plain(scores.norm[listed]),
            "share": _plain(_shares(scores.norm)[listed]),
            "error": {place[int(r)]: scores.error[int(r)].as_py()
                      for r in np.flatnonzero(scores.failed) if int(r) in place},
        },
        "complete": len(listed) == len(scores.index),
        "total": len(scores.index),
        "lists": {name: [place[int(row)] for row in rows] for name, rows in lists.items()},
        "references": [r.in_page(place) for r in references],
        "previews": shown,
    }  # fmt: skip
    rows = list(groups(_groups(table)))
    scripts = [shell.bokeh(), shell.own("drawing.js") + shell.own("page.js")]
    return shell.template(shell.own("page.html")).render(
        title=title or f"Gradient norms: {model}",
        about=_about(manifest),
        summary=found,
        headline=headline(found),
        findings=findings(found),
        references=references,
        compared=compared,
        groups=[_bar(row, rows) for row in rows],
        failures=_failures(scores),
        without=without,
        has_previews=bool(shown),
        complete=data["complete"],
        listed=len(listed),
        data=data,
        has_curve="curve" in drawn,
        has_dots=any(r.dots is not None for r in references),
        scripts=scripts,
        hashes=shell.hashes(scripts),
        style=shell.own("page.css"),
        number=number,
        percent=percent,
        rows_shown=ROWS,
    )


# --- the columns ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """The table's columns as arrays, NaN for what is missing."""

    index: Ints
    key: pa.ChunkedArray | None
    loss: Floats
    norm: Floats
    error: pa.ChunkedArray
    failed: Any  # (N,) bool

    @classmethod
    def of(cls, table: pa.Table) -> "_Columns":
        names = table.schema.names
        error = table["error"] if "error" in names else pa.chunked_array(
            [pa.nulls(len(table), pa.string())]
        )  # fmt: skip
        return cls(
            index=table["index"].to_numpy().astype(np.int64),
            key=table["key"] if "key" in names else None,
            loss=floats(table["loss"]),
            norm=floats(table["norm"]),
            error=error,
            failed=pc.is_valid(error).to_numpy().astype(bool),
        )

    @property
    def finite(self) -> Any:
        """Which examples have a place in the plot."""
        return np.isfinite(self.loss) & np.isfinite(self.norm)


def _groups(table: pa.Table) -> Iterator[tuple[str, Floats]]:
    """The columns norm:{group}, one at a time: together they may be large."""
    for name in table.schema.names:
        if name.startswith("norm:"):
            yield name.removeprefix("norm:"), floats(table[name])


def _shares(norms: Floats) -> Floats:
    """(N,) each example's share of the total squared norm, NaN where it has no finite norm."""
    shares = np.full(len(norms), math.nan)
    finite = np.isfinite(norms)
    shares[finite] = squared_shares(norms[finite])
    return shares


# --- which examples are in the page --------------------------------------------------------------


def _listed(
    scores: _Columns, references: Sequence[Reference], previews: dict[int, Preview]
) -> tuple[Ints, dict[str, Ints]]:
    """The rows of the table that are in the page, and the rankings among them."""
    finite = scores.finite & ~scores.failed
    known = np.where(finite, scores.norm, math.nan)
    losses = np.where(finite, scores.loss, math.nan)
    lists = {
        "norm": largest(known, CARDS),
        "loss": largest(losses, CARDS),
        "small": largest(-known, CARDS),
    }
    if len(scores.index) <= LISTED:
        return np.arange(len(scores.index)), lists
    picks = [
        *lists.values(),
        largest(known, RANKED),
        largest(-known, RANKED),
        largest(losses, RANKED),
        np.linspace(0, len(scores.index) - 1, SPREAD).astype(np.int64),
        np.searchsorted(scores.index, sorted(previews)),
        np.flatnonzero(~finite)[:ROWS],
    ]
    picks += [rows for r in references for rows in r.listed]
    rows = np.unique(np.concatenate(picks))
    return rows[rows < len(scores.index)], lists


def _previews(
    scores: _Columns,
    listed: Ints,
    lists: dict[str, Ints],
    references: Sequence[Reference],
    previews: dict[int, Preview],
) -> tuple[dict[int, dict[str, Any]], int]:
    """Previews by place in the list, the most wanted first until the page is full; how many more
    there would be.
    """
    order = [
        *lists.values(),
        *(rows for r in references for rows in r.listed),
    ]
    rest = listed[largest(np.nan_to_num(scores.norm[listed], nan=-1.0), len(listed))]
    place = {int(row): at for at, row in enumerate(listed)}
    shown: dict[int, dict[str, Any]] = {}
    room, without = PREVIEW_BYTES, 0
    for row in dict.fromkeys(int(r) for rows in [*order, rest] for r in rows):
        preview = previews.get(int(scores.index[row]))
        if preview is None:
            continue
        parts = {
            "image": preview.image_url(), "text": preview.text, "label": preview.label,
            "more": list(preview.more.items()) or None, "error": preview.error,
        }  # fmt: skip
        size = _size(parts)
        if size > room:  # what can be filtered by is small, and may have room all the same
            without += 1
            parts = {name: parts[name] for name in ("label", "more")}
            size = _size(parts)
            if not 0 < size <= room:
                continue
        room -= size
        shown[place[row]] = {name: part for name, part in parts.items() if part}
    return shown, without


def _size(parts: Mapping[str, Any]) -> int:
    """Bytes in the page."""
    return sum(len(str(part).encode(errors="replace")) for part in parts.values() if part)


# --- figures -------------------------------------------------------------------------------------


def _figures(scores: _Columns, listed: Ints, references: Sequence[Reference]) -> dict[str, Model]:
    """The page's figures by name; those that would be empty are left out."""
    finite = scores.finite
    loss_scale, norm_scale = Scale.of(scores.loss[finite]), Scale.of(scores.norm[finite])
    drawn: dict[str, Model] = {}
    if not finite.any():
        return drawn
    at = np.flatnonzero(finite[listed])
    rows = listed[at]
    cells = None
    if len(listed) < len(finite):
        cells = density(scores.loss[finite], scores.norm[finite], loss_scale, norm_scale)
    drawn["plane"] = figures.plane(
        scores.loss[rows], scores.norm[rows], at, loss_scale, norm_scale, cells
    )
    for name, values, scale, axis in (
        ("norms", scores.norm[finite], norm_scale, "gradient norm"),
        ("losses", scores.loss[finite], loss_scale, "loss"),
    ):
        drawn[name] = figures.bars(histogram(values, scale), scale, axis, name)
    x, y = concentration(scores.norm[finite])
    if len(x) > 1:
        drawn["curve"] = figures.curve(x, y)
    if references:
        scale = Scale("linear", -1.03, 1.03)
        drawn["cosines"] = figures.bars(references[0].bars, scale, "cosine", "cosines")
    return drawn


# --- words ---------------------------------------------------------------------------------------


def headline(found: Summary) -> str:
    """The page's first sentence."""
    if not found.examples:
        return "There are no scores yet."
    if not found.scored:
        return "No example has a finite loss and norm."
    if math.isnan(found.top_share):
        return "Every gradient is exactly zero: there is nothing left to learn from these examples."
    if found.scored == 1:
        return "One example was scored."
    share, top = percent(found.top_share), found.top
    who = f"the {top:,} examples with the largest gradients (the top 1 %) carry"
    if top == 1:
        who = "the example with the largest gradient carries"
    rest = f"{who} {share} of the total squared gradient norm."
    ratio = found.top_share * found.scored / top  # 1 if all norms are alike
    if found.top_share >= 0.5:
        return f"A few examples dominate: {rest}"
    if ratio >= 3:
        return f"The gradients are uneven: {rest}"
    return f"The gradients are spread evenly: {rest}"


def findings(found: Summary) -> list[str]:
    """What else there is to say, a sentence each."""
    said = []
    if found.scored > 1 and not math.isnan(found.top_share):
        said.append(_solved(found))
    rho = found.rank_correlation
    if found.scored >= 10 and not math.isnan(rho):
        if rho > 0.9:
            story = "a ranking by norm is nearly a ranking by loss"
        elif rho > 0.5:
            story = "a ranking by norm resembles one by loss, and is not the same"
        elif rho > -0.1:
            story = "the norm says something that the loss does not"
        else:
            story = "examples with a larger loss tend to have a smaller gradient"
        said.append(f"Norm and loss have a rank correlation of {rho:.3f}: {story}.")
    bad = []
    if found.failed:
        bad.append(f"{found.failed:,} could not be scored")
    if found.non_finite:
        have = "has" if found.non_finite == 1 else "have"
        bad.append(f"{found.non_finite:,} {have} a loss or norm that is not finite")
    if bad:
        said.append(f"{' and '.join(bad)}: listed below, and left out of the other numbers.")
    return said


def _solved(found: Summary) -> str:
    """How many examples have nothing left to teach."""
    quiet, carried = found.zero + found.small, percent(found.small_share)
    if not quiet:
        return "No example is solved: every gradient is over 1 % of the typical size."
    who = "1 example is" if quiet == 1 else f"{quiet:,} examples are"
    if not found.small:
        return f"{who} solved: a gradient of exactly zero."
    size = "under 1 % of the typical size"
    if found.zero:
        size = f"exactly zero for {found.zero:,}, and {size} for {found.small:,}"
    return (
        f"{who} as good as solved: a gradient {size}. Together they carry {carried} of the total "
        "squared norm."
    )


def _failures(scores: _Columns) -> list[dict[str, Any]]:
    """The examples without scores, or whose scores are not finite, for a table."""
    rows = np.flatnonzero(scores.failed | ~scores.finite)[:ROWS]
    return [
        {
            "index": int(scores.index[row]),
            "key": None if scores.key is None else scores.key[int(row)].as_py(),
            "loss": None if scores.failed[row] else number(float(scores.loss[row])),
            "norm": None if scores.failed[row] else number(float(scores.norm[row])),
            "error": scores.error[int(row)].as_py(),
        }
        for row in rows
    ]


def _about(manifest: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the manifest says of what was scored; None where it says nothing."""
    scored, settings = manifest.get("scored", {}), manifest.get("settings", {})
    parameters = scored.get("parameters")
    examples = scored.get("examples")
    return [
        ("Model", scored.get("model")),
        ("Mode", settings.get("mode")),
        ("Parameters", None if parameters is None else f"{len(parameters):,} tensors"),
        ("Weights", scored.get("weights_hash")),
        ("Losses", scored.get("losses")),
        ("Examples", None if examples is None else f"{examples:,}"),
        ("Begun", manifest.get("created")),
        ("Job", manifest.get("job")),
        ("Command", manifest.get("command")),
        ("pergrad", scored.get("pergrad")),
        ("torch", scored.get("torch")),
        ("Drawn by", f"Bokeh {version('bokeh')}"),
    ]


def _bar(group: Group, rows: list[Group]) -> dict[str, Any]:
    """A group's row of the table: where its bars start and end, in per cent of the width."""
    low, high = _span(rows)

    def at(value: float) -> float:
        if not value > 0 or not high > low:
            return 0.0
        where = (math.log10(value) - low) / (high - low)
        return round(100 * min(1.0, max(0.0, where)), 2)

    q = [at(value) for value in group.quantiles]
    top = max((row.share for row in rows if not math.isnan(row.share)), default=0.0)
    return {
        "name": group.name,
        "share": group.share,
        "width": 0.0 if not top or math.isnan(group.share) else round(100 * group.share / top, 2),
        "quantiles": group.quantiles,
        "thin": (q[0], max(0.5, q[4] - q[0])),
        "thick": (q[1], max(0.8, q[3] - q[1])),
        "median": q[2],
        "zero": group.zero,
    }


def _span(rows: list[Group]) -> tuple[float, float]:
    """The powers of ten that the groups' quantiles span, six at most."""
    values = [v for row in rows for v in row.quantiles if v > 0 and math.isfinite(v)]
    if not values:
        return 0.0, 0.0
    high = math.log10(max(values))
    return max(math.log10(min(values)), high - 6), high


# --- putting it together -------------------------------------------------------------------------


def _plain(values: Floats) -> list[float | str]:
    """Numbers for JSON: six digits; NaN and infinities, which JSON lacks, as words."""
    return [rounded(v) if math.isfinite(v) else number(v) for v in values.tolist()]
