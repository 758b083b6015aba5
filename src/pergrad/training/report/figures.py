"""The figures of a run's report, drawn by Bokeh over the steps.

Owns: what is drawn, and the names by which the page's script finds figures and sources.
Does not know: colours (the page's style sheet has them), the run's folder, HTML.
"""

import math
from typing import Any

import numpy as np
from bokeh.model import Model
from bokeh.models import ColumnDataSource, HoverTool, Range1d, Scatter

from pergrad.scans.report.figures import empty, label_ticks
from pergrad.scans.report.numbers import Floats, Scale, number
from pergrad.training.report.numbers import MOST_LAYERS, Curves


def band(curves: Curves, marks: list[dict[str, Any]]) -> Model:
    """Quantiles of the examples' norms over the steps, and the outliers as dots."""
    scores = np.array([m["score"] for m in marks])
    values = np.concatenate([*curves.band.values(), scores])
    scale = _positive(values)
    axis = "norm, comparable across lengths"
    plot = empty(_steps(curves), scale, "step", axis, height=400, name="band")
    for low, high, alpha in (("p1", "p99", 0.13), ("p10", "p90", 0.26)):
        lower, upper = (_placed(scale, curves.band[q]) for q in (low, high))
        ok = np.isfinite(lower) & np.isfinite(upper)
        plot.varea(curves.step[ok], lower[ok], upper[ok], fill_alpha=alpha, name="area")
    middle = _placed(scale, curves.band["p50"])
    line = ColumnDataSource(
        {
            "x": curves.step, "y": middle,
            "label": [
                f"step {step:,.0f}: half of the scores below {number(p50)}, 90 % below "
                f"{number(p90)}, largest {number(most)}"
                for step, p50, p90, most in zip(
                    curves.step, curves.band["p50"], curves.band["p90"], curves.band["max"],
                    strict=True)
            ],
        },
        name="band-line",
    )  # fmt: skip
    drawn = plot.line("x", "y", source=line, line_width=2, name="line")
    points = ColumnDataSource(
        {
            "x": [m["step"] for m in marks],
            "y": scale.place(scores) if len(marks) else [],
            "label": [_about(m) for m in marks],
        },
        name="band-marks",
    )
    dots = plot.add_glyph(points, Scatter(size=7, fill_alpha=0.75, line_color=None), name="outlier")
    plot.add_tools(
        HoverTool(tooltips=None, renderers=[drawn], mode="vline", line_policy="nearest"),
        HoverTool(tooltips=None, renderers=[dots]),
    )
    return plot


def _about(mark: dict[str, Any]) -> str:
    who = mark["key"] or f"row {mark['row']}"
    numbers = ", ".join(f"{name} {number(mark[name])}" for name in ("score", "norm", "loss"))
    return f"step {mark['step']:,}: {who}, {numbers}"


def line(
    curves: Curves, values: Floats, axis: str, name: str, spikes: list[int] | None = None
) -> Model:
    """A number over the steps; spikes as dots."""
    known = values[np.isfinite(values)]
    scale = Scale.of(known)
    plot = empty(_steps(curves), scale, "step", axis, height=250, name=name)
    source = ColumnDataSource(
        {
            "x": curves.step, "y": _placed(scale, values),
            "label": [f"step {s:,.0f}: {number(v)}"
                      for s, v in zip(curves.step, values, strict=True)],
        },
        name=f"{name}-line",
    )  # fmt: skip
    drawn = plot.line("x", "y", source=source, line_width=2, name="line")
    if spikes and len(curves.step):
        at = np.clip(np.searchsorted(curves.step, spikes), 0, len(curves.step) - 1)
        points = {"x": curves.step[at], "y": _placed(scale, values)[at]}
        plot.add_glyph(ColumnDataSource(points), Scatter(size=9, line_color=None), name="outlier")
    plot.add_tools(HoverTool(tooltips=None, renderers=[drawn], mode="vline"))
    return plot


def noise(curves: Curves) -> Model:
    """The noise scale with its band, and the batch size."""
    ends = [v[np.isfinite(v) & (v > 0)] for v in (curves.noise, curves.low, curves.high)]
    known = np.concatenate([*ends, curves.batch[np.isfinite(curves.batch)]])
    scale = _positive(known)
    plot = empty(_steps(curves), scale, "step", "examples", height=250, name="noise")
    floor, top = scale.low, scale.high
    low = np.nan_to_num(_placed(scale, curves.low), nan=floor)
    high = np.where(np.isinf(curves.high), top, _placed(scale, curves.high))
    ok = np.isfinite(curves.noise) | np.isinf(curves.noise)
    plot.varea(
        curves.step[ok], np.clip(low[ok], floor, top),
        np.clip(np.nan_to_num(high[ok], nan=top), floor, top), fill_alpha=0.2, name="area",
    )  # fmt: skip
    said = [
        f"step {s:,.0f}: {number(v)}, band {number(a)} to {number(b)}; batch {number(n)}"
        for s, v, a, b, n in zip(
            curves.step, curves.noise, curves.low, curves.high, curves.batch, strict=True)
    ]  # fmt: skip
    source = ColumnDataSource(
        {"x": curves.step, "y": _placed(scale, curves.noise), "label": said}, name="noise-line"
    )
    drawn = plot.line("x", "y", source=source, line_width=2, name="line")
    batch = _placed(scale, curves.batch)
    plot.line(curves.step, batch, line_width=2, line_dash=[5, 4], name="batch")
    plot.add_tools(HoverTool(tooltips=None, renderers=[drawn], mode="vline"))
    return plot


