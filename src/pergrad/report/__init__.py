"""The report: scores as one HTML page that a person opens and understands.

Owns: `write`, from a folder of scores to a page.
Does not know: models, data sets, or how scores come about.
"""

import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pergrad.errors import UsageError
from pergrad.extras import need

if TYPE_CHECKING:
    import pyarrow as pa

    from pergrad.report.preview import Preview
    from pergrad.scores.results import Scores


def write(scores: "Scores", path: str | PathLike[str], *, title: str | None = None) -> Path:
    """Write scores as one HTML page, self-contained: it opens without a network.

    Args:
        scores: what `pergrad.scan` and `pergrad.open_scores` return.
        path: the page's file; one that is there is replaced.
        title: the page's title; by default it names the model's class.

    Returns:
        The page's path.

    Raises:
        UsageError: the file cannot be written.
        StoreError: a file of the scores is damaged.
        MissingExtraError: a package is missing; `pip install 'pergrad[report]'` brings it.
    """
    need("report", "numpy", "pyarrow", "bokeh", "jinja2", "PIL")
    from pergrad.scores.previews import recall

    previews = recall(scores.folder)
    return write_report(scores.table(), scores.manifest, previews, path, title=title)


def write_report(
    table: "pa.Table",
    manifest: dict[str, Any],
    previews: "dict[int, Preview]",
    path: str | PathLike[str],
    *,
    title: str | None = None,
) -> Path:
    """Write the page from the scores' table (sorted by index), their manifest, and previews.

    Args, returns, raises: as `write`.
    """
    need("report", "numpy", "pyarrow", "bokeh", "jinja2", "PIL")
    from pergrad.report.page import html

    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    text = html(table, manifest, previews, title=title)
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(
            f"Cannot write the report to {target}: {error.strerror or error}. Pass the path of a "
            "file in a folder that exists and can be written to."
        ) from error
    return target
