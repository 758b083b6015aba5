"""What a person needs to see of the examples, kept with the scores.

Owns: which examples are shown, calling the job's `show` for them, and the files in shown/.
Does not know: how a preview is encoded, or how a report looks.

A report is often read when the data set, the code, and the machine that has them are elsewhere.
Hence the store holds the pictures and texts of the examples that a report shows: of all examples in
a small data set, otherwise of those with remarkable scores and of some in between.
"""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pergrad.errors import StoreError
from pergrad.scans.report.numbers import largest
from pergrad.scans.report.preview import Preview
from pergrad.scans.store import Store
from pergrad.scans.text import message_of, printable

if TYPE_CHECKING:
    from pergrad.scans.job import Job

ALL = 5_000  # up to so many examples, each one is kept
EACH_END = 200  # with more: so many with the largest norms, losses; with the smallest norms
EACH_REFERENCE = 12  # of the most and the least similar, for each of the first REFERENCES columns
REFERENCES = 64
FAILED = 50
SPREAD = 400  # evenly over the data set, so that a region of the plot has something to show

SCHEMA = pa.schema(
    [("index", pa.int64()), ("kind", pa.string()), ("label", pa.string()), ("data", pa.binary())]
)


def remember(job: "Job", store: Store) -> None:
    """Keep what the job's `show` returns for the examples that a report would show.

    Called at the end of a scan, by who holds the store's lock. Replaces what was kept before, since
    `show` may have changed since. An example whose `show` raises, or returns what cannot be drawn,
    is kept with that error, and costs nothing else. Without a `show` nothing changes.

    Raises:
        StoreError: the disk takes no more; the scores are whole.

    Cost: a call of `show` for up to 5,000 examples.
    """
    if job.show is None:
        return
    rows = []
    for i in chosen(store):
        try:
            preview = Preview.of(job.show(i))
        except Exception as error:  # whatever the user's function raises
            preview = Preview(error=message_of(error, 500))
        rows.append((i, *preview.stored()))
    names = SCHEMA.names
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows], SCHEMA)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    try:
        store.add_file("shown", "previews", sink.getvalue().to_pybytes(), ".parquet")
    except StoreError as error:
        raise StoreError(
            f"{error} The scores are whole; what the job's `show` gives is not there: run the same "
            "scan again, it only collects what is to be shown."
        ) from error


def recall(store: Store) -> dict[int, Preview]:
    """The previews kept in a folder of scores, by the example's index. Empty if there are none.

    Raises:
        StoreError: they are not what was written.
    """
    content = store.file("shown", "previews", ".parquet")
    if content is None:
        return {}
    try:
        with pa.BufferReader(content) as source:
            columns = pq.ParquetFile(source).read().cast(SCHEMA).to_pydict()
        return {
            index: Preview.from_stored(kind, label, data)
            for index, kind, label, data in zip(*columns.values(), strict=True)
        }
    except (pa.ArrowException, ValueError, TypeError, AttributeError, KeyError) as error:
        raise StoreError(
            f"The previews in {printable(store.folder / 'shown')} are not what pergrad wrote "
            f"({printable(error)[:200]}). Move them elsewhere: the scores are read without them, "
            "and the next scan makes them again."
        ) from None


def chosen(store: Store) -> list[int]:
    """The indices of the examples to show, ascending."""
    names = list(store.columns)
    table = store.read(["index", "loss", "norm", "error"])
    index = table["index"].to_numpy()
    if len(index) <= ALL:
        return index.tolist()

    def column(name: str) -> np.ndarray:
        return store.read([name])[name].to_numpy().astype(np.float64)

    norms = column("norm")
    failed = np.flatnonzero(~np.asarray(table["error"].is_null()))
    picks = [
        largest(norms, EACH_END),
        largest(-norms, EACH_END),
        largest(column("loss"), EACH_END),
        failed[:FAILED],
        np.linspace(0, len(index) - 1, SPREAD).astype(np.int64),
    ]
    for name in [n for n in names if n.startswith("cosine:")][:REFERENCES]:
        cosines = column(name)
        picks += [largest(cosines, EACH_REFERENCE), largest(-cosines, EACH_REFERENCE)]
    return index[np.unique(np.concatenate(picks))].tolist()
