"""The command: `python -m tests.versions 2.11.0 2.15.0`: this suite with other releases of torch.

Each release gets a virtual environment of its own below `build/`, and there the tests run as they
are. An argument with a slash is a Python interpreter whose torch is used as it is: for a torch that
pip cannot install here without more ado. What follows `--` goes to pytest.
"""

import argparse
import datetime
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def interpreter(release: str) -> Path:
    """Python with this release of torch, and what the tests need."""
    folder = ROOT / "build" / f"torch-{release}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"torch=={release}"], check=True)
        subprocess.run([*pip, f"torch=={release}", f"{ROOT}[test]"], check=True)
    return python


def row(python: Path, options: list[str]) -> tuple[str, int]:
    """A line of the table in docs/versions.md, and pytest's exit status."""
    version = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    with subprocess.Popen([python, "-m", "pytest", "-q", *options], cwd=ROOT, env=environment,
                          stdout=subprocess.PIPE, text=True) as run:  # fmt: skip
        assert run.stdout is not None
        last = ""
        for line in run.stdout:
            sys.stdout.write(line)
            last = line.strip() or last
    today = datetime.date.today().isoformat()
    return f"| {version} | {last.strip('= ')} | {today} |", run.returncode


def main() -> int:
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tests.versions")
    parser.add_argument("torch", nargs="+", help="a release (2.11.0), or the path of a Python")
    chosen = parser.parse_args(given[:cut]).torch
    rows = [row(Path(t) if "/" in t else interpreter(t), given[cut + 1 :]) for t in chosen]
    sys.stdout.write("\n".join(["", *[text for text, _ in rows], ""]))
    return max(status for _, status in rows)


if __name__ == "__main__":
    raise SystemExit(main())
