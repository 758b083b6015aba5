"""The examples in the documentation run, and every public name is documented."""

import re
from pathlib import Path

import pytest
import torch

import pergrad

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Python blocks of a page, each with the number of its first line."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for line, source in blocks(page):
            # the newlines make a traceback point at the line of the page
            exec(compile("\n" * line + source, str(page), "exec"), namespace)


def headings() -> set[str]:
    """Names in the headings of docs/api.md, without what follows them."""
    text = (ROOT / "docs" / "api.md").read_text()
    return set(re.findall(r"^#{2,4} `(?:pergrad\.)?([\w.]+)", text, re.MULTILINE))


def test_every_public_name_is_documented() -> None:
    assert set(pergrad.__all__) <= headings()


@pytest.mark.parametrize("owner", ["GradientMatrix", "Check", "Coverage", "Scores", "Calibration"])
def test_every_public_attribute_is_mentioned(owner: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    section = re.split(rf"^#+ `{owner}`$", text, flags=re.MULTILINE)[1].split("\n## ")[0]
    kind = getattr(pergrad, owner)
    public = {name for name in dir(kind) if not name.startswith("_")}
    missing = {name for name in public if not re.search(rf"\b{name}\b", section)}
    assert not missing


def setups() -> list[list[str]]:
    """The cells of every line of the tables in docs/setups.md."""
    text = (ROOT / "docs" / "setups.md").read_text()
    lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in lines]


def test_every_set_up_is_backed_by_a_test() -> None:
    rows = [row for row in setups() if "::" in row[-1]]
    assert len(rows) > 30
    for what, verdict, *_, test in rows:
        assert re.match(r"exact|fallback|refused", verdict), what
        path, name = re.fullmatch(r"`(\S+)::(\w+)`", test).groups()
        source = (ROOT / "tests" / path).read_text()
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{what}: {test}"


def test_local_links_lead_somewhere() -> None:
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
