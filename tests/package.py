"""The command: `python -m tests.package`: what a user installs works, from what would be uploaded.

Builds the source archive, the wheel from that archive, and installs the wheel with all its extras
in a fresh environment, where the demo runs, and pip finds no conflict. Run by `make package`.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent.parent


def said(*command: object, folder: Path) -> str:
    """What a command prints, run in `folder` and without this checkout on its path."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder, env={**environment, "MPLCONFIGDIR": str(folder)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}")
    return done.stdout


def built(folder: Path) -> Path:
    """The wheel, made from the source archive alone."""
    said(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, folder=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    for name in ("tests/naive.py", "docs/api.md", "Makefile", "CITATION.cff", "mkdocs.yml"):
        assert (source / name).exists(), f"the source archive lacks {name}"
    said(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=source)
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as packed:
        names = packed.namelist()
    assert "pergrad/py.typed" in names, "type checkers would not see the types"
    assert all(n.startswith(("pergrad/", "pergrad-")) for n in names), (
        "the wheel has more than pergrad"
    )
    return wheel


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = built(folder)
        venv.create(folder / "venv", with_pip=True)
        python, pip = folder / "venv/bin/python", ["-m", "pip", "--disable-pip-version-check"]
        constraints = ["-c", ROOT / "constraints.txt"]
        said(python, *pip, "install", "--quiet", *constraints, wheel, folder=folder)
        core = said(python, "-c", "import pergrad; print(pergrad.norms.__name__)", folder=folder)
        assert core.strip() == "norms"
        more = said(python, "-m", "pergrad", "help", "freed-graph", folder=folder)
        assert "frees it" in more, more
        said(python, *pip, "install", "--quiet", *constraints, f"{wheel}[all]", folder=folder)
        said(python, *pip, "check", folder=folder)
        found = json.loads(said(folder / "venv/bin/pergrad", "demo", "--json", folder=folder))
        assert found["rank_correlations"]["influence"] > 0.5, found
        assert (folder / found["report"]).is_file()
    sys.stdout.write(f"{wheel.name}: built, installed, ran the demo\n")


if __name__ == "__main__":
    main()
