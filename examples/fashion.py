"""Fashion-MNIST: which training pictures pull the network away from the held-out pictures?

Trains a small convolutional network on the 60,000 training pictures, then lets pergrad score each
of them: its loss, the norm of its gradient, and the inner product of its gradient with the mean
gradient of the 10,000 held-out pictures. Where that is negative, a step on this one picture makes
the held-out pictures worse, to first order. Takes some minutes and no GPU.

    pip install 'pergrad[report]'
    apt-get install dataset-fashion-mnist      # on Debian and Ubuntu; or see DATA below
    python fashion.py [--out fashion_output]

    pergrad scan fashion.py:job --out fashion_scores --against held_out=fashion.py:held_out
"""

import argparse
import copy
import gzip
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pergrad

# Where the four files are: {train,t10k}-images-idx3-ubyte.gz and {train,t10k}-labels-idx1-ubyte.gz,
# as in the Debian package and at https://github.com/zalandoresearch/fashion-mnist.
DATA = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
WEIGHTS = Path("fashion_weights.pt")  # made by the first run, so that a scan can be resumed

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat",
           "sandal", "shirt", "sneaker", "bag", "ankle boot")  # fmt: skip
SEED = 0
EPOCHS = 3
BATCH = 128


def read(part: str) -> tuple[Tensor, Tensor]:
    """Pictures (N, 1, 28, 28) scaled to 0..1 and labels (N,) of "train" or "t10k"."""
    files = [DATA / f"{part}-images-idx3-ubyte.gz", DATA / f"{part}-labels-idx1-ubyte.gz"]
    for file in files:
        if not file.is_file():
            sys.exit(
                f"There is no {file}. On Debian or Ubuntu say: apt-get install "
                "dataset-fashion-mnist. Elsewhere fetch the four files from "
                "https://github.com/zalandoresearch/fashion-mnist (data/fashion) and set the "
                "environment variable FASHION_MNIST to their folder."
            )
    pictures, labels = (bytearray(gzip.decompress(file.read_bytes())) for file in files)
    return (
        torch.frombuffer(pictures, dtype=torch.uint8, offset=16).view(-1, 1, 28, 28) / 255,
        torch.frombuffer(labels, dtype=torch.uint8, offset=8).long(),
    )


def network() -> nn.Module:
    """Two convolutions and two linear layers, 105,866 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(pictures: Tensor, labels: Tensor) -> nn.Module:
    """An ordinary training loop; it knows nothing of pergrad."""
    torch.manual_seed(SEED)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    steps = EPOCHS * -(-len(pictures) // BATCH)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(pictures)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(pictures[batch]), labels[batch]).backward()
            optimizer.step()
            decay.step()
    return model


def trained(pictures: Tensor, labels: Tensor) -> nn.Module:
    """The network with the weights of an earlier run, or trained now."""
    if WEIGHTS.is_file():
        print(f"Using the weights in {WEIGHTS}; delete it to train again.", file=sys.stderr)
        model = network()
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
        return model
    print(f"Training for {EPOCHS} epochs ...", file=sys.stderr)
    model = train(pictures, labels)
    torch.save(model.state_dict(), WEIGHTS)
    return model


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss per picture."""
    pictures, labels = batch
    return F.cross_entropy(model(pictures), labels, reduction="none")


def picture(pixels: Tensor) -> Image.Image:
    """A picture as a person sees it: dark on white."""
    return Image.fromarray((255 - pixels[0] * 255).byte().numpy())


def job() -> pergrad.Job:
    """What pergrad is to score: the training pictures, under the trained network."""
    pictures, labels = read("train")
    return pergrad.Job(
        model=trained(pictures, labels),
        data=TensorDataset(pictures, labels),
        losses=losses,
        show=lambda i: {"image": picture(pictures[i]), "label": CLASSES[labels[i]]},
    )


def held_out(_: pergrad.Job) -> pergrad.MeanGradient:
    """What each gradient is compared with: the mean gradient of the held-out pictures."""
    return pergrad.MeanGradient(TensorDataset(*read("t10k")))


