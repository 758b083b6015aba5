"""The page of a run: numbers, figures and previews put together as one HTML file.

Owns: what the page says in words, and that everything that came from a user is escaped.
Does not know: models, backward passes, the layout of the run's folder.
"""

import math
from collections.abc import Sequence
from importlib.metadata import version
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.embed import json_item
from bokeh.model import Model

from pergrad.scans.report import shell
from pergrad.scans.report.numbers import number, percent
from pergrad.scans.report.preview import Preview
from pergrad.scans.text import storable
from pergrad.training.report import figures
from pergrad.training.report.numbers import WINDOW, Curves, Found, curves, found, marks
from pergrad.training.run_notes import as_sentence

if TYPE_CHECKING:
    from pergrad.training.run import Run

CARDS = 60
LEAST_CARDS = 12  # with those of the largest scores, where few are outliers
LOSSES = 20  # largest ones that are listed
ROWS = 200  # of the table of spikes, the latest ones
NOTES = 5  # the latest ones
SEEN = 60  # characters of an example in the headline
PREVIEW_BYTES = 5_000_000  # of pictures and texts, in the page
OURS = "pergrad.training.report"


def html(run: "Run", *, title: str | None, refresh: int | None, said: Sequence[str] = ()) -> str:
    """The page's text; see `pergrad.training.report.write`."""
    by_step = run.by_step()
    whole = curves(by_step)
    there = found(run, whole, by_step)
    drawn = _figures(run, whole.thinned(), there)
    model = run.manifest["model"] or "a model"
    cards, without = _cards(run)
    scripts = [shell.bokeh(), shell.own("drawing.js") + shell.own("page.js", OURS)]
    return shell.template(shell.own("page.html", OURS)).render(
        title=title or f"Training run: {model}",
        refresh=refresh,
        found=there,
        headline=headline(there, cards),
        findings=_new(run, said, there) + findings(there, run.manifest.get("clip")),
        drawn=list(drawn),
        clip=run.manifest.get("clip"),
        spikes=there.spikes[::-1][:ROWS],
        many_spikes=len(there.spikes) > ROWS,
        cards=cards,
        without=without,
        below=any(not card["times"] for card in cards),
        losses=[row for row in run.top(LOSSES, by="loss").to_pylist() if _finite(row["loss"])],
        about=_about(run, there),
        data={"figures": {name: json_item(plot) for name, plot in drawn.items()}},
        scripts=scripts,
        hashes=shell.hashes(scripts),
        style=shell.own("page.css"),
        number=number,
        percent=percent,
        window=WINDOW,
    )


def _new(run: "Run", said: Sequence[str], there: Found) -> list[str]:
    """What this watch and earlier ones say, except what stands in the run itself."""
    kept = run.notes()
    noted = {note for _, note in there.notes} | {note["words"] for note in kept}
    now = [f"Said while watching: {words}" for words in said if storable(words) not in noted]
    return now + [as_sentence(note) for note in kept[:NOTES]]


def _figures(run: "Run", drawn: Curves, said: Found) -> dict[str, Model]:
    """The page's figures by name; those that would be empty are left out."""
    plots: dict[str, Model] = {}
    if not said.steps:
        return plots
    if _known(drawn.band["max"]):
        plots["band"] = figures.band(drawn, marks(run))
    spikes = [row["step"] for row in said.spikes]
    if _known(drawn.loss):
        plots["loss"] = figures.line(drawn, drawn.loss, "loss", "loss", spikes)
    if _known(drawn.noise) or np.isinf(drawn.noise).any():
        plots["noise"] = figures.noise(drawn)
    if _known(drawn.grad_norm):
        plots["grad"] = figures.line(drawn, drawn.grad_norm, "norm", "grad", spikes)
    if _known(drawn.clipped):
        plots["clipped"] = figures.shares(drawn)
    if any(_known(values) for values in drawn.layers.values()):
        plots["layers"] = figures.layers(drawn)
    return plots


