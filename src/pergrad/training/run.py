"""A watched run as a user reads it.

Owns: `Run` and `open_watch`: its tables, its outliers, its noise scale over all ranks.
Does not know: how rows come about, how the report looks.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pergrad.arrays import whole
from pergrad.errors import StoreError, UsageError
from pergrad.extras import need
from pergrad.scans.rows import Rows
from pergrad.scans.text import printable
from pergrad.training.noise_of_ranks import add_noise
from pergrad.training.noise_scale import NoiseScale
from pergrad.training.report import write
from pergrad.training.run_notes import notes

if TYPE_CHECKING:
    import pyarrow as pa

    from pergrad.training.run_folder import RunFolder


class Run:
    """A watched run: a row for each example of each watched step, and one for each step.

    Made by `pergrad.open_watch`. Every call reads the folder, so a run that goes on is seen as far
    as it has been written.
    """

    def __init__(self, folder: "RunFolder") -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return self._folder.folder

    @property
    def manifest(self) -> dict[str, Any]:
        """What was trained and how it was watched: the contents of manifest.json."""
        assert self._folder.manifest is not None
        return self._folder.manifest

    def steps(self) -> "pa.Table":
        """One row for each watched step and rank, a pyarrow.Table.

        step, rank, ranks, examples; loss (weighted mean), grad_norm (of `.grad`), sums of weights
        and of squared norms; p1 to p99 and max of the scores; zero (share of gradients that are 0),
        clipped, top_share (of the squared norms, by the largest 1 %), cosine (of an example's
        gradient with the step's, weighted by norms), the noise scale with its band, as that rank
        knew it; spike and note in words; norm:LAYER, the median of the examples' norms there.

        Raises:
            StoreError: a file is damaged, or a step is there twice.
        """
        return self._folder.read("steps")

    def examples(self) -> "pa.Table":
        """One row for each example of each watched step, a pyarrow.Table.

        step, rank, row, key; loss (its own mean loss), tokens, weight (of its gradient in the
        step), norm (of the gradient of its own mean loss), score (the norm made comparable across
        lengths: times sqrt(tokens / R), R the mean at first), ratio (score / running median),
        outlier.

        Raises:
            StoreError: a file is damaged, or a step is there twice.
        """
        return self._folder.read("examples")

    def top(self, n: int = 20, by: str = "outlier") -> Rows:
        """The examples that stood out most often, most often first.

        key, times (as an outlier), seen, ratio (the largest), loss and norm there, and its step.
        Examples without keys are told apart by step and row. Prints as a table, and is a
        `pyarrow.Table` otherwise.

        Args:
            n: how many.
            by: "outlier", or "ratio", "norm", "score", "loss" for the largest of these.

        Raises:
            UsageError: n or `by` makes no sense.
        """
        import pyarrow as pa

        n = whole(n)
        if not isinstance(n, int) or n < 1:
            raise UsageError(f"n is {n!r}; ask for at least one example.")
        ranks = ("ratio", "norm", "score", "loss")
        if by not in ("outlier", *ranks):
            raise UsageError(f'Cannot rank by {by!r}. Rank by "outlier", {", ".join(ranks)}.')
        column = "ratio" if by == "outlier" else by
        best: dict[str, dict[str, Any]] = {}
        rows = self.examples().select(
            ["step", "rank", "row", "key", "loss", "norm", "score", "ratio", "outlier"]
        )
        for row in rows.to_pylist():
            key = row["key"] or f"step {row['step']}, rank {row['rank']}, row {row['row']}"
            entry = best.setdefault(key, {"key": key, "times": 0, "seen": 0, "value": None})
            entry["seen"] += 1
            entry["times"] += bool(row["outlier"])
            value = row[column]
            if value is not None and value == value and value >= (entry["value"] or -float("inf")):
                more = {k: row[k] for k in ("ratio", "loss", "norm", "score", "step")}
                entry.update(value=value, **more)

        def rank(entry: dict[str, Any]) -> tuple[Any, ...]:
            value = -float("inf") if entry["value"] is None else entry["value"]
            return (entry["times"], value) if by == "outlier" else (value, entry["times"])

        order = sorted(best.values(), key=rank, reverse=True)[:n]
        schema = pa.schema(
            [("key", pa.string()), ("times", pa.int64()), ("seen", pa.int64())]
            + [(c, pa.float64()) for c in ("ratio", "loss", "norm", "score")]
            + [("step", pa.int64())]
        )
        table = pa.Table.from_pylist([{k: e.get(k) for k in schema.names} for e in order], schema)
        return Rows(table, ["key", "times", column])

    def spikes(self) -> list[dict[str, Any]]:
        """Steps whose loss or gradient stands out: step, rank, and in words why, and whose."""
        rows = self.steps().select(["step", "rank", "spike"]).to_pylist()
        return [row for row in rows if row["spike"]]

    def notes(self) -> list[dict[str, Any]]:
        """What watches have said that no row of the run tells: time, rank and words, latest first.

        Above all that the folder refused another run: what it has is not that run's.

        Raises:
            StoreError: a note is damaged.
        """
        return notes(self.folder)

    def shown(self) -> dict[str, tuple[str, str | None, bytes]]:
        """Key -> what a person sees of the examples that stand out most: kind, label, its bytes."""
        return self._folder.shown()

    def report(
        self,
        path: str | PathLike[str] = "run.html",
        *,
        title: str | None = None,
        refresh: int | None = None,
    ) -> Path:
        """Write the run, as far as it is, as one HTML page that needs no network.

        Args:
            path: the page's file; one that is there is replaced.
            title: the page's title; by default it names the model's class.
            refresh: seconds after which an open page loads itself again; None for never.

        Returns:
            The page's path.

        Raises:
            UsageError: the file cannot be written.
            StoreError: a file of the run is damaged.
            MissingExtraError: a package is missing; `pip install 'pergrad[report]'` brings it.
        """
        return write(self, path, title=title, refresh=refresh)

    def noise(self, window: int | None = None) -> NoiseScale:
        """The noise scale over all ranks, of the latest watched steps; None for all steps."""
        noise = NoiseScale(window)
        for _, rows in self.by_step():
            add_noise(noise, rows)
        return noise

    def by_step(self) -> list[tuple[int, list[dict[str, Any]]]]:
        """The steps' rows, those of all ranks together."""
        steps: dict[int, list[dict[str, Any]]] = {}
        for row in self.steps().to_pylist():
            steps.setdefault(row["step"], []).append(row)
        return sorted(steps.items())

    def __repr__(self) -> str:
        steps = self.by_step()
        first, last = (steps[0][0], steps[-1][0]) if steps else (0, 0)
        model = printable(self.manifest["model"])
        noted = f"; see its {many} notes()" if (many := len(self.notes())) else ""
        return (
            f"Run of {model} in {printable(self.folder)}: {len(steps)} watched steps, {first} to "
            f"{last}, noise scale {self.noise(100)!r}{noted}"
        )


def open_watch(out: str | PathLike[str]) -> Run:
    """Open the folder of a run that `pergrad.Watch` watched, or watches at this moment.

    Args:
        out: the folder.

    Returns:
        Run.

    Raises:
        StoreError: there is no run, or its format is not one that this version reads.
        MissingExtraError: pyarrow is not installed.

    For example:

        >>> import tempfile, torch, pergrad
        >>> model = torch.nn.Linear(3, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with pergrad.Watch(folder) as watch:
        ...         losses = model(torch.randn(8, 3)).square().squeeze(1)
        ...         with watch(losses, model, keys=range(8)):
        ...             losses.mean().backward()
        ...     pergrad.open_watch(folder).examples()["key"].to_pylist()
        ['0', '1', '2', '3', '4', '5', '6', '7']
    """
    need("scan", "numpy", "pyarrow", "filelock")
    from pergrad.training.run_folder import RunFolder

    folder = RunFolder(Path(out))
    if folder.manifest is None:
        raise StoreError(
            f"There is no watched run in {printable(out)}: it has no manifest.json. Check the "
            'path, or make one with pergrad.Watch("run").'
        )
    return Run(folder)
