"""Folders are the architecture: imports point down, and torch's private names stay in one file."""

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "pergrad"
MODULES = sorted(SOURCE.rglob("*.py"))

# From the bottom up; a layer may import from itself and from those before it.
LAYERS = [
    ["errors", "folders"],
    ["kernels"],
    ["extras", "factors", "inputs", "retained", "hidden"],
    ["graph", "calibration"],
    ["rules", "held"],
    ["sharing", "doubts"],
    ["schedule"],
    ["serving"],
    ["engine"],
    ["coverage", "precondition"],
    ["matrix"],
    ["api"],
    ["check"],
    ["scores", "report"],
    ["command"],
    ["__init__"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def part(path: Path) -> str:
    """The layer a module belongs to: its folder below pergrad, or its own name."""
    inside = path.relative_to(SOURCE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imported(path: Path) -> set[str]:
    """The parts of pergrad that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "pergrad" else [
                f"pergrad.{alias.name}" for alias in node.names
            ]  # fmt: skip
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("pergrad.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = LEVEL[part(path)]
    above = {name for name in imported(path) if LEVEL[name] > own}
    assert not above


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_private_names_of_torch_are_in_one_file(path: Path) -> None:
    if path == SOURCE / "graph" / "nodes.py":
        return
    private = re.compile(
        r"\b_(raw_)?saved_|_input_metadata|next_functions|Backward\d|torch\._C|\._version\b|_Holder"
    )
    assert not private.findall(path.read_text())


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_module_says_what_it_owns(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    if path != SOURCE / "__init__.py" and path.name != "errors.py":
        assert "Owns:" in doc
        assert "Does not know:" in doc
