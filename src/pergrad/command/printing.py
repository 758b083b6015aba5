"""Results as a program reads them.

Owns: JSON that any parser takes.
Does not know: where the values come from.
"""

import json
import math
from collections.abc import Mapping
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
