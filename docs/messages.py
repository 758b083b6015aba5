"""Every message of pergrad's errors, read from the sources, and its section of errors.md.

For the site, where each section lists its messages, so that a search for one finds what to do; and
for the tests, which see that each section is there.
"""

import ast
from pathlib import Path
from typing import NamedTuple

import pergrad
from pergrad import errors

SOURCE = Path(pergrad.__file__).parent
KINDS = {name for name in pergrad.__all__ if name.endswith("Error")}


class Message(NamedTuple):
    """An error as the sources word it: `…` stands for what is filled in."""

    kind: str
    module: str
    line: int
    text: str

    @property
    def section(self) -> str:
        """Where docs/errors.md says more."""
        return errors.section_of(getattr(pergrad, self.kind), f"pergrad.{self.module}", self.text)


class _Sources:
    def __init__(self) -> None:
        self.trees = {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}
        self.functions = {
            node.name: node
            for tree in self.trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
        }
        self.constants = {
            node.targets[0].id: node.value
            for tree in self.trees.values()
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }

    def worded(self, node: ast.expr | None, depth: int = 0) -> str:
        """The words of an expression, and `…` for what is known only when it is raised."""
        if depth > 4 or node is None:
            return "…"
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return "".join(self.worded(part, depth) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.worded(node.left, depth) + self.worded(node.right, depth)
        if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name):
            name = node.value.id
            return self.worded(self.constants[name], depth + 1) if name.isupper() and (
                name in self.constants) else "…"  # fmt: skip
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func).split(".")[-1]
            body = self.functions[called].body if called in self.functions else []
            returned = [at.value for at in body if isinstance(at, ast.Return)]
            return self.worded(returned[0], depth + 1) if returned else "…"
        return "…"


def messages() -> list[Message]:
    """All of them, in the order of the files."""
    sources = _Sources()
    return [
        Message(
            name,
            ".".join(path.relative_to(SOURCE).with_suffix("").parts),
            node.lineno,
            " ".join(sources.worded(node.args[0]).split()),
        )
        for path, tree in sources.trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (name := ast.unparse(node.func).split(".")[-1]) in KINDS
        and node.args
    ]


def listed() -> dict[str, list[str]]:
    """Section -> its messages, for the site."""
    found: dict[str, list[str]] = {}
    for message in messages():
        if set(message.text) <= set("…. :"):
            continue
        texts = found.setdefault(message.section, [])
        if message.text not in texts:
            texts.append(message.text)
    return found
