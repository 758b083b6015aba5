"""Fashion-MNIST: which training pictures make the network take these shirts for coats?

Trains the network of fashion.py on 5,000 training pictures, and picks held-out shirts that it takes
for coats. For each of them pergrad scores every training picture by influence: how much does it
help the network to see a shirt, or harm? Then comes the test: the 50 pictures that harm most are
taken out, and the network is trained again. Is the shirt seen as a shirt now? The same is done
without the 50 nearest coats (in what goes into the last layer), and without 50 random pictures.
Takes ten minutes and no GPU.

    pip install 'pergrad[report,attribution]'
    apt-get install dataset-fashion-mnist      # on Debian and Ubuntu; or see DATA in fashion.py
    python coats.py [--out coats_output]

    pergrad curvature coats.py:job --out coats_fit
    pergrad influence coats.py:job --queries coats.py:shirts --curvature coats_fit --out coats_found
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import pergrad
from fashion import BATCH, CLASSES, accuracy, losses, network, picture, read

WEIGHTS = Path("coats_weights.pt")  # made by the first run, so that influence can be resumed
PICTURES = 5_000  # to train on, so that training again takes seconds
SHIRTS = 10  # that are taken for coats, and asked about
OUT = 50  # pictures taken out
SEEDS = 2  # trainings without them
EPOCHS = 6
SHIRT, COAT = CLASSES.index("shirt"), CLASSES.index("coat")


def training_set() -> tuple[Tensor, Tensor]:
    """The first pictures and labels."""
    pictures, labels = read("train")
    return pictures[:PICTURES], labels[:PICTURES]


def train(pictures: Tensor, labels: Tensor, seed: int = 0) -> nn.Module:
    """An ordinary training loop; it knows nothing of pergrad."""
    torch.manual_seed(seed)
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


def job() -> pergrad.Job:
    """The training pictures, under the trained network; `outputs` is for the curvature."""
    pictures, labels = training_set()
    return pergrad.Job(
        model=trained(pictures, labels),
        data=TensorDataset(pictures, labels),
        losses=losses,
        outputs=lambda model, batch: model(batch[0]),
        show=lambda i: {"image": picture(pictures[i]), "label": CLASSES[labels[i]]},
    )


def shirts(job: pergrad.Job) -> TensorDataset:
    """What is asked about: held-out shirts that the network takes for coats."""
    pictures, labels = read("t10k")
    with torch.no_grad():
        guesses = torch.cat([job.model(x).argmax(1) for x in pictures.split(1000)])
    wrong = ((labels == SHIRT) & (guesses == COAT)).nonzero()[:SHIRTS, 0]
    return TensorDataset(pictures[wrong], labels[wrong])


def nearest_coats(job: pergrad.Job, x: Tensor) -> Tensor:
    """The numbers of the coats that are nearest to a picture, by what goes into the last layer."""
    pictures, labels = job.data.tensors
    body = job.model[:-1]
    with torch.no_grad():
        known = torch.cat([body(part) for part in pictures.split(1000)])
        known = F.normalize(known - known.mean(0), dim=1)
        own = F.normalize(body(x[None]) - known.mean(0), dim=1)
    near = (known @ own[0]).masked_fill(labels != COAT, -2)
    return near.argsort(descending=True)[:OUT]


def sees_shirt(job: pergrad.Job, without: Tensor, asked: Tensor) -> int:
    """How often networks that were trained without some pictures see a shirt, over SEEDS."""
    pictures, labels = job.data.tensors
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[without] = False
    seen = 0
    for seed in range(SEEDS):
        again = train(pictures[kept], labels[kept], seed)
        with torch.no_grad():
            seen += int((again(asked).argmax(1) == SHIRT).sum())
    return seen


def main(out: Path) -> None:
    """Train, score, report; take out what harms, and say whether it was that."""
    start = time.perf_counter()
    scored = job()
    asked = shirts(scored)
    labels = scored.data.tensors[1]
    print(
        f"{len(labels):,} training pictures. The network gets "
        f"{accuracy(scored.model, *read('t10k')):.1%} of the held-out pictures right, and takes "
        f"these {len(asked)} shirts for coats ({time.perf_counter() - start:.0f} s)."
    )

    start = time.perf_counter()
    fit = pergrad.curvature(scored, out / "fit")
    found = pergrad.influence(
        scored, asked, out / "found", curvature=fit,
        show=lambda q: {"image": picture(asked[q][0]), "label": "shirt, taken for a coat"},
    )  # fmt: skip
    print(f"Influence of each picture on each shirt ({time.perf_counter() - start:.0f} s).")
    ends = found.ends(OUT)
    for what, end in (("help", 0), ("harm", 1)):
        of = torch.cat([labels[torch.tensor(ends[q][end][0])] for q in range(len(asked))])
        counts = of.bincount(minlength=len(CLASSES))
        top = counts.argsort(descending=True)[:3].tolist()
        share = ", ".join(f"{CLASSES[k]} {counts[k] / len(of):.0%}" for k in top)
        print(f"  the {OUT} that {what} most are {share}")
    page = found.report(out / "influence.html")

    start = time.perf_counter()
    chance = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:OUT]
    pixels = asked.tensors[0]
    seen = {"that harm most": 0, "nearest coats": 0, "random": sees_shirt(scored, chance, pixels),
            "none": sees_shirt(scored, chance[:0], pixels)}  # fmt: skip
    for q, x in enumerate(pixels):
        seen["that harm most"] += sees_shirt(scored, torch.tensor(ends[q][1][0]), x[None])
        seen["nearest coats"] += sees_shirt(scored, nearest_coats(scored, x), x[None])
    trials = SEEDS * len(asked)
    print(f"\nTrained again without {OUT} pictures, the network sees a shirt")
    for name, count in seen.items():
        print(f"  {name + ':':16} {count} of {trials} times")
    print(f"({time.perf_counter() - start:.0f} s)")
    print(f"\nThe report, to open in a browser: {page}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("coats_output"), help="a folder")
    main(parser.parse_args().out)
