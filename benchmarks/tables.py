"""Write the tables of README.md, docs/costs.md and benchmarks/README.md from benchmarks/results.

python benchmarks/tables.py            # write, and fail if a claim of README.md does not hold
python benchmarks/tables.py --check    # only say whether the files are up to date
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import front
import harness
import targets
import workloads
from attributors import shown
from contestants import CONTESTANTS

ROOT = Path(__file__).parents[1]
START, END = "<!-- costs: written by benchmarks/tables.py -->", "<!-- end of costs -->"
Record = dict[str, Any]

# Columns of docs/costs.md beside pergrad's own.
PEERS = ("by_torch", "opacus", "backpack", "vmap", "loop")


def read(folder: Path = harness.RESULTS) -> dict[str, Record]:
    """Records of the workloads there are, in their order."""
    paths = {name: folder / f"{name}.json" for name in workloads.REGISTRY}
    return {n: json.loads(path.read_text()) for n, path in paths.items() if path.exists()}


def read_other(name: str, folder: Path = harness.RESULTS) -> Record | None:
    path = folder / f"{name}.json"
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


def _training(record: dict[str, Any]) -> str:
    """What reading costs in a training step."""
    rows = []
    for found in record["workloads"]:
        for name, way in found["ways"].items():
            if name == "plain":
                continue
            bound = "" if way["bound"] is None else f"≤ {way['bound']:.2f}"
            low, high = way["ratio"]["quartiles"]
            rows.append(
                [
                    found["workload"],
                    way["title"],
                    f"{way['ratio']['median']:.3f} ({low:.3f}–{high:.3f})",
                    _processor(way, "processor_ratio"),
                    bound,
                    f"{way['ratio']['runs']}",
                    _number(way["memory_ratio"]),
                    f"{way['first_step']:.1f}",
                ]
            )
    head = ["", "", "time", "processor time", "bound", "turns", "peak memory", "first step"]
    return (
        "### training\n\nA step is zero_grad, forward, the mean of the losses, backward and AdamW; "
        "that alone is 1. Each way has a process of its own, and all take turns. Weights after "
        "some steps were the same to the bit. The first step is planned and verified: what it "
        f"takes beyond the plain way's first, in plain steps.\n\n{_table(head, rows, 2)}\n\n"
        f"{_machines(record['workloads'])}."
    )


def _private(record: dict[str, Any]) -> str:
    """A private step by pergrad and by Opacus."""
    rows = []
    for found in record["workloads"]:
        for name, way in found["ways"].items():
            if name == "plain":
                continue
            ours = name == "pergrad"
            rows.append(
                [
                    found["workload"],
                    way["title"],
                    _share(way["ratio"]),
                    _processor(way, "processor_ratio"),
                    _share(found["of_opacus"]) if ours else "",
                    _processor(found, "processor_of_opacus") if ours else "",
                    f"≤ {found['bound']:.2f}" if ours else "",
                    _number(way["memory_ratio"]),
                ]
            )
    head = ["", "", "time", "processor time", "of Opacus's", "processor time", "bound",
            "peak memory"]  # fmt: skip
    return (
        "### private\n\nA step with clipping to norm 1, noise and AdamW, as a share of the step "
        "that is not private, and of Opacus's. What both give the optimizer without noise was the "
        f"same.\n\n{_table(head, rows, 2)}\n\n{_machines(record['workloads'])}."
    )


def _processor(record: dict[str, Any], name: str) -> str:
    """The same by the processor's time, which others on the machine disturb less."""
    return f"{record[name]['median']:.3f}" if name in record else ""


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


def _worst(record: dict[str, Any]) -> str:
    """The slow kinds of models."""
    rows = [
        [
            kind["title"],
            f"{kind['losses']:,}",
            f"{kind['plain_milliseconds']['median']:.1f} ms",
            _share(kind["plain_steps"]),
            _share(kind["loops"]),
        ]
        for kind in record["kinds"].values()
    ]
    head = ["", "losses", "plain step", "pergrad, in plain steps", "in loops"]
    return (
        "### Slow kinds\n\nWhat takes more than an ordinary model does: small models, one of each "
        "kind, whose norms agree with the loop. A loop is a forward pass and a backward pass for "
        f"each loss.\n\n{_table(head, rows)}\n\n{_machine(record)}."
    )


