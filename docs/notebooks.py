"""Pages as notebooks: for the site, where each page with examples can be had as one.

The text and the code are the page's, which tests run, so there is no second copy to go stale.
`python docs/notebooks.py docs/start.md start.ipynb` writes one by hand.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"^```python\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
AWAY = re.compile(r"!?\[([^\]]*)\]\((?!https?:)[^)]*\)")


def notebook(markdown: str) -> dict[str, Any]:
    """A page in the notebook format 4.5: Python blocks as code, what is between them as text."""
    cells: list[dict[str, Any]] = []
    for k, part in enumerate(BLOCK.split(markdown)):
        if not part.strip():
            continue
        # a notebook lies elsewhere than the page, so only addresses lead somewhere
        text = part.rstrip("\n") if k % 2 else AWAY.sub(r"\1", part).strip()
        cell = {"id": f"cell-{k}", "metadata": {}, "source": text.splitlines(keepends=True)}
        if k % 2:
            cells.append({"cell_type": "code", "execution_count": None, "outputs": [], **cell})
        else:
            cells.append({"cell_type": "markdown", **cell})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def text_of(markdown: str) -> str:
    """The file of a page's notebook; empty if the page has no code to run."""
    found = notebook(markdown)
    runs = any(cell["cell_type"] == "code" for cell in found["cells"])
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n" if runs else ""


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(text_of(Path(sys.argv[1]).read_text(encoding="utf-8")))
