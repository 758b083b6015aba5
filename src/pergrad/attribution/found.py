"""Influences that have been computed, read from their folder.

Owns: `Influence`: scores, the strongest examples of a query, tables, the report, how it prints.
Does not know: how they were computed.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pergrad.arrays import whole
from pergrad.attribution.folder import Folder
from pergrad.attribution.ranking import read_pairs, strongest
from pergrad.attribution.shown import (
    EACH_END,
    QUERIES,
    Parts,
    nearest,
    parts,
    read_table,
    recall,
)
from pergrad.errors import StoreError, UsageError
from pergrad.extras import need
from pergrad.scans.rows import Rows

if TYPE_CHECKING:
    import pyarrow as pa

WHAT = "pergrad influence"

Found = tuple[np.ndarray, np.ndarray]  # numbers of examples, their scores


class Influence:
    """Scores of training examples for queries, in a folder that `pergrad.influence` has written.

    Args:
        folder: the folder.

    Raises:
        StoreError: there is no such folder, it is of something else, or it is not finished.
        MissingExtraError: a package is missing; `pip install 'pergrad[attribution]'` brings it.

        >>> import tempfile, torch, pergrad
        >>> data = [(torch.ones(2), 1.0), (-torch.ones(2), 1.0)]
        >>> job = pergrad.Job(torch.nn.Linear(2, 1), data, lambda m, b: (m(b[0])[:, 0] - b[1])**2)
        >>> folder = tempfile.TemporaryDirectory()
        >>> _ = pergrad.influence(job, data[:1], folder.name + "/found")
        >>> found = pergrad.Influence(folder.name + "/found")
        >>> found.top(0, 2).column_names
        ['rank', 'index', 'score']
        >>> folder.cleanup()
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        need("attribution", "numpy", "pyarrow", "filelock", "safetensors")
        self._folder = Folder(folder, WHAT)
        self.folder = self._folder.path
        found = self._folder.manifest()
        if found is None or not found.get("finished"):
            state = "has no influences" if found is None else "is not finished"
            raise StoreError(
                f"{self.folder} {state}. Make the same call of pergrad.influence again: it goes "
                "on where it stopped."
            )
        self.manifest: dict[str, Any] = found

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, training examples)."""
        return int(self.manifest["asked"]["examples"]), int(self.manifest["scored"]["examples"])

    @property
    def sign(self) -> str:
        """What a positive score means."""
        return str(self.manifest["sign"])

    @property
    def unit(self) -> str:
        """What a score of 1 is."""
        return str(self.manifest["unit"])

    @property
    def scores(self) -> Tensor:
        """(Q, N), every pair.

        Raises:
            UsageError: only the strongest were kept.
        """
        if self.manifest["settings"]["top"] is not None:
            raise UsageError(
                f"Only the {self.manifest['settings']['top']} strongest examples of each query "
                "were kept. Ask for every pair: pergrad.influence(..., top=None) into another "
                "folder."
            )
        blocks = range(len(self.manifest["blocks"]))
        return torch.from_numpy(
            np.concatenate([read_pairs(self._folder, f"pairs{k}").T for k in blocks])
        )

    @property
    def residuals(self) -> Tensor | None:
        """(Q,): how far from solved each query is, |g - (H + damping) x| / |g|; None if nothing
        was refined.
        """
        found = self.manifest.get("residuals")
        return None if found is None else torch.tensor(found, dtype=torch.float64)

    def top(self, query: int, n: int = 20) -> Rows:
        """The n examples with the highest scores for a query, highest first.

        Columns: `rank`, `index`, `key` if the job has keys, `score`. Prints as a table, and is a
        `pyarrow.Table` otherwise.

        Raises:
            UsageError: there is no such query, or so many were not kept.
        """
        return self._end(query, n, 1)

    def bottom(self, query: int, n: int = 20) -> Rows:
        """The n examples with the lowest scores for a query, lowest first; as `top`."""
        return self._end(query, n, -1)

    def table(self) -> "pa.Table":
        """All that was kept: `query`, `query_key`, `index`, `key`, `score`, by query, highest first.

        Of the strongest, both ends of each query.
        """  # noqa: E501
        import pyarrow as pa

        queries = self.shape[0]
        columns: dict[str, list[Any]] = {"query": [], "index": [], "score": []}
        for q in range(queries):
            high, low = self._ends(q)
            index, score = high
            if low is not None:  # both ends, which overlap where few examples were asked
                new = ~np.isin(low[0], index)
                index = np.concatenate([index, low[0][new][::-1]])
                score = np.concatenate([score, low[1][new][::-1]])
            columns["query"].append(np.full(len(index), q))
            columns["index"].append(index)
            columns["score"].append(score)
        arrays = {n: pa.array(np.concatenate(each)) for n, each in columns.items()}
        for name, of, keys in (
            ("query_key", "query", self._keys("askedkeys")),
            ("key", "index", self._keys("keys")),
        ):
            if keys is not None:
                arrays[name] = keys.take(arrays[of])
        order = [n for n in ("query", "query_key", "index", "key", "score") if n in arrays]
        return pa.table({n: arrays[n] for n in order}).replace_schema_metadata(self._told())

    def _told(self) -> dict[str, str]:
        return {"sign": self.sign, "unit": self.unit}

    def _keys(self, kind: str) -> Any:
        """The keys, a column; None without."""
        table = read_table(self._folder, kind)
        return None if table is None else table["key"].combine_chunks()

    def _end(self, query: int, n: int, sign: int) -> Rows:
        import pyarrow as pa

        queries, total = self.shape
        query, n = whole(query), whole(n)
        if not isinstance(query, int) or not 0 <= query < queries:
            raise UsageError(f"There is no query {query!r}: pass a number from 0 to {queries - 1}.")
        if not isinstance(n, int) or n < 1:
            raise UsageError(f"n is {n!r}; pass a positive number.")
        kept = self.manifest["settings"]["top"]
        if kept is not None and n > kept and kept < total:
            raise UsageError(
                f"Only the {kept} strongest examples of each query were kept, not {n}. Ask for "
                f"more with pergrad.influence(..., top={n}) into another folder."
            )
        high, low = self._ends(query)
        index, score = high
        if sign < 0:
            index, score = low if low is not None else _lowest(*high)
        arrays = {
            "rank": pa.array(np.arange(len(index[:n]))),
            "index": pa.array(index[:n]),
            "score": pa.array(score[:n]),
        }
        keys = self._keys("keys")
        if keys is not None:
            arrays["key"] = keys.take(arrays["index"])
        order = [n for n in ("rank", "index", "key", "score") if n in arrays]
        table = pa.table({n: arrays[n] for n in order}).replace_schema_metadata(self._told())
        return Rows(table, ["rank", "score"])

    def _ends(self, query: int) -> tuple[Any, Any]:
        """(numbers, scores) highest first; and lowest first if only the ends were kept."""
        if self.manifest["settings"]["top"] is None:
            score = self._row(query)
            order = np.argsort(-score, kind="stable")
            return (order, score[order]), None
        row = read_table(self._folder, "ranked").slice(query, 1).to_pydict()
        return tuple(
            (np.array(row[f"{end}_index"][0]), np.array(row[f"{end}_score"][0]))
            for end in ("top", "bottom")
        )  # type: ignore[return-value]

    def ends(self, n: int) -> list[tuple[Found, Found]]:
        """For each query the n highest scores, highest first, and the n lowest, lowest first.

        Each as numbers of examples and scores. Of all queries at once, in one pass over the files;
        where only the strongest were kept, no more than these.
        """
        if self.manifest["settings"]["top"] is None:
            both = []
            for k in range(len(self.manifest["blocks"])):
                high, low = strongest(self._folder, f"pairs{k}", n)
                both += [((i, s), (j, t)) for s, i, t, j in zip(*high, *low, strict=True)]
            return both
        rows = read_table(self._folder, "ranked").to_pylist()

        def end(row: Any, side: str) -> Found:
            return np.array(row[f"{side}_index"][:n]), np.array(row[f"{side}_score"][:n])

        return [(end(row, "top"), end(row, "bottom")) for row in rows]

    def by_layer(self, query: int) -> "pa.Table":
        """The scores of a query's strongest examples in parts: `index`, `layer`, `score`.

        Raises:
            UsageError: there is no such query, or the parts were not asked for.
        """
        import pyarrow as pa

        names, found = self._parts()
        query = whole(query)
        if query not in found:
            raise UsageError(
                f"There are no scores by layer of query {query!r}: pass a number from 0 to "
                f"{len(found) - 1}."
            )
        rows = [(i, name, score) for i, scores in found[query].items()
                for name, score in zip(names, scores, strict=True)]  # fmt: skip
        columns = zip(("index", "layer", "score"), zip(*rows, strict=True), strict=True)
        return pa.table(dict(columns)).replace_schema_metadata(self._told())

    def _parts(self) -> tuple[list[str], Parts]:
        found = parts(self._folder)
        if found is None:
            raise UsageError(
                f"{self.folder} has no scores by layer. Make the same call of pergrad.influence "
                'with groups="layer": it adds them.'
            )
        return found

    def report(
        self,
        path: str | PathLike[str] = "influence.html",
        *,
        title: str | None = None,
        by: Literal["layer"] | None = None,
    ) -> Path:
        """Write one HTML page: each query, and the examples that help and harm it most.

        With the pictures and texts that `Job(show=)` and `influence(show=)` gave, and beside them
        the examples nearest to each query in what goes into the last layer, which take no gradient.
        It needs no network, nor the model or the data.

        Args:
            path: the page's file; one that is there is replaced.
            title: the page's title; by default it names the model's class.
            by: "layer": whoever opens an example sees its score by layer, too, where
                `influence(groups="layer")` has kept that.

        Returns:
            The page's path.

        Raises:
            UsageError: the file cannot be written, or scores by layer were not asked for.
            StoreError: a file of the folder is damaged.
            MissingExtraError: a package is missing; `pip install 'pergrad[report]'` brings it.
        """
        need("report", "numpy", "pyarrow", "bokeh", "jinja2", "PIL")
        from pergrad.attribution.report import page
        from pergrad.scans.report import shell

        if by not in (None, "layer"):
            raise UsageError(f'by is {by!r}; pass "layer", or None.')
        layers = None if by is None else self._parts()
        previews = {side: recall(self._folder, kind)
                    for side, kind in (("asked", "askedshown"), ("scored", "shown"))}  # fmt: skip
        keys = {
            side: self._names(kind) for side, kind in (("asked", "askedkeys"), ("scored", "keys"))
        }
        ends = self.ends(EACH_END)[:QUERIES]
        near = nearest(self._folder)
        text = page.html(self.manifest, self.folder, ends, keys, previews, near=near,
                         layers=layers, title=title)  # fmt: skip
        return shell.save(text, Path(path))

    def _names(self, kind: str) -> list[str] | None:
        keys = self._keys(kind)
        return None if keys is None else keys.to_pylist()

    def _row(self, query: int) -> np.ndarray:
        for k, (first, stop) in enumerate(self.manifest["blocks"]):
            if first <= query < stop:
                return read_pairs(self._folder, f"pairs{k}")[:, query - first]
        raise AssertionError(query)

    def __repr__(self) -> str:
        queries, total = self.shape
        settings = self.manifest["settings"]
        lines = [
            f"Influence ({settings['method']}) of {total:,} examples on {queries:,} queries, in "
            f"{self.folder}",
            f"positive: {self.sign}; unit: {self.unit}",
        ]
        if settings["damping"] is not None:
            lines.append(f"damping {settings['damping']:g} x mean")
        residuals = self.residuals
        if residuals is not None:
            lines.append(
                f"{settings['refine']} steps of conjugate gradients; residuals "
                f"{float(residuals.min()):.1e} to {float(residuals.max()):.1e}"
                + (f" (refine={4 * settings['refine']} would lower them)"
                   if float(residuals.max()) >= 0.1 else "")
            )  # fmt: skip
        return "\n".join(lines)


def _lowest(index: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest first, of equal ones the first examples'."""
    order = np.lexsort((index, score))
    return index[order], score[order]