def _everything(record: dict[str, Any]) -> str:
    """The dearest of all architectures and of the tests' zoo."""
    models, bound = record["models"], record["bound"]
    dearest = sorted(models, key=lambda name: models[name]["price"], reverse=True)[:10]
    rows = [
        [
            f"`{name}`",
            f"{models[name]['losses']}",
            f"{models[name]['plain_milliseconds']['median']:.1f} ms",
            _share(models[name]["plain_steps"]),
            _share(models[name]["loops"]),
        ]
        for name in dearest
    ]
    steps = sorted(m["plain_steps"]["median"] for m in models.values())
    loops = sorted(m["loops"]["median"] for m in models.values())
    large = sum(not name.startswith("zoo-") for name in models)
    within = sum(m["price"] <= 1 for m in models.values())
    head = ["", "losses", "plain step", "pergrad, in plain steps", "in loops"]
    return (
        f"### The worst case\n\n{large} architectures, and {len(models) - large} models of the "
        f"tests' zoo, with {record['examples']} examples where they take so many, "
        "most so small that a plain step takes a millisecond or two. Norms take "
        f"{_number(statistics.median(steps))} plain steps in the median and "
        f"{_number(steps[int(0.9 * len(steps))])} at the 90th percentile, "
        f"{_number(statistics.median(loops))} and {_number(loops[int(0.9 * len(loops))])} loops. "
        f"At most {bound['steps']:.0f} plain steps or {bound['loops']} loops: {within} of "
        f"{len(models)}. The ten dearest, by the smaller of the two shares of these bounds, in the "
        f"processor's time with one thread:\n\n{_table(head, rows)}\n\n{_machine(record)}."
    )


def _one_process(record: dict[str, Any]) -> str:
    """pergrad and the plain step with one allocator."""
    rows = [
        [
            case["title"],
            f"{case['milliseconds']['plain']['median']:.2f} ms",
            _share(case["share"]),
            "" if case["target"] is None else f"{case['target']:.2f}",
        ]
        for case in record["cases"].values()
    ]
    return (
        "### In one process\n\nAs a user has them: pergrad and the plain step in turns in one "
        "process, with the allocator as torch leaves it. A compiled model's share is that of its "
        "own compiled step.\n\n"
        f"{_table(['', 'plain step', 'pergrad, in plain steps', 'aimed at'], rows)}\n\n"
        f"{_machine(record)}."
    )


def _parts(record: dict[str, Any]) -> str:
    """What many parts cost."""
    writing, opened = record["writing_milliseconds"], record["open_seconds"]
    return (
        f"### parts\n\n{record['parts']:,} parts of scores, as after days of scanning: written in "
        f"{_share(writing)} ms each (claim: {record['claims']['writing_milliseconds']:.0f}) beyond "
        f"the scan into one part, and open in {_share(opened)} s (claim: "
        f"{record['claims']['open_seconds']:.0f}). This disk takes "
        f"{_share(record['forcing_milliseconds'])} ms to force a small file.\n\n"
        f"{_machine(record)}."
    )


def _table(head: list[str], rows: list[list[str]], words: int = 1) -> str:
    """Markdown; the first `words` columns are text, the others numbers."""
    line = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, line, *rows])


def _share(spread: dict[str, Any]) -> str:
    low, high = spread["quartiles"]
    return f"{_number(spread['median'])} ({_number(low)}–{_number(high)})"


def _number(x: float) -> str:
    return f"{x:.2f}" if x < 20 else f"{x:.0f}"


def _machine(record: Record) -> str:
    e = record["environment"]
    busy = f", load {e['load']} before" if e["load"] is not None and e["load"] > 0.5 else ""
    return (
        f"{e['cpu']}, {e['threads']} threads{busy}; {e['system']}; Python {e['python']}, "
        f"torch {e['torch']}; {e['date']}, commit {e['commit']}"
    )


