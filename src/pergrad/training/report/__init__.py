"""The report of a watched run: one HTML page that a person opens and understands.

Owns: `write`, from a run's tables and previews to a page.
Does not know: models, backward passes, the layout of the run's folder.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from pergrad.extras import need

if TYPE_CHECKING:
    from pergrad.training.run import Run


def write(
    run: "Run",
    path: str | PathLike[str],
    *,
    title: str | None = None,
    refresh: int | None = None,
    said: Sequence[str] = (),
) -> Path:
    """Write the page of a run, as far as it has been written.

    Args:
        run: the run.
        path: the page's file; one that is there is replaced.
        title: the page's title; by default it names the model's class.
        refresh: seconds after which an open page loads itself again; None for never.
        said: what the watch has to say of it: what it could not read, and why.

    Returns:
        The page's path. It is self-contained: it opens without a network.

    Raises:
        UsageError: the file cannot be written.
        StoreError: a file of the run is damaged.
        MissingExtraError: a package is missing; `pip install 'pergrad[report]'` brings it.
    """
    need("report", "numpy", "pyarrow", "bokeh", "jinja2", "PIL")
    from pergrad.scans.report import shell
    from pergrad.training.report.page import html

    return shell.save(html(run, title=title, refresh=refresh, said=said), Path(path))
