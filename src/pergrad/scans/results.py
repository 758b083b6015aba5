"""Scores as a user reads them.

Owns: `Scores` and `open_scores`.
Does not know: how scores come about.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pergrad.errors import MissingExtraError, StoreError, UsageError
from pergrad.extras import need
from pergrad.scans import report
from pergrad.scans.rows import Rows
from pergrad.scans.text import printable

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    from pergrad.scans.store import Store


class Scores:
    """The scores of a data set: one row per example, in a folder of Parquet files.

    Made by `pergrad.scan` and `pergrad.open_scores`. Nothing is kept in memory: every call reads
    the folder, and compares each file with its checksum.
    """

    def __init__(self, store: "Store") -> None:
        self._store = store

    @property
    def folder(self) -> Path:
        """Where the scores are."""
        return self._store.folder

    @property
    def manifest(self) -> dict[str, Any]:
        """What was scored, how, and what the columns mean: the contents of manifest.json."""
        manifest = self._store.manifest
        assert manifest is not None
        return manifest

    def __len__(self) -> int:
        """How many examples have a row; `manifest["scored"]["examples"]` is how many there are."""
        return sum(part.rows for part in self._store.parts())

    @property
    def complete(self) -> bool:
        """Whether every example has a row (with scores, or with the error that prevented them)."""
        return len(self) == self.manifest["scored"]["examples"]

    def table(self, columns: Sequence[str] | None = None) -> "pa.Table":
        """The scores, a pyarrow.Table sorted by index.

        Args:
            columns: some of the columns; by default all of them.

        Raises:
            StoreError: a file is not what was written, or a column does not exist.
        """
        return self._store.read(columns)

    def __getitem__(self, column: str) -> "np.ndarray":
        """One column as a numpy array, in the order of the index; NaN where there is no number.

        Raises:
            UsageError: that is no name of a column.
            StoreError: there is no such column, or a file is not what was written.
        """
        if not isinstance(column, str):
            raise UsageError(
                f'Scores are indexed by a column\'s name, such as scores["norm"], not by '
                f"{column!r}. For single examples: scores.table().slice(i, 1)."
            )
        return self.table([column])[column].to_numpy()

    def to_pandas(self, columns: Sequence[str] | None = None) -> "pd.DataFrame":
        """The scores as a pandas DataFrame, sorted by index.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        _installed("pandas")
        return self.table(columns).to_pandas()

    def to_polars(self, columns: Sequence[str] | None = None) -> "pl.DataFrame":
        """The scores as a polars DataFrame, sorted by index.

        Raises:
            MissingExtraError: polars is not installed.
        """
        _installed("polars")
        import polars as pl

        frame = pl.from_arrow(self.table(columns))
        assert isinstance(frame, pl.DataFrame)
        return frame

    def top(
        self,
        n: int = 20,
        by: str = "norm",
        *,
        smallest: bool = False,
        columns: Sequence[str] | None = None,
    ) -> Rows:
        """The rows of the n examples with the largest numbers in one column, largest first.

        Examples without a number there (failed, or NaN) are left out.

        Args:
            n: how many.
            by: the column.
            smallest: the smallest first.
            columns: which columns the rows have beside `index` and `by`; by default all.

        Returns:
            Rows: prints as a table, and is a `pyarrow.Table` otherwise.

        Raises:
            StoreError, UsageError: there is no such column, or it has no numbers.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = None
        if columns is not None and by in self.manifest["columns"]:
            wanted = list(dict.fromkeys(["index", *columns, by]))
        table = self.table(wanted)
        if by not in table.schema.names or not pa.types.is_floating(table.schema.field(by).type):
            numbers = [f.name for f in table.schema if pa.types.is_floating(f.type)]
            raise UsageError(
                f"Cannot rank by {by!r}. The columns to rank by: {', '.join(numbers)}."
            )
        if n < 1:
            raise UsageError(f"n is {n}; ask for at least one example.")
        order = "ascending" if smallest else "descending"
        ranked = table.filter(pc.or_(pc.is_finite(table[by]), pc.is_inf(table[by])))
        return Rows(ranked.sort_by([(by, order), ("index", "ascending")]).slice(0, n), [by])

    def failures(self) -> Rows:
        """The examples that could not be scored: index, key if there are keys, and error."""
        import pyarrow.compute as pc

        names = [n for n in ("index", "key", "error") if n in self.manifest["columns"]]
        table = self.table(names)
        return Rows(table.filter(pc.is_valid(table["error"])), ["error"])

    def damaged(self) -> list[str]:
        """The names of files that are not what was written. Empty if all is well."""
        parts = [part.path for part in self._store.damaged()]
        return [path.name for path in [*parts, *self._store.damaged_files()]]

    def report(
        self, path: str | PathLike[str] = "report.html", *, title: str | None = None
    ) -> Path:
        """Write the scores as one HTML page that needs no network; see docs/report.md.

        Args:
            path: the page's file; one that is there is replaced.
            title: the page's title; by default it names the model's class.

        Returns:
            The page's path.

        Raises:
            UsageError: the file cannot be written.
            StoreError: a file of the scores is damaged.
            MissingExtraError: a package is missing; `pip install 'pergrad[report]'` brings it.

        Cost: some seconds for a million examples; the table is read into memory.
        """
        need("report", "numpy", "pyarrow", "bokeh", "jinja2", "PIL")
        from pergrad.scans.previews import recall

        return report.write(self.table(), self.manifest, recall(self._store), path, title=title)

    def __repr__(self) -> str:
        settings, about = self.manifest["settings"], self.manifest["scored"]
        total = about["examples"]
        counts = self.manifest.get("counts") or {}
        lines = [
            f"Scores of {len(self):,} of {total:,} examples in {self.folder}"
            if not self.complete
            else f"Scores of {total:,} examples in {self.folder}",
            f"  {about['model']}, {settings['mode']} mode; columns: "
            + ", ".join(self.manifest["columns"]),
        ]
        if counts.get("failed"):
            lines.append(f"  {counts['failed']:,} could not be scored: see .failures()")
        if counts.get("not finite"):
            lines.append(f"  {counts['not finite']:,} have a loss or norm that is not finite")
        return "\n".join(printable(line) for line in lines)


def _installed(package: str) -> None:
    if find_spec(package) is None:
        raise MissingExtraError(
            f"This needs {package}, which pergrad does not install. Say: pip install {package}"
        )


def folder_of(path: object) -> Path:
    """A path of a folder.

    Raises:
        UsageError: it is none.
    """
    if not isinstance(path, (str, PathLike)):
        raise UsageError(
            f"The folder of the scores is a {type(path).__name__}. Pass its path, a text or a "
            'pathlib.Path, such as "scores"; scores are made by pergrad.scan(job, folder).'
        )
    return Path(path)


def open_scores(folder: str | PathLike[str]) -> Scores:
    """Open a folder of scores that `pergrad.scan` wrote; needs neither the model nor the data.

    A scan may be writing to it meanwhile: what it has finished is there.

    Args:
        folder: the folder.

    Returns:
        Scores.

    Raises:
        StoreError: there are no scores, or they are in a format that this version does not read.
        MissingExtraError: pyarrow is not installed.

        >>> import tempfile, torch, pergrad
        >>> job = pergrad.Job(torch.nn.Linear(2, 1), [torch.ones(2)], lambda m, x: m(x).squeeze(1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pergrad.scan(job, folder, progress=False)
        ...     len(pergrad.open_scores(folder))
        1
    """
    need("scan", "numpy", "pyarrow", "filelock")
    from pergrad.scans.store import Store

    store = Store(folder_of(folder))
    if store.manifest is None:
        raise StoreError(
            f"There are no scores in {printable(folder)}: it has no manifest.json. Check the path, "
            "or make them with pergrad.scan(job, folder)."
        )
    return Scores(store)
