"""Scores as a user reads them.

Owns: `Scores` and `open_scores`.
Does not know: how scores come about.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pergrad.errors import StoreError, UsageError
from pergrad.extras import need

if TYPE_CHECKING:
    import pyarrow as pa

    from pergrad.scores.store import Store


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

    def top(self, n: int = 20, by: str = "norm", *, smallest: bool = False) -> "pa.Table":
        """The rows of the n examples with the largest numbers in one column, largest first.

        Examples without a number there (failed, or NaN) are left out.

        Raises:
            StoreError, UsageError: there is no such column, or it has no numbers.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self.table()
        if by not in table.schema.names or not pa.types.is_floating(table.schema.field(by).type):
            numbers = [f.name for f in table.schema if pa.types.is_floating(f.type)]
            raise UsageError(
                f"Cannot rank by {by!r}. The columns to rank by: {', '.join(numbers)}."
            )
        if n < 1:
            raise UsageError(f"n is {n}; ask for at least one example.")
        order = "ascending" if smallest else "descending"
        ranked = table.filter(pc.or_(pc.is_finite(table[by]), pc.is_inf(table[by])))
        return ranked.sort_by([(by, order), ("index", "ascending")]).slice(0, n)

    def failures(self) -> "pa.Table":
        """The examples that could not be scored: index, key if there are keys, and error."""
        from pergrad.scores.store import failed_rows

        names = [n for n in ("index", "key", "error") if n in self.manifest["columns"]]
        return failed_rows(self.table(names))

    def damaged(self) -> list[str]:
        """The names of files that are not what was written. Empty if all is well."""
        return [part.path.name for part in self._store.damaged()]

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
        from pergrad import report

        return report.write(self, path, title=title)

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
        return "\n".join(lines)


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
    from pergrad.scores.store import Store

    store = Store(Path(folder))
    if store.manifest is None:
        raise StoreError(
            f"There are no scores in {folder}: it has no manifest.json. Check the path, or make "
            "them with pergrad.scan(job, folder)."
        )
    return Scores(store)
