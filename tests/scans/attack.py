"""Attack scans and what they have written, and count what is lost: `make attack`. No test.

A scan of 40 examples, of which one cannot be scored, and then the columns that are added to it
(groups, a reference, two checkpoints) are killed, starved of disk and damaged, in processes of
their own; then the same calls are made again. What counts, for each kind of attack:

    lost, doubled    examples, at the end
    wrong            numbers that are not those of an undisturbed scan, at the end or in between
    raw              exceptions that are no error of pergrad's, or end it with a signal of their own
    hung             processes that were still there after two minutes

`--every 50` makes one attack in 50, with the same seed; `--save` writes
benchmarks/results/attack.json and the table of docs/reliability.md.
"""

import argparse
import builtins
import errno
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from scanning import Listed, data, job, scan

import pergrad
from pergrad.command import app
from pergrad.scans import writer

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "attack.json"
PAGE = ROOT / "docs" / "reliability.md"
COUNT, SECONDS = 40, 120
MOMENTS = 600  # kills at calls, spread over all there are
ROUNDS = 12  # kinds of damage to each file
HOSTILE = (
    "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x9b2J", "[bold]x[/bold]", "[/x]", "\ud800", "\x00",
    "a\r\nb\tc", "‮override", "﻿", "=1+1", "@SUM(A1)", "-2+3", "</script><script>alert(1)</script>",
    "<!--", "{{ 7 * 7 }}", "' or 1=1", "../../etc/passwd", "%s%n", "é" * 3000, "𝔘nicode 👩‍👩‍👧",
    " ", "NaN", "None", "index", "error\u2028line",
)  # fmt: skip


@dataclass
class Tally:
    """What came of a kind of attack."""

    attacks: int = 0
    refused: int = 0  # ended with an error of pergrad's that names what is wrong
    lost: int = 0
    doubled: int = 0
    wrong: int = 0
    raw: int = 0
    hung: int = 0

    @property
    def good(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.lost or self.doubled or self.wrong or self.raw or self.hung)


# --- what is attacked -----------------------------------------------------------------------------


def task(**more: Any) -> pergrad.Job:
    """A job with a name and a preview for each example."""
    broken = Listed(data(COUNT), {29: ValueError("broken")})
    named = {"key": lambda i: f"example {i}", "show": lambda i: f"number {i}"}
    return job(**{"data": broken, **named, **more})


def columns(scored: pergrad.Job) -> dict[str, Any]:
    """What is added to finished scores."""
    state = scored.model.state_dict()
    return {
        "groups": "layer",
        "against": {"mean": pergrad.MeanGradient(data(5))},
        "checkpoints": {"a": {n: t + 1 for n, t in state.items()},
                        "b": {n: t - 1 for n, t in state.items()}},
    }  # fmt: skip


def life(folder: Path, **more: Any) -> None:
    """A scan, and the columns added to it; either goes on where it stopped."""
    scored = task()
    names = _columns_in(folder)
    if "loss@a" not in names:
        scan(scored, folder, batch_size=8, **more)
    scan(scored, folder, batch_size=8, **columns(scored), **more)


def _columns_in(folder: Path) -> set[str]:
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return set()
    return set(pergrad.open_scores(folder).manifest["columns"])


def differing(table: pa.Table, whole: pa.Table) -> list[str]:
    """Columns that are not those of an undisturbed scan, to the bit.

    But for the norm of all parameters: with groups it is the root of a sum over them, which may be
    rounded otherwise, and a part that is scored again is scored with groups.
    """
    found = []
    for name in table.column_names:
        a, b = table[name].combine_chunks(), whole[name].combine_chunks()
        same = a.equals(b)
        if name == "norm" and a.is_null().equals(b.is_null()):
            same = np.allclose(a.to_numpy(False), b.to_numpy(False), 1e-12, 0, equal_nan=True)
        found += [] if same else [name]
    return found


