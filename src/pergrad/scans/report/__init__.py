"""The report: scores as one HTML page that a person opens and understands.

Owns: `write`, from a table, a manifest and previews to a page.
Does not know: the store, models, data sets, or how scores come about.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pergrad.extras import need

if TYPE_CHECKING:
    import pyarrow as pa

    from pergrad.scans.report.preview import Preview


def write(
    table: "pa.Table",
    manifest: dict[str, Any],
    previews: "dict[int, Preview]",
    path: str | PathLike[str],
    *,
    title: str | None = None,
) -> Path:
    """Write the page from the scores' table (sorted by index), their manifest, and previews.

    Args:
        table: the columns of the scores, index, loss, norm and error among them.
        manifest: what was scored and how; of what it lacks the page is silent.
        previews: how a person sees an example, by its index.
        path: the page's file; one that is there is replaced.
        title: the page's title; by default it names the model's class.

    Returns:
        The page's path. It is self-contained: it opens without a network.

    Raises:
        UsageError: the file cannot be written.
        MissingExtraError: a package is missing; `pip install 'pergrad[report]'` brings it.
    """
    need("report", "numpy", "pyarrow", "bokeh", "jinja2", "PIL")
    from pergrad.scans.report import shell
    from pergrad.scans.report.page import html

    return shell.save(html(table, manifest, previews, title=title), Path(path))