def shares(curves: Curves) -> Model:
    """The share of norms over the threshold."""
    top = max(0.05, 1.08 * float(np.nanmax(curves.clipped)))
    scale = Scale("linear", 0.0, min(1.03, top))
    plot = empty(_steps(curves), scale, "step", "share", height=250, name="clipped")
    source = ColumnDataSource(
        {
            "x": curves.step, "y": curves.clipped,
            "label": [f"step {s:,.0f}: {100 * v:.1f} %"
                      for s, v in zip(curves.step, curves.clipped, strict=True)],
        },
        name="clipped-line",
    )  # fmt: skip
    drawn = plot.line("x", "y", source=source, line_width=2, name="line")
    plot.add_tools(HoverTool(tooltips=None, renderers=[drawn], mode="vline"))
    return plot


def layers(curves: Curves) -> Model:
    """Layer by step: the darker, the larger the examples' norms there."""
    names = list(curves.layers)[:MOST_LAYERS]
    grid = np.array([curves.layers[name] for name in names])  # (L, n)
    with np.errstate(divide="ignore"):
        logs = np.where(grid > 0, np.log10(grid), math.nan)
    known = logs[np.isfinite(logs)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    low = max(low, high - 6)
    alpha = 0.04 + 0.96 * np.clip((logs - low) / max(high - low, 1e-9), 0, 1)
    left, right = _cells(curves.step)
    rows, columns = np.nonzero(np.isfinite(grid))
    y = len(names) - rows
    plot = empty(
        Scale("linear", float(left[0]), float(right[-1])), Scale("linear", 0.5, len(names) + 0.5),
        "step", "", height=110 + 15 * len(names), name="layers",
    )  # fmt: skip
    plot.y_range = Range1d(start=0.5, end=len(names) + 0.5)
    label_ticks(plot.yaxis, [(len(names) - k, _short(name)) for k, name in enumerate(names)])
    plot.grid.visible = False
    source = ColumnDataSource(
        {
            "left": left[columns], "right": right[columns], "bottom": y - 0.5, "top": y + 0.5,
            "alpha": np.nan_to_num(alpha[rows, columns], nan=0.0),
            "label": [f"step {curves.step[c]:,.0f}, {names[r]}: {number(grid[r, c])}"
                      for r, c in zip(rows, columns, strict=True)],
        },
        name="layers-line",
    )  # fmt: skip
    cells = plot.quad(
        "left", "right", "top", "bottom", source=source, fill_alpha="alpha", line_color=None,
        name="heat",
    )  # fmt: skip
    plot.add_tools(HoverTool(tooltips=None, renderers=[cells]))
    return plot


def _short(name: str, most: int = 26) -> str:
    """The end of a layer's name, which tells more than its beginning."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _cells(steps: Floats) -> tuple[Floats, Floats]:
    """The left and right edges of the steps' columns."""
    if len(steps) == 1:
        return steps - 0.5, steps + 0.5
    between = (steps[1:] + steps[:-1]) / 2
    first, last = steps[0] - (between[0] - steps[0]), steps[-1] + (steps[-1] - between[-1])
    return np.concatenate([[first], between]), np.concatenate([between, [last]])


def _steps(curves: Curves) -> Scale:
    low, high = float(curves.step[0]), float(curves.step[-1])
    pad = 0.02 * (high - low) or 0.5
    return Scale("linear", low - pad, high + pad)


def _positive(values: Floats) -> Scale:
    """A log scale of the positive values, and never less than a decade of it."""
    known = values[np.isfinite(values) & (values > 0)]
    if not len(known):
        return Scale("log", -1.0, 1.0, floor=0.1)
    high = math.log10(float(known.max()))
    low = max(math.log10(float(known.min())), high - 8)
    pad = max(0.04 * (high - low), (1 - (high - low)) / 2)
    return Scale("log", low - pad, high + pad, floor=10 ** (low - pad))


def _placed(scale: Scale, values: Floats) -> Floats:
    """Positions; NaN for what has none."""
    if scale.kind != "log":
        return np.where(np.isfinite(values), scale.place(values), math.nan)
    ok = np.isfinite(values) & (values > 0 if scale.strip is None else values >= 0)
    return np.where(ok, scale.place(np.where(ok, values, 1.0)), math.nan)