def judge(folder: Path, whole: pa.Table, tally: Tally, what: str) -> None:
    """Compare what a folder has at the end with an undisturbed scan."""
    table = pergrad.open_scores(folder).table()
    index = table["index"].to_pylist()
    lost, doubled = len(set(range(COUNT)) - set(index)), len(index) - len(set(index))
    wrong = [n for n in whole.column_names if n not in table.column_names]
    wrong += [] if lost or doubled else differing(table, whole)
    left = [p for p in folder.rglob("*") if p.suffix == ".tmp" or p.name.startswith("adding-")]
    tally.lost, tally.doubled = tally.lost + lost, tally.doubled + doubled
    tally.wrong += bool(wrong or left)
    if lost or doubled or wrong or left:
        sys.stderr.write(f"--- {what}: {lost} lost, {doubled} doubled, other: {wrong}, {left}\n")


def look(folder: Path, whole: pa.Table) -> None:
    """Read scores at any time: no number may be another than at the end.

    Raises:
        PergradError: it says what is wrong.
        AssertionError: a number is wrong.
    """
    scores = pergrad.open_scores(folder)
    table = scores.table()
    scores.damaged(), scores.failures(), str(scores.top(3)), repr(scores)
    index = table["index"].to_pylist()
    assert len(set(index)) == len(index) <= COUNT
    assert not differing(table, whole.take(pa.array(index, pa.int64())))


# --- processes ------------------------------------------------------------------------------------


