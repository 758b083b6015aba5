"""Watch a training run name the wrong labels while it goes on.

The same handwritten digits as in digits.py, of which 5 % were given a wrong label on purpose. Here
the ordinary training loop has one line more: `pergrad.Watch` reads the norm of every example's
gradient in the backward pass that runs anyway. After each epoch it is asked which examples have
stood out most often so far.

    pip install 'pergrad[demo]'
    python watch_digits.py [--out watch_digits_output]    # half a minute
    pergrad top watch_digits_output/run                   # what stood out, once more
"""

import argparse
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pergrad
from digits import FLIPPED_SHARE, SEED, load, picture

EPOCHS = 10


def wrong_at_top(run: pergrad.Run, flipped: Tensor, by: str) -> int:
    """How many of the wrong labels are among as many examples that stood out most."""
    top = run.top(int(flipped.sum()), by)["key"].to_pylist()
    return int(flipped[[int(key) for key in top]].sum())


def draw(
    path: Path, found: dict[str, list[int]], run: pergrad.Run, images: Tensor, given: Tensor,
    flipped: Tensor,
) -> None:  # fmt: skip
    """What was known after each epoch, and the twelve digits that stood out most often."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(9.5, 3.4))
    left, right = figure.add_gridspec(1, 2, width_ratios=(1, 1.6))
    axis = figure.add_subplot(left)
    for name, counts in found.items():
        axis.plot(range(1, len(counts) + 1), counts, marker="o", markersize=3, label=name)
    axis.axhline(int(flipped.sum()), color="#999999", linewidth=1, linestyle=":")
    axis.set(xlabel="epoch", ylabel=f"of {int(flipped.sum())} wrong labels, found", ylim=(0, None))
    axis.legend(frameon=False, loc="lower right", title="ranked by")
    grid = right.subgridspec(2, 6, hspace=0.55)
    for cell, row in zip(grid, run.top(12).to_pylist(), strict=False):
        i = int(row["key"])
        axis = figure.add_subplot(cell)
        axis.imshow(images[i].reshape(8, 8).numpy(), cmap="gray_r")
        axis.set(xticks=[], yticks=[])
        colour = "#c0392b" if flipped[i] else "#333333"
        axis.set_title(f"“{int(given[i])}”, {row['times']} of {row['seen']}", fontsize=7,
                       color=colour)  # fmt: skip
        for side in axis.spines.values():
            side.set_color(colour)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(out: Path) -> dict[str, list[int]]:
    """Train and watch; says after each epoch what is known, and returns it."""
    if (out / "run" / "manifest.json").is_file():
        shutil.rmtree(out / "run")  # of an earlier time
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images, true, given = load(generator)
    flipped = given != true
    count = int(flipped.sum())
    print(f"{len(true)} digits; {count} of them ({FLIPPED_SHARE:.0%}) have a wrong label.")

    def show(i: int) -> dict[str, object]:
        wrong = f"it is a {true[i]}" if flipped[i] else None
        return {"image": picture(images[i]), "label": int(given[i]), "flipped on purpose": wrong}

    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    watch = pergrad.Watch(out / "run", every=1, show=show)
    found: dict[str, list[int]] = {"times an outlier": [], "largest norm": [], "largest loss": []}
    for epoch in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), given[batch])
            with watch(loss, model, len(batch), keys=batch):
                loss.backward()
            optimizer.step()
        watch.flush()
        run = pergrad.open_watch(out / "run")  # as another process could, meanwhile
        for name, by in zip(found, ("outlier", "norm", "loss"), strict=True):
            found[name].append(wrong_at_top(run, flipped, by))
        words = ", ".join(f"{counts[-1]} by {name}" for name, counts in found.items())
        print(f"  after epoch {epoch + 1:>2}: of {count} wrong labels, {words}")
    watch.close()
    print(f"Noise scale: {run.noise()}; the batches have 64.")
    draw(out / "watch_digits.png", found, run, images, given, flipped)
    page = run.report(out / "run.html")
    print(f"The report, to open in a browser: {page}")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("watch_digits_output"), help="a folder")
    main(parser.parse_args().out)
