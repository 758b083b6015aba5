"""Results as a person or a program reads them.

Owns: aligned text tables, and JSON that any parser takes.
Does not know: where the values come from.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def as_json(value: Any) -> str:
    """JSON of one line per element of a list, so that it can be read and piped.

    JSON has no numbers that are not finite; they become the strings "nan", "inf" and "-inf".

    >>> print(as_json([{"index": 0, "norm": 1.5}, {"index": 1, "norm": float("nan")}]))
    [
     {"index": 0, "norm": 1.5},
     {"index": 1, "norm": "nan"}
    ]
    """
    if isinstance(value, list) and value:
        return "[\n " + ",\n ".join(as_json(item) for item in value) + "\n]"
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under their column names; numbers to the right, texts to the left, no empty columns.

    >>> print(as_table([{"index": 7, "key": "a", "norm": 1.5}, {"index": 12, "key": "bc"}]))
    index  key  norm
        7  a     1.5
       12  bc
    """
    names = list(dict.fromkeys(n for row in rows for n, value in row.items() if value is not None))
    if not names:
        return "none"
    numeric = {
        name: all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
        for name in names
    }
    cells = [{name: _cell(row.get(name)) for name in names} for row in rows]
    widths = {name: max(len(name), *(len(cell[name]) for cell in cells)) for name in names}

    def line(cell: Mapping[str, str]) -> str:
        return "  ".join(
            cell[name].rjust(widths[name]) if numeric[name] else cell[name].ljust(widths[name])
            for name in names
        ).rstrip()

    return "\n".join([line({name: name for name in names}), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    # what a user's key or error holds must not drive the terminal
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= 60 else text[:57] + "..."
