"""The command line: `pergrad scan, top, report, watch, influence, ...`.

Owns: the commands, their options and help, their exit codes, and what is printed where.
Does not know: how scoring, the store or the report work; each command is one call of the library.

What needs torch is imported by the commands that need it: to look at scores takes no second.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, fields
from enum import StrEnum
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer

import pergrad
from pergrad.command import attributing, calibrating, left, printing, runs
from pergrad.command.attribution_options import Groups
from pergrad.command.common import (
    ERROR,
    FINE,
    INCOMPLETE,
    AsJson,
    JobName,
    again,
    program,
    resumable,
)
from pergrad.errors import UsageError
from pergrad.scans import options
from pergrad.scans.rows import as_table
from pergrad.scans.text import printable
from pergrad.training.run_folder import is_run

HELP = """
Gradient norms and inner products of every example of a data set: score, store, look.

\b
A JOB says what is scored. It names a function that takes no arguments and returns a
pergrad.Job (model, data, losses):
    path/to/file.py:function      loading it RUNS THAT FILE, as `python file.py` would
    package.module:function       imports the module, which runs it too

\b
First steps:
    pergrad demo                                    which training digits drive a prediction
    pergrad explain train.py:job                    can pergrad score this model, and how?
    pergrad scan train.py:job --out scores          score every example; Ctrl-C and resume
    pergrad top scores                              the examples with the largest norms
    pergrad report scores                           one HTML page to look at
    pergrad watch run --open                        a training run's page, rewritten as it goes on
    pergrad influence train.py:job --queries train.py:test --out found
                                                    which training examples drive these predictions?
    pergrad help SECTION                            more about an error, which names its section

\b
Exit codes:
    0    fine
    1    an error; its message says what happened and what to do
    2    the command line is wrong
    3    the scan is finished, but some examples could not be scored (their errors are stored)
    130  interrupted by Ctrl-C; what was scored is kept, and the message says how to resume