def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """The share of pictures that get their label."""
    with torch.no_grad():
        right = sum(
            int((model(x).argmax(1) == y).sum())
            for x, y in zip(pictures.split(1000), labels.split(1000), strict=True)
        )
    return right / len(labels)


def mean_loss(model: nn.Module, data: TensorDataset) -> float:
    """The mean loss over a data set, in float64."""
    pictures, labels = data.tensors
    with torch.no_grad():
        parts = zip(pictures.split(1000), labels.split(1000), strict=True)
        return sum(float(losses(model, part).double().sum()) for part in parts) / len(labels)


def step(job: pergrad.Job, indices: Tensor, size: float) -> nn.Module:
    """A copy of the network after one step of plain gradient descent on these pictures."""
    model = copy.deepcopy(job.model)
    total = losses(model, job.data[indices]).mean()
    for p, gradient in zip(
        model.parameters(), torch.autograd.grad(total, list(model.parameters())), strict=True
    ):
        p.data -= size * gradient
    return model


def most_common(labels: Tensor) -> str:
    """The three commonest classes, with their shares."""
    counts = labels.bincount(minlength=len(CLASSES))
    top = counts.argsort(descending=True)[:3].tolist()
    return ", ".join(f"{CLASSES[k]} {counts[k] / len(labels):.0%}" for k in top)


def main(out: Path) -> None:
    """Train, score, report; say what was found, and check that it is true."""
    start = time.perf_counter()
    scored = job()
    pictures, labels = scored.data.tensors
    test = TensorDataset(*read("t10k"))
    print(
        f"{len(labels):,} training pictures, {len(test):,} held out. The network gets "
        f"{accuracy(scored.model, pictures, labels):.1%} of the first right and "
        f"{accuracy(scored.model, *test.tensors):.1%} of the second "
        f"({time.perf_counter() - start:.0f} s)."
    )

    start = time.perf_counter()
    scores = pergrad.scan(scored, out / "scores", against={"held_out": held_out(scored)})
    table = scores.table(["norm", "dot:held_out"])
    norms, dots = (torch.tensor(table[name].to_numpy()) for name in ("norm", "dot:held_out"))
    print(f"Scored every training picture ({time.perf_counter() - start:.0f} s).")

    one_percent = len(labels) // 100
    top = norms.argsort(descending=True)[:one_percent]
    share = norms[top].square().sum() / norms.square().sum()
    print(
        f"\nThe {one_percent} pictures (1 %) with the largest gradient norms carry {share:.0%} of "
        f"the total squared norm.\nThey are mostly: {most_common(labels[top])}."
    )

    against = dots < 0
    print(
        f"\n{int(against.sum()):,} pictures ({against.double().mean():.0%}) pull against the "
        "held-out pictures: a step on one of them raises the held-out loss, to first order.\n"
        f"They are mostly: {most_common(labels[against])}."
    )
    order = dots.argsort()
    print("\nIs that so? One small step on the mean of 600 pictures changes the held-out loss by")
    before = mean_loss(scored.model, test)
    for name, chosen in (
        ("most against", order[:one_percent]),
        ("most along", order[-one_percent:]),
    ):
        size = 1e-5 / float(dots[chosen].mean().abs())  # to change the loss by 0.00001
        said = -size * float(dots[chosen].mean())
        found = mean_loss(step(scored, chosen, size), test) - before
        print(f"  the {one_percent} {name}:  said {said:+.2e}, found {found:+.2e}")

    worst = order[:10].tolist()
    with torch.no_grad():
        guesses = scored.model(pictures[worst]).argmax(1).tolist()
    print("\nThe 10 that pull hardest against the held-out pictures:")
    for i, guess in zip(worst, guesses, strict=True):
        print(
            f"  number {i:>5}: labelled {CLASSES[labels[i]]}, the network says {CLASSES[guess]}; "
            f"inner product {dots[i]:.3f}, norm {norms[i]:.1f}"
        )

    page = out / "report.html"
    scores.report(page)
    print(f"\nThe report, to open in a browser: {page}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("fashion_output"), help="a folder")
    main(parser.parse_args().out)
