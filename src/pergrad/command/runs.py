"""The commands about training runs: the page that is rewritten, and who stood out.

Owns: `watch` and its options, when to look and what counts as news; what `top` refuses for a run.
Does not know: what the page says.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import pergrad
from pergrad.errors import UsageError
from pergrad.scans.text import printable
from pergrad.training.run_folder import is_run
from pergrad.training.run_notes import PLACE, as_sentence


def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder of a run, of pergrad.Watch(DIR).")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where to. By default DIR/report.html."),
    ] = None,
    every: Annotated[
        int, typer.Option("--every", min=2, metavar="SECONDS", help="How often to look.")
    ] = 15,
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="By default it names the model.")
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Rewrite a training run's page while the run goes on; an open page loads itself again.

    \b
    Until Ctrl-C, which leaves the page as it is. A run that has not begun is waited for.

    \b
    Examples:
        pergrad watch run --open
        pergrad watch run --every 60 --out page.html
    """
    written = pages(folder, out or folder / "report.html", every, title)
    try:
        for number, page in enumerate(written):
            if not number:
                typer.echo(printable(page))
                if show:
                    typer.launch(str(page))
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def noted(run: pergrad.Run) -> pergrad.Run:
    """A run; what watches have noted in its folder is said beside what a command prints of it."""
    for note in run.notes():
        typer.echo(printable(as_sentence(note)), err=True)
    return run


def top(folder: Path, count: int, by: str, given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The examples of a run that stood out; refuses the options that only scores have."""
    for name, value in given.items():
        if value:
            raise UsageError(
                f"{folder} is a training run, and --{name} is for scores. Leave out --{name}."
            )
    return noted(pergrad.open_watch(folder)).top(count, by=by).to_pylist()


def pages(
    folder: Path,
    out: Path,
    seconds: int,
    title: str | None,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[Path]:
    """The page's path, each time that it has been written; without an end.

    Raises:
        StoreError: the folder is something else's, or a file of the run is damaged.
        UsageError: the page cannot be written.
        MissingExtraError: a package is missing.
    """
    before: list[str] | None = None
    while True:
        # a folder that is not there yet, or empty: the run's first step has not been written
        if is_run(folder) or (folder.is_dir() and _files(folder)):
            now = _files(folder)
            if now != before:
                run = pergrad.open_watch(folder)
                before = now
                yield run.report(out, title=title, refresh=seconds)
        wait(seconds)


def _files(folder: Path) -> list[str]:
    """What of a run lies in its folder: files are never changed, only added and replaced."""
    kinds = ("examples", "steps", "shown", PLACE)
    there = [folder / kind for kind in kinds if (folder / kind).is_dir()]
    names = [f"{place.name}/{name}" for place in there for name in os.listdir(place)]
    return sorted(names)
