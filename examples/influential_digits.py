"""Which training digits drive these predictions? Asked of influence, and checked by training again.

Trains a small network on 1,000 of scikit-learn's handwritten digits. Of the others that it gets
right it takes the 20 that it is least sure of, and `pergrad.influence` scores every training digit
for each of these. Then the network is trained again on random halves of the training digits, to see
which score foretells what becomes of a prediction: influence, the digits most alike, or their
losses. The report shows which digits help and which harm.

    pip install 'pergrad[demo]'
    python influential_digits.py [--out demo_output]      # or `pergrad demo`; under a minute
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
TRAINED = 1000  # digits to train on; the others are held out
STEPS = 150
ASKED = 20  # held-out digits
HALVES = 50  # trainings
OUT = 20  # digits that are taken out, for FEW of the predictions
FEW = 5


def load() -> tuple[Tensor, Tensor]:
    """Images (N, 64) scaled to 0..1 and their labels, in a random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(SEED))
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    return images[order], torch.tensor(digits.target)[order]


def train(images: Tensor, labels: Tensor, seed: int = SEED) -> nn.Module:
    """An ordinary training loop, on all digits in each step; it knows nothing of pergrad."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """One loss per example."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def picture(image: Tensor) -> Image.Image:
    """A digit as a person sees it: dark on white."""
    return Image.fromarray((255 - image.reshape(8, 8) * 255).byte().numpy())


def job_of(model: nn.Module, images: Tensor, labels: Tensor) -> pergrad.Job:
    """What is scored: these digits, under this model; `outputs` is for the curvature."""
    return pergrad.Job(
        model=model,
        data=TensorDataset(images, labels),
        losses=losses,
        outputs=lambda model, batch: model(batch[0]),
        show=lambda i: {"image": picture(images[i]), "label": int(labels[i])},
    )


def job() -> pergrad.Job:
    """The same for the command line: it takes no arguments."""
    images, labels = load()
    images, labels = images[:TRAINED], labels[:TRAINED]
    return job_of(train(images, labels), images, labels)


def least_sure(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The numbers of the images that the model gets right, but hardly."""
    with torch.no_grad():
        scores = model(images)
    (first, second), wrong = scores.softmax(1).topk(2).values.T, scores.argmax(1) != labels
    return (first - second + wrong.float()).argsort()[:ASKED]


def alike(model: nn.Module, asked: Tensor, images: Tensor) -> Tensor:
    """(Q, N): cosines of what goes into the last layer, centred."""
    with torch.no_grad():
        known, own = model[:-1](images), model[:-1](asked)
    centre = known.mean(0)
    return F.normalize(own - centre, dim=1) @ F.normalize(known - centre, dim=1).T


def flips(images: Tensor, labels: Tensor, asked: Tensor, own: Tensor, out: list[Tensor]) -> int:
    """How many predictions are wrong when the network is trained without some digits, for each."""
    count = 0
    for image, label, without in zip(asked, own, out, strict=True):
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[without] = False
        again = train(images[kept], labels[kept])
        with torch.no_grad():
            count += int(again(image).argmax() != label)
    return count


def fresh(folder: Path) -> Path:
    """The folder, without what an earlier demo left there."""
    if (folder / "manifest.json").is_file():
        shutil.rmtree(folder)
    return folder


def main(out: Path) -> dict[str, object]:
    """Train, score, train again, report; says what was found, and returns it."""
    images, labels = load()
    held_out, true = images[TRAINED:], labels[TRAINED:]
    images, labels = images[:TRAINED], labels[:TRAINED]
    start = time.perf_counter()
    model = train(images, labels)
    right = model(held_out).argmax(1) == true
    print(
        f"{len(right) + TRAINED} handwritten digits: trained on {TRAINED} of them "
        f"({time.perf_counter() - start:.1f} s); of the {len(right)} others the network gets "
        f"{int(right.sum())} right."
    )

    start = time.perf_counter()
    numbers = least_sure(model, held_out, true)
    asked, own = held_out[numbers], true[numbers]
    queries = TensorDataset(asked, own)
    scored = job_of(model, images, labels)
    fit = pergrad.curvature(scored, fresh(out / "fit"))
    found = pergrad.influence(
        scored, queries, fresh(out / "found"), curvature=fit,
        show=lambda q: {"image": picture(asked[q]), "label": int(own[q])},
    )  # fmt: skip
    print(
        f"Scored every training digit for the {ASKED} of these that it is least sure of "
        f"({time.perf_counter() - start:.1f} s)."
    )

    start = time.perf_counter()
    near = alike(model, asked, images)
    same = labels == own[:, None]
    with torch.no_grad():
        of_training = losses(model, (images, labels))
    evaluation = pergrad.evaluate(
        lambda rows, seed: train(images[rows], labels[rows], seed),
        scored,
        queries,
        {
            "influence": found,
            "the digits most alike": torch.where(same, near, -near),
            "the training digits' losses": -of_training.expand(ASKED, -1),
        },
        out=fresh(out / "retrained"),
        subsets=HALVES,
        seeds=1,
    )
    print(
        f"Trained again on {HALVES} random halves of the digits "
        f"({time.perf_counter() - start:.1f} s).\n"
        "\nWhich score foretells what becomes of a prediction? Rank correlations over the halves\n"
        "(1: exactly; 0: not at all), with 95 % intervals:"
    )
    ranked = {}
    for name in ("influence", "the digits most alike", "the training digits' losses", "random"):
        score = evaluation.scores[name]
        ranked[name] = round(score.lds, 2)
        print(f"  {name + ':':29}{score.lds:5.2f}  ({score.low:.2f} to {score.high:.2f})")

    helpers = [torch.tensor(helping) for (helping, _), _ in found.ends(OUT)[:FEW]]
    alikes = [near[q].masked_fill(~same[q], -2).topk(OUT).indices for q in range(FEW)]
    generator = torch.Generator().manual_seed(SEED)
    chance = [torch.randperm(TRAINED, generator=generator)[:OUT] for _ in range(FEW)]
    print(f"\nTrained again without {OUT} digits, predictions that are wrong now:")
    changed = {}
    for name, without in (
        ("that help most", helpers), ("most alike, of its label", alikes), ("random", chance),
    ):  # fmt: skip
        changed[name] = flips(images, labels, asked[:FEW], own[:FEW], without)
        print(f"  {name + ':':29}{changed[name]} of {FEW}")

    page = found.report(out / "influence.html")
    print(f"\nThe report, to open in a browser: {page}")
    return {
        "examples": TRAINED,
        "queries": ASKED,
        "halves": HALVES,
        "rank_correlations": ranked,
        "predictions_changed": changed,
        "influence": str(out / "found"),
        "report": str(page),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="a folder")
    main(parser.parse_args().out)
