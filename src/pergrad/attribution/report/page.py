"""The page of influences: queries, their strongest examples and previews as one HTML file.

Owns: what the page says in words, and that everything that came from a user is escaped.
Does not know: models, gradients, files of scores.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pergrad.scans.report import shell
from pergrad.scans.report.numbers import number
from pergrad.scans.report.preview import Preview

PREVIEW_BYTES = 8_000_000  # of pictures and texts, in the page
OURS = "pergrad.attribution.report"
NEAR = 10  # nearest examples, and highest scores that they are compared with
LAYERS = 12  # of an example, those that add most to its score
HUB = 10  # an example among so many of the strongest of most queries is told of
METHODS = {
    "dots": "inner products", "cosines": "cosines", "less": "LESS", "solve": "one solve",
    "refined": "refined solve", "kernel": "kernel",
}  # fmt: skip

Ends = Sequence[tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]]
Names = Mapping[str, list[str] | None]


def html(
    manifest: Mapping[str, Any],
    folder: Path,
    ends: Ends,
    keys: Names,
    previews: Mapping[str, Mapping[int, Preview]],
    *,
    near: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    layers: tuple[list[str], Mapping[int, Mapping[int, list[float]]]] | None = None,
    title: str | None,
) -> str:
    """The page's text.

    Args:
        manifest: what was asked of what, and how.
        folder: where it is.
        ends: for each listed query the numbers and scores of the highest and of the lowest.
        keys: the names of the "scored" examples and of the "asked" queries, None without.
        previews: what a person sees of both, by number.
        near: for each listed query the numbers and cosines of the nearest examples; empty without.
        layers: the layers' names, and for each query and example its scores by layer.
        title: the page's title; by default it names the model's class.
    """
    model, total = manifest["scored"]["model"] or "a model", manifest["asked"]["examples"]
    every = [[*both, *near[q : q + 1]] for q, both in enumerate(ends)]
    shown, without = _shown(every, previews)
    named = keys["scored"]
    chosen = sorted({int(i) for lists in every for index, _ in lists for i in index})
    data = {
        "queries": [
            {
                "name": _name(keys["asked"], q),
                "high": _listed(high),
                "low": _listed(low),
                "near": _listed(near[q]) if q < len(near) else [],
                **({} if layers is None else {"layers": _largest(layers[1].get(q, {}))}),
            }
            for q, (high, low) in enumerate(ends)
        ],
        "names": {i: _name(named, i) for i in chosen},
        **shown,
        **({} if layers is None else {"layers": layers[0]}),
    }
    helps = manifest["settings"]["queries"] == "data set"
    scripts = [shell.own("drawing.js") + shell.own("page.js", OURS)]
    return shell.template(shell.own("page.html", OURS)).render(
        title=title or f"Influence: {model}",
        headline=headline(manifest["scored"]["examples"], total),
        findings=findings(manifest, ends, named, near),
        words=("Helps most", "Harms most") if helps else ("Raises it most", "Lowers it most"),
        tiles=_tiles(manifest),
        listed=len(ends),
        total=total,
        has_previews={side: bool(found) for side, found in previews.items()},
        without=without,
        about=_about(manifest, folder),
        data=data,
        scripts=scripts,
        hashes=shell.hashes(scripts),
        style=shell.own("page.css") + shell.own("page.css", OURS),
    )


def headline(examples: int, queries: int) -> str:
    """The page's first sentence."""
    asked = "this prediction" if queries == 1 else f"these {queries:,} predictions"
    return f"Which of {examples:,} training examples drive {asked}?"


