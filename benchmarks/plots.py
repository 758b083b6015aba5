"""Draw benchmarks/results/costs.svg and scaling.svg from the records there.

python benchmarks/plots.py
"""

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

import harness
import tables
from contestants import CONTESTANTS

COLUMNS = 4
OTHERS = [name for name in CONTESTANTS if name not in ("plain", "pergrad")]
COLOURS = {name: matplotlib.colormaps["Blues"](0.45 + 0.05 * n) for n, name in enumerate(OTHERS)}
COLOURS |= {"plain": "0.6", "pergrad": "#d62728"}

Record = dict[str, Any]

# The same picture gives the same file.
matplotlib.rcParams["svg.hashsalt"] = "pergrad"
matplotlib.rcParams["font.size"] = 8


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(f"saved {path}")


def _label(name: str) -> str:
    return CONTESTANTS[name].title.replace("`", "")


def _panel(axes: Any, record: Record) -> None:
    """Horizontal bars on a logarithmic axis, quartiles as whiskers; failures in words."""
    rows = list(record["contestants"].items())
    for y, (name, row) in enumerate(rows):
        if row["failure"] is not None:
            axes.text(1.02, y, "fails", va="center", color="0.4", style="italic")
            continue
        middle, (low, high) = row["ratio"]["median"], row["ratio"]["quartiles"]
        left = min(0.5, middle)
        axes.barh(y, middle - left, left=left, color=COLOURS[name], height=0.7)
        axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color="black", lw=0.8)
        axes.text(max(high, 1) * 1.05, y, f"{middle:.2f}" if middle < 20 else f"{middle:.0f}",
                  va="center")  # fmt: skip
    axes.axvline(1, color="0.3", lw=0.8, ls=":")
    axes.set_xscale("log")
    highest = max(r["ratio"]["quartiles"][1] for _, r in rows if r["failure"] is None)
    axes.set_xlim(0.5, max(4.0, highest * 3))
    ticks = [t for t in (0.5, 1, 2, 5, 10, 30, 100, 300, 1000) if t <= max(4.0, highest * 2)]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [_label(name) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_title(record["workload"], fontweight="bold")


def costs(records: list[Record], path: Path) -> None:
    """Time as a share of the plain step, one panel per workload."""
    lines = math.ceil(len(records) / COLUMNS)
    figure, grid = plt.subplots(
        lines, COLUMNS, figsize=(5 * COLUMNS, 2.3 * lines), squeeze=False, layout="constrained"
    )
    for axes, record in zip(grid.flat, records, strict=False):
        _panel(axes, record)
    for axes in grid.flat[len(records) :]:
        axes.set_visible(False)
    figure.supxlabel("time, as a share of a plain forward and backward pass (log scale)")
    _save(figure, path)


def scaling(record: Record, path: Path) -> None:
    """Time over the number of examples and of positions, and lines of slope one."""
    series = record["series"]
    figure, grid = plt.subplots(
        1, len(series), figsize=(4 * len(series), 3.4), squeeze=False, layout="constrained"
    )
    for axes, one in zip(grid.flat, series, strict=True):
        xs = one["values"]
        for name in ("plain", "pergrad"):
            axes.plot(xs, one["milliseconds"][name], marker="o", ms=3, color=COLOURS[name],
                      label=_label(name))  # fmt: skip
        last = one["milliseconds"]["pergrad"][-1]
        axes.plot(xs, [last * x / xs[-1] for x in xs], color="0.3", lw=0.8, ls=":", label="linear")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel(one["axis"])
        axes.set_ylabel("milliseconds")
        axes.set_title(one["title"])
        axes.legend()
    _save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder")
    args = parser.parse_args()
    records = tables.read(args.results)
    if records:
        costs(list(records.values()), args.results / "costs.svg")
    found = tables.read_other("scaling", args.results)
    if found:
        scaling(found, args.results / "scaling.svg")


if __name__ == "__main__":
    main()
