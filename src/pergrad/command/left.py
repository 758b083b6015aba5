"""What the commands of attribution leave for the next, and what is seen meanwhile.

Owns: opening a curvature again, the progress bar, and what is kept after Ctrl-C.
Does not know: the commands' options.
"""

import json
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pergrad
from pergrad import folders
from pergrad.attribution.progress import bars, listening
from pergrad.errors import UsageError

if TYPE_CHECKING:
    from pergrad.attribution.fit import Fit
    from pergrad.scans.job import Job

INFLUENCE = "pergrad influence"


def is_influence(folder: Path) -> bool:
    """Whether a folder says that it is one of influences."""
    return _format(folder) == INFLUENCE


def check_shows(folder: Path) -> None:
    """Whether a folder has a page and a table.

    Raises:
        UsageError: it is pergrad's, and has none.
    """
    for kind, remedy in (
        ("evaluation", "pergrad.evaluate prints its result, and so does the same command again"),
        ("curvature", "pass it to pergrad influence, whose folder has one"),
        ("sketch", "ask it queries: pergrad.open_sketch(folder, job).query(queries)"),
    ):
        if _format(folder) == f"pergrad {kind}":
            raise UsageError(f"{folder} has a {kind}, of which there is no report: {remedy}.")


def _format(folder: Path) -> Any:
    try:
        found = json.loads(folders.read(folder / "manifest.json"))
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("format") if isinstance(found, dict) else None


def opened(folder: Path, job: "Job", on: Mapping[str, Any]) -> "Fit":
    """The curvature in a folder, by the settings that it was begun with, on an engine."""
    from pergrad.attribution.curvature import WHAT
    from pergrad.attribution.folder import Folder

    about = Folder(folder, WHAT).manifest()
    if about is None:
        raise UsageError(
            f"There is no curvature in {folder}. Estimate it first: pergrad curvature JOB --out "
            f"{shlex.quote(str(folder))}"
        )
    own = about["settings"]
    names = ("kind", "labels", "seed", "mode")
    return pergrad.curvature(job, folder, **{n: own[n] for n in names}, **own["options"], **on)


def state_of(path: Path) -> Any:
    """An optimizer's state."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(
            f"--adam {path} cannot be read: {type(error).__name__}. Pass a file that "
            "`torch.save(optimizer.state_dict(), path)` has written."
        ) from error


@contextmanager
def bar(out: Path, quiet: bool) -> Iterator[None]:
    """A progress bar on stderr, a line for each pass."""
    if quiet:
        with listening(lambda what, done, total: None):
            yield
        return
    with bars(True):
        yield


def curved(out: Path) -> str:
    """What is kept of a curvature."""
    from pergrad.attribution.curvature import PASSES, WHAT

    folder, about = _begun(out, WHAT)
    states = folder.files("state")
    if not states:
        return f"Nothing of the pass is stored yet in {out}."
    stage, after, _ = states[-1]
    return f"{after:,} of {about['scored']['examples']:,} examples of the {PASSES[stage]} are kept."


def influenced(out: Path) -> str:
    """What is kept of influences."""
    folder, about = _begun(out, INFLUENCE)
    total, blocks, words = about["scored"]["examples"], len(about["blocks"]), []
    done = [
        stop
        for k in range(blocks)
        for kind in (f"pairs{k}", f"ends{k}")
        for _, stop, _ in folder.files(kind)[-1:]
    ]
    for _, stop, _ in folder.files("gram")[-1:]:
        words.append(f"{stop:,} of {total:,} rows of the kernel")
    for k in range(blocks):
        for step, _, _ in folder.files(f"refining{k}")[-1:]:
            words.append(f"{step} of {about['settings']['refine']} refining steps")
    if done or not words:
        held = f" in {blocks} blocks of queries" if blocks > 1 else ""
        words = [f"{sum(done):,} of {blocks * total:,} scores of examples{held}"]
    return f"{', '.join(words)} are kept in {out}."


def sketched(out: Path) -> str:
    """What is kept of a sketch."""
    from pergrad.attribution.sketch import WHAT

    folder, about = _begun(out, WHAT)
    done = max((stop for _, stop, _ in folder.files("rows")), default=0)
    return f"{done:,} of {about['scored']['examples']:,} examples are sketched and kept in {out}."


def retrained(out: Path, total: int) -> str:
    """What is kept of an evaluation."""
    from pergrad.attribution.evaluate import WHAT

    folder, _ = _begun(out, WHAT)
    return f"{len(folder.files('outputs'))} of {total} retrained models are measured and kept."


def _begun(out: Path, what: str) -> tuple[Any, dict[str, Any]]:
    from pergrad.attribution.folder import Folder

    folder = Folder(out, what)
    about = folder.manifest()
    if about is None:
        raise UsageError("Nothing is stored yet.")
    return folder, about