def findings(
    manifest: Mapping[str, Any],
    ends: Ends,
    keys: list[str] | None,
    near: Sequence[tuple[np.ndarray, np.ndarray]] = (),
) -> list[str]:
    """What else there is to say, a sentence each."""
    settings = manifest["settings"]
    words = [f"A positive score means that {manifest['sign']}. Unit: {manifest['unit']}."]
    if settings["method"] in ("dots", "cosines"):
        words.append(
            "These scores take no account of curvature, and a cheap baseline often foretells as "
            "much: pergrad.evaluate says which."
        )
    residuals = [r for r in manifest.get("residuals") or () if math.isfinite(r)]
    if residuals:
        worst = f"After {settings['refine']} refining steps the worst residual is "
        good = "the solve is close" if max(residuals) < 0.1 else (
            "more steps would change scores. Take four times as many: pergrad.influence(..., "
            f"refine={4 * settings['refine']}), in another folder"
        )  # fmt: skip
        words.append(f"{worst}{number(max(residuals))} of the query's gradient: {good}.")
    same = [len(set(high[:NEAR].tolist()) & set(index.tolist()))
            for ((high, _), _), (index, _) in zip(ends, near, strict=False)]  # fmt: skip
    if same:
        words.append(
            f"Of the {NEAR} that a baseline without gradients names, the nearest in what goes into "
            f"the last layer, {sum(same) / len(same):.1f} are among the {NEAR} highest, on average."
        )
    hubs = Counter(int(i) for (index, _), _ in ends for i in index[:HUB])
    for i, times in hubs.most_common(1):
        if times > max(2, len(ends) / 2):
            words.append(
                f"{_name(keys, i)} is among the {HUB} highest of {times} of the {len(ends)} "
                "queries: an example with a large gradient, rather than one about each of these."
            )
    return words


def _tiles(manifest: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    settings, fitted = manifest["settings"], manifest["curvature"]
    kept = settings["top"]
    kind = "no curvature" if fitted is None else f"{fitted['settings']['kind']} curvature"
    if settings["method"] == "kernel":
        kind = "empirical Fisher matrix"
    points = len(settings["checkpoints"])
    return [
        (f"{manifest['asked']['examples']:,}", "queries", f"given as a {settings['queries']}"),
        (f"{manifest['scored']['examples']:,}", "training examples",
         "every score is kept" if kept is None else f"the {kept:,} at each end are kept"),
        (METHODS[settings["method"]], "method",
         f"over {points} checkpoints" if points else kind),
        ("–" if settings["damping"] is None else number(settings["damping"]), "damping",
         "none" if settings["damping"] is None else "times the mean curvature"),
    ]  # fmt: skip


def _about(manifest: Mapping[str, Any], folder: Path) -> list[tuple[str, Any]]:
    scored, settings = manifest["scored"], manifest["settings"]
    return [
        ("Model", scored["model"] or None),
        ("Parameters", f"{len(scored['parameters']):,} tensors"),
        ("Mode", settings["mode"]),
        ("Score", manifest["unit"]),
        ("Sign", manifest["sign"]),
        ("Folder", str(folder)),
    ]


def _name(keys: list[str] | None, i: int) -> str:
    return f"#{i}" if keys is None or not keys[i] else keys[i]


def _listed(end: tuple[np.ndarray, np.ndarray]) -> list[list[float]]:
    return [[int(i), float(score)] for i, score in zip(*end, strict=True)]


def _largest(parts: Mapping[int, list[float]]) -> dict[int, list[list[float]]]:
    """For each example the layers that add most to its score, by number, and what they add."""
    found = {}
    for i, scores in parts.items():
        order = sorted(range(len(scores)), key=lambda k: -abs(scores[k]))[:LAYERS]
        found[i] = [[k, float(f"{scores[k]:.4g}")] for k in order]
    return found


def _shown(
    ends: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]],
    previews: Mapping[str, Mapping[int, Preview]],
) -> tuple[dict[str, dict[int, Any]], int]:
    """Previews of queries and examples by number, until the page is full; how many more are left.

    The strongest of all queries come before the second strongest.
    """
    lists = [index for both in ends for index, _ in both]
    longest = max((len(index) for index in lists), default=0)
    strongest = [int(index[k]) for k in range(longest) for index in lists if k < len(index)]
    wanted = [("asked", q) for q in range(len(ends))]
    wanted += [("scored", i) for i in dict.fromkeys(strongest)]
    found: dict[str, dict[int, Any]] = {"asked": {}, "scored": {}}
    room, without = PREVIEW_BYTES, 0
    for side, i in wanted:
        preview = previews[side].get(i)
        if preview is None:
            continue
        parts = {"image": preview.image_url(), "text": preview.text, "label": preview.label,
                 "more": list(preview.more.items()) or None, "error": preview.error}  # fmt: skip
        size = sum(len(str(part).encode(errors="replace")) for part in parts.values() if part)
        if size > room:
            without += 1
            continue
        room -= size
        found[side][i] = {name: part for name, part in parts.items() if part}
    return found, without
