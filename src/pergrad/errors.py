"""Errors and warnings: what happened, where in the user's model, why, and what to do.

Owns: the kinds of errors, and the section of docs/errors.md that says more about each.
Does not know: who raises them.
"""

import re
import sys
from pathlib import Path

# Sections of docs/errors.md: which file of pergrad raises the error, and words of its message.
# The first line that fits both counts.
_SECTIONS = [
    ("defect-of-pergrad", "", "is a defect of pergrad"),
    ("missing-package", "", "which pergrad does not install"),
    ("gradients-that-are-not-finite", "attribution|scans", "not finite|gradients are 0"),
    ("two-writers", "", "is writing to|has begun to write"),
    ("format-of-another-release", "", "in format version"),
    ("folder-about-something-else", "training.recorder", ""),
    (
        "folder-about-something-else",
        "attribution|scans",
        "of something else(: |, so)|other weights or buffers|basis of the|get new columns"
        "|resume is False|and it is .* now",
    ),
    (
        "damaged-files",
        "",
        "not what (was|J|pergrad)|not a part|checksum|a file before it|are gone"
        "|manifest.json (that|has no)|(scans?|runs?) were put|has example .* twice|only collects"
        "|gradients from|safetensors file of|^Step",
    ),
    (
        "folder-that-is-not-free",
        "attribution|scans|training",
        "folder of (their|its) own|folder of the scores|There are no scores|There is no watched",
    ),
    ("reading-and-writing-files", "", "Cannot (read|write)|ordinary file"),
    ("unfinished-results", "attribution", "goes on where it stopped"),
    ("jobs-of-the-command-line", "command", ""),
    ("several-processes", "scans.runners", ""),
    ("losses-of-another-model", "engine", "reach none of the parameters"),
    ("private-training", "training.private", ""),
    ("noise-scale", "training.noise_scale", ""),
    ("padding-and-packing", "training.reductions", "`(ids|how)`|shifted"),
    ("loss-of-a-trainer", "training.(trunk|summands)", ""),
    ("trainers", "training.trainers", ""),
    ("no-graph", "inputs", "has no graph"),
    (
        "not-one-loss-per-example",
        "",
        "`(losses|values)` is a |`losses` (has|is on|returned)|one number, .*for each of|^rerun",
    ),
    (
        "reading",
        "training.reader|engine.reading_pass",
        "pergrad.reading|read or watched|not see what|Something beside|Two backward",
    ),
    ("watching", "training.(watch|run)", ""),
    ("freed-graph", "", "has been freed by an earlier|selective activation"),
    ("changed-in-place", "", "changed in place after|overwritten during"),
    ("transforms", "api", "torch.func"),
    (
        "derivatives-of-results",
        "",
        "cannot be differentiated|second derivative|create_graph=True would|derivative of a back",
    ),
    ("wrong-in-torch", "graph", "torch's own backward of `"),
    ("interacting-examples", "", "mixes examples|batch norm"),
    ("rows-of-unknown-owner", "graph", "nested tensor|check_layout"),
    ("hooks", "engine", "hook"),
    ("hidden-backward-passes", "graph|engine", "backward pass of its own|re-entrant|hides"),
    ("releases-of-torch", "graph", "torch … |torch [0-9]|does not save"),
    ("sharded-models", "graph|api", "fully_shard|FullySharded|DistributedDataParallel"),
    ("compiled-steps", "steps|nodes.capture", ""),
    ("compiled-regions", "graph|engine", "torch.compile"),
    ("parameters", "inputs|api|graph.walk", "`params`|requires grad|arameter `|leaf tensor"),
    ("functions-of-your-own", "graph", "autograd.Function"),
    ("rules-of-ops", "graph.ops|ops", ""),
    ("clipping", "clipping", ""),
    ("weights", "inputs", "`weights`"),
    ("directions", "inputs", "[Tt]he directions?"),
    ("matrices", "matrix|matrices", ""),
    ("preconditioners", "precondition", ""),
    ("calibration", "calibration", ""),
    ("checkpoints", "scans.checkpoints", ""),
    ("references", "scans.reference", ""),
    ("out-of-memory", "attribution|scans", "Memory ran out|bytes of memory where"),
    ("scans-that-stop", "scans", "could (not )?be scored"),
    ("jobs", "scans.(job|mistakes|manifest|model_state|scan)", ""),
    ("columns", "scans", "column|rank by|[Gg]roups? |groups "),
    ("judging-scores", "attribution.evaluate", ""),
    ("curvature-and-influence", "attribution", ""),
]


