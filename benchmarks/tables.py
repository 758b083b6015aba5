"""Write the tables of benchmarks/README.md and README.md from benchmarks/results.

python benchmarks/tables.py            # write, and fail if a claim does not hold
python benchmarks/tables.py --check    # only say whether the files are up to date
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import harness

ROOT = Path(__file__).parents[1]
START, END = "<!-- costs: written by benchmarks/tables.py -->", "<!-- end of costs -->"
WORDS = {"time": "time", "memory": "peak memory"}


def read() -> dict[str, dict[str, Any]]:
    """Records of the workloads by name, in the order in which `norms.py` registers them."""
    paths = sorted(harness.RESULTS.glob("*.json"))
    records = {path.stem: json.loads(path.read_text()) for path in paths}
    return {name: r for name, r in records.items() if "workload" in r}


def read_import() -> dict[str, Any] | None:
    path = harness.RESULTS / "import_time.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_scan() -> dict[str, Any] | None:
    path = harness.RESULTS / "scan.json"
    return json.loads(path.read_text()) if path.exists() else None


def read_report() -> dict[str, Any] | None:
    path = harness.RESULTS / "report.json"
    return json.loads(path.read_text()) if path.exists() else None


def _report(record: dict[str, Any]) -> str:
    """How large a report is, and how soon it is open."""
    rows = [
        [
            f"{page['examples']:,}",
            f"{page['bytes'] / 1e6:.1f} MB (claim: {page['claim_bytes'] / 1e6:.0f})",
            f"{page['writing_seconds']:.1f} s",
            f"{page['opening_seconds']['median']:.2f} s",
        ]
        for page in record["pages"]
    ]
    head = ["examples", "size", "written in", "open after"]
    return (
        "### report\n\nTen columns of norms by layer, two references; pictures of 8 x 8 pixels of "
        "all examples, or of the 1,000 with the largest norms. Opened in a Chromium that has just "
        f"been started, until all is drawn (claim: {record['claims']['seconds']:.0f} s, for the "
        f"first).\n\n{_table(head, rows)}\n\n{_machine(record)}."
    )


def _scan(record: dict[str, Any]) -> str:
    """What a scan costs beyond the norms."""
    whole, memory = record["whole"], record["whole"]["memory_bytes"]
    rows = [
        [title, _share(record[name]["processor_ratio"]), _share(record[name]["clock_ratio"])]
        for name, title in (
            ("compared", "as it is"),
            ("compared_steady_allocator", "with an allocator that gives no memory back"),
        )
    ]
    head = ["a scan, as a share of a bare loop of `pergrad.norms`", "processor time", "clock"]
    marks = " ".join(
        f"After {name}: {seen['now'] / 1e6:.0f} MB in memory, {seen['peak'] / 1e6:.0f} MB at most."
        for name, seen in memory.items()
    )
    return (
        f"### scan\n\nPerceptron 256-512-512-1 in batches of 1024; "
        f"{record['compared']['examples']:,} examples a round, "
        f"{record['compared']['clock_ratio']['runs']} rounds.\n\n{_table(head, rows)}\n\n"
        f"{whole['examples']:,} examples at once: {whole['bytes_per_example']} bytes each in "
        f"{whole['files']} files for index, loss and norm. {marks} Of that "
        f"{whole['data_bytes'] / 1e6:.0f} MB are the data.\n\n{_machine(record)}."
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _share(spread: dict[str, Any]) -> str:
    low, high = spread["quartiles"]
    return f"{spread['median']:.2f} ({low:.2f}–{high:.2f})"


def _machine(record: dict[str, Any]) -> str:
    e = record["environment"]
    return (
        f"{e['cpu']}, {e['threads']} threads; {e['system']}; Python {e['python']}, "
        f"torch {e['torch']}; {e['date']}, commit {e['commit']}"
    )


def summary(records: dict[str, dict[str, Any]]) -> str:
    """For README.md: one row per model, the cost of every way as a share of a plain step."""
    ways: dict[str, str] = {}
    for record in records.values():
        for name, row in record["contestants"].items():
            if name != "plain":
                ways.setdefault(name, row["title"])
    rows = []
    for record in records.values():
        cells = [record["title"]]
        for name in ways:
            row = record["contestants"].get(name)
            cells.append(f"{row['ratio']['median']:.2f}" if row else "")
        memory = record["contestants"]["norms"].get("memory_ratio")
        cells.append(f"{memory:.2f}" if memory else "")
        rows.append(cells)
    head = ["time, as a share of a plain forward and backward", *ways.values()]
    table = _table([*head, "peak memory of `pergrad.norms`"], rows)
    machines = sorted({_machine(record) for record in records.values()})
    return f"{table}\n\nMedians. {'; '.join(machines)}."


def full(records: dict[str, dict[str, Any]]) -> str:
    """For benchmarks/README.md: everything that was measured."""
    parts = []
    for name, record in records.items():
        rows = []
        for row in record["contestants"].values():
            peak = (
                sorted(row["peak_bytes"])[len(row["peak_bytes"]) // 2]
                if row.get("peak_bytes")
                else 0
            )
            rows.append(
                [
                    row["title"],
                    f"{row['milliseconds']['median']:.1f}",
                    _share(row["ratio"]),
                    f"{row['ratio']['runs']}",
                    f"{peak / 1e6:.0f} MB" if peak else "",
                    f"{row['memory_ratio']:.2f}" if row.get("memory_ratio") else "",
                    f"{row['error']:.0e}" if row.get("error") is not None else "",
                ]
            )
        head = ["", "ms", "share of plain", "runs", "peak memory", "share of plain", "error"]
        claims = [
            f"{WORDS[claim]} at most {record['claims'][claim]} of a plain step: "
            + ("holds" if holds else "**does not hold**")
            for claim, holds in harness.held(record).items()
        ]
        parts.append(
            f"### {name}\n\n{record['title']}; {record['parameters']:,} parameters.\n\n"
            f"{_table(head, rows)}\n\n"
            + (f"Claims for `pergrad.norms`: {'; '.join(claims)}.\n\n" if claims else "")
            + f"{_machine(record)}."
        )
    imported = read_import()
    if imported:
        parts.append(
            "### import\n\n"
            f"`import pergrad` adds {imported['pergrad_seconds']['median']:.3f} s to "
            "`import torch` "
            f"(claim: at most {imported['claims']['seconds']} s).\n\n{_machine(imported)}."
        )
    scanned = read_scan()
    if scanned:
        parts.append(_scan(scanned))
    reported = read_report()
    if reported:
        parts.append(_report(reported))
    return "\n\n".join(parts)


def _replaced(path: Path, text: str) -> str:
    old = path.read_text()
    if START not in old or END not in old:
        raise SystemExit(f"{path} has no place for the table: {START} ... {END}")
    before, rest = old.split(START, 1)
    return f"{before}{START}\n{text}\n{END}{rest.split(END, 1)[1]}"


def broken(records: dict[str, dict[str, Any]]) -> list[str]:
    """The claims that do not hold."""
    found = [
        f"{name}: {WORDS[claim]}"
        for name, record in records.items()
        for claim, holds in harness.held(record).items()
        if not holds
    ]
    imported = read_import()
    if imported and imported["pergrad_seconds"]["median"] > imported["claims"]["seconds"]:
        found.append("import time")
    scanned = read_scan()
    if scanned:
        claims, memory = scanned["claims"], scanned["whole"]["memory_bytes"]
        overhead = scanned["compared_steady_allocator"]["processor_ratio"]["median"] - 1
        if overhead > claims["overhead"]:
            found.append("scan: time")
        if scanned["whole"]["bytes_per_example"] > claims["bytes_per_example"]:
            found.append("scan: size")
        if memory["100 %"]["peak"] > (1 + claims["memory_growth"]) * memory["10 %"]["peak"]:
            found.append("scan: memory")
    reported = read_report()
    if reported:
        if any(page["bytes"] > page["claim_bytes"] for page in reported["pages"]):
            found.append("report: size")
        if reported["pages"][0]["opening_seconds"]["median"] > reported["claims"]["seconds"]:
            found.append("report: time")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    records = read()
    wanted = {
        path: _replaced(path, text)
        for path, text in (
            (ROOT / "README.md", summary(records)),
            (ROOT / "benchmarks" / "README.md", full(records)),
        )
    }
    if args.check:
        stale = [str(path) for path, text in wanted.items() if path.read_text() != text]
        sys.exit(f"Run benchmarks/tables.py: out of date: {', '.join(stale)}" if stale else 0)
    for path, text in wanted.items():
        path.write_text(text)
    failed = broken(records)
    sys.exit(f"Claims that do not hold: {', '.join(failed)}." if failed else 0)


if __name__ == "__main__":
    main()
