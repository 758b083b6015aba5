"""Find wrongly labelled digits by the norm of each example's gradient.

Trains a small network on scikit-learn's handwritten digits, of which 5 % were given a wrong label
on purpose, then has pergrad score every training example: how hard does it pull on the weights?
Says how many of the wrong labels that finds, writes a report to look at in a browser, and draws the
examples that pull hardest.

    pip install 'pergrad[demo]'
    python digits.py [--out demo_output]                  # all of it, in under a minute
    pergrad scan digits.py:job --out digits_scores        # only the scores
"""

import argparse
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pergrad

SEED = 0
FLIPPED_SHARE = 0.05
EPOCHS = 10


def load(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 64) scaled to 0..1, true labels (N,), and labels of which 5 % were flipped."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    true = torch.tensor(digits.target)
    flipped = torch.randperm(len(true), generator=generator)[: round(FLIPPED_SHARE * len(true))]
    given = true.clone()
    given[flipped] += torch.randint(1, 10, (len(flipped),), generator=generator)  # never the same
    given %= 10
    return images, true, given


def train(images: Tensor, labels: Tensor, generator: torch.Generator) -> nn.Module:
    """An ordinary training loop; it knows nothing of pergrad."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss per example."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def picture(image: Tensor) -> Image.Image:
    """A digit as a person sees it: dark on white."""
    return Image.fromarray((255 - image.reshape(8, 8) * 255).byte().numpy())


def job_of(model: nn.Module, images: Tensor, true: Tensor, given: Tensor) -> pergrad.Job:
    """What pergrad is to score: this model's loss on each of these examples."""
    with torch.no_grad():
        predicted = model(images).argmax(1)

    def show(i: int) -> dict[str, object]:
        """What a person sees of an example in the report; what is None is left out."""
        wrong = given[i] != true[i]
        return {
            "image": picture(images[i]),
            "label": int(given[i]),
            "predicted": int(predicted[i]),
            "flipped on purpose": f"it is a {true[i]}" if wrong else None,
        }

    return pergrad.Job(model=model, data=TensorDataset(images, given), losses=losses, show=show)


def job() -> pergrad.Job:
    """The same for the command line: it takes no arguments."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images, true, given = load(generator)
    return job_of(train(images, given, generator), images, true, given)


def draw(
    path: Path, images: Tensor, true: Tensor, given: Tensor, norms: Tensor, count: int = 20
) -> None:
    """The examples with the largest norms, each with its given label."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, count // 2, figsize=(count / 2 * 1.1, 3.9))
    for axis, i in zip(axes.flat, norms.argsort(descending=True)[:count].tolist(), strict=True):
        axis.imshow(images[i].reshape(8, 8), cmap="gray_r")
        axis.set_xticks([])
        axis.set_yticks([])
        wrong = given[i] != true[i]
        colour = "#c0392b" if wrong else "#333333"
        below = f"is a {true[i]}" if wrong else "not flipped"
        axis.set_title(f"label {given[i]}", color=colour, fontsize=11)
        axis.set_xlabel(f"{below}\nnorm {norms[i]:.1f}", color=colour, fontsize=8)
        for side in axis.spines.values():
            side.set_color(colour)
    figure.suptitle(f"The {count} training digits with the largest gradient norms", fontsize=12)
    figure.tight_layout(h_pad=1.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def say_small(norms: Tensor) -> str:
    """Which examples have no gradient, in words."""
    zero = (norms == 0).nonzero().flatten().tolist()
    if zero:
        listed = ", ".join(map(str, zero[:10])) + (", ..." if len(zero) > 10 else "")
        first = f"{len(zero)} examples have a gradient of exactly zero: number {listed}."
    else:
        smallest = int(norms.argmin())
        first = (
            "No example has a gradient of exactly zero; the smallest norm is "
            f"{norms[smallest]:.1e}, that of example number {smallest}."
        )
    tiny, small = (int((norms < bound).sum()) for bound in (1e-6, 1e-3 * float(norms.max())))
    return (
        f"{first}\nBelow 1e-6: {tiny} examples. Below a thousandth of the largest norm: {small} of "
        f"{len(norms)}; the network has little left to learn from these."
    )


def main(out: Path) -> dict[str, int | str]:
    """Train, score, report, draw; says what was found, and returns it."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    images, true, given = load(generator)
    flipped = given != true
    count = int(flipped.sum())
    print(
        f"{len(true)} handwritten digits. {count} of them ({FLIPPED_SHARE:.0%}, seed {SEED}) were "
        "given a wrong label."
    )

    start = time.perf_counter()
    model = train(images, given, generator)
    right = model(images).argmax(1) == given
    print(
        f"Trained a network with one hidden layer for {EPOCHS} epochs "
        f"({time.perf_counter() - start:.1f} s). It now predicts {int(right.sum())} of the "
        f"{len(true)} given labels, and {int(right[flipped].sum())} of the {count} wrong ones."
    )

    start = time.perf_counter()
    folder = out / "scores"
    if (folder / "manifest.json").is_file():
        shutil.rmtree(folder)  # of an earlier demo
    scores = pergrad.scan(job_of(model, images, true, given), folder)
    table = scores.table(["loss", "norm"])
    values = {name: torch.tensor(table[name].to_numpy()) for name in ("norm", "loss")}
    norms = values["norm"]
    seconds = time.perf_counter() - start
    print(f"Scored every training example by its gradient norm ({seconds:.2f} s).")

    top = round(FLIPPED_SHARE * len(true))
    print(f"\nWrong labels among the {top} examples ({FLIPPED_SHARE:.0%}) that stand out most:")
    hits = {
        name: int(flipped[column.argsort(descending=True)[:top]].sum())
        for name, column in values.items()
    }
    print(f"  by gradient norm: {hits['norm']} of {count}")
    print(f"  by loss:          {hits['loss']} of {count}")
    print(f"  {'by chance:':<18}about {top * count / len(true):.0f} of {count}")

    print("\n" + say_small(norms))

    path = out / "digits_top.png"
    draw(path, images, true, given, norms)
    print(f"\nThe 20 examples with the largest norms, with their labels: {path}")
    page = out / "report.html"
    scores.report(page)
    print(f"The report, to open in a browser: {page}")
    return {
        "examples": len(true),
        "flipped": count,
        "top": top,
        "flipped_in_top_by_norm": hits["norm"],
        "flipped_in_top_by_loss": hits["loss"],
        "scores": str(folder),
        "report": str(page),
        "picture": str(path),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="a folder")
    main(parser.parse_args().out)
