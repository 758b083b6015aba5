"""The commands of attribution: `curvature`, `influence`, `sketch`, `evaluate`; `top` of influences.

Owns: what each is given, and what is printed.
Does not know: how anything is computed; each command is one call of the library.
"""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import pergrad
from pergrad.command import left, printing
from pergrad.command.attribution_options import (
    Address,
    AsMode,
    BatchSize,
    Engine,
    Groups,
    Kind,
    Method,
    Mixing,
    Mode,
    OnEngine,
    OnMixing,
    Out,
    Queries,
    Quiet,
    Seed,
    Workers,
)
from pergrad.command.common import AsJson, JobName, resumable
from pergrad.errors import UsageError
from pergrad.scans.rows import as_table

if TYPE_CHECKING:
    from pergrad.scans.job import Job


def curvature(
    job: JobName,
    out: Out,
    kind: Annotated[Kind, typer.Option(help="How much of it is kept.")] = Kind.ekfac,
    labels: Annotated[
        str | None,
        typer.Option(
            metavar="all|given|N",
            help="Labels that the model draws: all of them exactly, or N samples; or those of the "
            "data. By default all, of up to 64 classes, else 8; given, for a Job without outputs.",
            show_default=False,
        ),
    ] = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    mode: AsMode = Mode.eval,
    on_mixing: OnMixing = Mixing.refuse,
    engine: OnEngine = Engine.local,
    workers: Workers = None,
    address: Address = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Estimate the curvature of a job's loss, for `pergrad influence --curvature`.

    \b
    K-FAC, EK-FAC, corrected Shampoo or the diagonal. The same command goes on after an
    interruption. It refuses, saying what differs, when the model, data or settings changed.

    \b
    Examples:
        pergrad curvature train.py:job --out fit
        pergrad curvature train.py:job --out fit --kind kfac --labels 8
        pergrad curvature train.py:job --out fit --engine ray --workers 4
    """
    on = _on(engine, workers, address)
    with resumable(lambda: left.curved(out)):
        from pergrad.command import jobs

        chosen = jobs.job(job)
        with left.bar(out, quiet):
            fit = pergrad.curvature(
                chosen, out, kind=kind.value, labels=_labels(labels), batch_size=batch_size,
                seed=seed, mode=_mode(mode), **_options(on_mixing), **on,
            )  # fmt: skip
    if _others(on):
        return
    if not as_json:
        typer.echo(f"{fit!r}\n\nTo use it:")
        typer.echo(
            f"  pergrad influence {shlex.quote(job)} --curvature {shlex.quote(str(out))} ..."
        )
        return
    blocks = [
        {
            "parameters": list(each.block.names),
            "how": each.block.how,
            "shape": list(each.Lambda.shape),
            "mean": each.mean,
        }
        for each in fit.curved
    ]
    settings = fit.about["settings"]
    found = {"folder": str(out), "kind": settings["kind"], "labels": settings["labels"],
             "examples": fit.examples, "blocks": blocks}  # fmt: skip
    typer.echo(printing.as_json(found))


def influence(
    job: JobName,
    queries: Queries,
    out: Out,
    curvature: Annotated[
        Path | None,
        typer.Option(
            "--curvature", metavar="DIR", help="A folder of `pergrad curvature` for this job.",
            show_default=False,
        ),
    ] = None,
    refine: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N",
            help="Steps of conjugate gradients. [default: 5 with a curvature]", show_default=False,
        ),
    ] = None,
    terms: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --refine 0: the curvature's inverse as N "
                     "Kronecker products, an approximation.", show_default=False),
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(help="kernel: exact, without a curvature, by a solve of N x N.",
                     show_default=False),
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(metavar="X", help="A share of each block's mean curvature.",
                     show_default=False),
    ] = None,
    cosine: Annotated[bool, typer.Option("--cosine", help="Cosines of gradients.")] = False,
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Weights of a step of the training run. May be repeated: "
                     "scores are summed.", show_default=False),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(metavar="X", help="What a checkpoint's scores are multiplied with. Once for "
                     "each checkpoint.", show_default=False),
    ] = None,
    adam: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="LESS: the optimizer's state of a checkpoint. Once for "
                     "each.", show_default=False),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Keep the N highest and lowest scores of each query. "
                     "By default every pair.", show_default=False),
    ] = None,
    groups: Annotated[
        Groups | None,
        typer.Option(help="Also in parts, by layer, for `pergrad report --by layer`; a finished "
                     "folder gets them, too.", show_default=False),
    ] = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    mode: AsMode = Mode.eval,
    on_mixing: OnMixing = Mixing.refuse,
    engine: OnEngine = Engine.local,
    workers: Workers = None,
    address: Address = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Score every training example for every query: how much does it help, or harm?

    \b
    For queries given as a data set, a positive score means that the example helps: it lowers
    the query's loss. For a Job it means that the measurement rises. Without a curvature scores
    are inner products of gradients. The same command goes on after an interruption.

    \b
    Examples:
        pergrad influence train.py:job --queries train.py:test --out found --curvature fit
        pergrad influence train.py:job --queries train.py:test --out found --method kernel
        pergrad influence train.py:job --queries train.py:test --out found --top 100 \\
            --checkpoint 1.pt --checkpoint 2.pt --rate 0.1 --rate 0.05
        pergrad influence train.py:job --queries train.py:test --out found --groups layer
        pergrad top found --query 0
    """
    on = _on(engine, workers, address)
    with resumable(lambda: left.influenced(out)):
        from pergrad.command import jobs

        chosen = jobs.job(job)
        asked = _queries(queries, chosen, mode)
        with left.bar(out, quiet):
            fit = None if curvature is None else left.opened(curvature, chosen, on)
            found = pergrad.influence(
                chosen, asked, out, curvature=fit, refine=refine, terms=terms,
                checkpoints=[str(each) for each in checkpoint] if checkpoint else None,
                rates=rate or None, cosine=cosine,
                adam=[left.state_of(each) for each in adam] if adam else None,
                method=None if method is None else "kernel", top=top, damping=damping,
                groups=None if groups is None else "layer",
                batch_size=batch_size, seed=seed, mode=_mode(mode), **_options(on_mixing), **on,
            )  # fmt: skip
    if _others(on):
        return
    if not as_json:
        name = shlex.quote(str(out))
        by = "" if groups is None else " --by layer"
        words = f"pergrad top {name} --query 0\n  pergrad report {name}{by}"
        typer.echo(f"{found!r}\n\nTo look at them:\n  {words}")
        return
    residuals = found.residuals
    typer.echo(printing.as_json({
        "folder": str(out), "queries": found.shape[0], "examples": found.shape[1],
        "sign": found.sign, "unit": found.unit,
        **{n: found.manifest["settings"][n] for n in ("method", "refine", "damping", "top")},
        "residuals": None if residuals is None else residuals.tolist(),
    }))  # fmt: skip


def sketch(
    job: JobName,
    out: Out,
    curvature: Annotated[
        Path | None,
        typer.Option(
            "--curvature", metavar="DIR", help="A folder of `pergrad curvature` for this job.",
            show_default=False,
        ),
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(metavar="X", help="A share of each block's mean curvature. [default: 0.1]",
                     show_default=False),
    ] = None,
    size: Annotated[int, typer.Option(min=1, metavar="N", help="Numbers kept of each.")] = 1024,
    queries: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION", show_default=False,
            help="Then ask about these: the strongest examples, ranked by exact scores.",
        ),
    ] = None,
    candidates: Annotated[
        int, typer.Option(min=1, metavar="N", help="That the sketch names at each end.")
    ] = 1000,
    count: Annotated[
        int, typer.Option("--count", "-n", min=1, metavar="N", help="Examples for each query.")
    ] = 20,
    smallest: Annotated[bool, typer.Option("--smallest", help="The lowest scores.")] = False,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    mode: AsMode = Mode.eval,
    on_mixing: OnMixing = Mixing.refuse,
    engine: OnEngine = Engine.local,
    workers: Workers = None,
    address: Address = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Keep a few numbers of each example's gradient, so that a query takes no pass over the data.

    \b
    The same command goes on after an interruption, and opens a finished sketch. With --queries
    it answers from the sketch, and gives the candidates that it names their exact scores.

    \b
    Examples:
        pergrad sketch train.py:job --out index --curvature fit
        pergrad sketch train.py:job --out index --curvature fit --queries train.py:test -n 5
    """
    on = _on(engine, workers, address)
    with resumable(lambda: left.sketched(out)):
        from pergrad.command import jobs

        chosen = jobs.job(job)
        with left.bar(out, quiet):
            fit = None if curvature is None else left.opened(curvature, chosen, on)
            if fit is not None and damping is not None:
                fit = fit.damped(damping)
            index = pergrad.sketch(
                chosen, out, curvature=fit, size=size, batch_size=batch_size, seed=seed,
                mode=_mode(mode), **_options(on_mixing), **on,
            )  # fmt: skip
            if queries is not None:
                asked = _queries(queries, chosen, mode)
                answer = index.query(asked, candidates, rerank=chosen, batch_size=batch_size)
    found: dict[str, Any] = {"folder": str(out), "examples": len(index), "size": index.size}
    if queries is not None:
        end = answer.bottom if smallest else answer.top
        n = min(count, candidates, len(index))
        each = [end(q, n).to_pylist() for q in range(len(answer.estimates))]
        found |= {"queries": each, "recall": answer.recall(n).tolist()}
    if _others(on):
        return
    if as_json:
        typer.echo(printing.as_json(found))
        return
    typer.echo(repr(index))
    for q, rows in enumerate(found.get("queries", ())):
        told = f"query {q}, expected recall {found['recall'][q]:.3f}"
        typer.echo(f"\n{told}\n{as_table(rows, None, ['rank'])}")


def evaluate(
    job: JobName,
    queries: Queries,
    train: Annotated[
        str,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="The function, called with a list of example numbers and a seed, returns a model "
            "trained on those examples alone.",
        ),
    ],
    found: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]DIR",
            help="A folder of `pergrad influence` with every pair. May be repeated, to compare.",
        ),
    ],
    out: Out,
    subsets: Annotated[int, typer.Option(metavar="N", help="How many, at least 20.")] = 50,
    share: Annotated[float, typer.Option(help="How much of the data is in each.")] = 0.5,
    seeds: Annotated[int, typer.Option(metavar="N", help="Models for each subset.")] = 2,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            show_default=False,
            help="For texts: the function, called with an item of the data, returns its text. BM25 "
            "is then a baseline, too; needs 'pergrad[texts]'.",
        ),
    ] = None,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    engine: OnEngine = Engine.local,
    workers: Workers = None,
    address: Address = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Retrain on random subsets: do influences foretell what comes?

    \b
    Prints the linear datamodelling score of each folder, with a 95 % interval, its ceiling, and
    cheap baselines beside it. The same command goes on after an interruption; other influences
    cost no retraining.

    \b
    Examples:
        pergrad evaluate train.py:job --queries train.py:test --train train.py:train \\
            --found found --out retrained
        pergrad evaluate train.py:job --queries train.py:test --train train.py:train \\
            --found ekfac=found --found dots=others --out retrained --json
        pergrad evaluate train.py:job --queries train.py:test --train train.py:train \\
            --found found --out retrained --engine ray --workers 4
    """
    on = _on(engine, workers, address)
    with resumable(lambda: left.retrained(out, subsets * seeds)):
        from pergrad.command import jobs

        named = _folders(found)
        chosen = jobs.job(job)
        asked = _queries(queries, chosen, Mode.eval)
        train_on = jobs.function(train)
        influences = {name: pergrad.Influence(path) for name, path in named.items()}
        with left.bar(out, quiet):
            result = pergrad.evaluate(
                train_on, chosen, asked, influences, out=out, subsets=subsets, share=share,
                seeds=seeds, seed=seed, batch_size=batch_size,
                text=None if text is None else jobs.function(text), **on,
            )  # fmt: skip
    if _others(on):
        return
    if not as_json:
        typer.echo(repr(result))
        return
    scores = {
        name: {"lds": each.lds, "low": each.low, "high": each.high}
        for name, each in result.scores.items()
    }
    typer.echo(printing.as_json({
        "folder": str(out), "subsets": subsets, "share": share, "seeds": seeds,
        "queries": result.outputs.shape[1], "ceiling": result.ceiling, "best": result.best,
        "scores": scores,
    }))  # fmt: skip