Results go to standard output, progress and messages to standard error.
"""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "terminal_width": 100,
    },
)


def _choice(name: str, *values: str) -> Any:
    """The type of an option that has one of several values."""
    return StrEnum(name, {value: value for value in values})


Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="A folder of `pergrad scan --out DIR`, of pergrad.Watch(DIR), or of influences.",
    ),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show the traceback of an error.")
    ] = False,
) -> None:
    if version:
        typer.echo(f"pergrad {pergrad.__version__}")
        raise typer.Exit(FINE)


# How each option of a scan is spelled here: its type, and what typer is told besides its help.
_SPELLED: dict[str, tuple[Any, dict[str, Any]]] = {
    "batch_size": (str, {"metavar": "N|auto"}),
    "against": (list[str], {"metavar": "[NAME=]FILE.py:FUNCTION"}),
    "checkpoints": (list[str], {"metavar": "[NAME=]FILE"}),
    "groups": (_choice("Groups", *get_args(options.Grouping)), {}),
    "mode": (_choice("Mode", *get_args(options.Mode)), {}),
    "device": (str, {}),
    "on_mixing": (_choice("Mixing", *get_args(options.Mixing)), {}),
    "engine": (_choice("Engine", *get_args(options.Engine)), {}),
    "workers": (int, {"metavar": "N", "min": 0}),
    "address": (str, {}),
    "seed": (int, {}),
    "rescore": (_choice("Rescore", *get_args(options.Rescore)), {}),
    "resume": (bool, {"flags": ["--no-resume"]}),
    "recheck": (bool, {"flags": ["--no-recheck"]}),
    "progress": (bool, {"flags": ["--quiet", "-q"]}),
}


def _scan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take the options of a scan; a flag says the contrary of its option."""
    named = []
    for option in fields(options.ScanOptions):
        if option.name not in _SPELLED:
            continue
        kind, more = _SPELLED[option.name]
        flags = more.get("flags", [])
        default = False if flags else option.default
        told = {key: value for key, value in more.items() if key != "flags"}
        spelled = typer.Option(*flags, help=option.metadata["help"], **told)
        named.append(
            Parameter(
                option.name,
                Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind if default is not None else kind | None, spelled],
            )
        )
    own = signature(command)
    first = [p for p in own.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    command.__signature__ = own.replace(  # type: ignore[attr-defined]
        parameters=[*first[:2], *named, *first[2:]]
    )
    return command


def _asked(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was said on the command line, as options of a scan."""
    asked: dict[str, Any] = {}
    for name, value in given.items():
        if "flags" in _SPELLED[name][1]:
            asked[name] = not value
        else:
            asked[name] = value.value if isinstance(value, StrEnum) else value
    asked["batch_size"] = _batch_size(asked["batch_size"])
    return asked


@app.command()
@_scan_options
def scan(
    job: JobName,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", help="Where the scores go. Made if it is new."),
    ],
    *,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Score every example of a job's data, and keep the scores in a folder.

    \b
    For each example: its loss, the norm of its gradient, and on request the norm layer by
    layer and the inner product and cosine with references. The model is put into eval mode
    while it is scored, and back afterwards.

    The same command resumes an interrupted scan: what was scored stays, each example is
    scored once. It refuses, saying what differs, when the model, data or settings changed.

    \b
    Examples:
        pergrad scan train.py:job --out scores
        pergrad scan train.py:job --out scores --groups layer --batch-size 64
        pergrad scan train.py:job --out scores --against valid=train.py:valid
        pergrad scan train.py:job --out scores --checkpoints epoch1.pt --checkpoints epoch2.pt
        pergrad scan mypackage.jobs:job --out scores --engine ray --workers 4
        torchrun --nproc-per-node 4 -m pergrad scan train.py:job --out scores --engine torchrun
        pergrad scan train.py:job --out scores --json | jq .failed

    \b
    A file with a job:
        def job():
            return pergrad.Job(model=..., data=..., losses=lambda model, batch: ...)
        def valid(job):
            return pergrad.MeanGradient(validation_data)
    """
    asked = _asked(given)
    with resumable(lambda: _kept(out)):
        from pergrad.command import jobs

        chosen_job = jobs.job(job)
        asked["checkpoints"] = jobs.checkpoints(asked["checkpoints"] or [])
        asked["against"] = jobs.references(asked["against"] or [], chosen_job, asked)
        scores = pergrad.scan(chosen_job, out, **asked, source=job, command=again())
    if os.environ.get("RANK", "0") != "0" and asked["engine"] == "torchrun":
        return  # the first rank says it for all
    counts = {name.replace(" ", "_"): n for name, n in scores.manifest["counts"].items()}
    if as_json:
        found = {"store": str(out), **counts, "columns": list(scores.manifest["columns"])}
        typer.echo(printing.as_json(found))
    else:
        if not asked["progress"] or not (sys.stdout.isatty() and sys.stderr.isatty()):
            typer.echo(repr(scores))  # otherwise it stands under the progress bar already
        look = ["top", "report", *(["top --failed"] if counts["failed"] else [])]
        lines = [f"  pergrad {word} {shlex.quote(str(out))}" for word in look]
        typer.echo("\n".join(["\nTo look at them:", *lines]))
    if counts["failed"]:
        raise typer.Exit(INCOMPLETE)


@app.command()
def top(
    folder: Folder,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, metavar="N", help="How many examples.")
    ] = 20,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="COLUMN",
            help="What to rank by: norm (the default), loss, or any column. Of a training run: "
            "outlier (how often it stood out, the default), ratio, norm, score, loss.",
            show_default=False,
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME", help="Only these columns, and those to rank by."),
    ] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="The smallest first.")] = False,
    failed: Annotated[
        bool, typer.Option("--failed", help="Instead: the examples that failed, and why.")
    ] = False,
    query: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Of influences: for which query. [default: 0]",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The examples with the largest norms, losses, or whatever else was stored.

    \b
    Of a training run, those that stood out most often. Of influences, those that help a query most,
    or with --smallest those that harm it most.

    \b
    Examples:
        pergrad top scores
        pergrad top run
        pergrad top found --query 3
        pergrad top scores -n 100 --by loss
        pergrad top scores --columns key,loss
        pergrad top scores --by dot:valid --smallest --json | jq '.[].index'
        pergrad top scores --failed
    """
    if is_run(folder):
        given = {"smallest": smallest, "failed": failed, "columns": columns}
        rows = runs.top(folder, count, by or "outlier", given)
        typer.echo(printing.as_json(rows) if as_json else as_table(rows, None, ["key"]))
        return
    if left.is_influence(folder):
        given = {"by": by, "failed": failed, "columns": columns}
        rows = attributing.top(folder, query or 0, count, smallest, given)
        typer.echo(printing.as_json(rows) if as_json else as_table(rows, None, ["rank"]))
        return
    if query is not None:
        raise UsageError(f"{folder} has no influences, which --query is for. Leave out --query.")
    scores = pergrad.open_scores(folder)
    total = scores.manifest["scored"]["examples"]
    if not scores.complete:
        typer.echo(f"Only {len(scores):,} of {total:,} examples are scored so far.", err=True)
    chosen = columns.split(",") if columns else None
    by = by or "norm"
    if failed:
        first, table = ["error"], scores.failures()
    else:
        first = [by]
        table = scores.top(count, by=by, smallest=smallest, columns=chosen)
    rows = table.slice(0, count).to_pylist()
    # what is read by a program is whole
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    typer.echo(printing.as_json(rows) if as_json else as_table(rows, width, ["index", *first]))


@app.command()
def report(
    folder: Folder,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Where to. By default DIR/report.html."),
    ] = None,
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="By default it names the model.")
    ] = None,
    by: Annotated[
        Groups | None,
        typer.Option(
            help="Of influences: an opened example shows its score by layer, which "
            "`pergrad influence --groups layer` keeps.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about scores, influences or a training run; it needs no network.

    \b
    Examples:
        pergrad report scores
        pergrad report run
        pergrad report found --by layer
        pergrad report scores --out scores.html --title "Training data, May"
    """
    left.check_shows(folder)
    path = out or folder / "report.html"
    if left.is_influence(folder):
        page = pergrad.Influence(folder).report(path, title=title, by="layer" if by else None)
    elif by is not None:
        raise UsageError(f"{folder} has no influences, which --by is for. Leave out --by.")
    elif is_run(folder):
        page = runs.noted(pergrad.open_watch(folder)).report(path, title=title)
    else:
        page = pergrad.open_scores(folder).report(path, title=title)
    typer.echo(printing.as_json({"report": str(page)}) if as_json else printable(page))


