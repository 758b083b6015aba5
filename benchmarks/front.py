"""What README.md shows of the results: three costs, and for each use the figure that proves it.

Owns: which of the measured numbers stand on the first page. Nothing there is written by hand.
"""

import json
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS

ROOT = Path(__file__).parents[1]
Record = dict[str, Any]
START, END = "<!-- uses: written by benchmarks/tables.py -->", "<!-- end of uses -->"

# Rows and columns of the one table of costs.
ROWS = {
    "W2-gpt-T128": "norms, a GPT of width 768",
    "W4-resnet": "norms, a ResNet-18",
    "W8-clip-gpt": "a clipped step, the GPT",
}
PEERS = ("opacus", "vmap", "loop")


def _ratio(record: Record, who: str) -> str:
    row = record["contestants"][who]
    return "fails" if row["failure"] else f"{row['ratio']['median']:.2f}"


def costs(records: dict[str, Record]) -> str:
    """Three rows, four columns; all others are in docs/costs.md."""
    titles = ["pergrad", *(CONTESTANTS[peer].title for peer in PEERS)]
    lines = [f"| time, a plain step = 1 | {' | '.join(titles)} |", f"| --- |{' ---: |' * 4}"]
    for name, title in ROWS.items():
        if name in records:
            cells = [_ratio(records[name], who) for who in ("pergrad", *PEERS)]
            lines.append(f"| {title} | **{cells[0]}** | {' | '.join(cells[1:])} |")
    shown = [records[name] for name in ROWS if name in records]
    memory = [f"{r['contestants']['pergrad']['memory_ratio']:.2f}" for r in shown]
    machines = {f"{r['environment']['cpu']}, {r['environment']['threads']} threads" for r in shown}
    return "\n".join(lines) + (
        "\n\nTime of the whole step, forward pass included; pergrad's peak memory is "
        f"{', '.join(memory[:-1])} and {memory[-1]} of the plain step's. Medians, on "
        f"{'; '.join(sorted(machines))}."
    )


def _read(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def faster(records: dict[str, Record]) -> str:
    """By how much compiled kernels shorten the time of norms, at most."""
    both = [r["contestants"] for r in records.values() if "by_torch" in r["contestants"]]
    shares = [1 - c["pergrad"]["ratio"]["median"] / c["by_torch"]["ratio"]["median"] for c in both
              if not c["by_torch"]["failure"]]  # fmt: skip
    return f"up to {100 * max(shares, default=0):.0f} % faster"


def uses(records: dict[str, Record]) -> str:
    """What people do with it, each with one figure and where it is from."""
    printed = _read("examples")
    said, found = (printed["fashion"]["figures"][name] for name in ("said", "found"))
    by_norm, by_loss = (printed["digits"]["figures"][name] for name in ("norm", "loss"))
    compared = _read("correctness")
    cells = [c["kind"] for c in compared["cells"] if c["library"] == "pergrad"]
    others = sum(c["kind"] == "wrong" for c in compared["cells"])
    clip = _ratio(records["W8-clip-gpt"], "pergrad")
    foretold = printed["influential_digits"]["figures"]
    rows = [
        (
            "[say which training examples drive a prediction](docs/guides/influential.md)",
            "what training again on 50 halves of the digits does to doubtful predictions: "
            f"influence foretells it with a rank correlation of {foretold['influence']}, the "
            f"digits most alike with {foretold['alike']}, their losses with {foretold['losses']}",
        ),
        (
            "[find influential examples](docs/guides/influential.md)",
            f"600 Fashion-MNIST pictures that inner products name: a step on them was said to "
            f"change the held-out loss by {said}, and changed it by {found}",
        ),
        ("[clip each example](docs/guides/clip.md)", f"a clipped step at {clip} of a plain one"),
        (
            "[watch a run](docs/guides/watch.md)",
            "whose examples made the spike, read in your own backward pass; `.grad` is the same "
            "to the bit",
        ),
        (
            "[trust it](docs/comparison.md)",
            f"right in {cells.count('right')} of {len(cells)} hard models; other libraries return "
            f"another number in {others} of {len(compared['cells']) - len(cells)} cells, "
            "without an error",
        ),
        (
            "[wrong labels](docs/examples.md)",
            f"look at the **loss** first: it finds {by_loss} of 90, the norm {by_norm}",
        ),
    ]
    lines = ["| to | one figure, or why |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {what} | {proof} |" for what, proof in rows)])
