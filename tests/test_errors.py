"""Every error leads to a section of docs/errors.md, and that says what to do."""

import pickle
import re
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

import pergrad
from pergrad import errors
from pergrad.command import main

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import messages  # noqa: E402

MESSAGES = messages.messages()
SECTIONS = errors.explained()


def test_messages_are_found_in_the_sources() -> None:
    assert len(MESSAGES) > 400
    raised = sum(
        len(re.findall(r"raise (?:UsageError|UnsupportedError|StoreError|WorkerError)\(", text))
        for text in (path.read_text() for path in messages.SOURCE.rglob("*.py"))
    )
    assert len(MESSAGES) >= raised
    freed = [m for m in MESSAGES if m.section == "freed-graph"]
    assert any("has been freed by an earlier backward. Each pass" in m.text for m in freed)


def test_every_error_has_its_section() -> None:
    for message in MESSAGES:
        assert len(SECTIONS.get(message.section, "")) > 100, message


def test_every_section_has_its_errors() -> None:
    kinds = {getattr(pergrad, kind)._otherwise for kind in messages.KINDS}
    lead = {message.section for message in MESSAGES} | kinds
    warnings = {"fallbackwarning"}
    assert SECTIONS.keys() - warnings == lead


def test_links_to_sections_of_the_page() -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        for name in re.findall(r"errors\.md#([\w-]+)", page.read_text()):
            assert name in SECTIONS, f"{page.name}: {name}"


def test_an_error_names_its_section() -> None:
    with pytest.raises(pergrad.UsageError) as caught:
        pergrad.norms(torch.ones(3), torch.nn.Linear(2, 1))
    assert caught.value.section == "no-graph"
    shown = "".join(traceback.format_exception(caught.value))
    assert shown.endswith("More: docs/errors.md#no-graph, or say: pergrad help no-graph\n")
    assert "More" not in str(caught.value)


def test_it_keeps_its_section_on_the_way_from_another_process() -> None:
    with pytest.raises(pergrad.UsageError) as caught:
        pergrad.norms(torch.ones(3), torch.nn.Linear(2, 1))
    same = pickle.loads(pickle.dumps(caught.value))
    assert (same.section, same.__notes__) == ("no-graph", caught.value.__notes__)
    assert str(same) == str(caught.value)


def test_an_error_that_somebody_else_makes() -> None:
    assert pergrad.MixedExamplesError("mine").section == "interacting-examples"
    assert pergrad.PergradError().section in SECTIONS


def test_help_in_a_shell(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pergrad", "help", "freed-graph"])
    assert main() == 0
    said = capsys.readouterr().out
    assert said.startswith("Freed graph\n")
    assert "says(" not in said  # but what to write is there
    assert "pergrad.norms(values, model, retain_graph=True)" in said
    monkeypatch.setattr(sys, "argv", ["pergrad", "help"])
    assert main() == 0
    assert "freed-graph" in capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys, "argv", ["pergrad", "help", "nothing"])
    assert main() == 1
    said = capsys.readouterr().err
    assert "No errors have a section 'nothing'" in said
    assert "  freed-graph" in said
    assert "Words that are explained as well: cotangent" in said
    assert ", outlier," in said


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["outlier"], "Outlier\nIn a watched run"),
        (["LDS"], "LDS\nLinear datamodelling score"),
        (["noise", "scale"], "Noise scale\nThe trace"),
        (["per-example-gradient"], "Per-example gradient\nThe gradient of one"),
        (["noisy label"], "Mislabeled, mislabelled, noisy label\nA label"),
        (["hooks"], "Hooks\n\nA hook"),  # errors first
    ],
)
def test_help_about_a_word(
    asked: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["pergrad", "help", *asked])
    assert main() == 0
    assert capsys.readouterr().out.startswith(said)


def test_help_needs_only_pergrad() -> None:
    """Not the packages of the command line."""
    code = (
        "import sys; sys.modules.update(typer=None, rich=None, numpy=None, torch=None)\n"
        "from pergrad.command import main\nsys.argv = ['pergrad', 'help', 'hooks']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("Hooks\n"), done.stderr
