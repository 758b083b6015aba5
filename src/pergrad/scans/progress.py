"""What a person sees while a scan runs: a bar, and at the end what there is.

Owns: the progress bar and the closing words, on stderr.
Does not know: what is counted.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pergrad.scans.options import ScanOptions
from pergrad.scans.results import Scores
from pergrad.scans.store import Store
from pergrad.scans.text import printable


def say(store: Store) -> None:
    """On stderr: what there is now."""
    Console(stderr=True).print(
        repr(Scores(store)), highlight=False, soft_wrap=True, markup=False, emoji=False
    )


def say_batch_size(before: int, now: int) -> None:
    """On stderr: that memory has set another batch size."""
    Console(stderr=True).print(
        f"Memory ran out: batches had {before} examples, and have {now} now.", highlight=False
    )


class _Rate(ProgressColumn):
    """Examples per second of this run."""

    def render(self, task: Any) -> Text:
        seconds = task.finished_time or task.elapsed or 0
        done = task.completed - task.fields["before"]
        return Text(f"{done / seconds:,.0f} examples/s" if done and seconds else "", style="cyan")


@contextmanager
def bar(
    folder: Path, options: ScanOptions, total: int, todo: int
) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, with rate and time left."""
    if not options.progress:
        yield lambda count: None
        return
    console = Console(stderr=True)
    shown = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(),
        _Rate(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=console, refresh_per_second=2,
        redirect_stdout=sys.stdout.isatty(),  # what a user prints into a file goes there
    )  # fmt: skip
    how = {"eval": "in eval mode (dropout off)", "train": "in train mode", "as is": "as it is"}
    console.print(
        f"Scoring {todo:,} of {total:,} examples into {printable(folder)}, "
        f"the model {how[options.mode]}.",
        highlight=False,
        soft_wrap=True,
        markup=False,
        emoji=False,
    )
    with shown:
        task = shown.add_task("scan", total=total, completed=total - todo, before=total - todo)
        yield lambda count: shown.advance(task, count)


@contextmanager
def passes() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each pass over the data that is told of, by name, done and total."""
    shown = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn(),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=Console(stderr=True), refresh_per_second=2,
        redirect_stdout=sys.stdout.isatty(),  # what a user prints into a file goes there
    )  # fmt: skip
    tasks: dict[str, Any] = {}

    def told(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = shown.add_task(what, total=total)
            shown.start()  # the first time; before there is nothing to show
        shown.update(tasks[what], completed=done)

    try:
        yield told
    finally:
        if tasks:
            shown.stop()
