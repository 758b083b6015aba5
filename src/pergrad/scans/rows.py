"""Some rows of scores, to read and to go on with.

Owns: `Rows`, and aligned tables of text that fit the terminal.
Does not know: how rows are chosen.
"""

import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pergrad.scans.text import printable

if TYPE_CHECKING:
    import pyarrow as pa

MOST_ROWS = 60  # that are printed; all are there
MOST_LETTERS = 60  # of one text
LEAST_LETTERS = 12  # of a text that makes room for other columns


class Rows:
    """Rows of scores. Prints as a table; all else is that of the `pyarrow.Table` in `arrow`.

    >>> import pyarrow as pa
    >>> rows = Rows(pa.table({"index": [7, 12], "key": ["a", "bc"], "norm": [1.5, 0.25]}))
    >>> print(rows)
    index  key  norm
        7  a     1.5
       12  bc   0.25
    >>> rows["index"].to_pylist()
    [7, 12]
    """

    def __init__(self, arrow: "pa.Table", first: Sequence[str] = ()) -> None:
        self.arrow = arrow
        self._first = ("index", *first)  # the columns that are shown whatever room there is

    def __str__(self) -> str:
        shown = self.arrow.slice(0, MOST_ROWS).to_pylist()
        text = as_table(shown, shutil.get_terminal_size((100, 24)).columns, self._first)
        left = len(self) - len(shown)
        return text if left <= 0 else f"{text}\nand {left:,} more rows"

    __repr__ = __str__

    def __len__(self) -> int:
        return len(self.arrow)

    def __getitem__(self, key: Any) -> Any:
        return self.arrow[key]

    def __eq__(self, other: object) -> bool:
        return bool(self.arrow == (other.arrow if isinstance(other, Rows) else other))

    __hash__ = None  # type: ignore[assignment]

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """For whoever reads Arrow: pandas, polars, DuckDB, `pyarrow.table(rows)`."""
        return self.arrow.__arrow_c_stream__(requested_schema)

    def __getattr__(self, name: str) -> Any:
        if name == "arrow":  # not there yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.arrow, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.arrow)})


def as_table(
    rows: Sequence[Mapping[str, Any]], width: int | None = None, first: Sequence[str] = ()
) -> str:
    """Rows under their column names; numbers to the right, texts to the left, no empty columns.

    Where that is wider than `width`, texts are cut, and then columns left out from the right, the
    `first` ones last; a line at the end says which.

    >>> print(as_table([{"index": 7, "key": "a", "norm": 1.5}, {"index": 12, "key": "bc"}]))
    index  key  norm
        7  a     1.5
       12  bc
    >>> print(as_table([{"index": 7, "key": "a", "norm": 1.5}], 14, ["index", "norm"]))
    index  norm
        7   1.5
    1 more: key
    """
    names = list(dict.fromkeys(n for row in rows for n, value in row.items() if value is not None))
    if not names:
        return "none"
    numeric = {
        name: all(isinstance(row.get(name), (int, float, type(None))) for row in rows)
        for name in names
    }
    heads = {name: _cell(name, MOST_LETTERS) for name in names}
    cells = [{name: _cell(row.get(name), MOST_LETTERS) for name in names} for row in rows]
    widths = {name: max(len(heads[name]), *(len(c[name]) for c in cells)) for name in names}
    left_out: list[str] = []
    if width is not None:
        for name in names:  # texts make room
            over = _total(widths) - width
            if over > 0 and not numeric[name]:
                least = min(widths[name], max(LEAST_LETTERS, len(heads[name])))
                widths[name] = max(least, widths[name] - over)
        for name in [*(n for n in reversed(names) if n not in first), *reversed(first)]:
            if _total(widths) <= width or len(widths) == 1:
                break
            if widths.pop(name, None) is not None:
                left_out.append(name)
    shown = [name for name in names if name in widths]

    def line(cell: Mapping[str, str]) -> str:
        fitted = {name: _cut(cell[name], widths[name]) for name in shown}
        return "  ".join(
            fitted[n].rjust(widths[n]) if numeric[n] else fitted[n].ljust(widths[n]) for n in shown
        ).rstrip()

    lines = [line(heads), *map(line, cells)]
    if left_out:
        left = [heads[name] for name in names if name in left_out]
        more = ", ".join(left[:5]) + (", ..." if len(left) > 5 else "")
        lines.append(_cut(f"{len(left)} more: {more}", max(width or 0, MOST_LETTERS)))
    return "\n".join(lines)


def _total(widths: Mapping[str, int]) -> int:
    """Of a line with two spaces between columns."""
    return sum(widths.values()) + 2 * (len(widths) - 1)


def _cell(value: Any, most: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return _cut(printable(value), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: max(0, most - 3)] + "..."[:most]
