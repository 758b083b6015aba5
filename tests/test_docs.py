"""The examples in the documentation run, and every public name is documented."""

import dataclasses
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints
from xml.etree import ElementTree

import pytest
import torch

import pergrad
from pergrad.engine.run import Options

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import drawings  # noqa: E402
import notebooks  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[int, str]]:
    """Python blocks of a page, each with the number of its first line."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in BLOCK.finditer(text)]


# Their examples need packages that only `make integrations` installs.
OTHERS = {"hugging-face.md", "lightning.md", "private.md"}


def marked(page: Path) -> Any:
    theirs = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]
    marks = theirs if page.name in OTHERS else []
    return pytest.param(page, id=page.name, marks=marks)


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_examples_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    module = ModuleType(re.sub(r"\W", "_", page.name))
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where torch.compile looks names up
    namespace = vars(module)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for line, source in blocks(page):
            # the newlines make a traceback point at the line of the page
            exec(compile("\n" * line + source, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_its_notebook(page: Path) -> None:
    text = notebooks.text_of(page.read_text())
    cells = json.loads(text)["cells"] if text else []
    code = ["".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "code"]
    assert code == [source for _, source in blocks(page)]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert all(cell["source"] for cell in cells)


def test_a_notebook_runs(tmp_path: Path) -> None:
    """In a process of its own, cell by cell, from a file."""
    file = tmp_path / "start.ipynb"
    page = ROOT / "docs" / "start.md"
    script = ROOT / "docs" / "notebooks.py"
    subprocess.run([sys.executable, script, page, file], check=True)
    code = (
        "import json, sys\n"
        "for cell in json.load(open(sys.argv[1]))['cells']:\n"
        "    if cell['cell_type'] == 'code':\n"
        "        exec(''.join(cell['source']), globals())\n"
        "print(norms.shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, file], capture_output=True, text=True, cwd=tmp_path
    )
    assert "torch.Size([16])" in done.stdout, done.stderr


def headings() -> set[str]:
    """Names in the headings of docs/api.md, without what follows them."""
    text = (ROOT / "docs" / "api.md").read_text()
    return set(re.findall(r"^#{2,4} `(?:pergrad\.)?([\w.]+)", text, re.MULTILINE))


def test_every_public_name_is_documented() -> None:
    assert set(pergrad.__all__) <= headings()


VERBS = "norms norms_by_parameter gram dots gradients backward explain check second_moments".split()


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_spelled_out(verb: str) -> None:
    """For editors by their types, for `help` in the docstring."""
    function = getattr(pergrad, verb)
    (given,) = get_args(get_type_hints(function)["options"])
    fields = {field.name: field.type for field in dataclasses.fields(Options)}
    assert get_type_hints(given) == fields
    fixed = {"explain": {"retain_graph", "create_graph", "on_mixing"}, "check": {"retain_graph"}}
    fixed["backward"] = {"create_graph"}
    for name in fields.keys() - fixed.get(verb, set()):
        assert name in function.__doc__, name


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


def test_every_page_is_in_the_site() -> None:
    listed = set(re.findall(r"[-:] (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= listed
    assert all((ROOT / name).exists() for name in listed - pages)


def test_local_links_lead_somewhere() -> None:
    pages = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", drawings.DRAWINGS)
def test_drawings_are_up_to_date(name: str) -> None:
    """Drawn by `python docs/drawings.py`, and shown on a page, with words for who cannot see it."""
    drawn = drawings.DRAWINGS[name]().svg()
    assert (ROOT / "docs" / "images" / f"{name}.svg").read_text() == drawn
    ElementTree.fromstring(drawn)
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    assert re.search(rf"!\[.{{30,}}\]\(images/{name}\.svg\)", page)


def test_all_is_all() -> None:
    """`pip install 'pergrad[all]'` brings every extra that a user may want."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    whole = {re.search(r"\[(\w+)\]", name)[1] for name in extras["all"]}
    # "integrations" are trainers of others, of which a user has the one that he uses
    apart = {"all", "test", "integrations", "zoo", "bench", "docs", "dev"}
    assert extras.keys() - apart - whole == {"scan"}  # which "report" asks for
    assert "pergrad[scan]" in extras["report"]


def test_pages_say_the_same_command_to_install() -> None:
    """The checkout once, or all of it; parts by the name that pip knows once pergrad is there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"].keys()
    texts = [*PAGES, *(ROOT / "examples").glob("*.py"), *(ROOT / "src").rglob("*.py")]
    for path in texts:
        for what in re.findall(r"pip\s+install\s+'([^'{]+)'", path.read_text()):
            if what.startswith(("pergrad[", ".[")):
                named = re.search(r"\[([\w,]+)\]", what)[1].split(",")
                assert what == ".[all]" or what.startswith("pergrad["), f"{path.name}: {what}"
                assert set(named) <= extras | {"extra"}, f"{path.name}: {what}"


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == pergrad.__version__