def _machines(records: list[Record]) -> str:
    """Once each; the load differs from workload to workload, so the largest is given."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        e = record["environment"]
        groups.setdefault(str({**e, "load": None}), []).append(record)
    largest = [max(g, key=lambda r: r["environment"]["load"] or 0.0) for g in groups.values()]
    return "; ".join(_machine(record) for record in largest)


def _cell(record: Record, name: str) -> str:
    row = record["contestants"].get(name)
    if row is None:
        return ""
    return "fails" if row["failure"] is not None else _number(row["ratio"]["median"])


def summary(records: dict[str, Record]) -> str:
    """For docs/costs.md: one row per workload, the cost of each way as a share of a plain step."""
    parts = []
    for task in workloads.TASKS:
        chosen = [r for r in records.values() if r["task"] == task]
        if not chosen:
            continue
        peers = [p for p in PEERS if any(p in r["contestants"] for r in chosen)]
        rows = [
            [
                record["title"],
                f"**{_cell(record, 'pergrad')}**",
                _number(record["contestants"]["pergrad"]["memory_ratio"]),
                *(_cell(record, peer) for peer in peers),
            ]
            for record in chosen
        ]
        titles = [CONTESTANTS[peer].title for peer in peers]
        head = [workloads.TASKS[task], "pergrad", "its peak memory", *titles]
        parts.append(_table(head, rows))
    machines = _machines(list(records.values()))
    return (
        "\n\n".join(parts) + "\n\nTime as a share of a plain forward and backward pass of the same "
        f"batch (1.00), and peak memory as a share of that pass's; medians. {machines}."
    )


def _bound(outcome: targets.Outcome) -> list[str]:
    sign = "≥" if outcome.measure in targets.AT_LEAST else "≤"
    measured = "fails" if outcome.other_fails else "not measured"
    if outcome.value is not None:
        measured = _number(outcome.value)
    return [
        outcome.workload,
        targets.WORDS[outcome.measure],
        f"{sign} {outcome.bound:.2f}",
        measured,
        "yes" if outcome.holds else "**no**",
        "README" if outcome.claim else "",
    ]


def bounds(records: dict[str, Record]) -> str:
    """Every target and claim, and whether it is met."""
    rows = [_bound(o) for record in records.values() for o in targets.outcomes(record)]
    table = _table(["workload", "what", "bound", "measured", "met", "claimed in"], rows, 2)
    slower = [
        f"{name} ({', '.join(CONTESTANTS[c].title for c in found)})"
        for name, record in records.items()
        if (found := targets.faster(record))
    ]
    verdict = "No contestant but the plain step is faster than pergrad on any workload."
    if slower:
        verdict = f"Faster than pergrad, besides the plain step: {'; '.join(slower)}."
    return f"{table}\n\n{verdict}"


def above_the_floor(records: dict[str, Record]) -> str:
    """Where the time of norms goes: what nobody can save, and what pergrad adds to it."""
    rows = []
    for name, record in records.items():
        counts, found = record.get("multiply_adds"), record["contestants"]
        if not counts or "ratio" not in found.get("floor", {}):
            continue
        floor, ours = (found[who]["ratio"]["median"] for who in ("floor", "pergrad"))
        rows.append(
            [
                name,
                _number(floor),
                _cell(record, "by_torch"),
                _number(ours),
                _number(ours - floor),
                f"{counts['plain'] / 1e9:.2f}",
                f"{counts['pergrad'] / 1e9:.2f}",
                _number(counts["pergrad"] / counts["plain"]),
            ]
        )
    head = ["norms", "floor", "pergrad by torch's ops", "pergrad", "above the floor",
            "G multiply-adds of plain", "added", "share"]  # fmt: skip
    return _table(head, rows)


def _rows(record: Record) -> list[list[str]]:
    rows = []
    for row in record["contestants"].values():
        if row["failure"] is not None:
            rows.append([row["title"], "", "", "", "", "", "", _plain_text(row["failure"])])
            continue
        notes = []
        if row["part"]:
            notes.append(f"timed on {row['part'][0]} of {row['part'][1]} examples, and scaled")
        if "first_over_again" in row:
            notes.append(f"{row['first_over_again']:.2f} of the time at a known length")
        rows.append(
            [
                row["title"],
                f"{row['milliseconds']['median']:.1f}",
                _share(row["ratio"]),
                f"{row['ratio']['runs']}",
                # a part of the batch says nothing about the memory of the whole
                "" if row["part"] else f"{statistics.median(row['peak_bytes']) / 1e6:.0f} MB",
                "" if row["part"] else _number(row["memory_ratio"]),
                f"{row['error']:.0e}" if row["error"] is not None else "",
                "; ".join(notes),
            ]
        )
    return rows


def _plain_text(failure: str, longest: int = 120) -> str:
    """An error in a cell of a table."""
    text = failure.replace("|", "\\|").replace("<", "&lt;")
    return text if len(text) <= longest else text[: longest - 1] + "…"


def full(records: dict[str, Record], imported: Record | None, scaling: Record | None) -> str:
    """For benchmarks/README.md: everything that was measured."""
    head = ["", "ms", "share of plain", "turns", "peak memory", "share", "error", "remarks"]
    parts = [
        "### Targets\n\n" + bounds(records),
        "![time as a share of the plain step, one panel per workload](results/costs.svg)",
        "### Above the floor\n\nThe floor is the forward pass and the half of the backward that "
        "gives cotangents: what pergrad takes if it serves no use. Above it are its products, and "
        "everything else that it does. By torch's ops: without the kernels that pergrad compiles "
        "where it finds a C compiler.\n\n" + above_the_floor(records),
    ]
    for name, record in records.items():
        parts.append(
            f"### {name}\n\n{record['title']}; {record['parameters']:,} parameters. "
            f"{record['task_title'][0].upper()}{record['task_title'][1:]}.\n\n"
            f"{_table(head, _rows(record))}"
        )
    parts.append(f"All of these: {_machines(list(records.values()))}.")
    if scaling:
        rows = [
            [
                s["title"],
                f"{s['values'][0]}–{s['values'][-1]}",
                f"{s['exponents']['plain']:.2f}",
                f"{s['exponents']['pergrad']:.2f}",
            ]
            for s in scaling["series"]
        ]
        parts.append(
            "### Scaling\n\n![time over the number of examples and of positions]"
            "(results/scaling.svg)\n\nTime grows as a power of the number; 1 is linear. Over the "
            f"upper half of the range:\n\n"
            f"{_table(['', 'range', 'plain step', 'pergrad'], rows)}\n\n{_machine(scaling)}."
        )
    if imported:
        parts.append(
            "### Import\n\n"
            f"`import pergrad` and the first use of a verb add "
            f"{imported['pergrad_seconds']['median']:.3f} s to `import torch` "
            f"(claim: at most {imported['claims']['seconds']} s); `import pergrad` alone "
            f"{imported['pergrad_without_verbs_seconds']['median']:.4f} s. `pergrad top` takes "
            f"{imported['top_processor_seconds']['median']:.2f} s of processor time "
            f"(claim: at most {imported['claims']['top_seconds']} s).\n\n{_machine(imported)}."
        )
    trained = read_other("training")
    if trained:
        parts.append(_training(trained))
    private = read_other("private")
    if private:
        parts.append(_private(private))
    scanned = read_other("scan")
    if scanned:
        parts.append(_scan(scanned))
    shared = read_other("one_process")
    if shared:
        parts.append(_one_process(shared))
    worst = read_other("worst")
    if worst:
        parts.append(_worst(worst))
    everything = read_other("everything")
    if everything:
        parts.append(_everything(everything))
    parted = read_other("parts")
    if parted:
        parts.append(_parts(parted))
    reported = read_other("report")
    if reported:
        parts.append(_report(reported))
    influences, foretold = read_other("influences"), read_other("digits-lds")
    if influences:
        parts.append(shown.influences(influences, _table, _machine(influences)))
    if foretold:
        parts.append(shown.foretold(foretold, _table))
    return "\n\n".join(parts)


def _replaced(path: Path, text: str, start: str = START, end: str = END) -> str:
    return _put(path, path.read_text(), text, start, end)


def _put(path: Path, old: str, text: str, start: str = START, end: str = END) -> str:
    if start not in old or end not in old:
        raise SystemExit(f"{path} has no place for the table: {start} ... {end}")
    before, rest = old.split(start, 1)
    return f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}"


def _first_page(records: dict[str, Record]) -> str:
    """README.md with its two tables, and what compiled kernels give."""
    path = ROOT / "README.md"
    page = _replaced(path, front.costs(records))
    page, places = re.subn(r"up to \d+ % faster", front.faster(records), page)
    if places != 1:
        raise SystemExit(f"{path} does not say in one place how much faster the kernels are")
    return _put(path, page, front.uses(records), front.START, front.END)


def missed(records: dict[str, Record], imported: Record | None, *, claim: bool) -> list[str]:
    """The bounds that do not hold: those that README.md claims, or the other targets."""
    found = [
        f"{o.workload}: {o.measure} {'not measured' if o.value is None else _number(o.value)}"
        f" ({o.bound:.2f})"
        for record in records.values()
        for o in targets.outcomes(record)
        if o.claim == claim and not o.holds
    ]
    if claim and imported and imported["pergrad_seconds"]["median"] > imported["claims"]["seconds"]:
        found.append("import time")
    trained = read_other("training")
    if not claim and trained:
        found += [
            f"{r['workload']}, {name}: time {way['ratio']['median']:.3f} ({way['bound']:.2f})"
            for r in trained["workloads"]
            for name, way in r["ways"].items()
            if way["bound"] is not None and way["ratio"]["median"] > way["bound"]
        ]
    shared = read_other("one_process")
    if not claim and shared:
        found += [
            f"in one process, {case['title']}: {case['share']['median']:.2f} ({case['target']:.2f})"
            for case in shared["cases"].values()
            if case["target"] is not None and case["share"]["median"] > case["target"]
        ]
    private = read_other("private")
    if not claim and private:
        found += [
            f"{r['workload']}, private: {r['of_opacus']['median']:.3f} of Opacus's "
            f"({r['bound']:.2f})"
            for r in private["workloads"]
            if r["of_opacus"]["median"] > r["bound"]
        ]
    scanned = read_other("scan")
    if claim and scanned:
        claims, memory = scanned["claims"], scanned["whole"]["memory_bytes"]
        compared = [scanned[name] for name in ("compared", "compared_steady_allocator")]
        clock = max(each["clock_ratio"]["median"] for each in compared)
        if clock > 1 + claims["overhead"]:
            found.append("scan: time")
        if scanned["whole"]["bytes_per_example"] > claims["bytes_per_example"]:
            found.append("scan: size")
        if memory["100 %"]["peak"] > (1 + claims["memory_growth"]) * memory["10 %"]["peak"]:
            found.append("scan: memory")
    parted = read_other("parts")
    if claim and parted:
        found += [
            f"parts: {name}" for name, most in parted["claims"].items()
            if parted[name]["median"] > most
        ]  # fmt: skip
    reported = read_other("report")
    if claim and reported:
        if any(page["bytes"] > page["claim_bytes"] for page in reported["pages"]):
            found.append("report: size")
        if reported["pages"][0]["opening_seconds"]["median"] > reported["claims"]["seconds"]:
            found.append("report: time")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args()
    records, imported, scaling = read(), read_other("import_time"), read_other("scaling")
    wanted = {ROOT / "README.md": _first_page(records)} | {
        path: _replaced(path, text)
        for path, text in (
            (ROOT / "docs" / "costs.md", summary(records)),
            (ROOT / "benchmarks" / "README.md", full(records, imported, scaling)),
        )
    }
    if args.check:
        stale = [str(path) for path, text in wanted.items() if path.read_text() != text]
        sys.exit(f"Run benchmarks/tables.py: out of date: {', '.join(stale)}" if stale else 0)
    for path, text in wanted.items():
        path.write_text(text)
    for name in missed(records, imported, claim=False):
        print(f"target missed: {name}")
    for name, method, ratio, target in shown.faster(read_other("influences") or {"workloads": {}}):
        if ratio < target:
            print(f"target missed: influences of {name}, {method}: {ratio:.1f} ({target:g})")
    failed = missed(records, imported, claim=True)
    sys.exit(f"Claims of README.md that do not hold: {'; '.join(failed)}." if failed else 0)


if __name__ == "__main__":
    main()