app.command()(runs.watch)
for _command in ("curvature", "influence", "sketch", "evaluate"):
    app.command()(getattr(attributing, _command))


@app.command()
def explain(
    job: JobName,
    examples: Annotated[
        int,
        typer.Option("--examples", "-n", min=1, metavar="N", help="How many, from the first on."),
    ] = 4,
    as_json: AsJson = False,
) -> None:
    """How each parameter of a job's model is served: by a rule, or at the cost of a loop.

    \b
    Runs one small batch and stores nothing.

    \b
    Examples:
        pergrad explain train.py:job
        pergrad explain mypackage.jobs:job --json
    """
    from pergrad.command import explaining

    coverage = explaining.coverage(job, examples)
    if as_json:
        found = {
            "examples": coverage.examples,
            "exact_share": coverage.exact_share,
            "fallback_share": coverage.fallback_share,
            "rows": [asdict(row) for row in coverage.rows],
        }
        typer.echo(printing.as_json(found))
    else:
        typer.echo(str(coverage))


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="Where scores and report go.")
    ] = Path("demo_output"),
    as_json: AsJson = False,
) -> None:
    """Which training digits drive a prediction? Checked by training again; a minute.

    \b
    Needs `pip install 'pergrad[demo]'` and no network. Says at the end where its code is, to
    copy. It replaces what an earlier demo left in the same folder.
    """
    from pergrad.command import demonstration

    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        found = demonstration.run(out)
    if as_json:
        typer.echo(printing.as_json(found))
    else:
        typer.echo(f"The code of this demo, to copy and change: {demonstration.file()}")


app.command()(calibrating.calibrate)


def _batch_size(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(
            f"{text} is neither auto nor a whole number above 0.", param_hint="--batch-size"
        )
    return int(text)


def _kept(out: Path) -> str:
    scores = pergrad.open_scores(out)
    total = scores.manifest["scored"]["examples"]
    return f"{len(scores):,} of {total:,} examples are scored and kept in {out}."


def run(arguments: list[str]) -> int:
    """Parse and run; the exit code. Errors of pergrad pass through."""
    command = typer.main.get_command(app)
    try:
        command(args=arguments, prog_name=program())
    except SystemExit as stop:
        if isinstance(stop.code, str):  # sys.exit("message") in a job's file
            typer.echo(stop.code, err=True)
            return ERROR
        return int(stop.code or FINE)
    return FINE