def child(action: Callable[[], None], said: Path) -> str:
    """Do something in a forked process; how it ended: done, refused, raw, wrong, killed or hung."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                action()
            code = 0
        except pergrad.PergradError as error:
            said.write_text(f"{type(error).__name__}: {error}", errors="backslashreplace")
            code = 1
        except AssertionError:
            said.write_text(traceback.format_exc(), errors="backslashreplace")
            code = 2
        except BaseException:
            said.write_text(traceback.format_exc(), errors="backslashreplace")
            code = 3
        finally:
            os._exit(code)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            if os.WIFSIGNALED(status):
                return "killed" if os.WTERMSIG(status) == signal.SIGKILL else "raw"
            return ["done", "refused", "wrong", "raw"][min(3, os.WEXITSTATUS(status))]
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def count(tally: Tally, outcome: str, allowed: Sequence[str], said: Path, what: str) -> None:
    """Add an outcome, and show one that should not be."""
    if outcome == "refused" and outcome in allowed:
        tally.refused += 1
    elif outcome not in allowed:
        kind = outcome if outcome in ("wrong", "hung") else "raw"
        setattr(tally, kind, getattr(tally, kind) + 1)
        words = said.read_text() if said.exists() else ""
        sys.stderr.write(f"--- {what}: {outcome}\n{words}\n")


@contextmanager
def operations(before: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """Call a function before everything that changes files or forces them to the disk."""
    names = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "fsync")
    real = {name: getattr(os, name) for name in (*names, "open")}
    opened = builtins.open

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            before(name, arguments)
            return real[name](*arguments, **more)

        return call

    def opening(path: Any, flags: int, *arguments: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            before("open", (path,))
        return real["open"](path, flags, *arguments, **more)

    def opening_text(path: Any, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if set(mode) & set("wxa+") and not isinstance(path, int):
            before("open", (path,))
        return opened(path, mode, *arguments, **more)

    try:
        for name in names:
            setattr(os, name, wrapped(name))
        os.open, builtins.open = opening, opening_text  # type: ignore[assignment]
        yield
    finally:
        for name, function in real.items():
            setattr(os, name, function)
        builtins.open = opened


def counted(folder: Path) -> int:
    """How many operations on files a whole life has."""
    found = 0

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal found
        found += 1

    with operations(before):
        life(folder)
    return found


# --- the attacks ----------------------------------------------------------------------------------


def kills_at_file_operations(place: Path, whole: pa.Table, every: int) -> Tally:
    """Killed before the n-th operation, for every n; what is being written is cut in half."""
    tally = Tally()
    for n in range(1, counted(place / "counted") + 1, every):
        folder, said, done = place / f"k{n}", place / "said", 0

        def before(name: str, arguments: tuple[Any, ...], n: int = n) -> None:
            nonlocal done
            done += 1
            if done == n:
                if name == "fsync" and os.path.isfile(f"/proc/self/fd/{arguments[0]}"):
                    os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        def attacked(folder: Path = folder, before: Any = before) -> None:
            with operations(before):
                life(folder)

        tally.attacks += 1
        count(tally, child(attacked, said), ["killed"], said, f"kill at {n}")
        _goes_on(folder, whole, tally, said, f"after a kill at {n}")
    return tally


def _goes_on(folder: Path, whole: pa.Table, tally: Tally, said: Path, what: str) -> None:
    """Read what there is, make the same calls again, and compare."""
    if (folder / "manifest.json").exists():
        count(tally, child(lambda: look(folder, whole), said), ["done"], said, f"{what}, read")
    outcome = child(lambda: life(folder), said)
    count(tally, outcome, ["done"], said, what)
    if outcome == "done":
        judge(folder, whole, tally, what)
    shutil.rmtree(folder)


def kills_at_random_moments(place: Path, whole: pa.Table, every: int) -> Tally:
    """Killed at the n-th call of any function, Python's or C's; every fourth one twice."""
    tally, choose = Tally(), random.Random(0)

    def timed(kill_at: int | None, folder: Path, found: Path | None = None) -> Callable[[], None]:
        def action() -> None:
            calls = 0

            def profile(frame: object, event: str, argument: object) -> None:
                nonlocal calls
                calls += event in ("call", "c_call")
                if calls == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.setprofile(profile)
            try:
                life(folder)
            finally:
                sys.setprofile(None)
            if found is not None:
                found.write_text(str(calls))

        return action

    said = place / "said"
    assert child(timed(None, place / "counted", place / "calls"), said) == "done"
    calls = int((place / "calls").read_text())
    for k, moment in enumerate(sorted(choose.sample(range(1, calls), MOMENTS))[::every]):
        folder = place / f"m{moment}"
        tally.attacks += 1
        count(tally, child(timed(moment, folder), said), ["killed"], said, f"kill at call {moment}")
        if k % 4 == 0:
            tally.attacks += 1
            again = child(timed(choose.randrange(1, calls), folder), said)
            count(tally, again, ["killed", "done"], said, "a second kill")
        _goes_on(folder, whole, tally, said, f"after a kill at call {moment}")
    return tally


def full_disks(place: Path, whole: pa.Table, every: int) -> Tally:
    """From the n-th operation on the disk takes nothing, or only then."""
    tally = Tally()
    total = counted(place / "counted")
    for for_good in (True, False):
        for n in range(1, total + 1, every):
            folder, said, done = place / f"f{for_good}{n}", place / "said", 0

            def before(
                name: str, arguments: tuple[Any, ...], n: int = n, for_good: bool = for_good
            ) -> None:
                nonlocal done
                done += 1
                full = done >= n if for_good else done == n
                if full and name in ("open", "fsync", "replace", "mkdir"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            def attacked(folder: Path = folder, before: Any = before) -> None:
                with operations(before):
                    life(folder)

            tally.attacks += 1
            outcome = child(attacked, said)
            count(tally, outcome, ["refused", "done"], said, f"full at {n}, for good: {for_good}")
            if folder.exists():
                _goes_on(folder, whole, tally, said, f"after a full disk at {n}")
    return tally


def _damaged(content: bytes, kind: int, choose: random.Random) -> bytes:
    """Other bytes, in one of several ways."""
    size = max(1, len(content))
    at = choose.randrange(size)
    if kind == 0:
        return b""
    if kind == 1:
        return content[:at]
    if kind == 2:
        return choose.randbytes(size)
    if kind == 3:
        return content + choose.randbytes(choose.randrange(1, 100))
    if kind == 4:
        return content[:at] + b"\x00" * (size - at)
    changed = bytearray(content or b"x")
    for _ in range(choose.choice((1, 1, 1, 8, 64))):
        changed[choose.randrange(len(changed))] ^= choose.randrange(1, 256)
    return bytes(changed)


def random_bytes(place: Path, whole: pa.Table, every: int) -> Tally:
    """Every file of finished scores, and of those that are getting columns, with other bytes.

    A manifest has no checksum: a change that leaves it well formed may be in a text that nobody can
    check. So it is asked for an error or the same rows, not for the same words.
    """
    tally, choose, said = Tally(), random.Random(1), place / "said"
    life(place / "finished")
    shutil.copytree(place / "finished", place / "adding")
    _stop_in_between(place / "adding")
    turn = 0
    for state in ("finished", "adding"):
        for path in sorted(p for p in (place / state).rglob("*") if p.is_file()):
            for kind in range(ROUNDS):
                turn += 1
                if turn % every:
                    continue
                folder = place / "attacked"
                shutil.copytree(place / state, folder)
                own = folder / path.relative_to(place / state)
                own.write_bytes(_damaged(own.read_bytes(), kind, choose))
                tally.attacks += 1
                what = f"{own.relative_to(folder)} damaged by kind {kind}"
                seen = child(lambda folder=folder: look(folder, whole), said)
                count(tally, seen, ["done", "refused"], said, f"{what}, read")
                refused = tally.refused
                outcome = child(lambda folder=folder: life(folder), said)
                count(tally, outcome, ["done", "refused"], said, f"{what}, gone on with")
                if outcome == "refused":
                    again = child(lambda folder=folder: life(folder, rescore="damaged"), said)
                    count(tally, again, ["done", "refused"], said, f"{what}, scored again")
                    outcome = again
                tally.refused = refused + (outcome == "refused")  # once for each attack
                if outcome == "done":
                    judge(folder, whole, tally, what)
                shutil.rmtree(folder)
    return tally


def _stop_in_between(folder: Path) -> None:
    """Scores that were killed when half of their parts had the new columns."""
    shutil.rmtree(folder)
    done = 0

    def before(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        names = [str(a) for a in arguments]
        done += name == "replace" and f"{folder}/parts/" in names[-1]
        if done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    def attacked() -> None:
        with operations(before):
            life(folder)

    assert child(attacked, folder.with_name("said")) == "killed"
    assert list(folder.glob("adding-*"))


def hostile_text(place: Path, whole: pa.Table, every: int) -> Tally:
    """Texts that drive terminals, pages, tables and paths, in every field that takes one."""
    tally, said = Tally(), place / "said"
    fields: dict[str, Callable[[str], dict[str, Any]]] = {
        "error": lambda s: {"data": Listed(data(COUNT), {29: ValueError(s)})},
        "key": lambda s: {"key": lambda i: f"{s}{i}"},
        "show": lambda s: {"show": lambda i: s},
        "label": lambda s: {"show": lambda i: {"label": s, "text": s}},
        "class": lambda s: {"model": _renamed(s)},
    }
    options: dict[str, Callable[[str, pergrad.Job], dict[str, Any]]] = {
        "group": lambda s, scored: {"groups": {s: ["0.weight"]}},
        "reference": lambda s, scored: {"against": {s: pergrad.MeanGradient(data(3))}},
        "checkpoint": lambda s, scored: {"checkpoints": {s: scored.model.state_dict()}},
        "command": lambda s, scored: {"command": s, "source": s},
    }
    turn = 0
    for text in HOSTILE:
        for field in [*fields, *options, "folder", "title"]:
            turn += 1
            if turn % every:
                continue
            folder = place / "scored"
            if field == "folder":
                safe = text.replace("/", "").replace("\x00", "").encode("utf-8", "replace")
                folder = place / f"s{safe.decode()[:60]}"

            def attacked(field: str = field, text: str = text, folder: Path = folder) -> None:
                scored = task(**fields[field](text)) if field in fields else task()
                more = options[field](text, scored) if field in options else {}
                first = scan(scored, folder, batch_size=8, **more)
                assert len(first) == COUNT
                assert scan(scored, folder, **more).table().equals(first.table())
                assert not differing(first.table(["index", "loss"]), whole)
                page = first.report(
                    folder / "report.html", title=text if field == "title" else None
                )
                _fit_for_a_page(page.read_text("utf-8"), text)
                shown = [repr(first), str(first.top(3)), str(first.failures())]
                for words in (["top", str(folder)], ["top", "--failed", str(folder)]):
                    with redirect_stdout(io.StringIO()) as out:
                        app.run(words)
                    shown.append(out.getvalue())
                for line in "\n".join(shown).split("\n"):
                    assert line.isprintable(), line

            tally.attacks += 1
            outcome = child(attacked, said)
            count(tally, outcome, ["done", "refused"], said, f"{text[:20]!r} as {field}")
            shutil.rmtree(folder, ignore_errors=True)
    return tally


def _renamed(name: str) -> torch.nn.Module:
    model = job().model
    kind = type("Model", (type(model),), {})
    kind.__qualname__ = name.replace("\x00", "") or "x"
    model.__class__ = kind
    return model


def _fit_for_a_page(page: str, text: str) -> None:
    """A text is text on the page, not a part of it."""
    assert "<script>alert(1)" not in page
    assert "\x1b" not in page
    assert "\x00" not in page


ATTACKS: dict[str, tuple[str, Callable[[Path, pa.Table, int], Tally]]] = {
    "kills at file operations": (
        "before each operation on a file, what is being written cut in half",
        kills_at_file_operations,
    ),
    "kills at random moments": (
        "at the n-th call of any function; one in four is killed again as it goes on",
        kills_at_random_moments,
    ),
    "full disks": ("from each operation on, or at it alone", full_disks),
    "random bytes": (
        "every file of finished scores, and of some that are getting columns: emptied, cut, "
        "replaced, lengthened, bits flipped",
        random_bytes,
    ),
    "hostile text": (
        "in errors, keys, previews, labels, names of groups, references, checkpoints, classes, "
        "folders, titles, commands",
        hostile_text,
    ),
}


def main(arguments: list[str]) -> int:
    """All attacks; whether all is well."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one attack in N")
    parser.add_argument("--only", choices=list(ATTACKS), action="append")
    parser.add_argument("--save", action="store_true", help="write result and table")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    writer.ROWS_PER_PART = 16
    found, start = {}, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        life(base / "whole")
        # what is imported on demand is there before the forks
        pergrad.open_scores(base / "whole").report(base / "page.html")
        whole = pergrad.open_scores(base / "whole").table()
        for name, (_, attack) in ATTACKS.items():
            if asked.only and name not in asked.only:
                continue
            place = base / name.replace(" ", "-")
            place.mkdir()
            tally = found[name] = attack(place, whole, asked.every)
            sys.stdout.write(f"{name}: {json.dumps(asdict(tally))}\n")
            sys.stdout.flush()
            shutil.rmtree(place)
    if asked.save:
        tallies = {name: asdict(tally) for name, tally in found.items()}
        save(tallies, asked.every, time.monotonic() - start)
    return 0 if all(tally.good for tally in found.values()) else 1


def save(found: dict[str, dict[str, int]], every: int, seconds: float) -> None:
    """The result, and the table of the page."""
    about = {
        "pergrad": pergrad.__version__, "torch": torch.__version__, "pyarrow": pa.__version__,
        "python": platform.python_version(), "system": platform.system(),
        "seconds": round(seconds),
        "every": every,
    }  # fmt: skip
    RESULT.write_text(json.dumps({"about": about, "attacks": found}, indent=1) + "\n")
    page = PAGE.read_text()
    PAGE.write_text(re.sub(r"(?s)(?<=<!-- attacks -->\n).*?(?=<!-- end -->)", table(found), page))


def table(found: dict[str, dict[str, int]]) -> str:
    """The table of the page."""
    lines = [
        "| attack | | attacks | refused by name | lost | doubled | wrong | raw errors | hung |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, tally in found.items():
        numbers = " | ".join(f"{value:,}" for value in tally.values())
        lines.append(f"| {name} | {ATTACKS[name][0]} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
