"""The figures of a report, drawn by Bokeh.

Owns: what is drawn, and the names by which the page's script finds figures, sources and tools.
Does not know: colours (the page's style sheet has them), the scores, HTML.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from bokeh.model import Model
from bokeh.models import (
    BasicTicker,
    BoxSelectTool,
    ColumnDataSource,
    FixedTicker,
    HoverTool,
    LassoSelectTool,
    NumeralTickFormatter,
    Range1d,
    Scatter,
    TapTool,
)
from bokeh.models.annotations import Span
from bokeh.plotting import figure

from pergrad.scans.report.numbers import Density, Floats, Histogram, Ints, Scale, percent

SHOWN_EXACTLY = 3_000  # above so many points they are drawn smaller and fainter


def plane(
    x: Floats, y: Floats, rows: Ints, x_scale: Scale, y_scale: Scale, cells: Density | None
) -> Model:
    """Norm against loss: a mark per listed example, over the density of all of them if given.

    Args:
        x: (n,) losses of the listed examples.
        y: (n,) their norms.
        rows: (n,) where each of them is in the page's list.
        x_scale: of all losses.
        y_scale: of all norms.
        cells: the density of all examples, if not all are listed.
    """
    plot = empty(x_scale, y_scale, "loss", "gradient norm", height=460, name="plane")
    if cells is not None:
        source = ColumnDataSource(
            {
                "left": cells.left, "right": cells.right, "bottom": cells.bottom, "top": cells.top,
                "alpha": 0.1 + 0.9 * np.log1p(cells.count) / np.log1p(cells.count.max(initial=1)),
            }
        )  # fmt: skip
        plot.quad(
            "left", "right", "top", "bottom", source=source, fill_alpha="alpha", line_color=None,
            name="density",
        )  # fmt: skip
    points = ColumnDataSource(
        {"x": x_scale.place(x), "y": y_scale.place(y), "row": rows.astype(np.int32)}, name="points"
    )
    few = len(x) <= SHOWN_EXACTLY
    marks = plot.add_glyph(
        points,
        Scatter(size=6 if few else 4, fill_alpha=0.55 if few else 0.35, line_color=None),
        selection_glyph=Scatter(size=7 if few else 5, fill_alpha=0.9, line_color=None),
        nonselection_glyph=Scatter(size=6 if few else 4, fill_alpha=0.13, line_color=None),
        name="mark",
    )
    cursor = ColumnDataSource({"x": [], "y": []}, name="cursor-point")
    plot.add_glyph(cursor, Scatter(size=17, fill_color=None, line_width=2.5), name="cursor")
    plot.add_tools(
        BoxSelectTool(name="box", renderers=[marks]),
        LassoSelectTool(name="lasso", renderers=[marks], continuous=False),
        TapTool(renderers=[marks]),
        HoverTool(tooltips=None, renderers=[marks]),
    )
    plot.toolbar.active_drag = None  # the page's script switches one on, but not under a finger
    return plot


def bars(counted: Histogram, scale: Scale, axis: str, name: str) -> Model:
    """How many examples lie where on a scale."""
    top = float(counted.count.max(initial=1)) * 1.06
    plot = empty(scale, Scale("linear", 0.0, top), axis, "examples", height=230, name=name)
    # the script puts other counts here, so the ticks are the library's, at whole numbers
    plot.yaxis.ticker = BasicTicker(min_interval=1, desired_num_ticks=4)
    plot.yaxis.major_label_overrides = {}
    plot.yaxis.formatter = NumeralTickFormatter(format="0,0")
    source = ColumnDataSource(
        {"left": counted.left, "right": counted.right, "count": counted.count.astype(np.int32),
         "label": counted.label},
        name=f"{name}-bars",
    )  # fmt: skip
    marks = plot.quad(
        "left", "right", "count", 0, source=source, line_width=1, name="bar", hover_fill_alpha=0.7
    )
    plot.add_tools(HoverTool(tooltips=None, renderers=[marks], mode="vline"))
    return plot


def curve(x: Floats, y: Floats) -> Model:
    """Which share of the squared norm (y) the top x of the examples carry."""
    scale = Scale("log", float(np.log10(x[0])) - 0.05, 0.03, floor=float(x[0]))
    plot = empty(
        scale, Scale("linear", 0.0, 1.03), "examples, largest norms first",
        "share of the squared norm", height=230, name="curve",
    )  # fmt: skip
    label_ticks(plot.xaxis, [(p, percent_short(10**p)) for p, _ in scale.ticks(4)])
    quarters = (0, 0.25, 0.5, 0.75, 1)
    label_ticks(plot.yaxis, [(v, percent_short(v)) for v in quarters])
    source = ColumnDataSource(
        {"x": np.log10(x), "y": y,
         "label": [f"The top {percent(a)} carry {percent(b)}" for a, b in zip(x, y, strict=True)]},
        name="curve-line",
    )  # fmt: skip
    line = plot.line("x", "y", source=source, line_width=2.5, name="line")
    plot.varea("x", 0, "y", source=source, fill_alpha=0.12, name="area")
    plot.add_layout(Span(location=-2, dimension="height", line_dash=[4, 4], name="guide"))
    plot.add_tools(HoverTool(tooltips=None, renderers=[line], mode="vline", line_policy="nearest"))
    return plot


def percent_short(fraction: float) -> str:
    """A tick's percentage: 0.01 -> "1 %", 0.00001 -> "0.001 %"."""
    return f"{100 * fraction:.10f}".rstrip("0").rstrip(".") + " %"


def empty(
    x_scale: Scale, y_scale: Scale, x_axis: str, y_axis: str, *, height: int, name: str
) -> figure:
    """An empty plot with the ticks of two scales."""
    plot = figure(
        name=name,
        height=height,
        sizing_mode="stretch_width",
        min_width=200,
        x_range=Range1d(start=x_scale.low, end=x_scale.high),
        y_range=Range1d(start=y_scale.low, end=y_scale.high),
        x_axis_label=x_axis,
        y_axis_label=y_axis,
        tools="",
        toolbar_location=None,
        # the page shows through: what is painted once in one colour leaves a rim under another
        border_fill_color=None,
        background_fill_color=None,
        outline_line_color=None,
    )
    plot.toolbar.logo = None
    label_ticks(plot.xaxis, x_scale.ticks(7 if height > 300 else 4))
    label_ticks(plot.yaxis, y_scale.ticks(5))
    if x_scale.strip is not None:  # zeros do not belong on a log axis: a line sets them apart
        plot.add_layout(_guide(x_scale, "height"))
    if y_scale.strip is not None:
        plot.add_layout(_guide(y_scale, "width"))
    plot.min_border_right = 12
    return plot


def _guide(scale: Scale, dimension: Literal["height", "width"]) -> Span:
    """The line between the zeros' strip and the rest of a log axis."""
    assert scale.strip is not None
    edge = (scale.strip + float(np.log10(scale.floor))) / 2
    return Span(location=edge, dimension=dimension, line_dash=[2, 4], name="guide")


def label_ticks(axis: Any, ticks: Sequence[tuple[float, str]]) -> None:
    """Ticks at fixed places, with what to write there."""
    axis.ticker = FixedTicker(ticks=[place for place, _ in ticks])
    axis.major_label_overrides = dict(ticks)