class PergradError(Exception):
    """Base of every error that pergrad raises on purpose.

    `section` is where docs/errors.md says more, which `pergrad help SECTION` prints.
    """

    _otherwise = "values-of-arguments"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.section = section_of(type(self), _raised_in(), str(self))
        self.add_note(f"More: docs/errors.md#{self.section}, or say: pergrad help {self.section}")


class UsageError(PergradError, ValueError):
    """The input is wrong: losses, parameters, weights, options, or two matrices that differ."""


class MixedExamplesError(PergradError):
    """An op makes examples interact, so an example has no gradient of its own by itself."""

    _otherwise = "interacting-examples"


class UnsupportedError(PergradError):
    """These gradients cannot be had at all."""

    _otherwise = "models-that-are-refused"


class StoreError(PergradError):
    """A folder of scores cannot be read or written, or is about something else."""

    _otherwise = "damaged-files"


class MissingExtraError(PergradError, ImportError):
    """A package is not installed that this part of pergrad needs."""

    _otherwise = "missing-package"


class WorkerError(PergradError):
    """Workers of a distributed scan were lost. What they had finished is stored."""

    _otherwise = "several-processes"


class FallbackWarning(UserWarning):
    """An op has no rule: its per-example gradients are exact, but cost a backward per example."""


class WorkerWarning(RuntimeWarning):
    """A worker of a distributed scan died or does not start; the scan goes on without it."""


def section_of(kind: type[PergradError], module: str, message: str) -> str:
    """The section of docs/errors.md about an error that a module raises."""
    for name, file, words in _SECTIONS:
        # compiled when needed, which an import has no time for
        if re.match(rf"pergrad\.({file})", module) and re.search(words, message, re.DOTALL):
            return name
    return kind._otherwise


def explained() -> dict[str, str]:
    """Section -> its text in docs/errors.md, without the examples that tests run."""
    tests = r"```python\n(?:(?!```).)*?\bsays\((?:(?!```).)*```\n"
    text = re.sub(tests, "", _page("errors.md"), flags=re.DOTALL)
    parts = re.findall(r"^### (.+)\n((?:(?!#).*\n?)*)", text, re.MULTILINE)
    return {
        re.sub(r"\W+", "-", title.lower()): re.sub(r"\n{3,}", "\n\n", f"{title}\n{body}").strip()
        for title, body in parts
    }


def glossary() -> dict[str, str]:
    """Word, in small letters -> what docs/glossary.md says of it."""
    found = re.findall(r"^\*\*(.+)\*\*\n: ((?:.+\n?)+)", _page("glossary.md"), re.MULTILINE)
    return {
        word.lower(): f"{words}\n{said}".strip()
        for words, said in found
        for word in words.split(", ")
    }


def _page(name: str) -> str:
    """A page of the documentation, of the checkout or as the wheel carries it."""
    here = Path(__file__).parent
    folder = next(p for p in (here / "docs", here.parents[1] / "docs") if p.is_dir())
    return (folder / name).read_text(encoding="utf-8")


def _raised_in() -> str:
    """The module of pergrad that makes the error at hand."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        name = str(frame.f_globals.get("__name__"))
        if name.startswith("pergrad.") and name != __name__:
            return name
        frame = frame.f_back
    return ""


def users_line() -> int:
    """For a warning raised by the caller: how far up the first line outside pergrad is."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("pergrad."):
        level, frame = level + 1, frame.f_back
    return level
