"""Scores of the strongest examples in parts, one for each layer, kept beside the scores.

Owns: which examples are taken apart, and their parts on the disk.
Does not know: how a score comes about, or how a report looks.

    layers-…      for each query the examples at its ends, and a list of their scores by layer
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pergrad.attribution.folder import Folder
from pergrad.attribution.scoring import Scoring, layer_of
from pergrad.attribution.shown import EACH_END, QUERIES, keep_table

if TYPE_CHECKING:
    from pergrad.attribution.found import Influence


def keep(
    folder: Folder,
    found: "Influence",
    scoring: Scoring,
    compared: Callable[[], list[dict[str, Tensor]]],
    scale: float,
) -> None:
    """Take the scores of the examples at each query's ends apart, unless that is kept already.

    Args:
        folder: the folder.
        found: the influences in it.
        scoring: how they came about.
        compared: for each block of queries what examples are compared with, if it was solved for.
        scale: from inner products to scores.

    Cost: a backward pass for each of these examples, and for each checkpoint; up to 9,600 of them.
    """
    if folder.files("layers"):
        return
    import pyarrow as pa

    solved = compared()
    names = list(dict.fromkeys(layer_of(n) for n in scoring.batches.params))
    ends = found.ends(EACH_END)[:QUERIES]
    columns: dict[str, list[Any]] = {"query": [], "index": [], "scores": []}
    for k, (first, stop) in enumerate(found.manifest["blocks"]):
        rows = range(first, min(stop, len(ends)))
        own = {q: sorted({int(i) for index, _ in ends[q] for i in index}) for q in rows}
        chosen = sorted({i for each in own.values() for i in each})
        if not chosen:
            continue
        # all of the block's queries are held, as they were
        parts = scoring.in_layers(range(first, stop), solved[k], chosen, names).numpy() * scale
        for q, indices in own.items():
            at = np.searchsorted(chosen, indices)
            columns["query"] += [q] * len(indices)
            columns["index"] += indices
            columns["scores"] += list(parts[:, at, q - first].T)
    table = pa.table(columns).replace_schema_metadata({str(k): n for k, n in enumerate(names)})
    keep_table(folder, "layers", len(ends), table)
