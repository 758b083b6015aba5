"""Tables of what was measured of influences: their time beside others', and what they foretell.

Owns: the words and the two tables.
Does not know: markdown's details, which `tables.py` hands in, or how anything was measured.
"""

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
Table = Callable[[list[str], list[list[str]], int], str]
WORDS = {"identity": "inner products", "ekfac": "EK-FAC"}
APPROXIMATED = {
    "ekfac-terms-8": "ekfac",
    "ekfac-sketch-1024": "ekfac",
    "ekfac-sketch-256": "ekfac",
    "dots-sketch-1024": "dots",
    "dots-sketch-256": "dots",
}


def faster(record: Record) -> list[tuple[str, str, float, float]]:
    """(workload, method, times faster than kronfluence, target)."""
    return [
        (name, method, libraries["kronfluence"]["seconds"] / libraries["pergrad"]["seconds"],
         work["target"])
        for name, work in record["workloads"].items()
        for method, libraries in work["methods"].items()
    ]  # fmt: skip


def influences(record: Record, table: Table, machine: str) -> str:
    """Seconds of every library."""
    versions = record["versions"]
    times = {(name, method): found for name, method, found, _ in faster(record)}
    rows = []
    for name, work in record["workloads"].items():
        for method, libraries in work["methods"].items():
            ratio, target = times[name, method], work["target"]
            others = max(each["off"] for each in libraries.values())
            rows.append(
                [
                    work["title"],
                    WORDS[method],
                    *(f"{each['seconds']:.2f}" for each in libraries.values()),
                    f"{ratio:.1f}",
                    f"≥ {target:g}",
                    "yes" if ratio >= target else "**no**",
                    f"{others:.0e}",
                ]
            )
    peers = [f"{who} {versions[who]}" for who in ("kronfluence", "dattri-llm")]
    head = ["", "", "pergrad", *peers, "faster than kronfluence", "target", "met", "difference"]
    return (
        "### influences\n\nSeconds for every pair of examples and queries, from fitting on, files "
        "included; medians of turns, one thread each. The parameters are those of the "
        "linear layers and convolutions, which all three serve; EK-FAC with the labels of the "
        "data, the damping .1 x mean in all. The scores are the same but for a factor of N: the "
        "largest difference, of the largest score, is in the last column. "
        "`benchmarks/influences.py`.\n\n"
        f"{table(head, rows, 2)}\n\n{machine}."
    )


def foretold(record: Record, table: Table) -> str:
    """What scores foretell about retraining, of every method."""
    methods = record["methods"]
    rows = []
    for name in sorted(methods, key=lambda n: -methods[n]["lds"]):
        each = methods[name]
        exact = methods[APPROXIMATED[name]]["lds"] if name in APPROXIMATED else None
        rows.append(
            [
                name,
                f"{each['lds']:.3f}",
                f"{each['low']:.3f}–{each['high']:.3f}",
                "" if each["seconds"] is None else f"{each['seconds']:.1f}",
                "" if exact is None else f"{each['lds'] - exact:+.3f}",
            ]
        )
    head = ["", "LDS", "95 %", "seconds", "of its exact method"]
    return (
        "### Foretelling\n\nscikit-learn's digits, 1000 for training and 200 queries; 400 "
        "retrainings on halves; the ceiling, given the noise between seeds, is "
        f"{record['ceiling']:.3f}. `benchmarks/digits_lds.py`.\n\n{table(head, rows, 1)}"
    )