def top(
    folder: Path, query: int, count: int, smallest: bool, given: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The examples that help a query most, or harm it; refuses options that scores alone have."""
    for name, value in given.items():
        if value:
            raise UsageError(
                f"{folder} has influences, and --{name} is for scores. Leave out --{name}."
            )
    found = pergrad.Influence(folder)
    kept = found.manifest["settings"]["top"]
    count = count if kept is None else min(count, kept)
    table = found.bottom(query, count) if smallest else found.top(query, count)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


# --- what was said, and what one command leaves for the next --------------------------------------


def _labels(text: str | None) -> Any:
    if text is None or text in ("all", "given"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(
            f"{text} is neither all, given nor a whole number above 0.", param_hint="--labels"
        )
    return int(text)


def _mode(mode: Mode) -> Any:
    return "as is" if mode is Mode.as_is else "eval"


def _on(engine: Engine, workers: int | None, address: str | None) -> dict[str, Any]:
    return {"engine": engine.value, "workers": workers, "address": address}


def _others(on: Mapping[str, Any]) -> bool:
    """Whether another rank says it for all."""
    return on["engine"] == "torchrun" and os.environ.get("RANK", "0") != "0"


def _options(mixing: Mixing) -> dict[str, Any]:
    """None where nothing is said, as in Python: folders made by both are the same."""
    return {"on_mixing": "exact"} if mixing is Mixing.exact else {}


def _queries(name: str, job: "Job", mode: Mode) -> Any:
    from pergrad.command import jobs
    from pergrad.scans.model_state import prepared

    with prepared(job.model, _mode(mode)):
        found = jobs.call(name, job)
    if found is None:
        raise UsageError(f"{name} returned None. Does its last line lack a `return`?")
    return found


def _folders(texts: list[str]) -> dict[str, Path]:
    """Folders by name; by default that of the folder."""
    named: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if Path(text).exists() or not equals:
            name, path = Path(text).name, text
        if name in named:
            raise UsageError(
                f"Two folders of --found have the name {name}. Say --found NAME=DIR, with a name "
                "for each."
            )
        named[name] = Path(path)
    return named
