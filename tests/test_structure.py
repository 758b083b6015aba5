"""Files are the architecture: imports point down and in no circle, one subject a file."""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import pergrad
from pergrad.graph.ops import known_ops

SOURCE = Path(__file__).parents[1] / "src" / "pergrad"
MODULES = sorted(SOURCE.rglob("*.py"))

# From the bottom up; a layer may import from itself and from those before it.
LAYERS = [
    ["arrays", "errors", "folders", "recording", "version"],
    ["kernels"],
    ["extras", "factors", "inputs", "clipping"],
    ["graph", "calibration"],
    ["ops"],
    ["engine"],
    ["coverage", "gradient_files", "precondition"],
    ["matrix"],
    ["api", "matrices"],
    ["moments", "steps"],
    ["checking"],
    ["scans"],
    ["training", "attribution"],
    ["__init__"],
    ["command"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# What the parts that compute may see, beside themselves, `errors` and `recording`: graph and
# factors never meet.
SEES = {
    "kernels": {"folders"},
    "factors": {"folders", "kernels"},
    "graph": set(),
    "ops": {"factors", "graph", "kernels"},
    "engine": {"factors", "graph", "inputs", "kernels", "ops"},
}

MOST_LINES = 500


class Import(NamedTuple):
    """One name that a file imports."""

    module: str
    inside: bool  # of a function: imported when that is called
    for_types: bool  # under `if TYPE_CHECKING`: never imported at all


def name_of(path: Path) -> str:
    """pergrad/graph/walk.py -> pergrad.graph.walk"""
    words = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


NAMES = {name_of(path): path for path in MODULES}


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Everything that a file imports, of pergrad by the file that is meant."""
    return tuple(_imports(ast.parse(path.read_text()), False, False))


def _imports(node: ast.AST, inside: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute here"
            for alias in child.names:
                full = f"{child.module}.{alias.name}"
                yield Import(full if full in NAMES else str(child.module), inside, for_types)
        elif isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, inside, for_types)
        function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        yield from _imports(child, inside or function, for_types or types)


def ours(path: Path) -> list[Import]:
    return [found for found in imports(path) if found.module.split(".")[0] == "pergrad"]


def part(name: str) -> str:
    """The layer that a module belongs to: the folder below pergrad, or its own name."""
    return name.split(".")[1] if "." in name else "__init__"


EACH = pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))


@EACH
def test_imports_point_down(path: Path) -> None:
    own = part(name_of(path))
    others = {part(found.module) for found in ours(path)} - {own}
    assert not {name for name in others if LEVEL[name] >= LEVEL[own]}
    if own in SEES:
        assert others <= SEES[own] | {"errors", "recording"}


def circles(edges: dict[str, set[str]]) -> set[frozenset[str]]:
    """Largest sets of nodes of which each leads to all others."""
    reached = {start: _reach(edges, start) for start in edges}
    found = {
        frozenset(other for other in ends if start in reached.get(other, ()))
        for start, ends in reached.items()
    }
    return {circle for circle in found if circle}


def _reach(edges: dict[str, set[str]], start: str) -> set[str]:
    stack, seen = list(edges[start]), set()
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += edges.get(node, ())
    return seen


def test_circles_are_seen() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert circles(edges) == {frozenset("bc"), frozenset("e")}


def test_no_circle_of_files() -> None:
    """Also none that an import within a function would open."""
    edges = {
        name: {found.module for found in ours(path) if not found.for_types}
        for name, path in NAMES.items()
    }
    assert not circles(edges)


@cache
def needs_more(name: str, torch: bool) -> bool:
    """Whether a module, when imported, imports more than the standard library (and torch)."""
    for found in imports(NAMES[name]):
        top = found.module.split(".")[0]
        if found.inside or found.for_types:
            continue
        if top not in {"pergrad", *(["torch"] if torch else []), *sys.stdlib_module_names}:
            return True
        if top == "pergrad" and found.module != name and needs_more(found.module, torch):
            return True
    return False


def test_imports_within_functions_are_of_extras() -> None:
    """Not to open a circle, nor to save time: what they import needs a package of an extra.

    But in the command line, where a command that reads is not to wait for torch.
    """
    found = {
        name
        for name, path in NAMES.items()
        for late in ours(path)
        if late.inside and not late.for_types
        if not needs_more(late.module, torch=part(name) != "command")
    }
    assert not found


def test_no_module_has_the_name_of_something_public() -> None:
    """Else an import of the module, whoever needs it first, puts it in the other's place."""
    there = {name.split(".")[1] for name in NAMES if name.count(".")}
    assert there & set(pergrad.__all__) == {"precondition"}  # is a module


def test_private_names_of_torch_are_in_one_folder() -> None:
    """And names of what nodes save: a new release of torch is a change there."""
    private = re.compile(
        r"\b_(raw_)?saved_|_input_metadata|next_functions|Backward\d|torch\._C|\._version\b|_Holder"
        r"|\._backward_hooks|_post_accumulate_grad_hooks|BackwardCFunction"
    )
    inside = SOURCE / "graph" / "nodes"
    found = {str(p): private.findall(p.read_text()) for p in MODULES if p.parent != inside}
    assert not {path: names for path, names in found.items() if names}


def test_no_file_is_long() -> None:
    found = {
        str(path.relative_to(SOURCE))
        for path in MODULES
        if len(path.read_text().splitlines()) >= MOST_LINES
    }
    assert not found


@EACH
def test_a_module_says_what_it_owns(path: Path) -> None:
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    if path != SOURCE / "__init__.py" and path.name != "errors.py":
        assert "Owns:" in doc
        assert "Does not know:" in doc


@pytest.mark.parametrize("path", sorted((SOURCE / "graph").glob("*.py")), ids=lambda p: p.name)
def test_graph_names_no_op(path: Path) -> None:
    """What is known of an op stands in its family's file in ops/, and nowhere else below it."""
    constants = [n.value for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Constant)]  # fmt: skip
    named = set(known_ops()).intersection(c for c in constants if isinstance(c, str))
    assert named <= ({"add"} if path.name == "hooks.py" else set())  # that of Python's sets


def test_saved_fields_are_read_through_the_declarations() -> None:
    """By `attr`, `data` and `saved` of an op or a use, which hold them against `needs`."""
    direct = re.compile(r"nodes\.(saved|attribute)\(")
    through = [SOURCE / "graph" / "ops.py", SOURCE / "ops" / "registry.py"]
    others = [p for p in MODULES if p not in through and "nodes" not in p.parts]
    assert not [p for p in others if direct.search(p.read_text())]


def test_names_of_test_files_are_unique() -> None:
    """Their folders are no packages, nor are benchmarks and examples: tests import from all."""
    root = SOURCE.parents[1]
    names = [
        path.name
        for folder in ("tests", "tests/*", "benchmarks", "examples")
        for path in root.glob(f"{folder}/*.py")
        if path.name != "__init__.py"
    ]
    assert sorted(names) == sorted(set(names))