def _known(values: Any) -> bool:
    return bool(np.isfinite(values).any())


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def headline(said: Found, cards: list[dict[str, Any]]) -> str:
    """The page's first sentence."""
    if not said.steps:
        return "No step has been read yet."
    if not said.examples:
        return "No step could be read."
    if said.spikes:
        many = len(said.spikes)
        last = said.spikes[-1]
        start = "One step stands out" if many == 1 else f"{many:,} steps stand out, the last"
        return f"{start}: step {last['step']:,}, {last['spike']}."
    if cards and cards[0]["times"] > 1:
        worst = cards[0]
        return (
            f"No step stands out, but some examples do: {_named(worst)} stood out in "
            f"{worst['times']:,} of the {worst['seen']:,} steps that it was seen in."
        )
    return "Neither a step nor an example stands out again and again."


def _named(card: dict[str, Any]) -> str:
    """An example by its key, and beside it what a person knows it by."""
    words = [card.get("label"), card.get("text")]
    seen = shorten(", ".join(str(each) for each in words if each), SEEN, placeholder=" …")
    return f"{card['key']} ({seen})" if seen else str(card["key"])


def findings(said: Found, clip: float | None) -> list[str]:
    """What else there is to say, a sentence each."""
    words = []
    if not math.isnan(said.noise) and not math.isnan(said.batch):
        batch, band = said.batch, f"{number(said.low)} to {number(said.high)}"
        if said.high < batch:
            story = "a smaller batch would learn almost as much in a step"
        elif said.low > batch:
            story = "a larger batch would still save steps in proportion"
        else:
            story = "the batch is of that order, or the band is too wide to tell"
        words.append(
            f"The gradient noise scale is {number(said.noise)} examples (band {band}), a step has "
            f"{batch:,.0f}: {story}."
        )
    if said.zero > 0:
        words.append(
            f"{percent(said.zero)} of the latest gradients were exactly zero: these examples "
            "change nothing any more."
        )
    if clip is not None and not math.isnan(said.clipped):
        words.append(f"{percent(said.clipped)} of the latest norms were above {number(clip)}.")
    for step, note in said.notes[:3]:
        words.append(f"Steps could not be read, from step {step:,} on: {note}")
    return words


def _cards(run: "Run") -> tuple[list[dict[str, Any]], int]:
    """The examples that stood out most often, with what a person sees; how many have no room."""
    previews = {key: Preview.from_stored(*kept) for key, kept in run.shown().items()}
    room, without = PREVIEW_BYTES, 0
    cards = []
    rows = [row for row in run.top(CARDS).to_pylist() if row["times"]]
    if len(rows) < LEAST_CARDS:
        there = {row["key"] for row in rows}
        largest = run.top(LEAST_CARDS, by="score").to_pylist()
        more = [row for row in largest if row["key"] not in there and not row["times"]]
        rows += [row for row in more if _finite(row["score"])][: LEAST_CARDS - len(rows)]
    for row in rows:
        preview = previews.get(row["key"], Preview())
        parts = {"image": preview.image_url(), "text": preview.text, "label": preview.label,
                 "more": list(preview.more.items()), "error": preview.error}  # fmt: skip
        size = sum(len(str(part).encode(errors="replace")) for part in parts.values() if part)
        if size > room:
            parts, without = dict.fromkeys(parts), without + 1
        else:
            room -= size
        cards.append({**row, **parts})
    return cards, without


def _about(run: "Run", said: Found) -> list[tuple[str, Any]]:
    manifest = run.manifest
    count = len(manifest["parameters"])
    return [
        ("Model", manifest["model"] or None),
        ("Parameters", f"{count:,} tensors"),
        ("Watched", _how_often(manifest.get("every"))),
        (
            "Examples read",
            f"{said.examples:,}" + (f", {said.keys:,} different" if said.keys else ""),
        ),
        ("Begun", manifest["created"]),
        ("Folder", str(run.folder)),
        ("pergrad", manifest.get("pergrad")),
        ("torch", manifest.get("torch")),
        ("Drawn by", f"Bokeh {version('bokeh')}"),
    ]


def _how_often(every: int | None) -> str | None:
    if every is None:
        return None
    return "every step" if every == 1 else f"one step in {every:,}"
