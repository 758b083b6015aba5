"""What names examples and queries, and what a person sees of them, kept beside the scores.

Owns: the keys; which examples a report shows; calling a job's `show` for them; reading both again.
Does not know: how scores are computed, or how a report looks.

    keys-…, askedkeys-…         the names of the examples and of the queries
    near-…                      the nearest examples to each query, without gradients
    shown-…, askedshown-…       previews of the strongest examples, and of the queries
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Subset

from pergrad.attribution.baselines import neighbours
from pergrad.attribution.folder import Folder
from pergrad.errors import UsageError
from pergrad.scans import manifest
from pergrad.scans.job import Job
from pergrad.scans.report.preview import Preview
from pergrad.scans.text import message_of

if TYPE_CHECKING:
    from pergrad.attribution.found import Influence

Near = list[tuple[np.ndarray, np.ndarray]]
Parts = dict[int, dict[int, list[float]]]  # query -> example -> scores by layer

QUERIES = 200  # of so many a report shows the strongest examples
EACH_END = 24  # and so many of these
MOST = 5_000  # previews in all
NEAR = 10  # nearest examples of each query
MOST_FOR_NEAR = 2**20  # examples; their inputs of the last layer are held


def keep_table(folder: Folder, kind: str, count: int, table: Any) -> None:
    """A table about the examples 0:count, as Parquet, in the place of those that are there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    old = folder.files(kind)
    new = folder.add(kind, 0, count, sink.getvalue().to_pybytes(), "parquet")
    for _, _, path in old:
        if path != new:
            path.unlink(missing_ok=True)


def read_table(folder: Folder, kind: str) -> Any:
    """What was kept; None without."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = folder.files(kind)
    if not files:
        return None
    return pq.read_table(pa.BufferReader(folder.read(files[-1][2])))


def keep_keys(folder: Folder, kind: str, job: Job) -> None:
    """The names of a job's examples, if it has any.

    Raises:
        UsageError: two are the same.
    """
    keys = check_keys(job)
    if keys is None:
        return
    import pyarrow as pa

    keep_table(folder, kind, len(keys), pa.table({"key": pa.array(keys, pa.string())}))


def check_keys(job: Job) -> list[str] | None:
    """The names of a job's examples, all different; None without.

    Raises:
        UsageError: two are the same.
    """
    if job.key is None:
        return None
    keys = [manifest.key_of(job, i) for i in range(len(job))]
    seen: dict[str, int] = {}
    for i, name in enumerate(keys):
        if seen.setdefault(name, i) != i:
            raise UsageError(
                f"The examples {seen[name]} and {i} have the same key, {name!r}, so a table of "
                "scores could not tell them apart. Give `key` a name for each example."
            )
    return keys


def remember(folder: Folder, found: "Influence", job: Job, asked: Job) -> None:
    """Keep what `show` returns for the queries, and for the examples at either end of each.

    One that `show` raises for, or that cannot be drawn, is kept with that error. Replaces what was
    kept before, since `show` may have changed. With `show`, the nearest examples are kept, too: what
    a baseline without gradients says stands beside the scores.

    Cost: a call of `show` for up to 5,000 examples; once, a forward pass for each example.
    """  # noqa: E501
    queries = range(min(QUERIES, found.shape[0]))
    if asked.show is not None:
        _keep(folder, "askedshown", asked.show, queries)
    if job.show is not None:
        near = _nearest(folder, job, asked, queries)
        each = max(1, min(EACH_END, MOST // (2 * len(queries))))
        ends = found.ends(each)
        chosen = {int(i) for q in queries for index, _ in ends[q] for i in index}
        for i in (int(index[k]) for k in range(NEAR) for index, _ in near if k < len(index)):
            if len(chosen) < MOST:
                chosen.add(i)
        _keep(folder, "shown", job.show, sorted(chosen))


def _nearest(folder: Folder, job: Job, asked: Job, queries: range) -> Near:
    """The nearest examples, computed if they are not kept yet."""
    if not folder.files("near") and len(job) <= MOST_FOR_NEAR:
        import pyarrow as pa

        cosines = neighbours(job, replace(asked, data=Subset(asked.data, queries), key=None))
        columns: dict[str, list[Any]] = {"index": [], "cosine": []}
        for row in () if cosines is None else cosines:
            order = np.argsort(-row, kind="stable")[:NEAR]
            columns["index"].append(order)
            columns["cosine"].append(row[order])
        types = (("index", pa.list_(pa.int64())), ("cosine", pa.list_(pa.float64())))
        table = pa.table({n: pa.array(columns[n], kind) for n, kind in types})
        keep_table(folder, "near", len(queries), table)
    return nearest(folder)


def nearest(folder: Folder) -> Near:
    """For each query the numbers and cosines of the nearest examples; empty without."""
    table = read_table(folder, "near")
    rows = [] if table is None else table.to_pylist()
    return [(np.array(r["index"], int), np.array(r["cosine"])) for r in rows]


def _keep(folder: Folder, kind: str, show: Callable[[int], Any], chosen: Sequence[int]) -> None:
    import pyarrow as pa

    rows = []
    for i in chosen:
        try:
            preview = Preview.of(show(i))
        except Exception as error:  # whatever the user's function raises
            preview = Preview(error=message_of(error, 500))
        rows.append((i, *preview.stored()))
    schema = pa.schema([("index", pa.int64()), ("kind", pa.string()), ("label", pa.string()),
                        ("data", pa.binary())])  # fmt: skip
    listed = [dict(zip(schema.names, row, strict=True)) for row in rows]
    keep_table(folder, kind, len(rows), pa.Table.from_pylist(listed, schema))


def recall(folder: Folder, kind: str) -> dict[int, Preview]:
    """The previews that were kept, by number; empty without."""
    table = read_table(folder, kind)
    rows = [] if table is None else table.to_pylist()
    return {r["index"]: Preview.from_stored(r["kind"], r["label"], r["data"]) for r in rows}


def parts(folder: Folder) -> tuple[list[str], Parts] | None:
    """The layers' names and the parts of scores; None without."""
    table = read_table(folder, "layers")
    if table is None:
        return None
    told = {key.decode(): name.decode() for key, name in table.schema.metadata.items()}
    names = [told[str(k)] for k in range(len(told))]
    found: Parts = {}
    for row in table.to_pylist():
        found.setdefault(row["query"], {})[row["index"]] = row["scores"]
    return names, found
